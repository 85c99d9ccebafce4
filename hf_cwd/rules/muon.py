"""Muon (kellerjordan.github.io/posts/muon); Algorithm 5 of arXiv 2510.12402 with its decay left to decay.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cwd.newton_schulz.orthogonalize import FORMS, newton_schulz, singular_value
from hf_cwd.newton_schulz.orthogonalize import flops as newton_schulz_flops
from hf_cwd.rules.base import Rule
from hf_cwd.rules.hyperparameters import Choice, Coefficients, Flag, Integer, Real

NS_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def direction(grad: Tensor, exp_avg: Tensor, *, step: int, momentum: float, nesterov: bool, **_: Any) -> Tensor:
    """The momentum before its orthogonalisation, as in torch.optim.Muon::

        M <- mu M + (1 - mu) G
        u  = mu M + (1 - mu) G  if nesterov else M

    The paper has ``M <- mu M + G``. The factor ``1 - mu`` has no effect on the orthogonalised direction.

    Args:
        grad: G, or any slice of it.
        exp_avg: M, same shape, mutated.
        step: unused.

    Returns:
        u; without nesterov this is ``exp_avg`` itself.
    """
    exp_avg.lerp_(grad, 1 - momentum)
    return grad.lerp(exp_avg, momentum) if nesterov else exp_avg


def dtype(direction: torch.dtype, device: str, *, ns_dtype: str, **_: Any) -> torch.dtype:
    """The dtype of the iteration.

    ``auto`` means float64 for float64 directions, float32 on CPUs, most of which are slow in bfloat16, and otherwise
    bfloat16, as in torch.optim.Muon.
    """
    if ns_dtype != "auto":
        return NS_DTYPES[ns_dtype]
    if direction == torch.float64:
        return torch.float64
    return torch.float32 if device == "cpu" else torch.bfloat16


def orthogonalize(
    u: Tensor, *, ns_steps: int, ns_coefficients: Any, ns_dtype: str, ns: str, eps: float, **_: Any
) -> Tensor:
    """``O = NewtonSchulz(u)`` for whole matrices ``(..., rows, columns)``, computed in :func:`dtype`."""
    number = dtype(u.dtype, u.device.type, ns_dtype=ns_dtype)
    return newton_schulz(u, coefficients=ns_coefficients, steps=ns_steps, eps=eps, dtype=number, form=ns)


def flops(rows: int, columns: int, *, ns_steps: int, ns_coefficients: Any, ns: str, **_: Any) -> int:
    """Floating-point operations of :func:`orthogonalize`, in the form that will run."""
    return newton_schulz_flops(rows, columns, coefficients=ns_coefficients, steps=ns_steps, form=ns)


def scale(full_shape: Sequence[int], *, adjust_lr_fn: str, **_: Any) -> float:
    """The factor on the orthogonal direction of a ``(..., rows, columns)`` parameter.

    - ``match_rms_adamw``: ``0.2 * sqrt(max(rows, columns))`` (arXiv 2502.16982). Updates have the RMS of AdamW's, so
      that one learning rate and one weight decay fit both.
    - ``original``: ``sqrt(max(1, rows / columns))``.
    - ``none``: 1, as in the paper's Algorithm 5.
    """
    rows, columns = full_shape[-2:]
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / max(1, columns)) ** 0.5 if adjust_lr_fn == "original" else 1.0


def validate(group: Mapping[str, Any]) -> None:
    """Raises ValueError if the iteration does not bring singular values from (0, 1] near 1."""
    coefficients, steps = group["ns_coefficients"], group["ns_steps"]
    for start in (i / 20 for i in range(1, 21)):
        value = singular_value(start, coefficients=coefficients, steps=steps)
        if not 0 < value <= 2:
            raise ValueError(
                f"muon: ns_coefficients={coefficients!r} with ns_steps={steps} takes the singular value {start:g} to "
                f"{value:.3g} instead of about 1: leave ns_coefficients out, or give the ones that belong to ns_steps"
            )


RULE = Rule(
    name="muon",
    direction=direction,
    state_keys=lambda group: ("exp_avg",),
    hyperparameters={
        "momentum": Real(0.95, high=1.0),
        "nesterov": Flag(True),
        "ns_steps": Integer(5, 1, 99),
        "ns_coefficients": Coefficients("quintic"),
        "ns": Choice("auto", FORMS),
        "ns_dtype": Choice("auto", ("auto", *NS_DTYPES)),
        "eps": Real(1e-7),
        # torch.optim.Muon's None is "original".
        "adjust_lr_fn": Choice("match_rms_adamw", ("match_rms_adamw", "original", "none"), {None: "original"}),
    },
    matrix=orthogonalize,
    matrix_dtype=dtype,
    matrix_flops=flops,
    scale=scale,
    validate=validate,
    aliases={"momentum_buffer": "exp_avg"},
    companion="adamw",
)
