"""Cautious Weight Decay (arXiv 2510.12402) in float64 numpy, as printed, in the paper's symbols.

An algorithm maps a gradient and its state to ``(u, s, state)``: the direction ``u`` that is subtracted, and the
quantity ``s`` whose sign the paper's mask compares with that of the parameter. ``u`` and ``s`` have the same sign
everywhere, which is what the implementation's single mask relies on. The decay is :func:`update`.
"""
# ruff: noqa: N803 the paper's matrices have capital letters

import numpy as np

Array = np.ndarray
QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's, which the paper leaves open


def cautious(s: Array, x: Array, strict: bool = False) -> Array:
    """1[s*x >= 0], or 1[s*x > 0]. The product is safe in float64 for numbers that are not tiny."""
    return np.where(s * x > 0 if strict else s * x >= 0, 1.0, 0.0)


def update(x: Array, u: Array, mask: Array | float, *, lr: float, wd: float) -> Array:
    """x <- x - lr * (u + wd * mask * x); a mask of 1.0 is plain decoupled decay, 0.0 is none."""
    return x - lr * (u + wd * mask * x)


def sgd(g: Array, m: Array, *, beta: float, nesterov: bool = False) -> tuple[Array, Array, Array]:
    """Algorithm 2, SGD with momentum as a moving average; Nesterov's look-ahead is not in the paper."""
    m = beta * m + (1 - beta) * g
    u = beta * m + (1 - beta) * g if nesterov else m
    return u, u, m


def classical_sgd(
    g: Array, m: Array | None, *, momentum: float, dampening: float, nesterov: bool
) -> tuple[Array, Array, Array]:
    """SGD as torch documents it: b_1 = g, b_t = momentum b + (1 - dampening) g. ``m`` is None at the first step."""
    m = g if m is None else momentum * m + (1 - dampening) * g
    u = g + momentum * m if nesterov else m
    return u, u, m


def lion_k(g: Array, m: Array, *, beta1: float, beta2: float, grad_k=np.sign) -> tuple[Array, Array, Array]:
    """Algorithm 3. It adds ``+ grad K``, and its m accumulates ``-g``; K = |.|_1 makes it Lion."""
    m_tilde = beta1 * m - (1 - beta1) * g
    m = beta2 * m - (1 - beta2) * g
    return -grad_k(m_tilde), -grad_k(m_tilde), m


def lion(g: Array, m: Array, *, beta1: float, beta2: float) -> tuple[Array, Array, Array]:
    """Algorithm 4."""
    c = beta1 * m + (1 - beta1) * g
    m = beta2 * m + (1 - beta2) * g
    return np.sign(c), c, m


def muon(
    G: Array, M: Array, *, beta: float, nesterov: bool = False, ns_steps: int = 5, scale: float = 1.0
) -> tuple[Array, Array, Array]:
    """Algorithm 5; Nesterov's look-ahead and a shape factor are not in the paper."""
    M = beta * M + G
    ortho = newton_schulz(G + beta * M if nesterov else M, steps=ns_steps)
    return scale * ortho, ortho, M


def newton_schulz(M: Array, *, steps: int = 5, coefficients: tuple[float, float, float] = QUINTIC) -> Array:
    """O = U p(p(...p(S))) V^T with p(s) = a s + b s^3 + c s^5, from S scaled to |S|_F = 1. Zero stays zero."""
    a, b, c = coefficients
    X = M / max(np.linalg.norm(M), 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + b * A @ X + c * A @ A @ X
    return X


def adam(
    g: Array, m: Array, v: Array, t: int, *, beta1: float, beta2: float, eps: float
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Algorithm 6; t counts from 1."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return m_hat / (np.sqrt(v_hat) + eps), m, (m, v)
