"""How noisy is a gradient, and where does it point? Moments of K independent draws of it, from running sums.

    drawn = Moments(size=D, groups=16)
    drawn.add(gradient)                                   # K times; no gradient is kept
    noise(drawn)["ratio"]                                 # trace of the covariance over the squared norm of the mean
    cosine(drawn, reference), bias(drawn, reference)      # against another gradient's draws, or an exact one

The squared norm of the mean of K draws is too large by trace / K, so that trace over it can't exceed about K, however noisy the
draws are. What is taken for it here is the mean of g_i . g_j over pairs of different draws, which is |mean|^2 - trace / K to the
letter, and has |E g|^2 as its expectation. It can come out at 0 or below: then K draws do not show the mean, and no figure that
divides by it is given (`nan`, printed as "not resolved").

Draws go to `groups` sums in turn, from whose inner products all of it follows. Intervals are at 95%, by the jackknife over
groups (Tukey 1958; the bootstrap would draw a group twice, and its product with itself is what has to stay out). The ratio's is
Fieller's, of power / trace, inverted: it is open above where the power can't be told from 0.
"""
import math
from collections.abc import Callable

import torch

from stats import LEVEL, ratio_interval, t_quantile


class Moments:
    """Running sums of the draws of a gradient of `size` numbers: `sums` (groups, size) and `squares` (groups,), the sum of
    squared norms, in fp64."""

    def __init__(self, size: int, groups: int):
        if groups < 3:
            raise ValueError(f"intervals need at least 3 groups of draws, not {groups}")
        self.sums = torch.zeros(groups, size, dtype=torch.float64)
        self.squares = torch.zeros(groups, dtype=torch.float64)
        self.count = 0

    def add(self, gradient: torch.Tensor) -> None:
        """One draw (size,)."""
        if not torch.isfinite(gradient).all():
            raise FloatingPointError(f"draw {self.count} of a gradient is not finite")
        group, gradient = self.count % len(self.sums), gradient.double().cpu()
        self.sums[group] += gradient
        self.squares[group] += gradient.square().sum()
        self.count += 1

    @property
    def mean(self) -> torch.Tensor:
        return self.sums.sum(0) / self.count

    def parts(self) -> tuple["Part", list["Part"]]:
        """All draws, and all but each group's. Raises ValueError where groups are unequal, or a group is all there is."""
        groups = len(self.sums)
        if not self.count or self.count % groups:
            raise ValueError(f"{self.count} draws do not make {groups} equal groups")
        total, square, each = self.sums.sum(0), self.squares.sum(), self.count // groups
        inner, along = self.sums.square().sum(1), self.sums @ total
        whole = Part(self.count, float(total @ total), float(square))
        left = total @ total - 2 * along + inner  # |total - sum of the group|^2
        rest = [Part(self.count - each, float(t), float(square - q)) for t, q in zip(left, self.squares)]
        return whole, rest


class Part:
    """Trace of the covariance and power, |E g|^2, both unbiased, of `count` draws: |sum of them|^2 and the sum of |draw|^2."""

    def __init__(self, count: int, total_square: float, squares: float):
        self.count, self.norm2 = count, total_square / count**2
        self.trace = (squares - total_square / count) / (count - 1) if count > 1 else math.nan
        self.power = (total_square - squares) / (count * (count - 1)) if count > 1 else math.nan


def exact(gradient: torch.Tensor, groups: int) -> Moments:
    """A gradient without noise: every draw is alike."""
    drawn = Moments(len(gradient), groups)
    for _ in range(2 * groups):
        drawn.add(gradient)
    return drawn


def noise(drawn: Moments) -> dict[str, float]:
    """trace, power, ratio with low and high (inf: open above; nan: not resolved), and uncorrected, trace / |mean|^2."""
    (whole, rest), ratio, low, high = drawn.parts(), math.nan, math.nan, math.nan
    groups = len(rest)
    power, trace = ([groups * getattr(whole, k) - (groups - 1) * getattr(r, k) for r in rest] for k in ("power", "trace"))
    least, most = ratio_interval(power, trace)
    if whole.power > 0 and most > 0:
        ratio, low, high = whole.trace / whole.power, 1 / most, 1 / least if least > 0 else math.inf
    uncorrected = whole.trace / whole.norm2 if whole.norm2 else math.nan
    return {"trace": whole.trace, "power": whole.power, "ratio": ratio, "low": low, "high": high, "uncorrected": uncorrected}


def attenuation(drawn: Moments) -> float:
    """What noise multiplies a cosine of this mean by: sqrt(power / |mean|^2). nan: not resolved."""
    whole, _ = drawn.parts()
    return math.sqrt(whole.power / whole.norm2) if whole.power > 0 else math.nan


def halves(drawn: Moments) -> tuple[float, float]:
    """(cosine c between the means of every second group and of the others, the attenuation of the whole mean that it says:
    sqrt(2 c / (1 + c)), Spearman and Brown 1910; nan: not resolved)."""
    a, b = drawn.sums[0::2].sum(0), drawn.sums[1::2].sum(0)
    c = cosine_of(a, b)
    return c, math.sqrt(2 * c / (1 + c)) if c > 0 else math.nan


def cosine_of(a: torch.Tensor, b: torch.Tensor) -> float:
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms else math.nan


def cosine(drawn: Moments, reference: Moments) -> tuple[float, float]:
    """(cosine of the two expectations, half-width of its interval): the cosine of the means over both attenuations. It may
    exceed 1 by its error. nan: not resolved."""
    return jackknife(drawn, reference, lambda dot, a, b: dot / math.sqrt(a * b) if a > 0 and b > 0 else math.nan)


def bias(drawn: Moments, reference: Moments) -> tuple[float, float]:
    """(|E g - E r|^2 / |E r|^2, half-width): the squared bias as a share of the reference r, unbiased: it may be below 0."""
    return jackknife(drawn, reference, lambda dot, a, b: (a + b - 2 * dot) / b if b > 0 else math.nan)


def jackknife(drawn: Moments, reference: Moments, figure: Callable[[float, float, float], float]) -> tuple[float, float]:
    """(figure, half-width) of figure(mean . mean, power, power): of two independent sets of draws, groups of each left out in
    turn. Both are nan where the figure is for any of them."""
    (a, a_rest), (b, b_rest) = drawn.parts(), reference.parts()
    dot = drawn.sums @ reference.sums.T  # (groups, groups)
    total, variance = dot.sum(), 0.0
    for left in (
        [figure(float(total - d) / (r.count * b.count), r.power, b.power) for r, d in zip(a_rest, dot.sum(1))],
        [figure(float(total - d) / (a.count * r.count), a.power, r.power) for r, d in zip(b_rest, dot.sum(0))],
    ):
        variance += (len(left) - 1) * float(torch.tensor(left, dtype=torch.float64).var(correction=0))
    value = figure(float(total) / (a.count * b.count), a.power, b.power)
    half = t_quantile((1 + LEVEL) / 2, min(len(a_rest), len(b_rest)) - 1) * math.sqrt(variance)
    return (math.nan, math.nan) if math.isnan(value + half) else (value, half)
