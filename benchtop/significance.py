"""Statistics of a few runs: differences with confidence intervals, tests, and how many runs an effect needs.

    >>> welch([3.28, 3.29, 3.27], [3.31, 3.33, 3.32]).p < 0.05
    True
    >>> runs_needed(effect=0.01, sd=0.004)
    4

Everything here takes lists of numbers, one per run, and knows nothing about files. The tests are Student's t
and its relatives: for a handful of runs, results of different seeds are close enough to normally distributed.
tests/test_significance.py compares each function with scipy.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_RUNS = 10_000      # runs_needed does not search beyond this


@dataclass(frozen=True)
class Difference:
    """The mean of group b minus the mean of group a.

    kind        "paired" by seed, or "Welch": independent groups, each with its own variance
    low, high   95 % confidence interval of the mean difference
    t, df, p    of the two-sided test of no difference
    error       standard error of the mean difference
    sd          standard deviation of a single run (or of a pair's difference)
    df_per_run  degrees of freedom added by another pair, or by another run in each group
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
        raise ValueError("a spread needs at least two runs in each group")
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
    """Mean of b[i] - a[i], for runs that share a seed: an effect of the seed on both cancels.

    raises  ValueError if there are fewer than two pairs, or the groups have different lengths
    """
    differences = [second - first for first, second in zip(a, b, strict=True)]
    if len(differences) < 2:
        raise ValueError("a spread needs at least two pairs")
    sd = statistics.stdev(differences)
    return _difference("paired", statistics.fmean(differences), sd / math.sqrt(len(differences)),
                       len(differences) - 1.0, sd, 1.0)


def _difference(kind: str, mean: float, error: float, df: float, sd: float, df_per_run: float) -> Difference:
    if error == 0:      # the results do not vary at all
        t = math.copysign(math.inf, mean) if mean else 0.0
        return Difference(kind, mean, mean, mean, t, df, 0.0 if mean else 1.0, 0.0, sd, df_per_run)
    half, t = t_quantile(0.975, df) * error, mean / error
    return Difference(kind, mean, mean - half, mean + half, t, df, 2 * t_cdf(-abs(t), df), error, sd,
                      df_per_run)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean of two or more runs."""
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def p_below(values: Sequence[float], target: float) -> float:
    """One-sided p value for a mean of `target` or more: small if the runs are below the target on average.

    Modded-NanoGPT's speedruns use this test and require p < 0.01.
    raises  ValueError if there are fewer than two runs
    """
    if len(values) < 2:
        raise ValueError("a spread needs at least two runs")
    error = statistics.stdev(values) / math.sqrt(len(values))
    above = statistics.fmean(values) - target
    if error == 0:
        return 0.0 if above < 0 else 1.0
    return t_cdf(above / error, len(values) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of several tests, adjusted so that the chance of any false positive is that of a single test.

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
    """Two models on the same questions: how many only one, both or neither get right; p of no difference."""
    only_a: int
    only_b: int
    both: int
    neither: int
    p: float


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """The exact test: of the questions that only one model gets right, equally good models expect half each.

    source  McNemar 1947, doi:10.1007/BF02295996
    """
    pairs = list(zip(a, b, strict=True))
    only_a, only_b, both, neither = (pairs.count(pair) for pair in
                                     ((True, False), (False, True), (True, True), (False, False)))
    divided = only_a + only_b
    tail = sum(math.comb(divided, wins) for wins in range(min(only_a, only_b) + 1))
    return McNemar(only_a, only_b, both, neither, min(1.0, float(2 * tail / 2**divided)))


# ------------------------------------------------------------------------------------------------
# Bootstrap over the held-out documents
# ------------------------------------------------------------------------------------------------

RESAMPLES = 10_000


@dataclass(frozen=True)
class OverDocuments:
    """A mean difference and its 95 % interval over the choice of documents (and of seeds if covers_seeds)."""
    documents: int
    mean: float
    low: float
    high: float
    covers_seeds: bool


def over_documents(differences: Sequence[float], sizes: Sequence[float], error: float = 0.0, df: float = 1.0,
                   resamples: int = RESAMPLES) -> OverDocuments:
    """The difference of two groups per unit of text, with an interval for other documents of the same kind.

    differences  (D) nats of each document, b minus a, averaged over seeds
    sizes        (D) size of each document in that unit: tokens, or bytes x ln 2 for bits per byte
    error, df    of the mean over seeds, as in Difference; with error 0 the interval is for these models only
    raises       ValueError if there are fewer than two documents, or all are empty

    Documents are resampled with replacement, and the sums of both arguments divided (Efron and Tibshirani
    1993, chapter 13). Seeds are too few to resample: with three, no draw leaves their range, which contains
    the true mean in 75 % of cases. Their part is drawn from Student's t instead, as in Difference's interval;
    if documents did not vary, the result would be that interval.
    """
    parts = np.array([differences, sizes], float)       # (2, D)
    documents = parts.shape[1]
    if documents < 2 or not parts[1].sum():
        raise ValueError("a spread needs at least two documents")
    rng = np.random.default_rng(0)
    drawn = []
    at_once = max(1, 2_000_000 // documents)
    for begin in range(0, resamples, at_once):
        draws = min(at_once, resamples - begin)
        chosen = rng.integers(documents, size=(draws, documents)) + documents * np.arange(draws)[:, None]
        times = np.bincount(chosen.ravel(), minlength=draws * documents).reshape(draws, documents)
        with np.errstate(invalid="ignore"):     # a draw of only empty documents is NaN and skipped
            drawn.append(np.divide(*(parts @ times.T)))
    values = np.concatenate(drawn) + error * rng.standard_t(df, resamples)
    low, high = np.nanquantile(values, (0.025, 0.975)).tolist()
    return OverDocuments(documents, float(parts[0].sum() / parts[1].sum()), low, high, error > 0)


# ------------------------------------------------------------------------------------------------
# Power: how many runs an experiment needs
# ------------------------------------------------------------------------------------------------

def power(effect: float, error: float, df: float) -> float:
    """Probability that a two-sided test at 5 % detects a true effect; `error`: the mean's standard error."""
    critical, shift = t_quantile(0.975, df), effect / error
    return 1 - noncentral_t_cdf(critical, df, shift) + noncentral_t_cdf(-critical, df, shift)


def detectable_effect(sd: float, runs_a: int, runs_b: int = 0) -> float:
    """The smallest true difference that is detected with 80 % power.

    sd              standard deviation of single runs; of differences if the runs are paired
    runs_a, runs_b  runs in each group; without runs_b, runs_a is the number of pairs
    """
    return smallest_effect(*error_and_df(sd, runs_a, runs_b))


def error_and_df(sd: float, runs_a: int, runs_b: int) -> tuple[float, int]:
    """Standard error of the mean difference and its degrees of freedom; arguments as in detectable_effect."""
    if not runs_b:
        return sd / math.sqrt(runs_a), runs_a - 1
    return sd * math.sqrt(1 / runs_a + 1 / runs_b), runs_a + runs_b - 2


def smallest_effect(error: float, df: float) -> float:
    """The true difference that is detected with 80 % power; `error` is the mean's standard error."""
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
    """Runs per group (or pairs) needed to detect a true difference with 80 % power.

    df_per_run  as in Difference, for groups with different variances; 0: for equal variances
    raises      ValueError if MOST_RUNS do not suffice
    """
    def suffices(runs: int) -> bool:
        error, df = error_and_df(sd, runs, 0 if is_paired else runs)
        return power(abs(effect), error, df_per_run * (runs - 1) if df_per_run else df) >= 0.8
    if sd == 0:
        return 2
    runs = 2
    while not suffices(runs):
        if runs == MOST_RUNS:
            raise ValueError(f"detecting {effect:g} with run-to-run SD {sd:g} needs more than {runs:,} runs")
        runs = min(2 * runs, MOST_RUNS)
    low = runs // 2
    while runs - low > 1:
        middle = (low + runs) // 2
        low, runs = (low, middle) if suffices(middle) else (middle, runs)
    return max(2, runs)


# ------------------------------------------------------------------------------------------------
# Student's t distribution
# ------------------------------------------------------------------------------------------------

def t_cdf(t: float, df: float) -> float:
    """Probability that Student's t with `df` degrees of freedom is at most t."""
    tail = beta_cdf(df / (df + t * t), df / 2, 0.5) / 2
    return tail if t < 0 else 1 - tail


def t_quantile(share: float, df: float) -> float:
    """The t below which a fraction `share` of Student's t distribution lies."""
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
    # Lentz's method for a continued fraction with numerators d_1, d_2, ... and denominators 1
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
    """Probability that (Z + shift) / sqrt(chi-square / df) is at most t, for a standard normal Z.

    The mean of Phi(t s - shift) over s = sqrt(chi-square / df), by Simpson's rule within ten standard
    deviations of s.
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
    """95 % confidence interval of a proportion.

    source  Wilson 1927, J. Am. Stat. Assoc. 22, 209
    """
    z = 1.959963984540054
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
