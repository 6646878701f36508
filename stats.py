"""Statistics over seeds. A seed is one observation, however many completions were scored inside its run.

    mean, half = mean_interval([0.91, 0.88, 0.93])                      # Student's t: mean ± half at 95%
    low, high, draws = bootstrap(pairs, lambda m: m[:, 0] - m[:, 1])    # whole seeds resampled, 10,000 times
    holm([p_above(a - b), max(p_above(c + .05), p_above(.05 - c))])     # p values; the larger of two is TOST, for equivalence

With few seeds the two intervals differ. The percentile bootstrap never leaves the range of the observations and covers less
than it says (Hesterberg 2015, https://arxiv.org/abs/1411.5279); Student's t covers what it says where the seeds
scatter normally.
"""

import math
from collections.abc import Callable

import numpy as np

LEVEL = 0.95  # of every interval
DRAWS = 10_000  # of every bootstrap
BOOTSTRAP_SEED = 0


# ------------------------------------------------------------------------------------------------- Student's t


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom, by its finite series.

    Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even). Raises ValueError unless df is a whole number of at least 1.
    """
    if df < 1 or df != int(df):
        raise ValueError(f"degrees of freedom must be a whole number of at least 1, not {df}")
    theta = math.atan(t / math.sqrt(df))
    odd, cos2 = df % 2, math.cos(theta) ** 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(1, (df - odd) // 2 + 1):
        total += term
        term *= cos2 * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    inside = math.sin(theta) * total  # P(|T| <= |t|) with the sign of t
    return 0.5 + ((theta + inside) / math.pi if odd else inside / 2)


def t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, 0 < p < 1, by bisection on its angle."""
    if not 0 < p < 1:
        raise ValueError(f"a quantile needs 0 < p < 1, not {p}")
    low, high = -math.pi / 2, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(math.sqrt(df) * math.tan(middle), df) < p else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


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
    return t_cdf(-float(x.mean()) / error, len(x) - 1)


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
