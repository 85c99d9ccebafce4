"""DeepSpeed ZeRO: which parts of which parameters lie in a rank's flat tensors. Only this module reads its attributes.

Under ZeRO an optimizer gets one-dimensional tensors that hold parts of many parameters. Stages 1 and 2 concatenate a
group's parameters and give each rank an equal part of the result; stage 3 gives each rank an equal part of each
parameter. Both add padding.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_cwd.distributed.flat_geometry import FlatSharding, ShardedParam

TESTED = "0.19.0 to 0.19.8"  # versions of DeepSpeed


class Fragment(NamedTuple):
    """This rank's part of one parameter: ``numel`` elements from ``offset`` of the flat tensor."""

    param: int
    offset: int
    numel: int


@dataclass(frozen=True)
class FlatShard:
    """What lies in one flat tensor of this rank, and in those of the others beside it.

    Attributes:
        params: the parameters that lie in it, or in another rank's tensor beside it, in the group's order.
        fragments: this rank's parts of them, by their place in the flat tensor; what lies between is padding.
        tensors: the model's parameters, of ``params``.
        device: that of the model, where its ranks communicate.
    """

    params: tuple[ShardedParam, ...]
    fragments: tuple[Fragment, ...]
    tensors: tuple[Tensor, ...]
    device: torch.device

    @property
    def numel(self) -> int:
        """Elements of this rank's flat tensor without padding."""
        return sum(fragment.numel for fragment in self.fragments)

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Offset and length of each fragment."""
        return tuple((offset, numel) for _, offset, numel in self.fragments)

    @cached_property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """Offset and length of each stretch without padding."""
        stretches: list[tuple[int, int]] = []
        for _, offset, numel in self.fragments:
            if stretches and sum(stretches[-1]) == offset:
                stretches[-1] = (stretches[-1][0], stretches[-1][1] + numel)
            else:
                stretches.append((offset, numel))
        return tuple(stretches)

    def cut(self, flat: Tensor) -> list[Tensor]:
        """The fragments of a tensor that lies as the flat one does; views."""
        return pick(flat, self.places)


def pick(flat: Tensor, extents: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views of some parts of a flat tensor, in its order."""
    sizes, place = [], 0
    for offset, numel in extents:
        sizes += [offset - place, numel]
        place = offset + numel
    return list(flat.detach().split([*sizes, flat.numel() - place]))[1::2]


def is_sharded(params: Sequence[Tensor]) -> bool:
    """Whether ZeRO keeps these parameters of a model in flat tensors."""
    return any(hasattr(p, "_hp_mapping") or getattr(p, "_z3_optimizer", None) is not None for p in params)


def flat_tensors(params: Sequence[Tensor]) -> list[Tensor]:
    """The flat tensors of some parameters under stage 3; otherwise none. Raises as :func:`flat_shard` does."""
    flats: dict[int, Tensor] = {}
    with _reading_deepspeed():
        for p in params:
            if (keeper := getattr(p, "_z3_optimizer", None)) is not None:
                sub_group, *_ = keeper.grad_position[keeper.get_param_id(p)]
                flat = keeper.fp32_partitioned_groups_flat[sub_group]
                flats[id(flat)] = flat
    return list(flats.values())


