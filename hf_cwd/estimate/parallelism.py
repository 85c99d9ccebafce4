"""A layout of a training: the number of ranks of each kind of parallelism, and the sharding of each parameter."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

from torch import Tensor, nn

from hf_cwd.distributed.geometry import Mesh, Placement, Replicate, Shape, Shard, StridedShard

# Ranks are numbered in this order: neighbours are in the same tensor-parallel group.
DIMENSIONS = ("ddp", "fsdp2", "tp", "ep")


@dataclass(frozen=True)
class Parallelism:
    """The number of ranks of each kind of parallelism. The ranks of ``ep`` are ranks of ``fsdp2`` and ``tp``.

    Example:
        >>> from hf_cwd.estimate.parallelism import Parallelism
        >>> layout = Parallelism(ddp=4, fsdp2=8)
        >>> print(layout, layout.world)
        ddp=4,fsdp2=8 32
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
        >>> from hf_cwd.estimate.parallelism import Zero
        >>> print(Zero(stage=3, world=8, offload=True))
        zero3_offload=8
    """

    stage: int
    world: int
    offload: bool

    def __str__(self) -> str:
        return f"zero{self.stage}{'_offload' if self.offload else ''}={self.world}"


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
        raise ValueError(f"a layout with {dimension} is not known for a PEFT adapter: take its base model")
    plan = getattr(model, f"_{dimension}_plan", None) or {}
    if not plan or (dimension == "ep" and "ep_dispatch_experts" not in plan.values()):
        raise ValueError(
            f"transformers has no {dimension} plan for {type(model).__name__}: leave {dimension} out of the layout"
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
    raise ValueError(
        f"{name} is sharded in the style {style!r}, which hf_cwd does not know: leave tp out of the layout"
    )
