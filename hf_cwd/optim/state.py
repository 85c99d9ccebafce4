"""A parameter's state: made at its first gradient, advanced once a step, handed to the kernels as this rank's part."""

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from hf_cwd.distributed.local_view import LocalView
from hf_cwd.kernels import Call, can_be_kept
from hf_cwd.kernels.addresses import are_plain
from hf_cwd.kernels.interface import Item, Settings
from hf_cwd.rules import RULES
from hf_cwd.rules.base import has_remainder, state_dtype

REMAINDER = "remainder"

_SHAPE, _DTYPE, _NBYTES = attrgetter("shape"), attrgetter("dtype"), attrgetter("nbytes")


def settings(group: Mapping[str, Any]) -> Settings:
    """The settings of a group in this step, for the kernels. Reading a learning rate on a device waits for it."""
    lr = group["lr"]
    return Settings(
        hyper=tuple((name, group[name]) for name in RULES[group["algorithm"]].hyperparameters),
        lr=lr if group["capturable"] and isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr),
        weight_decay=group["weight_decay"],
        cautious=group["cautious"],
        mask=group["mask"],
        maximize=group["maximize"],
        kernel=group["kernel"],
        capturable=group["capturable"],
    )


def make(state: MutableMapping[str, Tensor], p: Tensor, group: Mapping[str, Any]) -> None:
    """Makes the states that a parameter does not have yet, sharded as the parameter is.

    ``remainder`` holds 16 bits an element as a bfloat16 tensor, since neither NCCL nor gloo supports int16. As numbers
    its values mean nothing.
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


def held(
    states: Mapping[Tensor, Mapping[str, Tensor]], p: Tensor, group: Mapping[str, Any]
) -> list[tuple[str, Tensor]]:
    """The states that a parameter already has and that must have its shape, by name."""
    state = states.get(p, {})
    return [(key, state[key]) for key in keys(group, p.dtype) if key in state]


def advance(
    states: Mapping[Tensor, MutableMapping[str, Tensor]],
    views: Sequence[LocalView],
    group: Mapping[str, Any],
    given: Settings,
) -> list[Item]:
    """Counts a step of tensors of a group, and returns this rank's parts. A missing gradient counts as zero.

    This loop runs in every step for hundreds of parameters: keep it short.
    """
    own = RULES[group["algorithm"]].state_keys(group)
    asked = group["master"] != "none"
    needed = {False: {"step", *own}, True: {"step", *own, REMAINDER}}
    items, steps = [], []
    for view in views:
        p, local = view.param, view.local
        state = states[p]
        remains = asked and has_remainder(group, p.dtype)
        if not state.keys() >= needed[remains]:
            make(state, p, group)
        param, grad, step = local(p), view.local_grad(), state["step"]
        buffers = tuple([local(state[key]) for key in own])
        if grad is None:
            grad = torch.zeros_like(param)
        remainder = local(state[REMAINDER]).view(torch.int16) if remains else None
        number = step if given.capturable else int(step.item()) + 1
        items.append(Item(param, grad, buffers, remainder, number, given, p))
        steps.append(step)
    if steps:
        # On a CPU this is a loop, which would make a tensor of a plain 1 again and again.
        torch._foreach_add_(steps, 1.0 if given.capturable else torch.ones(()))
    return items


def pieces(item: Item, cut: Callable[[Tensor], list[Tensor]]) -> list[Item]:
    """The pieces of a flat tensor's item.

    Args:
        cut: :meth:`~hf_cwd.distributed.local_view.LocalView.split` or ``stretches`` of its view.
    """
    param, grad, *buffers = (cut(tensor) for tensor in (item.param, item.grad, *item.buffers))
    remainder = [None] * len(param) if item.remainder is None else cut(item.remainder)
    buffers = zip(*buffers, strict=True) if buffers else [()] * len(param)
    parts = zip(param, grad, buffers, remainder, strict=True)
    return [Item(*tensors, item.step, item.settings, item.owner) for tensors in parts]


class Kept:
    """An optimizer's calls of kernels, taken again in the next step if only gradients, steps and settings change.

    Checking every tensor of a few hundred parameters takes longer than a GPU needs for the step. This class alone
    decides whether anything else has changed. The items, what the kernels computed for them, and the permission to use
    their addresses are reused only if it says so. It compares: parameters, states and step counts are the same objects
    at the same addresses, and parameters have the same shapes, contiguity and dtypes. Gradients are new tensors in
    each step, and are checked as in the first one.

    Args:
        states: the optimizer's.
        groups: parameter groups.
        params: for each group its parameters with a gradient; none is a DTensor, whose parts are new in each step.
        items: of all of them, in order, just advanced.
        calls: of the kernels, with the very items.
    """

    def __init__(
        self,
        states: Mapping[Tensor, MutableMapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        params: Sequence[Sequence[Tensor]],
        items: Sequence[Item],
        calls: Sequence[Call],
    ) -> None:
        self.items, self.calls = list(items), calls
        self._params = [p for some in params for p in some]
        self._own, self._all = [states[p] for p in self._params], list(states.values())
        # The counts of all parameters as one tensor, of which each has an element: one operation counts a step.
        self._count = torch.stack([state["step"] for state in self._own])
        self._steps = list(self._count.unbind())
        for state, step in zip(self._own, self._steps, strict=True):
            state["step"] = step
        names = [keys(group, p.dtype) for group, some in zip(groups, params, strict=True) for p in some]
        self._buffers = [state[key] for state, own in zip(self._own, names, strict=True) for key in own]
        self._values, self._signature = self._state_values(), _signature(groups, params)
        self._lying = self._places()
        self._gradients = [item.grad.dtype for item in items], [item.grad.nbytes for item in items]
        self._on_device = items[0].settings.capturable
        self._numbers = [] if self._on_device else self._count.tolist()

    @classmethod
    def of(
        cls,
        states: Mapping[Tensor, MutableMapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        params: Sequence[Sequence[Tensor]],
        items: Sequence[Item],
        calls: Sequence[Call],
    ) -> "Kept | None":
        """What a step may keep, or None: every item must be a whole parameter that its kernel steps as it is."""
        whole = bool(items) and all(item.param is item.owner for item in items)
        return cls(states, groups, params, items, calls) if whole and can_be_kept(calls, items) else None

    def takes(
        self,
        states: Mapping[Tensor, MutableMapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        params: Sequence[Sequence[Tensor]],
    ) -> bool:
        """Whether the calls may be taken again for these parameters, which are those with a gradient."""
        flat = [p for some in params for p in some]
        gradients = [p.grad for p in flat]
        return (
            _signature(groups, params) == self._signature
            and _are_same(flat, self._params)
            and _are_same(states.values(), self._all)
            and _are_same(self._state_values(), self._values)
            and self._places() == self._lying
            and (list(map(_DTYPE, gradients)), list(map(_NBYTES, gradients))) == self._gradients
            and are_plain(gradients)
            and (self._on_device or self._count.tolist() == self._numbers)
        )

    def advance(self, given: Sequence[Settings], params: Sequence[Sequence[Tensor]]) -> None:
        """Counts a step, and gives the items its number, settings and gradients."""
        self._count.add_(1)
        self._numbers = [] if self._on_device else self._count.tolist()
        steps = self._steps if self._on_device else map(int, self._numbers)
        each = [now for now, some in zip(given, params, strict=True) for _ in some]
        for item, step, now in zip(self.items, steps, each, strict=True):
            item.grad, item.step, item.settings = item.param.grad, step, now

    def _state_values(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._own)))

    def _places(self) -> tuple[list[Any], ...]:
        """Where parameters and states lie, and how. A storage that is made smaller moves.

        A parameter's dtype is that of its gradient.
        """
        params, tensors = self._params, self._params + self._buffers
        looks = (_SHAPE, Tensor.is_contiguous, Tensor.is_neg)
        return (
            list(map(Tensor.data_ptr, tensors)),
            list(map(_NBYTES, self._buffers)),
            *(list(map(look, params)) for look in looks),
        )


def _are_same(some: Collection[Any], others: Collection[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _signature(groups: Sequence[Mapping[str, Any]], params: Sequence[Sequence[Tensor]]) -> list[tuple[Any, ...]]:
    """What of groups decides which kernels and states there are."""
    names = ("algorithm", "kernel", "capturable", "master", "state_dtype")
    states = [RULES[group["algorithm"]].state_keys(group) for group in groups]
    return [
        (len(some), own, *[group[name] for name in names])
        for group, some, own in zip(groups, params, states, strict=True)
    ]
