"""Any rule, on any device, block by block, so that temporaries stay in cache and need no memory to speak of.

fp32 and fp64 parameters are updated in their own precision. fp16 and bf16 blocks are widened to fp32, updated, and
rounded once, as torch's fused optimizers do: decay and update would otherwise be rounded apart, and a decay of
lr * weight_decay is below bf16's resolution.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cwd import decay
from hf_cwd.kernels.addresses import are_plain
from hf_cwd.kernels.interface import COLUMNS, Item, Sums, Workspace, joined, split
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


def refusal(rule: Rule, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """None: it takes everything."""
    del rule, dtypes
    return None


def refusal_to_apply(dtypes: tuple[torch.dtype, ...]) -> str | None:
    """None: it takes everything."""
    del dtypes
    return None


def update(rule: Rule, items: Sequence[Item], sums: Sums | None, workspace: Workspace, last: None) -> None:
    """One step of an element-wise rule, see :class:`hf_cwd.kernels.interface.Kernel`."""
    del workspace, last
    for item in items:
        decaying = _decaying(item, sums)
        for g, x, remainder, *block in _blocks(item.grad, item.param, item.remainder, *item.buffers):
            number = wide(x.dtype)
            state = [t.to(number) for t in block]
            u = _direction(rule, item, g.to(number), state)
            if sums is not None:
                decaying["sums"][1] += sum((t - t).sum() for t in state)  # NaN where a state is not finite
            _narrow(state, block)
            _step(x, u, remainder, **decaying)


def directions(rule: Rule, items: Sequence[Item], outs: Sequence[Tensor], workspace: Workspace) -> None:
    """The directions before the matrix stage, see :class:`hf_cwd.kernels.interface.Kernel`."""
    del workspace
    for item, u in zip(items, outs, strict=True):
        number = wide(item.param.dtype)
        for out, g, *block in _blocks(u, item.grad, *item.buffers):
            state = [t.to(number) for t in block]
            out.copy_(_direction(rule, item, g.to(number), state))
            _narrow(state, block)


def apply(
    items: Sequence[Item],
    directions: Sequence[Tensor],
    scales: Sequence[float],
    sums: Sums | None,
    workspace: Workspace,
) -> None:
    """Decay, and apply directions that are known, see :class:`hf_cwd.kernels.interface.Kernel`."""
    del workspace
    for item, u, scale in zip(items, directions, scales, strict=True):
        decaying = _decaying(item, sums, scale)
        for block, x, remainder in _blocks(u, item.param, item.remainder):
            _step(x, block.to(wide(x.dtype)), remainder, **decaying)


def _direction(rule: Rule, item: Item, grad: Tensor, state: Sequence[Tensor]) -> Tensor:
    grad = -grad if item.settings.maximize else grad
    return rule.direction(grad, *state, step=item.step, **dict(item.settings.hyper))


def _decaying(item: Item, sums: Sums | None, scale: float = 1.0) -> dict[str, Any]:
    own = None
    if sums is not None:
        own = torch.zeros(1, COLUMNS, dtype=decay.sum_dtype(item.param.device), device=item.param.device)
        sums.add([item], [scale], own)
    given = {name: getattr(item.settings, name) for name in ("lr", "weight_decay", "cautious", "mask")}
    return given | {"scale": scale, "sums": None if own is None else own[0]}


def _step(param: Tensor, direction: Tensor, remainder: Tensor | None, **decaying: Any) -> None:
    """Decay and apply in the wide dtype, and back into memory."""
    if remainder is not None:
        x = joined(param, remainder)
        decay.step_(x, direction, **decaying)
        split(x, param, remainder)
    else:
        x = param.to(wide(param.dtype))
        decay.step_(x, direction, **decaying)
        _narrow([x], [param])


def _blocks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same stretches of all tensors. Element-wise work does not care about shapes, so blocks are flat."""
    first = tensors[0]
    if not are_plain([t for t in tensors if t is not None]):
        # Rare: memory with gaps, or what is no memory and may have no views. One block, with temporaries as large.
        yield tensors
        return
    size = BLOCK if first.device.type == "cpu" else DEVICE_BLOCK
    flat = [None if t is None else t.view(-1) for t in tensors]
    for start in range(0, first.numel(), size):
        yield tuple(None if t is None else t[start : start + size] for t in flat)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that directions and updates of parameters of ``dtype`` are computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _narrow(wide: Sequence[Tensor], block: Sequence[Tensor]) -> None:
    """Rounds what was computed in a wider copy back into memory."""
    for computed, stored in zip(wide, block, strict=True):
        if computed is not stored:
            stored.copy_(computed)
