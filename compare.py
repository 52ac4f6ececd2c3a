"""Compare runs: a table, statistics between groups, curves, and a page to look at.

    python compare.py experiments/2026*                           a table of these runs
    python compare.py demo 'gelu=experiments/*_gelu_seed*'        groups, and what can be concluded from them
    python compare.py demo --format latex                         or text, markdown, csv
    python compare.py demo gelu --plot figures/gelu               curves by step, tokens, time, FLOPs and cost
    python compare.py demo gelu --html gelu.html                  one page with all of it, for any browser
    python compare.py --index                                     experiments/README.md from what is there

A group is NAME=GLOB, or a folder of run folders, such as the committed experiments/demo. The first group is
the baseline; each other one is compared with it. Runs that differ in data, held-out text, tokenizer or tokens
are not compared, unless --although names what may differ. Where the held-out text is the same, bits per byte
can be compared even between tokenizers.
"""

import csv
import difflib
import functools
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import significance
from documents import Help, Parser, UserError, command
from run_folder import EXPERIMENTS, minutes, read_object, write_whole

# ------------------------------------------------------------------------------------------------
# Runs and groups
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """What a run folder says. `summary` is empty while the run is unfinished."""
    folder: Path
    knobs: dict
    summary: dict

    @property
    def name(self) -> str:
        """The folder as seen from experiments/, if it is there."""
        folder, home = self.folder.resolve(), EXPERIMENTS.resolve()
        return str(folder.relative_to(home)) if folder.is_relative_to(home) else folder.name

    @property
    def status(self) -> str:
        """finished, failed and why, or unfinished"""
        return str(self.summary.get("status", "unfinished"))

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    @functools.cached_property
    def rows(self) -> list[dict[str, float]]:
        """metrics.csv, without the cells in which nothing was measured."""
        path = self.folder / "metrics.csv"
        try:
            with open(path, newline="", encoding="utf-8") as file:
                return [{column: float(cell) for column, cell in row.items() if cell}
                        for row in csv.DictReader(file)]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not what a run writes ({error})") from error

    @functools.cached_property
    def samples(self) -> list[dict]:
        return lines_of(self.folder / "samples.jsonl")

    @functools.cached_property
    def hellaswag(self) -> list[dict]:
        return lines_of(self.folder / "hellaswag.jsonl")


def lines_of(path: Path) -> list[dict]:
    """The objects of a .jsonl file of a run folder; none where it is missing."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path} is not what a run writes ({error})") from error


def read_run(folder: Path) -> Run:
    summary = read_object(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    return Run(folder, read_object(folder / "config.json"), summary)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration with several seeds; or a single run that was named alone."""
    name: str
    runs: list[Run]
    is_alone: bool = False

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.is_finished]

    def values(self, metric: str) -> list[float]:
        return [run.summary[metric] for run in self.finished if metric in run.summary]

    def by_seed(self, metric: str) -> dict[int, float]:
        """The metric by seed; nothing where two runs share one."""
        runs = {run.summary["seed"]: run.summary[metric] for run in self.finished if metric in run.summary}
        return runs if len(runs) == len(self.values(metric)) else {}


def open_groups(specs: list[str]) -> list[Group]:
    """The groups that the words of a command line mean.

    raises  UserError if one means no run
    """
    groups = []
    for spec in specs:
        name, found = "", matches(spec)
        if not found and "=" in spec:
            name, spec = spec.split("=", 1)
            found = matches(spec)
        if not found:
            known = [path.name for path in EXPERIMENTS.iterdir()] if EXPERIMENTS.is_dir() else []
            near = difflib.get_close_matches(Path(spec).name, known, n=1, cutoff=0.4)
            raise UserError(f"{spec} is no run folder, and matches none, here or in experiments/"
                            + (f"; did you mean {near[0]}?" if near else ""))
        if name:
            groups.append(Group(name, [run for path in found for run in runs_in(path)]))
            continue
        for path in found:
            runs = runs_in(path)
            alone = is_run(path)
            groups.append(Group(runs[0].name if alone else path.name, runs, alone))
    names = [group.name for group in groups]
    double = next((name for name in names if names.count(name) > 1), None)
    if double:
        raise UserError(f"two groups are called {double}; name them, as in a=GLOB")
    return groups


