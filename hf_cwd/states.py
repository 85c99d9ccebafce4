"""A parameter's state: made at its first gradient, advanced once a step, handed to the kernels as this rank's part."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cwd.kernels.base import Item, Settings
from hf_cwd.rules import RULES
from hf_cwd.rules.base import has_remainder, state_dtype
from hf_cwd.sharding.dtensor import is_dtensor, local, local_grad

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
