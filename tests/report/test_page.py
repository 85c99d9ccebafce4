"""The page: one well-formed file that refers to nothing outside, with every run in it, whatever the runs are called."""

import math
import random
import re

import pytest
from matplotlib.image import imread

from hf_cwd.report import page, svg
from hf_cwd.report.chart_list import charts
from hf_cwd.report.charts import POINTS
from hf_cwd.report.read import read
from tests.report.conftest import logged, written

HOSTILE = "<script>alert(1)<script>&\"'$x_1$ %s {0}"


def test_numbers_and_differences_of_two_runs(make_run, tmp_path):
    paths = [make_run("base", logged({1: 3.0, 2: 2.5})), make_run("other", logged({1: 3.0, 2: 2.25}))]
    text, parsed = written(paths, tmp_path / "out")
    assert ["Run", "Steps", "Training loss (last 10 %)"] in parsed.cells
    assert ["base", "2", "2.5000"] in parsed.cells
    assert ["other", "2", "2.2500\N{MINUS SIGN}0.2500"] in parsed.cells
    assert "Too few seeds to say anything; train each setting with the same three or more." in text


def test_means_and_intervals_of_two_settings(make_run, tmp_path):
    losses = {"plain": (2.1, 2.5, 2.3), "cwd": (2.0, 2.2, 2.1)}
    paths = [
        make_run(f"{name}-seed{seed}", logged({10: value}))
        for name, values in losses.items()
        for seed, value in enumerate(values, 1)
    ]
    _, parsed = written(paths, tmp_path / "out")
    minus = "\N{MINUS SIGN}"
    assert ["plain", "1, 2, 3", "2.3000 ± 0.2000"] in parsed.cells
    assert ["cwd", "1, 2, 3", "2.1000 ± 0.1000"] in parsed.cells
    row = next(cells for cells in parsed.cells if cells[0] == "Training loss (last 10 %): cwd")
    assert row[1:4] == ["1, 2, 3", f"{minus}0.2000", f"{minus}0.4484 to +0.0484"]
    assert row[4] == "Not told apart: the interval contains 0."


def test_one_page_that_refers_to_nothing_outside(make_run, tmp_path):
    history = [
        {
            "step": s,
            "loss": 3.0 - s / 50,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "cwd/decayed_fraction": 0.4,
            "cwd/update_to_weight": 1e-3,
        }
        for s in range(1, 41)
    ]
    history += logged({20: 2.5, 40: 2.2}, "eval_loss")
    paths = [make_run(name, history) for name in ("one", "two", HOSTILE)]
    text, parsed = written(paths, tmp_path / "out")
    assert {link for link in parsed.links if not link.startswith("#")} == set()
    assert "://" not in text
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {link[1:] for link in parsed.links} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(parsed.ids)
    assert [tag for tag, _ in parsed.tags if tag in ("h1", "main")] == ["h1", "main"]
    everything = "".join(parsed.texts)
    for name in ("one", "two", HOSTILE):
        assert everything.count(name) >= 4  # in tables, legend, and with each curve
    pictures = [attributes for tag, attributes in parsed.tags if tag == "svg" and "role" in attributes]
    assert len(pictures) == len(list((tmp_path / "out").glob("*.png"))) == 7
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert attributes["aria-labelledby"] in parsed.ids
    assert "Line chart: Evaluation loss by optimizer step. Last values: one 2.2000, two 2.2000" in everything
    assert ":root" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_colours_and_dashes_follow_the_page(make_run, tmp_path):
    text, _ = written([make_run(f"run{i}", logged({1: 1.0, 2: 2.0 + i})) for i in range(20)], tmp_path / "out")
    drawn = text[text.index("<figure>") :]
    assert not any(colour in drawn for colour in (*svg.COLOURS, svg.INK))
    assert set(re.findall(r"var\(--s(\d)\)", drawn)) == set("0123456")
    pens = {
        (tuple(p["linestyle"][1]) if p["linestyle"] != "-" else (), p["color"])
        for p in (svg.pen(i, thick=True) for i in range(svg.PENS))
    }
    assert len(pens) == svg.PENS == 28


