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
from run_folder import EXPERIMENTS, NEUTRAL_KNOBS, minutes, read_object, write_whole

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

    @property
    def benchmarks(self) -> dict[str, dict]:
        """What it scored on each benchmark, by name."""
        return self.summary.get("benchmarks") or {}

    def items(self, benchmark: str) -> list[dict]:
        """Each row of a benchmark that it was scored on."""
        return lines_of(self.folder / f"{benchmark}.jsonl")


def lines_of(path: Path) -> list[dict]:
    """The objects of a .jsonl file of a run folder; none where it is missing."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")    # splitlines() would cut at U+2028 in a sample
        return [json.loads(line) for line in lines if line]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path} is not what a run writes ({error})") from error


def read_run(folder: Path) -> Run:
    """raises  UserError if the folder's files are not what a run writes"""
    summary = read_object(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    if summary.get("status") == "finished":
        for fact in ("seed", "tokens", "train_seconds", "val_loss", "val_bpb", "tokens_per_second"):
            if not isinstance(summary.get(fact), int | float):
                raise UserError(f"{folder / 'summary.json'} is not what a run writes: it lacks {fact}")
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

    @property
    def count(self) -> str:
        """How many runs finished, and of how many if not all did."""
        finished = len(self.finished)
        return str(finished) if finished == len(self.runs) else f"{finished} of {len(self.runs)}"

    def values(self, metric: str) -> list[float]:
        return [run.summary[metric] for run in self.finished]

    def by_seed(self, metric: str) -> dict[int, float]:
        """The metric by seed; nothing where two runs share one."""
        runs = {run.summary["seed"]: run.summary[metric] for run in self.finished}
        return runs if len(runs) == len(self.finished) else {}


def open_groups(specs: list[str]) -> list[Group]:
    """The groups that the words of a command line mean, each run once.

    raises  UserError if one means no run, or a run stands in two groups
    """
    groups, seen = [], {}
    for spec in specs:
        name, found = "", matches(spec)
        if not found and "=" in spec:
            name, spec = spec.split("=", 1)
            found = matches(spec)
        holding = [path for path in found if holds_runs(path)]
        if len(specs) > 1 and not name and found and not holding:   # such as a README.md that a * found
            print(f"left out: {spec} is no run folder", file=sys.stderr)
            continue
        if not holding:
            known = [path.name for path in EXPERIMENTS.iterdir()] if EXPERIMENTS.is_dir() else []
            near = difflib.get_close_matches(Path(spec).name, known, n=1, cutoff=0.4)
            raise UserError(f"{spec or 'nothing'} is no run folder, and matches none, here or in experiments/"
                            + (f"; did you mean {near[0]}?" if near else ""))
        if name:
            groups.append(Group(name, without_copies(run for path in holding for run in runs_in(path))))
            continue
        for path in holding:
            runs = without_copies(runs_in(path))
            alone = is_run(path)
            groups += [Group(runs[0].name if alone else path.name, runs, alone)] if runs else []
    for group in groups:
        for run in group.runs:
            other = seen.setdefault(run.folder.resolve(), group.name)
            if other != group.name:
                raise UserError(f"{run.name} stands in two groups, {other} and {group.name}")
    names = [group.name for group in groups]
    double = next((name for name in names if names.count(name) > 1), None)
    if double:
        raise UserError(f"two groups are called {double}; name them, as in a=GLOB")
    return groups


def without_copies(runs: Iterable[Run]) -> list[Run]:
    """Each run once, also where links or --keep made it appear under two names."""
    kept: list[Run] = []
    for run in runs:
        twin = next((other for other in kept if other.folder.resolve() == run.folder.resolve()
                     or (run.summary and other.summary == run.summary)), None)
        if twin:
            print(f"left out: {run.name} is a copy of {twin.name}", file=sys.stderr)
        else:
            kept.append(run)
    return kept


def matches(pattern: str) -> list[Path]:
    """What a path or glob means: here, or in experiments/ if it finds no run here."""
    pattern = os.path.expanduser(pattern)
    here, there = ([where / path for path in sorted(glob.glob(pattern, root_dir=where))] if pattern else []
                   for where in (Path(), EXPERIMENTS))
    return there if not any(map(holds_runs, here)) and there else here


def runs_in(path: Path) -> list[Run]:
    """The run that a folder is, or those that lie in it; a damaged one is left out with a word."""
    runs = []
    for folder in [path] if is_run(path) else sorted(path.iterdir()):
        try:
            runs += [read_run(folder)] if is_run(folder) else []
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return runs


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def holds_runs(path: Path) -> bool:
    return is_run(path) or (path.is_dir() and any(map(is_run, path.iterdir())))


# ------------------------------------------------------------------------------------------------
# What may be compared
# ------------------------------------------------------------------------------------------------

# what --although may name, and where a run's summary has it
CONDITIONS = {"data": "data_sha256", "tokenizer": "tokenizer_sha256", "tokens": "tokens"}
# knobs that say where and when a run was, not what it trained
PERSONAL_KNOBS = ("model_name", "seed", "save_model", *NEUTRAL_KNOBS)


class NotComparable(UserError):
    """Two runs of which one number must not be set against the other's.

    advice  what to do about it on compare.py's command line
    """

    def __init__(self, problem: str, advice: str):
        super().__init__(f"{problem}; {advice}")
        self.problem = problem


def check_comparable(groups: list[Group], metric: str, although: Iterable[str] = ()) -> None:
    """Within groups and between them.

    raises  NotComparable that names what forbids it
    """
    runs = [(group.name, run) for group in groups for run in group.finished]
    base_group, base = runs[0]
    for name, run in runs[1:]:
        pair = f"{base_group} ({base.name}) and {name} ({run.name})" if name != base_group else (
            f"two runs of {name} ({base.name}, {run.name})")
        differing = [condition for condition, fact in CONDITIONS.items()
                     if condition not in although and run.summary.get(fact) != base.summary.get(fact)]
        same_text = validated_on_one_text(base, run)
        if differing:
            values = [f"{condition}: {told(base, condition)} against {told(run, condition)}"
                      for condition in differing]
            allow = " ".join(f"--although {condition}" for condition in differing)
            advice = "nor were they validated on the same text, so nothing makes them comparable"
            if same_text:
                advice = (f"if that is the question, use {allow}" if differing == ["tokens"] else
                          f"bits per byte of the same held-out text can still be compared: {allow}")
            raise NotComparable(f"{pair} differ in {' and in '.join(values)}", advice)
        if not same_text:
            raise NotComparable(f"{pair} were validated on different text",
                                "train them on the same held-out documents (and --val_tokens)")
        tokenizers = {run.summary.get("tokenizer_sha256") for run in (base, run)}
        if metric != "val_bpb" and len(tokenizers) > 1:
            raise NotComparable(f"{pair} have different tokenizers, so {metric} counts other tokens",
                                "use --metric val_bpb")


def told(run: Run, condition: str) -> str:
    """A run's data, tokenizer or tokens, as people tell them apart."""
    value, sha256 = run.summary.get(condition), str(run.summary.get(CONDITIONS[condition]))
    return f"{value:,}" if condition == "tokens" else f"{value} {sha256[:8]}"


def validated_on_one_text(a: Run, b: Run) -> bool:
    hashes = [run.summary.get("held_out_sha256") for run in (a, b)]
    if all(hashes):
        return hashes[0] == hashes[1]
    # runs of before the text was hashed: equal data and as many tokens of it are the same text
    facts = [(run.summary.get("data_sha256"), run.summary.get("held_out_tokens")) for run in (a, b)]
    return facts[0] == facts[1]


def differences_of(first: Run, second: Run) -> list[str]:
    """What two runs did differently: knobs, sources, and the machine."""
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


def mixed(group: Group) -> list[str]:
    """A line if runs of one group differ in more than their seed."""
    runs = group.finished
    other = next((run for run in runs[1:] if differences_of(runs[0], run)), None)
    return [] if not other else [f"{group.name} is mixed: {runs[0].name} and {other.name} differ in "
                                 + "; ".join(differences_of(runs[0], other))]


# ------------------------------------------------------------------------------------------------
# Conclusions
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Comparison:
    """What group b's metric does beside group a's; without tests where they take more runs.

    seeds   that both have; the test is paired if these are all that the smaller group has
    effect  the difference to be found; 0: the one that was seen
    """
    a: Group
    b: Group
    metric: str
    seeds: list[int]
    welch: significance.Difference | None
    paired: significance.Difference | None
    effect: float = 0.0

    @property
    def test(self) -> significance.Difference | None:
        """The one that sees most."""
        return self.paired or self.welch

    def lines(self) -> list[str]:
        """The comparison in words."""
        a, b = self.a.values(self.metric), self.b.values(self.metric)
        lines = [f"{self.b.name} against {self.a.name}, {self.metric}: {fmean(b):.4f} "
                 f"({counted(len(b), 'run')}) against {fmean(a):.4f} ({counted(len(a), 'run')})"]
        test = self.test
        if not test:
            return [*lines, self.of_one_run(a, b)]
        for one, kind in ((self.paired, f"paired by {len(self.seeds)} seeds"), (self.welch, "Welch")):
            if one:
                lines.append(f"  {kind:<18}{one.mean:+.4f}, 95 % interval {one.low:+.4f} to {one.high:+.4f}, "
                             f"t {one.t:.2f} on {one.df:.1f} degrees of freedom, {p_in_words(one.p)}")
        better = "lower, so better" if test.mean < 0 else "higher, so worse"
        lines.append(f"  {self.b.name} is {better}" if test.p < 0.05 else
                     "  no difference shown; that is not the same as none")
        if test.error > 0:
            lines.append(f"  so many runs find a true difference of "
                         f"{significance.smallest_effect(test.error, test.df):.4f} four times in five"
                         + self.runs_for(abs(self.effect or test.mean), test))
        return lines

    def of_one_run(self, a: list[float], b: list[float]) -> str:
        """What can be said where one side, or both, have a single run."""
        difference = f"  difference {fmean(b) - fmean(a):+.4f}"
        many, group, one = (a, self.a, self.b) if len(a) > len(b) else (b, self.b, self.a)
        if len(many) == 1 or not stdev(many):
            return f"{difference}; one run a side does not tell it from chance: repeat both with more seeds"
        sigmas = abs(fmean(b) - fmean(a)) / stdev(many)
        return (f"{difference}, {sigmas:.1f} standard deviations of {group.name}; {one.name} is a single "
                "run: repeat it with more seeds")

    def runs_for(self, effect: float, test: significance.Difference) -> str:
        """How many runs find an effect, beside those that are there."""
        if not effect:
            return ""
        unit, have = ("pairs", [len(self.seeds)]) if self.paired else (
            "runs a side", [len(self.a.finished), len(self.b.finished)])
        try:
            needed = significance.runs_needed(effect, test.sd, is_paired=bool(self.paired))
        except ValueError:
            return f"; one of {effect:.4f} would take more than 10,000 {unit}"
        more = [max(0, needed - number) for number in have]
        missing = f", {more[0]} more"
        if not self.paired:
            missing += f" of {self.a.name} and {more[1]} more of {self.b.name}"
        return f"; one of {effect:.4f} takes {needed} {unit}{missing if any(more) else ''}"


def compare(a: Group, b: Group, metric: str, effect: float = 0.0) -> Comparison:
    first, second = a.by_seed(metric), b.by_seed(metric)
    seeds = sorted(set(first) & set(second))
    welch = paired = None
    if min(len(a.finished), len(b.finished)) > 1:
        welch = significance.welch(a.values(metric), b.values(metric))
        if len(seeds) == min(len(first), len(second)) > 1:
            paired = significance.paired([first[seed] for seed in seeds], [second[seed] for seed in seeds])
    return Comparison(a, b, metric, seeds, welch, paired, effect)


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def p_in_words(p: float) -> str:
    return f"p {p:.2g}" if p >= 0.001 else "p below 0.001"


def target_line(group: Group, metric: str, target: float) -> str:
    """Whether a group reaches a target on average, by the speedruns' test."""
    values = group.values(metric)
    if any(run.summary.get("target") for run in group.finished):
        return (f"{group.name}: its runs ended when they reached --target_loss, so their last losses prove "
                "nothing; train them to the end of their budget")
    if len(values) < 2:
        return f"{group.name}: {metric} {values[0]:.4f}, the target {target:g}; a test takes two runs"
    p = significance.p_below(values, target)
    verdict = "reached" if p < 0.01 else "not shown to be reached"
    return (f"{group.name}: mean {metric} {fmean(values):.4f} of {len(values)} runs; the target {target:g} "
            f"is {verdict} ({p_in_words(p)}, one-sided; the speedruns ask for less than 0.01)")


def benchmark_lines(a: Group, b: Group) -> list[str]:
    """McNemar's test on the questions of each benchmark that runs of both groups were scored on."""
    return [line for name in benchmarks_of([a]) if name in benchmarks_of([b])
            for line in mcnemar_lines(a, b, name)]


def mcnemar_lines(a: Group, b: Group, name: str) -> list[str]:
    """The test for each pair of runs that belong together; of models, not recipes."""
    runs_a, runs_b = ([run for run in group.finished if run.items(name)] for group in (a, b))
    seeds_b = {run.summary["seed"]: run for run in runs_b}
    pairs = [(run, seeds_b[run.summary["seed"]]) for run in runs_a if run.summary["seed"] in seeds_b]
    if not pairs and len(runs_a) == len(runs_b) == 1:
        pairs = [(runs_a[0], runs_b[0])]
    lines = []
    for first, second in pairs:
        items = [run.items(name) for run in (first, second)]
        if len({tuple(item["name"] for item in rows) for rows in items}) > 1:
            lines.append(f"  {name}: {first.name} and {second.name} were scored on different rows")
            continue
        a_right, b_right = ([item["acc"]["choice"] == item["label"] for item in rows] for rows in items)
        test = significance.mcnemar(a_right, b_right)
        lines.append(f"  {name}, {second.name} against {first.name}: {sum(b_right):,} against "
                     f"{sum(a_right):,} of {len(a_right):,} right; {test.only_b:,} only by the former, "
                     f"{test.only_a:,} only by the latter, {p_in_words(test.p)} (McNemar)")
    return lines


def baseline(spec: str) -> Group:
    """All finished runs that a word of --compare_to means, as one group.

    raises  UserError if there are none
    """
    groups = open_groups([spec])
    runs = without_copies(run for group in groups for run in group.finished)
    if not runs:
        raise UserError(f"{spec} has no finished run to compare with")
    return Group(groups[0].name if len(groups) == 1 else spec, runs)


def standing(run: Run, spec: str, metric: str = "val_bpb") -> str:
    """How far a finished run is from a group, in its standard deviations; or why that cannot be said."""
    group = baseline(spec)
    others = [other for other in group.runs if other.folder.resolve() != run.folder.resolve()]
    group = Group(group.name, others)
    if not others:
        return f"no comparison with {group.name}: this run is all that it has"
    try:
        # bits per byte of one text are bits per byte, whatever the tokenizer and the data
        check_comparable([group, Group("this run", [run])], metric, ("data", "tokenizer"))
    except NotComparable as error:
        return f"no comparison with {group.name}: {error.problem}"
    values = group.values(metric)
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
    Column("tokens/s", lambda run: _last(run, "tokens_per_second"), lambda speed: f"{speed:,.0f}"),
    Column("peak MiB", lambda run: _last(run, "peak_memory_mib"), lambda mib: f"{mib:,.0f}"),
)


