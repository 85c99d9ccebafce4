"""The arithmetic that every kernel must reproduce bit for bit, in numpy, with each rounding where the kernels have it.

All of it is float32: half-precision numbers are widened exactly, computed with, and rounded once when they are stored,
to nearest and ties to even. :func:`fma` rounds once, and so does every other ``+ - * / sqrt``; nothing else is fused
or reordered, and denormals are kept. Scalars are computed in double precision and rounded once. A NaN is a NaN: its
sign and payload are not specified.

Like the rest of this folder it knows nothing of hf_cwd or torch. Dtypes go by name: float32, bfloat16, float16.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
F = np.float32
WORDS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


# --- Numbers ---


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c with a single rounding.

    The product of two float32 is exact in float64. The sum is rounded to odd there: where it is not exact, to that
    neighbour whose last bit is 1. Rounding that to float32 is then as good as rounding the exact sum, since float64
    has more than two bits to spare.
    """
    product, c = np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)  # exact (Knuth's TwoSum); NaN where something is not finite
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)
    inexact = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    return (bits + np.where(inexact, away, 0)).view(np.float64).astype(F)


def lerp(start: Array, end: Array, weight: float) -> Array:
    """start + weight * (end - start), from the nearer end. 1 - weight is taken after weight was rounded."""
    if F(weight) < 0.5:
        return fma(F(weight), end - start, start)
    return fma(F(weight) - F(1), end - start, end)


def widen(bits: Array, dtype: str) -> Array:
    """Stored bits as float32, exactly."""
    if dtype == "float32":
        return bits.view(F)
    return bits.view(np.float16).astype(F) if dtype == "float16" else (bits.astype(np.uint32) << 16).view(F)


def narrow(values: Array, dtype: str) -> Array:
    """float32 as stored bits, rounded to nearest, ties to even; what is too large is infinite."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    if dtype == "float32":
        return bits
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def joined(upper: Array, remainder: Array) -> Array:
    """The float32 master of a bfloat16 parameter and its int16 remainder: ``(upper << 16) + remainder``, as bits."""
    return ((upper.astype(np.uint32) << 16) + remainder.astype(np.int32).view(np.uint32)).view(F)


def split(master: Array) -> tuple[Array, Array]:
    """The upper half of a float32, rounded half up in magnitude, and the remainder that is missing of it."""
    bits = np.where(np.isnan(master), np.uint32(0x7FC00000), master.view(np.uint32))
    upper = ((bits + np.uint32(0x8000)) >> 16).astype(np.uint16)
    return upper, (bits - (upper.astype(np.uint32) << 16)).view(np.int32).astype(np.int16)


class Stored(NamedTuple):
    """Numbers in memory."""

    dtype: str
    bits: Array

    @classmethod
    def of(cls, values: Array, dtype: str) -> "Stored":
        return cls(dtype, narrow(np.ascontiguousarray(values, F), dtype))

    @property
    def wide(self) -> Array:
        return widen(self.bits, self.dtype)


# --- Directions: (g, states, step, **hyper-parameters) -> (u, new states) ---


def adamw(g: Array, states: list[Array], step: int, *, betas: tuple[float, float], eps: float, root=np.sqrt):
    (m, v), (beta1, beta2) = states, betas
    m = lerp(m, g, 1 - beta1)
    v = fma(F(1 - beta2) * g, g, F(beta2) * v)
    denominator = root(v) * F(1 / (1 - beta2**step) ** 0.5) + F(eps)
    return (m / denominator) * F(1 / (1 - beta1**step)), [m, v]


def lion(g: Array, states: list[Array], step: int, *, betas: tuple[float, float]):
    del step
    (m,) = states
    return sign(lerp(m, g, 1 - betas[0])), [lerp(m, g, 1 - betas[1])]


def sgd(g: Array, states: list[Array], step: int, *, momentum: float, dampening: float, nesterov: bool, ema: bool):
    if momentum == 0:
        return g, []
    if ema:
        return muon(g, states, step, momentum=momentum, nesterov=nesterov)
    m = g if step == 1 else fma(F(1 - dampening), g, F(momentum) * states[0])
    return fma(F(momentum), m, g) if nesterov else m, [m]


def muon(g: Array, states: list[Array], step: int, *, momentum: float, nesterov: bool, **_: Any):
    del step
    m = lerp(states[0], g, 1 - momentum)
    return lerp(g, m, momentum) if nesterov else m, [m]


DIRECTIONS: Mapping[str, Callable[..., tuple[Array, list[Array]]]] = {
    "adamw": adamw,
    "lion": lion,
    "muon": muon,
    "sgd": sgd,
}


# --- Decay and apply ---


class Settings(NamedTuple):
    """What one parameter's step depends on beside its numbers. ``hyper`` is empty where the direction is given."""

    hyper: Mapping[str, Any]
    step: int
    lr: float
    weight_decay: float
    cautious: bool
    mask: str
    maximize: bool
    scale: float = 1.0


