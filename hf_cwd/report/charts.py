"""The pictures: one chart for each thing that was logged, as SVG for the page and as PNG."""

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
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from hf_cwd.report import svg
from hf_cwd.report.compare import Setting
from hf_cwd.report.figures import FRACTION, in_words, is_evaluation, kind_of, logged_keys
from hf_cwd.report.read import Run
from hf_cwd.report.series import Series, average, mean
from hf_cwd.report.svg import INK, pen

POINTS = 2000  # of one curve: more than a picture has columns
IN_ALL = 40_000  # of the curves of one picture
CHARTS = 60
RC = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: it takes the page's font and colour, and can be read aloud
    "text.parse_math": False,  # a name may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.unicode_minus": True,
}


class Chart(NamedTuple):
    """What one picture shows. `noisy` curves are smoothed, over the raw ones."""

    name: str
    key: str
    title: str
    unit: str
    about: str
    noisy: bool = True
    marks: bool = False
    since: float = 0.0  # the first step shown


class Drawn(NamedTuple):
    """A picture: inline SVG for the page, and the PNG's file name."""

    chart: Chart
    svg: str
    png: str


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts that the runs have values for, in the order of the page."""
    keys = logged_keys(runs)
    found: list[Chart] = []
    if "loss" in keys:
        found.append(Chart("loss", "loss", "Training loss", "loss", "Thin: as logged. Thick: smoothed."))
        last = max(run.step for run in runs)
        if max(len(run.series("loss").after(last / 2).steps) for run in runs) >= 10:
            about = "The same from half of the steps on, smoothed, where differences are small."
            found.append(Chart("loss_late", "loss", "Training loss, second half", "loss", about, since=last / 2))
    for key in sorted(filter(is_evaluation, keys), key=lambda key: key != "eval_loss"):
        found.append(_chart(key, unit="loss" if key == "eval_loss" else "", noisy=False, marks=True))
    if FRACTION in keys:
        about = "Share of the elements with a weight decay that a logged step decays. Plain decay decays all of them."
        found.append(_chart(FRACTION, unit="elements decayed", about=about))
    cwd = [key for key in keys if key.startswith("cwd/") and key != FRACTION]
    found += [_chart(key) for key in cwd]
    if "grad_norm" in keys:
        found.append(_chart("grad_norm", unit="L2 norm", about="Before clipping."))
    rates = [key for key in keys if not key.startswith("cwd/") and ("learning_rate" in key or "decay" in key)]
    found += [_chart(key, noisy=False) for key in rates]
    speeds = [k for k in keys if k.startswith("train_tokens_per_second") or "step_time" in k or "time_per_step" in k]
    found += [_chart(key) for key in speeds]
    if "num_input_tokens_seen" in keys:
        found.append(_chart("num_input_tokens_seen", unit="tokens", noisy=False))
    names = [svg.identifier(chart.name) for chart in found]
    return [
        chart._replace(name=name if names.count(name) == 1 else f"{name}-{i}")
        for i, (chart, name) in enumerate(zip(found, names, strict=True))
    ]


def _chart(key: str, *, unit: str = "", about: str = "", noisy: bool = True, marks: bool = False) -> Chart:
    return Chart(key, key, in_words(key), unit or key, about, noisy, marks)


def draw(runs: Sequence[Run], settings: Sequence[Setting], folder: Path, *, span: float) -> list[Drawn]:
    """Draws every chart, and writes the PNGs into `folder`.

    Args:
        span: steps over which noisy curves are smoothed.
    """
    drawn = []
    for chart in charts(runs)[:CHARTS]:
        with matplotlib.rc_context({**RC, "svg.hashsalt": chart.name}):
            figure = Figure(figsize=(6.4, 3.5), layout="constrained")
            axes = figure.subplots()
            used = _curves(axes, chart, runs, settings, span)
            _dress(axes, chart)
            text = _save(figure, "svg")
            png = f"{chart.name}.png"
            axes.set_title(chart.title, loc="left", fontweight="bold", fontsize=11)
            _legend(figure, [(place, settings[place].label) for place in used])
            (folder / png).write_bytes(_save(figure, "png"))
        labels = [setting.label for setting in settings]
        inline = svg.inline(text.decode(), chart.name, _said(chart, runs, settings), labels)
        drawn.append(Drawn(chart, inline, png))
    return drawn


def _said(chart: Chart, runs: Sequence[Run], settings: Sequence[Setting]) -> str:
    """The picture for those who do not see it: where each curve ends."""
    ends = []
    for setting in settings:
        last = [s.values[-1] for s in (runs[member].series(chart.key) for member in setting.members) if s.values]
        if last:
            ends.append(f"{setting.label} {kind_of(chart.key).text(mean(last))}")
    return f"Line chart: {chart.title} by optimizer step. Last values: {', '.join(ends)}."


def _save(figure: Figure, form: str) -> bytes:
    file = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name may hold characters that the font does not
        figure.savefig(file, format=form, dpi=150, transparent=form == "svg", metadata=metadata)
    return file.getvalue()


def _curves(axes: Axes, chart: Chart, runs: Sequence[Run], settings: Sequence[Setting], span: float) -> list[int]:
    """Draws the curves of `chart`, and says of which settings there are any."""
    count = sum(bool(run.series(chart.key).steps) for run in runs)
    most = min(POINTS, max(100, IN_ALL // (2 * max(count, 1))))
    used = []
    for place, setting in enumerate(settings):
        many = [s for s in (_drawable(runs[member].series(chart.key)) for member in setting.members) if s.steps]
        if not many:
            continue
        used.append(place)
        for number, (series, thick) in enumerate(_thick_and_thin(many, chart, span)):
            series = series.after(chart.since).thin(most)
            style = pen(place, thick=thick, crowd=len(settings) > 8)
            alone = len(series.steps) == 1
            if (chart.marks and thick) or alone:
                style |= {"marker": svg.marker(place), "markersize": 5, "markeredgewidth": 0}
            axes.plot(*series, gid=f"line-{place}-{number}", **style)
    return used


def _drawable(series: Series) -> Series:
    """Without what no axis can show."""
    return Series(series.steps, [v if abs(v) < 1e30 else math.nan for v in series.values])


def _thick_and_thin(many: Sequence[Series], chart: Chart, span: float) -> Iterator[tuple[Series, bool]]:
    """Each run thin, where a smoothed curve or the mean over seeds lies on top of it; a mean needs common steps."""
    means = [average(many)] if len(many) > 1 else list(many)
    if len(means[0].steps) < 2 or all(math.isnan(v) for v in means[0].values):
        means = list(many)
    if chart.noisy or len(many) > 1:
        yield from ((series, False) for series in many if not chart.since)
    yield from ((series.smooth(span) if chart.noisy else series, True) for series in means)


def _dress(axes: Axes, chart: Chart) -> None:
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(chart.unit)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    values = [v for line in axes.lines for v in line.get_ydata() if math.isfinite(v)]
    if chart.key == FRACTION:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif (chart.noisy or chart.marks) and values and min(values) > 0 and max(values) / min(values) > 15:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # the usual one needs math text
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif values and max(map(abs, values)) >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_xlim()[1] >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not values:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center")


def _legend(figure: Figure, entries: Sequence[tuple[int, str]]) -> None:
    """Below the axes, in as many columns as the names allow; the figure grows by its height."""
    labels = [label if len(label) <= 60 else f"{label[:59]}…" for _, label in entries]
    handles: list[Any] = [Line2D([], [], **pen(place, thick=True)) for place, _ in entries]
    if not labels:
        return
    columns = max(1, min(4, len(labels), int(96 / (max(map(len, labels)) + 8))))
    figure.set_figheight(figure.get_figheight() + 0.25 + 0.21 * math.ceil(len(labels) / columns))
    legend = figure.legend(
        handles, ["x"] * len(labels), loc="outside lower left", ncols=columns, frameon=False, fontsize=9, handlelength=3
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)  # as a label, one with a leading underscore would be left out
