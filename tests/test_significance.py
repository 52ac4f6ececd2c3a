"""Every statistic beside scipy, and beside examples that others published."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchtop import significance

stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle here; it is in requirements-dev.txt")

# extra hours of sleep of ten patients under two drugs (Student 1908), as R's help for t.test has them
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

losses = st.lists(st.floats(2, 4).map(lambda x: round(x, 4)), min_size=2, max_size=9).filter(
    lambda values: len(set(values)) > 1)


def test_welch_on_students_sleep_data():
    test = significance.welch(DRUG_2, DRUG_1)
    assert (round(test.t, 4), round(test.df, 3), round(test.p, 5)) == (-1.8608, 17.776, 0.07939)
    assert (round(test.low, 7), round(test.high, 7)) == (-3.3654832, 0.2054832)


def test_paired_on_students_sleep_data():
    test = significance.paired(DRUG_1, DRUG_2)
    assert (round(test.mean, 2), round(test.t, 4), test.df, round(test.p, 6)) == (1.58, 4.0621, 9, 0.002833)
    assert (round(test.low, 4), round(test.high, 4)) == (0.7001, 2.4599)


@given(losses, losses)
@settings(deadline=None, max_examples=60)
def test_welch_is_scipys(a, b):
    ours, theirs = significance.welch(a, b), stats.ttest_ind(b, a, equal_var=False)
    assert ours.t == pytest.approx(theirs.statistic, rel=1e-9)
    assert ours.df == pytest.approx(theirs.df, rel=1e-9)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-8, abs=1e-13)
    low, high = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-8, abs=1e-10)


@given(st.lists(st.tuples(st.floats(2, 4), st.floats(2, 4)), min_size=2, max_size=9))
@settings(deadline=None, max_examples=60)
def test_paired_is_scipys(pairs):
    a, b = zip(*pairs, strict=True)
    differences = [y - x for x, y in pairs]
    if max(differences) - min(differences) < 1e-6:
        return      # scipy warns of what is left of nothing
    ours, theirs = significance.paired(a, b), stats.ttest_rel(b, a)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-7, abs=1e-13)
    low, high = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-7, abs=1e-9)


@given(losses, st.floats(2, 4))
@settings(deadline=None, max_examples=60)
def test_p_below_is_scipys_one_sided_test(values, target):
    theirs = stats.ttest_1samp(values, target, alternative="less").pvalue
    assert significance.p_below(values, target) == pytest.approx(theirs, rel=1e-8, abs=1e-13)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
@settings(deadline=None, max_examples=60)
def test_mcnemar_is_the_binomial_test_of_questions_that_divide(pairs):
    a, b = zip(*pairs, strict=True)
    test = significance.mcnemar(a, b)
    assert test.only_a == sum(x and not y for x, y in pairs)
    assert test.only_b == sum(y and not x for x, y in pairs)
    assert test.only_a + test.only_b + test.both + test.neither == len(pairs)
    divided = test.only_a + test.only_b
    theirs = stats.binomtest(test.only_a, divided, 0.5).pvalue if divided else 1.0
    assert test.p == pytest.approx(theirs, rel=1e-9)


@given(st.lists(st.floats(0, 1), max_size=6))
@settings(deadline=None, max_examples=60)
def test_holms_p_values_are_those_of_closed_testing(p_values):
    """A hypothesis counts as rejected if Bonferroni's test rejects every set of hypotheses that it is in.

    source  Marcus, Peritz and Gabriel 1976, doi:10.1093/biomet/63.3.655
    """
    places = range(len(p_values))
    sets = [some for size in places for some in itertools.combinations(places, size + 1)]
    ps_of_sets = {some: min(1.0, len(some) * min(p_values[each] for each in some)) for some in sets}
    closed = [max(p for some, p in ps_of_sets.items() if place in some) for place in places]
    assert significance.holm(p_values) == pytest.approx(closed)


def test_mcnemar_on_agrestis_approval_ratings():
    """Agresti 2002, Categorical Data Analysis, 10.1: of 1,600 voters 150 withdrew their approval and 86 began
    to approve; he finds z squared = 17.36, on one degree of freedom."""
    a = [True] * (794 + 150) + [False] * (86 + 570)
    b = [True] * 794 + [False] * 150 + [True] * 86 + [False] * 570
    test = significance.mcnemar(a, b)
    assert (test.only_a, test.only_b, test.both, test.neither) == (150, 86, 794, 570)
    assert test.p == pytest.approx(stats.chi2.sf(17.36, 1), rel=0.3)    # for large numbers; ours is exact


# ------------------------------------------------------------------------------------------------
# The choice of held-out documents
# ------------------------------------------------------------------------------------------------

def documents_of(rng: np.random.Generator, count: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of documents, and how far b is above a in each, per byte: 0 on average."""
    return rng.lognormal(7, 0.5, count), spread * rng.standard_normal(count)


