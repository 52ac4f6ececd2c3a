"""Figures of validation curves and of their differences, for papers and HTML pages."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchtop.errors import UserError
from benchtop.groups import Group
from benchtop.progress import AXES, curve, differences, on_common_grid
from benchtop.significance import t_quantile

METRICS = {"val_bpb": "bits per byte, held-out text", "val_loss": "nats per token, held-out text"}
# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
# text in an SVG stays text, and the same runs produce the same file
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.25, "svg.fonttype": "none", "svg.hashsalt": "benchtop"}


def draw(groups: Sequence[Group], axis: str, metric: str):
    """A matplotlib figure of each group's mean with a band of one standard deviation; None without curves."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        for number, group in enumerate(groups):
            # an unfinished run would cut short the mean of the others
            curves = [curve(run, axis, metric) for run in group.finished or group.runs]
            curves = [(x, y) for x, y in curves if x]
            if not curves:
                continue
            name = group.name.replace("$", r"\$")
            look = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.4,
                    "linestyle": LINES[number // len(COLOURS) % len(LINES)],
                    "label": f" {name}" + (f" ({len(curves)} runs)" if len(curves) > 1 else "")}
            grid, values = on_common_grid(curves)
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


def _zoom(axes) -> None:
    """Cut off the steep beginning, which hides how the curves differ: show values up to 1.5 times the lowest
    final value, or higher if the final values are far apart."""
    heights = np.concatenate([line.get_ydata() for line in axes.lines])
    ends = np.array([line.get_ydata()[-1] for line in axes.lines])
    top = min(heights.max(), ends.min() + max(0.5 * ends.min(), 3 * np.ptp(ends)))
    if top > heights.min():
        axes.set_ylim(heights.min() - 0.03 * (top - heights.min()), top)


def draw_differences(groups: Sequence[Group], axis: str, metric: str):
    """A matplotlib figure of each further group minus the first, paired by seed.

    It shows the mean over seeds with a band of its pointwise 95 % interval; None if no seed is shared.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        late = []       # heights after the steep beginning, which would hide everything else
        for number, group in enumerate(groups[1:], 1):
            grid, values = differences(groups[0], group, axis, metric)
            if not len(grid):
                continue
            mean, count = values.mean(0), len(values)
            colour = COLOURS[number % len(COLOURS)]
            name = f"{group.name} - {groups[0].name}".replace("$", r"\$")
            axes.plot(grid, mean, color=colour, linewidth=1.4, marker="o" if len(grid) < 3 else None,
                      markersize=4, linestyle=LINES[number // len(COLOURS) % len(LINES)],
                      label=f" {name}" + (f" ({count} seeds)" if count > 1 else ""))
            half = np.zeros(len(grid))
            if count > 1:
                half = t_quantile(0.975, count - 1) * values.std(0, ddof=1) / np.sqrt(count)
                axes.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
            late += [edge[grid >= grid[-1] / 4] for edge in (mean - half, mean + half)]
        axes.set(xlabel=AXES[axis][0], ylabel=f"difference, {METRICS[metric].split(',')[0]}")
        if not axes.lines:
            pyplot.close(figure)
            return None
        axes.axhline(0, color="black", linewidth=0.8)
        heights = np.append(np.concatenate(late), 0)
        axes.set_ylim(*(heights.min(), heights.max()) + 0.05 * max(np.ptp(heights), 1e-9) * np.array([-1, 1]))
        axes.set_xlim(left=0)
        axes.legend(frameon=False)
    return figure


def save_curves(groups: list[Group], metric: str, base: Path, compared: Sequence[Group] = ()) -> list[Path]:
    """Write BASE_AXIS.png and .svg for every axis that the runs have; returns their paths.

    compared  groups whose differences are also drawn, as BASE_difference_AXIS.png and .svg
    raises    UserError if no run was validated
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, of, drawn in (("", draw, groups), ("difference_", draw_differences, compared)):
        for axis in AXES:
            for ending in ("png", "svg"):
                picture = as_bytes(drawn, axis, metric, ending, of)
                if picture:
                    written.append(base.with_name(f"{base.name}_{kind}{axis}.{ending}"))
                    written[-1].write_bytes(picture)
    if not written:
        raise UserError("none of these runs was validated while it trained, so there is nothing to draw")
    return written


def as_bytes(groups: Sequence[Group], axis: str, metric: str, ending: str, of: Callable = draw) -> bytes:
    """The figure as the content of a file of type `ending`; empty without curves.

    of  draw or draw_differences
    """
    from matplotlib import pyplot
    figure = of(groups, axis, metric)
    if not figure:
        return b""
    out = io.BytesIO()
    with pyplot.rc_context(STYLE):
        figure.savefig(out, format=ending, dpi=200, metadata={"Date": None} if ending == "svg" else None)
    pyplot.close(figure)
    return out.getvalue()
