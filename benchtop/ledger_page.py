"""The ledger as a text table for the terminal and as one HTML page."""

import io
from html import escape

from benchtop import places
from benchtop.command_line import minutes
from benchtop.curves import STYLE as FIGURE
from benchtop.held_out import TEST, VAL
from benchtop.ledger import KEEP, NOT_CONFIRMED, Entry
from benchtop.page import document, picture, wide

COLUMNS = ("when", "trial", "idea", "verdict", "gain", "interval", "runs", "tokens", "time", "description")
TEXTS = ("idea", "verdict", "interval", "description", "trial", "when")    # left-aligned
MORE_STYLE = """
td.description { white-space: normal; min-width: 14rem; }
.text { text-align: left; }
details pre { max-height: 28rem; overflow: auto; }
.keep, .confirmed { font-weight: 700; }
"""


def cells(entry: Entry) -> list[str]:
    """A line of the table, in the order of COLUMNS."""
    known = entry.gain is not None
    return [entry.time[:16].replace("T", " "), entry.trial, entry.idea,
            entry.verdict + (" (test)" if entry.split == TEST else ""),
            f"{entry.gain:+.4f}" if known else "", f"{entry.low:+.4f} to {entry.high:+.4f}" if known else "",
            str(entry.runs), f"{entry.tokens:,}", minutes(entry.seconds), entry.description]


def as_text(entries: list[Entry]) -> str:
    lines = [list(COLUMNS), *map(cells, entries)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS) - 1)]
    numbers = {COLUMNS.index(name) for name in ("gain", "runs", "tokens", "time")}
    return "\n".join("  ".join(cell.rjust(width) if column in numbers else cell.ljust(width)
                               for column, (cell, width) in enumerate(zip(line, [*widths, 0], strict=True)))
                     .rstrip() for line in lines)


def page(entries: list[Entry]) -> str:
    """The HTML of the page; it needs no other file and no network. The most important columns come first,
    for narrow screens."""
    tried = [entry for entry in entries if entry.split == VAL]
    kept, looks = sum(entry.verdict == KEEP for entry in tried), len(entries) - len(tried)
    order = ("idea", "verdict", "gain", "interval", "description", "runs", "tokens", "time", "trial", "when")
    rows = []
    for number, entry in reversed(list(enumerate(entries, 1))):
        known = {name: escape(cell) for name, cell in zip(COLUMNS, cells(entry), strict=True)}
        known["description"] += flags_of(entry) + patch_of(entry)
        row = "".join(f"<td{kind_of(name)}>{known[name]}</td>" for name in order)
        rows.append(f"<tr class=\"{escape(entry.verdict.replace(' ', '-'))}\"><td>{number}</td>{row}</tr>")
    head = "<th scope=\"col\">no.</th>" + "".join(f"<th scope=\"col\"{kind_of(name)}>{name}</th>"
                                                 for name in order)
    table = wide("Trials", f"<table><thead><tr>{head}</tr></thead>\n<tbody>" + "\n".join(rows)
                 + "</tbody></table>")
    return document(
        "Ledger of trials", f"<h1>Ledger of trials</h1><p>{len(tried)} ideas tried, {kept} kept"
        f"{f', {looks} tested again on the test split' if looks else ''}. Gains are in the metric's unit "
        "over the trial's own baseline, larger is better. Intervals stay valid although a trial tests after "
        f"every pair.</p>\n{curve(entries)}\n<h2>Trials</h2>\n{table}", MORE_STYLE)


def kind_of(column: str) -> str:
    return f' class="text {column}"' if column in TEXTS else ""


def flags_of(entry: Entry) -> str:
    return f" <code>{escape(entry.flags)}</code>" if entry.flags else ""


def patch_of(entry: Entry) -> str:
    """The idea's patch as a collapsed block; empty if the idea changed only flags."""
    path = places.EXPERIMENTS / "trials" / entry.trial / f"{entry.idea}.diff"
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<details><summary>patch of {escape(entry.idea)}</summary><pre>{text}</pre></details>"


def curve(entries: list[Entry]) -> str:
    """Inline SVG of each idea's metric with its interval, and of the best value kept so far; one figure for
    each combination of metric, data and shared flags."""
    def kind(entry: Entry) -> tuple[str, str, str]:
        return entry.metric, entry.data, entry.shared_flags
    figures = []
    looks = {entry.change: entry.verdict for entry in entries if entry.split != VAL}       # the last counts
    failed = {change for change, verdict in looks.items() if verdict == NOT_CONFIRMED}
    for metric, data, flags in dict.fromkeys(map(kind, entries)):
        points = [(number, entry) for number, entry in enumerate(entries, 1)
                  if kind(entry) == (metric, data, flags) and entry.gain is not None and entry.split == VAL]
        if points:
            figures.append(f"<h2>Best so far, data {escape(data)}</h2>\n<p><code>{escape(flags)}</code></p>"
                           f"<figure>{picture(f'{metric} of each idea', drawn(points, metric, failed))}"
                           "</figure>")
    return "\n".join(figures)


def drawn(points: list[tuple[int, Entry]], metric: str, not_confirmed: set[str]) -> str:
    """not_confirmed  changes that failed confirmation, so they never count as the best"""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator
    with pyplot.rc_context(FIGURE):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
        for is_kept, colour, label in ((False, "#999999", "not kept"), (True, "#0072B2", "kept")):
            chosen = [(number, entry) for number, entry in points if (entry.verdict == KEEP) == is_kept]
            if chosen:
                # the interval is that of the gain, subtracted from the baseline's mean
                middle = [entry.baseline - entry.gain for _, entry in chosen]
                below = [entry.high - entry.gain for _, entry in chosen]
                above = [entry.gain - entry.low for _, entry in chosen]
                axes.errorbar([number for number, _ in chosen], middle, [below, above], fmt="o", markersize=4,
                              color=colour, label=label, capsize=2, linewidth=1)
        best = points[0][1].baseline
        line = [(points[0][0] - 0.5, best)]
        for number, entry in points:
            if entry.verdict == KEEP and entry.change not in not_confirmed:
                best = min(best, entry.value)
            line.append((number, best))
        axes.step(*zip(*line, strict=True), where="post", color="#0072B2", linewidth=1.4, label="best kept")
        axes.set(xlabel="line of the ledger", ylabel=metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(points[0][0] - 0.7, points[-1][0] + 0.7)
        axes.legend(frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return out.getvalue().decode()
