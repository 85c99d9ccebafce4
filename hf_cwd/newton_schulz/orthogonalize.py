"""Approximate orthogonalisation of matrices by Newton-Schulz iterations, for Muon."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Triple = tuple[float, float, float]


def _safe(*table: Triple, margin: float = 1.01) -> tuple[Triple, ...]:
    """The polynomials of ``s / margin``, so that singular values that rounding lifts above 1 do not diverge.

    The last polynomial stays unchanged.
    """
    return *((a / margin, b / margin**3, c / margin**5) for a, b, c in table[:-1]), table[-1]


# One (a, b, c) for each iteration. Further iterations repeat the last one.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # Keller Jordan's quintic (kellerjordan.github.io/posts/muon), the constants of torch.optim.Muon. It has a steep
    # slope at zero, and leaves singular values in about [0.68, 1.14] instead of at 1.
    "quintic": ((3.4445, -4.7750, 2.0315),),
    # The Polar Express (arXiv 2505.16932, Algorithm 1): each polynomial is optimal for the interval to which the ones
    # before it map [0.001, 1]. Five iterations map [0.002, 1.01] into [0.87, 1.13], seven within 1e-5 of 1.
    "polar_express": _safe(
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
}

FORMS = ("auto", "standard", "gram")

# The gram form computes X X^T again after this many iterations. Rounding gives R negative eigenvalues, and each
# iteration but the last multiplies them by a^2. In bfloat16, three iterations destroy some spectra; with two, the error
# is no more than that of rounding X.
RESTART = 2
# The first block may have three iterations if they multiply these eigenvalues by a_1^2 a_2^2 of at most this. That is
# 141 for the quintic, but 1112 for the Polar Express. The spectra are in tests/newton_schulz/test_gram.py.
GROWTH = 150.0

# CUDA devices compute only half of a symmetric product of this many rows or more; for fewer, the launch costs more.
HALVED_ROWS = 768

# CPUs compute a symmetric product of at least two strips of this many rows in strips that end at the diagonal.
STRIP = 256


def newton_schulz(
    matrix: Tensor,
    *,
    coefficients: str | Sequence[Triple] = "quintic",
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
    form: str = "auto",
) -> Tensor:
    """Maps every singular value of a matrix to about 1: ``U S V^T -> U V^T``, approximately.

    Recursion of the ``standard`` form, from ``X = M / max(|M|_F, eps)``, for matrices with no more rows than columns::

        A <- X X^T
        X <- a X + (b A + c A^2) X

    The ``gram`` form computes two or three of these iterations on the small ``R = X X^T`` before it returns to X::

        R <- X X^T,  Q <- I
        repeat:  Z <- b R + c R^2,  Q <- a Q + Q Z,  R <- (a I + Z) R (a I + Z)
        X <- Q X

    The forms are equal up to rounding. The gram form costs less if the long side of X is more than 1.5 times its short
    side; ``auto`` chooses the form with fewer operations. With more rows than columns both multiply from the right,
    with ``X^T X``. A, R, Z and Q are symmetric, and only about half of a large one is computed (on CUDA by
    :mod:`hf_cwd.newton_schulz.symmetric`).

    Args:
        matrix: ``(..., rows, columns)``; leading dimensions are a batch of independent matrices. Not mutated.
        coefficients: name in ``COEFFICIENTS`` or a sequence of ``(a, b, c)``, one for each iteration.
        steps: number of iterations.
        eps: lower bound of the norm that X is divided by, so that a zero matrix stays zero.
        dtype: dtype of the iteration.
        form: one of ``FORMS``.

    Returns:
        A new contiguous tensor of the shape of ``matrix``, in ``dtype``.

    Raises:
        ValueError: fewer than two dimensions, or an unknown ``form`` or name of coefficients.

    Example:
        >>> import torch
        >>> from hf_cwd.newton_schulz.orthogonalize import newton_schulz
        >>> U = newton_schulz(torch.randn(4, 16, generator=torch.manual_seed(0)), dtype=torch.float32)
        >>> bool((torch.linalg.svdvals(U) > 0.6).all() and (torch.linalg.svdvals(U) < 1.3).all())
        True
    """
    if matrix.ndim < 2:
        raise ValueError(f"newton_schulz needs a matrix or a batch of matrices, got shape {tuple(matrix.shape)}")
    rows, columns = matrix.shape[-2:]
    table = _table(coefficients, steps)
    run = {"standard": _standard, "gram": _gram}[_form(rows, columns, table, form)]
    if not matrix.numel():
        return matrix.new_empty(matrix.shape, dtype=dtype)
    x = matrix.reshape(-1, rows, columns).to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    if not x.is_cpu:
        return run(x, table).reshape(matrix.shape)
    # On a CPU a batch is not faster, and one matrix at a time stays in the caches.
    results = [run(one, table) for one in x]
    return (results[0] if len(results) == 1 else torch.stack(results)).reshape(matrix.shape)


def flops(
    rows: int,
    columns: int,
    *,
    coefficients: str | Sequence[Triple] = "quintic",
    steps: int = 5,
    form: str = "auto",
) -> int:
    """The floating-point operations of :func:`newton_schulz` for one matrix; symmetric products count in full."""
    table = _table(coefficients, steps)
    return _flops(rows, columns, table, _form(rows, columns, table, form))


def _flops(rows: int, columns: int, table: Sequence[Triple], form: str) -> int:
    short, long = sorted((rows, columns))
    # Each block computes X X^T and a product with X. Each iteration computes one product of short matrices, and in the
    # gram form, except for the last iteration of a block, two more for R and one for Q.
    blocks = [1] * len(table) if form == "standard" else _blocks(table)
    return sum(4 * short**2 * long + 2 * short**3 * (4 * count - 3) for count in blocks)


def _form(rows: int, columns: int, table: Sequence[Triple], form: str) -> str:
    """The form that runs. It depends on shape and coefficients only, so that all ranks, devices and batches agree."""
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not valid: form is one of {', '.join(FORMS)}")
    if form != "auto":
        return form
    return min(("standard", "gram"), key=lambda name: _flops(rows, columns, table, name))


def _blocks(table: Sequence[Triple]) -> list[int]:
    """The numbers of iterations after which the gram form returns to X."""
    steps = len(table)
    first = RESTART + 1 if steps > RESTART and (table[0][0] * table[1][0]) ** 2 <= GROWTH else RESTART
    ends = [0, *range(first, steps, RESTART), steps]
    return [end - start for start, end in pairwise(ends)]


def singular_value(value: float, *, coefficients: str | Sequence[Triple], steps: int) -> float:
    """The value to which :func:`newton_schulz` maps a singular value of ``M / |M|_F``, without rounding."""
    for a, b, c in _table(coefficients, steps):
        square = value * value
        value *= a + b * square + c * square * square
    return value


def _table(coefficients: str | Sequence[Triple], steps: int) -> list[Triple]:
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients={coefficients!r} is not one of {', '.join(COEFFICIENTS)}")
        coefficients = COEFFICIENTS[coefficients]
    return [coefficients[min(i, len(coefficients) - 1)] for i in range(steps)]


def _standard(x: Tensor, table: Sequence[Triple]) -> Tensor:
    for a, b, c in table:
        gram = _gram_matrix(x)
        z = _product(gram, gram, plus=gram, beta=b, alpha=c)
        x = _add(x, z, x, beta=a) if _is_wide(x) else _add(x, x, z, beta=a)
    return x


def _gram(x: Tensor, table: Sequence[Triple]) -> Tensor:
    start = 0
    for count in _blocks(table):
        q = _polynomial(_gram_matrix(x), table[start : start + count])
        start += count
        x = q @ x if _is_wide(x) else x @ q
    return x


def _polynomial(r: Tensor, table: Sequence[Triple]) -> Tensor:
    """The matrix Q with which the iterations of ``table`` multiply X, for ``r = X X^T``."""
    q = None
    for i, (a, b, c) in enumerate(table):
        z = _product(r, r, plus=r, beta=b, alpha=c)
        if i + 1 < len(table):
            rz = _product(r, z, plus=r, beta=a)
            r = _product(rz, z, plus=rz, beta=a)
        if q is None:
            q = z
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = _product(q, z, plus=q, beta=a)
    return q


def _is_wide(x: Tensor) -> bool:
    return x.size(-2) <= x.size(-1)


def _gram_matrix(x: Tensor) -> Tensor:
    """``X X^T``, or ``X^T X`` if the matrix has more rows than columns."""
    x = x if _is_wide(x) else x.mT
    if _in_strips(x):
        return _strips(x, x)
    halves = _halves(x)
    return halves.symmetric_gram(x) if halves else x @ x.mT


def _product(left: Tensor, right: Tensor, *, plus: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """``beta plus + alpha left right`` for symmetric matrices that commute; the result is symmetric too."""
    if _in_strips(left):
        return _strips(left, right, plus=plus, beta=beta, alpha=alpha)
    halves = _halves(left)
    if halves:
        return halves.symmetric_product(left, right, plus=plus, beta=beta, alpha=alpha)
    return _add(plus, left, right, beta=beta, alpha=alpha)


def _add(plus: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    add = torch.addmm if plus.ndim == 2 else torch.baddbmm
    return add(plus, left, right, beta=beta, alpha=alpha)


def _in_strips(x: Tensor) -> bool:
    return x.is_cpu and x.size(-2) >= 2 * STRIP


def _strips(
    left: Tensor, right: Tensor, *, plus: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """``beta plus + alpha left right^T``, which must be symmetric: computes the lower triangle and mirrors it."""
    rows = left.size(0)
    result = left.new_empty(rows, rows)
    for top in range(0, rows, STRIP):
        end = min(top + STRIP, rows)
        strip, columns = result[top:end, :end], right[:end].mT
        if plus is None:
            torch.mm(left[top:end], columns, out=strip)
        else:
            torch.addmm(plus[top:end, :end], left[top:end], columns, beta=beta, alpha=alpha, out=strip)
        result[:top, top:end] = result[top:end, :top].mT
    return result


def _halves(x: Tensor) -> Any:
    """The kernels that compute half of a symmetric product with the rows of X; None if they do not apply."""
    if x.is_cuda and x.size(-2) >= HALVED_ROWS and x.dtype in (torch.bfloat16, torch.float16):
        return _kernels()
    return None


@cache
def _kernels() -> ModuleType | None:
    try:
        from hf_cwd.newton_schulz import symmetric
    except ImportError:  # torch has no Triton on this platform
        return None
    return symmetric
