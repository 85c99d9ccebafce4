"""What the optimizer refuses, in words: arguments, parameters and gradients that cannot be stepped."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cwd.distributed.dtensor import is_dtensor
from hf_cwd.newton_schulz.matrices import MatrixLayout


def check_layout(layout: Any, name: str, shape: tuple[int, ...]) -> None:
    try:
        MatrixLayout(**layout).check(shape)  # TypeError: no dict, or a key that a MatrixLayout has not
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} does not fit the group's layout={layout!r}: {error}") from None


# Keywords of torch.optim that have no counterpart here, which values of them ask for nothing, and what is here instead.
_NOTHING = (None, False)
_TORCH_ONLY = {
    "fused": (_NOTHING, "the kernel= option chooses the implementation, and 'auto' takes the fastest"),
    "foreach": (_NOTHING, "the kernel= option chooses the implementation, and 'auto' takes the fastest"),
    "differentiable": (_NOTHING, "step() runs without gradients"),
    "amsgrad": (_NOTHING, "the rule keeps no maximum of second moments"),
    "decoupled_weight_decay": ((None, True), "the decay is decoupled always"),
}


def drop_torch_only(options: dict[str, Any]) -> None:
    """Takes torch.optim's own keywords out of an optimizer's or a group's ``options``, where they ask for nothing.

    Raises:
        ValueError: one of them asks for something.
        RuntimeError: two of them that torch.optim refuses together, by this type.
    """
    asked = {}
    for name, (nothing, reason) in _TORCH_ONLY.items():
        value = options.pop(name, None)
        if value not in nothing:
            asked[name] = f"{name}={value!r} is not supported: {reason}. Leave {name} out"
    if "fused" in asked and asked.keys() & {"foreach", "differentiable"}:
        raise RuntimeError("; ".join(asked.values()))
    if asked:
        raise ValueError("; ".join(asked.values()))


def problem(p: Tensor, states: Sequence[tuple[str, Tensor]], *, needs_matrices: bool, has_master: bool) -> str | None:
    """Why a parameter cannot be stepped, if so.

    Args:
        p: a parameter.
        states: the states that it already has and that must have its shape, by name.
        needs_matrices: whether its rule does.
        has_master: whether it is the upper half of an fp32 master.
    """
    if needs_matrices and p.ndim < 2:
        return (
            "was a matrix when the optimizer was made and has been flattened since (FSDP version 1): its rule needs "
            "whole matrices. Use FSDP2 (fully_shard), DeepSpeed's ZeRO, or an element-wise rule such as CWDAdamW"
        )
    grad = p.grad
    if grad is None:
        return None
    if grad.layout != torch.strided or grad.is_nested:
        kind = "nested" if grad.is_nested else "sparse" if "sparse" in str(grad.layout) else str(grad.layout)
        return (
            f"has a {kind} gradient: Cautious Weight Decay needs a dense one, because elements without a gradient are "
            "decayed too. Use sparse=False in nn.Embedding"
        )
    if grad.is_complex():
        return "has a complex gradient: a sign is defined for real numbers only"
    if grad.is_meta:
        return "has a gradient on the meta device, which holds no numbers: materialise the model"
    if is_dtensor(p) != is_dtensor(grad):
        return f"is a {type(p).__name__}, and its gradient a {type(grad).__name__}: both or none must be DTensors"
    others = [("gradient", grad), *states]
    if (reason := resized(p, others)) is not None:
        return reason
    if has_master and any(tensor.is_neg() for tensor in (p, dict(states).get("remainder", p))):
        return "or its remainder has its negative bit set, and its master is made of their bits: use resolve_neg()"
    device = p.device
    elsewhere = next((f"{name} on {tensor.device}" for name, tensor in others if tensor.device != device), None)
    if elsewhere is not None:
        return (
            f"lies on {device}, and its {elsewhere}: move the model before the backward pass, and states with "
            "load_state_dict()"
        )
    return None


def resized(p: Tensor, others: Sequence[tuple[str, Tensor]]) -> str | None:
    """What to do where a parameter's shape is not that of its gradient and states, given by name."""
    shape = p.shape
    for name, tensor in others:
        if tensor.shape != shape:
            return (
                f"has data of shape {tuple(shape)} now, and a {name} of shape {tuple(tensor.shape)}: it was resized "
                "after the optimizer had begun (resize_token_embeddings between two train() calls does that). Make a "
                "new optimizer and schedule after that"
            )
    return None


def check_masters(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where ``master="remainder"`` is asked for and there is nothing to keep a master of.

    Called with the parameters that are given, and before the first step with those that are there then: FSDP2 under
    mixed precision has replaced bfloat16 ones by its own fp32 masters.
    """
    asked = [p for group in groups if group["master"] == "remainder" for p in group["params"]]
    dtypes = {p.dtype for p in asked}
    if torch.float16 in dtypes:
        raise ValueError("master='remainder' keeps fp32 masters of bfloat16 parameters, and some are float16")
    if asked and torch.bfloat16 not in dtypes:
        raise ValueError(
            "master='remainder' keeps what bfloat16 parameters lack of their fp32 masters, and the optimizer's are "
            f"{' and '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}. Autocast, and mixed "
            "precision of FSDP2 or DeepSpeed, give the optimizer fp32 masters already: leave master out there, or load "
            "the model in bfloat16 (from_pretrained(dtype=torch.bfloat16)) without them"
        )
