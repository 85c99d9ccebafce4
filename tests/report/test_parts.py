"""The numbers of decay and updates: of the whole, of rules and parameter groups, at the steps that they are of."""

import re

import pytest
from matplotlib.figure import Figure

from hf_cwd.report.axes import dress
from hf_cwd.report.chart_list import charts
from hf_cwd.report.figures import figures
from hf_cwd.report.measures import OF_STEPS
from hf_cwd.report.read import read
from hf_cwd.report.scopes import without_repetitions
from hf_cwd.report.series import Series, by_key
from hf_cwd.trainer.callbacks.diagnostics import KEYS
from tests.report.conftest import logged, written


def of(prefix, value, *names):
    """What one log entry has of a part."""
    return {f"{prefix}/{name}": value for name in names or ("decayed_fraction", "update_rms")}


def muon_history():
    """As cwd_log=groups logs it: Muon has one group, AdamW one with a weight decay and one without."""
    history = []
    for step in (5, 10, 15):
        entry = {"step": step, "loss": 2.0, "cwd/orthogonality_error": 0.3, **of("cwd", 0.5), **of("cwd/adamw", 0.3)}
        entry |= of("cwd/muon", 0.4 + step / 100) | of("cwd/group_0", 0.4 + step / 100)
        entry |= of("cwd/group_1", 0.3, "decayed_fraction") | of("cwd/group_1", 0.2, "update_rms")
        history.append(entry | of("cwd/group_2", 0.9, "update_rms"))
    return history


def test_every_number_that_is_logged_is_known():
    assert {*KEYS, "orthogonality_error"} == set(OF_STEPS)


def test_a_group_that_is_all_of_a_rule_is_not_shown_again():
    logged_ = without_repetitions(by_key(muon_history()))
    parts = {key.split("/")[1] for key in logged_ if key.count("/") == 2}
    assert parts == {"muon", "adamw", "group_1", "group_2"}


def test_a_rule_that_is_the_whole_is_not_shown_again():
    history = [{"step": 1, **of("cwd", 0.5), **of("cwd/lion", 0.5), **of("cwd/group_0", 0.4), **of("cwd/group_1", 0.6)}]
    assert {key.split("/")[1] for key in without_repetitions(by_key(history))} == {
        "decayed_fraction",
        "update_rms",
        "group_0",
        "group_1",
    }


def test_parts_have_rows_of_charts_after_all_others(make_run):
    found = charts(read([make_run("run", muon_history())]))
    rows = [chart.key for chart in found if chart.row]
    assert [chart.key for chart in found[-len(rows) :]] == rows
    assert rows == [
        "cwd/muon/decayed_fraction",
        "cwd/adamw/decayed_fraction",
        "cwd/group_1/decayed_fraction",
        "cwd/muon/update_rms",
        "cwd/adamw/update_rms",
        "cwd/group_1/update_rms",
        "cwd/group_2/update_rms",
    ]
    assert found[-1].row == tuple(rows[3:])


def test_parts_on_the_page(make_run, tmp_path):
    text, parsed = written([make_run("plain", logged({5: 2.0})), make_run("muon", muon_history())], tmp_path / "out")
    of_parts = text[text.index('<h2 id="by-rule-and-group">') : text.index('<h2 id="settings">')]
    assert re.findall("<h4>(.*?)</h4>", of_parts) == [
        "Muon",
        "AdamW",
        "Parameter group 1",
        "Muon",
        "AdamW",
        "Parameter group 1",
        "Parameter group 2",
    ]
    legend = of_parts[of_parts.index("<ul") : of_parts.index("</ul>")]
    assert "muon" in legend
    assert "plain" not in legend  # it has nothing there
    assert ["Part: run", "Decayed fraction (mean)", "Update RMS (last 10 %)"] in parsed.cells
    assert ["Muon: muon", "50.0 %", "0.5500"] in parsed.cells
    assert ["Parameter group 2: muon", "\N{EN DASH}", "0.9000"] in parsed.cells
    assert not any("plain" in cells[0] for cells in parsed.cells if cells and cells[0].startswith("AdamW"))
    assert "Line chart: Update RMS of Parameter group 2 by optimizer step. Last values: muon 0.9000." in text
    assert (tmp_path / "out/cwd_group_2_update_rms.png").is_file()


