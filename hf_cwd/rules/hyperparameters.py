"""Types of hyper-parameters: each has a default, a valid range, a check of values and a parser of strings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real as RealNumber
from typing import Any

from torch import Tensor

from hf_cwd.newton_schulz.orthogonalize import COEFFICIENTS


@dataclass(frozen=True)
class Real:
    """A float in ``[low, high)``; ``high=None`` means unbounded. With ``tensor`` a one-element tensor is valid too."""

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
            # A schedule writes to the tensor in place, so that it must be floating-point and need no gradient.
            if value.numel() != 1 or not value.is_floating_point() or value.is_meta or value.requires_grad:
                raise ValueError
            self.check(value.item())
            return value
        number = _number(value)
        # NaN fails every comparison, so that this refuses it too.
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
    """True or False. The strings "true" and "false" are parsed as words, since ``bool("false")`` is True."""

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
    """One of several strings. ``aliases`` maps other optimizers' values to them."""

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
    """Two floats in ``[0, 1)``, ``0.9:0.95`` as a string."""

    default: tuple[float, float]
    valid = "two numbers >= 0 and < 1"

    def parse(self, text: str) -> tuple[float, float]:
        return self.check([float(part) for part in text.split(":")])

    def check(self, value: Any) -> tuple[float, float]:
        first, second = _numbers(value)
        if not (0 <= first < 1 and 0 <= second < 1):
            raise ValueError
        return (first, second)


@dataclass(frozen=True)
class Coefficients:
    """Newton-Schulz coefficients: the name of a table, a triple ``(a, b, c)``, or a sequence of triples.

    As a string, the numbers of all triples in order: ``a:b:c:a:b:c``.
    """

    default: str

    @property
    def valid(self) -> str:
        return f"one of {', '.join(COEFFICIENTS)}, or (a, b, c) or several such triples, with a >= 1"

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
        # An iteration multiplies singular values near 0 by a, and must bring them closer to 1.
        if not (a >= 1 and math.isfinite(a + b + c)):
            raise ValueError
        return (a, b, c)


Hyperparameter = Real | Integer | Flag | Choice | Betas | Coefficients


def checked(owner: str, name: str, hyperparameter: Hyperparameter, value: Any, *, text: bool = False) -> Any:
    """Validates and converts a value. NumPy scalars and arrays become Python numbers and lists.

    Args:
        owner: what is configured, for the message (``"adamw"``).
        text: whether ``value`` is a string that is to be parsed.

    Raises:
        ValueError: the value is not valid. The message says what is.
    """
    try:
        return hyperparameter.parse(value) if text else hyperparameter.check(_plain(value))
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        raise ValueError(f"{owner}: {name}={value!r} is not valid: {name} is {hyperparameter.valid}") from None


def _plain(value: Any) -> Any:
    return value.tolist() if type(value).__module__ == "numpy" else value


def _number(value: Any) -> float:
    """Converts a real number to float. True and ``"1e-3"`` are not real numbers here."""
    if isinstance(value, bool) or not isinstance(value, RealNumber):
        raise TypeError
    return float(value)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, str) or not isinstance(value, Sequence):  # a set has no order, a mapping would give its keys
        raise TypeError
    return [_number(_plain(each)) for each in value]