def matches(pattern: str) -> list[Path]:
    """The run folders, and folders of run folders, that a path or glob means, here or in experiments/."""
    for where in (Path(), EXPERIMENTS):
        found = [Path(path) for path in sorted(glob.glob(str(where / Path(pattern).expanduser())))]
        found = [path for path in found if runs_in(path)]
        if found:
            return found
    return []


def runs_in(path: Path) -> list[Run]:
    """The run that a folder is, or those that lie in it."""
    if is_run(path):
        return [read_run(path)]
    return [read_run(child) for child in sorted(path.iterdir()) if is_run(child)] if path.is_dir() else []


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file()


# ------------------------------------------------------------------------------------------------
# What may be compared
# ------------------------------------------------------------------------------------------------

# what --although may name, and where a run's summary has it
CONDITIONS = {"data": "data_sha256", "tokenizer": "tokenizer_sha256", "tokens": "tokens"}
# knobs that say where and when a run was, not what it trained
PERSONAL_KNOBS = ("model_name", "seed", "check", "resume", "resume_changed", "save_every_steps",
                  "save_every_minutes", "save_model", "timeout_seconds", "gpu_cost_per_hour", "compare_to",
                  "wandb", "tensorboard")


def held_out_text(run: Run) -> str:
    """What names the text that a run was validated on; where it was not hashed yet, the data name it."""
    facts = run.summary
    return str(facts.get("held_out_sha256") or (facts.get("data_sha256"), facts.get("held_out_tokens")))


def check_comparable(groups: list[Group], metric: str, although: Iterable[str] = ()) -> None:
    """raises  UserError that names the first difference that forbids to compare the groups"""
    runs = [(group.name, run) for group in groups for run in group.finished]
    base_group, base = runs[0]
    for name, run in runs[1:]:
        where = f"{base_group} ({base.name}) and {name} ({run.name})"
        same_text = held_out_text(run) == held_out_text(base)
        for condition, fact in CONDITIONS.items():
            if condition in although or run.summary.get(fact) == base.summary.get(fact):
                continue
            said = fact if condition == "tokens" else condition
            values = [f"{value:,}" if isinstance(value, int) else f"{value} {str(facts.get(fact))[:8]}"
                      for facts in (base.summary, run.summary) for value in [facts.get(said)]]
            if not same_text:
                advice = "; their held-out text differs, too, so nothing makes them comparable"
            elif condition == "tokens":
                advice = "; if that is the question, use --although tokens"
            else:
                advice = f"; bits per byte of the same text can still be compared: --although {condition}"
            raise UserError(f"{where} differ in {condition}: {values[0]} against {values[1]}{advice}")
        if not same_text:
            raise UserError(f"{where} were validated on different text; train them on the same held-out "
                            "documents (and --val_tokens)")
        if metric != "val_bpb" and run.summary["tokenizer_sha256"] != base.summary["tokenizer_sha256"]:
            raise UserError(f"{where} have different tokenizers, so {metric} counts other tokens; "
                            "use --metric val_bpb")


def differing_knobs(a: Group, b: Group) -> list[str]:
    """What the two configurations do differently: knobs, sources, and the machine."""
    first, second = a.finished[0], b.finished[0]
    found = [f"--{knob} {first.knobs.get(knob)!r} against {second.knobs.get(knob)!r}"
             for knob in {**first.knobs, **second.knobs}
             if knob not in PERSONAL_KNOBS and first.knobs.get(knob) != second.knobs.get(knob)]
    sources = [run.summary.get("sources", {}) for run in (first, second)]
    scripts = [run.summary.get("script", "") for run in (first, second)]
    if first.summary.get("code_sha256") != second.summary.get("code_sha256"):
        found.append(f"the script, {scripts[0]} against {scripts[1]}" if scripts[0] != scripts[1] else
                     f"the code of {scripts[0]}")
    found += [f"the code of {name}" for name in sorted({*sources[0], *sources[1]} - set(scripts))
              if sources[0].get(name) != sources[1].get(name)]
    found += [f"{fact} {first.summary.get(fact)} against {second.summary.get(fact)}"
              for fact in ("device", "processes", "dtype", "torch")
              if first.summary.get(fact) != second.summary.get(fact)]
    return found


