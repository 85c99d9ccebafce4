"""Reading a state dict, also torch.optim's or bitsandbytes': names are translated, what lacks or is foreign refused."""

import functools
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd.distributed.dtensor import is_dtensor, local
from hf_cwd.kernels.addresses import is_plain, overlaps_itself
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.optim.original_params import changed
from hf_cwd.optim.state import REMAINDER
from hf_cwd.optim.state import keys as state_keys
from hf_cwd.rules import COMMON, RULES, Rule
from hf_cwd.rules.base import state_dtype

RESET = "on_rule_change=reset"
# Keys of torch.optim's groups that choose an implementation there; ours is the kernel= option.
IMPLEMENTATION_KEYS = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay", "amsgrad")
# Of bitsandbytes' groups, for AdEMAMix; and under what key it has all states of a parameter but the step.
BITSANDBYTES_KEYS = ("alpha", "t_alpha", "t_beta3")
BITSANDBYTES = "__bnb_optimizer_quant_state__"
# timm's Lookahead keeps its slow weights in the state of the optimizer that it wraps.
WRAPPERS = ("lookahead_",)

_logger = logging.getLogger("hf_cwd")


class Overruled(NamedTuple):
    """A hyper-parameter that a state dict has brought, and the value that gave way to it; ``initial_lr`` is ``lr``."""

    algorithm: str
    key: str
    loaded: Any
    given: Any


class _RuleChangeError(ValueError):
    """The saved state is of another rule."""


def adopt(
    state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]], *, on_rule_change: str
) -> tuple[dict[str, Any], str | None]:
    """The state dict as one of an optimizer with ``param_groups``; nothing is mutated.

    Saved hyper-parameters win over present ones, keys that the saved groups lack keep their present value. A state key
    with another name in torch.optim (``momentum_buffer``) or bitsandbytes (``state1``) gets ours, a missing ``step``
    becomes 1. What a wrapper keeps in a parameter's state (Lookahead's slow weights) stays. States that torchao has in
    8 or 4 bits, and others that have a ``dequantize()``, become plain tensors.

    Args:
        on_rule_change: ``"reset"`` takes nothing from a state that does not fit: no state, and present
            hyper-parameters.

    Returns:
        The state dict, and if nothing was taken from the saved one, why.

    Raises:
        ValueError: the state belongs to another rule or another model, is incomplete, or was made by an option not
            supported here.
    """
    try:
        return _adopted(state_dict, param_groups), None
    except ValueError as error:
        if on_rule_change == "reset":
            return {"state": {}, "param_groups": _numbered(param_groups)}, str(error)
        advice = ": continue with the optimizer that saved it" if isinstance(error, _RuleChangeError) else ""
        raise ValueError(
            f"{error}{advice}, or begin with new states by {RESET} (weights, step number and schedule go on)"
        ) from None


