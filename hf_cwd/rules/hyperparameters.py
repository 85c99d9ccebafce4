"""Declared hyper-parameters: one place for the default, the type, the valid range and how a string is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_cwd.orthogonalize import COEFFICIENTS


@dataclass(frozen=True)
class Real:
    """A float in ``[low, high)``; ``high`` None means unbounded. A one-element tensor is taken where ``tensor``."""

    default: float
    low: float = 0.0
    high: float | None = None
    tensor: bool = False

    @property
    def valid(self) -> str:
        return f"a number >= {self.low:g}" + (f" and < {self.high:g}" if self.high is not None else "")

    def parse(self, text: str) -> float:
        return self.check(float(text))

    def check(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and (not self.tensor or value.numel() != 1):
            raise ValueError
        number = float(value)
        # NaN fails every comparison, so it is refused here too.
        if isinstance(value, bool) or not (self.low <= number < (float("inf") if self.high is None else self.high)):
            raise ValueError
        return value


@dataclass(frozen=True)
class Integer:
    """An int in ``[low, high]``."""

    default: int
    low: int
    high: int

    @property
    def valid(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def parse(self, text: str) -> int:
        return self.check(int(text))

    def check(self, value: Any) -> int:
        if isinstance(value, bool) or value != int(value) or not self.low <= value <= self.high:
            raise ValueError
        return int(value)


@dataclass(frozen=True)
class Flag:
    """True or False. Strings are read as words: ``bool("false")`` would be True."""

    default: bool
    valid = "true or false"

    def parse(self, text: str) -> bool:
        return {"true": True, "false": False}[text.lower()]

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True)
class Choice:
    """One of some words. ``aliases``: other optimizers' values for them."""

    default: str
    choices: tuple[str, ...]
    aliases: Mapping[Any, str] = field(default_factory=dict)

    @property
    def valid(self) -> str:
        return "one of " + ", ".join(self.choices)

    def parse(self, text: str) -> str:
        return self.check(text)

    def check(self, value: Any) -> str:
        value = self.aliases.get(value, value)
        if value not in self.choices:
            raise ValueError
        return value


@dataclass(frozen=True)
class Betas:
    """Two floats in ``[0, 1)``, written ``0.9:0.95`` in a string."""

    default: tuple[float, float]
    valid = "two numbers >= 0 and < 1, written 0.9:0.95 on a command line"

    def parse(self, text: str) -> tuple[float, float]:
        return self.check([float(part) for part in text.split(":")])

    def check(self, value: Any) -> tuple[float, float]:
        first, second = value
        if not (0 <= first < 1 and 0 <= second < 1):
            raise ValueError
        return (first, second)


@dataclass(frozen=True)
class Coefficients:
    """Newton-Schulz coefficients: the name of a table, ``(a, b, c)``, or a sequence of such triples."""

    default: str

    @property
    def valid(self) -> str:
        return f"one of {', '.join(COEFFICIENTS)}, or a:b:c on a command line, or (a, b, c), or several such triples"

    def parse(self, text: str) -> Any:
        return self.check(text if text in COEFFICIENTS else [float(part) for part in text.split(":")])

    def check(self, value: Any) -> Any:
        if isinstance(value, str):
            COEFFICIENTS[value]
            return value
        triples = value if isinstance(value[0], Sequence) else [value]
        return tuple((float(a), float(b), float(c)) for a, b, c in triples)


Hyperparameter = Real | Integer | Flag | Choice | Betas | Coefficients


def checked(owner: str, name: str, kind: Hyperparameter, value: Any, *, text: bool = False) -> Any:
    """``value`` as ``kind`` takes it, or a ValueError that names the value and what would be valid.

    Args:
        owner: who is configured, for the message (``"adamw"``, ``"--optim_args"``).
        text: ``value`` is a string from a command line.
    """
    try:
        return kind.parse(value) if text else kind.check(value)
    except (ValueError, TypeError, KeyError, IndexError):
        raise ValueError(f"{owner}: {name}={value!r} is not valid: {name} is {kind.valid}") from None
