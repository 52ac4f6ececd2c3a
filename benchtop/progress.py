"""The progress of runs: validation curves over steps, tokens, time, FLOPs and cost, as numbers.

differences() compares the curves of two groups; multiplier() gives the factor by which one group needs more
compute than the other. This module knows runs and groups, and draws nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from benchtop import significance
from benchtop.groups import Group, SavedRun

Curve = tuple[list[float], list[float]]     # ascending places on an axis, and the metric there


def _price(run: SavedRun) -> float:
    return run.knobs.get("gpu_cost_per_hour") or 0


def _share(value: float | None, whole: float) -> float | None:
    return None if value is None else value / whole


# axis -> its label, and its value at a row of metrics.csv (None if unknown)
AXES: dict[str, tuple[str, Callable[[SavedRun, dict], float | None]]] = {
    "step": ("steps", lambda run, row: row.get("step")),
    "tokens": ("million tokens", lambda run, row: _share(row.get("tokens"), 1e6)),
    "time": ("minutes of training", lambda run, row: _share(row.get("train_seconds"), 60)),
    "flops": ("training FLOPs", lambda run, row: row.get("flops")),
    "cost": ("cost of the training time",
             lambda run, row: _share(row.get("train_seconds"), 3600 / _price(run)) if _price(run) else None),
}
# axes of multipliers, and their names in messages
COMPUTE = {"flops": "FLOPs", "tokens": "tokens", "time": "time"}


def curve(run: SavedRun, axis: str, metric: str) -> Curve:
    """The places where a run was validated, and the metric there; empty if the run lacks the axis's values.

    Values that are not finite are left out; of two values at one place, the later one counts.
    """
    place = AXES[axis][1]
    points = [(place(run, row), row[metric]) for row in run.rows if math.isfinite(row.get(metric, math.nan))]
    if any(x is None for x, _ in points):
        return [], []
    kept = sorted((x, y) for x, y in dict(points).items() if math.isfinite(x))
    return [x for x, _ in kept], [y for _, y in kept]


def on_common_grid(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Places (P) from the latest start to the earliest end of the curves, and their heights, (curves, P)."""
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    places = max((x for x, _ in curves), key=len)
    grid = np.unique([first, *(x for x in places if first < x < last), max(first, last)])
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def curve_pairs(a: Group, b: Group, axis: str, metric: str) -> list[tuple[Curve, Curve]]:
    """For each seed in both groups, the curves of their runs (a, b); empty if any run has no curve."""
    if not (a.by_seed(metric) and b.by_seed(metric)):
        return []
    runs_a, runs_b = ({run.summary["seed"]: run for run in group.finished} for group in (a, b))
    pairs = [(curve(runs_a[seed], axis, metric), curve(runs_b[seed], axis, metric))
             for seed in sorted(runs_a.keys() & runs_b.keys())]
    return pairs if all(x for pair in pairs for x, _ in pair) else []


