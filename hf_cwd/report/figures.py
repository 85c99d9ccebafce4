"""The final figures of runs, computed from their logs."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hf_cwd.report.measures import in_order, is_evaluation, measure_of
from hf_cwd.report.numbers import COUNT, LOSS, PLAIN, RATE, TIME, NumberFormat
from hf_cwd.report.read import Run
from hf_cwd.report.series import Series, mean, number


class Figure(NamedTuple):
    """A column of a table: a value for each run, None for a run without one."""

    key: str
    label: str
    format: NumberFormat
    values: list[float | None]
    about: str = "model"  # the table that it is in: "model", "updates" or "speed"
    quality: bool = False  # whether it measures the quality of the model, and is compared over seeds


def logged_keys(runs: Iterable[Run]) -> list[str]:
    """Every key under which a number was logged, in the order of first appearance."""
    return list(dict.fromkeys(key for run in runs for key in run.logged))


def figures(runs: Sequence[Run]) -> list[Figure]:
    """The figures that at least one run has; training loss and evaluations first, speeds last."""
    keys = logged_keys(runs)
    table = [
        Figure("steps", "Steps", COUNT, [run.step for run in runs]),
        of_key(runs, "loss")._replace(quality=True),
    ]
    evaluations = sorted(filter(is_evaluation, keys), key=lambda key: (key != "eval_loss", not key.endswith("_loss")))
    for key in evaluations:
        measure = measure_of(key)
        table.append(Figure(key, measure.title, measure.format, [_last(r, key) for r in runs], quality=True))
        if key == "eval_loss":
            table.append(Figure("lowest", "Lowest evaluation loss", LOSS, [_lowest(run) for run in runs]))
    table.append(_result(runs, "perplexity", "Perplexity", PLAIN)._replace(quality=True))
    table += [of_key(runs, key)._replace(about="updates") for key in (*in_order(keys), "grad_norm")]
    table += _speeds(runs)
    if _values(table, "lowest") == _values(table, "eval_loss"):
        table = [figure for figure in table if figure.key != "lowest"]  # every run ended with its best one
    return [figure for figure in table if any(value is not None for value in figure.values)]


def _values(table: Iterable[Figure], key: str) -> list[float | None] | None:
    return next((figure.values for figure in table if figure.key == key), None)


def _speeds(runs: Sequence[Run]) -> list[Figure]:
    summaries = [next((e for e in reversed(run.history) if "train_loss" in e), {}) for run in runs]

    def of_summary(key: str, label: str, number_format: NumberFormat) -> Figure:
        values = [_value(s.get(key, run.results.get(key))) for s, run in zip(summaries, runs, strict=True)]
        return Figure(key, label, number_format, values, "speed")

    tokens = [_last(run, "num_input_tokens_seen") for run in runs]
    speeds = [
        of_summary("train_runtime", "Training time", TIME),
        Figure("evaluating", "of it evaluating", TIME, [_evaluating(run) for run in runs], "speed"),
        of_summary("train_samples_per_second", "Samples a second", RATE),
        of_summary("train_steps_per_second", "Steps a second", RATE),
        Figure("num_input_tokens_seen", "Input tokens seen", COUNT, tokens, "speed"),
        _result(runs, "train_tokens", "Training tokens", COUNT)._replace(about="speed"),
    ]
    rates = [_value(run.results.get("train_tokens_per_second", _last(run, "train_tokens_per_second"))) for run in runs]
    speeds.append(Figure("train_tokens_per_second", "Tokens a second", RATE, rates, "speed"))
    for key in logged_keys(runs):
        if "step_time" in key or key.endswith("time_per_step"):
            means = [run.series(key).values for run in runs]
            values = [mean(v) if v else None for v in means]
            speeds.append(Figure(key, f"{measure_of(key).title} (mean)", RATE, values, "speed"))
    return speeds


def of_key(runs: Sequence[Run], key: str) -> Figure:
    """The figure that summarises the values logged under `key`."""
    measure, many = measure_of(key), [run.series(key) for run in runs]
    words, reduce = {
        "last": ("", lambda series: series.values[-1]),
        "run": (" (mean)", lambda series: mean(series.values)),
        "tenth": (" (last 10 %)", Series.last_tenth),
    }[measure.final]
    values = [reduce(series) if series.steps else None for series in many]
    return Figure(key, measure.title + words, measure.format, values)


def _result(runs: Sequence[Run], key: str, label: str, number_format: NumberFormat) -> Figure:
    return Figure(key, label, number_format, [_value(run.results.get(key)) for run in runs])


def _last(run: Run, key: str) -> float | None:
    values = run.series(key).values
    return values[-1] if values else None


def _lowest(run: Run) -> float | None:
    return min((v for v in run.series("eval_loss").values if math.isfinite(v)), default=None)


def _evaluating(run: Run) -> float | None:
    """The seconds of evaluations during training, which the Trainer counts as training time."""
    ends = [i for i, entry in enumerate(run.history) if "train_loss" in entry]
    if not ends:
        return None
    entries = run.history[: ends[-1]]
    return sum(_value(entry.get("eval_runtime")) or 0.0 for entry in entries)


def _value(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return number(value)
