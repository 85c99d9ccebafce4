"""The cases of the truth table: every operation, dtype, mode, branch and special value, and what must come out.

A case is one call of a kernel with several parameters. What is expected of it is computed once, by
tests/support/reference/arithmetic.py.
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_cwd.rules import RULES
from tests.kernels.numbers import Numbers
from tests.support.reference import arithmetic
from tests.support.reference.arithmetic import Result, Settings

Root = Callable[[np.ndarray], np.ndarray]
DTYPES = ("float32", "bfloat16", "float16")
APPLY = "apply"  # the operation that has no rule

# A rule's hyper-parameters (the others at their defaults) and the step's number. A rule that is not here fails a test.
VARIATIONS: Mapping[str, list[tuple[dict[str, Any], int]]] = {
    "adamw": [
        ({}, 1),
        ({"betas": (0.9, 0.95), "eps": 1e-6}, 2),
        ({"betas": (0.25, 0.1), "eps": 1e-3}, 3),
        ({"betas": (0.5, 0.5)}, 1000),
        ({"betas": (0.0, 0.0), "eps": 0.0}, 2),
        ({"betas": (0.95, 0.999)}, 1_000_000),
        ({"betas": (0.1, 0.9)}, 2),
    ],
    "lion": [
        ({}, 1),
        ({"betas": (0.95, 0.98)}, 2),
        ({"betas": (0.1, 0.3)}, 1000),
        ({"betas": (0.5, 0.5)}, 1_000_000),
        ({"betas": (0.0, 0.9)}, 2),
    ],
    "muon": [
        ({"momentum": m, "nesterov": n}, 1 + k) for k, m in enumerate((0.95, 0.3, 0.5, 0.0)) for n in (True, False)
    ],
    "sgd": [
        ({}, 1),
        ({"momentum": 0.9}, 1),
        ({"momentum": 0.9}, 2),
        ({"momentum": 0.7, "dampening": 0.3}, 1),
        ({"momentum": 0.7, "dampening": 0.3}, 1000),
        ({"momentum": 0.9, "nesterov": True}, 1),
        ({"momentum": 0.9, "nesterov": True}, 1_000_000),
        ({"momentum": 0.9, "ema": True}, 1),
        ({"momentum": 0.3, "ema": True}, 2),
        ({"momentum": 0.95, "ema": True, "nesterov": True}, 2),
        ({"momentum": 0.3, "ema": True, "nesterov": True}, 1),
    ],
}
SCALES = (1.0, 0.2 * 768**0.5, 0.375)
# (weight decay's factor, cautious, mask) and the direction of the search: each of them in turn.
DECAYS = ((1.0, True, "ge"), (1.0, True, "gt"), (1.0, False, "ge"), (0.0, True, "ge"))
MODES = tuple(itertools.product(DECAYS, (False, True)))
RATES = ((1e-3, 0.1), (0.125, 0.5), (0.02, 2.0))
# Around the vectors and the chunks of C (16384, 32768) and Triton (1024 to 4096), and the blocks of eager (131072).
SIZES = (0, 1, 3, 17, 63, 64, 65, 127, 129, 1000, 1023, 1025, 2049, 4095, 4097, 16383, 16384, 16385, 32769, 131105)
FEW_SIZES = (0, 1, 3, 257, 2047, 2048, 2049, 4097)


class Hyper(dict):
    """Hyper-parameters by name, hashable."""

    def __hash__(self) -> int:
        return hash(tuple(self.items()))


@dataclass(frozen=True)
class Dtypes:
    """Of a parameter's tensors. ``grad`` is that of the direction where one is applied."""

    param: str
    grad: str
    state: str = "float32"
    remainder: bool = False

    def __str__(self) -> str:
        return f"{self.param}{'+int16' if self.remainder else ''} {self.grad} {self.state}"


