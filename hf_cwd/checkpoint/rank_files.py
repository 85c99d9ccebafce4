"""Writes a file for each rank: its weights, its optimizer states, and the rectangles of the full tensors that they are.

The format is safetensors with JSON in its header, so that reading it runs no code. A rank that holds the same
rectangles can read the file back. Each rectangle says where it lies in the full tensor, so that a conversion to other
shardings is possible.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_cwd.distributed.dtensor import is_dtensor, local, mesh_of
from hf_cwd.distributed.geometry import everywhere

FORMAT = 1
KEY = "hf_cwd"  # the key of the JSON in the file's metadata
WEIGHTS, STATES = "weights", "states"

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_name(rank: int, world: int) -> str:
    return f"cwd_part-{rank:05d}-of-{world:05d}.safetensors"


def existing(directory: str | os.PathLike) -> list[tuple[int, int, str]]:
    """(rank, world, name) of each rank's file in a directory."""
    matches = (re.fullmatch(r"cwd_part-(\d{5})-of-(\d{5})\.safetensors", name) for name in os.listdir(directory))
    return sorted((int(match[1]), int(match[2]), match[0]) for match in matches if match)


def tensors_of(model: nn.Module, *, adapters_only: bool = False) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model, not copied. A shared tensor appears once, by its first name.

    ``adapters_only`` leaves frozen parameters out.
    """
    # named_parameters would give FSDP2's whole parameters after an evaluation; state_dict brings the shards back.
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or (adapters_only and isinstance(tensor, nn.Parameter) and not tensor.requires_grad):
            continue
        seen.add(id(tensor))
        result[name] = tensor
    return result


def describe(tensor: Tensor, rank: int) -> dict[str, Any]:
    """A tensor's full shape, its dtype, and the rectangles of it that a rank holds, for JSON.

    A rectangle is a list of its start in the full tensor, its size, and its offset in the local tensor, in elements. It
    has the strides of the local tensor.
    """
    shape = tuple(tensor.shape)
    mesh = mesh_of(tensor) if is_dtensor(tensor) else everywhere((rank,))
    pieces = mesh.pieces(shape, rank)
    return {
        "shape": list(shape),
        "dtype": DTYPES[tensor.dtype],
        "rectangles": [[list(piece.start), list(piece.size), piece.offset] for piece in pieces],
    }


@torch.no_grad()
def save(
    path: str | os.PathLike,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    rank: int,
    world: int,
    parallelism: str,
    global_step: int,
) -> None:
    """Writes this rank's part of weights and optimizer states, and syncs it to the disk.

    It copies one tensor at a time off a device. Ranks do not communicate.

    Args:
        weights: tensors by name, see :func:`tensors_of`. They must include all parameters of the optimizer.
        parallelism: the sizes of the DistributedConfig as text, for messages.
        global_step: the Trainer's step.

    Raises:
        ValueError: a parameter is not among the weights, or JSON cannot hold an option of a group.
    """
    names = {id(p): name for name, p in weights.items()}
    tensors = {f"{WEIGHTS}/{name}": local(tensor.detach()) for name, tensor in weights.items()}
    groups, states = [], 0
    for number, group in enumerate(optimizer.param_groups):
        foreign = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if foreign:
            raise ValueError(
                f"parameter group {number} has a parameter of shape {foreign[0]} that is not in the model, so that its "
                "state could not be loaded again. Make the optimizer from the model's own parameters"
            )
        groups.append({"params": [names[id(p)] for p in group["params"]], "options": _options(number, group)})
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                assert not is_dtensor(value) or value.placements == p.placements
                tensors[f"{STATES}/{key}/{names[id(p)]}"] = local(value)
                states += 1
    header = {
        "format": FORMAT,
        "rank": rank,
        "world": world,
        "states": states,
        "groups": groups,
        "layout": parallelism,
        "global_step": global_step,
        "tensors": {name: describe(tensor, rank) for name, tensor in weights.items()},
    }
    _write(path, tensors, json.dumps(header))


def _options(number: int, group: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for name, value in group.items():
        if name not in ("params", "param_names"):
            result[name] = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            try:
                json.dumps(result[name])
            except TypeError:
                raise ValueError(
                    f"parameter group {number} has {name}={value!r}, which a rank's file cannot hold: only numbers, "
                    "text, and lists and dicts of them can be written"
                ) from None
    return result


def _write(path: str | os.PathLike, tensors: Mapping[str, Tensor], about: str) -> None:
    """Writes a safetensors file tensor by tensor; the library's writer copies all tensors off the GPU at once."""
    header_of: dict[str, Any] = {"__metadata__": {KEY: about}}
    place = 0
    # Sorted by element size, the largest first, so that each tensor is aligned.
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in ordered:
        tensor, start = tensors[name], place
        place += tensor.numel() * tensor.element_size()
        header_of[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, place]}
    header = json.dumps(header_of).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in ordered:
            file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
