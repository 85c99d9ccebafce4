"""One rank's part of a run in a file of its own: weights, optimizer states, and which rectangles of what they are.

safetensors, with JSON in its header: nothing in it can run when it is read. It is read back by a rank that holds the
same rectangles; since each of them says where it lies in the whole tensor, the files can serve other layouts too.
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
KEY = "hf_cwd"  # of the JSON among the file's metadata
WEIGHTS, STATES = "weights", "states"

DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}


def file_name(rank: int, world: int) -> str:
    return f"cwd_part-{rank:05d}-of-{world:05d}.safetensors"


def found(directory: str | os.PathLike) -> list[tuple[int, int, str]]:
    """(rank, world, name) of each such file in a directory."""
    matches = (re.fullmatch(r"cwd_part-(\d{5})-of-(\d{5})\.safetensors", name) for name in os.listdir(directory))
    return sorted((int(match[1]), int(match[2]), match[0]) for match in matches if match)


def tensors_of(model: nn.Module, *, adapters_only: bool = False) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model themselves, each once, under its first name.

    ``adapters_only`` leaves frozen parameters out.
    """
    # Not named_parameters: FSDP2 shows whole parameters there after an evaluation, and puts its shards back for this.
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or (adapters_only and isinstance(tensor, nn.Parameter) and not tensor.requires_grad):
            continue
        seen.add(id(tensor))
        result[name] = tensor
    return result


def describe(tensor: Tensor, rank: int) -> dict[str, Any]:
    """A tensor's full shape, its dtype, and the rectangles of it that a rank holds, as JSON keeps them.

    A rectangle is its start in the full tensor, its size, and the element of the local tensor where it begins; the
    strides are those of the local tensor.
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
    **about: Any,
) -> None:
    """Writes this rank's part of weights and optimizer states, and syncs it to the disk.

    Only one tensor at a time is copied off a device. No rank waits for another one.

    Args:
        weights: by name, see :func:`tensors_of`; among them all parameters that the optimizer has.
        about: what else the header is to say, as far as JSON can.

    Raises:
        ValueError: a parameter that is not among the weights, or an option of a group that JSON cannot hold.
    """
    names = {id(p): name for name, p in weights.items()}
    tensors = {f"{WEIGHTS}/{name}": local(tensor.detach()) for name, tensor in weights.items()}
    groups, states = [], 0
    for number, group in enumerate(optimizer.param_groups):
        foreign = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if foreign:
            raise ValueError(
                f"parameter group {number} has a parameter of shape {foreign[0]} that the model does not have: its "
                "state could not be found again. Make the optimizer of the model's own parameters"
            )
        groups.append({"params": [names[id(p)] for p in group["params"]], "options": _options(number, group)})
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                assert not is_dtensor(value) or value.placements == p.placements
                tensors[f"{STATES}/{key}/{names[id(p)]}"] = local(value)
                states += 1
    header = {"format": FORMAT, "rank": rank, "world": world, "states": states, "groups": groups, **about}
    header["tensors"] = {name: describe(tensor, rank) for name, tensor in weights.items()}
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
                    f"parameter group {number} has {name}={value!r}, which a checkpoint of ranks cannot hold: only "
                    "numbers, text, lists and dicts of such can be written"
                ) from None
    return result


def _write(path: str | os.PathLike, tensors: Mapping[str, Tensor], about: str) -> None:
    """safetensors' own writer takes copies of all tensors of a GPU at once."""
    entries: dict[str, Any] = {"__metadata__": {KEY: about}}
    place = 0
    # The largest elements come first, so that each tensor begins at a multiple of its own.
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in ordered:
        tensor, start = tensors[name], place
        place += tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, place]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in ordered:
            file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