def differences(a: Group, b: Group, axis: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Places (P), and b minus a there for each seed that both have, (seeds, P); P may be 0."""
    pairs = curve_pairs(a, b, axis, metric)
    each = [curve for pair in pairs for curve in pair]
    if not each or max(x[0] for x, _ in each) > min(x[-1] for x, _ in each):
        return np.zeros(0), np.zeros((len(pairs), 0))
    grid, heights = on_common_grid(each)
    return grid, heights[1::2] - heights[::2]


# ------------------------------------------------------------------------------------------------
# The compute multiplier
# ------------------------------------------------------------------------------------------------

NOT_REACHED, BEFORE_THE_FIRST = math.inf, 0.0
IN_WORDS = {NOT_REACHED: "not reached", BEFORE_THE_FIRST: "reached before the first validation"}


def reached_at(places: list[float], heights: list[float], value: float) -> float:
    """The place where a curve first is as low as `value`, interpolated linearly over the axis's logarithm.

        >>> reached_at([1, 4], [3.0, 1.0], 2.0)
        2.0

    Nothing is extrapolated: NOT_REACHED if it never is, BEFORE_THE_FIRST if its first validation is already
    lower.
    """
    for number, height in enumerate(heights):
        if height > value:
            continue
        if height == value or number == 0:
            return places[number] if height == value else BEFORE_THE_FIRST
        share = (heights[number - 1] - value) / (heights[number - 1] - height)
        before, here = math.log(places[number - 1]), math.log(places[number])
        return math.exp(before + share * (here - before))
    return NOT_REACHED


@dataclass(frozen=True)
class Multiplier:
    """How many times the other group's compute the baseline needs for a loss; above 1, the other is ahead.

    axis       a key of COMPUTE
    pairs      number of pairs of runs that share a seed; 0: from the groups' mean curves instead
    is_ahead   whether the other group ends lower. If so, the loss is the baseline's final loss, looked up on
               the other's curve; else it is the other's final loss, looked up on the baseline's curve. In the
               middle of a curve the learning rate is still high, so a shorter run would do better than the
               curve does there: equal budgets give multipliers nearer to 1 than budgets set to reach the loss
    value      the geometric mean over the pairs; None if `problem` says why there is none
    low, high  95 % interval of the value over seeds; None with fewer than two pairs
    """
    axis: str
    pairs: int
    is_ahead: bool
    value: float | None = None
    low: float | None = None
    high: float | None = None
    problem: str = ""


def multiplier(a: Group, b: Group, axis: str, metric: str) -> Multiplier | None:
    """The multiplier of group b against the baseline a; None if a run lacks the axis or any validation."""
    pairs = curve_pairs(a, b, axis, metric)
    count = len(pairs)
    if not pairs:
        curves = [[curve(run, axis, metric) for run in group.finished] for group in (a, b)]
        if not all(x for group in curves for x, _ in group):
            return None
        grids = [on_common_grid(group) for group in curves]
        pairs = [tuple((grid.tolist(), heights.mean(0).tolist()) for grid, heights in grids)]
    if min(x[0] for pair in pairs for x, _ in pair) <= 0:
        return None     # 0 has no logarithm; no run writes such a place
    ends = [(mine[1][-1], other[1][-1]) for mine, other in pairs]
    is_ahead = fmean(other for _, other in ends) < fmean(mine for mine, _ in ends)
    places = [reached_at(*other, end) if is_ahead else reached_at(*mine, other_end)
              for (mine, other), (end, other_end) in zip(pairs, ends, strict=True)]
    for odd, words in IN_WORDS.items():
        if odd in places:
            of = f"{places.count(odd)} of {count} seeds" if count > 1 else "the curve"
            return Multiplier(axis, count, is_ahead, problem=f"{words} by {of}")
    logs = [math.log(mine[0][-1] / place if is_ahead else place / other[0][-1])
            for (mine, other), place in zip(pairs, places, strict=True)]
    low, high = map(math.exp, significance.interval(logs)) if count > 1 else (None, None)
    return Multiplier(axis, count, is_ahead, math.exp(fmean(logs)), low, high)


def multiplier_line(a: str, b: str, metric: str, found: list[Multiplier]) -> str:
    """The multipliers of group b against the baseline a, as one line."""
    reader, ends = (b, a) if found[0].is_ahead else (a, b)      # whose curve, and whose final loss
    known = [one for one in found if not one.problem]
    if not known:
        return f"  compute multiplier: {ends}'s final {metric} is {found[0].problem} of {reader}"
    parts = []
    less = found[0].is_ahead and all(one.value >= 1 for one in known)
    for one in known:
        thing = COMPUTE[one.axis]
        words = (f"times {'fewer' if thing == 'tokens' else 'less'} {thing}" if less else
                 f"times {f'the {thing} of {b}' if one is known[0] else f'the {thing}'}")
        inner = f" (95 % interval {one.low:.2f} to {one.high:.2f})" if one.low is not None else ""
        parts.append(f"{one.value:.2f} {words}{inner}")
    begin = f"{b} reaches {a}'s final {metric} with" if less else f"for {ends}'s final {metric}, {a} needs"
    return f"  {begin} {', '.join(parts)}"
