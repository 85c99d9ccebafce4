"""Declared hyper-parameters: one place for the default, the type, the valid range and how a string is read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real as RealNumber
from typing import Any

from torch import Tensor

from hf_cwd.newton_schulz.orthogonalize import COEFFICIENTS


@dataclass(frozen=True)
class Real:
    """A float in ``[low, high)``; ``high`` None means unbounded. A one-element tensor is taken where ``tensor``."""

    default: float
    low: float = 0.0
    high: float | None = None
    tensor: bool = False

    @property
    def valid(self) -> str:
        number = f"a finite number >= {self.low:g}" + (f" and < {self.high:g}" if self.high is not None else "")
        return f"{number} (or a floating-point tensor of one)" if self.tensor else number

    def parse(self, text: str) -> float:
        return self.check(float(text))

    def check(self, value: Any) -> float | Tensor:
        if self.tensor and isinstance(value, Tensor):
            # A schedule writes to a tensor in place: it must be able to hold the number, and have no history.
            if value.numel() != 1 or not value.is_floating_point() or value.is_meta or value.requires_grad:
                raise ValueError
            self.check(value.item())
            return value
        number = _number(value)
        # NaN fails every comparison, so it is refused here too.
        if not self.low <= number < (math.inf if self.high is None else self.high):
            raise ValueError
        return number


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
        number = _number(value)
        if not number.is_integer() or not self.low <= number <= self.high:
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
        first, second = _numbers(value)
        if not (0 <= first < 1 and 0 <= second < 1):
            raise ValueError
        return (first, second)


@dataclass(frozen=True)
class Coefficients:
    """Newton-Schulz coefficients: the name of a table, ``(a, b, c)``, or a sequence of such triples.

    A string has the numbers of all triples after one another, ``a:b:c:a:b:c``.
    """

    default: str

    @property
    def valid(self) -> str:
        return (
            f"one of {', '.join(COEFFICIENTS)}, or (a, b, c) or several such triples, with a >= 1, written a:b:c or "
            "a:b:c:a:b:c on a command line"
        )

    def parse(self, text: str) -> Any:
        if text in COEFFICIENTS:
            return text
        numbers = [float(part) for part in text.split(":")]
        return self.check([numbers[start : start + 3] for start in range(0, len(numbers), 3)])

    def check(self, value: Any) -> Any:
        if isinstance(value, str):
            COEFFICIENTS[value]
            return value
        triples = value if isinstance(value[0], Sequence) else [value]
        return tuple(self._triple(each) for each in triples)

    @staticmethod
    def _triple(value: Any) -> tuple[float, float, float]:
        a, b, c = _numbers(value)
        # Each iteration multiplies singular values near 0 by a, and is to bring them to 1.
        if not (a >= 1 and math.isfinite(a + b + c)):
            raise ValueError
        return (a, b, c)


Hyperparameter = Real | Integer | Flag | Choice | Betas | Coefficients


def checked(owner: str, name: str, kind: Hyperparameter, value: Any, *, text: bool = False) -> Any:
    """``value`` as ``kind`` takes it, or a ValueError that names the value and what would be valid.

    NumPy's scalars and arrays are taken as the Python numbers and lists that they hold.

    Args:
        owner: who is configured, for the message (``"adamw"``, ``"--optim_args"``).
        text: ``value`` is a string from a command line.
    """
    try:
        return kind.parse(value) if text else kind.check(_plain(value))
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        raise ValueError(f"{owner}: {name}={value!r} is not valid: {name} is {kind.valid}") from None


def _plain(value: Any) -> Any:
    return value.tolist() if type(value).__module__ == "numpy" else value


def _number(value: Any) -> float:
    """A real number as a float; True and ``"1e-3"`` are none."""
    if isinstance(value, bool) or not isinstance(value, RealNumber):
        raise TypeError
    return float(value)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, str) or not isinstance(value, Sequence):  # a set has no order, and a mapping loses values
        raise TypeError
    return [_number(_plain(each)) for each in value]
