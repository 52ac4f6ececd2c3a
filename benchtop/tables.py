"""Tables of runs and of groups, as text, Markdown, LaTeX and CSV; and the index of the committed runs."""

import csv
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from benchtop import significance
from benchtop.command_line import minutes
from benchtop.groups import COUNTED, MEASURED, Group, SavedRun, benchmarks_of, is_measured, runs_in


@dataclass(frozen=True)
class Column:
    """A column of the runs table: its title, a run's value (or None), and that value as text."""
    title: str
    value: Callable[[SavedRun], object]
    text: Callable[[object], str] = str


def short(number: float) -> str:
    """A number of tokens or parameters in short form: 512, 8.2k, 84k, 4.9M."""
    if number < 1000:
        return f"{number:.0f}"
    if number < 999_500:
        return f"{number / 1e3:.{int(number < 9950)}f}k"
    return f"{number / 1e6:,.1f}M"


def _last(run: SavedRun, column: str) -> float | None:
    """A run's final value; if it has none, the last finite one in metrics.csv."""
    found = (values.get(column) for values in (run.summary, *reversed(run.rows)))
    return next((value for value in found if is_measured(value)), None)


COLUMNS = (
    Column("run", lambda run: run.name),
    Column("status", lambda run: run.status.split(":")[0]),
    Column("seed", lambda run: run.summary.get("seed", run.knobs.get("seed"))),
    Column("parameters", lambda run: run.summary.get("parameters"), short),
    Column("tokens", lambda run: _last(run, "tokens"), short),
    Column("time", lambda run: _last(run, "train_seconds"), minutes),
    Column("cost", lambda run: run.summary.get("cost"), lambda cost: f"{cost:,.2f}"),
    Column("val_loss", lambda run: _last(run, "val_loss"), lambda loss: f"{loss:.4f}"),
    Column("val_bpb", lambda run: _last(run, "val_bpb"), lambda bpb: f"{bpb:.4f}"),
    Column("held-out documents", lambda run: run.summary.get("held_out_documents"), "{:,}".format),
    Column("tokens/s", lambda run: _last(run, "tokens_per_second"), lambda speed: f"{speed:,.0f}"),
    Column("peak MiB", lambda run: _last(run, "peak_memory_mib"), lambda mib: f"{mib:,.0f}"),
)


def benchmark_columns(name: str) -> list[Column]:
    """Accuracy with its interval, and perplexity."""
    def score(run: SavedRun, key: str) -> object:
        return run.benchmarks.get(name, {}).get(key)
    return [Column(name, functools.partial(score, key="acc"),
                   lambda acc: f"{acc['value']:.3f} ({acc['low']:.3f}-{acc['high']:.3f})"),
            Column(f"{name} perplexity", functools.partial(score, key="perplexity"), "{:.2f}".format)]


def used_columns(groups: list[Group]) -> list[Column]:
    """The columns in which at least one run has a value."""
    runs = [run for group in groups for run in group.runs]
    columns = [*COLUMNS, *(column for name in benchmarks_of(groups) for column in benchmark_columns(name))]
    return [column for column in columns if any(column.value(run) is not None for run in runs)]


def runs_table(groups: list[Group]) -> list[list[str]]:
    """A header row, and a row for each run."""
    used = used_columns(groups)
    lines = [["" if (value := column.value(run)) is None else column.text(value) for column in used]
             for group in groups for run in group.runs]
    return [[column.title for column in used], *lines]


def groups_table(groups: list[Group]) -> list[list[str]]:
    """Mean, standard deviation and interval of each group."""
    lines = [["group", "runs", "val_loss", "sd", "val_bpb", "sd", "95 % interval", "tokens/s"]]
    for group in groups:
        if not group.finished:
            lines.append([group.name, group.count, *[""] * 6])
            continue
        losses, bpbs = group.values("val_loss"), group.values("val_bpb")
        cells = [group.name, group.count]
        for values in (losses, bpbs):
            cells += [f"{fmean(values):.4f}", f"{stdev(values):.4f}" if len(values) > 1 else ""]
        low, high = significance.interval(bpbs) if len(bpbs) > 1 else (None, None)
        cells.append(f"{low:.4f} to {high:.4f}" if low is not None else "")
        lines.append([*cells, f"{median(group.values('tokens_per_second')):,.0f}"])
    return lines