def benchmarks_of(groups: list[Group]) -> list[str]:
    """The names of all benchmarks that some run was scored on."""
    return list(dict.fromkeys(name for group in groups for run in group.runs for name in run.benchmarks))


def benchmark_columns(name: str) -> list[Column]:
    """Accuracy with its interval, and the perplexity where there is one."""
    def score(run: Run, key: str) -> object:
        return run.benchmarks.get(name, {}).get(key)
    return [Column(name, functools.partial(score, key="acc"),
                   lambda acc: f"{acc['value']:.3f} ({acc['low']:.3f}-{acc['high']:.3f})"),
            Column(f"{name} perplexity", functools.partial(score, key="perplexity"), "{:.2f}".format)]


def used_columns(groups: list[Group]) -> list[Column]:
    """Those in which some run has anything."""
    runs = [run for group in groups for run in group.runs]
    columns = [*COLUMNS, *(column for name in benchmarks_of(groups) for column in benchmark_columns(name))]
    return [column for column in columns if any(column.value(run) is not None for run in runs)]


def runs_table(groups: list[Group]) -> list[list[str]]:
    """A title line and a line for each run."""
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
        group = Group(folder.name, runs_in(folder))
        failures += [f"- `{run.folder.relative_to(experiments)}`: {run.status}" for run in group.runs
                     if not run.is_finished]
        if not group.finished:
            continue
        facts = group.finished[0].summary
        cells = [f"[{folder.name}]({folder.name}/)",
                 group.count,
                 facts.get("preset", ""), f"{median(group.values('tokens')) / 1e6:,.1f}M",
                 mean_and_spread(group.values("val_loss")), mean_and_spread(group.values("val_bpb")),
                 f"{median(group.values('tokens_per_second')):,.0f}",
                 f"{facts.get('processes', 1)} x {facts.get('device', '')}"]
        lines.append(f"| {' | '.join(cells)} |")
    if failures:
        lines += ["", "## Not finished", "", *failures]
    lines += ["", "What was tried for the recipe, losers included, is in [RECIPE.md](RECIPE.md); how it "
              "stands beside GPT-2 and Llama 3 in [YARDSTICK.md](YARDSTICK.md).", ""]
    return "\n".join(lines)


