"""Conclusions about groups of runs, in sentences.

compare() compares two groups, standing() compares one run with a group. The statistics come from
significance.py.
"""

import contextlib
import math
from dataclasses import asdict, dataclass
from statistics import fmean, stdev

from benchtop import significance
from benchtop.command_line import counted
from benchtop.errors import UserError
from benchtop.folder import HELD_OUT_FILE
from benchtop.groups import (
    Group,
    NotComparable,
    SavedRun,
    benchmarks_of,
    check_comparable,
    differences_of,
    open_groups,
    without_copies,
)
from benchtop.progress import COMPUTE, Multiplier, multiplier, multiplier_line

ROUNDING = 1e-9     # relative to the mean: a smaller spread counts as none, and no test is possible


@dataclass(frozen=True)
class Comparison:
    """Group b's metric compared with group a's; `welch` and `paired` are None where no test is possible.

    seeds           seeds that both groups have; the test is paired if the smaller group has no others
    effect          smallest difference that matters (--effect), to report the runs it needs; 0: not given
    over_documents  the interval that also covers the choice of held-out text, or why there is none; "" if no
                    run has held_out.csv
    multipliers     compute multipliers: how much less or more compute b needs than a
    """
    a: Group
    b: Group
    metric: str
    seeds: list[int]
    welch: significance.Difference | None
    paired: significance.Difference | None
    effect: float = 0.0
    over_documents: significance.OverDocuments | str = ""
    multipliers: tuple[Multiplier, ...] = ()

    @property
    def test(self) -> significance.Difference | None:
        """The paired test if there is one, else Welch's."""
        return self.paired or self.welch

    def lines(self) -> list[str]:
        """The comparison in words."""
        a, b = self.a.values(self.metric), self.b.values(self.metric)
        lines = [f"{self.b.name} against {self.a.name}, {self.metric}: {fmean(b):.4f} "
                 f"({counted(len(b), 'run')}) against {fmean(a):.4f} ({counted(len(a), 'run')})"]
        test = self.test
        if not test:
            return [*lines, self.without_test(a, b), *self.lines_on_documents(), *self.lines_on_compute()]
        for one, kind in ((self.paired, f"paired by {len(self.seeds)} seeds"), (self.welch, "Welch")):
            if one:
                lines.append(f"  {kind:<18}{one.mean:+.4f}, 95 % interval {one.low:+.4f} to {one.high:+.4f}, "
                             f"t = {one.t:.2f} with {one.df:.1f} degrees of freedom, {p_in_words(one.p)}")
        lines += self.lines_on_documents()
        better = "lower, so better" if test.mean < 0 else "higher, so worse"
        better += ", on this held-out text; on other text it may not be" if self.depends_on_text else ""
        lines.append(f"  {self.b.name} is {better}" if test.p < 0.05 else
                     "  no significant difference, which does not show that there is none")
        return lines + self.power_lines(test) + self.lines_on_compute()

    @property
    def depends_on_text(self) -> bool:
        """Whether the interval over documents includes 0: the difference may vanish on other text."""
        found = self.over_documents
        return not isinstance(found, str) and found.low < 0 < found.high

    def lines_on_documents(self) -> list[str]:
        """A line with the interval that covers the choice of held-out documents, or why there is none."""
        found = self.over_documents
        if isinstance(found, str):
            return [f"  no interval over documents: {found}"] if found else []
        kind, over, more = (
            ("seeds and text", "seeds and ", "intervals above cover seeds only") if found.covers_seeds else
            ("text alone", "", "for these models only, not for other seeds"))
        return [f"  {kind:<18}{found.mean:+.4f}, 95 % interval {found.low:+.4f} to {found.high:+.4f}, over "
                f"{over}held-out documents ({found.documents:,}, bootstrap); {more}"]

    def facts(self) -> dict:
        """The comparison as a dict for JSON; None where a value is unknown."""
        found, test = self.over_documents, self.test
        tests = {kind: one and {"mean": one.mean, "low": one.low, "high": one.high, "t": one.t, "df": one.df,
                                "p": one.p, "error": one.error, "sd": one.sd}
                 for kind, one in (("paired", self.paired), ("welch", self.welch))}
        return {"baseline": self.a.name, "group": self.b.name, "metric": self.metric, "seeds": self.seeds,
                "difference": fmean(self.b.values(self.metric)) - fmean(self.a.values(self.metric)),
                "test": test and ("paired" if self.paired else "welch"), **tests,
                "power": test and self.power(test),
                "over_documents": None if isinstance(found, str) else asdict(found),
                "over_documents_problem": found if isinstance(found, str) else "",
                "compute_multipliers": [asdict(one) for one in self.multipliers],
                "differing": differences_of(self.a.finished[0], self.b.finished[0])}

    def power(self, test: significance.Difference) -> dict:
        """The smallest difference these runs detect with 80 % power, and the runs that --effect needs."""
        needed = None
        if self.effect:
            with contextlib.suppress(ValueError):       # more than 10,000 runs
                needed = significance.runs_needed(self.effect, test.sd, bool(self.paired), test.df_per_run)
        return {"detectable_difference": significance.smallest_effect(test.error, test.df),
                "effect": self.effect or None, "runs_needed": needed}

    def lines_on_compute(self) -> list[str]:
        if not self.multipliers:
            return []
        return [multiplier_line(self.a.name, self.b.name, self.metric, list(self.multipliers))]

    def without_test(self, a: list[float], b: list[float]) -> str:
        """The line where no test is possible: a group has a single run, or the runs have no spread."""
        difference = f"  difference {fmean(b) - fmean(a):+.4f}"
        if min(len(a), len(b)) > 1:
            return (f"{difference}; the runs of each group agree to the last digit, whatever their seed, so "
                    "there is no spread to test against")
        many, group, one = (a, self.a, self.b) if len(a) > len(b) else (b, self.b, self.a)
        if len(many) == 1 or not stdev(many):
            return f"{difference}; one run per side cannot tell this from chance: repeat both with more seeds"
        sigmas = abs(fmean(b) - fmean(a)) / stdev(many)
        return (f"{difference}, {sigmas:.1f} standard deviations of {group.name}; {one.name} is a single "
                "run: repeat it with more seeds")

    def power_lines(self, test: significance.Difference) -> list[str]:
        """The smallest difference that these runs can detect, and how many runs --effect needs.

        Never for the observed effect: its power says no more than its p value, and tempts people to add runs
        until p is small.
        """
        have = [len(self.seeds)] if self.paired else [len(self.a.finished), len(self.b.finished)]
        runs = f"{have[0]} pairs" if self.paired else " and ".join(map(str, have)) + " runs"
        line = (f"  With {runs}, the smallest difference detectable with 80 % power is "
                f"{significance.smallest_effect(test.error, test.df):.4f}.")
        return [line + (f" {self.runs_for(abs(self.effect), test, have)}" if self.effect else "")]

    def runs_for(self, effect: float, test: significance.Difference, have: list[int]) -> str:
        """How many runs an effect needs, and how many of them are still missing."""
        unit = "pairs" if self.paired else "runs per group"
        try:
            needed = significance.runs_needed(effect, test.sd, bool(self.paired), test.df_per_run)
        except ValueError:
            return f"Detecting {effect:.4f} would need more than 10,000 {unit}."
        more = [max(0, needed - number) for number in have]
        missing = f" ({more[0]:,} more"
        if not self.paired:
            missing += f" of {self.a.name}, {more[1]:,} more of {self.b.name}"
        return f"Detecting {effect:.4f} would need {needed:,} {unit}{f'{missing})' if any(more) else ''}."