@dataclass(frozen=True)
class Parameter:
    """A parameter in a case: dtypes, settings, and from where its numbers are drawn."""

    dtypes: Dtypes
    settings: Settings
    seed: int
    full: bool = False
    size: int | None = None
    aligned: bool = False

    def states(self, rule: str) -> list[str]:
        keys = () if rule == APPLY else RULES[rule].state_keys(self.settings.hyper)
        return [self.dtypes.state] * len(keys)

    def numbers(self, rule: str) -> Numbers:
        types = {"param": self.dtypes.param, "grad": self.dtypes.grad, "remainder": self.dtypes.remainder}
        return Numbers(self.seed, states=self.states(rule), full=self.full, size=self.size, **types)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        rule: its name, or ``"apply"``.
        out: dtype's name of the directions that a rule for matrices gives.
        counted: the call sums up.
        calls: calls in a row on the same tensors, each a step further and with half the learning rate.
    """

    name: str
    rule: str
    parameters: tuple[Parameter, ...]
    out: str | None = None
    counted: bool = False
    calls: int = 1

    def expected(self, root: Root | None = None) -> list[Result]:
        """What must come out; ``root`` takes the place of an exact square root."""
        return _expected(self.rule, self.parameters, self.calls, root if self.rule == "adamw" else None)


def at_call(settings: Settings, call: int) -> Settings:
    return settings._replace(step=settings.step + call, lr=settings.lr / 2**call)


@functools.cache
def _expected(rule: str, parameters: tuple[Parameter, ...], calls: int, root: Root | None) -> list[Result]:
    return [_steps(rule, parameter, calls, {} if root is None else {"root": root}) for parameter in parameters]


def _steps(rule: str, parameter: Parameter, calls: int, more: dict[str, Root]) -> Result:
    numbers = parameter.numbers(rule)
    param, states, remainder = numbers.param, numbers.states, numbers.remainder
    for call in range(calls):
        settings = at_call(parameter.settings, call)
        if rule == APPLY:
            u, finite = numbers.grad.wide, True
        else:
            u, states, finite = arithmetic.directed(rule, numbers.grad, states, settings, **more)
        if rule != APPLY and RULES[rule].matrix is not None:
            result = Result(param, states, remainder, u, None)
        else:
            result = arithmetic.stepped(param, remainder, u, states, settings, finite)
        param, remainder = result.param, result.remainder
    return result


def variations(rule: str) -> list[tuple[Hyper, int, float]]:
    """Hyper-parameters, step and scale."""
    if rule == APPLY:
        return [(Hyper(), 1, scale) for scale in SCALES]
    defaults = {name: kind.default for name, kind in RULES[rule].hyperparameters.items()}
    return [(Hyper(defaults | given), step, 1.0) for given, step in VARIATIONS[rule]]


def settings(variation: tuple[Hyper, int, float], mode: Any, rate: tuple[float, float]) -> Settings:
    (factor, cautious, mask), maximize = mode
    named, step, scale = variation
    lr, weight_decay = rate
    return Settings(named, step, lr, factor * weight_decay, cautious, mask, maximize, scale)


def dtypes_of(rule: str) -> list[Dtypes]:
    """All that a kernel has to take."""
    params = [(param, False) for param in DTYPES] + [("bfloat16", True)]
    if rule == APPLY:
        return [Dtypes(param, grad, "-", remainder) for (param, remainder), grad in itertools.product(params, DTYPES)]
    if RULES[rule].matrix is not None:
        params = params[:1]  # not looked at
    return [Dtypes(p, grad, state, r) for (p, r), grad, state in itertools.product(params, DTYPES, DTYPES)]


PRIMARY = (
    *(Dtypes("float32", "float32", state) for state in ("float32", "-")),
    *(Dtypes("bfloat16", "bfloat16", state, remainder) for state in ("bfloat16", "-") for remainder in (True, False)),
)


def cases(*, few: bool = False) -> list[Case]:
    """The table. ``few``: with less of it for each dtype, but every operation, dtype, mode and pair of specials.

    Each dtype is then aligned or not, and counted or not in a case of its own, and so needs fewer compiled kernels.
    """
    return list(_cases(few))


def _cases(few: bool) -> Iterator[Case]:
    for rule in (*VARIATIONS, APPLY):
        matrix = rule != APPLY and RULES[rule].matrix is not None
        every = dtypes_of(rule)
        for out in ("float32", "bfloat16") if matrix else (None,):
            for number, dtypes in enumerate(every):
                name = f"{rule} {dtypes}" + (f" to {out}" if out else "")
                parameters = tuple(_values(rule, dtypes, number, few))
                # The two variants of a kernel, without and with sums, see the same numbers.
                for counted in (False,) if matrix else ((number % 2 == 1,) if few else (False, True)):
                    yield Case(name + " counted" * counted, rule, parameters, out, counted)
            tail = f" to {out}" if out else ""
            sizes = FEW_SIZES if few else SIZES
            for name, some in (("", every), (" of one dtype", every[:1])):
                yield Case(f"{rule} sizes{name}{tail}", rule, tuple(_sizes(rule, some, sizes, few)), out, not matrix)
            mixed = tuple(_sizes(rule, every, (33,) * len(every), few))
            yield Case(f"{rule} all dtypes in one call{tail}", rule, mixed, out, not matrix)
            yield Case(f"{rule} three calls{tail}", rule, mixed[:8], out, not matrix, calls=3)
            if not matrix:
                still = tuple(replace(p, settings=p.settings._replace(lr=0.0)) for p in mixed[:8])
                yield Case(f"{rule} learning rate 0", rule, still, counted=True)


def _values(rule: str, dtypes: Dtypes, number: int, few: bool) -> Iterator[Parameter]:
    """All variations, each in all modes or in one that changes with ``number``; every mode at least once."""
    known, full = variations(rule), dtypes in PRIMARY and not few
    if full:
        chosen = list(itertools.product(known, MODES))
    else:
        count = max(len(known), len(MODES))
        chosen = [(known[k % len(known)], MODES[(k + number) % len(MODES)]) for k in range(count)]
    for k, (variation, mode) in enumerate(chosen):
        seed = zlib.crc32(f"{rule} {dtypes} {k}".encode())
        aligned = number % 4 < 2 if few else k % 3 == 0
        yield Parameter(dtypes, settings(variation, mode, RATES[k % len(RATES)]), seed, full, aligned=aligned)


def _sizes(rule: str, every: list[Dtypes], sizes: Iterable[int], few: bool) -> Iterator[Parameter]:
    known = variations(rule)
    for k, size in enumerate(sizes):
        chosen = settings(known[k % len(known)], MODES[(3 * k) % len(MODES)], RATES[k % len(RATES)])
        number = k % len(every)
        aligned = number % 4 < 2 if few and len(every) > 1 else k % 3 == 0
        yield Parameter(every[number], chosen, 1000 * size + k, size=size, aligned=aligned)
