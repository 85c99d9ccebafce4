"""Cautious Weight Decay: the definition, written once (arXiv 2510.12402).

    x <- x - lr * (scale * u + weight_decay * 1[u * x >= 0] * x)

Rules compute the direction ``u``; kernels call :func:`step_` on the blocks of memory they walk over. Nothing else in
the package decides what is decayed.
"""

import torch
from torch import Tensor

MASKS = ("ge", "gt")


def cautious_mask(direction: Tensor, param: Tensor, *, mask: str = "ge") -> Tensor:
    """Where the decay would push a parameter the same way as the update: ``1[u * x >= 0]``.

    Signs are multiplied, never the values: their product underflows to 0 in low precision and would then read as
    agreement. ``-0.0`` and NaN count as zero.

    Args:
        direction: the update direction u that is about to be applied (``x <- x - lr * u``), any shape.
        param: the parameter x before the step, same shape and dtype.
        mask: ``"ge"`` counts ``u = 0`` and ``x = 0`` as agreement (the paper's definition), ``"gt"`` does not.

    Returns:
        A new tensor of the same shape and dtype: 1 where the element is to be decayed, 0 elsewhere.

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
        return agreement.ge_(0)  # in place: a comparison into bool costs ten times as much on a CPU
    if mask == "gt":
        return agreement.gt_(0)
    raise ValueError(f"mask={mask!r} is unknown: use 'ge' (the paper's u*x >= 0) or 'gt' (u*x > 0)")


def decay_rate(lr: float, weight_decay: float) -> float:
    """The coefficient of x where it is decayed, ``-lr * weight_decay``.

    A warm-up begins with lr = 0: the coefficient is then a number too small to change any x, so that -0 tells an
    element that is left alone from one that is decayed, and counted, at every learning rate.
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

    The mask and the decay see the parameter before the step. The decay uses the base learning rate; ``scale`` (Muon's
    shape factor, positive, so that it cannot change the mask) multiplies the direction only. The decay is subtracted:
    the factor ``1 - lr * weight_decay`` that torch.optim.AdamW multiplies by is rounded first, which at lr = 1e-5 and
    weight_decay = 0.1 changes an fp32 decay by up to 3 %. A parameter that is not finite stays not finite.

    Args:
        param: x, mutated; fp32 or fp64 (kernels widen lower precisions).
        direction: u, same shape and dtype, not mutated.
        lr: learning rate, >= 0.
        weight_decay: decoupled decay coefficient, >= 0; the mask is not even computed at 0.
        scale: positive factor on the direction.
        cautious: False decays every element (plain decoupled decay), by the same code.
        mask: see :func:`cautious_mask`.
        sums: four numbers of :func:`sum_dtype`, on the parameter's device, to which :func:`observed` is added, when
            given.
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
    """What a step sums up of the elements it sees: the number decayed, and of x and u before the step.

    Args:
        param: x.
        direction: u, without its scale.
        decays: whether there is a weight decay.
        decayed: the mask of :func:`cautious_mask`; None where all elements are decayed.

    Returns:
        Four numbers of :func:`sum_dtype`: decayed elements, the sum of u^2, of x^2, and of the decayed x^2.
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
    """What sums are added up in: float64 where all devices of the kind have it; Apple's and some of Intel's do not."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32
