"""Reads the files of :mod:`hf_cwd.checkpoint.rank_files`. It loads all of a file, or refuses it with a reason."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_cwd.checkpoint.rank_files import FORMAT, KEY, STATES, WEIGHTS, describe, existing, file_name
from hf_cwd.distributed.dtensor import local
from hf_cwd.optim.original_params import changed, listed


class RankFile:
    """A rank's file, opened and compared with what this rank holds now. Nothing is loaded yet.

    Args:
        directory: the checkpoint.
        weights: the result of :func:`tensors_of` for the present model.
        parallelism: the present parallelism as text; messages show it beside the one that was saved.

    Raises:
        ValueError: the file is missing, damaged or another rank's; or names, shapes, dtypes or rectangles differ.
    """

    def __init__(
        self, directory: str | os.PathLike, weights: Mapping[str, Tensor], *, rank: int, world: int, parallelism: str
    ) -> None:
        self.path = Path(directory, file_name(rank, world))
        self._weights = weights
        if not self.path.is_file():
            raise ValueError(_missing(self.path, rank, world, parallelism))
        self._file, self.about = _open(self.path)
        if (self.about["rank"], self.about["world"]) != (rank, world):
            raise ValueError(
                f"{self.path} holds the part of rank {self.about['rank']} of {self.about['world']}: it was renamed. "
                "Give it its own name back, or resume from another checkpoint"
            )
        own = {name: describe(tensor, rank) for name, tensor in weights.items()}
        if difference := _difference(self.about, own, parallelism):
            raise ValueError(f"{self.path} does not fit this run: {difference}")
        self.states = self._states()

    def _states(self) -> dict[str, dict[str, str]]:
        """The names of the state tensors in the file, by parameter and key.

        Raises:
            ValueError: the tensors are not those that the header names.
        """
        states: dict[str, dict[str, str]] = {}
        shapes = {name: list(local(tensor.detach()).shape) for name, tensor in self._weights.items()}
        tensors = set(self._file.keys())
        wrong = [f"{WEIGHTS}/{name}" for name in shapes if f"{WEIGHTS}/{name}" not in tensors]
        for tensor in tensors:
            section, _, rest = tensor.partition("/")
            key, name = ("", rest) if section == WEIGHTS else rest.partition("/")[::2]
            stored = self._file.get_slice(tensor)
            if name not in shapes or stored.get_shape() != ([] if key == "step" else shapes[name]):
                wrong.append(tensor)
            elif section == STATES:
                states.setdefault(name, {})[key] = tensor
            elif stored.get_dtype() != self.about["tensors"][name]["dtype"]:
                wrong.append(tensor)
        count = sum(map(len, states.values()))
        if wrong or count != self.about["states"]:
            what = f"it has {count} states"
            if wrong:
                what = f"{', '.join(sorted(wrong)[:3])} differ from its header"
            raise ValueError(
                f"{self.path} is damaged: {what}, and {len(shapes)} tensors and {self.about['states']} states were "
                "written. Resume from another checkpoint"
            )
        return states

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    @torch.no_grad()
    def load_weights(self) -> int:
        """Copies the weights into the present tensors, in place. Returns their number."""
        for name, tensor in self._weights.items():
            local(tensor.detach()).copy_(self._file.get_tensor(f"{WEIGHTS}/{name}"))
        return len(self._weights)

    @torch.no_grad()
    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """A state dict for ``optimizer.load_state_dict``, with states sharded and placed like their parameters.

        Raises:
            ValueError: the groups have the same rules, but other parameters, or in another order.
        """
        self._check_groups(optimizer)
        states: dict[int, dict[str, Tensor]] = {}
        groups: list[dict[str, Any]] = []
        number = 0
        for group in self.about["groups"]:
            numbers = range(number, number := number + len(group["params"]))
            for index, name in zip(numbers, group["params"], strict=True):
                keys = self.states.get(name, {})
                states[index] = {key: self._state(key, name, tensor) for key, tensor in keys.items()}
            groups.append({**_with_tuples(group["options"]), "params": list(numbers)})
        for own, saved in zip(optimizer.param_groups, groups, strict=False):
            if isinstance(own["lr"], Tensor):  # a CUDA graph may have captured it
                saved["lr"] = torch.full_like(own["lr"], saved["lr"])
        return {"state": {index: state for index, state in states.items() if state}, "param_groups": groups}

    def _state(self, key: str, name: str, tensor: str) -> Tensor:
        saved = self._file.get_tensor(tensor)
        if key == "step":
            return saved.clone()  # a view would keep the file mapped
        state = torch.zeros_like(self._weights[name].detach(), dtype=saved.dtype)
        local(state).copy_(saved)
        return state

    def _check_groups(self, optimizer: torch.optim.Optimizer) -> None:
        names = {id(p): name for name, p in self._weights.items()}
        saved, own = self.about["groups"], optimizer.param_groups
        if [group["options"].get("algorithm") for group in saved] != [group.get("algorithm") for group in own]:
            return  # load_state_dict handles a change of rule
        for number, (old, group) in enumerate(zip(saved, own, strict=True)):
            now = [names.get(id(p), "one that is not in the model") for p in group["params"]]
            if now != old["params"]:
                raise ValueError(
                    f"parameter group {number} does not have the parameters that it had when {self.path} was saved: "
                    f"{changed(old['params'], now)}. Freeze and route them as in that run"
                )


def _with_tuples(value: Any) -> Any:
    """Converts lists to tuples, which group options were before JSON."""
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or was cut off ({error}): resume from another checkpoint, or restore this file"
        ) from error
    text = (file.metadata() or {}).get(KEY)
    try:
        about = dict(json.loads(text or "{}"))
    except (ValueError, TypeError):
        about = {}
    types = {"rank": int, "world": int, "states": int, "groups": list, "tensors": dict}
    if about.get("format") != FORMAT or not all(isinstance(about.get(key), type_) for key, type_ in types.items()):
        raise ValueError(
            f"{path} is in format {about.get('format')!r}, but this version of hf_cwd reads format {FORMAT}: resume "
            "with the version that saved it, or from another checkpoint"
        )
    return file, about


def _missing(path: Path, rank: int, world: int, parallelism: str) -> str:
    others = existing(path.parent) if path.parent.is_dir() else []
    worlds = {number for _, number, _ in others}
    if not others:
        return (
            f"{path.parent} has no file of this rank ({path.name}): a model sharded at load time resumes only from a "
            "checkpoint that CWDTrainer saved of such a model, without save_only_model. Begin a new run from the "
            "checkpoint's weights by from_pretrained"
        )
    if world in worlds:
        return (
            f"{path.parent} has files of {len(others)} of {world} ranks, and {path.name} is missing: resume from "
            f"another checkpoint, or restore this file, which rank {rank} wrote on its node"
        )
    _, about = _open(path.parent / others[0][2])
    return _other_parallelism(about, world, parallelism)


def _other_parallelism(about: Mapping[str, Any], world: int, parallelism: str) -> str:
    return (
        f"this checkpoint was saved on {about['world']} ranks as {about.get('layout') or 'one part'}, and this run has "
        f"{world} ranks as {parallelism}: resume with the number of ranks and the DistributedConfig (sizes and plans) "
        "that saved it"
    )


def _difference(about: Mapping[str, Any], own: Mapping[str, dict[str, Any]], parallelism: str) -> str | None:
    saved = about["tensors"]
    if lost := [name for name in own if name not in saved]:
        return f"the model has {listed(lost)}, and the checkpoint does not. Make the model as in the run that saved it"
    if lost := [name for name in saved if name not in own]:
        return f"the checkpoint has {listed(lost)}, and the model does not. Make the model as in the run that saved it"
    for key, advice in (
        ("shape", "was an embedding resized? Make the model as in the run that saved it"),
        ("dtype", "load the model in the dtype that it was trained in"),
    ):
        for name, now in own.items():
            if saved[name].get(key) != now[key]:
                return f"{name} has {key} {now[key]}, and had {saved[name].get(key)} when it was saved: {advice}"
    for name, now in own.items():
        if saved[name].get("rectangles") != now["rectangles"]:
            return f"this rank holds another part of {name}; {_other_parallelism(about, about['world'], parallelism)}"
    return None
