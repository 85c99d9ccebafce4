"""The settings of the runs: what differs, and all the rest folded away."""

from collections.abc import Sequence
from html import escape
from typing import Any

from hf_cwd.report.compare import Setting, differing
from hf_cwd.report.known import ARGUMENTS, CONFIG, FIRST, ORDER, OTHER
from hf_cwd.report.numbers import count
from hf_cwd.report.read import Run
from hf_cwd.report.tables import table

PLACES = ("output_dir", "logging_dir", "run_name", "hub_model_id")
BESIDE = 8  # settings, or runs, that are columns; more of them are rows


def tables(runs: Sequence[Run], groups: Sequence[Setting]) -> str:
    """The settings that differ, and the others folded away, by their sections."""
    apart, common = differing(runs)
    sections = {key: section for run in runs for key, section in run.known.sections.items()}

    def place(key: str) -> tuple[int, int]:
        return FIRST.index(key) if key in FIRST else len(FIRST), ORDER.index(sections.get(key, OTHER))

    parts = []
    different = sorted((key for key in apart if key not in PLACES), key=place)
    if different:
        parts.append(_differences(runs, groups, {key: apart[key] for key in different}, sections))
    elif len(runs) > 1:
        parts.append("<p>No known setting differs between the runs.</p>")
    for section in ORDER:
        keys = [key for key in sorted(common, key=place) if sections.get(key, OTHER) == section]
        if keys:
            rows = [[_name(key, section), f'<td class="text">{_shown(common[key], key)}</td>'] for key in keys]
            in_common = " that all runs have in common" if len(runs) > 1 else ""
            plural = "s" * (len(keys) > 1)
            title = f"{section}: {len(keys)} setting{plural}{in_common}"
            fold = table(title, ["Setting", "Value"], rows, text=1)
            parts.append(_fold(title, fold, is_open=len(runs) == 1 and section not in (ARGUMENTS, CONFIG)))
    if places := [key for key in PLACES if key in apart]:
        rows = [[r.name, *(f'<td class="text">{_shown(apart[k][i], k, r)}</td>' for k in places)]
                for i, r in enumerate(runs)]  # fmt: skip
        parts.append(_fold("Names and places", table("Names and places", ["Run", *places], rows, text=len(places))))
    return "\n".join(parts) or "<p>Nothing is known of the settings.</p>"


def _differences(
    runs: Sequence[Run], groups: Sequence[Setting], apart: dict[str, list[Any]], sections: dict[str, str]
) -> str:
    """A row for each setting and a column for each group of runs; turned round where those are many."""

    def cell(key: str, group: Setting) -> str:
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
    """What trained, where all runs that say it say the same: the model, the number of processes, the versions."""
    common = differing(runs)[1]
    found = []
    if "model_class" in common:
        size = f" with {count(common['num_parameters'])} parameters" if "num_parameters" in common else ""
        trained = common.get("num_trainable", common.get("num_parameters"))
        some = f", {count(trained)} of them trained" if trained != common.get("num_parameters") else ""
        found.append(f"{common['model_class']}{size}{some}")
    if "world_size" in common:
        found.append("one process" if common["world_size"] == 1 else f"{common['world_size']} processes")
    versions = [f"{name} {common[name]}" for name in ("hf_cwd", "transformers", "torch") if name in common]
    return "; ".join([*found, *([", ".join(versions)] if versions else [])])


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
    """As it was given: `1e-3` was not `0.001000`."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
