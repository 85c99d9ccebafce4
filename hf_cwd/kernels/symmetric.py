"""Triton products of matrices whose result is symmetric: one triangle of it is computed, the other is its mirror image.

Half of the operations of a general product. The result is exactly symmetric, whatever was rounded on the way.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """How a product is cut.

    Attributes:
        block: rows and columns of a tile of the result.
        inner: how much of the inner dimension is loaded at once.
        group: tiles are walked through in squares of this many a side, whose operands stay in the L2 cache.
        warps: of a program, which computes one tile.
        stages: how many loads are under way at once.
    """

    block: int
    inner: int
    group: int
    warps: int
    stages: int


# No autotuner: it would cost every rank seconds at the first step, and ranks could choose differently.
HALF = Tiles(block=128, inner=64, group=4, warps=4, stages=4)
HALF_SMALL = Tiles(block=64, inner=64, group=4, warps=4, stages=4)
FLOAT = Tiles(block=64, inner=32, group=4, warps=4, stages=3)
# Of up to this many rows: with tiles of 128 they would keep too few of a hundred multiprocessors busy.
SMALL = 1024


def tiles_for(rows: int, dtype: torch.dtype) -> Tiles:
    """By the size of one matrix, so that a batch is rounded as its matrices alone would be."""
    if dtype == torch.float32:
        return FLOAT
    return HALF_SMALL if rows <= SMALL else HALF


def symmetric_gram(matrix: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """``X X^T`` of each matrix of a batch ``(batch, rows, columns)``.

    Args:
        matrix: bfloat16, float16 or float32, of any strides: a transposed view costs nothing. Not mutated.
        tiles: None is :func:`tiles_for`.

    Returns:
        A new contiguous ``(batch, rows, rows)`` of the dtype of ``matrix``, summed in float32.
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
    """``beta plus + alpha left right`` of symmetric matrices that commute, so that the result is symmetric.

    With ``left = right = plus = A`` it is the ``b A + c A^2`` of Newton-Schulz.

    Args:
        left, right: ``(batch, n, n)``, bfloat16, float16 or float32, each symmetric. Not mutated.
        plus: contiguous, of the same shape and dtype, symmetric; its upper triangle is read.
        tiles: None is :func:`tiles_for`.

    Returns:
        A new contiguous ``(batch, n, n)``, summed in float32 and rounded once.
    """
    return _launch(left, right, plus, alpha, beta, tiles)


def _launch(A: Tensor, B: Tensor, D: Tensor | None, alpha: float, beta: float, tiles: Tiles | None) -> Tensor:
    batch, n, k = A.shape
    tiles = tiles or tiles_for(n, A.dtype)
    C = torch.empty((batch, n, n), dtype=A.dtype, device=A.device)
    squares = triton.cdiv(n, tiles.block * tiles.group)
    grid = (squares * (squares + 1) // 2 * tiles.group**2, batch)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(A.device) if A.is_cuda else contextlib.nullcontext():
        _upper_tile[grid](
            A, B, C if D is None else D, C, n, k, *A.stride(), *B.stride(), alpha, beta,
            PLUS=D is not None, BLOCK=tiles.block, INNER=tiles.inner, GROUP=tiles.group,
            MASK_N=n % tiles.block != 0, MASK_K=k % tiles.inner != 0,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return C


@triton.jit
def _upper_tile(
    A, B, D, C, n, k, a_batch, a_row, a_column, b_batch, b_row, b_column, alpha, beta,
    PLUS: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    MASK_N: tl.constexpr, MASK_K: tl.constexpr,
):  # fmt: skip
    """``C <- beta D + alpha A B^T``, the tile (i, j) of it with i <= j, and its transpose to (j, i)."""
    # Squares of GROUP x GROUP tiles, column by column of the upper triangle; within one, all its tiles.
    square, inside = tl.program_id(0) // GROUP**2, tl.program_id(0) % GROUP**2
    column = ((tl.sqrt(8.0 * square + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = square - column * (column + 1) // 2
    i = row * GROUP + inside % GROUP
    j = column * GROUP + inside // GROUP
    if (i > j) | (j * BLOCK >= n):
        return
    # Offsets within a tile fit in 32 bits, those of its corner may not.
    batch, top, left = tl.program_id(1).to(tl.int64), (i * BLOCK).to(tl.int64), (j * BLOCK).to(tl.int64)
    along, inner = tl.arange(0, BLOCK), tl.arange(0, INNER)
    a = A + batch * a_batch + top * a_row + (along[:, None] * a_row + inner[None, :] * a_column)
    b = B + batch * b_batch + left * b_row + (along[:, None] * b_row + inner[None, :] * b_column)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, INNER):
        if MASK_N or MASK_K:
            within = inner[None, :] < k - start
            x = tl.load(a, mask=(along[:, None] < n - i * BLOCK) & within, other=0.0)
            y = tl.load(b, mask=(along[:, None] < n - j * BLOCK) & within, other=0.0)
        else:
            x, y = tl.load(a), tl.load(b)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
        a += INNER * a_column
        b += INNER * b_column
    total *= alpha
    place = batch * n * n + top * n + left + (along[:, None] * n + along[None, :])
    mirrored = batch * n * n + left * n + top + (along[:, None] * n + along[None, :])
    inside = (along[:, None] < n - i * BLOCK) & (along[None, :] < n - j * BLOCK)
    if PLUS:
        if MASK_N:
            total += beta * tl.load(D + place, mask=inside, other=0.0).to(tl.float32)
        else:
            total += beta * tl.load(D + place).to(tl.float32)
    tile = total.to(C.dtype.element_ty)
    flipped = tl.trans(tile)
    if i == j:  # both triangles are in this tile, and rounding may have made them differ
        tile = tl.where(along[:, None] <= along[None, :], tile, flipped)
    if MASK_N:
        tl.store(C + place, tile, mask=inside)
    else:
        tl.store(C + place, tile)
    if i != j:
        if MASK_N:
            tl.store(C + mirrored, flipped, mask=tl.trans(inside))
        else:
            tl.store(C + mirrored, flipped)
