"""A parameter's state: made at its first gradient, advanced once a step, handed to the kernels as this rank's part."""

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd.kernels.base import Item, Settings
from hf_cwd.rules import RULES
from hf_cwd.rules.base import has_remainder, state_dtype
from hf_cwd.sharding.dtensor import local, local_grad

REMAINDER = "remainder"


class Stepped(NamedTuple):
    """A parameter that is stepped, its group, and the group's settings in this step."""

    param: Tensor
    group: Mapping[str, Any]
    settings: Settings


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


def advance(states: Mapping[Tensor, MutableMapping[str, Tensor]], stepped: Iterable[Stepped]) -> list[Item]:
    """Counts a step of each parameter, and gives this rank's parts. Without a gradient it counts as zero."""
    stepped = list(stepped)
    for p, group, _ in stepped:
        if len(states[p]) <= len(keys(group, p.dtype)):
            make(states[p], p, group)
    if stepped:
        torch._foreach_add_([states[p]["step"] for p, _, _ in stepped], 1)  # one call: 300 tensors in 0.1 ms
    return [_item(p, states[p], group, given) for p, group, given in stepped]


def _item(p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], given: Settings) -> Item:
    param, step = local(p), state["step"]
    return Item(
        param=param,
        grad=torch.zeros_like(param) if p.grad is None else local_grad(p),
        buffers=tuple(local(state[key]) for key in RULES[group["algorithm"]].state_keys(group)),
        remainder=local(state[REMAINDER]).view(torch.int16) if has_remainder(group, p.dtype) else None,
        step=step if given.capturable else int(step),
        settings=given,
    )
