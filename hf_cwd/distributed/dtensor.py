"""torch.distributed.tensor: FSDP2, tensor parallelism, HSDP, expert parallelism."""

import sys
from typing import Any

import torch
from torch import Tensor

from hf_cwd.distributed.geometry import Mesh, Placement, Replicate, Shard, StridedShard


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing torch.distributed.tensor (0.5 s) when nobody else did."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory. To be called without gradients."""
    if not is_dtensor(tensor):
        return tensor
    part = tensor.to_local()
    return part.wait() if hasattr(part, "wait") else part  # a collective may still be under way


def local_grad(param: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient, cut as the parameter is."""
    grad = param.grad
    if is_dtensor(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)  # every rank has the same placements
    return local(grad)


def mesh_of(param: Tensor) -> Mesh:
    """Which rank of its device mesh holds what of a DTensor.

    Ranks outside of it hold another tensor, for all that is known here, even where their mesh is another part of the
    same larger one: two stages of a pipeline do. What is replicated, a Replicate placement says.

    Raises:
        ValueError: a placement that holds no part of the tensor, or one unknown.
    """
    mesh = param.device_mesh
    ranks = tuple(mesh.mesh.flatten().tolist())
    return Mesh(tuple(mesh.shape), ranks, tuple(_placement(p) for p in param.placements))


def whole(param: Tensor) -> Tensor:
    """The full tensor, by a collective of the ranks of its mesh."""
    mesh = param.device_mesh
    if param.to_local().device.type != mesh.device_type:
        param = param.to(mesh.device_type)  # offloaded: the group cannot communicate from there
    return param.full_tensor()


def device(param: Tensor) -> torch.device:
    """Where the ranks that share this parameter communicate."""
    kind = param.device_mesh.device_type
    return param.to_local().device if param.to_local().device.type == kind else current_device(kind)


def current_device(kind: str) -> torch.device:
    """The accelerator of this process."""
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _placement(placement: Any) -> Placement:
    # _StridedShard is a Shard in some versions of torch, and none in others.
    if type(placement).__name__ == "_StridedShard":
        return StridedShard(placement.dim, placement.split_factor)
    if placement.is_replicate():
        return Replicate()
    if placement.is_shard():
        return Shard(placement.dim)
    raise ValueError(f"placement {placement} is neither Shard nor Replicate")
