"""Loss curves of groups of runs, over steps, tokens, time, FLOPs and cost, for a paper or a page."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchtop.errors import UserError
from benchtop.groups import Group, SavedRun


def _price(run: SavedRun) -> float:
    return run.knobs.get("gpu_cost_per_hour") or 0


def _share(value: float | None, whole: float) -> float | None:
    return None if value is None else value / whole


# how far a run was at a row of metrics.csv: what the axis says, and the value or None
AXES: dict[str, tuple[str, Callable[[SavedRun, dict], float | None]]] = {
    "step": ("steps", lambda run, row: row.get("step")),
    "tokens": ("million tokens", lambda run, row: _share(row.get("tokens"), 1e6)),
    "time": ("minutes of training", lambda run, row: _share(row.get("train_seconds"), 60)),
    "flops": ("training FLOPs", lambda run, row: row.get("flops")),
    "cost": ("cost of the training time",
             lambda run, row: _share(row.get("train_seconds"), 3600 / _price(run)) if _price(run) else None),
}
METRICS = {"val_bpb": "bits per byte, held-out text", "val_loss": "nats per token, held-out text"}
# Okabe and Ito's colours, which people who see colours differently can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
# text of an SVG stays text, and the same runs make the same file
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.25, "svg.fonttype": "none", "svg.hashsalt": "benchtop"}


def curve(run: SavedRun, axis: str, metric: str) -> tuple[list[float], list[float]]:
    """Where a run was validated, and the metric there; empty if the run does not know the axis.

    What is not finite is left out; of two values at one place, the later one counts.
    """
    place = AXES[axis][1]
    points = [(place(run, row), row[metric]) for row in run.rows if math.isfinite(row.get(metric, math.nan))]
    if any(x is None for x, _ in points):
        return [], []
    kept = sorted((x, y) for x, y in dict(points).items() if math.isfinite(x))
    return [x for x, _ in kept], [y for _, y in kept]


def draw(groups: list[Group], axis: str, metric: str):
    """A figure of matplotlib: each group's mean in a band of its standard deviation; None without curves."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        for number, group in enumerate(groups):
            # a run that broke off would cut the others' mean short
            curves = [curve(run, axis, metric) for run in group.finished or group.runs]
            curves = [(x, y) for x, y in curves if x]
            if not curves:
                continue
            name = group.name.replace("$", r"\$")
            look = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.4,
                    "linestyle": LINES[number // len(COLOURS) % len(LINES)],
                    "label": f" {name}" + (f" ({len(curves)} runs)" if len(curves) > 1 else "")}
            grid, values = _common(curves)
            mean = values.mean(0)
            axes.plot(grid, mean, marker="o" if len(grid) < 3 else None, markersize=4, **look)
            if len(curves) > 1:
                spread = values.std(0, ddof=1)
                axes.fill_between(grid, mean - spread, mean + spread, color=look["color"], alpha=0.2,
                                  linewidth=0)
        axes.set(xlabel=AXES[axis][0], ylabel=METRICS[metric])
        if not axes.lines:
            pyplot.close(figure)
            return None
        axes.set_xlim(left=0)
        axes.legend(frameon=False)
        _zoom(axes)
    return figure


def _common(curves: list[tuple[list[float], list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Places from the latest begin to the earliest end of the runs, and each run's heights there."""
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    places = max((x for x, _ in curves), key=len)
    grid = np.unique([first, *(x for x in places if first < x < last), max(first, last)])
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def _zoom(axes) -> None:
    """Leave the steep beginning out, which hides how the curves differ: show what is at most half above the
    lowest end, and more where the ends themselves lie further apart."""
    heights = np.concatenate([line.get_ydata() for line in axes.lines])
    ends = np.array([line.get_ydata()[-1] for line in axes.lines])
    top = min(heights.max(), ends.min() + max(0.5 * ends.min(), 3 * np.ptp(ends)))
    if top > heights.min():
        axes.set_ylim(heights.min() - 0.03 * (top - heights.min()), top)


def save_curves(groups: list[Group], metric: str, base: Path) -> list[Path]:
    """BASE_AXIS.png and .svg for every axis that the runs know.

    raises  UserError if no run was validated
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for axis in AXES:
        for ending in ("png", "svg"):
            picture = as_bytes(groups, axis, metric, ending)
            if picture:
                written.append(base.with_name(f"{base.name}_{axis}.{ending}"))
                written[-1].write_bytes(picture)
    if not written:
        raise UserError("none of these runs was validated while it trained, so there is nothing to draw")
    return written


def as_bytes(groups: list[Group], axis: str, metric: str, ending: str) -> bytes:
    """The figure as a file of this kind; empty without curves."""
    from matplotlib import pyplot
    figure = draw(groups, axis, metric)
    if not figure:
        return b""
    out = io.BytesIO()
    with pyplot.rc_context(STYLE):
        figure.savefig(out, format=ending, dpi=200, metadata={"Date": None} if ending == "svg" else None)
    pyplot.close(figure)
    return out.getvalue()