# ------------------------------------------------------------------------------------------------
# Conclusions
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Comparison:
    """What group b's metric does beside group a's; without tests where a group has one run."""
    a: Group
    b: Group
    metric: str
    welch: significance.Difference | None
    paired: significance.Difference | None

    @property
    def best_test(self) -> significance.Difference | None:
        """The paired one, where there are seeds to pair."""
        return self.paired or self.welch

    def lines(self) -> list[str]:
        """The comparison in words."""
        a, b = self.a.values(self.metric), self.b.values(self.metric)
        lines = [f"{self.b.name} against {self.a.name}, {self.metric}: {fmean(b):.4f} "
                 f"({counted(len(b), 'run')}) against {fmean(a):.4f} ({counted(len(a), 'run')})"]
        if not self.best_test:
            return [*lines, f"  difference {fmean(b) - fmean(a):+.4f}; one run a side does not tell it from "
                            "chance: repeat both with several seeds"]
        for test in filter(None, (self.paired, self.welch)):
            lines.append(f"  {test.kind + (' by seed' if test is self.paired else ''):<16}"
                         f"{test.mean:+.4f}, 95 % interval {test.low:+.4f} to {test.high:+.4f}, "
                         f"t {test.t:.2f} on {test.df:.1f} degrees of freedom, {p_in_words(test.p)}")
        test = self.best_test
        better = "lower, so better" if test.mean < 0 else "higher, so worse"
        lines.append(f"  {self.b.name} is {better}" if test.p < 0.05 else
                     "  no difference shown; that is not the same as none")
        if test.sd > 0:
            sizes = (len(self.seeds), 0) if self.paired else (len(a), len(b))
            smallest = significance.detectable_effect(test.sd, *sizes)
            lines.append(f"  so many runs find a true difference of {smallest:.4f} four times in five"
                         + self.more_runs(test, sizes[0]))
        return lines

    @property
    def seeds(self) -> list[int]:
        """Seeds that both groups have."""
        return sorted(set(self.a.by_seed(self.metric)) & set(self.b.by_seed(self.metric)))

    def more_runs(self, test: significance.Difference, have: int) -> str:
        unit = "pairs" if self.paired else "runs a side"
        if not test.mean:
            return ""
        try:
            needed = significance.runs_needed(test.mean, test.sd, is_paired=bool(self.paired))
        except ValueError:
            return f"; one as small as {test.mean:+.4f} would take more than 10,000 {unit}"
        more = f", {needed - have} more" if needed > have else ""
        return f"; one of {test.mean:+.4f} takes {needed} {unit}{more}"


def compare(a: Group, b: Group, metric: str) -> Comparison:
    first, second = a.values(metric), b.values(metric)
    if not first or not second:
        raise UserError(f"{(a if not first else b).name} has no finished run with {metric}")
    welch = significance.welch(first, second) if min(len(first), len(second)) > 1 else None
    comparison = Comparison(a, b, metric, welch, None)
    seeds = comparison.seeds
    if len(seeds) < 2:
        return comparison
    by_seed = a.by_seed(metric), b.by_seed(metric)
    paired = significance.paired([by_seed[0][seed] for seed in seeds], [by_seed[1][seed] for seed in seeds])
    return Comparison(a, b, metric, welch, paired)


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def p_in_words(p: float) -> str:
    return f"p {p:.3f}" if p >= 0.001 else "p below 0.001"


