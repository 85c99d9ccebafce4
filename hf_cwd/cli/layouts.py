"""What a parallel layout makes of a model, from its configuration alone: who holds what, and what a step costs whom."""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_cwd.kernels import eager
from hf_cwd.matrices import Layout
from hf_cwd.rules import RULES
from hf_cwd.sharding.pieces import Mesh, Placement, Replicate, Shape, Shard, StridedShard
from hf_cwd.sharding.plan import Entry, Plan, holders, sources
from hf_cwd.sharding.stage import Stage
from hf_cwd.trainer.routing import Routing

# In the order in which ranks are numbered: neighbours are in the same group of tensor parallelism.
DIMENSIONS = ("ddp", "fsdp2", "tp", "ep")
GRAMMAR = (
    "ddp, fsdp2, tp, or several of them with their sizes: ddp=128,fsdp2=8 (HSDP: 128 replicas of 8 shards), "
    "fsdp2=128,tp=8, fsdp2=128,tp=8,ep=64 (ep: experts, over ranks of fsdp2 and tp). One of ddp, fsdp2 and tp may go "
    "without a size where --world is given"
)


@dataclass(frozen=True)
class Parallelism:
    """How many ranks each kind of parallelism has; those of ``ep`` are ranks of ``fsdp2`` and ``tp``.

    Example:
        >>> from hf_cwd.cli.layouts import parallelism
        >>> print(parallelism("ddp=4,fsdp2", 32))
        ddp=4,fsdp2=8
    """

    ddp: int = 1
    fsdp2: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        return self.ddp * self.fsdp2 * self.tp

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name in DIMENSIONS if (size := getattr(self, name)) > 1) or "ddp=1"


def parallelism(text: str, world: int | None) -> Parallelism:
    """Reads ``--layout`` and ``--world``.

    Raises:
        ValueError: not in the grammar, or sizes that do not go together.
    """
    sizes: dict[str, int | None] = {}
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(rf"({'|'.join(DIMENSIONS)})(?:=([1-9]\d*))?", part)
        if found is None or found[1] in sizes:
            raise ValueError(f"--layout {text!r}: {part!r} is not understood. Write {GRAMMAR}")
        sizes[found[1]] = None if found[2] is None else int(found[2])
    open_ = [name for name, size in sizes.items() if size is None]
    known = prod(size for name, size in sizes.items() if size is not None and name != "ep")
    if "ep" in open_ or len(open_) > 1 or (open_ and world is None):
        missing = "ep" if "ep" in open_ else open_[0]
        raise ValueError(f"--layout {text!r}: say how many ranks {missing} has, {missing}=8, or give --world")
    if open_:
        if world % known:
            raise ValueError(f"--layout {text!r}: {known} does not divide --world {world}")
        sizes[open_[0]] = world // known
    result = Parallelism(**sizes)
    if world not in (None, result.world):
        raise ValueError(f"--layout {text!r} has {result.world} ranks, and --world is {world}: leave --world out")
    if result.fsdp2 * result.tp % result.ep or (result.ep > 1 and result.ep % result.tp):
        raise ValueError(f"--layout {text!r}: ep must be a multiple of tp, and a divisor of fsdp2 x tp")
    return result


