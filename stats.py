"""Statistics over seeds. A seed is one observation, however many completions were scored inside its run.

    mean, half = mean_interval([0.91, 0.88, 0.93])                      # Student's t: mean ± half at 95%
    low, high, draws = bootstrap(pairs, lambda m: m[:, 0] - m[:, 1])    # whole seeds resampled, 10,000 times
    holm([p_above(a - b), max(p_above(c + .05), p_above(.05 - c))])     # p values; the larger of two is TOST, for equivalence
    difference, low, high, p = welch(a, b)                              # unpaired, each group with its own scatter
    tost(a, b, margin=0.05)                                             # p value of "they differ by the margin or more"

With few seeds the two intervals differ. The percentile bootstrap never leaves the range of the observations and covers less
than it says (Hesterberg 2015, https://arxiv.org/abs/1411.5279); Student's t covers what it says where the seeds
scatter normally.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t, distribution and quantile; degrees of freedom first

LEVEL = 0.95  # of every interval
DRAWS = 10_000  # of every bootstrap
BOOTSTRAP_SEED = 0


# ------------------------------------------------------------------------------------------------- Student's t


def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, 0 < p < 1, of Student's t with df degrees of freedom."""
    return float(stdtrit(df, p))


def mean_interval(values, level: float = LEVEL) -> tuple[float, float]:
    """(mean, half-width of its t interval). One observation has no interval: half is NaN. Raises ValueError for none."""
    x = _observations(values)
    if len(x) < 2:
        return float(x.mean()), math.nan
    return float(x.mean()), t_quantile((1 + level) / 2, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))


def ratio_interval(numerator, denominator, level: float = LEVEL) -> tuple[float, float]:
    """Fieller's interval for mean(numerator) / mean(denominator) of paired observations: all r at which the t interval of
    numerator - r * denominator holds 0. (-inf, inf) where the denominator is not distinguishable from 0.

    Fieller 1954, J. R. Statist. Soc. B 16(2).
    """
    a, b = _observations(numerator), _observations(denominator)
    n = len(a)
    if n < 2:
        return -math.inf, math.inf
    s = t_quantile((1 + level) / 2, n - 1) ** 2 * np.cov(a, b) / n
    # (a - r b)^2 <= t^2 var(a - r b) / n, a quadratic in r: x r^2 - 2 y r + z <= 0
    x, y, z = b.mean() ** 2 - s[1, 1], a.mean() * b.mean() - s[0, 1], a.mean() ** 2 - s[0, 0]
    if x <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(0.0, y * y - x * z))
    return float((y - root) / x), float((y + root) / x)


# --------------------------------------------------------------------------------------------------- bootstrap


def bootstrap(
    rows, statistic: Callable[[np.ndarray], np.ndarray], draws: int = DRAWS, level: float = LEVEL, seed: int = BOOTSTRAP_SEED
) -> tuple[float, float, np.ndarray]:
    """Percentile bootstrap of a statistic of column means.

    Args:
        rows: (n, k), one row a seed; whole rows are resampled, so pairs stay pairs.
        statistic: column means (draws, k) -> (draws,).
    Returns:
        (low, high, means): the interval, and the resampled column means (draws, k).
    """
    rows = np.asarray(rows, dtype=float)
    if rows.ndim != 2 or len(rows) == 0 or not np.isfinite(rows).all():
        raise ValueError(f"bootstrap needs finite rows (n, k), one a seed, not shape {rows.shape}")
    chosen = np.random.default_rng(seed).integers(len(rows), size=(draws, len(rows)))
    means = rows[chosen].mean(axis=1)  # (draws, n, k) -> (draws, k)
    low, high = np.quantile(statistic(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), means


# ------------------------------------------------------------------------------------------------------- tests


def p_above(values) -> float:
    """One-sided t-test: the p value of "the mean is at most 0", small where it is above. Two of them, max(p_above(x - low),
    p_above(high - x)), are the TOST of "the mean lies between" (Schuirmann 1987). Needs two observations."""
    x = _observations(values)
    if len(x) < 2:
        raise ValueError("a t-test needs two observations or more")
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    if error <= 1e-12 * max(1.0, float(np.abs(x).max())):  # all alike, up to rounding: no scatter to test against
        return 0.0 if x.mean() > 0 else 1.0
    return float(stdtr(len(x) - 1, -float(x.mean()) / error))


def welch(a, b, level: float = LEVEL) -> tuple[float, float, float, float]:
    """Welch's t-test (1947) of two unpaired groups, each with its own variance: (mean(a) - mean(b), low, high, two-sided p)."""
    difference, error, df = _difference(a, b)
    if not error:
        return difference, difference, difference, float(difference == 0)
    half = t_quantile((1 + level) / 2, df) * error
    return difference, difference - half, difference + half, float(2 * stdtr(df, -abs(difference) / error))


def paired(a, b, level: float = LEVEL) -> tuple[float, float, float, float]:
    """The paired t-test, as `welch`: a[i] and b[i] are one seed's."""
    if len(a) != len(b):
        raise ValueError(f"pairs need equally many of both, not {len(a)} and {len(b)}")
    a, b = _observations(a), _observations(b)
    differences = np.array([0.0 if _alike(x, a, b) else x for x in a - b])  # rounding is no difference
    mean, half = mean_interval(differences, level)
    return mean, mean - half, mean + half, min(1.0, 2 * min(p_above(differences), p_above(-differences)))


def p_beyond(a, b, shift: float) -> float:
    """One-sided Welch test: the p value of "mean(a) - mean(b) is at most `shift`", small where it is more."""
    difference, error, df = _difference(a, b)
    if not error:
        return 0.0 if difference > shift and not math.isclose(difference, shift, rel_tol=1e-9) else 1.0
    return float(stdtr(df, -(difference - shift) / error))


def tost(a, b, margin: float) -> float:
    """Equivalence of two unpaired groups by two one-sided Welch tests (Schuirmann 1987): the p value of "the means differ by
    `margin` or more", small where they are closer. Raises ValueError unless the margin is above 0."""
    if not margin > 0:
        raise ValueError(f"an equivalence margin must be above 0, not {margin}")
    return max(p_beyond(a, b, -margin), p_beyond(b, a, -margin))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction (1979): adjusted p values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _observations(values) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"statistics need a list of finite numbers, one a seed, not {values!r}")
    return x


def _difference(a, b) -> tuple[float, float, float]:
    """mean(a) - mean(b), its standard error (0 where neither scatters), and Welch's and Satterthwaite's degrees of freedom."""
    a, b = _observations(a), _observations(b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a t-test needs two observations or more of each group, not {len(a)} and {len(b)}")
    difference, of_a, of_b = float(a.mean() - b.mean()), float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
    difference = 0.0 if _alike(difference, a, b) else difference
    if _alike(math.sqrt(of_a + of_b), a, b):
        return difference, 0.0, math.nan
    df = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return difference, math.sqrt(of_a + of_b), df


def _alike(x: float, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether x is 0 up to the rounding of numbers as large as a's and b's."""
    return bool(abs(x) <= 1e-12 * max(1.0, float(np.abs(a).max()), float(np.abs(b).max())))
