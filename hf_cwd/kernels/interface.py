"""What a kernel is given: this rank's part of each parameter, and its group's settings, as one row of numbers."""

import struct
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_cwd.decay import decay_rate
from hf_cwd.rules import adamw, lion, muon, sgd
from hf_cwd.rules.base import Rule


class Settings(NamedTuple):
    """A group's settings in one step; ``hyper`` holds the rule's own hyper-parameters as ``(name, value)`` pairs."""

    hyper: tuple[tuple[str, Any], ...]
    lr: float | Tensor  # a tensor on the device with ``capturable`` only
    weight_decay: float
    cautious: bool
    mask: str
    maximize: bool
    kernel: str
    capturable: bool


@dataclass(slots=True)
class Item:
    """One parameter's part on this rank. All tensors have its shape and lie alike in memory.

    Attributes:
        param: x, mutated.
        grad: g; None between steps, where items are kept.
        buffers: the rule's states, mutated, in the order of its ``state_keys``.
        remainder: int16, mutated: what a bfloat16 ``param`` lacks of its fp32 master, see :func:`split`; else None.
        step: this step's number, from 1; with ``capturable`` a float32 tensor on the device.
        settings: those of its group.
        owner: the optimizer's parameter that this is a part of, by which it is named and counted.
    """

    param: Tensor
    grad: Tensor | None
    buffers: tuple[Tensor, ...]
    remainder: Tensor | None
    step: int | Tensor
    settings: Settings
    owner: Tensor


COLUMNS = 4  # of Sums, see hf_cwd.decay.observed


class Call(NamedTuple):
    """What a kernel summed up in one call: for each item a row of float64 ``numbers``, see :class:`Sums`."""

    owners: list[Tensor]
    numels: list[int]
    settings: list[Settings]
    scales: Sequence[float]  # on the directions
    numbers: Tensor


class Sums:
    """Numbers that kernels sum up in the pass that updates parameters, for each item apart.

    Of each item's elements before the step: how many are decayed, and the sums of u^2, of x^2 and of the decayed x^2,
    as :func:`hf_cwd.decay.observed`. That of u^2 is NaN where a rule's state is not finite, of which u says nothing:
    Lion's is a sign, AdamW's is 0 over an infinite v.

    Elements are squared and added in fp32 (fp64 of fp64 parameters) over a block, and blocks in fp64, on the items'
    device: nothing waits for it.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def add(self, items: Sequence[Item], scales: Sequence[float], numbers: Tensor) -> None:
        """Takes one call's numbers, of shape (items, COLUMNS); they may still change until the step is over."""
        # Not the items: their gradients and directions are to be freed.
        owners, numels = [item.owner for item in items], [item.param.numel() for item in items]
        self.calls.append(Call(owners, numels, [item.settings for item in items], scales, numbers))


class Workspace:
    """What kernels keep for one optimizer between its steps.

    Attributes:
        tables: of the Triton kernels, on the device: by operation, rule and device.
    """

    def __init__(self) -> None:
        self.tables: dict[Hashable, Any] = {}


