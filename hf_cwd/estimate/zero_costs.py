"""The flat tensors and the memory of each rank under DeepSpeed's ZeRO.

This follows DeepSpeed 0.19.8 with the configurations in configs/deepspeed, without gradient accumulation. Accumulation
needs more memory: stage 2 has two sets of gradients while it adds one to the other, and with optimizer offload stages 1
and 2 keep one more set in the CPU's memory.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_cwd.distributed.flat_geometry import ShardedParam, stage_3, stages_1_2
from hf_cwd.distributed.geometry import Shape
from hf_cwd.distributed.plan import Entry
from hf_cwd.estimate.costs import Group, RankMemory
from hf_cwd.estimate.parallelism import Zero

SUB_GROUP_SIZE = 10**9  # DeepSpeed's default sub_group_size: the most elements of a rank's flat tensor at stage 3
PERSISTENCE_THRESHOLD = 10**5  # DeepSpeed's default stage3_param_persistence_threshold
MASTER = torch.float32


class FlatTensor(NamedTuple):
    """A flat tensor: each rank has one of the same size, and all are stepped together.

    Attributes:
        group: the parameter group.
        params: the parameters of the group that are in the flat tensor.
        numel: its number of elements, including padding.
    """

    group: Group
    params: list[ShardedParam]
    numel: int


def flat_tensors(groups: Sequence[Group], parallelism: Zero) -> list[FlatTensor]:
    """The flat tensors, in the order in which DeepSpeed steps them."""
    result = []
    for group in groups:
        if parallelism.stage < 3:
            params = stages_1_2(group.params, parallelism.world)
            result.append(FlatTensor(group, params, params[0].sharding.part))
        else:
            for params in stage_3(group.params, parallelism.world, SUB_GROUP_SIZE):
                result.append(FlatTensor(group, params, sum(param.sharding.part for param in params)))
    return result


def entries(flat: FlatTensor, *, arguments: Mapping[str, Any], device: str) -> list[Entry]:
    """The matrices in a flat tensor whose rule has a matrix stage, for :func:`hf_cwd.distributed.plan.plan`.

    Args:
        arguments: keyword arguments of the optimizer.
        device: the type of the devices that train.
    """
    stage = flat.group.stage(arguments)
    wire = stage.wire(MASTER, device)
    return [
        Entry(name, shape, flat.group.layout, sharding, stage, wire, source=0, offset=offset)
        for name, shape, sharding, offset in flat.params
    ]


def memory(
    model: nn.Module,
    flats: Sequence[FlatTensor],
    parallelism: Zero,
    *,
    states: Mapping[str, int],
    dtype: torch.dtype,
) -> list[RankMemory]:
    """The memory of each rank at the end of a backward pass.

    - Weights: stages 1 and 2 have all of them, in a buffer for each group. Stage 3 has a part of each parameter, also
      of frozen ones, and small parameters whole as well.
    - Gradients: stage 1 has all of them. Stage 2 has the whole gradient of each parameter that the rank has a part of.
      Stage 3 has parts. Offloaded gradients are float32; stage 3 keeps the ones in the weights' dtype as well.
    - States: they include float32 masters of the rank's part, also if the weights are float32. With offload, stages 1
      and 2 also have a copy of the part in the weights' dtype, which is sent back to the device.

    Args:
        states: bytes of optimizer state for each element of a parameter; flat tensors are float32.
        dtype: the dtype of the weights.
    """
    size, ranks = dtype.itemsize, range(parallelism.world)
    trained = {param.name for flat in flats for param in flat.params}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    whole = sum(prod(shape) for name, shape in shapes.items() if name not in trained) * size  # frozen ones
    gradients = [0 for _ in ranks]
    if parallelism.stage == 3:
        threshold = persistence_threshold(model)
        whole = sum(_part(shape, parallelism) for shape in shapes.values()) * size
        whole += sum(prod(shape) for shape in shapes.values() if prod(shape) <= threshold) * size
    own = 0
    for flat in flats:
        own += flat.numel * (MASTER.itemsize + states[flat.params[0].name])
        if parallelism.stage < 3:
            whole += flat.numel * parallelism.world * size
            own += flat.numel * size * parallelism.offload
        for rank, numel in enumerate(_gradients(flat, parallelism)):
            gradients[rank] += numel * size + flat.numel * MASTER.itemsize * parallelism.offload
    return [RankMemory(whole, gradients[rank], own) for rank in ranks]


def _gradients(flat: FlatTensor, parallelism: Zero) -> list[int]:
    """The number of gradient elements in the weights' dtype that each rank has for a flat tensor's parameters."""
    if parallelism.stage == 1:
        return [sum(prod(param.shape) for param in flat.params)] * parallelism.world
    if parallelism.stage == 3:
        return [flat.numel] * parallelism.world
    result = [0] * parallelism.world
    if parallelism.offload:  # sent to the CPU's memory bucket by bucket
        return result
    for param in flat.params:
        for rank in param.sharding.holders(param.shape):
            result[rank] += prod(param.shape)
    held = sum(prod(param.shape) for param in flat.params)
    for rank in range(held // flat.numel, parallelism.world):  # zeros for the padding
        result[rank] += min((rank + 1) * flat.numel - held, flat.numel)
    return result


def _part(shape: Shape, parallelism: Zero) -> int:
    return stage_3([("", shape)], parallelism.world, SUB_GROUP_SIZE)[0][0].sharding.part


def persistence_threshold(model: nn.Module) -> int:
    """The most elements that a parameter may have if every rank keeps it whole at stage 3.

    transformers and Accelerate set this value for ``"stage3_param_persistence_threshold": "auto"``.
    """
    config = getattr(model, "config", None)
    for each in (config, getattr(config, "text_config", None)):
        hidden = getattr(each, "hidden_size", None) or max(getattr(each, "hidden_sizes", None) or [0])
        if hidden:
            return 10 * hidden
    return PERSISTENCE_THRESHOLD


def remarks(
    model: nn.Module, flats: Sequence[FlatTensor], parallelism: Zero, *, dtype: torch.dtype, device: str
) -> list[str]:
    """Notes on the table, for the reader."""
    name = str(dtype).removeprefix("torch.")
    lines = ["The states include float32 masters of a rank's part of the weights"]
    if parallelism.stage == 3:
        lines.append(
            f"Parameters of up to {persistence_threshold(model):,} elements are kept whole as well "
            "(stage3_param_persistence_threshold)"
        )
    if parallelism.stage == 2 and not parallelism.offload:
        lines.append("A rank has the whole gradient of each parameter that it has a part of")
    if parallelism.offload:
        if parallelism.stage < 3:
            lines[0] += f", and a {name} copy of it"
        gradients = "the gradients"
        if parallelism.stage == 1:
            part = sum(flat.numel for flat in flats) * MASTER.itemsize
            gradients = f"{part / 2**20:,.1f} MiB of the gradients"
        directions = "" if device == "cpu" else ", and the directions of matrices, which buffers leave out"
        lines.append(f"In the CPU's memory: the states, {gradients}{directions}")
    largest = max(flat.numel for flat in flats) * MASTER.itemsize / 2**20
    lines.append(
        f"DeepSpeed steps {len(flats)} flat tensor{'s' if len(flats) > 1 else ''} in turn"
        + ("" if parallelism.offload else f", and needs up to {largest:,.1f} MiB more for the float32 gradient of one")
    )
    return lines