def target_lines(group: Group, metric: str, target: float) -> list[str]:
    """Whether a group reaches a target on average, by the speedruns' test."""
    values = group.values(metric)
    if len(values) < 2:
        return [f"{group.name}: {metric} {values[0]:.4f}, the target {target:g}; a test takes two runs"]
    p = significance.p_below(values, target)
    verdict = "reached" if p < 0.01 else "not shown to be reached"
    return [f"{group.name}: mean {metric} {fmean(values):.4f} of {len(values)} runs; the target {target:g} "
            f"is {verdict} ({p_in_words(p)}, one-sided; the speedruns ask for less than 0.01)"]


def hellaswag_lines(a: Group, b: Group) -> list[str]:
    """McNemar's test on the questions, for each pair of runs that belong together."""
    runs_a, runs_b = ([run for run in group.finished if run.hellaswag] for group in (a, b))
    seeds_b = {run.summary["seed"]: run for run in runs_b}
    pairs = [(run, seeds_b[run.summary["seed"]]) for run in runs_a if run.summary["seed"] in seeds_b]
    if not pairs and len(runs_a) == len(runs_b) == 1:
        pairs = [(runs_a[0], runs_b[0])]
    lines = []
    for first, second in pairs:
        names = [[item["name"] for item in run.hellaswag] for run in (first, second)]
        if names[0] != names[1]:
            lines.append(f"  HellaSwag: {first.name} and {second.name} were scored on different rows")
            continue
        a_right, b_right = ([item["acc"]["choice"] == item["label"] for item in run.hellaswag]
                            for run in (first, second))
        test = significance.mcnemar(a_right, b_right)
        lines.append(f"  HellaSwag, {second.name} against {first.name}: {sum(b_right):,} against "
                     f"{sum(a_right):,} of {len(a_right):,} right; only the one {test.only_b:,}, only the "
                     f"other {test.only_a:,}, {p_in_words(test.p)} (McNemar)")
    return lines


def standing(run: Run, spec: str, metric: str = "val_bpb") -> str:
    """How far a finished run is from a group, in its standard deviations; or why that cannot be said."""
    group, = open_groups([spec])
    others = [other for other in group.runs if other.folder.resolve() != run.folder.resolve()]
    group, alone = Group(group.name, others), Group("this run", [run])
    values = group.values(metric)
    if not values:
        return f"{group.name} has no finished run to compare with"
    try:
        check_comparable([group, alone], metric)
    except UserError as error:
        return f"no comparison with {group.name}: {error}"
    above = run.summary[metric] - fmean(values)
    side = "above" if above > 0 else "below"
    if len(values) < 2 or not stdev(values):
        return (f"at the end you are {above:+.4f} bits per byte {side} {group.name} "
                f"({counted(len(values), 'run')}, so without a spread)")
    return (f"at the end you are {above:+.4f} bits per byte, {abs(above) / stdev(values):.1f} sigma, "
            f"{side} {group.name} ({counted(len(values), 'run')}, mean {fmean(values):.4f}, "
            f"sigma {stdev(values):.4f})")


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Column:
    """A column of the table of runs: its title, a run's value or None, and how people read it."""
    title: str
    value: Callable[[Run], object]
    text: Callable[[object], str] = str


def _last(run: Run, column: str) -> float | None:
    """What a run ended with; of one that did not, the last that was measured."""
    if column in run.summary:
        return run.summary[column]
    return next((row[column] for row in reversed(run.rows) if column in row), None)


def _accuracy(run: Run) -> dict | None:
    return run.summary.get("benchmarks", {}).get("hellaswag", {}).get("acc")


COLUMNS = (
    Column("run", lambda run: run.name),
    Column("status", lambda run: run.status.split(":")[0]),
    Column("seed", lambda run: run.summary.get("seed", run.knobs.get("seed"))),
    Column("parameters", lambda run: run.summary.get("parameters"), lambda n: f"{n / 1e6:,.1f}M"),
    Column("tokens", lambda run: _last(run, "tokens"), lambda n: f"{n / 1e6:,.1f}M"),
    Column("time", lambda run: _last(run, "train_seconds"), minutes),
    Column("cost", lambda run: run.summary.get("cost"), lambda cost: f"{cost:,.2f}"),
    Column("val_loss", lambda run: _last(run, "val_loss"), lambda loss: f"{loss:.4f}"),
    Column("val_bpb", lambda run: _last(run, "val_bpb"), lambda bpb: f"{bpb:.4f}"),
    Column("HellaSwag", _accuracy, lambda acc: f"{acc['value']:.3f} ({acc['low']:.3f}-{acc['high']:.3f})"),
    Column("tokens/s", lambda run: _last(run, "tokens_per_second"), lambda speed: f"{speed:,.0f}"),
    Column("peak MiB", lambda run: _last(run, "peak_memory_mib"), lambda mib: f"{mib:,.0f}"),
)