def sign(values: Array) -> Array:
    """-1, 0 or 1; 0 for NaN, and never -0."""
    return np.where(values > 0, F(1), np.where(values < 0, F(-1), F(0)))


def decayed(x: Array, u: Array, settings: Settings) -> Array:
    """Which elements are decayed, by the signs of u and x."""
    agreement = sign(x) * sign(u)
    if not settings.cautious:
        return np.ones(x.shape, bool)
    return agreement >= 0 if settings.mask == "ge" else agreement > 0


def applied(x: Array, u: Array, settings: Settings) -> Array:
    """x after its decay and step. Where nothing is decayed the decay is computed all the same, with -0."""
    if settings.weight_decay != 0:
        # With a learning rate of 0 too small to change a number, but no zero: it counts as decayed.
        on = F(-max(settings.lr * settings.weight_decay, 2.0**-126))
        x = fma(np.where(decayed(x, u, settings), on, F(-0.0)), x, x)
    return fma(F(-settings.lr * settings.scale), u, x)


class Result(NamedTuple):
    """What a step leaves, and what it saw.

    ``u``: the direction as computed, in float32. ``sums``: the number of decayed elements, and the sums of u^2, of x^2
    and of the decayed x^2; None where nothing is applied.
    """

    param: Stored
    states: list[Stored]
    remainder: Array | None
    u: Array
    sums: tuple[float, ...] | None


def directed(
    rule: str, grad: Stored, states: list[Stored], settings: Settings, **more: Any
) -> tuple[Array, list[Stored], bool]:
    """The direction in float32, the states as they are stored, and whether they were finite before.

    ``more`` is passed on to the rule.
    """
    with np.errstate(all="ignore"):
        g = -grad.wide if settings.maximize else grad.wide
        u, new = DIRECTIONS[rule](g, [state.wide for state in states], settings.step, **settings.hyper, **more)
        stored = [Stored.of(values, state.dtype) for values, state in zip(new, states, strict=True)]
        return u, stored, all(np.isfinite(values).all() for values in new)


def stepped(
    param: Stored, remainder: Array | None, u: Array, states: list[Stored], settings: Settings, finite: bool = True
) -> Result:
    """Decay and apply a direction, and store; the sum of u^2 is NaN where the states were not finite."""
    with np.errstate(all="ignore"):
        before = param.wide if remainder is None else joined(param.bits, remainder)
        after = applied(before, u, settings)
        if remainder is None:
            new = Stored.of(after, param.dtype)
        else:
            upper, remainder = split(after)
            new = Stored(param.dtype, upper)
        among = decayed(before, u, settings) if settings.weight_decay != 0 else np.zeros(before.shape, bool)
        squares = [values.astype(F) ** 2 for values in (u, before, before[among])]
        update, *others = (float(values.sum(dtype=np.float64)) for values in squares)
        sums = (float(among.sum()), update if finite else np.nan, *others)
    return Result(new, states, remainder, u, sums)
