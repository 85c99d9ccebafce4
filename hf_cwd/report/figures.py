"""The final figures of a run: what its log comes to."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hf_cwd.report.numbers import COUNT, LOSS, PERCENT, PLAIN, RATE, TIME, Kind
from hf_cwd.report.read import Run
from hf_cwd.report.series import mean, number

FRACTION = "cwd/decayed_fraction"
SPEEDS = ("_per_second", "_runtime")


class Figure(NamedTuple):
    """One column of a table: a value for each run, None where a run does not have it."""

    key: str
    label: str
    kind: Kind
    values: list[float | None]
    speed: bool = False
    quality: bool = False  # of the trained model: worth comparing over seeds


def logged_keys(runs: Iterable[Run]) -> list[str]:
    """Every key under which a number was logged, in the order of first appearance."""
    return list(dict.fromkeys(key for run in runs for key in run.logged))


def is_evaluation(key: str) -> bool:
    """Whether `key` is a figure of an evaluation, not of how long it took."""
    return key.startswith("eval_") and not key.endswith(SPEEDS) and key != "eval_model_preparation_time"


def kind_of(key: str) -> Kind:
    """How values logged under `key` are written."""
    if key == "loss" or key.endswith("_loss"):
        return LOSS
    if key.endswith(("_fraction", "accuracy")):
        return PERCENT
    return PLAIN


def in_words(key: str) -> str:
    """What a key is called in a heading.

    >>> in_words("eval_loss"), in_words("cwd/update_to_weight"), in_words("grad_norm")
    ('Evaluation loss', 'CWD: update to weight', 'Gradient norm')
    """
    known = {
        "loss": "Training loss",
        "grad_norm": "Gradient norm",
        FRACTION: "Decayed fraction",
        "num_input_tokens_seen": "Input tokens seen",
    }
    if key in known:
        return known[key]
    for prefix, name in (("eval_", "Evaluation "), ("cwd/", "CWD: ")):
        if key.startswith(prefix) and len(key) > len(prefix):
            return name + key.removeprefix(prefix).replace("_", " ")
    return (key[:1].upper() + key[1:]).replace("_", " ")


def figures(runs: Sequence[Run]) -> list[Figure]:
    """The figures that at least one run has; training loss and evaluations first, speeds last."""
    keys = logged_keys(runs)
    table = [
        Figure("steps", "Steps", COUNT, [run.step for run in runs]),
        _tenth(runs, "loss", quality=True),
    ]
    evaluations = sorted(filter(is_evaluation, keys), key=lambda key: (key != "eval_loss", not key.endswith("_loss")))
    for key in evaluations:
        table.append(Figure(key, in_words(key), kind_of(key), [_last(r, key) for r in runs], quality=True))
        if key == "eval_loss":
            table.append(Figure("lowest", "Lowest evaluation loss", LOSS, [_lowest(run) for run in runs]))
    table.append(_result(runs, "perplexity", "Perplexity", PLAIN)._replace(quality=True))
    shares = [run.series(FRACTION).values for run in runs]
    table.append(
        Figure(FRACTION, "Decayed fraction (mean)", PERCENT, [mean(values) if values else None for values in shares])
    )
    table += [_tenth(runs, key) for key in keys if key.startswith("cwd/") and key != FRACTION]
    table += [_tenth(runs, "grad_norm"), *_speeds(runs)]
    if _values(table, "lowest") == _values(table, "eval_loss"):
        table = [figure for figure in table if figure.key != "lowest"]  # the last one was the best of every run
    return [figure for figure in table if any(value is not None for value in figure.values)]


def _values(table: Iterable[Figure], key: str) -> list[float | None] | None:
    return next((figure.values for figure in table if figure.key == key), None)


def _speeds(runs: Sequence[Run]) -> list[Figure]:
    summaries = [next((e for e in reversed(run.history) if "train_loss" in e), {}) for run in runs]

    def of_summary(key: str, label: str, kind: Kind) -> Figure:
        values = [_value(s.get(key, run.results.get(key))) for s, run in zip(summaries, runs, strict=True)]
        return Figure(key, label, kind, values, speed=True)

    tokens = [_last(run, "num_input_tokens_seen") for run in runs]
    speeds = [
        of_summary("train_runtime", "Training time", TIME),
        Figure("evaluating", "of it evaluating", TIME, [_evaluating(run) for run in runs], speed=True),
        of_summary("train_samples_per_second", "Samples a second", RATE),
        of_summary("train_steps_per_second", "Steps a second", RATE),
        Figure("num_input_tokens_seen", "Input tokens seen", COUNT, tokens, speed=True),
        _result(runs, "train_tokens", "Training tokens", COUNT, speed=True),
    ]
    rates = [_value(run.results.get("train_tokens_per_second", _last(run, "train_tokens_per_second"))) for run in runs]
    speeds.append(Figure("train_tokens_per_second", "Tokens a second", RATE, rates, speed=True))
    for key in logged_keys(runs):
        if "step_time" in key or key.endswith("time_per_step"):
            means = [run.series(key).values for run in runs]
            values = [mean(v) if v else None for v in means]
            speeds.append(Figure(key, f"{in_words(key)} (mean)", RATE, values, speed=True))
    return speeds


def _tenth(runs: Sequence[Run], key: str, *, quality: bool = False) -> Figure:
    values = [run.series(key).last_tenth() for run in runs]
    return Figure(key, f"{in_words(key)} (last 10 %)", kind_of(key), values, quality=quality)


def _result(runs: Sequence[Run], key: str, label: str, kind: Kind, *, speed: bool = False) -> Figure:
    return Figure(key, label, kind, [_value(run.results.get(key)) for run in runs], speed=speed)


def _last(run: Run, key: str) -> float | None:
    values = run.series(key).values
    return values[-1] if values else None


def _lowest(run: Run) -> float | None:
    return min((v for v in run.series("eval_loss").values if math.isfinite(v)), default=None)


def _evaluating(run: Run) -> float | None:
    """Seconds of the evaluations on the way, which the Trainer counts as training; not of one after it."""
    ends = [i for i, entry in enumerate(run.history) if "train_loss" in entry]
    if not ends:
        return None
    entries = run.history[: ends[-1]]
    return sum(_value(entry.get("eval_runtime")) or 0.0 for entry in entries)


def _value(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return number(value)
