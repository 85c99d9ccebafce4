"""A parameter's state: made at its first gradient, advanced once a step, handed to the kernels as this rank's part."""

from collections.abc import Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from hf_cwd.kernels.base import Item, Settings
from hf_cwd.rules import RULES
from hf_cwd.rules.base import has_remainder, state_dtype
from hf_cwd.sharding.dtensor import is_dtensor, local, local_grad
from hf_cwd.sharding.zero import pick

REMAINDER = "remainder"


def settings(group: Mapping[str, Any]) -> Settings:
    """What the kernels are told of a group in this step. Reading a learning rate off a device waits for it."""
    lr = group["lr"]
    return Settings(
        hyper=tuple((name, group[name]) for name in RULES[group["algorithm"]].hyperparameters),
        lr=lr if group["capturable"] and isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr),
        **{name: group[name] for name in Settings._fields if name not in ("hyper", "lr")},
    )


def make(state: MutableMapping[str, Tensor], p: Tensor, group: Mapping[str, Any]) -> None:
    """Makes what is missing of a parameter's state, cut as the parameter is.

    ``remainder`` holds 16 bits an element as a bfloat16 tensor, for neither NCCL nor gloo carries int16; as a number it
    means nothing.
    """
    if "step" not in state:
        # A float32 tensor on the CPU, as in torch.optim.
        state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")
    for key in keys(group, p.dtype):
        if key not in state:
            dtype = p.dtype if key == REMAINDER else state_dtype(group, p.dtype)
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def keys(group: Mapping[str, Any], param: torch.dtype) -> tuple[str, ...]:
    """The names of all states of a parameter of dtype ``param``, beside ``step``."""
    own = RULES[group["algorithm"]].state_keys(group)
    return (*own, REMAINDER) if has_remainder(group, param) else own


def advance(
    states: Mapping[Tensor, MutableMapping[str, Tensor]],
    params: Sequence[Tensor],
    group: Mapping[str, Any],
    given: Settings,
) -> list[Item]:
    """Counts a step of parameters of a group, and gives this rank's parts. Without a gradient it counts as zero.

    A model has hundreds of parameters: what is done for each of them here is part of every step's time.
    """
    own = RULES[group["algorithm"]].state_keys(group)
    asked = group["master"] != "none"
    items, steps = [], []
    for p in params:
        state = states[p]
        remains = asked and has_remainder(group, p.dtype)
        if len(state) <= len(own) + remains:
            make(state, p, group)
        param, grad, buffers, step = p, p.grad, tuple([state[key] for key in own]), state["step"]
        remainder = state[REMAINDER] if remains else None
        if is_dtensor(p):
            param, buffers = local(p), tuple(map(local, buffers))
            grad, remainder = None if grad is None else local_grad(p), local(remainder) if remains else None
        if grad is None:
            grad = torch.zeros_like(param)
        if remains:
            remainder = remainder.view(torch.int16)
        number = step if given.capturable else int(step.item()) + 1
        items.append(Item(param, grad, buffers, remainder, number, given))
        steps.append(step)
    if steps:
        # On a CPU this is a loop, which would make a tensor of a plain 1 again and again.
        torch._foreach_add_(steps, torch.ones((), device=steps[0].device), alpha=1)
    return items


def pieces(item: Item, extents: Sequence[tuple[int, int]]) -> list[Item]:
    """The parts of a flat tensor's item, by offset and length."""
    param, grad, remainder, *buffers = (
        [None] * len(extents) if tensor is None else pick(tensor, extents)
        for tensor in (item.param, item.grad, item.remainder, *item.buffers)
    )
    buffers = zip(*buffers, strict=True) if buffers else [()] * len(extents)
    return [Item(*tensors, item.step, item.settings) for tensors in zip(param, grad, buffers, remainder, strict=True)]


class Steady:
    """The items of an optimizer's last step, given out again while only gradients, steps and settings change.

    To look at every tensor of a few hundred parameters anew takes longer than a GPU needs for the step. What is
    compared instead: the parameters are the same and all have gradients, of the same dtypes; parameters and states lie
    where they lay; nobody else has counted.

    Args:
        states: the optimizer's.
        groups: parameter groups.
        params: for each group its parameters with a gradient.
        items: of all of them, in order, just advanced.
    """

    def __init__(
        self,
        states: Mapping[Tensor, MutableMapping[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
        params: Sequence[Sequence[Tensor]],
        items: Sequence[Item],
    ) -> None:
        self.items = list(items)
        self._params = [p for some in params for p in some]
        self._own, self._all = [states[p] for p in self._params], list(states.values())
        self._keys = [keys(group, p.dtype) for group, some in zip(groups, params, strict=True) for p in some]
        self._kind, self._dtypes, self._lying = _kind(groups, params), [i.grad.dtype for i in items], self._addresses()
        # The counts of all parameters as one tensor, of which each has an element: one operation counts a step.
        self._count = torch.stack([state["step"] for state in self._own])
        self._steps = list(self._count.unbind())
        for state, step in zip(self._own, self._steps, strict=True):
            state["step"] = step
        self._on_device = items[0].settings.capturable
        self._numbers = [] if self._on_device else self._count.tolist()

    @staticmethod
    def takes(params: Sequence[Sequence[Tensor]]) -> bool:
        """Not DTensors, whose parts are other tensors in each step; and not nothing."""
        return any(params) and not any(is_dtensor(p) for some in params for p in some)

    def advance(
        self,
        states: Mapping[Tensor, MutableMapping[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
        params: Sequence[Sequence[Tensor]],
        given: Sequence[Settings],
    ) -> bool:
        """Counts a step and brings the items up to date; False, and nothing is done, where they do not fit."""
        found = [p for some in params for p in some]
        gradients = [p.grad for p in found]
        fits = (
            _kind(groups, params) == self._kind
            and all(map(is_, found, self._params))
            and len(states) == len(self._all)
            and all(map(is_, states.values(), self._all))
            and all(map(is_, [state.get("step") for state in self._own], self._steps))
            and self._addresses() == self._lying
            and [g.dtype for g in gradients] == self._dtypes
            and all(map(Tensor.is_contiguous, gradients))
            and (self._on_device or self._count.tolist() == self._numbers)
        )
        if not fits:
            return False
        self._count.add_(1)
        self._numbers = [] if self._on_device else self._count.tolist()
        steps = self._steps if self._on_device else map(int, self._numbers)
        each = [now for now, some in zip(given, params, strict=True) for _ in some]
        for item, grad, step, now in zip(self.items, gradients, steps, each, strict=True):
            item.grad, item.step, item.settings = grad, step, now
        return True

    def _addresses(self) -> list[int]:
        tensors = [state.get(key) for state, names in zip(self._own, self._keys, strict=True) for key in names]
        return [-1 if t is None else t.data_ptr() for t in (*self._params, *tensors)]


def _kind(groups: Sequence[Mapping[str, Any]], params: Sequence[Sequence[Tensor]]) -> list[tuple[Any, ...]]:
    """What of groups decides which kernels and states there are."""
    names = ("algorithm", "kernel", "capturable", "master", "state_dtype")
    states = [RULES[group["algorithm"]].state_keys(group) for group in groups]
    return [
        (len(some), own, *[group[name] for name in names])
        for group, some, own in zip(groups, params, states, strict=True)
    ]
