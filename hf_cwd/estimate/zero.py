"""What DeepSpeed's ZeRO makes of a model, from its configuration alone: flat tensors, and what each rank keeps of it.

As DeepSpeed 0.19.8 does it with what hf_cwd's configs/deepspeed say, and without gradient accumulation, which keeps
more: stage 2 has two sets of gradients while one is added to the other, and with optimizer offload stages 1 and 2 keep
one more in the CPU's memory.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_cwd.distributed.flat_geometry import Held, stage_3, stages_1_2
from hf_cwd.distributed.geometry import Shape
from hf_cwd.distributed.plan import Entry
from hf_cwd.estimate.costs import Group, Kept
from hf_cwd.estimate.layouts import Zero

SUB_GROUP_SIZE = 10**9  # DeepSpeed's default sub_group_size: stage 3 ends a flat tensor where a rank has so many
PERSISTENT = 10**5  # and its default stage3_param_persistence_threshold
MASTER = torch.float32


class Flat(NamedTuple):
    """Flat tensors, one on each rank and of equal sizes, that are stepped together.

    Attributes:
        group: the parameters that lie in them are of it.
        params: those.
        numel: elements of each, with padding.
    """

    group: Group
    params: list[Held]
    numel: int


def flat_tensors(groups: Sequence[Group], layout: Zero) -> list[Flat]:
    """In the order in which DeepSpeed steps them."""
    result = []
    for group in groups:
        if layout.stage < 3:
            params = stages_1_2(group.params, layout.world)
            result.append(Flat(group, params, params[0].sharding.part))
        else:
            for params in stage_3(group.params, layout.world, SUB_GROUP_SIZE):
                result.append(Flat(group, params, sum(param.sharding.part for param in params)))
    return result


def entries(flat: Flat, *, arguments: Mapping[str, Any], device: str) -> list[Entry]:
    """What :func:`hf_cwd.distributed.plan.plan` takes: the matrices in these flat tensors, of a rule for matrices.

    Args:
        arguments: keyword arguments of the optimizer.
        device: type of the device that trains.
    """
    stage = flat.group.stage(arguments)
    wire = stage.wire(MASTER, device)
    return [
        Entry(name, shape, flat.group.layout, sharding, stage, wire, source=0, offset=offset)
        for name, shape, sharding, offset in flat.params
    ]


def kept(
    model: nn.Module,
    flats: Sequence[Flat],
    layout: Zero,
    *,
    states: Mapping[str, int],
    dtype: torch.dtype,
) -> list[Kept]:
    """What each rank keeps at the end of a backward pass.

    The states include masters of a rank's part, also where the weights are float32. Stages 1 and 2 have all weights, in
    a buffer for each group; under offload the states include a copy of the part in the weights' dtype, on its way back
    to the device. Gradients are whole at stage 1; stage 2 keeps that of a parameter on all ranks that have a part of
    it, whole. Stage 3 has a part of each parameter, of frozen ones too, and small ones whole as well. Offloaded
    gradients are float32, at stage 3 beside those in the weights' dtype.

    Args:
        states: bytes of state that an element of each parameter has, which in a flat tensor is float32.
        dtype: of the weights.
    """
    size, ranks = dtype.itemsize, range(layout.world)
    trained = {param.name for flat in flats for param in flat.params}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    whole = sum(prod(shape) for name, shape in shapes.items() if name not in trained) * size  # frozen ones
    gradients = [0 for _ in ranks]
    if layout.stage == 3:
        threshold = persistent(model)
        whole = sum(_part(shape, layout) for shape in shapes.values()) * size
        whole += sum(prod(shape) for shape in shapes.values() if prod(shape) <= threshold) * size
    own = 0
    for flat in flats:
        own += flat.numel * (MASTER.itemsize + states[flat.params[0].name])
        if layout.stage < 3:
            whole += flat.numel * layout.world * size
            own += flat.numel * size * layout.offload
        for rank, numel in enumerate(_gradients(flat, layout)):
            gradients[rank] += numel * size + flat.numel * MASTER.itemsize * layout.offload
    return [Kept(whole, gradients[rank], own) for rank in ranks]


def _gradients(flat: Flat, layout: Zero) -> list[int]:
    """Elements of the gradients in the weights' dtype that each rank has of the parameters in a flat tensor."""
    if layout.stage == 1:
        return [sum(prod(param.shape) for param in flat.params)] * layout.world
    if layout.stage == 3:
        return [flat.numel] * layout.world
    result = [0] * layout.world
    if layout.offload:  # on their way to the CPU's memory, bucket by bucket
        return result
    for param in flat.params:
        for rank in param.sharding.holders(param.shape):
            result[rank] += prod(param.shape)
    held = sum(prod(param.shape) for param in flat.params)
    for rank in range(held // flat.numel, layout.world):  # zeros in the place of what the group lacks
        result[rank] += min((rank + 1) * flat.numel - held, flat.numel)
    return result


def _part(shape: Shape, layout: Zero) -> int:
    return stage_3([("", shape)], layout.world, SUB_GROUP_SIZE)[0][0].sharding.part


def persistent(model: nn.Module) -> int:
    """The most elements of a parameter that every rank keeps whole at stage 3.

    As transformers and Accelerate fill in ``"stage3_param_persistence_threshold": "auto"``.
    """
    config = getattr(model, "config", None)
    for found in (config, getattr(config, "text_config", None)):
        hidden = getattr(found, "hidden_size", None) or max(getattr(found, "hidden_sizes", None) or [0])
        if hidden:
            return 10 * hidden
    return PERSISTENT


def remarks(model: nn.Module, flats: Sequence[Flat], layout: Zero, *, dtype: torch.dtype, device: str) -> list[str]:
    """What to know of the table."""
    name = str(dtype).removeprefix("torch.")
    lines = ["The states include float32 masters of a rank's part of the weights"]
    if layout.stage == 3:
        lines.append(
            f"Parameters of up to {persistent(model):,} elements are kept whole as well "
            "(stage3_param_persistence_threshold)"
        )
    if layout.stage == 2 and not layout.offload:
        lines.append("Of each parameter that a rank has a part of, it has the whole gradient")
    if layout.offload:
        if layout.stage < 3:
            lines[0] += f", and a {name} copy of it"
        gradients = "the gradients"
        if layout.stage == 1:
            part = sum(flat.numel for flat in flats) * MASTER.itemsize
            gradients = f"{part / 2**20:,.1f} MiB of the gradients"
        directions = "" if device == "cpu" else ", and the directions of matrices, which buffers leave out"
        lines.append(f"In the CPU's memory: the states, {gradients}{directions}")
    largest = max(flat.numel for flat in flats) * MASTER.itemsize / 2**20
    lines.append(
        f"DeepSpeed steps {len(flats)} flat tensor{'s' if len(flats) > 1 else ''} in turn"
        + ("" if layout.offload else f", and has up to {largest:,.1f} MiB more for one's gradient in float32")
    )
    return lines
