"""The parallelism that ``--layout`` describes: the number of ranks of each kind, and the sharding of each parameter."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

from torch import Tensor, nn

from hf_cwd.distributed.geometry import Mesh, Placement, Replicate, Shape, Shard, StridedShard

# Ranks are numbered in this order: neighbours are in the same tensor-parallel group.
DIMENSIONS = ("ddp", "fsdp2", "tp", "ep")
ZERO = tuple(f"zero{stage}{suffix}" for suffix in ("", "_offload") for stage in (1, 2, 3))
RANKS = 100_000  # more would take minutes to compute
GRAMMAR = (
    "ddp, fsdp2, tp, or several of them with their sizes: ddp=128,fsdp2=8 (HSDP: 128 replicas of 8 shards), "
    "fsdp2=128,tp=8, fsdp2=128,tp=8,ep=64 (ep: experts, over the ranks of fsdp2 and tp). Or one of DeepSpeed's zero1, "
    "zero2 and zero3, with _offload for an optimizer in the CPU's memory: zero3=8, zero2_offload=8. One of ddp, fsdp2, "
    "tp and zero may have no size if --world is given"
)


@dataclass(frozen=True)
class Parallelism:
    """The number of ranks of each kind of parallelism. The ranks of ``ep`` are ranks of ``fsdp2`` and ``tp``.

    Example:
        >>> from hf_cwd.estimate.parallelism import parse_layout
        >>> print(parse_layout("ddp=4,fsdp2", 32))
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
    """DeepSpeed's ZeRO over all ranks. With ``offload`` the optimizer is in the CPU's memory.

    Example:
        >>> from hf_cwd.estimate.parallelism import parse_layout
        >>> parse_layout("zero3_offload", 8)
        Zero(stage=3, world=8, offload=True)
    """

    stage: int
    world: int
    offload: bool

    def __str__(self) -> str:
        return f"zero{self.stage}{'_offload' if self.offload else ''}={self.world}"


def parse_layout(text: str, world: int | None) -> Parallelism | Zero:
    """Parses ``--layout`` and ``--world``.

    Raises:
        ValueError: the text does not follow the grammar, or the sizes do not fit together.
    """
    if world is not None and not 1 <= world <= RANKS:
        raise ValueError(f"--world {world}: give the number of ranks, which is from 1 to {RANKS:,}")
    sizes = _sizes(text)
    zero = next((name for name in ZERO if name in sizes), None)
    if zero is not None and len(sizes) > 1:
        others = " and ".join(name for name in sizes if name != zero)
        raise ValueError(
            f"--layout {text!r}: {zero} is over all ranks, and has not been tried together with {others}: leave "
            f"{others} out, or {zero}"
        )
    complete = _with_open_size(text, sizes, world)
    result = Parallelism(**complete) if zero is None else Zero(int(zero[4]), complete[zero], zero.endswith("_offload"))
    _check_size(text, result.world, world)
    if zero is None and (result.fsdp2 * result.tp % result.ep or (result.ep > 1 and result.ep % result.tp)):
        raise ValueError(f"--layout {text!r}: ep must be a multiple of tp, and a divisor of fsdp2 x tp")
    return result


def _sizes(text: str) -> dict[str, int | None]:
    """The sizes in ``--layout`` by name; None for a name without a size."""
    sizes: dict[str, int | None] = {}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(rf"({'|'.join((*DIMENSIONS, *ZERO))})(?:=([1-9]\d*))?", part)
        if match is None or match[1] in sizes:
            raise ValueError(f"--layout {text!r}: {part!r} is not understood. Write {GRAMMAR}")
        sizes[match[1]] = None if match[2] is None else int(match[2])
    return sizes


