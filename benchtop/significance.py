"""What can be concluded from a few runs: differences with intervals, tests, how many runs an effect needs.

    >>> welch([3.28, 3.29, 3.27], [3.31, 3.33, 3.32]).p < 0.05
    True
    >>> runs_needed(effect=0.01, sd=0.004)
    4

Everything here takes lists of numbers, one for each run, and knows nothing of files. Results of seeds scatter
about their mean like a normal distribution, to the precision that matters with a handful of runs; the tests
are Student's and its kin. tests/test_significance.py holds each beside scipy.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """How far group b is above group a.

    kind        "paired" by seed, or "Welch": independent, with spreads of their own
    low, high   the 95 % interval of the mean difference
    t, df, p    of the two-sided test that there is no difference
    error       standard error of the mean
    sd          spread that a single run (or pair) has
    df_per_run  degrees of freedom that another pair, or another run in each group, adds
    """
    kind: str
    mean: float
    low: float
    high: float
    t: float
    df: float
    p: float
    error: float
    sd: float
    df_per_run: float


def welch(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Mean of b minus mean of a, for independent runs.

    raises  ValueError if a group has fewer than two runs
    source  Welch 1947, doi:10.1093/biomet/34.1-2.28
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a spread needs two runs or more in each group")
    parts = [statistics.variance(group) / len(group) for group in (a, b)]
    error = math.sqrt(sum(parts))
    df, df_per_run = len(a) + len(b) - 2.0, 2.0
    variances = [statistics.variance(group) for group in (a, b)]
    if error > 0:
        df = sum(parts) ** 2 / sum(part**2 / (len(group) - 1)
                                   for part, group in zip(parts, (a, b), strict=True))
        df_per_run = sum(variances) ** 2 / sum(variance**2 for variance in variances)
    pooled = sum((len(group) - 1) * variance for group, variance in zip((a, b), variances, strict=True))
    return _difference("Welch", statistics.fmean(b) - statistics.fmean(a), error, df,
                       math.sqrt(pooled / (len(a) + len(b) - 2)), df_per_run)


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Mean of b[i] - a[i], for runs that share a seed: what the seed changes in both cancels.

    raises  ValueError if there are fewer than two pairs, or the groups have different lengths
    """
    differences = [second - first for first, second in zip(a, b, strict=True)]
    if len(differences) < 2:
        raise ValueError("a spread needs two pairs or more")
    sd = statistics.stdev(differences)
    return _difference("paired", statistics.fmean(differences), sd / math.sqrt(len(differences)),
                       len(differences) - 1.0, sd, 1.0)


