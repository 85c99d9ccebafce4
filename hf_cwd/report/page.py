"""Writes the page: one self-contained HTML file, and the same charts beside it as PNG files."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import hf_cwd
from hf_cwd.report import settings_tables, tables
from hf_cwd.report.chart_list import CHARTS, charts
from hf_cwd.report.charts import Drawn, draw
from hf_cwd.report.compare import SeedGroup, seed_groups
from hf_cwd.report.figures import Figure, figures, logged_keys
from hf_cwd.report.measures import in_order, is_evaluation, measure_of, scope_in_words, scope_of
from hf_cwd.report.read import RECORD, Run
from hf_cwd.report.svg import COLOURS, DARK, PENS, swatch

PAGE = "report.html"
SPANS = 50  # curves are smoothed over 1 / SPANS of the longest run


def write(runs: Sequence[Run], folder: Path, *, left_out: Sequence[str] = ()) -> Path:
    """Writes the page and the charts of runs into `folder`, and returns the path of the page.

    Args:
        left_out: the reasons why other runs could not be read, which the page shows.

    Raises:
        ValueError: the files cannot be written.
    """
    groups = seed_groups(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = draw(runs, groups, folder, span=max(run.step for run in runs) / SPANS)
        page = folder / PAGE
        page.write_text(html(runs, groups, drawn, left_out), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); give another --output") from error
    return page


def html(runs: Sequence[Run], groups: Sequence[SeedGroup], drawn: Sequence[Drawn], left_out: Sequence[str] = ()) -> str:
    """The page, as text."""
    table = figures(runs)
    of_model, of_updates, of_speed = ([f for f in table if f.about == about] for about in ("model", "updates", "speed"))
    sections = {
        "Final figures": tables.final(runs, of_model, "Final figures"),
        "Over seeds": over_seeds(runs, groups, table),
        "Curves": curves(groups, [one for one in drawn if not one.chart.row]),
        "Decay and updates": tables.final(runs, of_updates, "Decay and updates") if of_updates else "",
        "By rule and group": by_scope(runs, groups, [one for one in drawn if one.chart.row]),
        "Settings": settings_tables.tables(runs, groups),
        "Speed": speed(runs, of_speed),
    }
    sections = {title: body for title, body in sections.items() if body}
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    links = "".join(f'<li><a href="#{_anchor(title)}">{title}</a></li>' for title in sections)
    bodies = "\n".join(
        f'<section aria-labelledby="{_anchor(title)}"><h2 id="{_anchor(title)}">{title}</h2>\n{body}</section>'
        for title, body in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training report: {escape(name)}</title>
<style>
{_style()}</style>
</head>
<body>
<header>
<h1>Training report: {escape(name)}</h1>
<p>{escape(summary(runs, groups))}</p>
{about(runs)}<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{notes(runs, groups, left_out)}{bodies}
</main>
<footer>Written by hf_cwd {hf_cwd.__version__} from the Trainer's trainer_state.json. The curves are also PNG files
beside this page.</footer>
</body>
</html>
"""


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _style() -> str:
    style = files("hf_cwd.report").joinpath("page.css").read_text(encoding="utf-8")
    for name, colours in (("LIGHT", COLOURS), ("DARK", DARK)):
        style = style.replace(name, " ".join(f"--s{i}: {colour};" for i, colour in enumerate(colours)))
    return style


def summary(runs: Sequence[Run], groups: Sequence[SeedGroup]) -> str:
    """One or two sentences about the runs on the page."""
    if len(runs) == 1:
        return f"One run of {runs[0].step:,} optimizer steps."
    text = f"{len(runs)} runs"
    if len(groups) < len(runs):
        text += f" of {len(groups)} setting{'s' * (len(groups) > 1)}: runs that differ only in their seed share a curve"
    return (
        f"{text}. Differences are to the first run, {runs[0].name}; another one comes first if its path is given first."
    )


def about(runs: Sequence[Run]) -> str:
    """A line on the model, the processes and the versions; empty if they are unknown or differ."""
    text = settings_tables.facts(runs)
    return f'<p class="muted">{escape(text)}.</p>\n' if text else ""


def notes(runs: Sequence[Run], groups: Sequence[SeedGroup], left_out: Sequence[str] = ()) -> str:
    """Notes that a reader needs to judge the numbers; empty if there are none."""
    texts = [f"Left out: {line}" for line in left_out]
    for run in runs:
        texts += _run_notes(run)
    unknown = sum(not run.recorded for run in runs)
    if unknown and len(runs) > 1:
        texts.append(
            f"{unknown} of {len(runs)} runs have no {RECORD}: of their settings only what the Trainer keeps is known. "
            "Runs whose names differ only in a seed (“-seed2”, “-s2”) are taken for the same setting."
        )
    if len(groups) > PENS:
        texts.append(f"There are more settings than pens: after every {PENS} settings colours and dashes repeat.")
    hidden = len(charts(runs)) - CHARTS
    if hidden > 0:
        texts.append(f"{hidden} charts are left out: the page shows the first {CHARTS}.")
    if not texts:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    head = '<section class="notes" aria-labelledby="notes"><h2 id="notes">Before you read on</h2>'
    return f"{head}<ul>{items}</ul></section>\n"