def flat_shard(flat: Tensor, params: Sequence[Tensor], names: Sequence[str]) -> FlatShard:
    """What of a group's parameters lies in a flat tensor; nothing is communicated.

    Args:
        flat: the flat tensor in the group.
        params: the model's parameters that the group was made of.
        names: of ``params``.

    Raises:
        ValueError: only some ranks hold the parameters, this version of DeepSpeed has other attributes, or a parameter
            is marked for DeepSpeed's own Muon.
    """
    own = [(p, name) for p, name in zip(params, names, strict=True) if is_sharded([p])]
    if not own:
        raise ValueError("none of the group's parameters is sharded by DeepSpeed")
    if marked := [name for p, name in own if getattr(p, "use_muon", False)]:
        raise ValueError(
            f"{marked[0]} has the attribute use_muon, by which DeepSpeed orthogonalises gradients itself, before they "
            "are clipped: its Muon and this one would both do it. Delete the attribute"
        )
    with _reading_deepspeed():
        find = _by_stage_3 if getattr(own[0][0], "_z3_optimizer", None) is not None else _by_stages_1_2
        held = find(flat, own)
        device = getattr(own[0][0], "ds_tensor", own[0][0]).device  # of stage 3 the empty one may lie anywhere
    rank = dist.get_rank()
    fragments = []
    for i, (_, param) in enumerate(held):
        start, stop = param.sharding.span(param.shape, rank)
        if start < stop:
            fragments.append(Fragment(i, param.offset + param.sharding.offset(rank), stop - start))
    fragments.sort(key=lambda fragment: fragment.offset)
    ends = [0, *(fragment.offset + fragment.numel for fragment in fragments)]
    begins = [*(fragment.offset for fragment in fragments), flat.numel()]
    if any(end > begin for end, begin in zip(ends, begins, strict=True)):
        raise ValueError(f"its parameters do not fit into a flat tensor of {flat.numel()} elements: {fragments}")
    tensors, params = zip(*held, strict=True) if held else ((), ())
    return FlatShard(params, tuple(fragments), tensors, device)


@contextlib.contextmanager
def _reading_deepspeed() -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"DeepSpeed {version()} does not say where it keeps parameters as the versions that hf_cwd was tested with "
            f"do ({TESTED}): {type(error).__name__}: {error}. Use one of those, or an element-wise rule (cwd_adamw)"
        ) from error


def _by_stage_3(flat: Tensor, params: Sequence[tuple[Tensor, str]]) -> list[tuple[Tensor, ShardedParam]]:
    held = []
    for p, name in params:
        keeper = p._z3_optimizer
        sub_group, offset, part = keeper.grad_position[keeper.get_param_id(p)]
        if keeper.fp32_partitioned_groups_flat[sub_group] is flat:
            world = _world(p.ds_process_group, name)
            held.append((p, ShardedParam(name, tuple(p.ds_shape), FlatSharding(world, part), offset)))
    return held


def _by_stages_1_2(flat: Tensor, params: Sequence[tuple[Tensor, str]]) -> list[tuple[Tensor, ShardedParam]]:
    """A group's parameters are views of one buffer, of which each rank updates an equal part.

    DeepSpeed's own table of it, ``_hp_mapping``, is wrong with ``round_robin_gradients``.
    """
    first = min(p.data_ptr() for p, _ in params)
    held = []
    for p, name in params:
        world = _world(p._dp_group, name)
        begin = (p.data_ptr() - first) // p.element_size()
        if not 0 <= begin <= world * flat.numel() - p.numel():
            raise ValueError(f"{name} lies outside of the buffer that DeepSpeed cuts into flat tensors")
        held.append((p, ShardedParam(name, tuple(p.shape), FlatSharding(world, flat.numel(), begin), 0)))
    return held


def _world(group: dist.ProcessGroup, name: str) -> int:
    ranks = dist.get_process_group_ranks(group)
    if ranks != list(range(dist.get_world_size())):
        raise ValueError(
            f"{name} is shared out among ranks {sorted(ranks)} only, of {dist.get_world_size()} (expert, tensor or "
            "sequence parallelism, hpZ, MiCS): its matrices can be exchanged among all ranks only"
        )
    return len(ranks)


def are_weights(shard: FlatShard, flat: Tensor) -> list[bool]:
    """For each of the shard's parameters, whether its fragments are this rank's part of the weights.

    Before an update the model's weights are the masters, rounded to the model's dtype. It proves the mapping.
    """
    result = [True] * len(shard.params)
    for (number, _, numel), part in zip(shard.fragments, shard.cut(flat.detach()), strict=True):
        p = shard.tensors[number]
        if hasattr(p, "ds_tensor"):
            weights = p.ds_tensor.detach().view(-1)[:numel]
        else:
            param = shard.params[number]
            start, stop = param.sharding.span(param.shape, dist.get_rank())
            weights = p.detach().view(-1)[start:stop]
        same = part.to(device=weights.device, dtype=weights.dtype)
        result[number] = torch.allclose(same, weights, rtol=0, atol=0, equal_nan=True)
    return result


def version() -> str:
    return importlib.metadata.version("deepspeed")
