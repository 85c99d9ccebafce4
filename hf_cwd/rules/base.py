"""The interface of a rule."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_cwd.decay import MASKS
from hf_cwd.rules.hyperparameters import Choice, Flag, Hyperparameter, Real, checked

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The keys of every parameter group. An optimizer class may set other defaults of lr and weight_decay.
COMMON: dict[str, Hyperparameter] = {
    "lr": Real(1e-3, tensor=True),
    "weight_decay": Real(1e-2),
    "cautious": Flag(True),
    "mask": Choice("ge", MASKS),
    "maximize": Flag(False),
    "kernel": Choice("auto", ("auto", "eager", "c", "triton")),
    "state_dtype": Choice("auto", ("auto", *STATE_DTYPES)),
    "master": Choice("none", ("none", "remainder")),
    "capturable": Flag(False),
}


def _nothing(group: Mapping[str, Any]) -> None:
    del group


@dataclass(frozen=True, eq=False)  # compared by identity, so that a rule can be a key
class Rule:
    """A direction and its state. A rule does not depend on learning rate, decay, rank, kernel or Trainer.

    Attributes:
        name: value of a group's ``algorithm`` key. The value of ``--optim`` is ``cwd_<name>``.
        direction: ``(grad, *buffers, step, **hyperparameters) -> u``. It is element-wise, so that it can run on any
            slice of any shard. It mutates only its buffers. ``step`` counts from 1.
        state_keys: maps a group to the names of its buffers, in the order in which ``direction`` takes them. Each
            buffer has the shape of the parameter and the dtype of :func:`state_dtype`, and starts at zero.
        hyperparameters: declared hyper-parameters by name. All are passed to ``direction`` by keyword.
        matrix: ``(u, **hyperparameters) -> u`` on a whole matrix, called between ``direction`` and the mask. This and
            the next three functions name each hyper-parameter that they read, and take the rest as ``**_``. If one that
            they read changes, the exchange is planned again.
        matrix_dtype: ``(dtype of u, device type, **hyperparameters) -> dtype``, the dtype in which ``matrix`` computes.
        matrix_flops: ``(rows, columns, **hyperparameters) -> int``, the operations of ``matrix``.
        scale: ``(full_shape, **hyperparameters) -> float``, a positive factor on the direction, not on the decay.
        validate: raises ValueError for an invalid combination of hyper-parameters.
        aliases: other optimizers' names of the state keys, accepted by ``load_state_dict``.
        companion: the rule for parameters that this one cannot train (for Muon: vectors, embeddings).
    """

    name: str
    direction: Callable[..., Tensor]
    state_keys: Callable[[Mapping[str, Any]], tuple[str, ...]]
    hyperparameters: Mapping[str, Hyperparameter]
    matrix: Callable[..., Tensor] | None = None
    matrix_dtype: Callable[..., torch.dtype] | None = None
    matrix_flops: Callable[..., int] | None = None
    scale: Callable[..., float] | None = None
    validate: Callable[[Mapping[str, Any]], None] = _nothing
    aliases: Mapping[str, str] = field(default_factory=dict)
    companion: str | None = None

    def __post_init__(self) -> None:
        needed = ("matrix_dtype", "matrix_flops", "scale")
        missing = [name for name in needed if self.matrix is not None and getattr(self, name) is None]
        if missing:
            raise ValueError(f"rule {self.name!r} has a matrix stage, and needs {', '.join(missing)} as well")

    @cached_property
    def matrix_hyperparameters(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that ``matrix``, ``matrix_dtype``, ``matrix_flops`` and ``scale`` read."""
        stages = [f for f in (self.matrix, self.matrix_dtype, self.matrix_flops, self.scale) if f is not None]
        given = [p for function in stages for p in inspect.signature(function).parameters.values()]
        if any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in given):  # it may read any
            return tuple(self.hyperparameters)
        read = {p.name for p in given}
        return tuple(name for name in self.hyperparameters if name in read)

    def checked_hyperparameters(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Validates and converts a group's hyper-parameters.

        Raises:
            ValueError: a value or a combination of values is not valid.
        """
        declared = {**COMMON, **self.hyperparameters}
        values = {name: checked(self.name, name, each, group[name]) for name, each in declared.items()}
        self.validate(values)
        return values

    def defaults(self) -> dict[str, Any]:
        """The default of each of the rule's own hyper-parameters."""
        return {name: declared.default for name, declared in self.hyperparameters.items()}


def state_dtype(group: Mapping[str, Any], param: torch.dtype) -> torch.dtype:
    """The dtype of the buffers of a parameter of dtype ``param``: by default its own.

    With ``master="remainder"`` it is fp32, the dtype of the master.
    """
    if group["state_dtype"] != "auto":
        return STATE_DTYPES[group["state_dtype"]]
    return torch.float32 if has_remainder(group, param) else param


def has_remainder(group: Mapping[str, Any], param: torch.dtype) -> bool:
    """Whether a parameter of dtype ``param`` has an fp32 master, whose upper 16 bits it is."""
    return group["master"] == "remainder" and param == torch.bfloat16
