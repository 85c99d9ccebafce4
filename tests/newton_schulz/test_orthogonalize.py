"""Newton-Schulz against the singular value decomposition and a float64 iteration on the singular values."""

import numpy as np
import pytest
import torch

from hf_cwd.newton_schulz.orthogonalize import COEFFICIENTS, newton_schulz
from hf_cwd.rules import RULES
from tests.support.reference import paper

# From the classical quintic: it is 1 at 1 with two vanishing derivatives, so that it converges from all of (0, 1].
CONVERGENT = [(15 / 8, -10 / 8, 3 / 8)] * 30
SHAPES = pytest.mark.parametrize(
    "shape", [(12, 30), (30, 12), (20, 20), (1, 9), (9, 1), (1, 1), (3, 8, 14), (2, 3, 14, 8), (2, 3, 6, 6)], ids=str
)


def matrices(shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def polynomial(s, table, steps):
    """p(p(...p(s))) on singular values, from s / |s|_2, which is |M|_F."""
    s = s / np.linalg.norm(s, axis=-1, keepdims=True)
    for i in range(steps):
        a, b, c = table[min(i, len(table) - 1)]
        s = a * s + b * s**3 + c * s**5
    return s


def by_svd(matrix, table=COEFFICIENTS["quintic"], steps=5):
    U, S, Vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy((U * polynomial(S, table, steps)[..., None, :]) @ Vh)


@SHAPES
@pytest.mark.parametrize("steps", [1, 5, 7])
def test_float64_is_the_polynomial_of_the_singular_values(shape, steps):
    M = matrices(shape)
    found = newton_schulz(M, steps=steps, dtype=torch.float64)
    torch.testing.assert_close(found, by_svd(M, steps=steps), rtol=1e-11, atol=1e-11)
    if len(shape) == 2:
        expected = torch.from_numpy(paper.newton_schulz(M.numpy(), steps=steps))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@SHAPES
def test_float32(shape):
    """In bfloat16 there is no such test: 485 roundings of 2^-9 are as large as the result."""
    M = matrices(shape)
    slope = 3.4445**5  # of the five iterations at zero, 485: what a rounding can grow by
    found = newton_schulz(M, dtype=torch.float32)
    torch.testing.assert_close(found.double(), by_svd(M), rtol=0, atol=slope * 2**-24)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_singular_values_are_about_one(shape, dtype):
    """Well-conditioned matrices come out in the documented [0.68, 1.14]."""
    U, S, Vh = torch.linalg.svd(matrices(shape), full_matrices=False)
    M = (U * S.clamp(min=S.amax(-1, keepdim=True) / 20).unsqueeze(-2)) @ Vh
    found = newton_schulz(M, dtype=dtype)
    values = torch.linalg.svdvals(found.double())
    # bfloat16: one rounding, 2^-8, of each of the products that are summed to the singular value, grown by the last
    # iteration's slope, at most 3.4445.
    slack = 3.4445 * 2**-8 * 2 if dtype == torch.bfloat16 else 0.0
    assert found.dtype == dtype
    assert values.min() >= 0.68 - slack
    assert values.max() <= 1.14 + slack


def test_the_documented_interval_is_that_of_the_coefficients():
    """[0.68, 1.14] is where five iterations leave every singular value that is not tiny."""
    s = np.linspace(0.01, 1.0, 100_001)
    a, b, c = COEFFICIENTS["quintic"][0]
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert (s.min(), s.max()) == pytest.approx((0.68, 1.14), abs=0.02)


def test_the_documented_interval_of_the_polar_express():
    """[0.002, 1.01] ends in [0.87, 1.13] after five iterations and at 1 after seven, and never leaves [0, 2]."""
    s, ranges = np.geomspace(0.002, 1.01, 1_000_001), []
    for a, b, c in COEFFICIENTS["polar_express"]:
        s = a * s + b * s**3 + c * s**5
        ranges.append((s.min(), s.max()))
    assert ranges[4] == pytest.approx((0.87, 1.125), abs=0.005)
    assert ranges[6] == pytest.approx((1, 1), abs=1e-5)
    assert ranges[7] == pytest.approx((1, 1), abs=3e-16 * 8)  # a fixed point with two vanishing derivatives
    assert all(0 < low < high < 2 for low, high in ranges[:7])


@SHAPES
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_the_polar_express_gives_the_polar_factor(shape, form):
    """In nine iterations, as far as its margin for rounding lets it: the last ones are the classical quintic."""
    U, S, Vh = torch.linalg.svd(matrices(shape), full_matrices=False)
    M = (U * S.clamp(min=S.amax(-1, keepdim=True) / 100).unsqueeze(-2)) @ Vh
    found = newton_schulz(M, coefficients="polar_express", steps=9, dtype=torch.float64, form=form)
    torch.testing.assert_close(found, U @ Vh, rtol=1e-10, atol=1e-10)


@SHAPES
def test_a_convergent_table_gives_the_polar_factor(shape):
    M = matrices(shape)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    found = newton_schulz(M, coefficients=CONVERGENT, steps=len(CONVERGENT), dtype=torch.float64)
    torch.testing.assert_close(found, U @ Vh, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_table_is_taken_in_order_and_its_last_entry_repeated(steps):
    table = [(3.0, -3.0, 1.0), (2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]
    M = matrices((8, 13))
    found = newton_schulz(M, coefficients=table, steps=steps, dtype=torch.float64)
    torch.testing.assert_close(found, by_svd(M, table, steps), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(10, 25), (25, 10), (16, 16)], ids=str)
def test_rank_deficient(shape):
    """Null directions stay null, the others are orthogonalised."""
    M = matrices((shape[0], 4)) @ matrices((4, shape[1]), seed=1)
    values = torch.linalg.svdvals(newton_schulz(M, coefficients=CONVERGENT, steps=30, dtype=torch.float64))
    torch.testing.assert_close(values[:4], torch.ones(4, dtype=torch.float64))
    assert values[4:].max() < 1e-6  # rounding, 1e-16 of the norm, grows by 15/8 in each of 30 iterations: 1.5e8 of it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_stays_zero(dtype):
    assert torch.equal(newton_schulz(torch.zeros(4, 6), dtype=dtype), torch.zeros(4, 6, dtype=dtype))
    batch = matrices((3, 4, 6))
    batch[1] = 0
    found = newton_schulz(batch, dtype=dtype)
    assert torch.equal(found[1], torch.zeros(4, 6, dtype=dtype))
    assert torch.equal(found[0], newton_schulz(batch[:1], dtype=dtype)[0])
    assert found.isfinite().all()


@pytest.mark.parametrize("factor", [2.0**-18, 2.0**30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scale_of_the_input_does_not_matter(factor, dtype):
    """Bit for bit, as the factors are powers of two; Muon's (1 - momentum) relies on it."""
    M = matrices((6, 11))
    assert torch.equal(newton_schulz(M, dtype=dtype), newton_schulz(factor * M, dtype=dtype))


def test_smallest_norm_divided_by():
    """Below eps the input is divided by eps: a matrix of norm eps / 2 has half the singular value at the start."""
    M = torch.tensor([[0.5e-3, 0.0]], dtype=torch.float64)
    found = newton_schulz(M, eps=1e-3, steps=1, coefficients=[(2.0, 0.0, 0.0)], dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0]], dtype=torch.float64))


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_input_is_not_mutated_nor_returned(shape, dtype):
    M = matrices(shape).to(dtype)
    before = M.clone()
    for steps in (1, 5):
        newton_schulz(M, steps=steps, dtype=dtype).zero_()
        assert torch.equal(M, before)


@SHAPES
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layout_of_the_input_does_not_matter(shape, layout):
    M = matrices(shape)
    view = M.mT.contiguous().mT if layout == "transposed" else torch.stack([M, M], -1)[..., 0]
    found, expected = newton_schulz(view, dtype=torch.float64), newton_schulz(M, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert found.shape == M.shape


@SHAPES
def test_batches_are_independent(shape):
    M = matrices(shape)
    found = newton_schulz(M, dtype=torch.float64).reshape(-1, *shape[-2:])
    for one, expected in zip(M.reshape(-1, *shape[-2:]), found, strict=True):
        torch.testing.assert_close(newton_schulz(one, dtype=torch.float64), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 4), (4, 0), (0, 0), (2, 0, 4), (2, 4, 0)], ids=str)
def test_empty(shape):
    found = newton_schulz(torch.zeros(shape))
    assert (found.shape, found.dtype) == (shape, torch.bfloat16)


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_vectors_are_refused(shape):
    with pytest.raises(ValueError, match="matrix"):
        newton_schulz(torch.zeros(shape))


@pytest.mark.parametrize(
    ("ns_dtype", "dtype", "used"),
    [
        ("auto", torch.float32, torch.float32),
        ("auto", torch.float64, torch.float64),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float32", torch.float64, torch.float32),
    ],
)
def test_the_dtype_of_the_iteration_on_a_cpu(ns_dtype, dtype, used):
    hyper = {name: kind.default for name, kind in RULES["muon"].hyperparameters.items()} | {"ns_dtype": ns_dtype}
    assert RULES["muon"].matrix(torch.ones(2, 3, dtype=dtype), **hyper).dtype == used


def test_auto_is_bfloat16_off_the_cpu():
    hyper = {name: kind.default for name, kind in RULES["muon"].hyperparameters.items()}
    assert RULES["muon"].matrix(torch.empty(2, 3, device="meta"), **hyper).dtype == torch.bfloat16
