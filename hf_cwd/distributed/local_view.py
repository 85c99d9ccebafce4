"""Local views: what this rank holds of a tensor in a parameter group.

A group may hold plain tensors, DTensors (FSDP2, tensor parallelism), and the flat tensors that DeepSpeed's ZeRO makes
of parameters. The optimizer steps what a rank holds of each; the classes here say what that is.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cwd.distributed import deepspeed_zero, dtensor, rank_groups
from hf_cwd.distributed.deepspeed_zero import FlatShard
from hf_cwd.distributed.flat_geometry import ShardedParam
from hf_cwd.distributed.geometry import Shape, check, everywhere
from hf_cwd.distributed.rank_groups import RankGroup

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def full_shape(param: Tensor) -> Shape:
    """The shape of a parameter, which is empty while ZeRO stage 3 has it in parts."""
    return tuple(getattr(param, "ds_shape", param.shape))


class LocalView:
    """A plain tensor: this rank has all of it. Also the base of the other views.

    Args:
        param: the tensor in the parameter group.
    """

    is_flat = False
    copies = 1  # how many of its ranks hold the same part

    __slots__ = ("param",)

    def __init__(self, param: Tensor) -> None:
        self.param = param

    @property
    def shapes(self) -> list[Shape]:
        """The full shape of each parameter that this rank has a part of, in the order of :meth:`split`."""
        return [tuple(self.param.shape)]

    @property
    def numel(self) -> int:
        """Elements that this rank has, without padding."""
        return self.param.numel()

    @property
    def device(self) -> torch.device:
        """Where ranks communicate about it."""
        return self.param.device

    def ranks(self, meshes: Mapping["DeviceMesh", RankGroup]) -> RankGroup:
        """The ranks among which it lies in parts; this rank alone if it has all of it.

        Args:
            meshes: see :func:`hf_cwd.distributed.rank_groups.of_meshes`.
        """
        is_flattened = getattr(self.param, "_fsdp_flattened", False)  # FSDP version 1 marks it so
        return rank_groups.of(None) if is_flattened else rank_groups.alone()

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that is cut as the parameter is; shares its memory."""
        return tensor

    def local_grad(self) -> Tensor | None:
        """This rank's part of the gradient."""
        return self.param.grad

    def split(self, part: Tensor) -> list[Tensor]:
        """A tensor of the size of this rank's part, by parameter: views without padding."""
        return [part]

    def stretches(self, part: Tensor) -> list[Tensor]:
        """A tensor of the size of this rank's part, without padding: as few views as there can be."""
        return [part]

    def sharded_params(self, name: str, group: RankGroup) -> Sequence[ShardedParam]:
        """The parameters of which parts lie in it, and which rank of ``group`` holds what of each.

        Args:
            name: the tensor in words.

        Raises:
            ValueError: a layout that is not supported.
        """
        return [ShardedParam(name, tuple(self.param.shape), everywhere(group.ranks), 0)]


class DTensorView(LocalView):
    """This rank's part of a DTensor."""

    __slots__ = ()

    @property
    def numel(self) -> int:
        return dtensor.local(self.param).numel()

    @property
    def device(self) -> torch.device:
        return dtensor.device(self.param)

    @property
    def copies(self) -> int:
        mesh = zip(self.param.device_mesh.shape, self.param.placements, strict=True)
        return prod(size for size, placement in mesh if placement.is_replicate())

    def ranks(self, meshes: Mapping["DeviceMesh", RankGroup]) -> RankGroup:
        return meshes[self.param.device_mesh]

    def local(self, tensor: Tensor) -> Tensor:
        return dtensor.local(tensor)

    def local_grad(self) -> Tensor | None:
        return None if self.param.grad is None else dtensor.local_grad(self.param)

    def sharded_params(self, name: str, group: RankGroup) -> Sequence[ShardedParam]:
        shape = tuple(self.param.shape)
        try:
            mesh = dtensor.mesh_of(self.param)
            check(shape, mesh)
        except ValueError as error:
            raise ValueError(f"{name} is a DTensor in a layout that is not supported: {error}") from None
        return [ShardedParam(name, shape, mesh, 0)]


class FlatView(LocalView):
    """A flat tensor of DeepSpeed's: this rank's parts of many parameters, one after another, and padding.

    Args:
        shard: what lies in it.
    """

    is_flat = True

    __slots__ = ("shard",)

    def __init__(self, param: Tensor, shard: FlatShard) -> None:
        super().__init__(param)
        self.shard = shard

    @property
    def shapes(self) -> list[Shape]:
        return [self.shard.params[fragment.param].shape for fragment in self.shard.fragments]

    @property
    def numel(self) -> int:
        return self.shard.numel

    @property
    def device(self) -> torch.device:
        return self.shard.device

    def ranks(self, meshes: Mapping["DeviceMesh", RankGroup]) -> RankGroup:
        return rank_groups.of(None)

    def split(self, part: Tensor) -> list[Tensor]:
        return self.shard.cut(part.view(-1))

    def stretches(self, part: Tensor) -> list[Tensor]:
        return deepspeed_zero.pick(part, self.shard.extents)

    def sharded_params(self, name: str, group: RankGroup) -> Sequence[ShardedParam]:
        return self.shard.params

    def misplaced(self, param: ShardedParam) -> str:
        """An error: it does not hold the weights of ``param`` where they are expected."""
        return (
            f"{param.name} of shape {param.shape} does not lie where DeepSpeed {deepspeed_zero.version()} is expected "
            f"to keep it in its flat tensors: those do not hold its weights (tested: {deepspeed_zero.TESTED}). Nothing "
            "has been changed. Use one of those versions, or an element-wise rule (cwd_adamw)"
        )


def of(param: Tensor) -> LocalView:
    """The view of a plain tensor or a DTensor."""
    return DTensorView(param) if dtensor.is_dtensor(param) else LocalView(param)


def is_flat(param: Tensor, model_params: Sequence[Tensor]) -> bool:
    """Whether a tensor in a group stands for the model's parameters that the group was made of."""
    # The first question is the cheaper one, and answers it for the vectors of most models.
    return not any(p is param for p in model_params) and deepspeed_zero.is_sharded(model_params)


def of_flat(param: Tensor, model_params: Sequence[Tensor], names: Sequence[str]) -> FlatView:
    """The view of such a tensor.

    Args:
        names: of the model's parameters.

    Raises:
        ValueError: see :func:`hf_cwd.distributed.deepspeed_zero.flat_shard`.
    """
    return FlatView(param, deepspeed_zero.flat_shard(param, model_params, names))


def of_meshes(views: Sequence[LocalView]) -> dict["DeviceMesh", RankGroup]:
    """The ranks of the meshes of all DTensors among these, see :func:`hf_cwd.distributed.rank_groups.of_meshes`."""
    return rank_groups.of_meshes(view.param.device_mesh for view in views if isinstance(view, DTensorView))