def compare(a: Group, b: Group, metric: str, effect: float = 0.0) -> Comparison:
    first, second = a.by_seed(metric), b.by_seed(metric)
    seeds = sorted(set(first) & set(second))
    welch = paired = None
    if min(len(a.finished), len(b.finished)) > 1:
        welch = significance.welch(a.values(metric), b.values(metric))
        if len(seeds) == min(len(first), len(second)) > 1:
            paired = significance.paired([first[seed] for seed in seeds], [second[seed] for seed in seeds])
        least = ROUNDING * fmean(a.values(metric))
        welch, paired = (one if one and one.error > least else None for one in (welch, paired))
    shared = seeds if paired else []
    return Comparison(a, b, metric, seeds, welch, paired, effect,
                      compare_documents(a, b, metric, shared, paired or welch),
                      tuple(filter(None, (multiplier(a, b, axis, metric) for axis in COMPUTE))))


# metric -> columns of held_out.csv with a document's nats and size, and the nats per unit of the metric
OF_DOCUMENTS = {"val_bpb": ("text_nats", "bytes", math.log(2)), "val_loss": ("nats", "tokens", 1.0)}


def compare_documents(a: Group, b: Group, metric: str, seeds: list[int], test: significance.Difference | None,
                      ) -> significance.OverDocuments | str:
    """The difference with an interval over documents and seeds, or why there is none; "" if no run has any.

    seeds  seeds whose runs are paired; empty: all runs of both groups
    """
    both = [[run for run in group.finished if not seeds or run.summary["seed"] in seeds] for group in (a, b)]
    runs = [run for group in both for run in group]
    try:
        without = [run.name for run in runs if not run.documents]
        if without:
            return f"{without[0]} has no {HELD_OUT_FILE}" if len(without) < len(runs) else ""
    except UserError as error:
        return str(error)
    nats, unit, scale = OF_DOCUMENTS[metric]
    sizes = runs[0].documents[unit]
    other = next((run for run in runs if run.documents[unit] != sizes), None)
    if other:
        return f"the documents of {runs[0].name} and {other.name} differ in size ({unit})"
    if sum(size > 0 for size in sizes) < 2:
        return "all held-out text is one document"
    means = [[fmean(values) for values in zip(*(run.documents[nats] for run in group), strict=True)]
             for group in both]
    differences = [second - first for first, second in zip(*means, strict=True)]
    return significance.over_documents(differences, [scale * size for size in sizes],
                                       *((test.error, test.df) if test else ()))


