"""Spreads the parameters of the injected-gradients table over ranks, by the frameworks' own code."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from tests.distributed.given_gradients.tables import PARAMETERS


class Model(nn.Module):
    """The parameters of the table."""

    def __init__(self, values: dict[str, torch.Tensor]):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        for name, value in values.items():
            self.set(name, value.clone())

    def set(self, name: str, value: torch.Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        self.get_submodule(module).register_parameter(leaf, nn.Parameter(value))


@cache
def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh(
        "cpu", shape or (dist.get_world_size(),), mesh_dim_names=("outer", "inner")[: len(shape) or 1]
    )


@cache
def mesh_of(*ranks: Any) -> DeviceMesh:
    return DeviceMesh("cpu", torch.tensor(ranks))


def distribute(model: Model, on: DeviceMesh, placements: Callable[[str, nn.Parameter], list[Any] | None]) -> None:
    """Makes DTensors of the parameters for which ``placements`` has an answer."""
    for name, p in list(model.named_parameters()):
        if not isinstance(p.data, DTensor) and (wanted := placements(name, p)):
            model.set(name, distribute_tensor(p.detach(), on, wanted, src_data_rank=None))


def plain(model: Model) -> None:
    """Each rank's own."""


def ddp(model: Model) -> None:
    """The same; injected_ranks.py marks them as replicas, as the Trainer's guard does under DDP."""


def replicated(model: Model) -> None:
    distribute(model, mesh(), lambda name, p: [Replicate()])


def fsdp2(model: Model) -> None:
    fully_shard(model, mesh=mesh())


def fsdp2_columns(model: Model) -> None:
    """FSDP2 cuts other dimensions than the first into even parts only."""

    def place(p: nn.Parameter) -> Shard:
        return Shard(1 if p.ndim > 1 and p.size(1) % dist.get_world_size() == 0 else 0)

    fully_shard(model, mesh=mesh(), shard_placement_fn=place)


def parallel_linear(model: Model, on: DeviceMesh) -> None:
    parallelize_module(model, on, {"up": ColwiseParallel(), "down": RowwiseParallel()}, src_data_rank=None)


def tp(model: Model) -> None:
    """The other parameters stay plain ones."""
    parallel_linear(model, mesh())


def rows(model: Model) -> None:
    distribute(model, mesh(), lambda name, p: [Shard(0)])


def last(model: Model) -> None:
    distribute(model, mesh(), lambda name, p: [Shard(p.ndim - 1)])


def packed(model: Model) -> None:
    """Gate beside up, each cut into the ranks' parts, as transformers' tensor parallelism has them."""
    cut = {"gate_up": 0, "qkv": 0, "experts_gate_up": 1}
    distribute(model, mesh(), lambda name, p: [_StridedShard(cut[name], split_factor=2)] if name in cut else None)
    parallel_linear(model, mesh())


def whole_experts(model: Model) -> None:
    distribute(model, mesh(), lambda name, p: [Shard(0)] if name.startswith("experts") else None)


def reversed_ranks(model: Model) -> None:
    distribute(model, mesh_of(*reversed(range(dist.get_world_size()))), lambda name, p: [Shard(0)])


def mixed(model: Model) -> None:
    """Each parameter otherwise."""
    kinds = ([Shard(0)], [Replicate()], None, [Shard(1)], [_StridedShard(0, split_factor=2)])
    chosen = {name: kinds[i % len(kinds)] for i, name in enumerate(PARAMETERS)}
    distribute(model, mesh(), lambda name, p: chosen[name] if p.ndim > 1 else None)


def hsdp(model: Model) -> None:
    fully_shard(model, mesh=mesh(2, 2))


def hsdp_crossed(model: Model) -> None:
    """Neighbours are neither in one replica nor in one place of theirs."""
    distribute(model, mesh_of((1, 3), (0, 2)), lambda name, p: [Replicate(), Shard(0)])


def tp_tp_crossed(model: Model) -> None:
    distribute(model, mesh_of((0, 2), (1, 3)), lambda name, p: [Shard(0), Shard(p.ndim - 1)])


def fsdp2_tp(model: Model) -> None:
    parallel_linear(model, mesh(2, 2)["inner"])
    cut = {"gate_up": 0, "experts_gate_up": 1}
    for name, p in list(model.named_parameters()):
        if name in cut:
            model.set(name, distribute_tensor(p.detach(), mesh(2, 2)["inner"], [Shard(cut[name])], src_data_rank=None))
    fully_shard(model, mesh=mesh(2, 2)["outer"])


def tp_of_fsdp(model: Model) -> None:
    """Some parameters lie on one dimension of a mesh only, and its other one holds copies of them."""
    outer = {"odd": Shard(0), "qkv": Shard(1), "few": Shard(0), "experts": Shard(0), "norm": Shard(0)}
    distribute(model, mesh(2, 2)["outer"], lambda name, p: [outer[name]] if name in outer else None)
    distribute(model, mesh(2, 2), lambda name, p: [Shard(0), Shard(1)] if name in ("conv1d", "gate_up") else None)
    parallel_linear(model, mesh(2, 2)["inner"])


def experts_fsdp2(model: Model) -> None:
    """Experts are dealt out to ranks, and each rank's are cut by FSDP2 once more."""
    distribute(model, mesh(2, 2)["inner"], lambda name, p: [Shard(0)] if name.startswith("experts") else None)
    fully_shard(model, mesh=mesh(2, 2)["outer"])
