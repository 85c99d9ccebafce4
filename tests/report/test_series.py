"""Series: smoothing, means over runs, and thinning, against values worked out by hand."""

import math

import pytest

from hf_cwd.report.series import Series, average, number

NAN = math.nan


def test_the_last_tenth_goes_by_steps():
    every, tenth = Series(list(range(1, 101)), [float(i) for i in range(1, 101)]), Series([50, 100], [1.0, 3.0])
    assert every.last_tenth() == 95.5  # the mean of 91 to 100
    assert tenth.last_tenth() == 3.0
    assert Series([], []).last_tenth() is None
    assert math.isnan(Series([1, 2], [1.0, NAN]).last_tenth())


def test_smoothing_by_hand():
    span = 1 / math.log(2)  # halves the weight with each step
    smoothed = Series([1, 2, 4], [4.0, 8.0, 16.0]).smooth(span).values
    assert smoothed == pytest.approx(
        [(4 + 8 / 2 + 16 / 8) / 1.625, (4 / 2 + 8 + 16 / 4) / 1.75, (4 / 8 + 8 / 4 + 16) / 1.375]
    )


def test_smoothing_is_alike_whatever_the_logging_interval():
    fine, coarse = (Series(list(range(n, 2001, n)), [5.0 - s / 1000 for s in range(n, 2001, n)]) for n in (1, 10))
    one, other = (dict(zip(*series.smooth(40), strict=True))[1000] for series in (fine, coarse))
    assert one == pytest.approx(other, abs=1e-6)
    assert one == pytest.approx(4.0, abs=1e-6)  # it does not lag


def test_smoothing_leaves_what_is_not_finite():
    smoothed = Series([1, 2, 3], [2.0, NAN, 2.0]).smooth(5).values
    assert smoothed[::2] == pytest.approx([2.0, 2.0])
    assert math.isnan(smoothed[1])
    assert Series([1, 2], [math.inf, NAN]).smooth(5).values[0] == math.inf
    assert Series([], []).smooth(5) == ([], [])
    assert Series([0, 0], [1.0, 2.0]).smooth(0).values == [1.0, 2.0]


def test_thinning_keeps_spikes_ends_and_gaps():
    values = [math.sin(i / 1000) for i in range(100_000)]
    values[31_337], values[77_777], values[50_000] = 9.0, -9.0, NAN
    thin = Series(list(range(100_000)), values).thin(2000)
    assert 1000 < len(thin.steps) <= 2000
    assert max(v for v in thin.values if v == v) == 9.0
    assert min(v for v in thin.values if v == v) == -9.0
    assert thin.bad == [50_000]
    assert thin.steps == sorted(set(thin.steps))
    assert thin.steps[0] < 200
    assert thin.steps[-1] > 99_800


@pytest.mark.parametrize("value", [1.0, NAN])
def test_thinning_a_constant(value):
    thin = Series(list(range(10_000)), [value] * 10_000).thin(100)
    assert 10 <= len(thin.steps) <= 100


def test_the_mean_of_runs_is_over_their_common_steps():
    assert average([Series([1, 2, 3], [1.0, 2.0, 3.0]), Series([2, 3, 4], [4.0, 7.0, 9.0])]) == ([2, 3], [3.0, 5.0])


def test_whole_numbers_of_any_size():
    assert number(10**400) == math.inf
    assert number(-(10**400)) == -math.inf
