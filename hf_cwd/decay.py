"""Cautious Weight Decay: the definition, written once (arXiv 2510.12402).

    x <- x - lr * (scale * u + weight_decay * 1[u * x >= 0] * x)

Rules compute the direction ``u``; kernels call :func:`step_` on the blocks of memory they walk over. Nothing else in
the package decides what is decayed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MASKS = ("ge", "gt")


@dataclass
class DecayCount:
    """How many elements were decayed, of those that a non-zero weight decay could have decayed.

    Put a fresh one into ``CWDOptimizer.decay_count`` before a step and read it afterwards. ``decayed`` is a tensor
    until it is read, so that counting does not synchronise a device.
    """

    decayed: int | Tensor = 0
    total: int = 0

    def add(self, decayed: Tensor | None, numel: int) -> None:
        """Counts a block of ``numel`` elements; ``decayed`` is its mask, None where all of them were decayed."""
        self.decayed = self.decayed + (numel if decayed is None else decayed.count_nonzero())
        self.total += numel

    @property
    def fraction(self) -> float | None:
        """The paper's mask ratio in [0, 1]; None when nothing could be decayed."""
        return float(self.decayed) / self.total if self.total else None


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
    count: DecayCount | None = None,
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
        count: receives the number of decayed elements, when given.
    """
    if weight_decay != 0:
        rate = decay_rate(lr, weight_decay)
        if cautious:
            decayed = cautious_mask(direction, param, mask=mask)
            param.addcmul_(decayed, param, value=rate)
        else:
            decayed = None
            param.add_(param, alpha=rate)
        if count is not None:
            count.add(decayed, param.numel())
    param.add_(direction, alpha=-lr * scale)
