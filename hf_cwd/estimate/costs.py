"""The costs of a rank: the memory for weights, gradients and states, buffers, bytes received, and operations."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_cwd.distributed.geometry import Mesh, Shape, Sharding
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.plan import Entry, Job, Plan, holders, sources
from hf_cwd.estimate.parallelism import Parallelism, shardings
from hf_cwd.kernels import eager
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.routing.route import Routing
from hf_cwd.rules import RULES, Rule


class Group(NamedTuple):
    """A parameter group of the Trainer's optimizer: its parameters, their rule, and the matrices in them."""

    params: list[tuple[str, Shape]]
    rule: Rule
    layout: MatrixLayout

    def stage(self, arguments: Mapping[str, Any]) -> Stage:
        """The group's matrix stage.

        Args:
            arguments: keyword arguments of the optimizer.
        """
        hyper = {name: arguments.get(name, default) for name, default in self.rule.defaults().items()}
        return Stage.of(self.rule.name, hyper)


def groups(model: nn.Module, routing: Routing) -> list[Group]:
    """The groups of the Trainer's optimizer, in its order, without empty ones."""
    from transformers import Trainer

    names = {p: name for name, p in model.named_parameters()}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # the method does not use self
    trained = [p for p in names if p.requires_grad]
    parts = [{"params": [p for p in trained if (names[p] in decayed) == wanted]} for wanted in (True, False)]
    rules = {r.algorithm for r in routing.routes} - {None}
    if len(rules) > 1 or any(r.layout is not None for r in routing.routes):
        parts = routing(parts)
    else:
        parts = [{**part, "algorithm": rule} for part in parts for rule in rules if part["params"]]
    return [
        Group(
            [(names[p], tuple(p.shape)) for p in part["params"]],
            RULES[part["algorithm"]],
            MatrixLayout() if part.get("layout") is None else MatrixLayout(**part["layout"]),
        )
        for part in parts
    ]


def entries(
    model: nn.Module,
    routing: Routing,
    parallelism: Parallelism,
    *,
    arguments: Mapping[str, Any],
    dtype: torch.dtype,
    device: str,
) -> list[Entry]:
    """The matrices in the order of the Trainer's optimizer, for :func:`hf_cwd.distributed.plan.plan`.

    Args:
        arguments: keyword arguments of the optimizer.
        dtype: the dtype of the parameters.
        device: the type of the devices that train.
    """
    meshes = shardings(model, parallelism)
    result: list[Entry] = []
    for group in groups(model, routing):
        if group.rule.matrix is not None:
            stage = group.stage(arguments)
            wire = stage.wire(eager.wide(dtype), device)
            for name, shape in group.params:
                result.append(Entry(name, shape, group.layout, meshes[name], stage, wire, source=len(result)))
    return result


class RankMemory(NamedTuple):
    """The bytes that a rank holds between steps."""

    weights: int
    gradients: int
    states: int


class RankCost(NamedTuple):
    """The cost of a step for one rank.

    Attributes:
        weights, gradients, states: bytes that it holds between steps.
        buffers: bytes at the peak of an exchange, see :func:`buffers`.
        received: bytes received in a step.
        flops: operations of the orthogonalisation in a step.
    """

    weights: int
    gradients: int
    states: int
    buffers: int
    received: int
    flops: int


def memory(
    model: nn.Module, meshes: Mapping[str, Mesh], *, states: Mapping[str, int], dtype: torch.dtype
) -> list[RankMemory]:
    """The memory of each rank for a sharded model.

    Args:
        meshes: the sharding of each parameter.
        states: bytes of optimizer state for each element of a parameter.
        dtype: the dtype of the parameters.
    """
    sums = [[0, 0, 0] for _ in next(iter(meshes.values())).ranks]
    for name, p in model.named_parameters():
        for of_rank, numel in zip(sums, local_sizes(tuple(p.shape), meshes[name]), strict=True):
            size = numel * dtype.itemsize
            of_rank[0] += size
            of_rank[1] += size * p.requires_grad
            of_rank[2] += numel * states[name]
    return [RankMemory(*of_rank) for of_rank in sums]


def costs(memory: Sequence[RankMemory], plans: Sequence[Plan], peaks: Sequence[Sequence[int]]) -> list[RankCost]:
    """The cost of each rank, for plans that are executed one after another.

    Args:
        peaks: the result of :func:`buffers` for each plan.
    """
    return [
        RankCost(
            *of_rank,
            max((peak[rank] for peak in peaks), default=0),
            sum(plan.received[rank] for plan in plans),
            sum(plan.flops[rank] for plan in plans),
        )
        for rank, of_rank in enumerate(memory)
    ]


