"""Who orthogonalises which matrix, and when: one pure function, run by training and printed by ``hf-cwd explain``.

Nothing here needs a process group or a tensor. Every rank computes the same plan; :mod:`hf_cwd.distributed.exchange`
carries it out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil

import torch

from hf_cwd.distributed.geometry import Shape, Sharding, held, matrix_shapes
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.rules.hyperparameters import Choice, Hyperparameter, Integer

# Options of an optimizer with a matrix rule, beside its hyper-parameters.
EXCHANGE: dict[str, Hyperparameter] = {
    "share": Choice("auto", ("auto", "always", "never")),
    "exchange_bytes": Integer(1 << 28, 1, 1 << 62),
}


def flops_per_byte(device: str) -> int:
    """How many operations a device of this type does while it receives a byte; ``share="auto"`` weighs by it.

    Orders of magnitude: 100 GFLOP/s of a CPU against 1 GB/s, 500 TFLOP/s of an accelerator against 50 GB/s.
    """
    return 100 if device == "cpu" else 10_000


@dataclass(frozen=True)
class Entry:
    """A parameter whose matrices are to be orthogonalised.

    Attributes:
        name: for messages.
        shape: of the full parameter.
        layout: which matrices it holds.
        sharding: which rank holds what of it.
        stage: what is done with each matrix.
        dtype: in which they travel.
        source: which of the optimizer's local tensors its parts lie in.
        offset: where in it they begin.
    """

    name: str
    shape: Shape
    layout: MatrixLayout
    sharding: Sharding
    stage: Stage
    dtype: torch.dtype
    source: int
    offset: int = 0


@dataclass(frozen=True)
class Job:
    """One matrix, orthogonalised by ``owner`` for the replicas in ``serves``.

    Attributes:
        entry: position of its parameter in ``Plan.entries``.
        matrix: which of the parameter's matrices.
        shape: (rows, columns).
        owner: the rank that gathers it from its own replica and sends the result to all that hold a part of it.
        serves: numbers of the replicas that get the result.
        round: in which it travels; None where no rank but the owner holds a part.
    """

    entry: int
    matrix: int
    shape: tuple[int, int]
    owner: int
    serves: tuple[int, ...]
    round: int | None = None

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Plan:
    """What every rank does in a step.

    Attributes:
        entries: the parameters.
        jobs: the matrices in the order of the parameters. If several replicas each orthogonalise a matrix, it has a job
            for each of them.
        rounds: how many all-to-alls there are in each direction.
        received: bytes that each rank receives in a step, gathered parts and results.
        flops: floating-point operations of each rank's matrices in a step.
    """

    entries: tuple[Entry, ...]
    jobs: tuple[Job, ...]
    rounds: int
    received: dict[int, int]
    flops: dict[int, int]


def plan(
    entries: Iterable[Entry],
    *,
    share: str = EXCHANGE["share"].default,
    exchange_bytes: int = EXCHANGE["exchange_bytes"].default,
    balance: int = flops_per_byte("cpu"),
) -> Plan:
    """The plan for these parameters. It depends on the arguments only, so every rank computes the same one.

    A matrix that one rank of a replica holds whole stays there. Each other matrix gets an owner, the costliest matrix
    first: the rank with the least work among those that hold a part of it. Round by round, owners gather the parts from
    their own replica, and send each rank its part of the result.

    Args:
        share: ``"always"``: one rank works for all replicas; ``"never"``: each replica works for itself; ``"auto"``:
            the cheaper of both, for each kind of matrix. The entries' shardings say what is a replica.
        exchange_bytes: about what a rank receives in a round. The number of rounds is ``ceil(bytes of the busiest rank
            / max(exchange_bytes, bytes of the largest matrix))``. Matrices are not cut, so a round may have more.
        balance: operations that take as long as receiving a byte, see :func:`flops_per_byte`.
    """
    entries = tuple(entries)
    ranks = sorted({rank for entry in entries for rank in entry.sharding.ranks})
    flops, load = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)
    jobs, waiting = [], []
    for i, entry in enumerate(entries):
        table, copies = _holders(entry.shape, entry.layout, entry.sharding), replicas(entry.sharding)
        for matrix, shape in enumerate(matrix_shapes(entry.shape, entry.layout)):
            holders, cost = table[matrix], entry.stage.flops(shape)
            if not holders:
                continue  # a matrix without elements
            shared = len(copies) == 1 or _is_shared(share, entry, shape, holders, len(copies), cost, balance)
            for serves in (tuple(range(len(copies))),) if shared else ((replica,) for replica in range(len(copies))):
                candidates = tuple(rank for replica in serves for rank in copies[replica] if rank in holders)
                if len(candidates) == 1:
                    jobs.append(Job(i, matrix, shape, candidates[0], serves))
                    flops[candidates[0]] += cost
                else:
                    waiting.append((-cost, i, matrix, shape, serves, candidates))
    largest = max((_bytes(entries[i], shape) for _, i, _, shape, _, _ in waiting), default=0)
    for cost, i, matrix, shape, serves, candidates in sorted(waiting):
        # The rank with the least work, among those whose bytes stay within one largest matrix of the least loaded.
        size, least = _bytes(entries[i], shape), min(load[rank] for rank in candidates)
        near = (rank for rank in candidates if load[rank] + size <= least + largest)
        owner = min(near, key=lambda rank: (flops[rank], load[rank], rank))
        flops[owner] -= cost
        load[owner] += size
        jobs.append(Job(i, matrix, shape, owner, serves))
    jobs.sort(key=lambda job: (job.entry, job.matrix, job.serves))
    return _in_rounds(entries, jobs, ranks, flops, exchange_bytes)


def holders(entry: Entry, job: Job) -> dict[int, int]:
    """The ranks that get a part of a job's result, and how many elements each holds."""
    table = _holders(entry.shape, entry.layout, entry.sharding)[job.matrix]
    copies = replicas(entry.sharding)
    if len(job.serves) == len(copies):
        return table
    return {rank: table[rank] for replica in job.serves for rank in copies[replica] if rank in table}


