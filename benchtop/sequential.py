"""A sequential test: it may be evaluated after every pair of runs, and its error rate stays at most alpha.

    >>> test = Sequential(margin=0.01, alpha=0.05, first=3, most=8)
    >>> test.look([0.020, 0.024, 0.021, 0.023]).verdict
    'keep'

Checking a p value after each pair and stopping once it is small finds a gain in far more than 5 % of ideas
that have none. Here each look has its own limit, so that all looks together err with probability alpha.
Knows numbers only: gains of one idea over the baseline, one for each seed; larger is better.

source  repeated t tests by significance levels: Pocock 1977, doi:10.1093/biomet/64.2.191; repeated
        confidence intervals: Jennison & Turnbull 1989, doi:10.1111/j.2517-6161.1989.tb01433.x. Their limits
        are approximations for large samples; here limits are simulated, which works because Student's t of
        a few normal differences has the same distribution whatever their spread.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchtop.significance import t_quantile

PATHS = 400_000         # simulated to find the limits; an alpha of 0.05 is met within 0.001


@dataclass(frozen=True)
class Look:
    """The result of a look at some pairs.

    verdict    "keep", "discard", or "undecided"
    gain       mean gain over the pairs
    low, high  interval of the gain, valid for all looks together
    sd         standard deviation of single gains
    """
    verdict: str
    pairs: int
    gain: float
    low: float
    high: float
    sd: float


@dataclass(frozen=True)
class Sequential:
    """The stopping rule of a trial, fixed before its first run.

    margin  smallest gain that matters
    alpha   largest probability of keeping an idea that has no gain, and of discarding an idea whose gain is
            `margin`
    first   pairs before the first look, at least 2
    most    pairs after which the trial ends undecided
    ideas   number of ideas in the trial; the chance of keeping any that has no gain stays alpha (Bonferroni)
    """
    margin: float
    alpha: float
    first: int
    most: int
    ideas: int = 1

    def look(self, gains: Sequence[float]) -> Look:
        """Draw a conclusion from the gains of all pairs so far.

        keep     the interval of the gain lies above 0
        discard  the interval lies below the margin, so there is no gain that matters
        raises   ValueError if there are fewer pairs than `first`, or more than `most`
        """
        pairs = len(gains)
        if not self.first <= pairs <= self.most:
            raise ValueError(f"a look takes {self.first} to {self.most} pairs; there are {pairs}")
        gain, sd = statistics.fmean(gains), statistics.stdev(gains)
        error = sd / math.sqrt(pairs)
        low = gain - error * self.limit(pairs, self.alpha / self.ideas)
        high = gain + error * self.limit(pairs, self.alpha)
        verdict = "discard" if high < self.margin else "keep" if low > 0 else "undecided"
        return Look(verdict, pairs, gain, low, high, sd)

    def limit(self, pairs: int, alpha: float) -> float:
        """The limit on t at this look; the chance of exceeding the limit at any look is alpha."""
        return limits(self.first, self.most, alpha)[pairs - self.first]

    def power(self, sd: float) -> float:
        """Probability of keeping an idea whose gain is exactly the margin; `sd` as in Look."""
        if sd == 0:
            return 1.0
        t = paths(self.first, self.most, self.margin / sd)
        keep = np.array(limits(self.first, self.most, self.alpha / self.ideas))
        return float((t > keep).any(1).mean())

    def more(self, sd: float) -> int:
        """About how large `most` must be to detect a gain of the margin with 80 % power: the pairs of a z
        test, plus the price of repeated looks and an unknown spread (simulated for 5 to 40 pairs).
        """
        normal = statistics.NormalDist()
        limit = normal.inv_cdf(1 - self.alpha / self.ideas)
        pairs = ((limit + normal.inv_cdf(0.8)) * sd / self.margin) ** 2
        return max(self.most + 1, math.ceil(1.17 * pairs + limit**2))


@functools.cache
def limits(first: int, most: int, alpha: float) -> tuple[float, ...]:
    """Limits on Student's t at each look, from `first` to `most` pairs; the chance of exceeding any of them
    is alpha (one-sided).

    The significance level of a look is proportional to its number of pairs: late looks, which know most, get
    most of it, and early looks can still stop clear cases.
    """
    t = paths(first, most, 0.0)
    pairs = range(first, most + 1)

    def at(level: float) -> tuple[float, ...]:
        return tuple(t_quantile(1 - level * count / most, count - 1) for count in pairs)
    low, high = alpha / 4 / len(pairs), alpha
    while high - low > alpha / 1000:
        middle = (low + high) / 2
        low, high = (low, middle) if (t > np.array(at(middle))).any(1).mean() > alpha else (middle, high)
    return at(low)


@functools.lru_cache(maxsize=4)
def paths(first: int, most: int, shift: float) -> np.ndarray:
    """(PATHS, looks) Student's t of simulated normal gains with standard deviation 1 and mean `shift`."""
    gains = np.random.default_rng(0).standard_normal((PATHS, most)) + shift
    count = np.arange(1, most + 1)
    mean = gains.cumsum(1) / count
    squares = (gains**2).cumsum(1) - count * mean**2
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean * np.sqrt(count * (count - 1) / squares)
    return t[:, first - 1:]
