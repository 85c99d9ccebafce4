"""SGD with momentum: torch.optim.SGD's recursion, or the paper's moving average (Algorithm 2 of arXiv 2510.12402)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_cwd.rules.base import Rule
from hf_cwd.rules.hyperparameters import Flag, Real


def direction(
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    step: int,
    momentum: float,
    dampening: float,
    nesterov: bool,
    ema: bool,
) -> Tensor:
    """The gradient, or with momentum::

        m <- g                              at the first step (torch.optim.SGD)
        m <- momentum m + (1 - dampening) g afterwards
        u  = g + momentum m  if nesterov else m

        m <- momentum m + (1 - momentum) g  with ema=True (the paper), from m = 0

    Args:
        grad: g, any shape.
        momentum_buffer: m, same shape, mutated; absent when momentum is 0.
        step: t, from 1.

    Returns:
        u, bit for bit that of torch.optim.SGD. It may be ``grad`` or ``momentum_buffer`` itself.
    """
    if momentum_buffer is None:
        return grad
    if ema:
        momentum_buffer.lerp_(grad, 1 - momentum)
        return grad.lerp(momentum_buffer, momentum) if nesterov else momentum_buffer
    if step == 1:
        momentum_buffer.copy_(grad)
    else:
        momentum_buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
    return grad.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer


def validate(group: Mapping[str, Any]) -> None:
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"sgd: nesterov=True needs momentum > 0 and dampening=0, "
            f"not momentum={group['momentum']}, dampening={group['dampening']}"
        )
    if group["ema"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"sgd: ema=True is momentum*m + (1 - momentum)*g: give momentum > 0 and leave dampening at 0, "
            f"not momentum={group['momentum']}, dampening={group['dampening']}"
        )


RULE = Rule(
    name="sgd",
    direction=direction,
    state_keys=lambda group: ("momentum_buffer",) if group["momentum"] else (),
    hyperparameters={
        "momentum": Real(0.0, high=1.0),
        "dampening": Real(0.0, high=1.0),
        "nesterov": Flag(False),
        "ema": Flag(False),
    },
    validate=validate,
    aliases={"exp_avg": "momentum_buffer"},
)
