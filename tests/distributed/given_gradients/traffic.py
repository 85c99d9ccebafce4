"""What travels between ranks: as seen below torch.distributed, and by the formula of issue 4."""

from collections import Counter
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from hf_cwd.newton_schulz.matrices import MatrixLayout

# Every function of torch.distributed that communicates.
FUNCTIONS = [
    name
    for name in distributed_c10d.__all__
    if name.startswith(
        ("all_", "reduce_scatter", "broadcast", "gather", "scatter", "send", "recv", "isend", "irecv", "batch_")
    )
    or name in ("barrier", "monitored_barrier", "reduce")
]
FUNCTIONAL = ("_c10d_functional", "_c10d_functional_autograd", "_dtensor", "c10d_functional")


class Collectives:
    """Counts the collectives that are called while it is active, and what comes from each rank by all-to-alls."""

    def __init__(self, world: int):
        self.calls: Counter[str] = Counter()
        self.received = [0] * world  # bytes
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> "Collectives":
        for name in FUNCTIONS:
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counted(name, self._originals[name]))
        return self

    def __exit__(self, *exception: Any) -> None:
        for name, function in self._originals.items():
            setattr(dist, name, function)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            if name == "all_to_all_single":
                output, _, sizes = args[:3]
                assert sum(sizes) == output.numel()
                senders = dist.get_process_group_ranks(kwargs["group"])
                for sender, size in zip(senders, sizes, strict=True):
                    self.received[sender] += size * output.element_size()
            return function(*args, **kwargs)

        return counted


class Operators(TorchDispatchMode):
    """Counts them one level below, where nothing goes past it; slow, for it sees every operation."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func._schema.name.endswith("wait_tensor")
        self.count += func.namespace in ("c10d", *FUNCTIONAL) and not waits
        return func(*args, **(kwargs or {}))


def homes(shape: tuple[int, ...], layout: dict | None) -> torch.Tensor:
    """For each element of a parameter the number of the matrix that it lies in."""
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    blocks = [b if b.ndim > 2 else b.unsqueeze(0) for b in MatrixLayout(**(layout or {})).matrices(numbers)]
    home = torch.empty(numbers.numel(), dtype=torch.long)
    for i, block in enumerate(blocks):
        for member, matrix in enumerate(block.flatten(0, -3)):
            home[matrix.flatten()] = member * len(blocks) + i
    return home


def shares(home: torch.Tensor, elements: list[torch.Tensor]) -> list[list[int]]:
    """How many elements of each matrix each rank holds, by rank and matrix."""
    count = int(home.max()) + 1
    return [home[own.flatten()].bincount(minlength=count).tolist() for own in elements]


def expected(ranks, jobs, names, held, replicas, present, itemsize):
    """Bytes by (receiver, sender): an owner receives what it lacks, everybody else what they hold of the result.

    Args:
        ranks: those that exchange.
        jobs: the plan's: which rank owns a matrix, and in whose name.
        names: of the parameters, by the number of the plan's entry.
        held: by parameter, what :func:`shares` says.
        replicas: by parameter, something that ranks of one replica have in common.
        present: the parameters that have a gradient on some rank.
    """
    result: Counter[tuple[int, int]] = Counter()
    largest = 0
    for job in jobs:
        name = names[job.entry]
        if name not in present:
            continue
        holds = {rank: held[name][rank][job.matrix] for rank in ranks}
        alike = [rank for rank in ranks if replicas[name][rank] == replicas[name][job.owner]]
        everybody = len(job.serves) > 1 or len(alike) == len(ranks)
        assert holds[job.owner], "an owner holds a part"
        for rank, count in holds.items():
            if rank == job.owner or not count:
                continue
            if holds[job.owner] < job.numel and rank in alike:
                result[job.owner, rank] += count * itemsize
            if everybody or rank in alike:
                result[rank, job.owner] += count * itemsize
                largest = max(largest, job.numel * itemsize)
    return result, largest


def rounds(received: list[int], largest: int, exchange_bytes: int) -> int:
    return ceil(max(received) / max(exchange_bytes, largest)) if largest else 0