def runs_table(groups: list[Group]) -> list[list[str]]:
    """A title line and a line for each run; columns in which no run has anything are left out."""
    runs = [run for group in groups for run in group.runs]
    used = [column for column in COLUMNS if any(column.value(run) is not None for run in runs)]
    lines = [["" if (value := column.value(run)) is None else column.text(value) for column in used]
             for run in runs]
    return [[column.title for column in used], *lines]


def groups_table(groups: list[Group]) -> list[list[str]]:
    """Mean, standard deviation and interval of each group."""
    lines = [["group", "runs", "val_loss", "sd", "val_bpb", "sd", "95 % interval", "tokens/s"]]
    for group in groups:
        if not group.finished:
            lines.append([group.name, f"0 of {len(group.runs)}", *[""] * 6])
            continue
        losses, bpbs = group.values("val_loss"), group.values("val_bpb")
        cells = [group.name, str(len(losses)) if len(group.runs) == len(losses)
                 else f"{len(losses)} of {len(group.runs)}"]
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
    lines = [[cell.replace("|", r"\|") for cell in line] for line in table]
    ruler = ["---", *["--:"] * (len(table[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ruler, *lines[1:]])


def as_latex(table: list[list[str]]) -> str:
    """A tabular of the package booktabs."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
               **{sign: f"\\{sign}" for sign in "&%$#_{}"}}
    lines = [" & ".join("".join(special.get(sign, sign) for sign in cell) for cell in line) + r" \\"
             for line in table]
    lines[1:1] = [r"\midrule"]
    begin = r"\begin{tabular}{l" + "r" * (len(table[0]) - 1) + "}"
    return "\n".join([begin, r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"])


def as_csv(groups: list[Group]) -> str:
    """The runs with their numbers in full, for other programs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", *(column.title for column in COLUMNS if column.title != "HellaSwag"),
                     "hellaswag_acc", "hellaswag_low", "hellaswag_high"])
    for group in groups:
        for run in group.runs:
            values = [column.value(run) for column in COLUMNS if column.title != "HellaSwag"]
            accuracy = _accuracy(run) or {}
            writer.writerow([group.name, *("" if value is None else value for value in values),
                             *(accuracy.get(key, "") for key in ("value", "low", "high"))])
    return out.getvalue().rstrip("\n")


# ------------------------------------------------------------------------------------------------
# Curves
# ------------------------------------------------------------------------------------------------

# how far a run was at a row of metrics.csv, by name: label, value or None, and scale
AXES: dict[str, tuple[str, Callable[[Run, dict], float | None]]] = {
    "step": ("steps", lambda run, row: row.get("step")),
    "tokens": ("million tokens", lambda run, row: row["tokens"] / 1e6),
    "time": ("minutes of training", lambda run, row: row["train_seconds"] / 60),
    "flops": ("training FLOPs", lambda run, row: row.get("flops")),
    "cost": ("cost", lambda run, row: _price(run) * row["train_seconds"] / 3600 if _price(run) else None),
}
# Okabe and Ito's colours, which people who see colours differently can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def _price(run: Run) -> float:
    return run.knobs.get("gpu_cost_per_hour", 0)


def curve(run: Run, axis: str, metric: str) -> tuple[list[float], list[float]]:
    """Where a run was validated, and the metric there; empty if the run does not know the axis."""
    place = AXES[axis][1]
    points = [(place(run, row), row[metric]) for row in run.rows if metric in row]
    if any(x is None for x, _ in points):
        return [], []
    return [x for x, _ in points], [y for _, y in points]


