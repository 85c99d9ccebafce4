"""Triton kernels for matrix products with a symmetric result: they compute one triangle and mirror it.

This needs half of the operations of a general product, and the result is exactly symmetric. The module imports Triton,
so it is imported only when a product is needed.
"""
# ruff: noqa: N803 -- capital letters are compile-time constants

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """The tiling of a product.

    Attributes:
        block: the rows and columns of a tile of the result.
        inner: the size of the inner dimension that is loaded at once.
        group: the tiles on each side of a square; programs run square by square, so that operands stay in the L2 cache.
        warps: the warps of a program, which computes one tile.
        stages: the number of loads in flight.
    """

    block: int
    inner: int
    group: int
    warps: int
    stages: int


# The fastest of thirteen tilings on an H100 for 2048 rows, with and without a batch. Tiles of 64 are 40 % slower for
# batches. There is no autotuner: it would take seconds on every rank, and ranks could choose differently.
HALF = Tiles(block=128, inner=64, group=4, warps=8, stages=4)
FLOAT = Tiles(block=64, inner=32, group=4, warps=4, stages=3)


def tiles_for(dtype: torch.dtype) -> Tiles:
    """The tiling for a dtype. It does not depend on the batch, so that a batch is rounded like single matrices."""
    return FLOAT if dtype == torch.float32 else HALF


def symmetric_gram(matrix: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """``X X^T`` for each matrix of a batch ``(batch, rows, columns)``.

    Args:
        matrix: bfloat16, float16 or float32, with any strides: a transposed view is as fast. Not mutated.
        tiles: None means :func:`tiles_for`.

    Returns:
        A new contiguous tensor ``(batch, rows, rows)`` in the dtype of ``matrix``, accumulated in float32.
    """
    return _launch(matrix, matrix, None, 1.0, 0.0, tiles)


def symmetric_product(
    left: Tensor,
    right: Tensor,
    *,
    alpha: float = 1.0,
    plus: Tensor | None = None,
    beta: float = 0.0,
    tiles: Tiles | None = None,
) -> Tensor:
    """``beta plus + alpha left right`` for symmetric matrices that commute, so that the result is symmetric.

    With ``left = right = plus = A`` it is the ``b A + c A^2`` of Newton-Schulz.

    Args:
        left, right: ``(batch, n, n)``, bfloat16, float16 or float32, each symmetric. Not mutated.
        plus: contiguous, of the same shape and dtype, symmetric; only its upper triangle is read.
        tiles: None means :func:`tiles_for`.

    Returns:
        A new contiguous tensor ``(batch, n, n)``, accumulated in float32 and rounded once.
    """
    return _launch(left, right, plus, alpha, beta, tiles)


def _launch(left: Tensor, right: Tensor, plus: Tensor | None, alpha: float, beta: float, tiles: Tiles | None) -> Tensor:
    batch, n, k = left.shape
    tiles = tiles or tiles_for(left.dtype)
    result = torch.empty((batch, n, n), dtype=left.dtype, device=left.device)
    squares = triton.cdiv(n, tiles.block * tiles.group)
    grid = (squares * (squares + 1) // 2 * tiles.group**2, batch)
    # Triton launches on the current device, which may differ from that of the tensors.
    with torch.cuda.device(left.device) if left.is_cuda else contextlib.nullcontext():
        _upper_tile[grid](
            left,
            right,
            result if plus is None else plus,
            result,
            n,
            k,
            *left.stride(),
            *right.stride(),
            alpha,
            beta,
            PLUS=plus is not None,
            BLOCK=tiles.block,
            INNER=tiles.inner,
            GROUP=tiles.group,
            MASK_N=n % tiles.block != 0,
            MASK_K=k % tiles.inner != 0,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return result


@triton.jit
def _place(n, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column of this program's tile: squares of GROUP x GROUP tiles, upper triangle, column by column."""
    square, inside = tl.program_id(0) // GROUP**2, tl.program_id(0) % GROUP**2
    column = ((tl.sqrt(8.0 * square + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = square - column * (column + 1) // 2
    return row * GROUP + inside % GROUP, column * GROUP + inside // GROUP


@triton.jit
def _upper_tile(
    left,
    right,
    plus,
    result,
    n,
    k,
    left_batch,
    left_row,
    left_column,
    right_batch,
    right_row,
    right_column,
    alpha,
    beta,
    PLUS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_K: tl.constexpr,
):
    """``result <- beta plus + alpha left right^T``: computes tile (i, j) for i <= j, and its transpose at (j, i)."""
    i, j = _place(n, GROUP, BLOCK)
    if (i > j) | (j * BLOCK >= n):
        return
    # Offsets within a tile fit in 32 bits; the offset of its corner may not.
    batch, top, side = tl.program_id(1).to(tl.int64), (i * BLOCK).to(tl.int64), (j * BLOCK).to(tl.int64)
    along, inner = tl.arange(0, BLOCK), tl.arange(0, INNER)
    x_at = left + batch * left_batch + top * left_row + (along[:, None] * left_row + inner[None, :] * left_column)
    y_at = right + batch * right_batch + side * right_row + (along[:, None] * right_row + inner[None, :] * right_column)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, INNER):
        if MASK_N or MASK_K:
            valid = inner[None, :] < k - start
            x = tl.load(x_at, mask=(along[:, None] < n - i * BLOCK) & valid, other=0.0)
            y = tl.load(y_at, mask=(along[:, None] < n - j * BLOCK) & valid, other=0.0)
        else:
            x, y = tl.load(x_at), tl.load(y_at)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
        x_at += INNER * left_column
        y_at += INNER * right_column
    total *= alpha
    within = along[:, None] * n + along[None, :]
    corner, opposite = batch * n * n + top * n + side, batch * n * n + side * n + top
    valid = (along[:, None] < n - i * BLOCK) & (along[None, :] < n - j * BLOCK)
    if PLUS:
        if MASK_N:
            total += beta * tl.load(plus + corner + within, mask=valid, other=0.0).to(tl.float32)
        else:
            total += beta * tl.load(plus + corner + within).to(tl.float32)
    tile = total.to(result.dtype.element_ty)
    mirrored = tl.trans(tile)
    if i == j:  # both triangles are in this tile, and rounding may make them differ
        tile = tl.where(along[:, None] <= along[None, :], tile, mirrored)
    if MASK_N:
        tl.store(result + corner + within, tile, mask=valid)
        if i != j:
            tl.store(result + opposite + within, mirrored, mask=tl.trans(valid))
    else:
        tl.store(result + corner + within, tile)
        if i != j:
            tl.store(result + opposite + within, mirrored)