def test_an_interval_over_documents_is_scipys_bootstrap():
    """Of one seed: all that scatters is which documents were held out."""
    sizes, above = documents_of(np.random.default_rng(1), 50, 0.02)
    above += 0.1        # so that it matters that both parts of the ratio are drawn together
    ours = significance.over_documents(above * sizes, sizes)
    theirs = stats.bootstrap((above * sizes, sizes), lambda x, y, axis: x.sum(axis) / y.sum(axis),
                             paired=True, n_resamples=10_000, method="percentile",
                             rng=np.random.default_rng(2))
    assert ours.mean == pytest.approx((above * sizes).sum() / sizes.sum()) and not ours.covers_seeds
    # a quantile of 10,000 draws is known to some 2 % of the interval's width
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.04 * (
        ours.high - ours.low))
    # and by the formula for a ratio: the spread of what is above the mean, in the unit of the mean
    error = np.std((above - ours.mean) * sizes, ddof=1) * math.sqrt(50) / sizes.sum()
    assert ours.high - ours.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_documents_that_agree_leave_the_interval_over_seeds():
    test = significance.paired([3.0, 3.1, 3.2], [3.02, 3.11, 3.24])
    found = significance.over_documents([0.05 * test.mean] * 20, [0.05] * 20, test.error, test.df)
    assert found.covers_seeds and found.mean == pytest.approx(test.mean)
    assert (found.low, found.high) == pytest.approx((test.low, test.high), abs=0.06 * (test.high - test.low))
    again = significance.over_documents([0.05 * test.mean] * 20, [0.05] * 20, test.error, test.df)
    assert again == found       # the same draws each time


def test_an_interval_over_documents_and_seeds_covers_both():
    """New seeds and new text in each of 500 trials; no difference is true. Intervals over seeds miss it."""
    rng, ours, of_seeds = np.random.default_rng(3), 0, 0
    for _ in range(500):
        sizes, above = documents_of(rng, 60, 0.02)
        by_seed = above + 0.001 * rng.standard_normal((3, 1)) + 0.002 * rng.standard_normal((3, 60))
        nats = (by_seed * sizes).mean(0)
        test = significance.paired([0.0] * 3, ((by_seed * sizes).sum(1) / sizes.sum()).tolist())
        found = significance.over_documents(nats, sizes, test.error, test.df, resamples=400)
        assert found.low < found.mean < found.high
        ours, of_seeds = ours + (found.low < 0 < found.high), of_seeds + (test.low < 0 < test.high)
    # 95 % of 500 trials are 475, give or take 15 at three standard deviations; with 400 draws a little less
    assert 460 <= ours <= 495 and of_seeds < 375


def test_resampling_three_seeds_would_not_cover_them():
    """Why their part is drawn from Student's distribution: no draw leaves the range of the three."""
    rng = np.random.default_rng(4)
    values = rng.standard_normal((2000, 3))
    within = (values.min(1) < 0) & (values.max(1) > 0)
    assert within.mean() == pytest.approx(0.75, abs=0.03)


def test_one_document_has_no_spread():
    with pytest.raises(ValueError, match="two documents"):
        significance.over_documents([1.0], [2.0])
    # one without text changes nothing
    found = significance.over_documents([0.0, 1.0, 2.0], [0.0, 1.0, 1.0])
    assert found.mean == 1.5 and (found.low, found.high) == (1.0, 2.0)


def test_power_is_that_of_rs_example():
    """power.t.test(n = 20, delta = 1, sd = 1) says 0.8689528; it leaves the far tail out, which is 2e-7."""
    assert significance.power(1, math.sqrt(2 / 20), 38) == pytest.approx(0.8689528, abs=3e-7)


