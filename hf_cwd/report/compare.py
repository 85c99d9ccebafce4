"""Runs side by side: which settings differ, what differs only in the seed, and what can be said of two settings."""

import math
from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any, NamedTuple

from hf_cwd.report.read import Run, without_seed
from hf_cwd.report.series import mean


class Setting(NamedTuple):
    """Runs that differ only in the seed; `members` are their places in the list of runs."""

    label: str
    members: list[int]


class Paired(NamedTuple):
    """Two settings over the seeds that both have: the mean of the differences, and its 95 % confidence interval.

    `low` and `high` are None of fewer than two seeds; `left_out` are common seeds with a value that is not finite.
    """

    seeds: list[int]
    difference: float | None
    low: float | None
    high: float | None
    left_out: list[int]


def settings(runs: Sequence[Run]) -> list[Setting]:
    """Runs by their settings, in the order of the runs. A run whose seed is not known stands for itself."""
    by_identity: dict[tuple[Any, ...], list[int]] = {}
    for place, run in enumerate(runs):
        by_identity.setdefault(run.identity if run.seed is not None else (place,), []).append(place)
    groups = list(by_identity.values())
    labels = [_common_name(runs, members) for members in groups]
    if len(set(labels)) < len(labels):
        labels = [runs[members[0]].name for members in groups]
    return [Setting(label, members) for label, members in zip(labels, groups, strict=True)]


def _common_name(runs: Sequence[Run], members: Sequence[int]) -> str:
    """The name that all members have but for the seed in it; else the first one's."""
    names = {without_seed(runs[place].name) for place in members}
    return names.pop() if len(members) > 1 and len(names) == 1 and "" not in names else runs[members[0]].name


def differing(runs: Sequence[Run]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Settings that differ, with a value for each run (None: not set, or not known), and those that do not.

    What a run says nothing of is a difference only if its record would say it: if another run's does.
    """
    rows = {key: [run.settings.get(key) for run in runs] for key in dict.fromkeys(k for r in runs for k in r.settings)}
    apart, common = {}, {}
    for key, values in rows.items():
        recorded = any(run.recorded and key in run.known.own for run in runs)
        known = [v for v, run in zip(values, runs, strict=True) if v is not None or (recorded and run.recorded)]
        if any(value != known[0] for value in known):
            apart[key] = values
        else:
            common[key] = known[0]
    return apart, common


def by_seed(runs: Sequence[Run], setting: Setting, values: Sequence[float | None]) -> dict[int | None, float]:
    """The value of each seed, of runs that came to their end; of several with one seed, their mean."""
    found: dict[int | None, list[float]] = {}
    for place in setting.members:
        value = values[place]
        if value is not None and runs[place].finished:
            found.setdefault(runs[place].seed, []).append(value)
    return {seed: mean(many) for seed, many in found.items()}


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of fewer than two values or of one that is not finite."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def paired(one: Mapping[int | None, float], base: Mapping[int | None, float]) -> Paired:
    """`one` less `base`, over their common seeds.

    >>> paired({1: 1.0, 2: 3.0, 3: 2.0}, {1: 0.0, 2: 0.0, 3: 0.0})._asdict()["difference"]
    2.0
    """
    common = sorted(seed for seed in one.keys() & base.keys() if seed is not None)
    seeds = [seed for seed in common if math.isfinite(one[seed]) and math.isfinite(base[seed])]
    left_out = [seed for seed in common if seed not in seeds]
    if not seeds:
        return Paired(seeds, None, None, None, left_out)
    differences = [one[seed] - base[seed] for seed in seeds]
    middle = mean(differences)
    if len(seeds) < 2:
        return Paired(seeds, middle, None, None, left_out)
    half = t_quantile(len(seeds) - 1) * stdev(differences) / math.sqrt(len(seeds))
    return Paired(seeds, middle, middle - half, middle + half, left_out)


def t_quantile(df: int, confidence: float = 0.95) -> float:
    """The t with P(|T| < t) = `confidence`, of Student's distribution with `df` degrees of freedom.

    By bisection of the finite sums for whole `df` (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    >>> [round(t_quantile(df), 3) for df in (1, 2, 3, 10, 30)]
    [12.706, 4.303, 3.182, 2.228, 2.042]
    """
    low, high = 0.0, 1.0
    while _within(high, df) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < confidence else (low, middle)
    return high


def _within(t: float, df: int) -> float:
    """P(|T| < t)."""
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, df, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
