"""stats.py against scipy, brute force and hand arithmetic."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

import stats


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 30, 201])
def test_t_equals_scipy(df):
    for t in (-30, -2.5, -0.1, 0, 0.7, 4, 12):
        assert stats.t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), abs=1e-13)
    for p in (0.005, 0.05, 0.3, 0.9, 0.975, 0.9995):
        assert stats.t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-9)


@pytest.mark.parametrize("call", [
    lambda: stats.t_cdf(1.0, 2.5), lambda: stats.t_cdf(1.0, 0), lambda: stats.t_quantile(1.0, 3), lambda: stats.mean_interval([]),
    lambda: stats.mean_interval([1.0, math.nan]), lambda: stats.p_above([1.0]), lambda: stats.bootstrap([1.0], lambda m: m[:, 0]),
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
