"""Statistics of the benchmarks: the median of paired ratios, its interval, and what may be concluded from it.

In each round every candidate is timed once, one soon after the other, so that a ratio within a round is free of what
slows the machine for longer than a round. The interval of the median is the one between two order statistics: of n
independent ratios, the number below the true median is binomial(n, 1/2), whatever the ratios' distribution. It assumes
nothing of the noise but that rounds are independent; that is what a comparison of a candidate with itself is for.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
TOLERANCE = 0.02  # a candidate's ratio to itself must be known to lie this near to 1


class Interval(NamedTuple):
    """A median, and the interval that holds the true one with probability ``coverage``.

    Attributes:
        coverage: at least the confidence that was asked for, where so few values allow it.
        count: number of values.
    """

    median: float
    low: float
    high: float
    coverage: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The narrowest interval between the k-th smallest and the k-th largest value that covers the true median.

    With fewer than 6 values the interval from the smallest to the largest has less than 95 % coverage; it is returned,
    with the coverage that it has.

    Example:
        >>> median_interval([1, 2, 3, 4, 5, 6, 7, 8, 9])
        Interval(median=5, low=2, high=8, coverage=0.9609375, count=9)
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    ordered, n = sorted(values), len(values)
    below, k, coverage = 0, 0, 0.0
    for more in range((n + 1) // 2):
        below += math.comb(n, more)  # / 2**n: the probability that at most `more` values lie below the true median
        if more > 0 and 1 - 2 * below / 2**n < confidence:
            break
        k, coverage = more, 1 - 2 * below / 2**n
    return Interval(statistics.median(ordered), ordered[k], ordered[n - 1 - k], coverage, n)


def paired(values: Sequence[float], references: Sequence[float], factor: float = 1.0) -> Interval:
    """The interval of ``factor * value / reference``, round by round."""
    return median_interval([factor * value / other for value, other in zip(values, references, strict=True)])


def conclusive(same: Interval, tolerance: float = TOLERANCE) -> bool:
    """Whether a run that compared a candidate with itself may be trusted: the interval lies within 1 +- tolerance."""
    return 1 - tolerance <= same.low and same.high <= 1 + tolerance and same.coverage >= CONFIDENCE


def verdict(interval: Interval, limit: float, trusted: bool = True) -> str:
    """``holds``: the whole interval is at most the limit; ``misses``: it is above; ``open``: the limit lies in it."""
    if not trusted or interval.coverage < CONFIDENCE:
        return "inconclusive"
    if interval.high <= limit:
        return "holds"
    return "misses" if interval.low > limit else "open"