def sources(entry: Entry, job: Job) -> list[int]:
    """The ranks that the owner gathers a job's matrix from, itself included."""
    table = _holders(entry.shape, entry.layout, entry.sharding)[job.matrix]
    return [rank for rank in replicas(entry.sharding)[entry.sharding.replica(job.owner)] if rank in table]


def _in_rounds(
    entries: tuple[Entry, ...], jobs: list[Job], ranks: Sequence[int], flops: dict[int, int], exchange_bytes: int
) -> Plan:
    """Deals each owner's matrices into rounds of about the same size, in the order of the parameters.

    A round has matrices of one dtype.
    """
    received, rounds = dict.fromkeys(ranks, 0), 0
    placed = list(jobs)
    for dtype in sorted({entry.dtype for entry in entries}, key=str):
        here, largest = dict.fromkeys(ranks, 0), 0
        moving: list[int] = []
        for i, job in enumerate(jobs):
            entry = entries[job.entry]
            parts = holders(entry, job) if entry.dtype == dtype else {}
            if len(parts) <= 1:
                continue  # one rank holds all of it, and no other rank needs the result
            moving.append(i)
            largest = max(largest, job.numel)
            here[job.owner] += job.numel - parts[job.owner]
            for rank, numel in parts.items():
                if rank != job.owner:
                    here[rank] += numel
        if not moving:
            continue
        count = ceil(max(here.values()) * dtype.itemsize / max(exchange_bytes, largest * dtype.itemsize))
        total, before = sum(jobs[i].numel for i in moving), 0
        for i in moving:
            middle = (before + jobs[i].numel / 2) / total
            placed[i] = _at(jobs[i], rounds + int(middle * count))
            before += jobs[i].numel
        rounds += count
        for rank, numel in here.items():
            received[rank] += numel * dtype.itemsize
    return Plan(entries, tuple(placed), rounds, received, flops)


def _at(job: Job, number: int) -> Job:
    return Job(job.entry, job.matrix, job.shape, job.owner, job.serves, number)


def _is_shared(
    share: str,
    entry: Entry,
    shape: tuple[int, int],
    holders: Mapping[int, int],
    replicas: int,
    cost: int,
    balance: int,
) -> bool:
    """Whether one rank works for all replicas: compares the work that this saves with the bytes that it moves."""
    if share != "auto":
        return share == "always"
    numel = shape[0] * shape[1]
    # What an owner lacks, on average, is gathered once for each owner; everybody else receives what they hold.
    own = numel * replicas / len(holders)
    apart = cost * replicas + balance * replicas * 2 * (numel - own) * entry.dtype.itemsize
    together = cost + balance * ((numel - own) + (replicas * numel - own)) * entry.dtype.itemsize
    return together < apart


@cache
def _holders(shape: Shape, layout: MatrixLayout, sharding: Sharding) -> list[dict[int, int]]:
    """For each matrix of a parameter, the ranks that hold a part of it, and how many elements."""
    table: list[dict[int, int]] = [{} for _ in matrix_shapes(shape, layout)]
    for rank in sharding.holders(shape):
        for matrix, parts in held(shape, layout, sharding, rank).items():
            table[matrix][rank] = sum(part.numel for part in parts)
    return table


@cache
def replicas(sharding: Sharding) -> list[tuple[int, ...]]:
    """The ranks of each replica, by its number."""
    copies: dict[int, list[int]] = {}
    for rank in sharding.ranks:
        copies.setdefault(sharding.replica(rank), []).append(rank)
    return [tuple(copies[replica]) for replica in range(len(copies))]


def _bytes(entry: Entry, shape: tuple[int, int]) -> int:
    return shape[0] * shape[1] * entry.dtype.itemsize