def _difference(kind: str, mean: float, error: float, df: float, sd: float, df_per_run: float) -> Difference:
    if error == 0:      # all runs agree to the last digit
        t = math.copysign(math.inf, mean) if mean else 0.0
        return Difference(kind, mean, mean, mean, t, df, 0.0 if mean else 1.0, 0.0, sd, df_per_run)
    half, t = t_quantile(0.975, df) * error, mean / error
    return Difference(kind, mean, mean - half, mean + half, t, df, 2 * t_cdf(-abs(t), df), error, sd,
                      df_per_run)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of two runs or more."""
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def p_below(values: Sequence[float], target: float) -> float:
    """One-sided p of the mean being `target` or more: small if the runs reach the target on average.

    It is the test of Modded-NanoGPT's speedruns, which ask for p < 0.01.
    raises  ValueError if there are fewer than two runs
    """
    if len(values) < 2:
        raise ValueError("a spread needs two runs or more")
    error = statistics.stdev(values) / math.sqrt(len(values))
    above = statistics.fmean(values) - target
    if error == 0:
        return 0.0 if above < 0 else 1.0
    return t_cdf(above / error, len(values) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of several tests, raised so that the chance of any false positive stays that of one test.

        >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03, 0.005])]
        [0.03, 0.06, 0.06, 0.02]

    source  Holm 1979, Scand. J. Stat. 6, 65
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for smaller, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - smaller) * p_values[place]))
        adjusted[place] = largest
    return adjusted


@dataclass(frozen=True)
class McNemar:
    """Two models on the same questions: those that only one of them answers right, the p of no difference."""
    only_a: int
    only_b: int
    both: int
    neither: int
    p: float


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """The exact test: of equally good models, each would win half of the questions that divide them.

    source  McNemar 1947, doi:10.1007/BF02295996
    """
    pairs = list(zip(a, b, strict=True))
    only_a, only_b, both, neither = (pairs.count(pair) for pair in
                                     ((True, False), (False, True), (True, True), (False, False)))
    divided = only_a + only_b
    tail = sum(math.comb(divided, wins) for wins in range(min(only_a, only_b) + 1))
    return McNemar(only_a, only_b, both, neither, min(1.0, float(2 * tail / 2**divided)))


# ------------------------------------------------------------------------------------------------
# Which text was held out: a bootstrap
# ------------------------------------------------------------------------------------------------

RESAMPLES = 10_000


@dataclass(frozen=True)
class OverDocuments:
    """A mean difference, and its 95 % interval over the choice of documents, and of seeds if covers_seeds."""
    documents: int
    mean: float
    low: float
    high: float
    covers_seeds: bool


def over_documents(differences: Sequence[float], sizes: Sequence[float], error: float = 0.0, df: float = 1.0,
                   resamples: int = RESAMPLES) -> OverDocuments:
    """The difference of two groups per unit of text, with an interval for other documents of the same kind.

    differences  (D) nats of each document, b minus a, in the mean over seeds
    sizes        (D) what each document has of the unit: tokens, or bytes x ln 2 for bits per byte
    error, df    of the mean over seeds, as Difference has them; an error of 0: of these models alone
    raises       ValueError if there are fewer than two documents, or nothing in them

    Documents are drawn with replacement, as many as there are, and their sums divided (Efron and Tibshirani
    1993, chapter 13). Seeds are too few for that: of three, no draw leaves their range, which holds the true
    mean in 75 % of cases. So their part is drawn from Student's distribution, as Difference's interval is;
    without a spread between documents, this is that interval.
    """
    parts = np.array([differences, sizes], float)       # (2, D)
    documents = parts.shape[1]
    if documents < 2 or not parts[1].sum():
        raise ValueError("a spread needs two documents or more")
    rng = np.random.default_rng(0)
    drawn = []
    at_once = max(1, 2_000_000 // documents)
    for begin in range(0, resamples, at_once):
        draws = min(at_once, resamples - begin)
        chosen = rng.integers(documents, size=(draws, documents)) + documents * np.arange(draws)[:, None]
        times = np.bincount(chosen.ravel(), minlength=draws * documents).reshape(draws, documents)
        with np.errstate(invalid="ignore"):     # documents without a byte alone, of which nothing follows
            drawn.append(np.divide(*(parts @ times.T)))
    values = np.concatenate(drawn) + error * rng.standard_t(df, resamples)
    low, high = np.nanquantile(values, (0.025, 0.975)).tolist()
    return OverDocuments(documents, float(parts[0].sum() / parts[1].sum()), low, high, error > 0)


# ------------------------------------------------------------------------------------------------
# How many runs: an experiment that is too small finds nothing, whatever is there.
# ------------------------------------------------------------------------------------------------

def power(effect: float, error: float, df: float) -> float:
    """How often a two-sided test at 5 % finds a true effect, where the mean's standard error is `error`."""
    critical, shift = t_quantile(0.975, df), effect / error
    return 1 - noncentral_t_cdf(critical, df, shift) + noncentral_t_cdf(-critical, df, shift)


def detectable_effect(sd: float, runs_a: int, runs_b: int = 0) -> float:
    """The smallest true difference that is detected with 80 % power.

    sd              spread of single runs; of differences if the runs are paired
    runs_a, runs_b  in each group; without runs_b, runs_a pairs
    """
    return smallest_effect(*error_and_df(sd, runs_a, runs_b))