@pytest.mark.parametrize(("colours", "paper"), [(svg.COLOURS, "#ffffff"), (svg.DARK, "#14171b")])
def test_every_colour_stands_out_from_its_paper(colours, paper):
    """By the contrast that WCAG 2.1 asks of graphics, 3 to 1."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour in colours:
        dark, light = sorted((luminance(colour), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 3, colour


def test_pictures_are_not_blank_and_hold_the_legend(make_run, tmp_path):
    names = [f"a-run-with-a-name-of-some-length-{i}" for i in range(20)]
    paths = [make_run(name, logged({s: 1.0 + i / s for s in range(1, 30)})) for i, name in enumerate(names)]
    page.write(read(paths[:1]), tmp_path / "one")
    page.write(read(paths), tmp_path / "out")
    one, many = (imread(tmp_path / folder / "loss.png") for folder in ("one", "out"))
    assert one[..., :3].std() > 0.01
    assert many.shape[0] > one.shape[0] + 100  # the axes keep their size, and the legend gets its own place
    assert many.shape[1] == one.shape[1]


def test_the_legend_of_a_picture_holds_any_name(make_run, tmp_path):
    """A leading underscore, which matplotlib keeps out of legends, and a dollar sign, its mark of mathematics."""
    pictures = []
    for name in ("_one", "_two", "$x$", "$x_1$"):
        page.write(read([make_run(name, logged({1: 2.0, 2: 1.0}))]), tmp_path / f"out of {name}")
        pictures.append((tmp_path / f"out of {name}" / "loss.png").read_bytes())
    assert len(set(pictures)) == 4  # they differ in nothing else


def test_every_logged_key_has_its_chart(make_run):
    keys = ("grad_norm", "cwd/weight_rms", "cwd/x y", "cwd/x_y", "eval_f1", "loss", "learning_rate", "step_time")
    (run,) = read([make_run("run", [entry for key in keys for entry in logged({1: 1.0, 2: 2.0}, key)])])
    found = charts([run])
    assert sorted(chart.key for chart in found) == sorted(keys)
    assert found[0].key == "loss"
    assert len({chart.name for chart in found}) == len(keys)  # of the files


HISTORIES = {
    "empty": [],
    "one entry": logged({1: 2.0}),
    "only NaN": logged({1: math.nan, 2: math.inf, 3: -math.inf}),
    "some NaN": logged({1: 2.0, 2: math.nan, 3: 1.0, 4: 1.0}),
    "huge values": logged({1: 1e308, 2: -1e308, 3: 10**400}),
    "zero and negative": logged({1: 0.0, 2: -1.0, 3: 100.0}),
    "step zero": logged({0: 1.0}),
    "no loss": [{"step": 1, "epoch": 1.0}, {"step": 2}],
    "only evaluations": logged({5: 1.0, 10: 0.5}, "eval_loss"),
    "keys with markup": logged({1: 1.0, 2: 2.0}, "cwd/<b>&\"'$\\frac{1}$\ud800\x00"),
    "empty keys": logged({1: 1.0}, "") + logged({1: 1.0}, "cwd/") + logged({1: 1.0}, "eval_"),
    "nested values": [{"step": 1, "loss": [1.0], "eval_loss": {"a": 1}, "cwd/x": "y"}],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.filterwarnings("error")
def test_any_history_makes_a_page(history, make_run, tmp_path):
    text, _ = written([make_run("it", history)], tmp_path / "one")
    assert "<b>" not in text
    usual = logged({1: 3.0, 2: 2.0})
    written([tmp_path / "it", make_run("usual", usual)], tmp_path / "two")
    written([tmp_path / "usual", tmp_path / "it"], tmp_path / "three")


def test_what_a_reader_must_know_is_said(make_run, tmp_path):
    nan = make_run("nan", logged({1: 2.0, 2: math.nan, 3: math.nan}))
    text, _ = written([nan, make_run("cut", logged({1: 2.0}), max_steps=3)], tmp_path / "out")
    assert "nan: Training loss is NaN or infinite at 2 of 3 logged steps, first at step 2." in text
    assert "cut is at step 1 of 3: it is left out of means over seeds." in text
    assert "2 of 2 runs have no cwd_run.json" in text
    clean, _ = written([make_run("clean", logged({1: 2.0}))], tmp_path / "clean out")
    assert "Before you read on" not in clean


def test_a_huge_history_makes_a_small_page(make_run, tmp_path):
    noise = random.Random(0)
    history = [{"step": s, "loss": noise.random()} for s in range(1, 200_001)]
    text, _ = written([make_run("run", history)], tmp_path / "out")
    longest = max(path.count("L") for path in re.findall(r' d="([^"]+)"', text))
    assert 500 < longest <= POINTS


def test_runs_that_log_at_different_steps(make_run, tmp_path):
    """Each is drawn whole; the mean over seeds is over the steps that both have, or there is none."""
    paths = [make_run(f"run-seed{n}", logged(dict.fromkeys(range(n, 61, n), 1.0))) for n in (2, 3)]
    paths.append(make_run("odd-seed1", logged({1: 1.0, 3: 1.0}), max_steps=4))
    paths.append(make_run("odd-seed2", logged({2: 1.0, 4: 1.0})))
    text, _ = written(paths, tmp_path / "out")
    loss = text[text.index("<h3>Training loss</h3>") : text.index("</figure>")]
    assert loss.count("<title>run</title>") == 3  # two runs and their mean
    assert loss.count("<title>odd</title>") == 4  # two runs, each thin and smoothed


def test_the_same_runs_make_the_same_page(make_run, tmp_path):
    folder = make_run("run", logged({1: 2.0, 2: 1.0}))
    first, second = (written([folder], tmp_path / name)[0] for name in ("a", "b"))
    assert first == second