def p_in_words(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.001 else "p below 0.001"


def target_line(group: Group, metric: str, target: float) -> str:
    """Whether a group's mean reaches a target, by the one-sided test of Modded-NanoGPT's speedruns."""
    values = group.values(metric)
    if any(run.summary.get("target") for run in group.finished):
        return (f"{group.name}: its runs stopped when they reached --target_loss, so their final losses "
                "prove nothing; train them to the end of their budget")
    if len(values) < 2:
        return (f"{group.name}: {metric} {values[0]:.4f}, target {target:g}; a test needs at least two "
                "runs")
    if stdev(values) < ROUNDING * fmean(values):
        return (f"{group.name}: all {len(values)} runs have {metric} {values[0]:.4f} to the last digit, "
                f"whatever their seed, target {target:g}; a test needs a spread")
    p = significance.p_below(values, target)
    verdict = "reached" if p < 0.01 else "not shown to be reached"
    return (f"{group.name}: mean {metric} {fmean(values):.4f} of {len(values)} runs; the target {target:g} "
            f"is {verdict} ({p_in_words(p)}, one-sided; the speedruns require p below 0.01)")


def benchmark_lines(a: Group, b: Group) -> list[str]:
    """McNemar's test on the questions of each benchmark that both groups have scores for."""
    return [line for name in benchmarks_of([a]) if name in benchmarks_of([b])
            for line in mcnemar_lines(a, b, name)]


def mcnemar_lines(a: Group, b: Group, name: str) -> list[str]:
    """A test for each pair of runs with the same seed (or one run each); it compares models, not recipes."""
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
    """All finished runs that --compare_to names, as one group.

    raises  UserError if there are none
    """
    groups = open_groups([spec])
    runs = without_copies(run for group in groups for run in group.finished)
    if not runs:
        raise UserError(f"{spec} has no finished run to compare with")
    return Group(groups[0].name if len(groups) == 1 else spec, runs)


def standing(run: SavedRun, spec: str, metric: str = "val_bpb") -> str:
    """How many standard deviations a finished run is from a group's mean, or why that is unknown."""
    group = baseline(spec)
    others = [other for other in group.runs if other.folder.resolve() != run.folder.resolve()]
    group = Group(group.name, others)
    if not others:
        return f"no comparison with {group.name}: it has no run but this one"
    try:
        # bits per byte of the same text are comparable across tokenizers and training data
        check_comparable([group, Group("this run", [run])], metric, ("data", "tokenizer"))
    except NotComparable as error:
        return f"no comparison with {group.name}: {error.problem}"
    values = group.values(metric)
    above = run.summary[metric] - fmean(values)
    side = "above" if above > 0 else "below"
    if len(values) < 2 or not stdev(values):
        return (f"{metric} is {abs(above):.4f} {side} {group.name} ({counted(len(values), 'run')}, so no "
                "standard deviation)")
    return (f"{metric} is {abs(above):.4f} {side} {group.name}, {abs(above) / stdev(values):.1f} standard "
            f"deviations ({counted(len(values), 'run')}: mean {fmean(values):.4f}, standard deviation "
            f"{stdev(values):.4f})")


def compare_all(groups: list[Group], metric: str, effect: float = 0.0) -> list[Comparison]:
    """Compare each further group with the first."""
    return [compare(groups[0], group, metric, effect) for group in groups[1:]]


def conclusions(groups: list[Group], compared: list[Comparison]) -> list[str]:
    """The comparisons of compare_all in words, then notes that concern all of them."""
    lines = []
    for one in compared:
        lines += [""] if lines else []
        lines += one.lines() + benchmark_lines(one.a, one.b)
        differing = differences_of(one.a.finished[0], one.b.finished[0])
        lines.append(f"  they differ in {'; '.join(differing) or 'nothing that the runs recorded'}")
    notes = adjusted_lines(compared) + speed_lines(groups)
    return [*lines, "", *notes] if notes else lines


def facts_of(compared: list[Comparison]) -> list[dict]:
    """The comparisons of compare_all as dicts for JSON."""
    tested = [one for one in compared if one.test]
    adjusted = dict(zip([one.b.name for one in tested], significance.holm([one.test.p for one in tested]),
                        strict=True))
    return [one.facts() | {"p_holm": adjusted.get(one.b.name)} for one in compared]


def adjusted_lines(compared: list[Comparison]) -> list[str]:
    """A line with Holm-adjusted p values, if more than one comparison has a test."""
    tested = [one for one in compared if one.test]
    if len(tested) < 2:
        return []
    adjusted = significance.holm([one.test.p for one in tested])
    values = [f"{one.b.name} {p_in_words(p)}" + (", no longer below 0.05" if one.test.p < 0.05 <= p else "")
              for one, p in zip(tested, adjusted, strict=True)]
    return [f"{len(tested)} comparisons raise the chance of a false positive; adjusted for that (Holm): "
            + "; ".join(values)]


def noise_line(name: str, values: list[float], metric: str) -> str:
    """Mean and spread of a metric over seeds, and the smallest difference that such groups can detect."""
    if len(values) < 2:
        return f"{name}: {counted(len(values), 'run')} finished; a standard deviation needs at least two"
    low, high = significance.interval(values)
    smallest = significance.detectable_effect(stdev(values), len(values), len(values))
    return (f"{name}: mean {metric} {fmean(values):.4f} of {len(values)} runs (95 % interval {low:.4f} to "
            f"{high:.4f}), standard deviation {stdev(values):.4f}. Against as many runs of another recipe, "
            f"the smallest difference detectable with 80 % power is {smallest:.4f}.")


def speed_lines(groups: list[Group]) -> list[str]:
    """A warning if a change in the machine's speed could explain a difference in tokens/s.

    That is so if all runs of a group began before all runs of the first group, or all after them. Only runs
    whose folder names begin with a date tell when they began.
    """
    first, *others = ([run.began for run in group.finished] for group in groups)
    apart = [group.name for group, began in zip(groups[1:], others, strict=True)
             if all(first) and all(began) and len(first) + len(began) > 2
             and (max(first) < min(began) or max(began) < min(first))]
    return [f"{' and '.join(apart)} did not take turns with {groups[0].name}, so a difference in tokens/s "
            "may come from the machine"] if apart else []