def as_text(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) if place == 0 else cell.rjust(width)
                       for place, (cell, width) in enumerate(zip(line, widths, strict=True)))
             for line in table]
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(table: list[list[str]]) -> str:
    lines = [list(map(in_markdown, line)) for line in table]
    ruler = ["---", *["--:"] * (len(table[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ruler, *lines[1:]])


def in_markdown(cell: object) -> str:
    return " ".join(str(cell).split()).replace("|", r"\|")


def in_latex(cell: object) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
               "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
               **{sign: f"\\{sign}" for sign in "&%$#_{}"}}
    return "".join(special.get(sign, sign) for sign in " ".join(str(cell).split()))


def as_latex(table: list[list[str]]) -> str:
    """A LaTeX tabular with the rules of the package booktabs."""
    lines = [" & ".join(map(in_latex, line)) + r" \\" for line in table]
    lines[1:1] = [r"\midrule"]
    begin = r"\begin{tabular}{l" + "r" * (len(table[0]) - 1) + "}"
    return "\n".join([begin, r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"])


def as_csv(groups: list[Group]) -> str:
    """The runs with unrounded numbers, for other programs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    results = [(name, key) for name in benchmarks_of(groups) for key in ("acc", "perplexity")
               if any(key in run.benchmarks.get(name, {}) for group in groups for run in group.runs)]
    parts = {"acc": ("acc", "low", "high"), "perplexity": ("perplexity",)}
    writer.writerow(["group", *(column.title for column in COLUMNS),
                     *(f"{name}_{part}" for name, key in results for part in parts[key])])
    for group in groups:
        for run in group.runs:
            values = [column.value(run) for column in COLUMNS]
            for name, key in results:
                result = run.benchmarks.get(name, {}).get(key)
                values += ([result] if key == "perplexity" else
                           map((result or {}).get, ("value", "low", "high")))
            writer.writerow([group.name, *("" if value is None else value for value in values)])
    return out.getvalue().rstrip("\n")


def run_facts(groups: list[Group]) -> list[dict]:
    """The runs as dicts for JSON, with the names of summary.json; None for what a run did not measure."""
    def fact(run: SavedRun, name: str) -> float | None:
        value = run.summary.get(name)
        return value if is_measured(value) else None
    return [{"group": group.name, "run": run.name, "status": run.status,
             **{name: fact(run, name) for name in (*MEASURED, *COUNTED)},
             **{name: run.summary.get(name) for name in ("data", "tokenizer", "device", "script")},
             "benchmarks": run.benchmarks}
            for group in groups for run in group.runs]


def group_facts(groups: list[Group]) -> list[dict]:
    """Mean, standard deviation and interval of each group, as dicts for JSON."""
    facts = []
    for group in groups:
        facts.append({"group": group.name, "runs": len(group.runs), "finished": len(group.finished)})
        for metric in ("val_loss", "val_bpb", "tokens_per_second"):
            values = group.values(metric)
            low, high = significance.interval(values) if len(values) > 1 else (None, None)
            facts[-1][metric] = {"mean": fmean(values) if values else None,
                                 "sd": stdev(values) if len(values) > 1 else None, "low": low, "high": high}
    return facts


def index(experiments: Path) -> str:
    """Text of experiments/README.md: every named group and run, failures included.

    Folders whose names begin with a date are this machine's own runs and are left out.
    """
    folders = sorted(path for path in experiments.iterdir() if path.is_dir() and not path.name[:1].isdigit())
    lines = ["# Experiments", "",
             "Written by `python compare.py --index` from the summaries of the runs; do not edit.",
             "",
             "| | runs | preset | tokens | held-out documents | val_loss | val_bpb | tokens/s | device |",
             "|---|--:|---|--:|--:|--:|--:|--:|---|"]
    failures = []
    for folder in folders:
        group = Group(folder.name, runs_in(folder))
        failures += [f"- `{run.folder.relative_to(experiments)}`: {run.status}" for run in group.runs
                     if not run.is_finished]
        if not group.finished:
            continue
        facts = group.finished[0].summary
        cells = [f"[{folder.name}]({folder.name}/)",
                 group.count,
                 facts.get("preset", ""), short(median(group.values("tokens"))),
                 f"{facts['held_out_documents']:,}" if "held_out_documents" in facts else "",
                 mean_and_spread(group.values("val_loss")), mean_and_spread(group.values("val_bpb")),
                 f"{median(group.values('tokens_per_second')):,.0f}",
                 f"{facts.get('processes', 1)} x {facts.get('device', '')}"]
        lines.append(f"| {' | '.join(map(in_markdown, cells))} |")
    if failures:
        lines += ["", "## Not finished", "", *failures]
    if (experiments / "ledger.tsv").is_file():
        lines += ["", "Each idea tried has a line in [ledger.tsv](ledger.tsv) and its runs in "
                  "[trials/](trials/); `python trial.py --ledger` lists them."]
    lines += ["", "[RECIPE.md](RECIPE.md) has the evidence for the recipe, including what did not help; "
              "[RACE.md](RACE.md) compares it with nanochat.", ""]
    return "\n".join(lines)


def mean_and_spread(values: list[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")
