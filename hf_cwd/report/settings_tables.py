"""The tables of the runs' settings: first the ones that differ, then all others, folded."""

from collections.abc import Sequence
from html import escape
from typing import Any

from hf_cwd.report.compare import SeedGroup, differing
from hf_cwd.report.numbers import count
from hf_cwd.report.read import Run
from hf_cwd.report.run_settings import ARGUMENTS, CONFIG, FIRST, ORDER, OTHER
from hf_cwd.report.tables import table

PLACES = ("output_dir", "logging_dir", "run_name", "hub_model_id")
BESIDE = 8  # up to this many groups are columns; more are rows


def tables(runs: Sequence[Run], groups: Sequence[SeedGroup]) -> str:
    """The settings that differ, and the others, folded, by section."""
    apart, common = differing(runs)
    sections = {key: section for run in runs for key, section in run.settings.sections.items()}

    def place(key: str) -> tuple[int, int]:
        return FIRST.index(key) if key in FIRST else len(FIRST), ORDER.index(sections.get(key, OTHER))

    tables_ = []
    different = sorted((key for key in apart if key not in PLACES), key=place)
    if different:
        tables_.append(_differences(runs, groups, {key: apart[key] for key in different}, sections))
    elif len(runs) > 1:
        tables_.append("<p>No known setting differs between the runs.</p>")
    for section in ORDER:
        keys = [key for key in sorted(common, key=place) if sections.get(key, OTHER) == section]
        if keys:
            rows = [[_name(key, section), f'<td class="text">{_shown(common[key], key)}</td>'] for key in keys]
            in_common = " that all runs have in common" if len(runs) > 1 else ""
            plural = "s" * (len(keys) > 1)
            title = f"{section}: {len(keys)} setting{plural}{in_common}"
            fold = table(title, ["Setting", "Value"], rows, text=1)
            tables_.append(_fold(title, fold, is_open=len(runs) == 1 and section not in (ARGUMENTS, CONFIG)))
    if places := [key for key in PLACES if key in apart]:
        tables_.append(_fold("Names and places", _places(runs, places, apart)))
    return "\n".join(tables_) or "<p>Nothing is known of the settings.</p>"


def _places(runs: Sequence[Run], places: Sequence[str], apart: dict[str, list[Any]]) -> str:
    rows = []
    for i, run in enumerate(runs):
        rows.append([run.name, *(f'<td class="text">{_shown(apart[key][i], key, run)}</td>' for key in places)])
    return table("Names and places", ["Run", *places], rows, text=len(places))


def _differences(
    runs: Sequence[Run], groups: Sequence[SeedGroup], apart: dict[str, list[Any]], sections: dict[str, str]
) -> str:
    """A row for each setting and a column for each group of runs; transposed if there are many groups."""

    def cell(key: str, group: SeedGroup) -> str:
        shown = dict.fromkeys(_shown(apart[key][i], key, runs[i]) for i in group.members)
        return f'<td class="text">{", ".join(shown)}</td>'

    if len(groups) > BESIDE:
        rows = [[group.label, *(cell(key, group) for key in apart)] for group in groups]
        return table("Settings that differ", ["Run", *apart], rows, text=len(apart))
    rows = []
    for key in apart:
        section = sections.get(key, OTHER)
        of = f'<td class="text of muted">{escape(section)}</td>'
        rows.append([_name(key, section), of, *(cell(key, group) for group in groups)])
    head = ["Setting", "Of", *(group.label for group in groups)]
    return table("Settings that differ", head, rows, text=len(groups) + 1)


def facts(runs: Sequence[Run]) -> str:
    """The model, the number of processes and the versions, each if the runs do not differ in it."""
    common = differing(runs)[1]
    result = []
    if "model_class" in common:
        size = f" with {count(common['num_parameters'])} parameters" if "num_parameters" in common else ""
        trained = common.get("num_trainable", common.get("num_parameters"))
        some = f", {count(trained)} of them trained" if trained != common.get("num_parameters") else ""
        result.append(f"{common['model_class']}{size}{some}")
    if "world_size" in common:
        result.append("one process" if common["world_size"] == 1 else f"{common['world_size']} processes")
    versions = [f"{name} {common[name]}" for name in ("hf_cwd", "transformers", "torch") if name in common]
    return "; ".join([*result, *([", ".join(versions)] if versions else [])])


def _fold(title: str, body: str, *, is_open: bool = False) -> str:
    return f"<details{' open' * is_open}><summary>{escape(title)}</summary>{body}</details>"


def _name(key: str, section: str) -> str:
    """A key without the name of its section."""
    return key.removeprefix("model.") if section == CONFIG else key


def _shown(value: Any, key: str, run: Run | None = None) -> str:
    if value is None:
        return f'<span class="muted">{"not set" if run and run.recorded else "not known"}</span>'
    if isinstance(value, int) and key.startswith("num_") and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value) if isinstance(value, str | bool | int) else _as_given(value)
    return escape(text if len(text) <= 200 else f"{text[:199]}…")


def _as_given(value: float) -> str:
    """The shortest text for a number, as a user would write it."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