@cache
def local_sizes(shape: Shape, sharding: Sharding) -> list[int]:
    """The number of elements that each rank holds."""
    return [sum(prod(piece.size) for piece in sharding.pieces(shape, rank)) for rank in sharding.ranks]


def buffers(plan: Plan, sizes: Sequence[int] | None = None) -> list[int]:
    """The bytes of each rank at the peak of its exchange: directions, whole matrices, send and receive buffers.

    It follows :class:`hf_cwd.distributed.exchange.Exchange` on accelerators. While a round is computed, either the
    results of the round before or the parts of the round after are under way. The direction of a local tensor exists
    from the first round of its matrices to the last. Temporaries of the orthogonalisation and matrices that do not move
    are not counted.

    Args:
        sizes: for flat tensors: the number of elements in the direction of each local tensor, the same on all ranks.
            The direction of a flat tensor is one allocation, which counts even if nothing moves. None means that each
            local tensor is one parameter.
    """
    jobs = [job for job in plan.jobs if job.round is not None]
    whole, gathered, returned = _matrix_bytes(plan, jobs)
    before, after = _direction_bytes(plan, jobs, sizes)
    dtypes = {entry.source: entry.dtype for entry in plan.entries}
    least = max((size * dtypes[source].itemsize for source, size in enumerate(sizes or ())), default=0)
    peaks = []
    for rank in range(len(plan.received)):
        # One more round at the end, which gathers nothing, and one before the first, which returns nothing.
        coming, back = [*gathered[rank], 0], [0, *returned[rank]]
        moments = [least]
        for k in range(plan.rounds):
            moments.append(whole[rank][k] + coming[k] + back[k] + before[rank][k])
            moments.append(whole[rank][k] + coming[k + 1] + back[k + 1] + after[rank][k])
        peaks.append(max(moments))
    return peaks


RankRounds = list[list[int]]  # bytes by rank and round


def _matrix_bytes(plan: Plan, jobs: Iterable[Job]) -> tuple[RankRounds, RankRounds, RankRounds]:
    """The bytes of whole matrices, of the buffers that gather their parts, and of those that return the results."""
    whole, gathered, returned = ([[0] * plan.rounds for _ in plan.received] for _ in range(3))
    for job in jobs:
        entry, k = plan.entries[job.entry], job.round
        parts = {rank: numel * entry.dtype.itemsize for rank, numel in holders(entry, job).items()}
        size = job.numel * entry.dtype.itemsize
        whole[job.owner][k] += size
        for buffers_of, ranks in ((gathered, sources(entry, job)), (returned, parts)):
            for rank in ranks:
                if rank != job.owner:
                    buffers_of[rank][k] += parts[rank]
        # The owner receives, and sends, what it does not hold. For other replicas it also packs its own part, once.
        gathered[job.owner][k] += size - parts[job.owner]
        returned[job.owner][k] += size if len(job.serves) > 1 else size - parts[job.owner]
    return whole, gathered, returned


def _direction_bytes(plan: Plan, jobs: Iterable[Job], sizes: Sequence[int] | None) -> tuple[RankRounds, RankRounds]:
    """The bytes of directions in each round, before and after the results of the previous round are applied."""
    rounds: dict[tuple[int, int], list[int]] = {}  # by local tensor and rank: the first and the last round that need it
    local: dict[int, Sequence[int]] = {}
    for job in jobs:
        entry, k = plan.entries[job.entry], job.round
        if entry.source not in local:
            local[entry.source] = _local_bytes(entry, len(plan.received), sizes)
        for rank in holders(entry, job):
            span = rounds.setdefault((entry.source, rank), [k, k])
            span[0], span[1] = min(span[0], k), max(span[1], k)
    before, after = ([[0] * (plan.rounds + 2) for _ in plan.received] for _ in range(2))
    for (source, rank), (first, last) in rounds.items():
        for k in range(first, last + 2):
            before[rank][k] += local[source][rank]
        for k in range(max(first - 1, 0), last + 1):
            after[rank][k] += local[source][rank]
    return before, after


def _local_bytes(entry: Entry, ranks: int, sizes: Sequence[int] | None) -> list[int]:
    of_each = local_sizes(entry.shape, entry.sharding) if sizes is None else [sizes[entry.source]] * ranks
    return [numel * entry.dtype.itemsize for numel in of_each]
