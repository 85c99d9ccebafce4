"""Copies between local tensors, matrices and the buffers that travel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_cwd.distributed.schedule import Part


def of_local(local: Tensor, part: Part) -> Tensor:
    segment = part.segment
    return local.as_strided(segment.size, segment.strides, local.storage_offset() + segment.offset)


def of_matrix(matrix: Tensor, part: Part) -> Tensor:
    view = matrix.view(-1, *part.inner)
    for dim, (start, size) in enumerate(zip(part.segment.start, part.segment.size, strict=True)):
        view = view.narrow(dim, start, size)
    return view


def size_of(parts: Sequence[Part], absent: set[int]) -> int:
    return sum(part.segment.numel for part in parts if part.source not in absent)


def cut(buffer: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    return buffer.split([tensor.numel() for tensor in like]) if like else ()


def unpack(buffer: Tensor, places: Sequence[Tensor]) -> None:
    copy_parts(places, [piece.view(place.shape) for piece, place in zip(cut(buffer, places), places, strict=True)])


def copy_parts(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if places:
        torch._foreach_copy_(places, values)  # on an accelerator, one launch for many


def scale_parts(places: Sequence[tuple[Tensor, float]]) -> None:
    scaled = [(place, factor) for place, factor in places if factor != 1]
    if scaled:
        torch._foreach_mul_([place for place, _ in scaled], [factor for _, factor in scaled])
