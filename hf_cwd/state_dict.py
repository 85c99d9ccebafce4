"""Reading a state dict that may come from torch.optim: names are translated, what is missing or foreign is refused."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_cwd.matrices import Layout
from hf_cwd.rules import RULES, Rule
from hf_cwd.rules.base import state_dtype
from hf_cwd.states import REMAINDER
from hf_cwd.states import keys as state_keys

# Keys of torch.optim's groups that choose an implementation there; ours is the kernel= option.
IMPLEMENTATION_KEYS = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay", "amsgrad")


def adopt(state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state dict as one of an optimizer with ``param_groups``; nothing is mutated.

    Saved hyper-parameters win over present ones, keys that the saved groups lack keep their present value. A state key
    with another name in torch.optim (``momentum_buffer``) gets ours, a missing ``step`` becomes 1.

    Raises:
        ValueError: the state belongs to another rule, is incomplete, or was made by an option not supported here.
    """
    saved_groups = state_dict["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in param_groups]:
        return dict(state_dict)  # torch.optim.Optimizer.load_state_dict refuses it, in its own words
    groups, states = [], dict(state_dict["state"])
    for saved, own in zip(saved_groups, param_groups, strict=True):
        algorithm = own["algorithm"]
        if saved.get("algorithm", algorithm) != algorithm:
            raise ValueError(
                f"the saved state is of rule {saved['algorithm']!r}, the optimizer's is {algorithm!r}: "
                "continue with the optimizer that saved it"
            )
        if "layout" in saved and _layout(saved) != _layout(own):
            raise ValueError(
                f"the saved optimizer took layout={saved['layout']!r} from parameters that are now routed as "
                f"{own['layout']!r}: continue with the --optim_target_modules, model and package that saved it"
            )
        if saved.get("amsgrad"):
            raise ValueError("the saved optimizer used amsgrad=True, which has no counterpart here")
        kept = {name: value for name, value in saved.items() if name not in IMPLEMENTATION_KEYS}
        group = {name: value for name, value in own.items() if name not in ("params", "param_names")} | kept
        rule = RULES[algorithm]
        groups.append(group | rule.checked_hyperparameters(group))
        for index, p in zip(saved["params"], own["params"], strict=True):
            if index in states:
                states[index] = _adopt_state(states[index], rule, state_keys(group, p.dtype), index)
    return {**state_dict, "state": states, "param_groups": groups}


def _layout(group: Mapping[str, Any]) -> Layout | None:
    return None if group.get("layout") is None else Layout(**group["layout"])


def _adopt_state(saved: Mapping[str, Any], rule: Rule, keys: tuple[str, ...], index: int) -> dict[str, Any]:
    state = {rule.aliases.get(key, key): value for key, value in saved.items() if value is not None}
    if not state:
        return {}  # torch.optim.SGD without momentum
    found = ", ".join(state) or "nothing"
    step = state.pop("step", 1.0)
    if set(state) != {key for key in keys if key != REMAINDER or key in state}:
        raise ValueError(
            f"the saved state of parameter {index} holds {found}, but rule {rule.name!r} keeps "
            f"{', '.join(('step', *keys))}: it was saved by another optimizer. Continue with that one, or start afresh"
        )
    # torch's fused AdamW keeps the step on the parameter's device, old checkpoints keep a plain number.
    state["step"] = torch.as_tensor(step, dtype=torch.float32).cpu()
    return state


def restore_dtypes(optimizer: torch.optim.Optimizer, adopted: Mapping[str, Any]) -> None:
    """Takes states again whose dtype is not their parameter's: torch has cast them to that when it loaded them."""
    for saved, group in zip(adopted["param_groups"], optimizer.param_groups, strict=True):
        for index, p in zip(saved["params"], group["params"], strict=True):
            for key, value in adopted["state"].get(index, {}).items():
                if key != "step" and p.is_floating_point():
                    dtype = p.dtype if key == REMAINDER else state_dtype(group, p.dtype)
                    if dtype != p.dtype:
                        optimizer.state[p][key] = value.to(dtype=dtype, device=p.device, copy=True)


def only_initialises(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch.distributed.checkpoint calls step() to have state made, with zero gradients and a zero lr.

    It must not be taken for a step: the count would advance, and where only some ranks have no state yet, only those
    would wait for the others. The first step of a warm-up has lr 0 too: what tells them apart is the caller.
    """
    if optimizer.state or any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back
    return frame is not None
