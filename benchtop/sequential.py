"""A test that may be looked at after every pair of runs, and still errs no more often than it promises.

    >>> test = Sequential(margin=0.01, alpha=0.05, first=3, most=8)
    >>> test.look([0.020, 0.024, 0.021, 0.023]).verdict
    'keep'

Looking at a p value after each pair and stopping when it is small finds a gain in far more than 5 % of ideas
that have none. Here each look has a limit of its own, so that all looks together err with probability alpha.
Knows numbers only: gains of one idea over the baseline, one for each seed, larger is better.

source  repeated t tests: Pocock 1977, doi:10.1093/biomet/64.2.191, by significance levels; repeated
        confidence intervals: Jennison & Turnbull 1989, doi:10.1111/j.2517-6161.1989.tb01433.x. The limits are
        not their approximations for large samples but simulated, since Student's t of a few normal
        differences has the same distribution whatever their spread.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchtop.significance import t_quantile

PATHS = 400_000         # simulated, for the limits: alpha 0.05 is met within 0.001


@dataclass(frozen=True)
class Look:
    """What is known after some pairs.

    verdict    "keep", "discard", or "undecided"
    gain       mean gain over the pairs
    low, high  the gain's interval; it holds at all looks together
    sd         of single gains
    """
    verdict: str
    pairs: int
    gain: float
    low: float
    high: float
    sd: float


@dataclass(frozen=True)
class Sequential:
    """The rule by which trials stop; all of it is decided before the first run.

    margin  the smallest gain that matters
    alpha   how often an idea without any gain is kept, at most, and how often one with a gain of `margin` is
            discarded
    first   pairs before the first look, at least 2
    most    pairs after which the trial ends undecided
    ideas   in the same trial: the chance that any of those without gain is kept stays alpha (Bonferroni)
    """
    margin: float
    alpha: float
    first: int
    most: int
    ideas: int = 1

    def look(self, gains: Sequence[float]) -> Look:
        """What to conclude from these pairs.

        keep     the interval of the gain lies above 0
        discard  it lies below the margin, so there is no gain that matters
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
        """The t of this look; that of one look or another is exceeded by chance with probability alpha."""
        return limits(self.first, self.most, alpha)[pairs - self.first]

    def power(self, sd: float) -> float:
        """How often an idea with a gain of exactly the margin is kept, where single gains scatter by `sd`."""
        if sd == 0:
            return 1.0
        t = paths(self.first, self.most, self.margin / sd)
        keep = np.array(limits(self.first, self.most, self.alpha / self.ideas))
        return float((t > keep).any(1).mean())

    def more(self, sd: float) -> int:
        """About how many pairs, as `most`, find a gain of the margin in 80 % of cases: as many as a z test
        takes, and what looking so often and not knowing the spread cost on top (simulated for 5 to 40 pairs).
        """
        normal = statistics.NormalDist()
        limit = normal.inv_cdf(1 - self.alpha / self.ideas)
        pairs = ((limit + normal.inv_cdf(0.8)) * sd / self.margin) ** 2
        return max(self.most + 1, math.ceil(1.17 * pairs + limit**2))


@functools.cache
def limits(first: int, most: int, alpha: float) -> tuple[float, ...]:
    """Student's t for each look, from `first` to `most` pairs: one of them is exceeded by chance with
    probability alpha (one-sided).

    Each look spends a level in proportion to its pairs, so that the last ones, which know most, have most of
    it, and early ones still stop what is plain.
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
    """(PATHS, looks) Student's t of normal gains with spread 1 and mean `shift`, as pairs arrive."""
    gains = np.random.default_rng(0).standard_normal((PATHS, most)) + shift
    count = np.arange(1, most + 1)
    mean = gains.cumsum(1) / count
    squares = (gains**2).cumsum(1) - count * mean**2
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean * np.sqrt(count * (count - 1) / squares)
    return t[:, first - 1:]
