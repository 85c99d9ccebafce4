"""What is done with a whole matrix between direction and mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_cwd.rules import RULES


@dataclass(frozen=True)
class Stage:
    """The matrix stage of a rule with its hyper-parameters; equal ones can run on one batch of matrices.

    Attributes:
        rule: name of the rule.
        hyper: those of its hyper-parameters that the stage depends on, as sorted pairs.
    """

    rule: str
    hyper: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, rule: str, hyper: Mapping[str, Any]) -> "Stage":
        names = sorted(hyper.keys() & RULES[rule].matrix_hyperparameters)
        return cls(rule, tuple((name, _hashable(hyper[name])) for name in names))

    def __call__(self, u: Tensor) -> Tensor:
        return RULES[self.rule].matrix(u, **dict(self.hyper))

    def scale(self, shape: Sequence[int]) -> float:
        return RULES[self.rule].scale(shape, **dict(self.hyper))

    def flops(self, shape: tuple[int, int]) -> int:
        return RULES[self.rule].matrix_flops(*shape, **dict(self.hyper))

    def wire(self, direction: torch.dtype, device: str) -> torch.dtype:
        """The dtype that matrices travel in: the stage's own if it is narrower, since the stage rounds to it anyway."""
        number = RULES[self.rule].matrix_dtype(direction, device, **dict(self.hyper))
        return min(direction, number, key=lambda dtype: dtype.itemsize)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
