"""Means over seeds, paired comparisons and their intervals, and how numbers are written: against values by hand."""

import math

import pytest
from scipy.stats import t as student
from scipy.stats import ttest_rel

from hf_cwd.report import tables
from hf_cwd.report.compare import SeedGroup, by_seed, paired, seed_groups, spread, t_quantile
from hf_cwd.report.figures import figures
from hf_cwd.report.numbers import COUNT, LOSS, PERCENT, PLAIN, RATE, TIME
from hf_cwd.report.read import read
from tests.report.conftest import logged

NAN, MINUS = math.nan, "\N{MINUS SIGN}"


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 29, 30, 120, 1001])
def test_student_s_quantiles(df):
    assert t_quantile(df) == pytest.approx(student.ppf(0.975, df), rel=1e-9)
    assert t_quantile(df, 0.99) == pytest.approx(student.ppf(0.995, df), rel=1e-9)


def test_a_paired_comparison_by_hand():
    """Differences -0.1, -0.3, -0.2: mean -0.2, deviation 0.1; t is 4.302653 for three of them."""
    result = paired({1: 2.0, 2: 2.2, 3: 2.1, 4: 9.0}, {3: 2.3, 2: 2.5, 1: 2.1, 5: 0.0})
    assert result.seeds == [1, 2, 3]
    assert result.difference == pytest.approx(-0.2)
    assert result.low == pytest.approx(-0.2 - 4.302653 * 0.1 / math.sqrt(3), abs=1e-6)
    assert result.high == pytest.approx(-0.2 + 4.302653 * 0.1 / math.sqrt(3), abs=1e-6)
    assert tables.verdict(result) == "Not told apart: the interval contains 0."


def test_a_paired_comparison_is_that_of_scipy():
    one, base = [1.91, 1.87, 1.95, 1.90, 1.88], [2.01, 1.99, 2.03, 2.04, 1.96]
    interval = ttest_rel(one, base).confidence_interval()
    result = paired(dict(enumerate(one)), dict(enumerate(base)))
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    assert tables.verdict(result) == "Lower: the interval does not contain 0."
    assert tables.verdict(paired(dict(enumerate(base)), dict(enumerate(one)))).startswith("Higher")


@pytest.mark.parametrize(
    ("one", "base", "seeds", "said"),
    [
        ({1: 1.0}, {2: 1.0}, [], "No seed in common. Too few seeds to say anything."),
        ({None: 1.0}, {None: 1.0}, [], "No seed in common. Too few seeds to say anything."),
        ({1: 1.0}, {1: 2.0}, [1], "One seed in common: the difference may be chance. Too few seeds to say anything."),
        ({1: 1.0, 2: 1.1}, {1: 2.0, 2: 2.2}, [1, 2], "Two seeds are too few to rely on."),
        ({1: 1.0, 2: NAN}, {1: 2.0, 2: 2.0}, [1], "Without seed 2: not finite."),
        ({1: 1.0, 2: 2.0, 3: 3.0}, {1: 2.0, 2: 3.0, 3: 4.0}, [1, 2, 3], "The same difference with every seed."),
    ],
)
def test_too_few_seeds_are_named(one, base, seeds, said):
    result = paired(one, base)
    assert result.seeds == seeds
    assert said in tables.verdict(result)
    assert (result.low is None) == (len(seeds) < 2)


def test_mean_and_spread():
    assert spread([1.0, 2.0, 3.0]) == 1.0
    assert spread([1.0]) is None
    assert spread([1.0, NAN]) is None


def test_seeds_count_once_and_unfinished_runs_not_at_all(make_run):
    record = {"optim": "cwd_lion"}
    paths = [
        make_run("a", logged({2: 1.0}), record={**record, "seed": 1}),
        make_run("b", logged({2: 3.0}), record={**record, "seed": 1}),
        make_run("c", logged({2: 5.0}), record={**record, "seed": 2}),
        make_run("d", logged({1: 9.0}), record={**record, "seed": 3}, max_steps=2),
    ]
    runs = read(paths)
    (setting,) = seed_groups(runs)
    assert by_seed(runs, setting, [1.0, 3.0, 5.0, 9.0]) == {1: 2.0, 2: 5.0}


def test_runs_without_a_seed_are_no_repetitions(make_run):
    record = {"optim": "cwd_lion"}
    runs = read([make_run("a", [], record=record), make_run("b", [], record=record)])
    assert seed_groups(runs) == [SeedGroup("a", [0]), SeedGroup("b", [1])]


def test_final_figures_by_hand(make_run):
    losses = logged({step: 5.0 - step / 10 for step in range(1, 21)})
    evaluations = [{"step": s, "eval_loss": v, "eval_runtime": 2.0} for s, v in ((10, 4.0), (20, 4.5))]
    shares = logged({10: 0.25, 20: 0.75}, "cwd/decayed_fraction")
    end = {"step": 20, "train_loss": 3.9, "train_runtime": 10.0, "train_samples_per_second": 8.0}
    after = {"step": 20, "eval_loss": 4.25, "eval_runtime": 3.0}
    folder = make_run("run", [*losses[:10], evaluations[0], *losses[10:], evaluations[1], *shares, end, after])
    (folder / "all_results.json").write_text('{"perplexity": 70.1, "train_tokens_per_second": 99}')
    found = {figure.key: figure.values[0] for figure in figures(read([folder]))}
    assert found == {
        "steps": 20,
        "loss": pytest.approx(3.05),  # of steps 19 and 20
        "eval_loss": 4.25,
        "lowest": 4.0,
        "perplexity": 70.1,
        "cwd/decayed_fraction": 0.5,
        "train_runtime": 10.0,
        "evaluating": 4.0,  # on the way; the third came after training
        "train_samples_per_second": 8.0,
        "train_tokens_per_second": 99.0,
    }


@pytest.mark.parametrize(
    ("kind", "value", "base", "text", "difference"),
    [
        (LOSS, 1.98768, 2.0, "1.9877", f"{MINUS}0.0123"),
        (LOSS, NAN, 2.0, "NaN", "NaN"),
        (LOSS, math.inf, 2.0, "∞", "∞"),
        (LOSS, 2.00001, 2.0, "2.0000", "0.0000"),
        (PERCENT, 0.4512, 1.0, "45.1 %", f"{MINUS}54.9 points"),
        (PLAIN, 1.2345, 1.0, "1.234", "+0.234"),
        (PLAIN, -3e-5, 1e-5, f"{MINUS}3e{MINUS}05", f"{MINUS}4e{MINUS}05"),
        (TIME, 75.0, 50.0, "1 min 15 s", "+50.0 %"),
        (RATE, 1234.5, 0.0, "1,234", "\N{EN DASH}"),
        (COUNT, 122880, 61440, "122,880", "+100.0 %"),
    ],
)
def test_numbers_are_written_as_their_kind(kind, value, base, text, difference):
    assert kind.text(value) == text
    assert kind.difference(value, base) == difference
