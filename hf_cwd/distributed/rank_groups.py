"""The ranks that hold parts or copies of a parameter, and the process group that they communicate in.

An exchange runs among the ranks that hold a part of a parameter. Other ranks do not take part, and nobody waits for
them. Ranks go through their groups in one order, that of the ranks in them, so that all wait for the same group.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# Groups that had to be made, by their ranks, for as long as torch has them: one for all optimizers.
_made: weakref.WeakValueDictionary[tuple[int, ...], "ProcessGroup"] = weakref.WeakValueDictionary()


EXCHANGE = "the exchange of matrices between ranks"


@contextlib.contextmanager
def explained(subject: str, doing: str) -> Iterator[None]:
    """Adds to an error of a collective what the ranks were doing."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{subject} failed while {doing}: {error}. Another rank has ended, or did not come to the same place (for "
            "an exchange: did not call step()); its own error, if any, is the cause"
        ) from error


@dataclass(frozen=True, order=True)
class RankGroup:
    """Ranks that communicate with each other.

    Attributes:
        ranks: their numbers in the world, in the order of the process group.
        group: a weak reference to it; a strong one would keep its threads alive after torch has destroyed it. None
            stands for a rank by itself, and for the world's group.
    """

    ranks: tuple[int, ...]
    group: "weakref.ref[ProcessGroup] | None" = field(default=None, compare=False)

    @property
    def together(self) -> bool:
        """Whether there is anybody to communicate with."""
        return len(self.ranks) > 1

    @property
    def process_group(self) -> "ProcessGroup | None":
        """What functions of torch.distributed take as ``group``; None is the world.

        Raises:
            RuntimeError: it has been destroyed.
        """
        group = None if self.group is None else self.group()
        if group is None and self.group is not None:
            raise RuntimeError(
                f"the process group of ranks {list(self.ranks)}, in which an optimizer exchanges matrices, has been "
                "destroyed. Make the optimizer again once process groups have been made again"
            )
        return group


def alone() -> RankGroup:
    """This rank by itself."""
    return RankGroup((dist.get_rank() if _is_initialized() else 0,))


def of(group: "ProcessGroup | None") -> RankGroup:
    """The ranks of a process group, None being the world's; this rank alone where there is none.

    Raises:
        ValueError: this rank is not in it.
        TypeError: it is none.
    """
    if group is not None and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"rank {dist.get_rank()} is not in the process_group: give each rank a group that it is in")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group={group!r} is no torch.distributed.ProcessGroup, as new_group() makes it")
    if not _is_initialized():
        return alone()
    if group is None or group is dist.group.WORLD:
        return RankGroup(tuple(range(dist.get_world_size())))
    return RankGroup(tuple(dist.get_process_group_ranks(group)), weakref.ref(group))


def of_meshes(meshes: Iterable["DeviceMesh"]) -> dict["DeviceMesh", RankGroup]:
    """The ranks of each of these meshes.

    A mesh of several dimensions has no group for all of them, so that one may have to be made: a collective of its
    ranks, each of which must ask for it.
    """
    ranks = {mesh: tuple(mesh.mesh.flatten().tolist()) for mesh in meshes}
    # Sorted, since ranks may have their parameters in different orders, and wait for each other here.
    return {mesh: _of_mesh(mesh, ranks[mesh]) for mesh in sorted(ranks, key=lambda mesh: sorted(ranks[mesh]))}


def _of_mesh(mesh: "DeviceMesh", ranks: tuple[int, ...]) -> RankGroup:
    if len(ranks) == 1:
        return RankGroup(ranks)
    for dimension, size in enumerate(mesh.shape):
        if size == len(ranks):
            return of(mesh.get_group(dimension))
    ranks = tuple(sorted(ranks))
    if len(ranks) == dist.get_world_size():
        return of(None)
    if (group := _made.get(ranks)) is None:
        with explained(f"making a process group of ranks {list(ranks)}", "waiting for all of them"):
            _count_groups_alike(mesh)
            group = _made[ranks] = dist.new_group(
                list(ranks),
                timeout=_timeout(mesh.device_type),
                use_local_synchronization=True,
                # Where NCCL's watchdog ends a process, this is all that it says.
                group_desc="hf_cwd: exchange of matrices. If it times out, another rank has ended or called no step()",
            )
    return of(group)


def _count_groups_alike(mesh: "DeviceMesh") -> None:
    """Gives all ranks of a mesh as many process groups as the rank that is in the most.

    With use_local_synchronization torch makes a group's name from their number, and waits in vain under another name.
    """
    own = len(dist.distributed_c10d._world.pg_names)
    most = torch.tensor(own, device=torch.device(mesh.device_type))
    for dimension in range(mesh.ndim):
        dist.all_reduce(most, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
    for _ in range(int(most) - own):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _timeout(device_type: str) -> Any:
    """The world's, which new_group() does not take over. Not every back-end has options."""
    options = getattr(dist.group.WORLD._get_backend(torch.device(device_type)), "options", None)
    return getattr(options, "_timeout", None)


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