def draw(groups: list[Group], axis: str, metric: str):
    """A figure of matplotlib: each group's mean in a band of its standard deviation; None without curves."""
    import matplotlib
    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.alpha": 0.25, "svg.fonttype": "none", "svg.hashsalt": axis}
    drawn = False
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        for number, group in enumerate(groups):
            colour = COLOURS[number % len(COLOURS)]
            curves = [(x, y) for x, y in (curve(run, axis, metric) for run in group.runs) if x]
            if not curves:
                continue
            drawn = True
            label = group.name if len(curves) == 1 else f"{group.name} ({len(curves)} runs)"
            if len(curves) == 1:
                axes.plot(*curves[0], color=colour, label=label, linewidth=1.4)
                continue
            # runs are validated at places of their own; the mean is taken where all of them have been
            last = min(x[-1] for x, _ in curves)
            grid = np.array([x for x in max((x for x, _ in curves), key=len) if x < last] + [last])
            values = np.array([np.interp(grid, x, y) for x, y in curves])
            mean, spread = values.mean(0), values.std(0, ddof=1)
            axes.plot(grid, mean, color=colour, label=label, linewidth=1.4)
            axes.fill_between(grid, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        names = {"val_bpb": "bits per byte, held-out text", "val_loss": "nats per token, held-out text"}
        axes.set(xlabel=AXES[axis][0], ylabel=names.get(metric, metric))
        axes.set_xlim(left=0)
        if drawn:
            axes.legend(frameon=False)
            _zoom(axes)
    return figure if drawn else None


def _zoom(axes) -> None:
    """Leave the steep beginning out, which hides how the curves differ: show what is at most half above the
    lowest end, and more where the ends themselves lie further apart."""
    import numpy as np
    heights = np.concatenate([line.get_ydata() for line in axes.lines])
    ends = np.array([line.get_ydata()[-1] for line in axes.lines])
    top = min(heights.max(), ends.min() + max(0.5 * ends.min(), 3 * np.ptp(ends)))
    axes.set_ylim(heights.min() - 0.03 * (top - heights.min()), top)


def save_curves(groups: list[Group], metric: str, base: Path) -> list[Path]:
    """BASE_AXIS.png and .svg for every axis that the runs know."""
    from matplotlib import pyplot
    base.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for axis in AXES:
        figure = draw(groups, axis, metric)
        if figure:
            for ending in ("png", "svg"):
                path = base.with_name(f"{base.name}_{axis}.{ending}")
                figure.savefig(path, dpi=200, metadata={"Date": None} if ending == "svg" else None)
                written.append(path)
        pyplot.close("all")
    if not written:
        raise UserError("none of these runs was validated while it trained, so there is nothing to draw")
    return written


# ------------------------------------------------------------------------------------------------
# The index of what is committed
# ------------------------------------------------------------------------------------------------

def index(experiments: Path) -> str:
    """experiments/README.md: every group and run with a name of its own, failures included.

    Folders that begin with a date are the runs of this machine and are left out.
    """
    folders = sorted(path for path in experiments.iterdir() if path.is_dir() and not path.name[:1].isdigit())
    lines = ["# Experiments", "",
             "Written by `python compare.py --index` from the summaries of the runs; not to be edited.",
             "",
             "| | runs | preset | tokens | val_loss | val_bpb | tokens/s | device |",
             "|---|--:|---|--:|--:|--:|--:|---|"]
    failures = []
    for folder in folders:
        runs = runs_in(folder)
        group = Group(folder.name, runs)
        failures += [f"- `{run.folder.relative_to(experiments)}`: {run.status}" for run in runs
                     if not run.is_finished]
        if not group.finished:
            continue
        facts = group.finished[0].summary
        cells = [f"[{folder.name}]({folder.name}/)",
                 f"{len(group.finished)}" + (f" of {len(runs)}" if len(runs) > len(group.finished) else ""),
                 facts.get("preset", ""), f"{median(group.values('tokens')) / 1e6:,.1f}M",
                 _mean_and_spread(group.values("val_loss")), _mean_and_spread(group.values("val_bpb")),
                 f"{median(group.values('tokens_per_second')):,.0f}",
                 f"{facts.get('processes', 1)} x {facts.get('device', '')}"]
        lines.append(f"| {' | '.join(cells)} |")
    if failures:
        lines += ["", "## Not finished", "", *failures]
    lines += ["", "What was tried for the recipe, losers included, is in [RECIPE.md](RECIPE.md).", ""]
    return "\n".join(lines)


def _mean_and_spread(values: list[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

def conclusions(groups: list[Group], metric: str, although: Iterable[str]) -> list[str]:
    """Each further group against the first, in words.

    raises  UserError if they cannot be compared
    """
    check_comparable(groups, metric, although)
    lines = []
    for group in groups[1:]:
        if lines:
            lines.append("")
        lines += compare(groups[0], group, metric).lines() + hellaswag_lines(groups[0], group)
        differing = differing_knobs(groups[0], group)
        lines.append(f"  they differ in {'; '.join(differing) or 'nothing that the runs know of'}")
    return lines


@command
def main() -> None:
    parser = Parser("Compare runs: a table, statistics between groups, curves, a page.",
                    formatter_class=lambda prog: Help(prog, max_help_position=30, width=110))
    parser.add_argument("runs", nargs="*", metavar="EXP",
                        help="a run folder, a glob, a folder of runs, or a group NAME=GLOB")
    parser.add_argument("--format", choices=("text", "markdown", "latex", "csv"), default="text",
                        help="of the tables")
    parser.add_argument("--metric", choices=("val_bpb", "val_loss"), default="val_bpb",
                        help="what is compared and drawn")
    parser.add_argument("--although", choices=tuple(CONDITIONS), nargs="+",
                        help="compare although runs differ in this")
    parser.add_argument("--target", type=float, help="test whether each group reaches this value")
    parser.add_argument("--plot", type=Path, metavar="BASE",
                        help="draw curves into BASE_step.png, BASE_tokens.svg, ...")
    parser.add_argument("--html", type=Path, metavar="FILE",
                        help="write a page with table, curves and samples")
    parser.add_argument("--index", action="store_true", help="write experiments/README.md anew")
    args = parser.parse_args()
    if args.index:
        write_whole(EXPERIMENTS / "README.md", index(EXPERIMENTS))
    if not args.runs:
        return args.index or parser.error("name runs to compare, as in: python compare.py experiments/2026*")
    groups = open_groups(args.runs)
    compared = [group for group in groups if group.finished]
    # many single runs make a table; two of them, or groups, are also weighed against each other
    are_groups = len(compared) == 2 or not any(group.is_alone for group in compared)
    problem, said = "", []
    try:
        if are_groups and len(compared) > 1:
            said = conclusions(compared, args.metric, args.although or ())
    except UserError as error:
        problem = str(error)
    if args.target is not None:
        said += ["", *(line for group in compared for line in target_lines(group, args.metric, args.target))]
    show = {"text": as_text, "markdown": as_markdown, "latex": as_latex}.get(args.format)
    if not show:
        print(as_csv(groups))
    else:
        print(show(runs_table(groups)))
        if any(len(group.runs) > 1 for group in groups):
            print("\n" + show(groups_table(groups)))
    notes = [f"{run.name}: {run.status}" for group in groups for run in group.runs if not run.is_finished]
    out = sys.stdout if args.format == "text" else sys.stderr   # what goes into a paper is the table alone
    if said or notes:
        print("\n" + "\n".join([*said, *notes]).strip("\n"), file=out)
    if problem:
        raise UserError(problem)
    if args.plot:
        for path in save_curves(groups, args.metric, args.plot):
            print(f"wrote {os.path.relpath(path)}", file=sys.stderr)
    if args.html:
        from page import page
        args.html.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.html, page(groups, args.metric, said))
        print(f"wrote {os.path.relpath(args.html)}", file=sys.stderr)


if __name__ == "__main__":
    main()
