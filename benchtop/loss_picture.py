"""loss.png: the loss curves of one run, drawn during the run and at its end."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from benchtop.command_line import counted
from benchtop.files import whole_file
from benchtop.xz import bar_in_words

if TYPE_CHECKING:       # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD_OUT, TRAINING, BAR = "#1f4e79", "#9bb7d4", "#b5532a"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.25, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "legend.fontsize": 9, "legend.frameon": False, "lines.markersize": 4}


def draw_loss(path: Path, rows: list[dict], title: str, documents: int, bar: dict) -> None:
    """Draw losses in nats per token (left) and bits per byte of the held-out text (right), over tokens.

    rows       of metrics.csv; without val_loss where there was no validation; only finite losses are drawn
    documents  number of held-out documents
    bar        xz_bpb and xz_training_bytes of a summary: what xz needs for the held-out text, if known
    """
    from matplotlib import rc_context
    with rc_context(STYLE):
        figure = loss_figure(rows, title, documents, bar)
        with whole_file(path) as file:
            figure.savefig(file, dpi=150, format="png")


def loss_figure(rows: list[dict], title: str, documents: int, bar: dict) -> "Figure":
    from matplotlib.figure import Figure
    xz_bpb = bar.get("xz_bpb")
    validated = [row for row in rows if math.isfinite(row.get("val_loss", math.nan))]
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    # fixed, since matplotlib's own layouts draw everything twice
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.13, top=0.91, wspace=0.16)
    draw(left, rows, "train_loss", "training batches", color=TRAINING, linewidth=1)
    draw(left, validated, "val_loss", "held-out text", color=HELD_OUT, marker="o")
    left.set(title=f"{title}: loss", ylabel="nats per token")
    shown = draw(right, validated, "val_bpb", "this model", color=HELD_OUT, marker="o")
    if shown:
        best = min(shown, key=lambda row: row["val_loss"])
        right.plot(best["tokens"] / 1e6, best["val_bpb"], "o", markersize=9, markerfacecolor="none",
                   color=HELD_OUT, linestyle="none",
                   label=f"best: {best['val_bpb']:.3f} at step {best['step']:,}")
        last = shown[-1]
        rises = len(shown) > 1 and last["val_bpb"] > shown[-2]["val_bpb"]
        right.annotate(f"{last['val_bpb']:.3f}", (last["tokens"] / 1e6, last["val_bpb"]),
                       textcoords="offset points", xytext=(0, 8 if rises else -14), ha="right",
                       color=HELD_OUT, weight="bold")
        right.set_ylim(0, 1.1 * max([row["val_bpb"] for row in shown] + [xz_bpb or 0]) or 1)
    if xz_bpb:
        right.axhline(xz_bpb, color=BAR, linestyle="--", linewidth=1,
                      label=f"{bar_in_words(bar)}: {xz_bpb:.3f}")
    right.set(title=f"held-out text ({counted(documents, 'document')})", ylabel="bits per byte")
    for axes, place in ((left, "upper right"), (right, "best")):
        axes.set_xlim(left=0)
        axes.set_xlabel("million tokens trained on")
        if axes.lines:
            axes.legend(loc=place)
    return figure


def draw(axes: "Axes", rows: list[dict], column: str, label: str, **style) -> list[dict]:
    """Plot a column's finite values over tokens; returns the rows that are drawn."""
    shown = [row for row in rows if math.isfinite(row[column])]
    axes.plot([row["tokens"] / 1e6 for row in shown], [row[column] for row in shown], label=label, **style)
    return shown
