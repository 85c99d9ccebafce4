"""Compares runs: which settings differ, which runs differ only in their seed, and which differences are significant."""

import math
from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any, NamedTuple

from hf_cwd.report.read import Run, without_seed
from hf_cwd.report.series import mean


class SeedGroup(NamedTuple):
    """Runs that differ only in their seed; `members` are their positions in the list of runs."""

    label: str
    members: list[int]


class Paired(NamedTuple):
    """Two groups compared over their common seeds: the mean difference, and its 95 % confidence interval.

    `low` and `high` are None for fewer than two seeds. `left_out` are common seeds with a value that is not finite.
    """

    seeds: list[int]
    difference: float | None
    low: float | None
    high: float | None
    left_out: list[int]


def seed_groups(runs: Sequence[Run]) -> list[SeedGroup]:
    """Groups runs that differ only in their seed, in the order of the runs. A run without a known seed is a group."""
    by_identity: dict[tuple[Any, ...], list[int]] = {}
    for place, run in enumerate(runs):
        by_identity.setdefault(run.identity if run.seed is not None else (place,), []).append(place)
    groups = list(by_identity.values())
    labels = [_common_name(runs, members) for members in groups]
    if len(set(labels)) < len(labels):
        labels = [runs[members[0]].name for members in groups]
    return [SeedGroup(label, members) for label, members in zip(labels, groups, strict=True)]


def _common_name(runs: Sequence[Run], members: Sequence[int]) -> str:
    """The name of all members without the seed in it, if that is the same; else the name of the first one."""
    names = {without_seed(runs[place].name) for place in members}
    return names.pop() if len(members) > 1 and len(names) == 1 and "" not in names else runs[members[0]].name


def differing(runs: Sequence[Run]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The settings that differ, with a value for each run (None: not set, or unknown), and the settings in common.

    A missing value is a difference only if the run has a record, and the record of another run has the setting.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings.values)
    rows = {key: [run.settings.values.get(key) for run in runs] for key in keys}
    apart, common = {}, {}
    for key, values in rows.items():
        recorded = any(run.recorded and key in run.settings.own for run in runs)
        comparable = [v for v, run in zip(values, runs, strict=True) if v is not None or (recorded and run.recorded)]
        if any(value != comparable[0] for value in comparable):
            apart[key] = values
        else:
            common[key] = comparable[0]
    return apart, common


def by_seed(runs: Sequence[Run], group: SeedGroup, values: Sequence[float | None]) -> dict[int | None, float]:
    """The value of each seed, for finished runs; the mean of several runs with the same seed."""
    of_seed: dict[int | None, list[float]] = {}
    for place in group.members:
        value = values[place]
        if value is not None and runs[place].finished:
            of_seed.setdefault(runs[place].seed, []).append(value)
    return {seed: mean(many) for seed, many in of_seed.items()}


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None for fewer than two values, or if one is not finite."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def paired(one: Mapping[int | None, float], base: Mapping[int | None, float]) -> Paired:
    """`one` minus `base`, over their common seeds.

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
    """The t with P(|T| < t) = `confidence`, for Student's distribution with `df` degrees of freedom.

    It bisects the finite sums for integer `df` (Abramowitz and Stegun, 26.7.3 and 26.7.4).

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
