"""Which kernel steps which tensors: the one asked for, or with ``"auto"`` the fastest that takes them."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd.kernels import c, eager, triton
from hf_cwd.kernels.addresses import are_plain, lacks_memory, obstacle, overlaps_itself, share_memory
from hf_cwd.kernels.interface import Item, Sums, Workspace
from hf_cwd.rules.base import Rule

KERNELS: dict[str, ModuleType] = {"eager": eager, "c": c, "triton": triton}
FASTEST = {"cpu": "c", "cuda": "triton"}

Describe = Callable[[Tensor], str]
Choose = Callable[[str, torch.device, tuple[torch.dtype, ...]], ModuleType]  # by name, device and dtypes

_logger = logging.getLogger("hf_cwd")


def by_shape(param: Tensor) -> str:
    """A parameter in words, where nobody knows its name."""
    return f"a parameter of shape {tuple(param.shape)}"


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
        raise ValueError(f"kernel={name!r} cannot run on {device.type}: {reason}. Use kernel='auto', or fix that")
    _warn_once(f"the {wanted} kernel is not available ({reason}): the eager one takes its place, and is slower")
    return eager


@functools.cache
def unavailable(name: str, device: torch.device) -> str | None:
    """Why a kernel cannot run on a device; None if it can."""
    return None if name == "eager" else KERNELS[name].unavailable(device)


@dataclass
class Call:
    """Items on one device that one kernel steps, and what it returned at their last step."""

    kernel: ModuleType
    items: list[Item]
    last: Any = None


def calls(rule: Rule, items: Sequence[Item], describe: Describe = by_shape) -> list[Call]:
    """Gives each item to its kernel; an item whose addresses no kernel may take, to the eager one.

    Args:
        describe: a parameter in words.

    Raises:
        ValueError: a kernel was asked for by name that does not take an item.
        RuntimeError: a tensor has no memory, or not as much as its shape needs, or the shapes of an item differ.
    """
    works = [_Work(item, item.grad, item.buffers) for item in items]
    by_kernel = _by_kernel(functools.partial(_kernel_for, rule), works, describe=describe, flat=True)
    return [Call(kernel, [item for _, item in some]) for (kernel, _), some in by_kernel.items()]


def can_be_kept(calls: Sequence[Call], items: Sequence[Item]) -> bool:
    """Whether the next step may take the same calls: each has items as they are, for a kernel that takes addresses.

    An item that was made flat would not see its next gradient. The eager kernel takes so long for each tensor that
    keeping its calls would save nothing that counts.
    """
    own = set(map(id, items))
    return all(call.kernel is not eager and own.issuperset(map(id, call.items)) for call in calls)


def update(rule: Rule, calls: Sequence[Call], sums: Sums | None, workspace: Workspace) -> None:
    """One step of an element-wise rule, see :class:`hf_cwd.kernels.interface.Kernel`."""
    for call in calls:
        call.last = call.kernel.update(rule, call.items, sums, workspace, call.last)


def directions(
    rule: Rule, items: Sequence[Item], outs: Sequence[Tensor], workspace: Workspace, describe: Describe = by_shape
) -> None:
    """Writes the directions before the matrix stage to ``outs``, which are contiguous and of one dtype."""
    choose, works = functools.partial(_kernel_for, rule), [_Work(item, item.grad, item.buffers) for item in items]
    by_kernel = _by_kernel(choose, works, *{out.dtype for out in outs}, describe=describe)
    for (kernel, _), some in by_kernel.items():
        kernel.directions(rule, [item for _, item in some], [outs[position] for position, _ in some], workspace)


def apply(
    items: Sequence[Item],
    directions: Sequence[Tensor],
    scales: Sequence[float],
    sums: Sums | None,
    workspace: Workspace,
    describe: Describe = by_shape,
) -> None:
    """Decays, and applies the given directions, which are contiguous."""
    works = [_Work(item, u, (), "direction") for item, u in zip(items, directions, strict=True)]
    for (kernel, _), some in _by_kernel(_kernel_to_apply, works, describe=describe).items():
        chosen = [position for position, _ in some]
        kernel.apply(
            [item for _, item in some], [directions[k] for k in chosen], [scales[k] for k in chosen], sums, workspace
        )


class _Work(NamedTuple):
    """What an operation reads and writes of an item, beside its parameter and its remainder.

    Attributes:
        second: the gradient, or a given direction.
        buffers: the rule's states, if the operation is about them.
        name: of ``second``, for messages.
    """

    item: Item
    second: Tensor
    buffers: tuple[Tensor, ...]
    name: str = "gradient"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        rest = () if self.item.remainder is None else (self.item.remainder,)
        return (self.item.param, self.second, *self.buffers, *rest)


def _by_kernel(
    choose: Choose, works: Sequence[_Work], *out: torch.dtype, describe: Describe, flat: bool = False
) -> dict[tuple[ModuleType, torch.device], list[tuple[int, Item]]]:
    """Items and their positions by kernel and device.

    ``flat``: items whose order in memory is not that of the dimensions are made flat.
    """
    result: dict[tuple[ModuleType, torch.device], list[tuple[int, Item]]] = {}
    previous: Any = None
    shared = share_memory([work.item.param for work in works])
    all_plain = not shared and are_plain([t for work in works for t in work.tensors])
    for position, work in enumerate(works):
        item, param, settings = work.item, work.item.param, work.item.settings
        key = (settings, param.device, param.dtype, work.second.dtype, *[t.dtype for t in work.buffers], *out)
        if key != previous:  # neighbours are mostly alike
            previous, kernel = key, choose(settings.kernel, param.device, key[2:])
            if settings.capturable and kernel is not triton:
                raise ValueError(
                    f"capturable=True needs the triton kernel, which does not step a parameter of {param.dtype} on "
                    f"{param.device} here. Leave capturable out"
                )
        shape = param.shape
        if any(t.shape != shape for t in work.tensors):
            raise RuntimeError(
                f"{describe(item.owner)}: the part of it on this rank has shape {tuple(shape)}, and its {work.name} "
                f"and states {', '.join(str(tuple(t.shape)) for t in work.tensors[1:])}. They must be cut alike"
            )
        used, given = kernel, item
        if not all_plain:
            used, given = _taken(kernel, work, describe, flat=flat, is_shared=position in shared)
        result.setdefault((used, param.device), []).append((position, given))
    return result


def _taken(
    kernel: ModuleType, work: _Work, describe: Describe, *, flat: bool, is_shared: bool
) -> tuple[ModuleType, Item]:
    """The kernel that steps an item, and the item as it is to have it."""
    item, tensors = work.item, work.tensors
    parts = list(zip(("it", f"its {work.name}", *("its state",) * len(tensors[2:])), tensors, strict=True))
    for name, tensor in parts:
        if lacks_memory(tensor):
            raise RuntimeError(
                f"{describe(item.owner)} cannot be stepped: {name} has shape {tuple(tensor.shape)}, and a storage of "
                f"{tensor.untyped_storage().nbytes()} bytes, which is too small. It was freed or resized: restore it "
                "before the step"
            )
        if tensor is not work.second and overlaps_itself(tensor):
            raise RuntimeError(
                f"{describe(item.owner)} cannot be stepped: {name} has strides {tensor.stride()}, by which some of its "
                "elements share memory. Make it with .clone()"
            )
    if kernel is eager or (are_plain(tensors) and not is_shared):
        return kernel, item
    asked = item.settings.kernel
    odd = next((f"{name} {why}" for name, tensor in parts if (why := obstacle(tensor))), None)
    if odd is None and is_shared:  # which threads would write to at once
        odd = "it shares memory with another parameter"
    if odd is not None:
        if asked != "auto":
            raise ValueError(
                f"kernel={asked!r} cannot step {describe(item.owner)}, since {odd}: it takes addresses, of plain "
                "tensors that are apart. Use kernel='auto'"
            )
        _eager_instead(odd, describe, item.owner)
        return eager, item
    lying = _flat(item) if flat else None
    if lying is None and asked != "auto":
        raise ValueError(
            f"kernel={asked!r} cannot step {describe(item.owner)}: it takes parameters, gradients and states that lie "
            f"alike and without gaps in memory, unlike one of shape {tuple(item.param.shape)} and strides "
            f"{item.param.stride()}. Use kernel='auto'"
        )
    return (eager, item) if lying is None else (kernel, lying)


_said: set[str] = set()


def _eager_instead(odd: str, describe: Describe, owner: Tensor) -> None:
    """Says it of the first parameter of each kind."""
    if odd not in _said:
        _said.add(odd)
        _logger.warning(
            "kernel=auto: the eager kernel, which is slower, steps %s, since %s, and all others that are so: the fast "
            "kernels take addresses, of plain tensors that are apart",
            describe(owner),
            odd,
        )


@functools.cache
def _kernel_for(rule: Rule, name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> ModuleType:
    """The kernel that runs a rule on (param, grad, states)."""
    kernel = select(name, device)
    return _unless_refused(kernel, name, kernel.refusal(rule, dtypes))


@functools.cache
def _kernel_to_apply(name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> ModuleType:
    """The kernel that decays and applies with (param, direction)."""
    kernel = select(name, device)
    return _unless_refused(kernel, name, kernel.refusal_to_apply(dtypes))


def _unless_refused(kernel: ModuleType, name: str, reason: str | None) -> ModuleType:
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
