"""What ``--layout`` says: how many ranks of what, and which parts of a model's parameters each of them holds."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

from torch import Tensor, nn

from hf_cwd.distributed.geometry import Mesh, Placement, Replicate, Shape, Shard, StridedShard

# In the order in which ranks are numbered: neighbours are in the same group of tensor parallelism.
DIMENSIONS = ("ddp", "fsdp2", "tp", "ep")
ZERO = tuple(f"zero{stage}{suffix}" for suffix in ("", "_offload") for stage in (1, 2, 3))
RANKS = 100_000  # more would be computed for minutes, and no cluster has them
GRAMMAR = (
    "ddp, fsdp2, tp, or several of them with their sizes: ddp=128,fsdp2=8 (HSDP: 128 replicas of 8 shards), "
    "fsdp2=128,tp=8, fsdp2=128,tp=8,ep=64 (ep: experts, over ranks of fsdp2 and tp). Or DeepSpeed's zero1, zero2 or "
    "zero3, alone, with _offload where the optimizer is in the CPU's memory: zero3=8, zero2_offload=8. One of ddp, "
    "fsdp2, tp and zero may go without a size where --world is given"
)


@dataclass(frozen=True)
class Parallelism:
    """How many ranks each kind of parallelism has; those of ``ep`` are ranks of ``fsdp2`` and ``tp``.

    Example:
        >>> from hf_cwd.estimate.layouts import parallelism
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


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's ZeRO over all ranks; ``offload``: the optimizer is in the CPU's memory.

    Example:
        >>> from hf_cwd.estimate.layouts import parallelism
        >>> parallelism("zero3_offload", 8)
        Zero(stage=3, world=8, offload=True)
    """

    stage: int
    world: int
    offload: bool

    def __str__(self) -> str:
        return f"zero{self.stage}{'_offload' if self.offload else ''}={self.world}"


def parallelism(text: str, world: int | None) -> Parallelism | Zero:
    """Reads ``--layout`` and ``--world``.

    Raises:
        ValueError: not in the grammar, or sizes that do not go together.
    """
    if world is not None and not 1 <= world <= RANKS:
        raise ValueError(f"--world {world}: give the number of ranks, which is from 1 to {RANKS:,}")
    sizes: dict[str, int | None] = {}
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(rf"({'|'.join((*DIMENSIONS, *ZERO))})(?:=([1-9]\d*))?", part)
        if found is None or found[1] in sizes:
            raise ValueError(f"--layout {text!r}: {part!r} is not understood. Write {GRAMMAR}")
        sizes[found[1]] = None if found[2] is None else int(found[2])
    zero = next((name for name in ZERO if name in sizes), None)
    if zero is not None and len(sizes) > 1:
        others = " and ".join(name for name in sizes if name != zero)
        raise ValueError(
            f"--layout {text!r}: {zero} is over all ranks, and has not been tried together with {others}: leave "
            f"{others} out, or {zero}"
        )
    open_ = [name for name, size in sizes.items() if size is None]
    known = prod(size for name, size in sizes.items() if size is not None and name != "ep")
    if "ep" in open_ or len(open_) > 1 or (open_ and world is None):
        missing = "ep" if "ep" in open_ else open_[0]
        raise ValueError(f"--layout {text!r}: say how many ranks {missing} has, {missing}=8, or give --world")
    if open_:
        if world % known:
            raise ValueError(f"--layout {text!r}: {known} does not divide --world {world}")
        sizes[open_[0]] = world // known
    result = Parallelism(**sizes) if zero is None else Zero(int(zero[4]), sizes[zero], zero.endswith("_offload"))
    _check_size(text, result.world, world)
    if zero is None and (result.fsdp2 * result.tp % result.ep or (result.ep > 1 and result.ep % result.tp)):
        raise ValueError(f"--layout {text!r}: ep must be a multiple of tp, and a divisor of fsdp2 x tp")
    return result


def _check_size(text: str, size: int, world: int | None) -> None:
    if size > RANKS:
        raise ValueError(f"--layout {text!r} has {size:,} ranks: give {RANKS:,} at most")
    if world not in (None, size):
        raise ValueError(f"--layout {text!r} has {size} ranks, and --world is {world}: leave --world out")


def shardings(model: nn.Module, layout: Parallelism) -> dict[str, Mesh]:
    """The sharding of each parameter: that of torch's FSDP2 over that of transformers' plan for the model.

    Raises:
        ValueError: transformers has no such plan, or one that is not known here, or one by which a rank would hold a
            part of an attention head or of an expert.
    """
    tp_plan = _plan(model, "tp") if layout.tp > 1 else {}
    ep_plan = _plan(model, "ep") if layout.ep > 1 else {}
    # Experts that are dealt out whole are not cut by tensor parallelism too.
    tp_plan = {
        name: style
        for name, style in tp_plan.items()
        if not any(name == experts or name.startswith(f"{experts}.") for experts in ep_plan)
    }
    _check_heads(model, tp_plan, layout.tp)
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


# Projections into attention heads, and the key of the configuration that counts those.
_HEADS = dict.fromkeys(
    ("q_proj", "q_b_proj", "kv_b_proj", "g_proj", "qkv_proj", "query_key_value"), "num_attention_heads"
)
_HEADS |= dict.fromkeys(("k_proj", "v_proj"), "num_key_value_heads")


def _check_heads(model: nn.Module, plan: Mapping[str, str], tp: int) -> None:
    """Raises ValueError where a rank's part of a projection ends inside of a head, which its attention cannot reshape.

    What transformers gathers behind a projection may be cut anywhere.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        path, _, kind = name.rpartition(".")
        if kind not in _HEADS or _style(f"{name}.weight", plan) != "colwise":
            continue
        counts = [getattr(getattr(modules[path], "config", None), _HEADS[kind], None)]
        head_dim = getattr(modules[path], "head_dim", None)
        if kind in ("q_proj", "k_proj", "v_proj") and isinstance(head_dim, int):  # they can differ by layer
            counts.append(module.weight.size(0) // head_dim)
        for heads in counts:
            if isinstance(heads, int) and heads % tp:
                raise ValueError(
                    f"tp={tp} does not divide the {heads} attention heads of {name} ({_HEADS[kind]}), of which a rank "
                    "gets whole ones: give a tp that does"
                )


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
