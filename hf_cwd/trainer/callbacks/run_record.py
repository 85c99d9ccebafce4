"""A default callback that writes ``cwd_run.json``: the arguments, the optimizer's settings, the model, the versions.

``hf-cwd report`` reads it.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hf_cwd
from hf_cwd.distributed.local_view import full_shape
from hf_cwd.log import warn_once
from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.trainer.optim_args import effective, of_groups, optimizer_arguments
from hf_cwd.trainer.optim_names import PREFIX, chosen, names
from hf_cwd.trainer.wrappers import innermost

FILE = "cwd_run.json"
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "trl", "peft")
SECRET = ("token", "api_key", "password", "secret")


def optimizer_settings(args: TrainingArguments, optimizer: Any = None) -> dict[str, Any]:
    """Every setting that an optimizer of this package runs with, by its key in ``--optim_args``.

    ``lr`` is the learning rate before the schedule. Groups without weight decay do not count for ``weight_decay``. If
    groups differ, the value is a list.

    Args:
        optimizer: the optimizer that trains, with or without wrappers: the values are those of its groups. None means
            the optimizer that ``args`` ask for.
    """
    optimizer, settings = innermost(optimizer), {}
    algorithm = chosen(args).removeprefix(PREFIX) if chosen(args) in names() else None
    made = isinstance(optimizer, CWDOptimizer)
    if algorithm is not None and (not made or optimizer.defaults["algorithm"] == algorithm):
        settings = effective(algorithm, optimizer_arguments(args))
    return settings | (of_groups(optimizer.param_groups, optimizer.defaults["algorithm"]) if made else {})


def contents(args: TrainingArguments, model: nn.Module | None, optimizer: Any) -> dict[str, Any]:
    """The contents of ``cwd_run.json``, without secrets such as tokens."""
    settings = optimizer_settings(args, optimizer)
    for key, flag in (("lr", args.learning_rate), ("weight_decay", args.weight_decay)):
        if settings.get(key) == flag:  # else the flag had no effect, or a checkpoint's value overrides it
            del settings[key]
    versions = {"hf_cwd": hf_cwd.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        if name != "deepspeed" or args.deepspeed_plugin is not None:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
    record = {
        "arguments": _public(args.to_dict()),
        "optimizer": {"optimizer_class": type(innermost(optimizer)).__name__, **settings},
        "model": {} if model is None else _described(model),
        "world_size": args.world_size,
        "versions": versions,
    }
    # Keys that are not valid in JSON are left out; values that are not are converted to text.
    return json.loads(json.dumps(record, default=str, skipkeys=True))


def write(args: TrainingArguments, model: nn.Module | None, optimizer: Any) -> None:
    """Writes ``cwd_run.json`` into the output directory, atomically. If that fails, it only warns."""
    path = Path(args.output_dir) / FILE
    part = path.with_name(f".{FILE}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(contents(args, model, optimizer), indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        warn_once(f"{path} cannot be written ({error.strerror}): hf-cwd report will not know this run's settings")
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


class RunRecordCallback(TrainerCallback):
    """Writes ``cwd_run.json`` when training begins, on rank 0, if an optimizer of this package trains."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and isinstance(innermost(optimizer), CWDOptimizer):
            write(args, model, optimizer)


def _described(model: nn.Module) -> dict[str, Any]:
    def count(trainable: bool) -> int:
        return sum(prod(full_shape(p)) for p in model.parameters() if p.requires_grad or not trainable)

    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    described = {"model_class": type(model).__name__, "num_parameters": count(False), "num_trainable": count(True)}
    return described | ({"model_name": name} if name else {})


def _public(value: Any) -> Any:
    """Arguments without unset values and secrets, also within nested mappings."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: _public(item) for key, item in value.items() if item is not None and not str(key).lower().endswith(SECRET)
    }