def shardings(model: nn.Module, layout: Parallelism) -> dict[str, Mesh]:
    """The sharding of each parameter: that of torch's FSDP2 over that of transformers' plan for the model.

    Raises:
        ValueError: transformers has no such plan, or one that is not known here.
    """
    tp_plan = _plan(model, "tp") if layout.tp > 1 else {}
    ep_plan = _plan(model, "ep") if layout.ep > 1 else {}
    # Experts that are dealt out whole are not cut by tensor parallelism too.
    tp_plan = {
        name: style
        for name, style in tp_plan.items()
        if not any(name == experts or name.startswith(f"{experts}.") for experts in ep_plan)
    }
    dense = (layout.ddp, layout.fsdp2, layout.tp)
    experts = (layout.ddp, layout.fsdp2 * layout.tp // layout.ep, layout.ep)
    result = {}
    for name, p in model.named_parameters():
        style = _style(name, ep_plan)
        shape, style = (dense, _style(name, tp_plan)) if style is None else (experts, style)
        inner = _placement(name, p, style)
        if style == "grouped_gemm" and p.size(0) % layout.ep:
            raise ValueError(f"ep={layout.ep} does not divide the {p.size(0)} experts of {name}")
        # FSDP2 cuts what tensor parallelism left: where both cut the first dimension, each rank gets a part of the
        # part, and not a part of the whole.
        outer = StridedShard(0, shape[2]) if inner in _CUTS_FIRST and shape[2] > 1 else Shard(0)
        result[name] = _mesh(shape, (Replicate(), outer, inner))
    return result


_CUTS_FIRST = (Shard(0), StridedShard(0, 2))


@cache
def _mesh(shape: Shape, placements: tuple[Placement, ...]) -> Mesh:
    return Mesh(shape, tuple(range(prod(shape))), placements)


def _plan(model: nn.Module, kind: str) -> dict[str, str]:
    """Module or parameter, with a ``*`` for each number, to the style in which transformers shards it."""
    if hasattr(model, "peft_config"):
        raise ValueError(f"--layout with {kind} is not known for a PEFT adapter: explain its base model")
    plan = getattr(model, f"_{kind}_plan", None) or {}
    if not plan or (kind == "ep" and "ep_dispatch_experts" not in plan.values()):
        raise ValueError(f"transformers has no {kind} plan for {type(model).__name__}: leave {kind} out of --layout")
    return plan


def _style(parameter: str, plan: Mapping[str, str]) -> str | None:
    name = re.sub(r"\.\d+(\.|$)", r".*\1", parameter)
    return plan.get(name, plan.get(name.rpartition(".")[0]))


def _placement(name: str, p: Tensor, style: str | None) -> Placement:
    """What a style of transformers' plans does with a parameter (transformers/distributed/tensor_parallel.py)."""
    out, last = max(p.ndim - 2, 0), p.ndim - 1
    match style:
        case "colwise" | "colwise_gather_output" | "colwise_rep":
            return Shard(out)
        case "rowwise" | "rowwise_split_input" | "rowwise_rep":
            return Replicate() if name.endswith(".bias") else Shard(last)
        case "packed_colwise":
            return StridedShard(out, 2) if p.ndim > 1 else Shard(0)
        case "packed_rowwise":
            return StridedShard(last, 2) if p.ndim > 1 else Replicate()
        case "embedding_rowwise" | "grouped_gemm":
            return Shard(0)
        case "embedding_colwise":
            return Shard(1)
        case None | "replicate" | "replicated_with_grad_allreduce" | "sequence_parallel" | "all_reduce":
            return Replicate()
        case "mla_kv_a_proj" | "moe_tp_experts" | "moe_identity_expert" | "local_params" | "ep_dispatch_experts":
            return Replicate()
    raise ValueError(f"{name} is sharded in the style {style!r}, which hf_cwd does not know: leave tp out of --layout")


def entries(
    model: nn.Module,
    routing: Routing,
    layout: Parallelism,
    *,
    arguments: Mapping[str, Any],
    dtype: torch.dtype,
    device: str,
) -> list[Entry]:
    """What :func:`hf_cwd.sharding.plan.plan` takes: the matrices in the order of the Trainer's optimizer.

    Args:
        arguments: keyword arguments of the optimizer.
        dtype: of the parameters.
        device: type of the device that trains.
    """
    from transformers import Trainer

    names = {p: name for name, p in model.named_parameters()}
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # it asks the Trainer for nothing
    trained = [p for p in names if p.requires_grad]
    parts = ([p for p in trained if (names[p] in decayed) == wanted] for wanted in (True, False))
    groups = routing([{"params": part} for part in parts])
    meshes = shardings(model, layout)
    result: list[Entry] = []
    for group in groups:
        rule = RULES[group["algorithm"]]
        if rule.matrix is None:
            continue
        hyper = {name: arguments.get(name, kind.default) for name, kind in rule.hyperparameters.items()}
        stage = Stage.of(rule.name, hyper)
        matrices = Layout() if group["layout"] is None else Layout(**group["layout"])
        for p in group["params"]:
            wire = stage.wire(eager.wide(dtype), device)
            result.append(Entry(names[p], tuple(p.shape), matrices, meshes[names[p]], stage, wire, source=len(result)))
    return result


class Cost(NamedTuple):
    """Of one rank: bytes that it keeps, bytes at the peak of an exchange, and what it receives and does in a step."""

    weights: int
    gradients: int
    states: int
    buffers: int
    received: int
    flops: int


def costs(
    model: nn.Module, meshes: Mapping[str, Mesh], plan: Plan | None, *, states: Mapping[str, int], dtype: torch.dtype
) -> list[Cost]:
    """The cost of each rank.

    Args:
        plan: of the matrices; None if there are none.
        states: bytes of state that an element of each parameter has.
    """
    world = len(next(iter(meshes.values())).ranks)
    kept = [[0, 0, 0] for _ in range(world)]
    for name, p in model.named_parameters():
        for of_rank, numel in zip(kept, local_sizes(tuple(p.shape), meshes[name]), strict=True):
            size = numel * dtype.itemsize
            of_rank[0] += size
            of_rank[1] += size * p.requires_grad
            of_rank[2] += numel * states[name]
    if plan is None:
        return [Cost(*of_rank, 0, 0, 0) for of_rank in kept]
    peaks = buffers(plan)
    return [Cost(*kept[r], peaks[r], plan.received[r], plan.flops[r]) for r in range(world)]


@cache
def local_sizes(shape: Shape, mesh: Mesh) -> list[int]:
    """How many elements each rank holds."""
    return [sum(prod(piece.size) for piece in mesh.pieces(shape, rank)) for rank in mesh.ranks]


def buffers(plan: Plan) -> list[int]:
    """Bytes of each rank at the peak of its exchange: directions, whole matrices, and what is being sent and received.

    As :class:`hf_cwd.sharding.exchange.Exchange` goes about it on accelerators: while a round is worked on, either the
    results of the one before or the parts of the one after are under way. Without the orthogonalisation's own
    temporaries, and without matrices that do not move.
    """
    ranks = range(len(plan.received))
    gathered, whole, returned = ([[0] * plan.rounds for _ in ranks] for _ in range(3))
    # Directions that exist before, and after, the previous round's results have been taken.
    before, after = ([[0] * (plan.rounds + 2) for _ in ranks] for _ in range(2))
    alive: dict[tuple[int, int], list[int]] = {}
    for job in plan.jobs:
        if job.round is None:
            continue
        entry, k = plan.entries[job.entry], job.round
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
            span = alive.setdefault((job.entry, rank), [k, k])
            span[0], span[1] = min(span[0], k), max(span[1], k)
    for (number, rank), (first, last) in alive.items():
        entry = plan.entries[number]
        size = local_sizes(entry.shape, entry.sharding)[rank] * entry.dtype.itemsize
        for k in range(first, last + 2):
            before[rank][k] += size
        for k in range(max(first - 1, 0), last + 1):
            after[rank][k] += size
    peaks = []
    for rank in ranks:
        # One more round at the end, in which nothing comes, and one before the first, of which nothing returns.
        coming, back = [*gathered[rank], 0], [0, *returned[rank]]
        moments = [0]
        for k in range(plan.rounds):
            moments.append(whole[rank][k] + coming[k] + back[k] + before[rank][k])
            moments.append(whole[rank][k] + coming[k + 1] + back[k + 1] + after[rank][k])
        peaks.append(max(moments))
    return peaks


def positions(values: Sequence[Hashable]) -> dict[Any, list[int]]:
    """Where each value stands."""
    result: dict[Any, list[int]] = {}
    for position, value in enumerate(values):
        result.setdefault(value, []).append(position)
    return result
