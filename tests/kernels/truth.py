"""One truth for all kernels: runs them over the table, and describes everything that is not as it must be.

Nothing here needs pytest: scripts/gpu_check runs the same table on a GPU.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_cwd.kernels import interface
from hf_cwd.rules import RULES
from tests.kernels.table import APPLY, Case, Parameter, at_call, cases
from tests.support.reference.arithmetic import F, Result, Stored

__all__ = ["cases", "for_capturable", "run"]

Array = np.ndarray
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int16": torch.int16}
NAMES = {dtype: name for name, dtype in TORCH.items()}
INTEGERS = {4: torch.int32, 2: torch.int16}
GUARD = 16  # elements before and after a tensor that nobody may touch
SHOWN = 3  # elements described of those that are wrong


def run(
    kernel: Any, device: str, chosen: Iterable[Case], *, eager: bool = False, capturable: bool = False
) -> dict[str, list[str]]:
    """Runs a kernel over cases.

    Args:
        kernel: a module or an object with the operations of :class:`hf_cwd.kernels.interface.Kernel`.
        eager: it is made of torch's own operations. torch's square root on a CPU is one unit off in every sixth
            element, so that it is given to the reference; and with a beta of 0 torch's lerp gives the last elements
            of a tensor a zero of the other sign, which is not looked at.
        capturable: steps and learning rates are tensors on the device.

    Returns:
        What is wrong, by the name of the case; an empty list where all is well.
    """
    workspace = interface.Workspace()  # one optimizer's: from case to case its tensors, settings and steps change
    return {case.name: _problems(kernel, device, case, workspace, eager, capturable) for case in chosen}


def for_capturable(chosen: Iterable[Case]) -> list[Case]:
    """Those that are also run with steps and learning rates on the device: all variations, and a few dtypes."""
    words = ("float32 float32 float32", "float32 float32 -", "in one call", "calls", "learning rate 0")
    return [case for case in chosen if any(word in case.name for word in words)]


def torch_root(v: Array) -> Array:
    return torch.from_numpy(v).sqrt().numpy()


class _Placed(NamedTuple):
    """A tensor in a larger one, whose other elements are watched."""

    whole: Tensor
    start: int
    numel: int

    @classmethod
    def of(cls, bits: Array, dtype: str, device: str, offset: int) -> "_Placed":
        start = GUARD + offset
        filled = np.full(start + len(bits) + GUARD, 0x5A5A, bits.dtype)
        filled[start : start + len(bits)] = bits
        integers = torch.empty(len(filled), dtype=INTEGERS[bits.itemsize], device=device)  # torch aligns, numpy may not
        integers.copy_(torch.from_numpy(filled.view(f"i{bits.itemsize}")))
        return cls(integers.view(TORCH[dtype]), start, len(bits))

    @property
    def view(self) -> Tensor:
        return self.whole[self.start : self.start + self.numel]

    def is_intact(self) -> bool:
        bits = _bits(self.whole)
        return bool((bits[: self.start] == 0x5A5A).all() and (bits[self.start + self.numel :] == 0x5A5A).all())


def _bits(tensor: Tensor) -> Array:
    size = tensor.element_size()
    return tensor.detach().contiguous().view(INTEGERS[size]).cpu().numpy().view(f"u{size}")


class _Tensors:
    """Those of one parameter."""

    def __init__(self, rule: str, parameter: Parameter, device: str, number: int) -> None:
        numbers = parameter.numbers(rule)
        offsets = (0,) * 5 if parameter.aligned else (number % 7, (2 * number + 1) % 8, *[(3 * number) % 5] * 3)

        def place(stored: Stored, offset: int) -> _Placed:
            return _Placed.of(stored.bits, stored.dtype, device, offset)

        self.param, self.grad = place(numbers.param, offsets[0]), place(numbers.grad, offsets[1])
        self.states = [place(state, offset) for state, offset in zip(numbers.states, offsets[2:], strict=False)]
        self.remainder = None
        if numbers.remainder is not None:
            self.remainder = _Placed.of(numbers.remainder.view(np.uint16), "int16", device, offsets[4])
        self.untouched = numbers
        self.step = torch.zeros((), device=device)
        is_float32 = float(F(parameter.settings.lr)) == parameter.settings.lr
        self.lr = torch.zeros((), dtype=torch.float32 if is_float32 else torch.float64, device=device)

    def item(self, rule: str, parameter: Parameter, call: int, capturable: bool) -> interface.Item:
        chosen = at_call(parameter.settings, call)
        step, lr = (self.step.fill_(chosen.step), self.lr.fill_(chosen.lr)) if capturable else (chosen.step, chosen.lr)
        named = ("weight_decay", "cautious", "mask", "maximize")
        given = interface.Settings(
            **{name: getattr(chosen, name) for name in named},
            **{"hyper": tuple(chosen.hyper.items()), "lr": lr, "kernel": "auto", "capturable": capturable},
        )
        remainder = None if self.remainder is None else self.remainder.view
        param = self.param.view
        if rule == APPLY:  # the gradient is not looked at
            return interface.Item(param, torch.empty(0), (), remainder, step, given, param)
        states = tuple(state.view for state in self.states)
        return interface.Item(param, self.grad.view, states, remainder, step, given, param)


def _problems(
    kernel: Any, device: str, case: Case, workspace: interface.Workspace, eager: bool, capturable: bool
) -> list[str]:
    rule = None if case.rule == APPLY else RULES[case.rule]
    tensors = [_Tensors(case.rule, parameter, device, k) for k, parameter in enumerate(case.parameters)]
    for one in tensors:
        dtypes = [t.whole.dtype for t in (one.param, one.grad, *one.states)] + ([TORCH[case.out]] if case.out else [])
        reason = kernel.refusal_to_apply(tuple(dtypes)) if rule is None else kernel.refusal(rule, tuple(dtypes))
        if reason:
            return [f"refused: {reason}"]
    outs = []
    if case.out is not None:  # not zeros: an element that is not written is seen
        size = {2: np.uint16, 4: np.uint32}[TORCH[case.out].itemsize]
        outs = [_Placed.of(np.full(one.grad.numel, 0x3A5A, size), case.out, device, 0) for one in tensors]
    for call in range(case.calls):
        sums = interface.Sums() if case.counted else None
        items = [one.item(case.rule, p, call, capturable) for one, p in zip(tensors, case.parameters, strict=True)]
        try:
            if rule is None:
                scales = [parameter.settings.scale for parameter in case.parameters]
                kernel.apply(items, [one.grad.view for one in tensors], scales, sums, workspace)
            elif case.out is None:
                kernel.update(rule, items, sums, workspace, None)
            else:
                kernel.directions(rule, items, [out.view for out in outs], workspace)
        except Exception as error:  # a case that cannot run is a result, and the others still run
            return [f"raised {type(error).__name__}: {error}"]
    expected = case.expected(torch_root if eager and device == "cpu" else None)
    problems = []
    for k, (one, parameter, right) in enumerate(zip(tensors, case.parameters, expected, strict=True)):
        hyper = parameter.settings.hyper
        loose = eager and 0 in (hyper.get("momentum"), *hyper.get("betas", ()))
        wrong = [*_compared(one, right, loose), *(_direction(outs[k], case.out, right, loose) if case.out else ())]
        problems += [f"parameter {k} ({parameter.dtypes}, {parameter.settings}): {text}" for text in wrong]
    if sums is not None:
        problems += _summed(sums, items, expected)
    return problems


def _summed(sums: interface.Sums, items: Sequence[interface.Item], expected: Sequence[Result]) -> Iterable[str]:
    found = {id(p): row for call in sums.calls for p, row in zip(call.owners, call.numbers.tolist(), strict=True)}
    if len(found) != len(items):
        yield f"sums of {len(found)} parameters"
    for k, (item, right) in enumerate(zip(items, expected, strict=True)):
        row = found.get(id(item.param), ())
        if right.sums is None or not row:
            continue
        if row[0] != right.sums[0]:
            yield f"parameter {k}: count is {row[0]}, not {right.sums[0]}"
        for name, one, other in zip(("u^2", "x^2", "decayed x^2"), row[1:], right.sums[1:], strict=False):
            # Up to 64 numbers are added in float32, in an order of the kernel's own.
            is_beyond = other > 1e38 and one == np.inf
            if not is_beyond and not np.isclose(one, other, rtol=4e-6, atol=1e-44, equal_nan=True):
                yield f"parameter {k}: the sum of {name} is {one}, not {other}"


def _compared(one: _Tensors, right: Result, loose: bool) -> Iterable[str]:
    before = one.untouched
    places = {"param": one.param, "grad": one.grad, "remainder": one.remainder}
    places |= {f"state {k}": state for k, state in enumerate(one.states)}
    for name, place in places.items():
        if place is not None and not place.is_intact():
            yield f"wrote outside {name}"
    if not np.array_equal(_bits(one.grad.view), before.grad.bits):
        yield "grad has changed"
    inputs = {"x": before.param, "g": before.grad} | {f"s{k}": state for k, state in enumerate(before.states)}
    for k, (state, expected) in enumerate(zip(one.states, right.states, strict=True)):
        yield from _different(f"state {k}", Stored(expected.dtype, _bits(state.view)), expected, inputs, loose)
    param = Stored(right.param.dtype, _bits(one.param.view))
    yield from _different("param", param, right.param, inputs, loose)
    if one.remainder is not None:
        lower = _bits(one.remainder.view).view(np.int16)
        for k in np.flatnonzero(lower != right.remainder)[:SHOWN]:
            yield f"remainder[{k}] is {lower[k]}, not {right.remainder[k]} {_described(inputs, k)}"


def _direction(found: _Placed, out: str, right: Result, loose: bool) -> Iterable[str]:
    if not found.is_intact():
        yield "wrote outside the direction"
    yield from _different("direction", Stored(out, _bits(found.view)), Stored.of(right.u, out), {}, loose)


def _different(name: str, found: Stored, right: Stored, inputs: dict[str, Stored], loose: bool) -> Iterable[str]:
    """Elements whose bits differ; any NaN is as good as another, and a zero too where ``loose``."""
    same = (found.bits == right.bits) | (np.isnan(found.wide) & np.isnan(right.wide))
    wrong = np.flatnonzero(~(same | (found.wide == right.wide)) if loose else ~same)
    for k in wrong[:SHOWN]:
        yield f"{name}[{k}] is {found.wide[k]!r}, not {right.wide[k]!r} {_described(inputs, k)}, {len(wrong)} such"


def _described(inputs: dict[str, Stored], k: int) -> str:
    return "of " + ", ".join(f"{name}={stored.wide[k]!r}" for name, stored in inputs.items())
