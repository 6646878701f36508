"""stats.py against scipy, brute force and hand arithmetic."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

import stats


@pytest.mark.parametrize("call", [
    lambda: stats.mean_interval([]), lambda: stats.mean_interval([1.0, math.nan]), lambda: stats.p_above([1.0]),
    lambda: stats.bootstrap([1.0], lambda m: m[:, 0]), lambda: stats.welch([1.0], [1.0, 2.0]),
    lambda: stats.tost([1.0, 2.0], [1.0], 1), lambda: stats.tost([1.0, 2.0], [1.0, 2.0], 0),
    lambda: stats.paired([1.0, 2.0], [1.0, 2.0, 3.0]),
])  # fmt: skip
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError):
        call()


def test_mean_interval_equals_scipy():
    x = np.random.default_rng(0).normal(size=5)
    mean, half = stats.mean_interval(x)
    low, high = scipy.stats.t.interval(0.95, 4, x.mean(), scipy.stats.sem(x))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-9)
    mean, half = stats.mean_interval([0.7])
    assert mean == 0.7 and math.isnan(half)


def test_ratio_interval_ends_where_the_t_test_turns():
    rng = np.random.default_rng(1)
    b = 0.35 + 0.03 * rng.normal(size=5)
    a = 0.9 * b + 0.01 * rng.normal(size=5)
    low, high = stats.ratio_interval(a, b)
    assert low < a.mean() / b.mean() < high
    for end in (low, high):
        assert scipy.stats.ttest_1samp(a - end * b, 0).pvalue == pytest.approx(0.05, abs=1e-6)
    assert stats.ratio_interval(a, b - b.mean()) == (-math.inf, math.inf)


def test_bootstrap_equals_every_resample_and_keeps_pairs():
    rows = np.array([[0.1, 1.0], [0.5, 1.1], [0.2, 1.7]])
    every = [rows[list(pick)].mean(axis=0) for pick in itertools.product(range(3), repeat=3)]
    low, high, means = stats.bootstrap(rows, lambda m: m[:, 0] / m[:, 1], draws=200_000)
    expected = np.quantile([m[0] / m[1] for m in every], [0.025, 0.975], method="inverted_cdf")
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-12)
    assert means.shape == (200_000, 2) and means.mean(axis=0) == pytest.approx(rows.mean(axis=0), abs=2e-3)
    pairs = np.random.default_rng(2).normal(size=(6, 1)) + [[0.3, 0.0]]
    low, high, _ = stats.bootstrap(pairs, lambda m: m[:, 0] - m[:, 1])
    assert (low, high) == pytest.approx((0.3, 0.3))  # whole rows are drawn: what a pair shares cancels
    assert stats.bootstrap(rows, lambda m: m[:, 0])[:2] == stats.bootstrap(rows, lambda m: m[:, 0])[:2]
    assert len(stats.bootstrap(rows, lambda m: m[:, 0])[2]) == 10_000


@pytest.mark.parametrize("n, covered", [(3, 0.75), (5, 0.84), (10, 0.90)])
def test_coverage_is_what_the_docs_say(n, covered):
    samples = np.random.default_rng(3).normal(size=(1500, n))
    intervals = [stats.bootstrap(x[:, None], lambda m: m[:, 0], draws=500)[:2] for x in samples]
    assert np.mean([low < 0 < high for low, high in intervals]) == pytest.approx(covered, abs=0.03)
    assert np.mean([abs(mean) < half for mean, half in map(stats.mean_interval, samples)]) == pytest.approx(0.95, abs=0.02)


def test_one_sided_p_equals_scipy():
    x = 0.3 + np.random.default_rng(4).normal(size=7)
    for shift in (-1.0, 0.0, 0.4, 2.0):
        expected = scipy.stats.ttest_1samp(x + shift, 0, alternative="greater").pvalue
        assert stats.p_above(x + shift) == pytest.approx(expected, abs=1e-12)
    assert stats.p_above([0.2] * 3) == 0 and stats.p_above([-0.2] * 3) == 1 and stats.p_above([0.0] * 3) == 1
    assert stats.p_above([0.1 + 0.2, 0.3, 0.3]) == 0  # rounding is no scatter


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.01, 0.02, 0.9]) == pytest.approx([1.0, 0.04, 0.06, 1.0])
    assert stats.holm([]) == []


GROUPS = [(5, 5, 0.1, 1.0), (5, 3, -0.4, 4.0), (3, 8, 1.5, 0.1)]  # observations of each, shift, ratio of their scatters


@pytest.mark.parametrize("n, m, shift, ratio", GROUPS)
def test_two_groups_equal_scipy(n, m, shift, ratio):
    rng = np.random.default_rng(n + m)
    a, b = shift + rng.normal(size=n), ratio * rng.normal(size=m)
    test = scipy.stats.ttest_ind(a, b, equal_var=False)
    want = (a.mean() - b.mean(), *test.confidence_interval(0.95), test.pvalue)
    assert stats.welch(a, b) == pytest.approx(want, rel=1e-9)
    above = scipy.stats.ttest_ind(a - 0.3, b, equal_var=False, alternative="greater").pvalue
    assert stats.p_beyond(a, b, 0.3) == pytest.approx(above, rel=1e-9)
    c = b[: min(n, m)]
    expected = scipy.stats.ttest_rel(a[: len(c)], c)
    interval = expected.confidence_interval(0.95)
    want = (a[: len(c)].mean() - c.mean(), interval.low, interval.high, expected.pvalue)
    assert stats.paired(a[: len(c)], c) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("n, m, shift, ratio", GROUPS)
def test_equivalence_is_where_the_90_percent_interval_ends(n, m, shift, ratio):
    rng = np.random.default_rng(n * m)
    a, b = shift + rng.normal(size=n), ratio * rng.normal(size=m)
    _, low, high, _ = stats.welch(a, b, level=0.9)
    reach = max(-low, high)  # the narrowest margin that holds the interval
    assert stats.tost(a, b, reach) == pytest.approx(0.05, abs=1e-9) == stats.tost(b, a, reach)
    assert stats.tost(a, b, 2 * reach) < 0.05 < stats.tost(a, b, 0.9 * reach)
    assert [stats.p_beyond(a, b, end) for end in (low, high)] == pytest.approx([0.05, 0.95], abs=1e-9)


def test_groups_without_scatter_differ_or_do_not():
    same, more = [0.1 + 0.2] * 3, [0.5] * 3
    assert stats.welch(same, [0.3] * 3)[3] == 1 and stats.welch(more, same) == pytest.approx((0.2, 0.2, 0.2, 0))
    assert stats.tost(more, same, 0.3) == 0 and stats.tost(more, same, 0.2) == 1 and stats.tost(same, [0.3] * 3, 0.01) == 0
    assert stats.paired(more, same)[3] == 0 and stats.paired(same, [0.3] * 3)[3] == 1
