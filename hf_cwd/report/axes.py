"""The axes of a chart: scales, ticks and labels."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from hf_cwd.report.chart_list import Chart
from hf_cwd.report.measures import OF_STEPS
from hf_cwd.report.numbers import PERCENT, SHARE
from hf_cwd.report.read import Run
from hf_cwd.report.svg import INK

DECADES = 2  # shown of a curve that is scaled by the learning rate; one that ends at 0 would need a huge axis


def dress(axes: Axes, chart: Chart, runs: Sequence[Run]) -> None:
    """Sets scale, ticks and labels of `axes` for the curves of `chart`. The charts of a row have the same scale."""
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("" if chart.row else chart.unit)  # the title of a row has the unit
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    every = [run.series(key).after(chart.since).values for run in runs for key in chart.row or (chart.key,)]
    curves = [finite for values in every if (finite := [v for v in values if abs(v) < 1e30])]
    values = [v for curve in curves for v in curve]
    if chart.row:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    if chart.measure is OF_STEPS["decayed_fraction"]:
        axes.set_ylim(-0.03, 1.03)
    elif values and _spans_decades(chart, values):
        _logarithmic(axes, chart, curves)
    elif values and chart.row:
        margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
        axes.set_ylim(min(values) - margin, max(values) + margin)
    _set_formatters(axes, chart, values)
    if not values:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center")


def _set_formatters(axes: Axes, chart: Chart, values: Sequence[float]) -> None:
    if chart.measure.format in (PERCENT, SHARE) and values and max(map(abs, values)) <= 1:
        share = chart.measure.format is SHARE
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}%") if share else PercentFormatter(1.0))
    elif axes.get_yscale() == "linear" and values and max(map(abs, values)) >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_xlim()[1] >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _spans_decades(chart: Chart, values: Sequence[float]) -> bool:
    """Whether the axis should be logarithmic. Zeros that come from a learning rate of 0 do not count."""
    values = [v for v in values if v != 0 or not chart.measure.scaled]
    return chart.measure.spans and bool(values) and min(values) > 0 and max(values) / min(values) > 15


def _logarithmic(axes: Axes, chart: Chart, curves: Sequence[Sequence[float]]) -> None:
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # the default needs math text
    axes.yaxis.set_minor_formatter(NullFormatter())
    positive = [curve for values in curves if (curve := [v for v in values if v > 0])]
    decades = DECADES if chart.measure.scaled else math.inf
    lowest = min(max(min(curve), max(curve) / 10**decades) for curve in positive)
    highest = max(map(max, positive))
    axes.set_ylim(lowest / 1.2, highest * 1.2)
    if highest / lowest > (1e3 if chart.row else 1e4):
        axes.yaxis.set_major_locator(LogLocator())
