"""The Triton kernels of symmetric products under Triton's interpreter; test_symmetric.py runs this file in a process.

The interpreter multiplies no bfloat16. That, and what the compiler makes of the kernels, only a GPU can show.
"""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from hf_cwd.newton_schulz import orthogonalize, symmetric
from hf_cwd.newton_schulz.symmetric import Tiles, symmetric_gram, symmetric_product, tiles_for


class _Whole(type):
    """NumPy 2.4 makes no integer of an array of one element, as the interpreter of Triton 3.6 wants it to."""

    def __instancecheck__(cls, value):
        return isinstance(value, int)

    def __call__(cls, value):
        return int(value.item() if isinstance(value, np.ndarray) else value)


interpreter.int = _Whole("int", (), {})

CUTS = [
    (Tiles(16, 16, 1, 4, 2), torch.float32),
    (Tiles(32, 16, 2, 4, 2), torch.float16),
    (Tiles(16, 32, 3, 4, 2), torch.float32),
]
# One tile, exact multiples, edges in both dimensions, more rows than columns and fewer, a last group that is not full.
SIZES = [(1, 16, 16), (2, 64, 32), (3, 33, 17), (1, 70, 130), (2, 97, 5), (1, 1, 1)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def combined(name, values):
    """Sizes, cuts and three values of something else: each pair of these meets in a case, and not all three do."""
    cases = [(s, c, (s + c) % 3) for s in range(len(SIZES)) for c in range(3)]
    return pytest.mark.parametrize(
        ("size", "tiles", "dtype", name), [(SIZES[s], *CUTS[c], values[v]) for s, c, v in cases]
    )


def numbers(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.manual_seed(seed)).to(dtype)


def commuting(batch, n, dtype):
    """Symmetric matrices A, B = A / 2 + A^2 and D, of norm about one."""
    a = numbers(batch, n, n, dtype=torch.float64) / n**0.5 / 2
    a = a + a.mT
    b = a / 2 + a @ a
    return a.to(dtype), b.to(dtype), (a - b).to(dtype)


def assert_product(found, expected, left, right, others=0.0):
    """Against float64: ``k`` roundings of float32 of the sum of the absolute products, and one to the dtype."""
    size = (left.double().abs() @ right.double().abs()) + others
    bound = (left.size(-1) + 4) * 2.0**-24 * size + torch.finfo(found.dtype).eps / 2 * expected.abs() + 2.0**-25
    assert ((found.double() - expected).abs() <= bound).all()


@combined("layout", ["contiguous", "transposed", "every other column"])
def test_gram(size, tiles, dtype, layout):
    x = numbers(*size, dtype=dtype)
    if layout == "transposed":
        x = x.mT.contiguous().mT
    elif layout == "every other column":
        x = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    found = symmetric_gram(x, tiles=tiles)
    assert (found.shape, found.dtype, found.is_contiguous()) == ((*size[:2], size[1]), dtype, True)
    assert_product(found, x.double() @ x.double().mT, x, x.mT)
    assert torch.equal(found, found.mT)


@combined("factors", [(1.0, 0.0), (2.0315, -4.775), (-0.5, 3.4445)])
def test_product(size, tiles, dtype, factors):
    alpha, beta = factors
    a, b, d = commuting(*size[:2], dtype)
    expected = alpha * (a.double() @ b.double())
    # What is mirrored is the upper triangle of a product that rounding to dtype left only nearly symmetric.
    expected = (expected + beta * d.double()).triu()
    expected = expected + expected.triu(1).mT
    found = symmetric_product(a, b, alpha=alpha, plus=d, beta=beta, tiles=tiles)
    upper = torch.ones_like(expected).triu()
    size_ = abs(alpha) * (a.double().abs() @ b.double().abs()) + abs(beta) * d.double().abs()
    bound = (a.size(-1) + 4) * 2.0**-24 * size_ + torch.finfo(dtype).eps / 2 * expected.abs() + 2.0**-25
    assert ((found.double() - expected).abs() * upper <= bound).all()
    assert torch.equal(found, found.mT)
    assert found.is_contiguous()


def test_without_a_summand_nothing_else_is_read():
    a, b, _ = commuting(2, 40, torch.float32)
    found = symmetric_product(a, b, alpha=2.0, beta=torch.nan, tiles=Tiles(16, 16, 2, 4, 2))
    torch.testing.assert_close(found.double(), 2 * (a.double() @ b.double()), rtol=1e-5, atol=1e-6)


def test_operands_are_not_mutated():
    a, b, d = commuting(2, 40, torch.float32)
    before = [t.clone() for t in (a, b, d)]
    symmetric_product(a, b, alpha=2.0, plus=d, beta=3.0, tiles=Tiles(16, 16, 2, 4, 2))
    symmetric_gram(a, tiles=Tiles(16, 16, 2, 4, 2))
    assert all(torch.equal(t, old) for t, old in zip((a, b, d), before, strict=True))


def test_only_the_upper_triangle_of_a_summand_is_read():
    a, b, d = commuting(1, 40, torch.float32)
    tiles = Tiles(16, 16, 2, 4, 2)
    garbage = d + torch.full_like(d, 100.0).tril(-1)
    found, expected = (symmetric_product(a, b, plus=t, beta=1.0, tiles=tiles) for t in (garbage, d))
    assert torch.equal(found, expected)


@DTYPES
def test_a_batch_is_its_matrices(dtype):
    x = numbers(3, 40, 24, dtype=dtype)
    tiles = Tiles(16, 16, 2, 4, 2)
    found = symmetric_gram(x, tiles=tiles)
    assert all(torch.equal(symmetric_gram(x[i : i + 1], tiles=tiles)[0], found[i]) for i in range(3))


def test_nan_stays_in_its_rows_and_matrix():
    x = numbers(2, 40, 24, dtype=torch.float32)
    x[1, 5, 7] = torch.nan
    found = symmetric_gram(x, tiles=Tiles(16, 16, 2, 4, 2)).isnan()
    expected = torch.zeros_like(found)
    expected[1, 5, :] = expected[1, :, 5] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [2, 130])
@DTYPES
def test_default_tiles(rows, dtype):
    x = numbers(1, rows, 70, dtype=dtype)
    assert_product(symmetric_gram(x), x.double() @ x.double().mT, x, x.mT)


def test_tiles_fit_a_multiprocessor():
    """Operands of all stages in the 227 KiB of shared memory of an H100; powers of two, as Triton's blocks must be."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tiles = tiles_for(dtype)
        assert 2 * tiles.block * tiles.inner * dtype.itemsize * tiles.stages <= 227 * 1024
        assert all(size & (size - 1) == 0 and size >= 16 for size in (tiles.block, tiles.inner))


@pytest.mark.parametrize("form", ["_standard", "_gram"])
@pytest.mark.parametrize("shape", [(2, 40, 70), (2, 70, 40), (1, 33, 33)], ids=str)
def test_newton_schulz_runs_on_them(form, shape, monkeypatch):
    """As on a CUDA device, batched, against the same form in float64 without them."""
    x = numbers(*shape, dtype=torch.float64)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    table = [(3.4445, -4.7750, 2.0315)] * 5
    expected = getattr(orthogonalize, form)(x, table)
    launched = []
    monkeypatch.setattr(orthogonalize, "_halves", lambda x: launched.append(x) or symmetric)
    found = getattr(orthogonalize, form)(x.float(), table)
    assert len(launched) == {"_standard": 10, "_gram": 16}[form]
    # 485, the five iterations' slope at zero, times a rounding of float32: what one grows by.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=485 * 2.0**-24)