def mean_and_spread(values: list[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

def conclusions(groups: list[Group], metric: str, although: Iterable[str], effect: float) -> list[str]:
    """Each further group against the first, in words."""
    lines = []
    for group in groups[1:]:
        lines += [""] if lines else []
        lines += compare(groups[0], group, metric, effect).lines() + benchmark_lines(groups[0], group)
        differing = differences_of(groups[0].finished[0], group.finished[0])
        lines.append(f"  they differ in {'; '.join(differing) or 'nothing that the runs know of'}")
    return lines


@command
def main() -> None:
    parser = Parser("Compare runs: a table, statistics between groups, curves, a page.",
                    usage="%(prog)s EXP [EXP ...] [flags]",
                    formatter_class=lambda prog: Help(prog, max_help_position=24, width=110))
    parser.add_argument("runs", nargs="*", metavar="EXP",
                        help="a run folder, a glob, a folder of runs, or a group NAME=GLOB")
    parser.add_argument("--format", choices=("text", "markdown", "latex", "csv"), default="text",
                        help="of the tables")
    parser.add_argument("--metric", choices=("val_bpb", "val_loss"),
                        help="what is compared and drawn: val_bpb, or val_loss with --target")
    parser.add_argument("--although", choices=tuple(CONDITIONS), action="append", default=[],
                        help="compare although runs differ in this; may be repeated")
    parser.add_argument("--target", type=float, metavar="LOSS",
                        help="test whether each group reaches this value")
    parser.add_argument("--effect", type=float, default=0.0, metavar="DIFFERENCE",
                        help="say how many runs find so large a difference; 0: one as large as seen")
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
    if args.plot and not args.plot.name:
        raise UserError(f"--plot must be how file names begin, as in figures/demo; it is {args.plot}")
    metric = args.metric or ("val_bpb" if args.target is None else "val_loss")
    groups = open_groups(args.runs)
    finished = [group for group in groups if group.finished]
    # many single runs make a table; two of them, or groups, are also weighed against each other
    weighed = finished if len(finished) == 2 else [group for group in finished if not group.is_alone]
    said = [line for group in weighed for line in mixed(group)]
    problem = ""
    try:
        if weighed:
            check_comparable(weighed, metric, args.although)
            said += conclusions(weighed, metric, args.although, args.effect)
        if args.target is not None:
            said += ["", *(target_line(group, metric, args.target) for group in finished)]
    except NotComparable as error:
        problem = str(error)
    left_out = [group.name for group in finished if group not in weighed] if len(weighed) > 1 else []
    said += [f"not weighed, since single runs: {', '.join(left_out)}"] if left_out else []
    said += [f"{run.name}: {run.status}" for group in groups for run in group.runs if not run.is_finished]
    show = {"text": as_text, "markdown": as_markdown, "latex": as_latex}.get(args.format)
    if not show:
        print(as_csv(groups))
    else:
        print(show(runs_table(groups)))
        if not problem and any(len(group.runs) > 1 for group in groups):
            print("\n" + show(groups_table(groups)))
    if said:
        out = sys.stdout if args.format == "text" else sys.stderr   # a paper takes the table alone
        print("\n" + "\n".join(said).strip("\n"), file=out)
    written = []
    if args.plot:
        from curves import save_curves
        written += save_curves(groups, metric, args.plot)
    if args.html:
        from page import page
        args.html.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.html, page(groups, metric, [*said, problem]))
        written.append(args.html)
    for path in written:
        print(f"wrote {os.path.relpath(path)}", file=sys.stderr)
    if problem:
        raise UserError(problem)


if __name__ == "__main__":
    main()
