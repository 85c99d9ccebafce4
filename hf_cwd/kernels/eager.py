"""Any rule, on any device, block by block, so that temporaries stay in cache and need no memory to speak of.

fp32 and fp64 parameters are updated in their own precision. fp16 and bf16 blocks are widened to fp32, updated, and
rounded once, as torch's fused optimizers do: decay and update would otherwise be rounded apart, and a decay of
lr * weight_decay is below bf16's resolution.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cwd import decay
from hf_cwd.rules.base import Rule

# Elements in a block. On a CPU a few fp32 blocks stay in cache and are large enough to be shared among threads;
# elsewhere a launch must be worth its cost, and temporaries of 64 MiB are small beside a model.
BLOCK = 1 << 17
DEVICE_BLOCK = 1 << 24

# oneMKL chooses its square root's implementation in the first call. When several threads make that call together, one
# can get 11 bits for its part (pytorch issue 188792): a resumed run would then leave its twin at the first step. One
# element has one thread.
for _dtype in (torch.float32, torch.float64):
    torch.ones(1, dtype=_dtype).sqrt()


def update(
    rule: Rule,
    param: Tensor,
    grad: Tensor,
    buffers: Sequence[Tensor],
    *,
    step: int,
    maximize: bool,
    hyper: Mapping[str, Any],
    **decaying: Any,
) -> None:
    """One step of an element-wise rule: direction, decay, apply. Mutates ``param`` and ``buffers``.

    Args:
        step: this step's number, from 1.
        maximize: ascend instead of descend.
        hyper: the rule's own hyper-parameters.
        decaying: keyword arguments of :func:`hf_cwd.decay.step_`.
    """
    for g, *block in _blocks(grad, param, *buffers):
        x, *state = wide = _widen(block)
        g = g.to(x.dtype)
        u = rule.direction(-g if maximize else g, *state, step=step, **hyper)
        decay.step_(x, u, **decaying)
        _narrow(wide, block)


def direction(
    rule: Rule, grad: Tensor, buffers: Sequence[Tensor], *, step: int, maximize: bool, hyper: Mapping[str, Any]
) -> Tensor:
    """The direction of a rule before its matrix stage, as a new tensor of the gradient's shape. Mutates ``buffers``."""
    u = torch.empty(grad.shape, dtype=wide(buffers[0].dtype), device=grad.device)
    for out, g, *block in _blocks(u, grad, *buffers):
        state = _widen(block)
        g = g.to(out.dtype)
        out.copy_(rule.direction(-g if maximize else g, *state, step=step, **hyper))
        _narrow(state, block)
    return u


def apply(param: Tensor, direction: Tensor, **decaying: Any) -> None:
    """Decay and apply a direction that is already known. Mutates ``param``."""
    for block, u in _blocks(param, direction):
        (x,) = _widen([block])
        decay.step_(x, u.to(x.dtype), **decaying)
        _narrow([x], [block])


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same stretches of all tensors. Element-wise work does not care about shapes, so blocks are flat."""
    if not all(t.is_contiguous() for t in tensors):
        yield tensors  # rare (channels_last, transposed): one block, whose temporaries are as large as the tensor
        return
    size = BLOCK if tensors[0].device.type == "cpu" else DEVICE_BLOCK
    yield from zip(*(t.view(-1).split(size) for t in tensors), strict=True)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that directions and updates of parameters of ``dtype`` are computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _widen(block: Sequence[Tensor]) -> list[Tensor]:
    """The block in the dtype that it is computed in; a tensor that already has it is passed on, not copied."""
    return [t.to(wide(t.dtype)) for t in block]


def _narrow(wide: Sequence[Tensor], block: Sequence[Tensor]) -> None:
    """Rounds what was computed in a wider copy back into memory."""
    for computed, stored in zip(wide, block, strict=True):
        if computed is not stored:
            stored.copy_(computed)
