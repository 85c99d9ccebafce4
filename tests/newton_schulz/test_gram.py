"""The forms of Newton-Schulz: their agreement, and their errors on hard spectra."""

import itertools

import numpy as np
import pytest
import torch

from hf_cwd.newton_schulz.orthogonalize import COEFFICIENTS, STRIP, newton_schulz
from tests.newton_schulz.test_orthogonalize import SHAPES, by_svd, matrices

BOTH = pytest.mark.parametrize("form", ["standard", "gram"])
TABLES = pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
# What a rounding can grow by: the slope at zero of all iterations.
SLOPES = {
    name: float(np.prod([table[min(i, len(table) - 1)][0] for i in range(5)])) for name, table in COEFFICIENTS.items()
}


def spectrum(kind, n):
    i = torch.arange(1, n + 1, dtype=torch.float64)
    last = (i == n).double()
    return {
        "flat": torch.ones_like(i),
        "power 0.5": i**-0.5,
        "power 1": 1 / i,
        "power 1.5": i**-1.5,
        "power 2": i**-2,
        "exponential": torch.exp(-20 * i / n),
        "low rank + noise": torch.where(i <= 8, 1.0, 1e-3),
        "nearly singular": 1 - last * (1 - 1e-9),
        "one huge": torch.where(i == 1, 1.0, 1e-4),
        "one large": torch.where(i == 1, 1.0, 0.03),
        "half small": torch.where(i <= n / 2, 1.0, 0.03),
        "half tiny": torch.where(i <= n / 2, 1.0, 1e-5),
        "linear": i / n,
    }[kind]


SPECTRA = [
    *("flat", "linear", "power 0.5", "power 1", "power 1.5", "power 2", "exponential", "low rank + noise"),
    *("nearly singular", "one huge", "one large", "half small", "half tiny"),
]


def with_spectrum(s, long, seed=0):
    """A wide matrix with these singular values."""
    U, V = (torch.linalg.qr(matrices((rows, len(s)), seed + k))[0] for k, rows in enumerate((len(s), long)))
    return (U * s) @ V.mT


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


# --- Agreement ---


@SHAPES
@BOTH
@TABLES
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_float64_is_the_polynomial_of_the_singular_values(shape, form, coefficients, steps):
    M = matrices(shape)
    found = newton_schulz(M, steps=steps, coefficients=coefficients, dtype=torch.float64, form=form)
    expected = by_svd(M, COEFFICIENTS[coefficients], steps)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@BOTH
@pytest.mark.parametrize("steps", range(1, 9))
def test_coefficients_are_taken_in_order(steps, form):
    """Of a table so gentle that the gram form's first block has three iterations."""
    table = [(3.0, -3.0, 1.0), (2.0, -1.5, 0.5), (1.9, -1.3, 0.4), (1.7, -0.8, 0.1), (1.5, -0.5, 0.0)]
    M = matrices((8, 13))
    found = newton_schulz(M, coefficients=table, steps=steps, dtype=torch.float64, form=form)
    torch.testing.assert_close(found, by_svd(M, table, steps), rtol=1e-10, atol=1e-10)


@SHAPES
@BOTH
@TABLES
def test_float32(shape, form, coefficients):
    M = matrices(shape)
    found = newton_schulz(M, coefficients=coefficients, dtype=torch.float32, form=form)
    expected = by_svd(M, COEFFICIENTS[coefficients])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=SLOPES[coefficients] * 2**-24)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(2 * STRIP, 2 * STRIP + 70), (2 * STRIP + 70, 2 * STRIP), (2 * STRIP + 1,) * 2], ids=str
)
def test_strips(shape, dtype, form):
    """Matrices large enough for the symmetric products of a CPU, also with a last strip of one row."""
    M = matrices(shape)
    found = newton_schulz(M, dtype=dtype, form=form)
    # Each of the sums that are rounded has up to 700 terms of random sign, so that they err by a few units.
    torch.testing.assert_close(found.double(), by_svd(M), rtol=0, atol=SLOPES["quintic"] * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("coefficients", "steps"), [("quintic", 5), ("polar_express", 5), ("polar_express", 8)])
