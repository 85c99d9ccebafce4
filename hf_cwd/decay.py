"""Cautious Weight Decay: the definition, written once (arXiv 2510.12402).

    x <- x - lr * (scale * u + weight_decay * 1[u * x >= 0] * x)

Rules compute the direction ``u``. Kernels call :func:`step_` on blocks of memory. Nothing else in the package decides
what is decayed.
"""

import torch
from torch import Tensor

MASKS = ("ge", "gt")


def cautious_mask(direction: Tensor, param: Tensor, *, mask: str = "ge") -> Tensor:
    """The mask of elements where decay and update push the parameter the same way: ``1[u * x >= 0]``.

    It multiplies signs, not values: the product of values can underflow to 0 in low precision, and would then count as
    agreement. ``-0.0`` and NaN count as zero.

    Args:
        direction: the update direction u that will be applied (``x <- x - lr * u``), any shape.
        param: the parameter x before the step, same shape and dtype.
        mask: ``"ge"`` counts ``u = 0`` and ``x = 0`` as agreement (the paper's definition), ``"gt"`` does not.

    Returns:
        A new tensor of the same shape and dtype: 1 for elements that are decayed, 0 for all others.

    Example:
        >>> import torch
        >>> from hf_cwd import cautious_mask
        >>> u, x = torch.tensor([1.0, 1.0, 0.0, 1e-30]), torch.tensor([2.0, -2.0, -2.0, -1e-30])
        >>> cautious_mask(u, x).tolist()
        [1.0, 0.0, 1.0, 0.0]
        >>> cautious_mask(u, x, mask="gt").tolist()
        [1.0, 0.0, 0.0, 0.0]
    """
    agreement = direction.sign().mul_(param.sign())
    if mask == "ge":
        return agreement.ge_(0)  # in place; a comparison that returns bool takes ten times as long on a CPU
    if mask == "gt":
        return agreement.gt_(0)
    raise ValueError(f"mask={mask!r} is unknown: use 'ge' (the paper's u*x >= 0) or 'gt' (u*x > 0)")


def decay_rate(lr: float, weight_decay: float) -> float:
    """The coefficient of a decayed x, ``-lr * weight_decay``.

    It is never 0, also not for lr = 0 at the start of a warm-up: it is then too small to change any x. Kernels use -0
    for elements that are not decayed, and count the others, at every learning rate.
    """
    return -max(lr * weight_decay, torch.finfo(torch.float32).tiny)


def step_(
    param: Tensor,
    direction: Tensor,
    *,
    lr: float,
    weight_decay: float,
    scale: float = 1.0,
    cautious: bool = True,
    mask: str = "ge",
    sums: Tensor | None = None,
) -> None:
    """One step in place: ``x <- x - lr * (scale * u + weight_decay * 1[u * x >= 0] * x)``.

    Mask and decay use the parameter before the step. The decay uses the base learning rate; ``scale`` (Muon's shape
    factor) multiplies the direction only, and is positive, so that it cannot change the mask. The decay is subtracted.
    torch.optim.AdamW multiplies by ``1 - lr * weight_decay``, which is rounded first; at lr = 1e-5 and
    weight_decay = 0.1 this changes an fp32 decay by up to 3 %. A parameter that is not finite stays not finite.

    Args:
        param: x, mutated; fp32 or fp64 (kernels widen lower precisions).
        direction: u, same shape and dtype, not mutated.
        lr: learning rate, >= 0.
        weight_decay: decoupled decay coefficient, >= 0. At 0 no mask is computed.
        scale: positive factor on the direction.
        cautious: False decays every element (plain decoupled decay).
        mask: see :func:`cautious_mask`.
        sums: if given, four numbers of :func:`sum_dtype` on the parameter's device, to which the result of
            :func:`observed` is added.
    """
    decays = weight_decay != 0
    mask_ = cautious_mask(direction, param, mask=mask) if decays and cautious else None
    if sums is not None:
        sums += observed(param, direction, decays=decays, decayed=mask_)
    if decays:
        rate = decay_rate(lr, weight_decay)
        if mask_ is not None:
            param.addcmul_(mask_, param, value=rate)
        else:
            param.add_(param, alpha=rate)
    param.add_(direction, alpha=-lr * scale)


def observed(param: Tensor, direction: Tensor, *, decays: bool, decayed: Tensor | None) -> Tensor:
    """The sums over elements from which the statistics of a step are computed.

    Args:
        param: x before the step.
        direction: u, without its scale.
        decays: whether the weight decay is not 0.
        decayed: the mask of :func:`cautious_mask`; None if all elements are decayed.

    Returns:
        Four numbers of :func:`sum_dtype`: the number of decayed elements, and the sums of u^2, of x^2, and of x^2 over
        the decayed elements.
    """
    squares, dtype = param.square(), sum_dtype(param.device)
    weight = squares.sum(dtype=dtype)
    if not decays:
        number = among = torch.zeros_like(weight)
    elif decayed is None:
        number, among = torch.full_like(weight, param.numel()), weight
    else:
        number = decayed.sum(dtype=dtype)
        among = squares.masked_fill_(decayed == 0, 0).sum(dtype=dtype)
    return torch.stack([number, direction.square().sum(dtype=dtype), weight, among])


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64 for device types that always support it; Apple's and some of Intel's do not."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32
