"""The statistics of the benchmarks: tables of the sign test, and noise of which the truth is known."""

import random

import pytest
from bench.stats import Interval, conclusive, median_interval, paired, verdict


# The tables of the sign test: order statistics whose interval has at least 95 % coverage, and the next has not.
@pytest.mark.parametrize(("n", "k"), [(6, 1), (9, 2), (20, 6), (100, 40), (1000, 469)])
def test_interval_is_that_of_the_sign_test(n, k):
    values = list(range(1, n + 1))
    random.Random(0).shuffle(values)
    found = median_interval(values)
    assert (found.low, found.high, found.count) == (k, n + 1 - k, n)
    assert found.median == (n + 1) / 2
    assert found.coverage >= 0.95


@pytest.mark.parametrize(("n", "coverage"), [(1, 0), (2, 0.5), (5, 0.9375)])
def test_few_values_have_the_coverage_that_they_have(n, coverage):
    found = median_interval(range(n))
    assert (found.low, found.high, found.coverage) == (0, n - 1, coverage)


def test_interval_covers_the_true_median_of_skewed_noise():
    draw = random.Random(1)
    found = [median_interval([draw.lognormvariate(0, 0.5) for _ in range(25)]) for _ in range(600)]
    covered = sum(each.low <= 1 <= each.high for each in found) / len(found)
    assert abs(covered - found[0].coverage) < 0.03  # three standard deviations of 600 trials


def test_no_value_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


def test_ratios_are_paired():
    slow = [1.0, 10.0, 100.0, 1000.0, 2.0, 3.0]  # the machine's, not the candidate's
    found = paired([0.9 * value for value in slow], slow)
    assert found.low == pytest.approx(0.9)
    assert found.high == pytest.approx(0.9)
    assert paired([2.0] * 6, [1.0] * 6, factor=0.25).median == 0.5


@pytest.mark.parametrize(
    ("noise", "bias", "rounds", "trusted"),
    [(0.02, 1.0, 100, True), (0.02, 1.05, 100, False), (0.6, 1.0, 30, False), (0.0, 1.0, 5, False)],
    ids=["quiet", "biased", "noisy", "few"],
)
def test_a_candidate_against_itself(noise, bias, rounds, trusted):
    draw = random.Random(2)
    one, other = ([1 + draw.gauss(0, noise) for _ in range(rounds)] for _ in range(2))
    assert conclusive(paired([bias * abs(value) for value in one], other)) is trusted


@pytest.mark.parametrize(("low", "high", "expected"), [(0.9, 1.0, "holds"), (0.9, 1.1, "open"), (1.01, 1.1, "misses")])
def test_verdicts(low, high, expected):
    assert verdict(Interval(0.95, low, high, 0.96, 100), 1.0) == expected
    assert verdict(Interval(0.95, low, high, 0.96, 100), 1.0, trusted=False) == "inconclusive"
    assert verdict(Interval(0.95, low, high, 0.75, 3), 1.0) == "inconclusive"