def _with_open_size(text: str, sizes: Mapping[str, int | None], world: int | None) -> dict[str, int]:
    """The sizes, with the one that is missing computed from the number of ranks."""
    open_ = [name for name, size in sizes.items() if size is None]
    if "ep" in open_ or len(open_) > 1 or (open_ and world is None):
        missing = "ep" if "ep" in open_ else open_[0]
        raise ValueError(f"--layout {text!r}: say how many ranks {missing} has, {missing}=8, or give --world")
    if not open_:
        return dict(sizes)
    given = prod(size for name, size in sizes.items() if size is not None and name != "ep")
    if world % given:
        raise ValueError(f"--layout {text!r}: {given} does not divide --world {world}")
    return {**sizes, open_[0]: world // given}


def _check_size(text: str, size: int, world: int | None) -> None:
    if size > RANKS:
        raise ValueError(f"--layout {text!r} has {size:,} ranks: give {RANKS:,} at most")
    if world not in (None, size):
        raise ValueError(f"--layout {text!r} has {size} ranks, and --world is {world}: leave --world out")


def shardings(model: nn.Module, parallelism: Parallelism) -> dict[str, Mesh]:
    """The sharding of each parameter: torch's FSDP2 applied to the shards of transformers' plan for the model.

    Raises:
        ValueError: transformers has no plan, the plan has an unknown style, or a rank would hold a part of an attention
            head or of an expert.
    """
    tp_plan = _plan(model, "tp") if parallelism.tp > 1 else {}
    ep_plan = _plan(model, "ep") if parallelism.ep > 1 else {}
    # Tensor parallelism does not cut experts that expert parallelism distributes.
    tp_plan = {
        name: style
        for name, style in tp_plan.items()
        if not any(name == experts or name.startswith(f"{experts}.") for experts in ep_plan)
    }
    _check_heads(model, tp_plan, parallelism.tp)
    dense = (parallelism.ddp, parallelism.fsdp2, parallelism.tp)
    experts = (parallelism.ddp, parallelism.fsdp2 * parallelism.tp // parallelism.ep, parallelism.ep)
    result = {}
    for name, p in model.named_parameters():
        style = _style(name, ep_plan)
        shape, style = (dense, _style(name, tp_plan)) if style is None else (experts, style)
        inner = _placement(name, p, style)
        if style == "grouped_gemm" and p.size(0) % parallelism.ep:
            raise ValueError(f"ep={parallelism.ep} does not divide the {p.size(0)} experts of {name}")
        # FSDP2 cuts the shards of tensor parallelism. If both cut the first dimension, that is a strided shard.
        outer = StridedShard(0, shape[2]) if inner in _CUTS_FIRST and shape[2] > 1 else Shard(0)
        result[name] = _mesh(shape, (Replicate(), outer, inner))
    return result


# Projections into attention heads, and the key of the configuration that has the number of heads.
_HEADS = dict.fromkeys(
    ("q_proj", "q_b_proj", "kv_b_proj", "g_proj", "qkv_proj", "query_key_value"), "num_attention_heads"
)
_HEADS |= dict.fromkeys(("k_proj", "v_proj"), "num_key_value_heads")


def _check_heads(model: nn.Module, plan: Mapping[str, str], tp: int) -> None:
    """Raises ValueError if a rank's shard of a projection would end inside of an attention head.

    A projection whose output transformers gathers may be cut anywhere.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        path, _, projection = name.rpartition(".")
        if projection not in _HEADS or _style(f"{name}.weight", plan) != "colwise":
            continue
        counts = [getattr(getattr(modules[path], "config", None), _HEADS[projection], None)]
        head_dim = getattr(modules[path], "head_dim", None)
        if projection in ("q_proj", "k_proj", "v_proj") and isinstance(head_dim, int):  # layers can differ
            counts.append(module.weight.size(0) // head_dim)
        for heads in counts:
            if isinstance(heads, int) and heads % tp:
                raise ValueError(
                    f"tp={tp} does not divide the {heads} attention heads of {name} ({_HEADS[projection]}), and a rank "
                    "must have whole heads: give a tp that divides them"
                )


_CUTS_FIRST = (Shard(0), StridedShard(0, 2))


@cache
def _mesh(shape: Shape, placements: tuple[Placement, ...]) -> Mesh:
    return Mesh(shape, tuple(range(prod(shape))), placements)


def _plan(model: nn.Module, dimension: str) -> dict[str, str]:
    """transformers' plan: the style of sharding by module or parameter, with a ``*`` for each number in the name."""
    if hasattr(model, "peft_config"):
        raise ValueError(f"--layout with {dimension} is not known for a PEFT adapter: explain its base model")
    plan = getattr(model, f"_{dimension}_plan", None) or {}
    if not plan or (dimension == "ep" and "ep_dispatch_experts" not in plan.values()):
        raise ValueError(
            f"transformers has no {dimension} plan for {type(model).__name__}: leave {dimension} out of --layout"
        )
    return plan


def _style(parameter: str, plan: Mapping[str, str]) -> str | None:
    name = re.sub(r"\.\d+(\.|$)", r".*\1", parameter)
    return plan.get(name, plan.get(name.rpartition(".")[0]))


def _placement(name: str, p: Tensor, style: str | None) -> Placement:
    """The placement of a parameter by the style in transformers' plan (transformers/distributed/tensor_parallel.py)."""
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