def test_gram_s_form_errs_no_more_than_the_standard_one(kind, coefficients, steps):
    """Against float64, on the spectra that gradients have.

    In bfloat16 both forms err by up to 1, where singular values below a rounding of the norm grow as large as the
    others; there Gram's form is the better one. Where both do well it may lose more, since it rounds Q instead of X: by
    up to 0.06, when the singular values themselves are off by 0.3. It is this test that fails when X X^T is made anew
    after one more iteration, the first time or later. In float32 either errs by 1e-6 to 1e-4, and Gram's form by up to
    twice as much as the standard one where it errs by less than 1e-5.
    """
    for seed, dtype in itertools.product(range(3), (torch.bfloat16, torch.float32)):
        M = with_spectrum(spectrum(kind, 96), 300, 10 * seed)
        options = {"steps": steps, "coefficients": coefficients}
        exact = newton_schulz(M, dtype=torch.float64, form="standard", **options)
        standard, gram = (error(newton_schulz(M, form=f, dtype=dtype, **options), exact) for f in ("standard", "gram"))
        assert gram <= (1.1 * standard + 0.06 if dtype == torch.bfloat16 else 1.2 * standard + 8e-6)


# --- Properties ---


@BOTH
@TABLES
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20)], ids=str)
def test_orthogonal_factors_pass_through(shape, form, coefficients):
    M = matrices(shape)
    U, V = (torch.linalg.qr(matrices((size, size), seed))[0] for seed, size in enumerate(shape, 1))
    options = {"coefficients": coefficients, "dtype": torch.float64, "form": form}
    found, expected = newton_schulz(U @ M @ V, **options), U @ newton_schulz(M, **options) @ V
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@BOTH
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20), (3, 12, 30)], ids=str)
def test_transposition(shape, form):
    M = matrices(shape)
    found, expected = (newton_schulz(m, dtype=torch.float64, form=form) for m in (M.mT, M))
    torch.testing.assert_close(found, expected.mT, rtol=1e-11, atol=1e-11)
    assert found.is_contiguous()
    assert expected.is_contiguous()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 12, 30), (2, 3, 30, 12), (2, 2 * STRIP, 2 * STRIP)], ids=str)
def test_a_batch_is_its_matrices_bit_for_bit(shape, dtype, form):
    M = matrices(shape)
    found = newton_schulz(M, dtype=dtype, form=form)
    assert found.is_contiguous()
    for one, expected in zip(M.reshape(-1, *shape[-2:]), found.reshape(-1, *shape[-2:]), strict=True):
        assert torch.equal(newton_schulz(one, dtype=dtype, form=form), expected)


@BOTH
@pytest.mark.parametrize("factor", [2.0**-18, 2.0**30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scale_of_the_input_does_not_matter(factor, dtype, form):
    M = matrices((6, 11))
    found, expected = (newton_schulz(m, dtype=dtype, form=form) for m in (factor * M, M))
    assert torch.equal(found, expected)


@BOTH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8)], ids=str)
def test_a_bad_number_spoils_its_matrix_and_no_other(shape, bad, form):
    M = matrices((3, *shape))
    M[1, 2, 3], M[2] = bad, 0
    found = newton_schulz(M, form=form)
    assert found[1].isnan().all()
    assert torch.equal(found[2], torch.zeros(shape, dtype=torch.bfloat16))
    assert torch.equal(found[0], newton_schulz(M[0], form=form))


@BOTH
@TABLES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rank_one_does_not_run_away(dtype, coefficients, form):
    """Its singular value is the norm, 1 after the division, and above it after a rounding: the first in danger."""
    for seed, scale in itertools.product(range(8), (1.0, 1.3, 1.7)):
        M = scale * matrices((24, 1), seed) @ matrices((1, 70), seed + 100)
        values = torch.linalg.svdvals(newton_schulz(M, coefficients=coefficients, dtype=dtype, form=form).double())
        assert 0.65 < values[0] < 1.2