def error_and_df(sd: float, runs_a: int, runs_b: int) -> tuple[float, int]:
    """Standard error of the mean difference, and its degrees of freedom; arguments as detectable_effect's."""
    if not runs_b:
        return sd / math.sqrt(runs_a), runs_a - 1
    return sd * math.sqrt(1 / runs_a + 1 / runs_b), runs_a + runs_b - 2


def smallest_effect(error: float, df: float) -> float:
    """The true difference that is detected with 80 % power, where the mean's standard error is `error`."""
    if error == 0:
        return 0.0
    low, high = 0.0, error
    while power(high, error, df) < 0.8:
        high *= 2
    while high - low > 1e-6 * error:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, error, df) < 0.8 else (low, middle)
    return high


def runs_needed(effect: float, sd: float, is_paired: bool = False, df_per_run: float = 0.0) -> int:
    """Runs in each group (or pairs) with which a true difference is detected with 80 % power.

    df_per_run  as Difference has it, of groups of different spread; 0: of one spread
    raises  ValueError if it would take more than 10,000
    """
    def suffices(runs: int) -> bool:
        error, df = error_and_df(sd, runs, 0 if is_paired else runs)
        return power(abs(effect), error, df_per_run * (runs - 1) if df_per_run else df) >= 0.8
    if sd == 0:
        return 2
    runs = 2
    while not suffices(runs):
        runs *= 2
        if runs > 10_000:
            raise ValueError(f"detecting {effect:g} where runs scatter by {sd:g} needs more than 10,000 runs")
    low = runs // 2
    while runs - low > 1:
        middle = (low + runs) // 2
        low, runs = (low, middle) if suffices(middle) else (middle, runs)
    return max(2, runs)


# ------------------------------------------------------------------------------------------------
# Student's distribution
# ------------------------------------------------------------------------------------------------

def t_cdf(t: float, df: float) -> float:
    """How often Student's t of so many degrees of freedom is at most t."""
    tail = beta_cdf(df / (df + t * t), df / 2, 0.5) / 2
    return tail if t < 0 else 1 - tail


def t_quantile(share: float, df: float) -> float:
    """The t below which a share of Student's distribution lies."""
    low, high = -1.0, 1.0
    while t_cdf(high, df) < share:
        high *= 2
    while t_cdf(low, df) > share:
        low *= 2
    while high - low > 1e-12 * max(1.0, abs(low), abs(high)):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < share else (low, middle)
    return (low + high) / 2


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction.

    source  NIST Handbook of Mathematical Functions, 8.17.22, https://dlmf.nist.gov/8.17
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):       # where the fraction converges slowly
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(a * math.log(x) + b * math.log1p(-x)
                     + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    # Lentz's way to a continued fraction: numerators d_1, d_2, ...; all denominators are 1
    value, upper, lower = 1.0, 1.0, 0.0
    for number in range(1, 10_000):
        m = number // 2
        if number % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower = 1 / (1 + d * lower)
        upper = 1 + d / upper
        value *= upper * lower
        if abs(upper * lower - 1) < 1e-15:
            break
    return front / value


def noncentral_t_cdf(t: float, df: float, shift: float) -> float:
    """How often (Z + shift) / sqrt(chi-square / df) is at most t, Z being standard normal.

    The mean of Phi(t s - shift) over s = sqrt(chi-square / df), by Simpson's rule within ten spreads of s.
    """
    spread = math.sqrt(1 / (2 * df))
    low, high = max(0.0, 1 - 10 * spread), 1 + 10 * spread
    steps = 1000
    log_front = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    total = weight_sum = 0.0
    for step in range(steps + 1):
        s = low + (high - low) * step / steps
        if s == 0:
            density = math.sqrt(2 / math.pi) if df == 1 else 0.0
        else:
            density = math.exp(log_front + (df - 1) * math.log(s) - df * s * s / 2)
        weight = density * (1 if step in (0, steps) else 4 if step % 2 else 2)
        total += weight * 0.5 * math.erfc(-(t * s - shift) / math.sqrt(2))
        weight_sum += weight
    return total / weight_sum


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion.

    source  Wilson 1927, J. Am. Stat. Assoc. 22, 209
    """
    z = 1.959963984540054
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)

