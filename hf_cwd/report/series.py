"""The numbers logged under one key, by step, and how to smooth, average and thin them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hf_cwd.report.measures import CWD, OF_STEPS, STEP


class Series(NamedTuple):
    """Steps in ascending order, and a value for each, which may be NaN or infinite."""

    steps: list[int]
    values: list[float]

    @property
    def bad(self) -> list[int]:
        """Steps whose value is NaN or infinite."""
        return [step for step, value in zip(*self, strict=True) if not math.isfinite(value)]

    def after(self, step: float) -> "Series":
        """The part after `step`."""
        kept = [(s, v) for s, v in zip(*self, strict=True) if s > step]
        return Series([s for s, _ in kept], [v for _, v in kept])

    def last_tenth(self) -> float | None:
        """The mean over the last 10 % of the steps, or the last value if there is only one; None for no steps."""
        if not self.steps:
            return None
        last = self.steps[-1]
        return mean(self.after(min(0.9 * last, last - 1)).values)

    def smooth(self, span: float) -> "Series":
        """Replaces each value by a mean over all values with weights exp(-distance / `span`), in steps.

        The distance is in steps, so that runs with different logging intervals are smoothed alike. Values on both sides
        count, so that a falling curve does not lag. Values that are not finite stay, and have no weight.

        >>> Series([1, 2, 3], [1.0, 1.0, 1.0]).smooth(10).values
        [1.0, 1.0, 1.0]
        """
        if span <= 0:
            return self
        finite = [math.isfinite(value) for value in self.values]
        values = [value if good else 0.0 for value, good in zip(self.values, finite, strict=True)]
        totals, weights = (
            _both_ways(self.steps, values, span),
            _both_ways(self.steps, [float(good) for good in finite], span),
        )
        return Series(
            self.steps,
            [t / w if good else v for v, good, t, w in zip(self.values, finite, totals, weights, strict=True)],
        )

    def thin(self, most: int) -> "Series":
        """Keeps at most `most` points: the lowest, the highest and a NaN of each interval, so that spikes stay."""
        if len(self.steps) <= most:
            return self
        size = math.ceil(len(self.steps) / max(most // 3, 1))
        kept: list[int] = []
        for start in range(0, len(self.steps), size):
            places = range(start, min(start + size, len(self.steps)))
            finite = [i for i in places if math.isfinite(self.values[i])]
            chosen = {i for i in places if not math.isfinite(self.values[i])}
            chosen = set(sorted(chosen)[:1])
            if finite:
                chosen |= {min(finite, key=self.values.__getitem__), max(finite, key=self.values.__getitem__)}
            kept += sorted(chosen)
        return Series([self.steps[i] for i in kept], [self.values[i] for i in kept])


def by_key(history: Iterable[dict[str, Any]]) -> dict[str, Series]:
    """The series of each key, in the order in which the keys appear.

    A resumed run repeats some steps: the later entries replace the earlier ones. If an entry has ``cwd/step``, its
    ``cwd/`` measures belong to that earlier step.
    """
    result: dict[str, Series] = {}
    for entry in history:
        measured = entry.get(STEP)
        if isinstance(measured, bool) or not isinstance(measured, int) or not 0 <= measured <= entry["step"]:
            measured = entry["step"]
        for key, value in entry.items():
            step = measured if key.startswith(CWD) and key.rsplit("/", 1)[-1] in OF_STEPS else entry["step"]
            if key in ("step", STEP) or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            steps, values = result.setdefault(key, Series([], []))
            while steps and steps[-1] >= step:
                steps.pop()
                values.pop()
            steps.append(step)
            values.append(number(value))
    return result


def _both_ways(steps: Sequence[int], values: Sequence[float], span: float) -> list[float]:
    """For each step, the sum of all values with weights exp(-distance / `span`)."""
    before, after = _one_way(steps, values, span), _one_way(steps[::-1], values[::-1], span)[::-1]
    return [b + a - value for b, a, value in zip(before, after, values, strict=True)]


def _one_way(steps: Sequence[int], values: Sequence[float], span: float) -> list[float]:
    """The same sum over the values up to each step."""
    total, last, sums = 0.0, 0, []
    for step, value in zip(steps, values, strict=True):
        total = total * math.exp(-abs(step - last) / span) + value
        sums.append(total)
        last = step
    return sums


def number(value: int | float) -> float:
    """Converts a number to float; integers that are too large become infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN or infinite if a value is."""
    return sum(values) / len(values)


def average(many: Sequence[Series]) -> Series:
    """The mean of several series at their common steps."""
    tables = [dict(zip(*one, strict=True)) for one in many]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    return Series(common, [mean([table[step] for table in tables]) for step in common])
