"""Compares the replicas of a parameter if one rank orthogonalises a matrix for all of them.

That rank uses its own gradient. This is right if all replicas have the same one, as under DistributedDataParallel. If
they differ (local SGD, a sweep under one seed, a forgotten all-reduce), all gradients but one would be dropped
silently. So ranks compare digests on the first step and every 128th, before a step changes anything.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_cwd.distributed import collectives
from hf_cwd.distributed.plan import Entry, Plan, replicas
from hf_cwd.distributed.rank_groups import RankGroup

EVERY = 128  # steps from one comparison to the next
# Of a tensor's norm. Kernels that are not deterministic make replicas differ by rounding, in bfloat16 by 1 % at most;
# gradients of other data differ by about the norm itself, and even those of two halves of a large batch by 10 %.
TOLERANCE = 0.05
SUMS = 8


def shared_entries(plan: Plan) -> list[Entry]:
    """The parameters of which one rank orthogonalises a matrix for several replicas."""
    shared = {job.entry for job in plan.jobs if len(job.serves) > 1}
    return [plan.entries[number] for number in sorted(shared)]


def compare(
    entries: Sequence[Entry],
    tensors: Mapping[int, Mapping[str, Tensor | None]],
    *,
    rank: int,
    group: RankGroup,
    device: torch.device,
) -> None:
    """Compares the replicas of these parameters; a collective. Nothing is changed.

    A digest is the norm, and :data:`SUMS` sums of every eighth element. Two replicas are alike if none of these differ
    by more than :data:`TOLERANCE` of the norm.

    Args:
        entries: equal on all ranks; a rank holds parts of one replica.
        tensors: by ``Entry.source`` and name, this rank's parts of what is compared; None counts as zero.
        device: where the group communicates.

    Raises:
        ValueError: on all ranks, that replicas are not alike, with the parameter's name.
    """
    rows: list[Tensor] = []
    empty = torch.zeros(SUMS + 1, device=device)
    for entry in entries:
        here = [empty if part is None else _digest(part).to(device) for part in tensors[entry.source].values()]
        own = entry.sharding.replica(rank)
        for number in range(len(replicas(entry.sharding))):
            rows += here if number == own else [empty] * len(here)
    sums = collectives.total(torch.stack(rows).view(-1).tolist(), device, group.process_group)
    digests = iter(torch.tensor(sums, dtype=torch.float64).view(len(rows), -1))
    for entry in entries:
        names, copies = list(tensors[entry.source]), replicas(entry.sharding)
        own = torch.stack([next(digests) for _ in range(len(copies) * len(names))])
        own = own.view(len(copies), len(names), -1).nan_to_num()  # NaN in all of them is no difference
        own[..., 0].sqrt_()  # the squares of a replica's parts have been added up
        scale = own[..., 0].amax(0)
        apart = (own - own[0]).abs().amax(-1)
        for number, name in (apart > TOLERANCE * scale).nonzero().tolist():
            raise ValueError(
                f"{entry.name}: ranks {list(copies[0])} and {list(copies[number])} hold it as replicas, and one rank "
                f"would orthogonalise it for all of them, but their {names[name]} differ, by "
                f"{apart[number, name] / scale[name]:.0%} of the norm. The others' gradients would be dropped. Ranks "
                "that train apart (local SGD, a sweep, an ensemble) need share=never. Replicas need equal weights, and "
                "gradients that DistributedDataParallel, or an all-reduce of your own, makes equal"
            )


def _digest(part: Tensor) -> Tensor:
    """The sum of squares, then the sums of every eighth element, from each of the first eight on."""
    flat = part.detach().reshape(-1).to(torch.float32)
    whole = len(flat) - len(flat) % SUMS
    sums = flat[:whole].view(-1, SUMS).sum(0)
    sums[: len(flat) - whole] += flat[whole:]
    return torch.cat([flat.dot(flat).view(1), sums])