def overruled(own: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> list[Overruled]:
    """Which values of an optimizer's groups give way to those of a state dict that it loads."""
    found = []
    for old, new in zip(own, loaded, strict=True):
        rule = RULES[old["algorithm"]]
        # A schedule moves lr, and leaves initial_lr alone.
        for key in ("initial_lr", *COMMON, *rule.hyperparameters):
            if key != "lr" and key in old and key in new and old[key] != new[key]:
                found.append(Overruled(rule.name, "lr" if key == "initial_lr" else key, new[key], old[key]))
    return found


def _adopted(state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not {"state", "param_groups"} <= state_dict.keys():
        raise _RuleChangeError("the saved state is no optimizer's, for it has no parameter groups")
    saved_groups = state_dict["param_groups"]
    state_dict = {**state_dict, "state": {index: _unwrapped(s) for index, s in state_dict["state"].items()}}
    if any(saved.get("amsgrad") for saved in saved_groups):
        raise _RuleChangeError("the saved optimizer used amsgrad=True, which has no counterpart here")
    if change := _change(state_dict, param_groups):
        raise _RuleChangeError(change)
    groups, states = [], dict(state_dict["state"])
    for number, (saved, own) in enumerate(zip(saved_groups, param_groups, strict=True)):
        _check_parameters(number, saved, own)
        algorithm = own["algorithm"]
        if "layout" in saved and _layout(saved) != _layout(own):
            raise ValueError(
                f"the saved optimizer took layout={saved['layout']!r} from parameters that are now routed as "
                f"{own['layout']!r}: continue with the target modules, model and package that saved it"
            )
        kept = {name: value for name, value in saved.items() if name not in IMPLEMENTATION_KEYS + BITSANDBYTES_KEYS}
        group = {name: value for name, value in own.items() if name not in ("params", "param_names")} | kept
        rule = RULES[algorithm]
        groups.append(group | _checked(rule, group))
        names = own.get("param_names") or [f"parameter {index}" for index in saved["params"]]
        for index, p, name in zip(saved["params"], own["params"], names, strict=True):
            if index in states:
                keys, state = state_keys(group, p.dtype), states[index]
                carried = {key: state[key] for key in _carried(state, keys, saved)}
                rest = {key: value for key, value in state.items() if key not in carried}
                states[index] = _adopt_state(rest, rule, keys, name, p) | carried
    return {**state_dict, "state": states, "param_groups": groups}


def _checked(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return rule.checked_hyperparameters(group)
    except ValueError as error:
        raise _RuleChangeError(f"the saved parameter groups are not of rule {rule.name!r}: {error}") from None


def _change(state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]) -> str | None:
    """How the saved state differs from the rules of these groups, if it does. Torch's are known by their states."""
    saved, states = state_dict["param_groups"], state_dict["state"]
    ours, theirs = (_rules(groups) for groups in (param_groups, saved))
    if theirs and [g["algorithm"] for g in saved] != [g["algorithm"] for g in param_groups]:
        return f"the saved state is of rule {theirs}, the optimizer's is {ours}"
    if len(saved) != len(param_groups):
        return f"the saved optimizer has {len(saved)} parameter groups, this one {len(param_groups)} of rule {ours}"
    for old, own in zip(saved, param_groups, strict=True):
        rule = RULES[own["algorithm"]]
        keys = ("step", *rule.state_keys({**own, **old}))
        known = {*keys, REMAINDER, *rule.aliases, *rule.aliases.values()}
        kept = {key for i in old["params"] for key, value in states.get(i, {}).items() if value is not None}
        if foreign := ", ".join(sorted(kept - known - _carried(kept, keys, old))):
            return f"the saved state holds {foreign}, but rule {rule.name!r} keeps {', '.join(keys)}"
        if not kept and old["params"] and rule.hyperparameters and not old.keys() & rule.hyperparameters.keys():
            return f"the saved groups have none of {', '.join(rule.hyperparameters)}, which rule {rule.name!r} takes"
    return None


def _carried(state: Iterable[str], keys: Iterable[str], group: Mapping[str, Any]) -> set[str]:
    """The keys of a saved state that belong to a wrapper, and are carried along.

    An optimizer of this package keeps only its rule's keys, so every other key is a wrapper's; its groups have an
    ``algorithm``. A state of another library may be of another rule: only known wrappers' keys are carried along.
    """
    extra = set(state).difference(keys, ("step", REMAINDER))
    return extra if "algorithm" in group else {key for key in extra if key.startswith(WRAPPERS)}


def _unwrapped(state: Mapping[str, Any]) -> Mapping[str, Any]:
    own = {key: value for key, value in state.items() if key != BITSANDBYTES}
    return own | state.get(BITSANDBYTES, {})


def _rules(groups: Sequence[Mapping[str, Any]]) -> str:
    """Empty where a group says none: it is torch's."""
    named = dict.fromkeys(group.get("algorithm") for group in groups)
    return "" if None in named else " and ".join(map(repr, named))


def _numbered(param_groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Present groups as they stand in a state dict."""
    groups, number = [], 0
    for group in param_groups:
        count = len(group["params"])
        groups.append({**group, "params": list(range(number, number + count))})
        number += count
    return groups


def _check_parameters(number: int, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ValueError if a group does not hold the parameters that it held when it was saved."""
    names, known = (list(map(_plain, group.get("param_names") or [])) for group in (own, saved))
    if names and known and names != known:
        raise ValueError(
            f"parameter group {number} does not hold the parameters that it held when it was saved: "
            f"{changed(known, names)}. Freeze, route and name them as in the run that saved it"
        )
    if len(saved["params"]) != len(own["params"]):
        raise ValueError(
            f"parameter group {number} has {len(own['params'])} parameters, and had {len(saved['params'])} when it was "
            "saved: the model is another, or other parameters of it are frozen. Make it as in the run that saved it"
        )


def _plain(name: str) -> str:
    return name.removeprefix("module.").replace("_orig_mod.", "")


def _layout(group: Mapping[str, Any]) -> MatrixLayout | None:
    return None if group.get("layout") is None else MatrixLayout(**group["layout"])


def _adopt_state(saved: Mapping[str, Any], rule: Rule, keys: tuple[str, ...], name: str, p: Tensor) -> dict[str, Any]:
    state = {rule.aliases.get(key, key): value for key, value in saved.items() if value is not None}
    if not state:
        return {}  # torch.optim.SGD without momentum
    found = ", ".join(state) or "nothing"
    step = state.pop("step", 1.0)
    if set(state) != {key for key in keys if key != REMAINDER or key in state}:
        raise ValueError(
            f"the saved state of {name} holds {found}, but rule {rule.name!r} keeps {', '.join(('step', *keys))}: it "
            "was saved by another optimizer, or is damaged. Continue with the one that saved it"
        )
    for key, value in state.items():
        value = state[key] = _numbers(value, f"the saved {key} of {name}")
        if value.shape != p.shape:
            raise ValueError(
                f"the saved {key} of {name} has shape {tuple(value.shape)}, and the parameter {tuple(p.shape)}: the "
                "model is another (an embedding that was resized?). Make it as in the run that saved it"
            )
    # torch's fused AdamW keeps the step on the parameter's device, old checkpoints keep a plain number.
    state["step"] = torch.as_tensor(step, dtype=torch.float32).cpu()
    return state


def _numbers(value: Any, what: str) -> Tensor:
    """A saved state as a tensor whose numbers lie in its memory.

    Raises:
        ValueError: it is in a format that does not say its numbers.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} is a {type(value).__name__}, and no tensor: it is damaged, or another optimizer's")
    part = local(value)
    if not is_plain(type(part)) or part.is_quantized:
        if type(part).dequantize is Tensor.dequantize and not part.is_quantized:
            raise ValueError(
                f"{what} is a {type(part).__name__}, a kind of tensor that does not say its numbers (it has no "
                "dequantize()). Save the states as plain tensors, or continue with the optimizer that saved them"
            )
        _say_once(f"saved states of type {type(part).__name__} are taken as the numbers that they stand for")
        part = part.dequantize()
    elif part.layout != torch.strided:
        raise ValueError(f"{what} has layout {part.layout}, and a state is dense: save it by to_dense()")
    elif part.is_neg() or part._is_zerotensor() or overlaps_itself(part):
        part = torch.empty(part.shape, dtype=part.dtype, device=part.device).copy_(part)
    else:
        return value
    if not is_dtensor(value):
        return part
    return type(value).from_local(
        part, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)


def restore_dtypes(optimizer: torch.optim.Optimizer, adopted: Mapping[str, Any]) -> None:
    """Takes states again whose dtype is not their parameter's: torch has cast them to that when it loaded them."""
    for saved, group in zip(adopted["param_groups"], optimizer.param_groups, strict=True):
        for index, p in zip(saved["params"], group["params"], strict=True):
            state = adopted["state"].get(index, {})
            for key in state_keys(group, p.dtype):
                if key in state and p.is_floating_point():
                    dtype = p.dtype if key == REMAINDER else state_dtype(group, p.dtype)
                    if dtype != p.dtype:
                        optimizer.state[p][key] = state[key].to(dtype=dtype, device=p.device, copy=True)


def only_initialises(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch.distributed.checkpoint calls step() to have state made, with zero gradients and a zero lr.

    That call must not count as a step: the step number would advance, and if only some ranks have no state yet, these
    would wait for the others for ever. The first step of a warm-up has lr 0 too, and its gradients may be zero. torch
    passes no argument and sets no attribute that tells the two apart, so the caller is read off the stack.
    """
    if optimizer.state or any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back
    return frame is not None
