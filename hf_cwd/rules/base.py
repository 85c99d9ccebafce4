"""What a rule is."""

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

# What every parameter group has, whatever its rule. The defaults of lr and weight_decay are the optimizer class's.
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


@dataclass(frozen=True, eq=False)  # a rule is itself only: it can be a key
class Rule:
    """A direction, and what it remembers between steps. It knows no learning rate, decay, rank, kernel or Trainer.

    Attributes:
        name: value of a group's ``algorithm`` key; the Trainer's name is ``cwd_<name>``.
        direction: ``(grad, *buffers, step, **hyperparameters) -> u``. Element-wise: it runs on any slice of any shard.
            Mutates only its buffers; ``step`` counts from 1.
        state_keys: names of the buffers for given hyper-parameters, in the order ``direction`` takes them. Each has the
            shape of the parameter, the dtype of :func:`state_dtype`, and starts at zero.
        hyperparameters: declared hyper-parameters by name; all are passed to ``direction`` by keyword.
        matrix: ``(u, **hyperparameters) -> u`` on a whole matrix, run between ``direction`` and the mask. This and the
            next three name each hyper-parameter that they read, and take the others as ``**_``: an exchange is planned
            again when one that is read changes.
        matrix_dtype: ``(dtype of u, device type, **hyperparameters) -> dtype`` that ``matrix`` computes in.
        matrix_flops: ``(rows, columns, **hyperparameters) -> int``, what ``matrix`` costs.
        scale: ``(full_shape, **hyperparameters) -> float``, a positive factor on the direction, not on the decay.
        validate: raises ValueError for combinations of hyper-parameters that do not go together.
        aliases: other optimizers' names of our state keys, accepted by ``load_state_dict``.
        companion: rule for the parameters that this one cannot take (Muon's vectors and embeddings).
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
            raise ValueError(f"rule {self.name!r} has a matrix stage, and so needs {', '.join(missing)} as well")

    @cached_property
    def matrix_hyperparameters(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that the matrix stage, its dtype, its cost and the scale depend on."""
        stages = [f for f in (self.matrix, self.matrix_dtype, self.matrix_flops, self.scale) if f is not None]
        given = [p for function in stages for p in inspect.signature(function).parameters.values()]
        if any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in given):  # it may read any of them
            return tuple(self.hyperparameters)
        read = {p.name for p in given}
        return tuple(name for name in self.hyperparameters if name in read)

    def checked_hyperparameters(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group's hyper-parameters in the form they are used in; ValueError names the first that is not valid."""
        kinds = {**COMMON, **self.hyperparameters}
        values = {name: checked(self.name, name, kind, group[name]) for name, kind in kinds.items()}
        self.validate(values)
        return values


def state_dtype(group: Mapping[str, Any], param: torch.dtype) -> torch.dtype:
    """The dtype of the buffers of a parameter of dtype ``param``: its own, if the group does not say otherwise.

    With ``master="remainder"`` it is fp32, as that of an fp32 master.
    """
    if group["state_dtype"] != "auto":
        return STATE_DTYPES[group["state_dtype"]]
    return torch.float32 if has_remainder(group, param) else param


def has_remainder(group: Mapping[str, Any], param: torch.dtype) -> bool:
    """Whether a parameter of dtype ``param`` has an fp32 master, of which it is the upper half."""
    return group["master"] == "remainder" and param == torch.bfloat16
