"""How runs get on: the compute multiplier and differences of curves, on curves that follow a formula."""

import csv
import json
import math
from pathlib import Path

import pytest

from benchtop import significance
from benchtop.groups import Group, read_run
from benchtop.progress import (
    BEFORE_THE_FIRST,
    NOT_REACHED,
    differences,
    multiplier,
    multiplier_line,
    reached_at,
)

STEPS = (100, 200, 400, 800)


def group_of(folder: Path, name: str, curves: dict[int, list[float]], speed: float = 1.0) -> Group:
    """Runs by seed, with these values of val_bpb after STEPS; `speed` is of tokens over time."""
    runs = []
    for seed, values in curves.items():
        place = folder / name / f"seed{seed}"
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        (place / "summary.json").write_text(json.dumps({
            "status": "finished", "seed": seed, "tokens": 800, "train_seconds": 800 / speed, "step": 800,
            "val_loss": 2 * values[-1], "val_bpb": values[-1], "tokens_per_second": speed}))
        with open(place / "metrics.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "tokens", "train_seconds", "flops", "val_bpb"])
            writer.writerows([step, step * 1000, step / speed, step * 1e9, bpb]
                             for step, bpb in zip(STEPS[-len(values):], values, strict=True))
        runs.append(read_run(place))
    return Group(name, runs)


def law(factor: float, seed: int = 0) -> list[float]:
    """A loss that is linear in the logarithm of compute, as if there were `factor` times as much of it."""
    return [3 - 0.1 * math.log(factor * step) + seed / 100 for step in STEPS]


def test_a_multiplier_is_the_factor_in_compute_that_made_the_curve(tmp_path):
    a, b = (group_of(tmp_path, name, {seed: law(factor, seed) for seed in range(3)})
            for name, factor in (("a", 1.0), ("b", 1.7)))
    for axis in ("flops", "tokens", "time"):
        ahead, behind = multiplier(a, b, axis, "val_bpb"), multiplier(b, a, axis, "val_bpb")
        assert (ahead.is_ahead, behind.is_ahead, ahead.pairs) == (True, False, 3)
        assert (ahead.value, behind.value) == pytest.approx((1.7, 1 / 1.7), rel=1e-4)
        assert (ahead.low, ahead.high) == pytest.approx((1.7, 1.7), rel=1e-3)
    assert multiplier(a, b, "cost", "val_bpb") is None      # nobody gave a price


def test_a_multiplier_of_time_counts_how_fast_the_tokens_go(tmp_path):
    a, b = (group_of(tmp_path, name, {0: law(factor)}, speed)
            for name, factor, speed in (("a", 1.0, 1.0), ("b", 1.5, 0.5)))
    assert multiplier(a, b, "tokens", "val_bpb").value == pytest.approx(1.5, rel=1e-4)
    assert multiplier(a, b, "time", "val_bpb").value == pytest.approx(0.75, rel=1e-4)


def test_a_multipliers_interval_is_students_over_the_logarithms_of_seeds(tmp_path):
    factors = (1.3, 1.7, 1.5)
    a = group_of(tmp_path, "a", {seed: law(1.0, seed) for seed in range(3)})
    b = group_of(tmp_path, "b", {seed: law(factor, seed) for seed, factor in enumerate(factors)})
    found = multiplier(a, b, "flops", "val_bpb")
    logs = [math.log(factor) for factor in factors]
    assert found.value == pytest.approx(math.exp(sum(logs) / 3), rel=1e-4)
    low, high = map(math.exp, significance.interval(logs))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)


def test_groups_without_a_common_seed_are_compared_by_their_mean_curves(tmp_path):
    a = group_of(tmp_path, "a", {seed: law(1.0, seed) for seed in (0, 1)})
    b = group_of(tmp_path, "b", {seed: law(1.7, seed - 5) for seed in (5, 6)})
    found = multiplier(a, b, "flops", "val_bpb")
    assert found.value == pytest.approx(1.7, rel=1e-4) and (found.pairs, found.low) == (0, None)


def test_what_is_not_reached_is_never_extrapolated(tmp_path):
    """One seed of two is worse, so its curve never is where the baseline ends."""
    a = group_of(tmp_path, "a", {0: law(1.0), 1: law(1.0)})
    b = group_of(tmp_path, "b", {0: law(3.0), 1: law(0.9)})
    found = multiplier(a, b, "flops", "val_bpb")
    assert (found.is_ahead, found.value, found.problem) == (True, None, "not reached by 1 of 2 seeds")
    assert multiplier_line("a", "b", "val_bpb", [found]) == (
        "  compute multiplier: a's final val_bpb is not reached by 1 of 2 seeds of b")
    # better from its first validation on: how much earlier it was there, nobody measured
    c = group_of(tmp_path, "c", {0: law(20.0), 1: law(20.0)})
    found = multiplier(a, c, "flops", "val_bpb")
    assert (found.value, found.problem) == (None, "reached before the first validation by 2 of 2 seeds")


@pytest.mark.parametrize(("value", "place"), [
    (3.0, 1), (2.0, 2), (1.0, 4), (0.5, 8), (0.4, NOT_REACHED), (3.1, BEFORE_THE_FIRST),
    (1.5, math.sqrt(8)), (0.75, math.sqrt(32))])
def test_places_between_validations_are_linear_in_the_logarithm(value, place):
    assert reached_at([1, 2, 4, 8, 16], [3.0, 2.0, 1.0, 0.5, 0.7], value) == pytest.approx(place)


def test_a_multiplier_is_said_in_the_words_of_its_direction(tmp_path):
    a, b = (group_of(tmp_path, name, {seed: law(factor, seed) for seed in range(2)})
            for name, factor in (("a", 1.0), ("b", 1.25)))
    said = [multiplier_line(one.name, other.name, "val_bpb", [multiplier(one, other, axis, "val_bpb")
                                                              for axis in ("flops", "tokens")])
            for one, other in ((a, b), (b, a))]
    assert said == [
        "  b reaches a's final val_bpb with 1.25 times less FLOPs (95 % interval 1.25 to 1.25), "
        "1.25 times fewer tokens (95 % interval 1.25 to 1.25)",
        "  for a's final val_bpb, b needs 0.80 times the FLOPs of a (95 % interval 0.80 to 0.80), "
        "0.80 times the tokens (95 % interval 0.80 to 0.80)"]


def test_differences_are_those_of_runs_of_one_seed_at_one_place(tmp_path):
    a = group_of(tmp_path, "a", {0: [4.0, 3.0, 2.0, 1.0], 1: [5.0, 4.0, 3.0, 2.0], 2: [9.0, 9.0, 9.0, 9.0]})
    b = group_of(tmp_path, "b", {1: [4.5, 3.75, 2.9, 2.1], 0: [3.0, 2.0, 1.5], 7: [0.0, 0.0, 0.0, 0.0]})
    places, values = differences(a, b, "step", "val_bpb")
    assert places.tolist() == [200, 400, 800]
    assert values.tolist() == [pytest.approx([0.0, 0.0, 0.5]), pytest.approx([-0.25, -0.1, 0.1])]
    other = group_of(tmp_path, "other", {5: [1.0, 1.0]})
    assert len(differences(a, other, "step", "val_bpb")[0]) == 0
