"""Cases of the truth table whose results were computed by hand; they pin the reference as well as the kernels.

Without other words lr = weight_decay = 1/2, so that a decayed x becomes 3/4 x, and u then takes u/2 off it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hf_cwd.rules import RULES
from tests.kernels.table import APPLY, Case, Dtypes, Root
from tests.support.reference.arithmetic import Result, Settings, Stored

INF, NAN, TINY, MAX = np.inf, np.nan, 2.0**-149, float(np.finfo(np.float32).max)
Row = Sequence[float]


class Given(NamedTuple):
    """As :class:`tests.kernels.numbers.Numbers`."""

    param: Stored
    grad: Stored
    states: list[Stored]
    remainder: np.ndarray | None


@dataclass(frozen=True)
class Example:
    """As :class:`tests.kernels.table.Parameter`."""

    dtypes: Dtypes
    settings: Settings
    given: Given
    result: Result
    aligned: bool = False

    def numbers(self, rule: str) -> Given:
        del rule
        return self.given


class ByHand(Case):
    def expected(self, root: Root | None = None) -> list[Result]:
        del root
        return [example.result for example in self.parameters]


def _case(
    name: str,
    rule: str,
    x: Row,
    g: Row,
    to: Row,
    *,
    count: int = 0,
    sums: Sequence[float] = (),
    states: Sequence[tuple[Row, Row]] = (),
    remainder: tuple[Row, Row] | None = None,
    dtype: str = "float32",
    out: str | None = None,
    **given: Any,
) -> ByHand:
    """``to`` is x after the step, or the direction where ``out`` says its dtype; states and remainders: before, after.

    ``count``: of decayed elements; ``sums``: of u^2, x^2 and decayed x^2, or nothing. ``x`` and ``to`` are bits where
    there is a remainder.
    """
    named = {"step": 1, "lr": 0.5, "weight_decay": 0.5, "cautious": True, "mask": "ge", "maximize": False}
    defaults = {} if rule == APPLY else {name: kind.default for name, kind in RULES[rule].hyperparameters.items()}
    settings = Settings(
        {key: given.pop(key, value) for key, value in defaults.items()},
        **{key: given.pop(key, value) for key, value in named.items()},
        scale=given.pop("scale", 1.0),
    )
    assert not given, given

    def stored(values: Row) -> Stored:
        if remainder is not None:
            return Stored("bfloat16", np.array(values, np.uint16))
        return Stored.of(np.array(values), dtype)

    wide = [(Stored.of(np.array(a), "float32"), Stored.of(np.array(b), "float32")) for a, b in states]
    before, after = (None, None) if remainder is None else (np.array(part, np.int16) for part in remainder)
    u = np.array(to, np.float32) if out else np.zeros(0, np.float32)
    result = Result(stored(x if out else to), [b for _, b in wide], after, u, None if out else (count, *sums))
    inputs = Given(stored(x), Stored.of(np.array(g), "float32"), [a for a, _ in wide], before)
    types = Dtypes("bfloat16" if remainder else dtype, "float32", remainder=remainder is not None)
    return ByHand(name, rule, (Example(types, settings, inputs, result),), out, counted=out is None)


# u and x aligned, opposed, opposed, aligned, and then zero, each of both signs.
X, U = [1, 1, -1, -1, 0, -0.0, 1, 1], [1, -1, 1, -1, 1, 1, 0, -0.0]
SMALL = 2.0**-8  # half a unit of bfloat16 above 1

CASES = [
    _case("mask ge", APPLY, X, U, [0.25, 1.5, -1.5, -0.25, -0.5, -0.5, 0.75, 0.75], count=6, sums=(6, 6, 4)),
    _case("mask gt", APPLY, X, U, [0.25, 1.5, -1.5, -0.25, -0.5, -0.5, 1, 1], count=2, sums=(6, 6, 2), mask="gt"),
    _case(
        "no mask",
        APPLY,
        X,
        U,
        [0.25, 1.25, -1.25, -0.25, -0.5, -0.5, 0.75, 0.75],
        count=8,
        sums=(6, 6, 6),
        cautious=False,
    ),
    _case("no decay", APPLY, X, U, [0.5, 1.5, -1.5, -0.5, -0.5, -0.5, 1, 1], sums=(6, 6, 0), weight_decay=0.0),
    # -1/4 * -0 is +0, and +0 + -0 is +0; without a decay -0 stays. Also where the coefficient is -0.
    _case("zeros, decayed", APPLY, [-0.0, 0.0], [0, 0], [0, 0], count=2),
    _case("zeros, not decayed", APPLY, [-0.0, 0.0], [0, 0], [0, 0], mask="gt"),
    _case("zeros, no decay", APPLY, [-0.0, 0.0, -0.0], [0, 0, -0.0], [-0.0, 0, 0], weight_decay=0.0),
    # inf - inf is NaN, -0 * inf too. A NaN has no sign: neither aligned nor opposed.
    _case("infinity", APPLY, [INF, INF, 1, 1], [1, -1, INF, -INF], [NAN, NAN, -INF, INF], count=2, sums=(INF,) * 3),
    _case("infinity, not decayed", APPLY, [INF, 1], [-1, 1], [NAN, 0.25], count=1, sums=(2, INF, 1)),
    _case("infinity, no decay", APPLY, [INF, -INF, -MAX], [1, 1, MAX], [INF, -INF, -INF], weight_decay=0.0),
    _case("NaN, ge", APPLY, [NAN, 1, -1], [1, NAN, NAN], [NAN, NAN, NAN], count=3, sums=(NAN,) * 3),
    _case("NaN, gt", APPLY, [NAN, 1, -1], [1, NAN, NAN], [NAN, NAN, NAN], count=0, mask="gt"),
    # u * x underflows to 0, but its sign counts. 3/4 is rounded to 1 unit, and half of it, a tie, to 0.
    _case("denormals", APPLY, [TINY, TINY, 4 * TINY], [TINY, -TINY, TINY], [0, 2 * TINY, 2 * TINY], count=2, mask="gt"),
    # The decay takes lr, not lr * scale.
    _case("scale", APPLY, [1, -1], [1, 1], [0.75 - 1, -2], count=1, sums=(2, 2, 1), scale=2.0),
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24 would be rounded to 1 + 2^-11.
    _case("fused", APPLY, [1 + 2**-11], [1 + 2**-12], [-(2**-24)], lr=1 + 2**-12, weight_decay=0.0),
    _case(
        "bfloat16 rounds once, to even",
        APPLY,
        [1, 1, 1 + 2 * SMALL],
        [-SMALL, -SMALL - 2**-20, -SMALL],
        [1, 1 + 2 * SMALL, 1 + 4 * SMALL],
        dtype="bfloat16",
        lr=1.0,
        weight_decay=0.0,
    ),
    _case(
        "float16 overflows at 65520",
        APPLY,
        [65504, 65504],
        [-15, -16],
        [65504, INF],
        dtype="float16",
        lr=1.0,
        weight_decay=0.0,
    ),
    # One unit (2^-23) up: 3f807fff carries into the upper half; bf808000 goes back. ff7fffff is -max.
    _case(
        "remainder carries",
        APPLY,
        [0x3F80, 0xBF81, 0xFF80],
        [-(2**-23), -(2**-23), 0],
        [0x3F81, 0xBF80, 0xFF80],
        remainder=([32767, -32768, -1], [-32768, 32767, -1]),
        lr=1.0,
        weight_decay=0.0,
    ),
    _case(
        "remainder of NaN and infinity",
        APPLY,
        [0x7FC0, 0xFFFF, 0x3F80, 0x7F80],
        [0, 0, -INF, 1],
        [0x7FC0, 0x7FC0, 0x7F80, 0x7F80],
        remainder=([5, -3, 7, 0], [0, 0, 0, 0]),
        weight_decay=0.0,
    ),
    # sign(0) = sign(-0) = sign(NaN) = 0; the last momentum is -1 + 1/4 * 2.
    _case(
        "lion",
        "lion",
        [1] * 6,
        [1, -1, 0, -0.0, 1, -1],
        [0.25, 1.5, 0.75, 0.75, 0.75, 0.75],
        states=[([1, -1, 0, -0.0, NAN, 1], [1, -1, 0, -0.0, NAN, -0.5])],
        betas=(0.5, 0.25),
        count=5,
        sums=(NAN, 6, 5),
    ),
    # m = 2, v = 4, u = 2 / (sqrt(4) * 2 + 4) * 2 = 1/2.
    _case(
        "adamw",
        "adamw",
        [1, -1],
        [4, 4],
        [0.5, -1.25],
        states=[([0, 0], [2, 2]), ([0, 0], [4, 4])],
        betas=(0.5, 0.75),
        eps=4.0,
        count=1,
        sums=(0.5, 2, 1),
    ),
    # An infinite v makes u 0, for ever.
    _case(
        "adamw, infinite v",
        "adamw",
        [1],
        [0],
        [0.75],
        states=[([0], [0]), ([INF], [INF])],
        betas=(0.5, 0.75),
        eps=4.0,
        count=1,
        sums=(NAN, 1, 1),
    ),
    _case(
        "lion, finite",
        "lion",
        [1, 1],
        [1, -1],
        [0.25, 1.5],
        states=[([1, -1], [1, -1])],
        betas=(0.5, 0.25),
        count=1,
        sums=(2, 2, 1),
    ),
    _case(
        "adamw, maximize",
        "adamw",
        [1, -1],
        [4, 4],
        [1.25, -0.5],
        states=[([0, 0], [-2, -2]), ([0, 0], [4, 4])],
        betas=(0.5, 0.75),
        eps=4.0,
        count=1,
        maximize=True,
    ),
    _case("sgd", "sgd", [8, -8], [2, 2], [5, -9], count=1, sums=(8, 128, 64)),
    _case(
        "sgd, first step",
        "sgd",
        [8],
        [2],
        [5],
        states=[([7], [2])],
        momentum=0.5,
        dampening=0.5,
        count=1,
    ),
    _case(
        "sgd, later step",
        "sgd",
        [8],
        [2],
        [4.5],
        states=[([4], [3])],
        momentum=0.5,
        dampening=0.5,
        count=1,
        step=2,
    ),
    _case(
        "sgd, nesterov, first step",
        "sgd",
        [8],
        [2],
        [4.5],
        states=[([7], [2])],
        momentum=0.5,
        nesterov=True,
        count=1,
    ),
    _case(
        "sgd, nesterov, later step",
        "sgd",
        [8],
        [2],
        [4],
        states=[([4], [4])],
        momentum=0.5,
        nesterov=True,
        count=1,
        step=2,
    ),
    _case(
        "sgd, ema",
        "sgd",
        [8],
        [8],
        [3.5],
        states=[([4], [5])],
        momentum=0.75,
        ema=True,
        count=1,
    ),
    _case(
        "sgd, ema, nesterov",
        "sgd",
        [8],
        [8],
        [6 - 5.75 / 2],
        states=[([4], [5])],
        momentum=0.75,
        ema=True,
        nesterov=True,
        count=1,
    ),
    *(
        _case(
            f"muon, nesterov={nesterov}, to {out}",
            "muon",
            [7, 7],
            [8, 8 + 2**-4],
            [u, u + extra],
            states=[([4, 4 + 2**-4], [5, 5 + 2**-4])],
            momentum=0.75,
            nesterov=nesterov,
            out=out,
        )
        # 5 + 1/16 is in bfloat16, 5.75 + 1/16 too: nothing is rounded but the last.
        for nesterov, u in ((True, 5.75), (False, 5.0))
        for out, extra in (("float32", 2**-4), ("bfloat16", 2**-4))
    ),
    _case(
        "muon, rounded to even",
        "muon",
        [7, 7],
        [1 + SMALL, 1 + 3 * SMALL],
        [1, 1 + 4 * SMALL],
        states=[([1 + SMALL, 1 + 3 * SMALL],) * 2],
        nesterov=False,
        out="bfloat16",
    ),
]
