"""Small collectives beside the exchange. Most of them run once, before the first exchange.

``group`` is a process group of torch.distributed's, None the world's.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_cwd.decay import sum_dtype
from hf_cwd.distributed import dtensor
from hf_cwd.distributed.geometry import Mesh
from hf_cwd.distributed.rank_groups import EXCHANGE, explained

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def digest(value: Any) -> int:
    """A number that equal values share, from their repr; it fits into an int64 with either sign."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")


def same(numbers: Sequence[int], device: torch.device, group: "ProcessGroup | None") -> list[bool]:
    """For each number, whether all ranks gave the same one."""
    bounds = torch.tensor([*numbers, *(-number for number in numbers)], dtype=torch.int64, device=device)
    with explained(EXCHANGE, "comparing what ranks are about to do"):
        dist.all_reduce(bounds, dist.ReduceOp.MIN, group=group)
        least, negated_most = bounds.chunk(2)
        return (least == -negated_most).tolist()


def everybody(flags: Sequence[bool], device: torch.device, group: "ProcessGroup | None") -> list[bool]:
    """For each flag, whether it is set on all ranks."""
    common = torch.tensor(flags, dtype=torch.uint8, device=device)
    with explained(EXCHANGE, "proving where weights lie"):
        dist.all_reduce(common, dist.ReduceOp.MIN, group=group)
        return [bool(flag) for flag in common.tolist()]


def total(numbers: Sequence[float], device: torch.device, group: "ProcessGroup | None" = None) -> list[float]:
    """The sum over all ranks of each number."""
    sums = torch.tensor(numbers, dtype=sum_dtype(device), device=device)
    with explained("a sum over ranks", "adding up"):
        dist.all_reduce(sums, group=group)
        return sums.tolist()


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank's number."""
    return dist.get_rank() if world() > 1 else 0


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in the order of ranks. A slow collective, for small values and rare calls."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with explained("a report of all ranks", "gathering it"):
        dist.all_gather_object(values, value)
    return values


def is_cut_as_told(param: Tensor, mesh: Mesh, rank: int) -> bool:
    """Whether this rank's part of a DTensor equals the part of the full tensor that the mesh names; a collective."""
    with explained(EXCHANGE, "proving where weights lie"):
        full, part = dtensor.whole(param).detach(), dtensor.local(param.detach())
    pieces = mesh.pieces(tuple(param.shape), rank)
    if part.numel() != sum(torch.Size(piece.size).numel() for piece in pieces):
        return False
    flat = part.contiguous()
    for piece in pieces:
        here = flat.as_strided(piece.size, piece.strides, flat.storage_offset() + piece.offset)
        there = full[tuple(slice(start, start + size) for start, size in zip(piece.start, piece.size, strict=True))]
        # Bit for bit: NaN would not be equal to itself.
        if not torch.equal(_bytes(here), _bytes(there.to(here.device))):
            return False
    return True


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
