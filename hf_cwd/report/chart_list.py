"""Lists the charts of a page: one for each measure of all parameters, then rows of small ones for rules and groups."""

from collections.abc import Sequence
from typing import NamedTuple

from hf_cwd.report import svg
from hf_cwd.report.figures import logged_keys
from hf_cwd.report.measures import CWD, Measure, in_order, is_evaluation, measure_of, scope_of
from hf_cwd.report.read import Run
from hf_cwd.report.scopes import measures, scopes

CHARTS = 60  # the most that a page shows


class Chart(NamedTuple):
    """A chart: a large one for all parameters, or a small one for a rule or parameter group, in a row of them."""

    name: str
    key: str
    measure: Measure
    title: str
    unit: str
    about: str = ""
    marks: bool = False
    since: float = 0.0  # the first step shown
    row: tuple[str, ...] = ()  # the keys of all charts in the row, which have the same scale

    @property
    def scope(self) -> str:
        """The rule or parameter group that it shows; empty for all parameters."""
        return scope_of(self.key) if self.row else ""


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts that the runs have values for, in the order of the page."""
    keys = logged_keys(runs)
    result: list[Chart] = []
    if "loss" in keys:
        result.append(_chart("loss"))
        last = max(run.step for run in runs)
        if max(len(run.series("loss").after(last / 2).steps) for run in runs) >= 10:
            about = "The second half of the steps, smoothed, where differences are small."
            late = _chart("loss")._replace(name="loss_late", title="Training loss, second half", about=about)
            result.append(late._replace(since=last / 2))
    for key in sorted(filter(is_evaluation, keys), key=lambda key: key != "eval_loss"):
        result.append(_chart(key)._replace(marks=True))
    result += map(_chart, in_order(keys))
    rates = [key for key in keys if not key.startswith(CWD) and ("learning_rate" in key or "decay" in key)]
    speeds = [k for k in keys if k.startswith("train_tokens_per_second") or "step_time" in k or "time_per_step" in k]
    result += [_chart(key) for key in ("grad_norm", *rates, *speeds, "num_input_tokens_seen") if key in keys]
    for name in measures(keys):
        row = tuple(key for key in (f"{CWD}{scope}/{name}" for scope in scopes(keys)) if key in keys)
        result += [_chart(key)._replace(row=row) for key in row]
    names = [svg.identifier(chart.name) for chart in result]
    return [
        chart._replace(name=name if names.count(name) == 1 else f"{name}-{i}")
        for i, (chart, name) in enumerate(zip(result, names, strict=True))
    ]


def _chart(key: str) -> Chart:
    measure = measure_of(key)
    return Chart(key, key, measure, measure.title, measure.unit, measure.about)
