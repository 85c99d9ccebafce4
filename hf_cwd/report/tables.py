"""The tables of the page, as HTML."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from hf_cwd.report.compare import Paired, SeedGroup, by_seed, paired, spread
from hf_cwd.report.figures import Figure, logged_keys, of_key
from hf_cwd.report.measures import CWD, scope_in_words
from hf_cwd.report.read import Run
from hf_cwd.report.scopes import measures, scopes
from hf_cwd.report.series import mean

NOTHING = '<span class="muted" aria-label="not logged">\N{EN DASH}</span>'


def table(
    name: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", first: str = "", text: int = 0
) -> str:
    """A table that scrolls in its own box. Each row is a heading, as text, and cells, as HTML.

    Args:
        name: a name for screen readers.
        first: the class of the first row.
        text: the number of columns at the end that contain words.
    """
    lines = [f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0"><table>']
    if caption:
        lines.append(f"<caption>{escape(caption)}</caption>")
    columns = "".join(
        f'<th scope="col"{" class=text" * (place >= len(head) - text)}>{escape(name)}</th>'
        for place, name in enumerate(head)
    )
    lines.append(f"<thead><tr>{columns}</tr></thead><tbody>")
    for number, (heading, *cells) in enumerate(rows):
        css_class = f' class="{first}"' if first and number == 0 else ""
        lines.append(f'<tr{css_class}><th scope="row">{escape(heading)}</th>{"".join(cells)}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def final(runs: Sequence[Run], figures: Sequence[Figure], name: str) -> str:
    """A row for each run; below each number the difference to the first run."""
    rows = []
    for place, run in enumerate(runs):
        row = [run.name]
        for figure in figures:
            value, base = figure.values[place], figure.values[0]
            cell = NOTHING if value is None else escape(figure.format.text(value))
            if place and None not in (value, base) and value != base and math.isfinite(value - base):
                cell += f'<span class="difference">{escape(figure.format.difference(value, base))}</span>'
            row.append(f"<td>{cell}</td>")
        rows.append(row)
    several = len(runs) > 1
    caption = f"Small figures: the difference to {runs[0].name}, the first run." if several else ""
    head = ["Run", *(figure.label for figure in figures)]
    return table(name, head, rows, caption=caption, first="baseline" if several else "")


def seeds(runs: Sequence[Run], groups: Sequence[SeedGroup], figures: Sequence[Figure]) -> str:
    """The mean and spread of each group over its seeds."""
    rows = []
    for group in groups:
        row = [group.label, f"<td>{_listed(by_seed(runs, group, [0.0] * len(runs)))}</td>"]
        for figure in figures:
            values = list(by_seed(runs, group, figure.values).values())
            if not values:
                row.append(f"<td>{NOTHING}</td>")
                continue
            deviation = spread(values)
            text = figure.format.text(mean(values))
            if deviation is not None:
                text += f" ± {_unsigned(figure, mean(values), deviation)}"
            count = "" if len(values) == len(group.members) else f'<span class="difference">of {len(values)}</span>'
            row.append(f"<td>{escape(text)}{count}</td>")
        rows.append(row)
    caption = "Mean ± sample standard deviation over the seeds; no ± where there is one seed."
    head = ["Setting", "Seeds", *(figure.label for figure in figures)]
    return table("Means over seeds", head, rows, caption=caption)


def pairs(runs: Sequence[Run], groups: Sequence[SeedGroup], figures: Sequence[Figure]) -> str:
    """Each group minus the first one, over their common seeds."""
    base, *others = groups
    rows = []
    for figure in figures:
        of_base = by_seed(runs, base, figure.values)
        for group in others:
            result = paired(by_seed(runs, group, figure.values), of_base)
            if not result.seeds and not result.left_out:
                continue
            difference = NOTHING
            if result.difference is not None:
                difference = escape(figure.format.difference(result.difference, 0.0))
            interval = NOTHING
            if result.low is not None and result.high is not None:
                interval = " to ".join(escape(figure.format.difference(end, 0.0)) for end in (result.low, result.high))
            rows.append(
                [
                    f"{figure.label}: {group.label}",
                    f"<td>{_listed(result.seeds)}</td><td>{difference}</td><td>{interval}</td>",
                    f'<td class="text">{escape(verdict(result))}</td>',
                ]
            )
    head = ["Figure: setting", "Common seeds", "Mean difference", "95 % interval", "What it says"]
    apart = [s.label for s in others if not {runs[i].seed for i in s.members} & {runs[i].seed for i in base.members}]
    none = f"<p>No seed in common with {escape(base.label)}: {escape(', '.join(apart))}.</p>" if apart else ""
    return (table("Paired comparison", head, rows, text=1) if rows else "") + none


def verdict(result: Paired) -> str:
    """The result of a paired comparison in words."""
    left_out = f" Without seed {', '.join(map(str, result.left_out))}: not finite." if result.left_out else ""
    if result.low is None or result.high is None:
        what = "No seed in common" if not result.seeds else "One seed in common: the difference may be chance"
        return f"{what}. Too few seeds to say anything.{left_out}"
    if result.low == result.high:
        return f"The same difference with every seed.{left_out}"
    if result.low <= 0 <= result.high:
        conclusion = "Not told apart: the interval contains 0."
    else:
        conclusion = f"{'Lower' if result.high < 0 else 'Higher'}: the interval does not contain 0."
    few = " Two seeds are too few to rely on." if len(result.seeds) == 2 else ""
    return conclusion + few + left_out


def by_scope(runs: Sequence[Run]) -> str:
    """A row for each rule and parameter group of each run."""
    keys = logged_keys(runs)
    names = measures(keys)
    rows = []
    for scope in scopes(keys):
        columns = [of_key(runs, f"{CWD}{scope}/{name}") for name in names]
        for place, run in enumerate(runs):
            if any(column.values[place] is not None for column in columns):
                values = [(column.format, column.values[place]) for column in columns]
                cells = [f"<td>{NOTHING if v is None else escape(format.text(v))}</td>" for format, v in values]
                name = f"{scope_in_words(scope)}: {run.name}" if len(runs) > 1 else scope_in_words(scope)
                rows.append([name, *cells])
    head = [
        "Part: run" if len(runs) > 1 else "Part",
        *(of_key(runs, f"{CWD}{scopes(keys)[0]}/{name}").label for name in names),
    ]
    return table("By rule and parameter group", head, rows)


def _unsigned(figure: Figure, middle: float, deviation: float) -> str:
    """A spread, with as many digits as a difference."""
    text = figure.format.difference(middle + deviation, middle)
    return text.removeprefix("+").removesuffix(" points")


def _listed(seeds: Iterable[int | None]) -> str:
    numbers = sorted(seed for seed in seeds if seed is not None)
    shown = ", ".join(map(str, numbers[:8])) + (f" … ({len(numbers)})" if len(numbers) > 8 else "")
    return shown or NOTHING