def test_without_parts_there_is_no_section_of_them(make_run, tmp_path):
    text, _ = written([make_run("run", [{"step": 1, "loss": 1.0, **of("cwd", 0.5)}])], tmp_path / "out")
    assert "By rule and group" not in text
    assert "Decay and updates" in text


def test_figures_of_decay_and_updates_are_of_the_whole(make_run):
    history = [
        {
            "step": s,
            "cwd/effective_decay": 1e-3 * s,
            "cwd/skipped_steps": s - 1,
            **of("cwd/muon", 0.1),
            "cwd/weight_rms": float(s),
            "cwd/step": s,
        }
        for s in range(1, 5)
    ]
    found = {
        f.label: f.format.text(f.values[0]) for f in figures(read([make_run("run", history)])) if f.about == "updates"
    }
    assert found == {"Effective decay (mean)": "0.250 %", "Weight RMS (last 10 %)": "4.000", "Skipped steps": "3"}


@pytest.mark.parametrize(
    ("measured", "steps"), [(8, [5, 8]), (13, [5, 13]), (14, [5, 13]), (-1, [5, 13]), ("8", [5, 13]), (True, [5, 13])]
)
def test_measures_stand_at_the_step_that_they_are_of(measured, steps):
    """A number that cannot be one counts for nothing."""
    late = {"step": 13, "loss": 1.5, "cwd/weight_rms": 2.0, "cwd/skipped_steps": 4, "cwd/step": measured}
    series = by_key([{"step": 5, "loss": 2.0, "cwd/weight_rms": 1.0, "cwd/skipped_steps": 0}, late])
    assert series["cwd/weight_rms"] == Series(steps, [1.0, 2.0])
    assert series["cwd/skipped_steps"].steps == series["loss"].steps == [5, 13]
    assert "cwd/step" not in series


def axes_of(make_run, key, values, row=()):
    run = make_run(f"run{len(values)}{values[-1]}", logged(dict(enumerate(values, 1)), key))
    (chart,) = (chart for chart in charts(read([run])) if chart.key == key and not chart.since)
    axes = Figure().subplots()
    dress(axes, chart, read([run]))
    return axes


@pytest.mark.parametrize(
    ("key", "values", "scale", "low"),
    [
        ("cwd/effective_decay", [1e-3, 5e-4, 1e-7, 0.0], "log", 1e-5),  # a cosine's end, to 1/100 of the highest
        ("cwd/effective_decay", [1e-3, 1e-3, 5e-4], "linear", None),
        ("cwd/update_rms", [1.0, 1e-4], "log", 1e-4),  # all of it: no learning rate is in it
        ("cwd/update_rms", [1.0, 0.0, 1e-4], "linear", None),
        ("loss", [10.0, 0.1], "log", 0.1),
        ("learning_rate", [1e-3, 1e-7], "linear", None),
    ],
)
def test_an_axis_is_logarithmic_where_numbers_span_decades(key, values, scale, low, make_run):
    axes = axes_of(make_run, key, values)
    assert axes.get_yscale() == scale
    if low is not None:
        assert axes.get_ylim() == (pytest.approx(low / 1.2), pytest.approx(1.2 * max(values)))


def test_shares_are_in_per_cent(make_run):
    written_ = axes_of(make_run, "cwd/effective_decay", [1e-3, 5e-4, 1e-5]).yaxis.get_major_formatter()
    assert [written_(value) for value in (1e-3, 2e-5)] == ["0.1%", "0.002%"]
    assert axes_of(make_run, "eval_accuracy", [0.5, 0.75]).yaxis.get_major_formatter()(0.5) == "50%"
    assert axes_of(make_run, "eval_accuracy", [50.0, 75.0]).yaxis.get_major_formatter()(50.0) != "5000%"


def test_a_row_of_charts_has_one_scale(make_run):
    runs = read([make_run("run", muon_history())])
    limits = set()
    for chart in charts(runs):
        if chart.key.endswith("/update_rms") and chart.row:
            axes = Figure().subplots()
            dress(axes, chart, runs)
            limits.add(axes.get_ylim())
    (only,) = limits
    assert only == (pytest.approx(0.2 - 0.035), pytest.approx(0.9 + 0.035))
