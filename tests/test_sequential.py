"""Sequential tests of gains. Run: ./run.sh test tests/test_sequential.py"""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from benchtop.sequential import Sequential, limits

TRIALS = 2000


def ends(gain: float, trials: int = TRIALS, *, seed: int, ideas: int = 1, **plan) -> list[str]:
    """How trials end whose ideas have this gain, where pairs scatter by 1 and the margin is 1."""
    test = Sequential(margin=1.0, ideas=ideas, **plan)
    found = []
    for gains in np.random.default_rng(seed).standard_normal((trials, test.most)) + gain:
        looks = (test.look(list(gains[:pairs])) for pairs in range(test.first, test.most + 1))
        found.append(next((look.verdict for look in looks if look.verdict != "undecided"), "undecided"))
    return found


def at_most(share: float, trials: int = TRIALS) -> float:
    """What the count of a share stays below in all but one of 10,000 repetitions."""
    return scipy.stats.binom.ppf(0.9999, trials, share)


@pytest.mark.parametrize("plan", [dict(first=3, most=8, alpha=0.05), dict(first=3, most=3, alpha=0.05),
                                  dict(first=2, most=12, alpha=0.01), dict(first=4, most=30, alpha=0.1)])
def test_an_idea_without_gain_is_kept_no_more_often_than_promised(plan):
    assert ends(0.0, seed=1, **plan).count("keep") <= at_most(plan["alpha"])


@pytest.mark.parametrize("plan", [dict(first=3, most=8, alpha=0.05), dict(first=2, most=12, alpha=0.01)])
def test_an_idea_with_the_smallest_gain_that_matters_is_discarded_no_more_often_than_promised(plan):
    assert ends(1.0, seed=2, **plan).count("discard") <= at_most(plan["alpha"])


def test_looking_at_a_plain_t_test_after_each_pair_would_err_more_often():
    """Or the limits would be of no use."""
    gains = np.random.default_rng(3).standard_normal((TRIALS, 8))
    p = np.stack([scipy.stats.ttest_1samp(gains[:, :pairs], 0, axis=1, alternative="greater").pvalue
                  for pairs in range(3, 9)], axis=1)
    assert (p < 0.05).any(1).sum() > at_most(0.05)


def test_the_chance_that_any_of_ten_ideas_without_gain_is_kept_is_that_of_one():
    plan = dict(first=3, most=8, alpha=0.05)
    found = ends(0.0, 10 * TRIALS, seed=4, ideas=10, **plan)
    families = [found[start:start + 10] for start in range(0, len(found), 10)]
    assert sum("keep" in family for family in families) <= at_most(0.05)


def test_power_is_how_often_a_gain_of_the_margin_is_kept():
    plan = dict(first=3, most=8, alpha=0.05)
    kept = ends(1.0, seed=5, **plan).count("keep") / TRIALS
    assert kept == pytest.approx(Sequential(1.0, **plan).power(sd=1.0), abs=0.045)
    assert Sequential(3.0, **plan).power(1.0) > 0.99 > 0.2 > Sequential(0.1, **plan).power(1.0)


def test_with_one_look_the_limit_is_students():
    assert limits(5, 5, 0.05)[0] == pytest.approx(scipy.stats.t.ppf(0.95, 4), rel=0.01)
    assert limits(3, 3, 0.005)[0] == pytest.approx(scipy.stats.t.ppf(0.995, 2), rel=0.05)


def test_gains_decide_as_they_should():
    test = Sequential(margin=0.01, alpha=0.05, first=3, most=8)
    assert test.look([0.020, 0.021, 0.022]).verdict == "keep"
    assert test.look([-0.02, -0.021, -0.022]).verdict == "discard"
    assert test.look([0.001, 0.0011, 0.0012]).verdict == "discard"     # a gain, but none that matters
    assert test.look([0.02, -0.02, 0.01]).verdict == "undecided"
    assert test.look([0.0, 0.0, 0.0]).verdict == "discard"             # the change changes nothing
    for gains in ([0.1, 0.1], [0.1] * 9):
        with pytest.raises(ValueError, match="3 to 8 pairs"):
            test.look(gains)


@pytest.mark.parametrize(("alpha", "ideas", "sd"), [(0.05, 1, 0.9), (0.05, 10, 1.6), (0.01, 1, 2.2)])
def test_what_more_takes_finds_the_margin_in_four_of_five_trials(alpha, ideas, sd):
    test = Sequential(1.0, alpha, 3, 4, ideas)
    found = dataclasses.replace(test, most=test.more(sd)).power(sd)
    assert 0.78 < found < 0.9 and test.more(sd) > 4
    assert Sequential(1.0, alpha, 3, 50, ideas).more(0.1) == 51
