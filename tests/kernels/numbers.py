"""The numbers of the truth table: every special value against every other, several magnitudes, ties and carries."""

import numpy as np

from tests.support.reference.arithmetic import Stored, split

Array = np.ndarray
# Smallest denormal, smallest normal, one and the largest number of each dtype, as bits; with both signs.
_POSITIVE = {
    "float32": (0, 1, 0x0080_0000, 0x3F80_0000, 0x7F7F_FFFF, 0x7F80_0000),
    "bfloat16": (0, 1, 0x0080, 0x3F80, 0x7F7F, 0x7F80),
    "float16": (0, 1, 0x0400, 0x3C00, 0x7BFF, 0x7C00),
}
_NAN = {"float32": 0x7FC0_0000, "bfloat16": 0x7FC0, "float16": 0x7E00}
_SIGN = {"float32": 1 << 31, "bfloat16": 1 << 15, "float16": 1 << 15}
_WORD = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
# Masters of a bfloat16 parameter whose halves are about to carry, up to infinity and through the sign of zero.
_MASTERS = (0, 1 << 31, 1, 0x8000_0001, 0x3F80_7FFF, 0x3F80_8000, 0xBF80_8000)
_MASTERS += (0x3FFF_FFFF, 0x7F7F_FFFF, 0xFF7F_FFFF, 0x7F80_0000, 0xFF80_0000, 0x7FC0_0000)
# Second moments are not negative. A zero of either sign, and numbers around which the root or eps is what matters.
_SQUARES = (0.0, 1e-45, 1.1754944e-38, 1.0, 3.4028235e38, np.inf, np.nan, 1e-10, 1e-20, 4.0, 0.25, 1e-30, -0.0)
LEVELS = 13


def specials(dtype: str) -> Array:
    """+-0, +-denormal, +-min normal, +-1, +-max, +-inf and NaN, as bits."""
    positive = np.array(_POSITIVE[dtype], np.int64)
    return np.concatenate([positive, positive + _SIGN[dtype], [_NAN[dtype]]]).astype(_WORD[dtype])


def crossing(full: bool) -> tuple[Array, Array, Array, Array]:
    """Levels of x, g, m and v: every triple of x, g, m, or every pair of the four in 169 elements (13 is prime)."""
    i, j, k = (axis.ravel() for axis in np.indices((LEVELS, LEVELS, LEVELS if full else 1)))
    k = k if full else i + j
    return i, j, k % LEVELS, (i + 2 * j + (3 * k if full else 0)) % LEVELS


class Numbers:
    """Flat arrays for one parameter.

    Args:
        seed: of the random ones.
        param, grad, states: dtypes' names; a second state holds squares.
        remainder: the parameter has one.
        full: crosses the special values completely, and draws more random ones.
        size: cuts or repeats the arrays to this many elements.
    """

    def __init__(
        self, seed: int, *, param: str, grad: str, states: list[str], remainder: bool, full: bool, size: int | None
    ) -> None:
        rng, n = np.random.default_rng(seed), 300 if full else 40
        levels = crossing(full)
        columns = [_training(rng, n), _magnitudes(rng, n), _dyadic(rng, n)]
        x, g, m, v = (np.concatenate(column) for column in zip(*columns, strict=True))
        shuffle = rng.permutation(len(levels[0]) + len(x))
        if size is not None:
            shuffle = np.resize(shuffle, size)

        def mixed(special: Array, level: Array, dtype: str, others: Array) -> Stored:
            bits = np.concatenate([special[level], Stored.of(others, dtype).bits])
            return Stored(dtype, bits[shuffle])

        self.remainder: Array | None = None
        if remainder:
            upper, lower = split(np.array(_MASTERS, np.uint32).view(np.float32))
            any_upper, any_lower = rng.integers(0, 1 << 16, (2, len(x))).astype(np.uint16)
            near_upper, near_lower = split(x.astype(np.float32))
            choice = np.arange(len(x)) % 3 == 0  # bits as no step leaves them
            self.remainder = np.concatenate([lower[levels[0]], np.where(choice, any_lower.view(np.int16), near_lower)])[
                shuffle
            ]
            rest = np.where(choice, any_upper, near_upper)
            self.param = Stored(param, np.concatenate([upper[levels[0]], rest])[shuffle])
        else:
            self.param = mixed(specials(param), levels[0], param, x)
        self.grad = mixed(specials(grad), levels[1], grad, g)
        self.states = [mixed(specials(dtype), levels[2], dtype, m) for dtype in states[:1]]
        for dtype in states[1:]:
            squares = Stored.of(np.array(_SQUARES, np.float32), dtype).bits
            self.states.append(mixed(squares, levels[3], dtype, v))


def _training(rng: np.random.Generator, n: int) -> list[Array]:
    """As in a model: the momentum follows the gradient or opposes it, so that averages cancel."""
    x, g = 0.05 * rng.standard_normal(n), 1e-3 * rng.standard_normal(n)
    return [x, g, g * rng.choice([-1 / 9, -9, 1, 0.3], n) * (1 + 1e-7 * rng.integers(-3, 3, n)), g * g]


def _magnitudes(rng: np.random.Generator, n: int) -> list[Array]:
    x, g, m, v = (10.0 ** rng.uniform(-30, 30, (4, n))) * rng.choice([-1, 1], (4, n))
    narrow = rng.random(n) < 0.5  # within float16's range too
    x, g, m = (np.where(narrow, np.sign(a) * 10 ** rng.uniform(-7, 4, n), a) for a in (x, g, m))
    return [x, g, m, np.minimum(abs(v), 1e30)]


def _dyadic(rng: np.random.Generator, n: int) -> list[Array]:
    """Few bits, so that sums are exact and half-precision results are ties."""
    x, g, m = rng.integers(-512, 513, (3, n)) / rng.choice([16, 256], (3, n))
    return [x, g, m, (rng.integers(0, 64, n) / 16) ** 2]