@pytest.mark.parametrize("df", [1, 2, 3, 7.3, 30, 200])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.5, 3.0, 8.0])
def test_noncentral_t_is_scipys(df, shift):
    for t in (-3.0, 0.0, 1.0, 2.5, 12.0):
        theirs = stats.nct.cdf(t, df, shift)
        assert significance.noncentral_t_cdf(t, df, shift) == pytest.approx(theirs, abs=2e-6)


@pytest.mark.parametrize("df", [1, 2, 2.5, 4, 9, 57, 1000])
def test_students_distribution_is_scipys(df):
    for share in (0.6, 0.9, 0.975, 0.999):
        assert significance.t_quantile(share, df) == pytest.approx(stats.t.ppf(share, df), rel=1e-9)
        assert significance.t_quantile(1 - share, df) == pytest.approx(stats.t.ppf(1 - share, df), rel=1e-9)
    for t in (-40, -2.1, 0, 0.3, 5):
        assert significance.t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), rel=1e-9)


@given(losses)
@settings(deadline=None, max_examples=30)
def test_interval_of_a_mean_is_scipys(values):
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert significance.interval(values) == pytest.approx(tuple(theirs), rel=1e-8)


@pytest.mark.parametrize(("runs_a", "runs_b"), [(3, 3), (8, 5), (4, 0), (20, 0)])
def test_a_detectable_effect_is_found_four_times_in_five(runs_a, runs_b):
    """By drawing experiments, which knows nothing of noncentral distributions."""
    effect, draw = significance.detectable_effect(0.01, runs_a, runs_b), random.Random(0)
    found = 0
    for _ in range(4000):
        a = [draw.gauss(3, 0.01) for _ in range(runs_a)]
        b = [draw.gauss(3 + effect, 0.01) for _ in range(runs_b)]
        if runs_b:
            test = stats.ttest_ind(a, b)
        else:
            test = stats.ttest_1samp([draw.gauss(effect, 0.01) for _ in range(runs_a)], 0)
        found += test.pvalue < 0.05
    assert found / 4000 == pytest.approx(0.8, abs=0.025)


@pytest.mark.parametrize("is_paired", [True, False])
def test_needed_runs_are_the_fewest_that_suffice(is_paired):
    for effect in (0.02, 0.008, 0.003):
        runs = significance.runs_needed(effect, 0.005, is_paired)

        def smallest(runs):
            return significance.detectable_effect(0.005, runs, 0 if is_paired else runs)
        assert smallest(runs) <= effect
        assert runs == 2 or smallest(runs - 1) > effect


@pytest.mark.parametrize(("kind", "b"), [("Welch", [0.930, 0.931, 0.932]), ("Welch", [0.910, 0.935, 0.919]),
                                         ("paired", [0.911, 0.916, 0.918])])
def test_what_runs_detect_needs_as_many_runs(kind, b):
    """Also where one group scatters more than the other, which leaves fewer degrees of freedom."""
    a = [0.910, 0.914, 0.918]
    test = significance.paired(a, b) if kind == "paired" else significance.welch(a, b)
    detectable = significance.smallest_effect(test.error, test.df)
    for effect, needed in ((1.001 * detectable, 3), (0.999 * detectable, 4)):
        assert significance.runs_needed(effect, test.sd, kind == "paired", test.df_per_run) == needed


def test_runs_that_agree_to_the_last_digit():
    assert significance.paired([1.0, 2.0], [2.0, 3.0]).p == 0
    assert significance.paired([1.0, 2.0], [1.0, 2.0]).p == 1
    assert significance.welch([1.0, 1.0], [1.0, 1.0]).low == 0
    assert significance.p_below([3.0, 3.0], 3.1) == 0
    assert significance.runs_needed(0.1, 0.0) == 2
    assert significance.detectable_effect(0.0, 3, 3) == 0


def test_one_run_has_no_spread():
    for test in (lambda: significance.welch([1.0], [1.0, 2.0]), lambda: significance.paired([1.0], [2.0]),
                 lambda: significance.p_below([1.0], 2.0)):
        with pytest.raises(ValueError, match="two"):
            test()


def test_more_than_ten_thousand_runs_are_not_asked_for():
    assert 9_000 < significance.runs_needed(0.0409, 1.0) <= 10_000
    with pytest.raises(ValueError, match=r"needs more than 10,000 runs"):
        significance.runs_needed(0.0390, 1.0)
