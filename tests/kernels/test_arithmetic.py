"""The reference's own arithmetic: against exact fractions, torch's conversions, and cases computed by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_cwd.kernels import interface
from tests.support.reference.arithmetic import F, Stored, fma, joined, lerp, narrow, sign, split, widen

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities and NaN are among the numbers
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EVERY_HALF = np.arange(1 << 16, dtype=np.uint16)


def rounded(exact: Fraction, bits: int, least: int, largest: int) -> float:
    """To ``bits`` significant ones, at most down to 2**least, ties to even; infinite from 2**largest on."""
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** max(exponent - bits + 1, least)
    value = round(size / unit) * unit  # of a Fraction: to even
    return math.copysign(math.inf if value >= Fraction(2) ** largest else float(value), exact)


def hard_numbers() -> tuple[np.ndarray, ...]:
    """Any bits; sums that nearly cancel; a third term far below the last bit of the product, or just at it."""
    rng = np.random.default_rng(0)
    n = 24_000
    a, b, c = rng.integers(0, 1 << 32, (3, n), dtype=np.uint64).astype(np.uint32).view(F)
    with np.errstate(all="ignore"):
        c[: n // 4] = -(a * b)[: n // 4]
        shift = rng.integers(-60, 60, n)
        c[n // 4 : n // 2] = np.ldexp(a * b, shift)[n // 4 : n // 2]
        # Products of few bits, so that the third term decides a tie.
        few = slice(n // 2, 3 * n // 4)
        a[few], b[few] = (rng.integers(1, 1 << 12, (2, n))[:, few] * 2.0 + 1).astype(F)
        c[few] = rng.choice([-1, 1], n)[few] * np.ldexp(F(1), rng.integers(-149, 60, n)[few])
    small = slice(3 * n // 4, n)  # denormal results
    a[small], b[small] = np.ldexp(a[small] % F(4), -70), np.ldexp(b[small] % F(4), -75)
    c[small] = rng.integers(-9, 10, n)[small] * F(2.0**-149)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    return a[finite], b[finite], c[finite]


def test_fma_is_rounded_once():
    a, b, c = hard_numbers()
    found = fma(a, b, c)
    assert len(found) > 20_000
    plain = 0
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        assert result == rounded(Fraction(x) * Fraction(y) + Fraction(z), 24, -149, 128), (x, y, z)
        plain += float(F(F(x * y) + F(z)) if abs(x * y) < 1e38 else result) != result
    assert plain > 1000, "a product that is rounded first is wrong now and then"


def test_fma_of_zeros_infinities_and_nan():
    zero, inf = F(0), F(np.inf)
    with np.errstate(invalid="ignore"):
        signs = [
            fma(F(1), F(1), F(-1)),
            fma(-zero, zero, -zero),
            fma(-zero, zero, zero),
            fma(F(2.0**-149), F(-0.5), zero),
        ]
        others = [fma(inf, F(1), F(1)), fma(F(1), F(1), -inf), fma(inf, zero, F(1)), fma(inf, F(1), -inf)]
    assert [str(float(x)) for x in signs] == ["0.0", "-0.0", "0.0", "-0.0"]
    assert [str(float(x)) for x in others] == ["inf", "-inf", "nan", "nan"]
    assert float(fma(F(2.0**127), F(2), F(-(2.0**104)))) == float(np.finfo(F).max)


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.1, 0.9, 0.95, 1.0, 0.0])
def test_lerp_is_torch_s(weight):
    start, end = np.random.default_rng(0).standard_normal((2, 8192)).astype(F)
    expected = torch.from_numpy(start).lerp(torch.from_numpy(end), weight).numpy()
    assert (lerp(start, end, weight) == expected).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_widening_is_exact(dtype):
    expected = torch.from_numpy(EVERY_HALF.view(np.int16)).view(TORCH[dtype]).double().numpy()
    np.testing.assert_array_equal(widen(EVERY_HALF, dtype).astype(np.float64), expected)
    again = narrow(widen(EVERY_HALF, dtype), dtype)
    assert ((again == EVERY_HALF) | np.isnan(expected)).all()


@pytest.mark.parametrize(("dtype", "bits", "least", "largest"), [("bfloat16", 8, -133, 128), ("float16", 11, -24, 16)])
def test_narrowing_rounds_to_even(dtype, bits, least, largest):
    """Each number of the narrow dtype, what lies half way to the next, and the neighbours of that; and any bits."""
    here = widen(EVERY_HALF[EVERY_HALF % 8 < 3], dtype)
    with np.errstate(all="ignore"):
        half = np.where(np.isfinite(here), np.ldexp(np.spacing(np.abs(here)), 23 - bits), 0).astype(F)
    above = here + half
    any_bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 14, dtype=np.uint64).astype(np.uint32).view(F)
    values = np.concatenate([here, above, np.nextafter(above, F(0)), np.nextafter(above, F(np.inf)), any_bits])
    found, expected = Stored.of(values, dtype).wide, torch.from_numpy(values).to(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(found, expected)
    assert (np.signbit(found) == np.signbit(values))[~np.isnan(values)].all()
    finite = np.flatnonzero(np.isfinite(values))[::7]
    assert [rounded(Fraction(float(values[k])), bits, least, largest) for k in finite] == found[finite].tolist()


def test_remainders():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    edges = [0, 1 << 31, 0x7FFF, 0x8000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000]
    master = np.concatenate([bits, np.array(edges, np.uint32)]).view(F)
    upper, remainder = split(master)
    np.testing.assert_array_equal(joined(upper, remainder), master)
    same = joined(upper, remainder).view(np.uint32) == master.view(np.uint32)
    assert (same | np.isnan(master)).all()
    nans = np.isnan(master)
    assert set(upper[nans]) == {0x7FC0}
    assert not remainder[nans].any()
    # At most half a unit of bfloat16 away, and half is rounded away from zero.
    assert [split(np.array([x], np.uint32).view(F))[0][0] for x in (0x3F808000, 0x3F807FFF, 0xBF808000)] == [
        *(0x3F81, 0x3F80, 0xBF81),
    ]


def test_remainders_are_those_of_the_package():
    upper, lower = np.random.default_rng(0).integers(0, 1 << 16, (2, 1 << 15)).astype(np.uint16)
    remainder = lower.view(np.int16)
    param, rest = torch.from_numpy(upper.view(np.int16).copy()).view(torch.bfloat16), torch.from_numpy(remainder.copy())
    master = joined(upper, remainder)
    wide = interface.joined(param, rest)
    assert (wide.view(torch.int32).numpy().view(np.uint32) == master.view(np.uint32)).all()
    interface.split(wide, param, rest)
    new_upper, new_remainder = split(master)
    assert (param.view(torch.int16).numpy().view(np.uint16) == new_upper).all()
    assert (rest.numpy() == new_remainder).all()


def test_sign():
    values = np.array([2, -(2.0**-149), 0.0, -0.0, np.nan, -np.inf], F)
    assert [str(float(x)) for x in sign(values)] == ["1.0", "-1.0", "0.0", "0.0", "0.0", "-1.0"]