class Kernel(Protocol):
    """The operations over lists of items.

    A kernel other than ``eager`` only gets tensors whose memory it may access directly, see
    :mod:`hf_cwd.kernels.addresses`. The tensors of an item have equally many elements.
    """

    def refusal(self, rule: Rule, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """Why it cannot run a rule on (param, grad, states); None if it can."""

    def refusal_to_apply(self, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """Why it cannot decay and apply with (param, direction); None if it can."""

    def update(self, rule: Rule, items: Sequence[Item], sums: Sums | None, workspace: Workspace, last: Any) -> Any:
        """One step of an element-wise rule: direction, decay, apply.

        Returns what spares work at the next step of these items; it is given as ``last`` then, and only then. At their
        first step ``last`` is None. At later steps only three things can differ: the addresses of gradients, the
        settings, and the step numbers. Items that shared settings and a step number still share them.
        """

    def directions(self, rule: Rule, items: Sequence[Item], outs: Sequence[Tensor], workspace: Workspace) -> None:
        """Writes the directions before the matrix stage to ``outs``, which are contiguous; mutates the buffers."""

    def apply(
        self,
        items: Sequence[Item],
        directions: Sequence[Tensor],
        scales: Sequence[float],
        sums: Sums | None,
        workspace: Workspace,
    ) -> None:
        """Decays, and applies the given directions. ``grad`` and ``buffers`` of the items are not read."""


class Row(NamedTuple):
    """The numbers that a fused kernel reads, all float32: computed in double precision here, and rounded once.

    A lerp from s to e is ``fma(w, e - s, s)`` for a weight w < 1/2, else ``fma(w - 1, e - s, e)``, where w is rounded
    first, as torch's; ``*_weight`` is w or w - 1, ``*_far`` is 1 in the second case. What a rule does not use is 0.

    Attributes:
        grad_scale: multiplies the gradient first.
        first_weight, first_far: lerp of the momentum m to g (of Lion's direction for Lion).
        second_weight, second_far: Lion: lerp of m to g; momentum rules: Nesterov's lerp of g to m (``ema``).
        keep: AdamW: b2; SGD: momentum.
        take: AdamW: 1 - b2; SGD: 1 - dampening.
        root_scale: AdamW: 1 / sqrt(1 - b2^t).
        eps: AdamW's.
        direction_scale: AdamW: 1 / (1 - b1^t).
        opposed, aligned, neither: coefficient of x where u*x < 0, > 0, neither: :func:`hf_cwd.decay.decay_rate`, or -0.
        decays: 0 with weight_decay 0: the decay is left out, not computed with 0.
        rate: coefficient of u: -lr * scale.
        form: momentum rules: 0 none, 1 first step, 2 SGD's, 3 moving average; + 4 with Nesterov.
    """

    grad_scale: float = 1.0
    first_weight: float = 0.0
    first_far: float = 0.0
    second_weight: float = 0.0
    second_far: float = 0.0
    keep: float = 0.0
    take: float = 0.0
    root_scale: float = 0.0
    eps: float = 0.0
    direction_scale: float = 0.0
    opposed: float = 0.0
    aligned: float = 0.0
    neither: float = 0.0
    decays: float = 0.0
    rate: float = 0.0
    form: float = 0.0


def _lerp(weight: float) -> tuple[float, float]:
    (weight,) = struct.unpack("f", struct.pack("f", weight))
    return (weight, 0.0) if weight < 0.5 else (weight - 1, 1.0)


def _adamw(step: int, betas: tuple[float, float], eps: float) -> dict[str, float]:
    beta1, beta2 = betas
    weight, far = _lerp(1 - beta1)
    return {
        "first_weight": weight,
        "first_far": far,
        "keep": beta2,
        "take": 1 - beta2,
        "root_scale": (1 - beta2**step) ** -0.5,
        "eps": eps,
        "direction_scale": 1 / (1 - beta1**step),
    }


def _lion(step: int, betas: tuple[float, float]) -> dict[str, float]:
    (first, first_far), (second, second_far) = (_lerp(1 - beta) for beta in betas)
    return {"first_weight": first, "first_far": first_far, "second_weight": second, "second_far": second_far}


def _moving_average(momentum: float, nesterov: bool) -> dict[str, float]:
    (first, first_far), (second, second_far) = _lerp(1 - momentum), _lerp(momentum)
    return {
        "first_weight": first,
        "first_far": first_far,
        "second_weight": second,
        "second_far": second_far,
        "form": 3.0 + 4.0 * nesterov,
    }


def _sgd(step: int, momentum: float, dampening: float, nesterov: bool, ema: bool) -> dict[str, float]:
    if momentum and ema:
        return _moving_average(momentum, nesterov)
    form = 0.0 if not momentum else (1.0 if step == 1 else 2.0) + 4.0 * nesterov
    return {"keep": momentum, "take": 1 - dampening, "form": form}


def _muon(step: int, momentum: float, nesterov: bool, **_: Any) -> dict[str, float]:
    return _moving_average(momentum, nesterov)


# By the function itself: a rule that somebody replaced by another one of the same name is not this one.
FUSED: dict[Callable[..., Tensor], Callable[..., dict[str, float]]] = {
    adamw.direction: _adamw,
    lion.direction: _lion,
    sgd.direction: _sgd,
    muon.direction: _muon,
}


def _decay(lr: float, weight_decay: float, cautious: bool, mask: str) -> dict[str, float]:
    if weight_decay == 0:
        return {}
    on, off = decay_rate(lr, weight_decay), -0.0
    table = {"ge": (off, on, on), "gt": (off, on, off)}
    opposed, aligned, neither = table[mask] if cautious else (on, on, on)
    return {"opposed": opposed, "aligned": aligned, "neither": neither, "decays": 1.0}


RowOf = Callable[[Settings, int, float], Row]  # by settings, number of the step, and scale on the direction


def row_of(rule: Rule) -> RowOf:
    """The rows of a rule: direction, decay and apply. Its directions have no scale here."""
    return lambda settings, step, scale: row(rule, settings, step)


def row(rule: Rule, settings: Settings, step: int) -> Row:
    """The row of a group in a step: the direction, decay and apply."""
    return Row(
        grad_scale=-1.0 if settings.maximize else 1.0,
        rate=-settings.lr,
        **FUSED[rule.direction](step, **dict(settings.hyper)),
        **_decay(settings.lr, settings.weight_decay, settings.cautious, settings.mask),
    )


def apply_row(settings: Settings, step: int, scale: float) -> Row:
    """The row of a group whose directions are given: decay and apply, with ``scale`` on the direction, in any step."""
    return Row(
        rate=-settings.lr * scale,
        **_decay(settings.lr, settings.weight_decay, settings.cautious, settings.mask),
    )


def split(wide: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Stores an fp32 master as its upper 16 bits, rounded half up in magnitude, and what is then missing of it.

    ``master = (bits(param) << 16) + remainder`` as int32, exactly. A NaN becomes the standard one, with remainder 0.

    Args:
        wide: the fp32 master, overwritten.
        param: bfloat16, gets the upper half.
        remainder: int16, gets the difference.
    """
    wide.masked_fill_(wide.isnan(), float("nan"))  # a payload's carry could reach the sign
    bits = wide.view(torch.int32)
    upper = bits.add(0x8000).bitwise_right_shift_(16)
    param.view(torch.int16).copy_(upper)
    remainder.copy_(bits.sub_(upper.bitwise_left_shift_(16)))


def joined(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master of :func:`split`, a new tensor."""
    upper = param.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return upper.add_(remainder).view(torch.float32)
