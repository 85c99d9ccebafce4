"""Formats numbers for readers: significant digits, a real minus sign, and units."""

import math
from collections.abc import Callable
from typing import NamedTuple


class NumberFormat(NamedTuple):
    """Functions that format a number, and the difference between a number and a baseline."""

    text: Callable[[float], str]
    difference: Callable[[float, float], str]


def _finite(text: Callable[[float], str]) -> Callable[[float], str]:
    def checked(value: float) -> str:
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "∞" if value > 0 else "\N{MINUS SIGN}∞"
        return text(value).replace("-", "\N{MINUS SIGN}")

    return checked


def significant(value: float, digits: int = 4) -> str:
    """`digits` significant digits; powers of ten outside 1e-4 to 1e6.

    >>> [significant(x) for x in (0.0, 1234.56, 0.123456, 3.2e-05, 7.2e9)]
    ['0', '1,235', '0.1235', '3.2e-05', '7.2e+09']
    """
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:,.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    """The number of decimals that show `digits` significant digits."""
    whole = math.floor(math.log10(abs(value))) + 1 if value else digits
    return max(digits - whole, 0)


def duration(seconds: float) -> str:
    """
    >>> duration(9.87), duration(75), duration(3725), duration(90000)
    ('9.9 s', '1 min 15 s', '1 h 02 min', '1 d 01 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
    seconds = round(seconds)
    for large, small, names in ((86400, 3600, "d h"), (3600, 60, "h min"), (60, 1, "min s")):
        if seconds >= large:
            first, second = names.split()
            return f"{seconds // large} {first} {seconds % large // small:0{1 if large == 60 else 2}d} {second}"
    raise AssertionError(seconds)


def count(value: float) -> str:
    """
    >>> count(240), count(122880), count(1.5e12)
    ('240', '122,880', '1.5 T')
    """
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.4g} {name}"
    return f"{value:,.0f}"


def _signed(text: Callable[[float], str]) -> Callable[[float, float], str]:
    return lambda value, base: _finite(lambda d: _with_sign(text(d)))(value - base)


def _with_sign(text: str) -> str:
    """Adds a plus to positive numbers, and removes the sign of numbers that round to zero."""
    if not any(digit in text for digit in "123456789"):
        return text.removeprefix("-")
    return text if text.startswith("-") else f"+{text}"


def _as_precise(value: float, base: float) -> str:
    """A difference, with as many decimals as the larger of the two numbers."""
    largest = max(abs(value), abs(base))
    if not 1e-4 <= largest < 1e6:
        return _signed(lambda d: significant(d, 3))(value, base)
    return _signed(lambda d: f"{d:,.{_decimals(largest, 4)}f}")(value, base)


def _relative(value: float, base: float) -> str:
    if base == 0:
        return "\N{EN DASH}"
    return _finite(lambda d: f"{_with_sign(f'{d:.1f}')} %")(100 * (value - base) / abs(base))


def fixed(value: float) -> str:
    """Four decimals, for losses; fewer for large numbers.

    >>> fixed(3.21987), fixed(1234.5678)
    ('3.2199', '1,235')
    """
    return f"{value:.4f}" if abs(value) < 100 else significant(value)


LOSS = NumberFormat(_finite(fixed), _signed(fixed))
PLAIN = NumberFormat(_finite(significant), _as_precise)
SHARE = NumberFormat(_finite(lambda v: f"{significant(100 * v, 3)} %"), _relative)  # for values that span decades
PERCENT = NumberFormat(_finite(lambda v: f"{100 * v:.1f} %"), _signed(lambda d: f"{100 * d:.1f} points"))
TIME = NumberFormat(_finite(duration), _relative)
RATE = NumberFormat(_finite(significant), _relative)
COUNT = NumberFormat(_finite(count), _relative)
