"""Which kernel steps which tensors: the one asked for, or with ``"auto"`` the fastest that takes them."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_cwd.kernels import c, eager, triton
from hf_cwd.kernels.base import Item, Sums
from hf_cwd.rules.base import Rule

KERNELS: dict[str, ModuleType] = {"eager": eager, "c": c, "triton": triton}
FASTEST = {"cpu": "c", "cuda": "triton"}

_logger = logging.getLogger("hf_cwd")


def select(name: str, device: torch.device) -> ModuleType:
    """The kernel for a group's ``kernel`` key on a device; ``"auto"`` is the fastest that runs there.

    Raises:
        ValueError: the named kernel cannot run there, with the reason.
    """
    wanted = FASTEST.get(device.type, "eager") if name == "auto" else name
    reason = unavailable(wanted, device)
    if reason is None:
        if wanted == "c" and c.threads() < torch.get_num_threads():
            _say_once(
                f"the C kernel runs in one thread ({c.about()}): torch's OpenMP runtime was not found, or has forked"
            )
        return KERNELS[wanted]
    if name != "auto":
        raise ValueError(f"kernel={name!r} cannot run on {device.type}: {reason}. Leave kernel at 'auto', or mend that")
    _warn_once(f"the {wanted} kernel is not available ({reason}): the eager one takes its place, and is slower")
    return eager


@functools.cache
def unavailable(name: str, device: torch.device) -> str | None:
    """Why a kernel cannot run on a device; None if it can."""
    return None if name == "eager" else KERNELS[name].unavailable(device)


def update(
    rule: Rule, items: Sequence[Item], sums: Sums | None, cache: dict[Any, Any], *, steady: bool = False
) -> None:
    """One step of an element-wise rule, see :class:`hf_cwd.kernels.base.Kernel`; each item by its kernel."""
    place = ("kernels", rule)
    found = cache.get(place) if steady else None
    if found is None:
        found = {kernel: [item for _, item in some] for kernel, some in _by_kernel(rule, items, flat=True).items()}
        # Not where an item is given in another form: that would not see its next gradient.
        own = set(map(id, items))
        cache[place] = found if all(id(item) in own for some in found.values() for item in some) else None
    for kernel, some in found.items():
        kernel.update(rule, some, sums, cache, steady=steady)


def directions(rule: Rule, items: Sequence[Item], outs: Sequence[Tensor], cache: dict[Any, Any]) -> None:
    """Writes the directions before the matrix stage to ``outs``, which are contiguous and of one dtype."""
    for kernel, some in _by_kernel(rule, items, *{out.dtype for out in outs}).items():
        kernel.directions(rule, [item for _, item in some], [outs[position] for position, _ in some], cache)


def apply(
    items: Sequence[Item],
    directions: Sequence[Tensor],
    scales: Sequence[float],
    sums: Sums | None,
    cache: dict[Any, Any],
) -> None:
    """Decay, and apply directions that are known and contiguous."""
    known = [replace(item, grad=u, buffers=()) for item, u in zip(items, directions, strict=True)]
    for kernel, some in _by_kernel(None, known).items():
        chosen = [position for position, _ in some]
        kernel.apply(
            [item for _, item in some], [directions[k] for k in chosen], [scales[k] for k in chosen], sums, cache
        )


def _by_kernel(
    rule: Rule | None, items: Sequence[Item], *out: torch.dtype, flat: bool = False
) -> dict[ModuleType, list[tuple[int, Item]]]:
    """Items and their positions by kernel; ``flat`` ones where their order in memory is not that of the dimensions."""
    found: dict[ModuleType, list[tuple[int, Item]]] = {}
    known: Any = None
    for position, item in enumerate(items):
        param, grad, buffers, settings = item.param, item.grad, item.buffers, item.settings
        key = (settings, param.dtype, grad.dtype, *[t.dtype for t in buffers], *out)
        if key != known:  # neighbours are mostly alike
            known, kernel = key, _kernel(settings.kernel, param.device, rule, key[1:])
            if settings.capturable and kernel is not triton:
                raise ValueError(
                    f"capturable=True needs the triton kernel, which does not step a parameter of {param.dtype} on "
                    f"{param.device} here. Leave capturable out"
                )
        used, given = kernel, item
        if kernel is not eager and not (
            param.is_contiguous() and grad.is_contiguous() and all(map(Tensor.is_contiguous, buffers))
        ):
            lying = _flat(item) if flat else None
            if lying is None and settings.kernel != "auto":
                raise ValueError(
                    f"kernel={settings.kernel!r} takes parameters, gradients and states that lie alike and without "
                    f"gaps in memory, unlike one of shape {tuple(param.shape)} and strides {param.stride()}. Use "
                    "kernel='auto'"
                )
            used, given = (eager, item) if lying is None else (kernel, lying)
        if used not in found:
            found[used] = []
        found[used].append((position, given))
    return found


@functools.cache
def _kernel(name: str, device: torch.device, rule: Rule | None, dtypes: tuple[torch.dtype, ...]) -> ModuleType:
    kernel = select(name, device)
    reason = kernel.refusal(rule, dtypes)
    if reason is None:
        return kernel
    if name != "auto":
        raise ValueError(f"kernel={name!r} does not take {reason}. Use kernel='auto'")
    _logger.info("kernel=auto: the eager kernel steps %s", reason)
    return eager


def _flat(item: Item) -> Item | None:
    """The item with flat tensors, if they lie alike and without gaps in memory; else None.

    That is what memory_format=channels_last makes of a convolution. A gradient that lies otherwise is copied.
    """
    param, grad = item.param, item.grad
    states = [*item.buffers, *([] if item.remainder is None else [item.remainder])]
    if not _is_dense(param) or any(t.stride() != param.stride() for t in states):
        return None
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    param, grad, *states = (t.as_strided((t.numel(),), (1,)) for t in (param, grad, *states))
    buffers, rest = tuple(states[: len(item.buffers)]), states[len(item.buffers) :]
    return replace(item, param=param, grad=grad, buffers=buffers, remainder=rest[0] if rest else None)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each place once, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@functools.cache
def _say_once(message: str) -> None:
    _logger.info(message)


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)
