"""Which pictures a page has: one for each measure of all parameters, then rows of small ones for the parts."""

from collections.abc import Sequence
from typing import NamedTuple

from hf_cwd.report import svg
from hf_cwd.report.figures import logged_keys
from hf_cwd.report.measures import CWD, Measure, in_order, is_evaluation, measure_of, part_of
from hf_cwd.report.parts import measures, parts
from hf_cwd.report.read import Run

CHARTS = 60  # that a page has at most


class Chart(NamedTuple):
    """What one picture shows: one of the whole model, or a small one for a part of it, in a row of such."""

    name: str
    key: str
    measure: Measure
    title: str
    unit: str
    about: str = ""
    marks: bool = False
    since: float = 0.0  # the first step shown
    row: tuple[str, ...] = ()  # the keys of the row, whose pictures have one scale

    @property
    def part(self) -> str:
        """The part of the model that it is of."""
        return part_of(self.key) if self.row else ""


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts that the runs have values for, in the order of the page."""
    keys = logged_keys(runs)
    found: list[Chart] = []
    if "loss" in keys:
        found.append(_chart("loss"))
        last = max(run.step for run in runs)
        if max(len(run.series("loss").after(last / 2).steps) for run in runs) >= 10:
            about = "The same from half of the steps on, smoothed, where differences are small."
            late = _chart("loss")._replace(name="loss_late", title="Training loss, second half", about=about)
            found.append(late._replace(since=last / 2))
    for key in sorted(filter(is_evaluation, keys), key=lambda key: key != "eval_loss"):
        found.append(_chart(key)._replace(marks=True))
    found += map(_chart, in_order(keys))
    rates = [key for key in keys if not key.startswith(CWD) and ("learning_rate" in key or "decay" in key)]
    speeds = [k for k in keys if k.startswith("train_tokens_per_second") or "step_time" in k or "time_per_step" in k]
    found += [_chart(key) for key in ("grad_norm", *rates, *speeds, "num_input_tokens_seen") if key in keys]
    for name in measures(keys):
        row = tuple(key for key in (f"{CWD}{part}/{name}" for part in parts(keys)) if key in keys)
        found += [_chart(key)._replace(row=row) for key in row]
    names = [svg.identifier(chart.name) for chart in found]
    return [
        chart._replace(name=name if names.count(name) == 1 else f"{name}-{i}")
        for i, (chart, name) in enumerate(zip(found, names, strict=True))
    ]


def _chart(key: str) -> Chart:
    measure = measure_of(key)
    return Chart(key, key, measure, measure.title, measure.unit, measure.about)
