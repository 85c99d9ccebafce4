"""Draws the charts, as SVG for the page and as PNG."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_cwd.report import svg
from hf_cwd.report.axes import dress
from hf_cwd.report.chart_list import CHARTS, Chart, charts
from hf_cwd.report.compare import SeedGroup
from hf_cwd.report.measures import scope_in_words
from hf_cwd.report.read import Run
from hf_cwd.report.series import Series, average, mean
from hf_cwd.report.svg import INK, pen

POINTS = 2000  # of one curve; a chart has fewer columns of pixels
IN_ALL = 40_000  # points in one chart
LARGE, SMALL = (5.6, 3.2), (3.3, 2.3)  # inches; text must be legible on a phone
RC = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text, with the page's font and colour, and screen readers can read it
    "text.parse_math": False,  # a name may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.unicode_minus": True,
}


class Drawn(NamedTuple):
    """A drawn chart: inline SVG for the page, and the file name of the PNG."""

    chart: Chart
    svg: str
    png: str


def draw(runs: Sequence[Run], groups: Sequence[SeedGroup], folder: Path, *, span: float) -> list[Drawn]:
    """Draws every chart, and writes the PNGs into `folder`.

    Args:
        span: the number of steps over which noisy curves are smoothed.
    """
    drawn = []
    for chart in charts(runs)[:CHARTS]:
        with matplotlib.rc_context({**RC, "svg.hashsalt": chart.name}):
            figure = Figure(figsize=SMALL if chart.row else LARGE, layout="constrained")
            axes = figure.subplots()
            used = _curves(axes, chart, runs, groups, span)
            dress(axes, chart, runs)
            text = _save(figure, "svg")
            png = f"{chart.name}.png"
            title = f"{chart.title}: {scope_in_words(chart.scope)}" if chart.scope else chart.title
            axes.set_title(title, loc="left", fontweight="bold", fontsize=10 if chart.row else 11)
            _legend(figure, [(place, groups[place].label) for place in used])
            (folder / png).write_bytes(_save(figure, "png"))
        labels = [group.label for group in groups]
        inline = svg.inline(text.decode(), chart.name, _description(chart, runs, groups), labels)
        drawn.append(Drawn(chart, inline, png))
    return drawn


def _description(chart: Chart, runs: Sequence[Run], groups: Sequence[SeedGroup]) -> str:
    """A description of the chart for screen readers: the last value of each curve."""
    ends = []
    for group in groups:
        last = [s.values[-1] for s in (runs[member].series(chart.key) for member in group.members) if s.values]
        if last:
            ends.append(f"{group.label} {chart.measure.format.text(mean(last))}")
    scope = f" of {scope_in_words(chart.scope)}" if chart.scope else ""
    return f"Line chart: {chart.title}{scope} by optimizer step. Last values: {', '.join(ends)}."


def _save(figure: Figure, form: str) -> bytes:
    file = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name may have characters that the font lacks
        figure.savefig(file, format=form, dpi=150, transparent=form == "svg", metadata=metadata)
    return file.getvalue()


def _curves(axes: Axes, chart: Chart, runs: Sequence[Run], groups: Sequence[SeedGroup], span: float) -> list[int]:
    """Draws the curves of `chart`, and returns the positions of the groups that have one."""
    count = sum(bool(run.series(chart.key).steps) for run in runs)
    most = min(POINTS, max(100, IN_ALL // (2 * max(count, 1))))
    used = []
    for place, group in enumerate(groups):
        many = [s for s in (_drawable(runs[member].series(chart.key)) for member in group.members) if s.steps]
        if not many:
            continue
        used.append(place)
        for number, (series, thick) in enumerate(_thick_and_thin(many, chart, span)):
            series = series.after(chart.since).thin(most)
            style = pen(place, thick=thick, crowd=len(groups) > 8)
            alone = len(series.steps) == 1
            if (chart.marks and thick) or alone:
                style |= {"marker": svg.marker(place), "markersize": 5, "markeredgewidth": 0}
            axes.plot(*series, gid=f"line-{place}-{number}", **style)
    return used


def _drawable(series: Series) -> Series:
    """Replaces values that no axis can show by NaN."""
    return Series(series.steps, [v if abs(v) < 1e30 else math.nan for v in series.values])


def _thick_and_thin(many: Sequence[Series], chart: Chart, span: float) -> Iterator[tuple[Series, bool]]:
    """Yields the curves and whether each is thick: a run is thin if its smoothed curve or the mean over seeds is drawn.

    The mean needs steps that all runs have.
    """
    means = [average(many)] if len(many) > 1 else list(many)
    if len(means[0].steps) < 2 or all(math.isnan(v) for v in means[0].values):
        means = list(many)
    if chart.measure.noisy or len(many) > 1:
        yield from ((series, False) for series in many if not chart.since)
    yield from ((series.smooth(span) if chart.measure.noisy else series, True) for series in means)


def _legend(figure: Figure, entries: Sequence[tuple[int, str]]) -> None:
    """Adds a legend below the axes, in as many columns as the names allow, and makes the figure higher."""
    labels = [label if len(label) <= 60 else f"{label[:59]}…" for _, label in entries]
    handles: list[Any] = [Line2D([], [], **pen(place, thick=True)) for place, _ in entries]
    if not labels:
        return
    columns = max(1, min(4, len(labels), int(84 / (max(map(len, labels)) + 8))))
    figure.set_figheight(figure.get_figheight() + 0.25 + 0.21 * math.ceil(len(labels) / columns))
    legend = figure.legend(
        handles, ["x"] * len(labels), loc="outside lower left", ncols=columns, frameon=False, fontsize=9, handlelength=3
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)  # given as a label, a name with a leading underscore would be left out
