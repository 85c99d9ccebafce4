"""Approximate orthogonalisation of matrices by Newton-Schulz iterations, for Muon."""

from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[float, float, float]

# One (a, b, c) for each iteration; the last one is repeated when there are more iterations than entries.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # Keller Jordan's quintic (kellerjordan.github.io/posts/muon), the constants of torch.optim.Muon: the steepest slope
    # at zero, with singular values left in about [0.68, 1.14] instead of at 1.
    "quintic": ((3.4445, -4.7750, 2.0315),),
}


def newton_schulz(
    matrix: Tensor,
    *,
    coefficients: str | Sequence[Triple] = "quintic",
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Maps every singular value of a matrix to about 1: ``U S V^T -> U V^T``, approximately.

    Recursion, from ``X = M / max(|M|_F, eps)``, transposed first where it has more rows than columns::

        A <- X X^T
        X <- a X + (b A + c A^2) X

    Args:
        matrix: ``(..., rows, columns)``; leading dimensions are a batch of independent matrices. Not mutated.
        coefficients: name in ``COEFFICIENTS`` or a sequence of ``(a, b, c)``, one for each iteration.
        steps: number of iterations.
        eps: smallest norm divided by, so that a zero matrix stays zero.
        dtype: dtype of the iteration.

    Returns:
        A new contiguous tensor of the shape of ``matrix``, in ``dtype``.

    Example:
        >>> import torch
        >>> from hf_cwd.orthogonalize import newton_schulz
        >>> U = newton_schulz(torch.randn(4, 16, generator=torch.manual_seed(0)), dtype=torch.float32)
        >>> bool((torch.linalg.svdvals(U) > 0.6).all() and (torch.linalg.svdvals(U) < 1.3).all())
        True
    """
    if matrix.ndim < 2:
        raise ValueError(f"newton_schulz needs a matrix or a batch of matrices, got shape {tuple(matrix.shape)}")
    table = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else coefficients
    X = matrix.to(dtype)
    X = X.unsqueeze(0) if X.ndim == 2 else X.flatten(0, -3)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for i in range(steps):
        a, b, c = table[min(i, len(table) - 1)]
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    # Contiguous, so that the kernels can walk over it in blocks.
    return (X.mT.contiguous() if tall else X).reshape(matrix.shape)
