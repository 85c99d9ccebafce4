"""What a step costs each rank of a parallel run: the memory that it keeps, what it receives, and its work."""

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_cwd.distributed.geometry import Mesh, Shape, Sharding
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.plan import Entry, Plan, holders, sources
from hf_cwd.estimate.layouts import Parallelism, shardings
from hf_cwd.kernels import eager
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.routing.route import Routing
from hf_cwd.rules import RULES, Rule


class Group(NamedTuple):
    """A parameter group of the Trainer's optimizer: its parameters, its rule, and which matrices they hold."""

    params: list[tuple[str, Shape]]
    rule: Rule
    layout: MatrixLayout

    def stage(self, arguments: Mapping[str, Any]) -> Stage:
        """Its matrix stage, from the keyword arguments of the optimizer."""
        hyper = {name: arguments.get(name, kind.default) for name, kind in self.rule.hyperparameters.items()}
        return Stage.of(self.rule.name, hyper)


def groups(model: nn.Module, routing: Routing) -> list[Group]:
    """The groups of the optimizer that the Trainer makes, in its order; without empty ones."""
    from transformers import Trainer

    names = {p: name for name, p in model.named_parameters()}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # it asks the Trainer for nothing
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
    layout: Parallelism,
    *,
    arguments: Mapping[str, Any],
    dtype: torch.dtype,
    device: str,
) -> list[Entry]:
    """What :func:`hf_cwd.distributed.plan.plan` takes: the matrices in the order of the Trainer's optimizer.

    Args:
        arguments: keyword arguments of the optimizer.
        dtype: of the parameters.
        device: type of the device that trains.
    """
    meshes = shardings(model, layout)
    result: list[Entry] = []
    for group in groups(model, routing):
        if group.rule.matrix is not None:
            stage = group.stage(arguments)
            wire = stage.wire(eager.wide(dtype), device)
            for name, shape in group.params:
                result.append(Entry(name, shape, group.layout, meshes[name], stage, wire, source=len(result)))
    return result


class Kept(NamedTuple):
    """Bytes that one rank keeps."""

    weights: int
    gradients: int
    states: int


class Cost(NamedTuple):
    """Of one rank: bytes that it keeps, bytes at the peak of an exchange, and what it receives and does in a step."""

    weights: int
    gradients: int
    states: int
    buffers: int
    received: int
    flops: int


def kept(model: nn.Module, meshes: Mapping[str, Mesh], *, states: Mapping[str, int], dtype: torch.dtype) -> list[Kept]:
    """What each rank keeps of a model that is cut into these parts.

    Args:
        states: bytes of state that an element of each parameter has.
        dtype: of the parameters.
    """
    sums = [[0, 0, 0] for _ in next(iter(meshes.values())).ranks]
    for name, p in model.named_parameters():
        for of_rank, numel in zip(sums, local_sizes(tuple(p.shape), meshes[name]), strict=True):
            size = numel * dtype.itemsize
            of_rank[0] += size
            of_rank[1] += size * p.requires_grad
            of_rank[2] += numel * states[name]
    return [Kept(*of_rank) for of_rank in sums]


def costs(kept: Sequence[Kept], plans: Sequence[Plan], peaks: Sequence[Sequence[int]]) -> list[Cost]:
    """The cost of each rank, of plans that are carried out one after another.

    Args:
        peaks: of each plan the :func:`buffers`.
    """
    return [
        Cost(
            *of_rank,
            max((peak[rank] for peak in peaks), default=0),
            sum(plan.received[rank] for plan in plans),
            sum(plan.flops[rank] for plan in plans),
        )
        for rank, of_rank in enumerate(kept)
    ]


@cache
def local_sizes(shape: Shape, sharding: Sharding) -> list[int]:
    """How many elements each rank holds."""
    return [sum(prod(piece.size) for piece in sharding.pieces(shape, rank)) for rank in sharding.ranks]


def buffers(plan: Plan, sizes: Sequence[int] | None = None) -> list[int]:
    """Bytes of each rank at the peak of its exchange: directions, whole matrices, and what is being sent and received.

    As :class:`hf_cwd.distributed.exchange.Exchange` works on accelerators: while a round is worked on, either the
    results of the one before or the parts of the one after are under way. The direction of a local tensor is there from
    the first round of any of its matrices to the last. Without the orthogonalisation's own temporaries, and without
    matrices that do not move.

    Args:
        sizes: elements of the direction of each local tensor, alike on all ranks, which count even if nothing moves:
            it is made as one, and may be most of what a rank has. None: each local tensor holds one parameter.
    """
    ranks = range(len(plan.received))
    gathered, whole, returned = ([[0] * plan.rounds for _ in ranks] for _ in range(3))
    # Directions that exist before, and after, the previous round's results have been taken.
    before, after = ([[0] * (plan.rounds + 2) for _ in ranks] for _ in range(2))
    alive: dict[tuple[int, int], list[int]] = {}
    local: dict[int, Sequence[int]] = {}
    for job in plan.jobs:
        if job.round is None:
            continue
        entry, k = plan.entries[job.entry], job.round
        if entry.source not in local:
            of_each = local_sizes(entry.shape, entry.sharding) if sizes is None else [sizes[entry.source]] * len(ranks)
            local[entry.source] = [numel * entry.dtype.itemsize for numel in of_each]
        parts = {rank: numel * entry.dtype.itemsize for rank, numel in holders(entry, job).items()}
        whole[job.owner][k] += job.numel * entry.dtype.itemsize
        for table, others in ((gathered, sources(entry, job)), (returned, parts)):
            for rank in others:
                if rank != job.owner:
                    table[rank][k] += parts[rank]
        # The owner receives, and sends, what it does not hold; for other replicas it packs its own part once as well.
        size = job.numel * entry.dtype.itemsize
        gathered[job.owner][k] += size - parts[job.owner]
        returned[job.owner][k] += size if len(job.serves) > 1 else size - parts[job.owner]
        for rank in parts:
            span = alive.setdefault((entry.source, rank), [k, k])
            span[0], span[1] = min(span[0], k), max(span[1], k)
    for (source, rank), (first, last) in alive.items():
        for k in range(first, last + 2):
            before[rank][k] += local[source][rank]
        for k in range(max(first - 1, 0), last + 1):
            after[rank][k] += local[source][rank]
    dtypes = {entry.source: entry.dtype for entry in plan.entries}
    least = max((size * dtypes[source].itemsize for source, size in enumerate(sizes or ())), default=0)
    peaks = []
    for rank in ranks:
        # One more round at the end, in which nothing comes, and one before the first, of which nothing returns.
        coming, back = [*gathered[rank], 0], [0, *returned[rank]]
        moments = [least]
        for k in range(plan.rounds):
            moments.append(whole[rank][k] + coming[k] + back[k] + before[rank][k])
            moments.append(whole[rank][k] + coming[k + 1] + back[k + 1] + after[rank][k])
        peaks.append(max(moments))
    return peaks