def _run_notes(run: Run) -> list[str]:
    texts = [f"{run.name} {note}." for note in run.notes]
    if not run.finished:
        texts.append(f"{run.name} is at step {run.step:,} of {run.max_steps:,}: it is left out of means over seeds.")
    for key in logged_keys([run]):
        series = run.series(key)
        if series.bad and (key in ("loss", "grad_norm", *in_order([key])) or is_evaluation(key)):
            texts.append(
                f"{run.name}: {measure_of(key).title} is NaN or infinite at {len(series.bad):,} of "
                f"{len(series.steps):,} logged steps, first at step {series.bad[0]:,}."
            )
    return texts


def over_seeds(runs: Sequence[Run], groups: Sequence[SeedGroup], table: Sequence[Figure]) -> str:
    """Means over seeds, and groups compared over common seeds; empty for one run."""
    quality = [figure for figure in table if figure.quality]
    if len(runs) < 2 or not quality:
        return ""
    if all(len(group.members) == 1 for group in groups):
        return (
            "<p>No two runs differ only in their seed: the effect of a setting cannot be told from chance. "
            "Too few seeds to say anything; train each setting with the same three or more.</p>"
        )
    bodies = [tables.seeds(runs, groups, quality)]
    if len(groups) > 1:
        text = (
            f"Each setting minus {groups[0].label}, seed by seed; the interval is Student's t of the differences. "
            "It covers chance between seeds only, not the choice of learning rate, data or model."
        )
        if (len(groups) - 1) * len(quality) > 1:
            text += " About one in twenty such intervals leaves out the true difference by chance alone."
        bodies += ["<h3>Compared over common seeds</h3>", f"<p>{escape(text)}</p>", tables.pairs(runs, groups, quality)]
    return "\n".join(bodies)


def curves(groups: Sequence[SeedGroup], drawn: Sequence[Drawn]) -> str:
    """The legend, and the charts for all parameters."""
    if not drawn:
        return "<p>Nothing was logged.</p>"
    several = any(len(group.members) > 1 for group in groups)
    mean = "<p>Thin lines are runs, thick ones their mean over seeds.</p>" if several else ""
    pictures = "\n".join(
        f"<figure><figcaption><h3>{escape(one.chart.title)}</h3><p>{escape(one.chart.about)}</p></figcaption>\n"
        f"{one.svg}</figure>"
        for one in drawn
    )
    return f'{mean}{legend(groups, range(len(groups)))}\n<div class="charts">\n{pictures}\n</div>'


def by_scope(runs: Sequence[Run], groups: Sequence[SeedGroup], drawn: Sequence[Drawn]) -> str:
    """For each measure a row of small charts, one for each rule and parameter group; empty if none was logged."""
    if not drawn:
        return ""
    logged = [any(any(map(scope_of, runs[i].logged)) for i in group.members) for group in groups]
    rows: dict[str, list[Drawn]] = {}
    for one in drawn:
        rows.setdefault(one.chart.title, []).append(one)
    text = (
        "What cwd_log=groups logs for each rule, and for each parameter group that is not all of a rule. "
        "The charts of a row have the same scale."
    )
    bodies = [f"<p>{text}</p>", legend(groups, [place for place, some in enumerate(logged) if some])]
    for title, row in rows.items():
        pictures = "\n".join(
            f"<figure><figcaption><h4>{escape(scope_in_words(one.chart.scope))}</h4></figcaption>\n{one.svg}</figure>"
            for one in row
        )
        head = f'<h3>{escape(title)}</h3><p class="muted">{escape(row[0].chart.about)}</p>'
        bodies.append(f'<div class="row">{head}<div class="charts small">\n{pictures}\n</div></div>')
    return "\n".join([*bodies, "<h3>Figures</h3>", tables.by_scope(runs)])


def legend(groups: Sequence[SeedGroup], places: Sequence[int]) -> str:
    """The pens of the groups at the positions `places`."""
    entries = ""
    for place in places:
        group = groups[place]
        count = f' <span class="muted">({len(group.members)} seeds)</span>' if len(group.members) > 1 else ""
        entries += f"<li>{swatch(place)}<span>{escape(group.label)}{count}</span></li>"
    css_class = "legend short" if len(places) <= 8 else "legend"  # a short one stays visible when the page scrolls
    return f'<ul class="{css_class}" aria-label="Legend">{entries}</ul>'


def speed(runs: Sequence[Run], table: Sequence[Figure]) -> str:
    """The speed of the runs; empty if none has logged it."""
    if not table:
        return ""
    text = "The Trainer counts evaluations during training as training, and divides by the time since the last resume."
    return f"<p>{text}</p>{tables.final(runs, table, 'Speed')}"
