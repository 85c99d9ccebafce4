"""Whether a tensor's numbers lie where its address says: what a kernel asks before it takes one."""

import functools
from collections.abc import Sequence
from operator import attrgetter, le

import torch
from torch import Tensor

_LAYOUT = attrgetter("layout")
_NBYTES = attrgetter("nbytes")
_FUNCTIONS = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)


@functools.cache
def is_plain(kind: type) -> bool:
    """Whether a subclass of Tensor leaves to torch what its numbers are: one that dispatches itself need not."""
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and function in _FUNCTIONS


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels may take the addresses of all of these, and each is contiguous.

    A model has hundreds of parameters: one pass over all of them for each question costs a fraction of
    :func:`obstacle` for each tensor.
    """
    if not all(map(is_plain, set(map(type, tensors)))) or set(map(_LAYOUT, tensors)) - {torch.strided}:
        return False
    if any(map(Tensor.is_neg, tensors)) or not all(map(Tensor.is_contiguous, tensors)):
        return False
    needed, addresses = list(map(_NBYTES, tensors)), list(map(Tensor.data_ptr, tensors))
    if 0 in addresses and any(size for size, address in zip(needed, addresses, strict=True) if not address):
        return False
    if any(offsets := list(map(Tensor.storage_offset, tensors))):
        needed = [size + k * t.element_size() for size, k, t in zip(needed, offsets, tensors, strict=True)]
    return all(map(le, needed, map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))))


def obstacle(tensor: Tensor) -> str | None:
    """Why a kernel must not take a tensor's address, as the rest of a sentence about it; None if it may."""
    if not is_plain(type(tensor)):
        return f"is a {type(tensor).__name__}, which decides itself what its numbers are"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"has layout {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_neg():
        return "has its negative bit set"
    return "has no memory" if tensor.numel() and not tensor.data_ptr() else None


def _is_memory(tensor: Tensor) -> bool:
    """Whether a tensor's shape and strides say what of its storage it is."""
    if not is_plain(type(tensor)) or tensor.is_nested or tensor.layout != torch.strided or not tensor.numel():
        return False
    return not (tensor.is_meta or tensor._is_zerotensor() or torch._is_functional_tensor(tensor))


def lacks_memory(tensor: Tensor) -> bool:
    """Whether a tensor's storage ends before its shape and strides do: to read it is an error in any kernel."""
    if not _is_memory(tensor):
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() < (tensor.storage_offset() + last + 1) * tensor.element_size()


def share_memory(tensors: Sequence[Tensor]) -> set[int]:
    """The positions of tensors without gaps that share memory with others of them."""
    spans = sorted((t.data_ptr(), number) for number, t in enumerate(tensors) if _is_memory(t))
    found, end, last = set(), 0, 0
    for start, number in spans:
        if start < end:
            found |= {last, number}
        if start + tensors[number].nbytes > end:
            end, last = start + tensors[number].nbytes, number
    return found


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of a tensor may share memory, such as those of an expanded one: none can write to it."""
    if not _is_memory(tensor):
        return False
    last = 0
    for stride, size in sorted((t, n) for t, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= last:
            return True
        last += (size - 1) * stride
    return False
