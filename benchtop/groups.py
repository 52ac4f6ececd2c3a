"""Runs read from their folders, groups of runs, and which runs may be compared.

A group is NAME=GLOB, or a folder of run folders, such as the committed experiments/demo; a trial is a folder
of groups. This module reads files and does no statistics.
"""

import csv
import difflib
import functools
import glob
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchtop import places
from benchtop.command_line import counted
from benchtop.errors import UserError
from benchtop.folder import HELD_OUT_COLUMNS, HELD_OUT_FILE, read_object
from benchtop.identity import NEUTRAL_KNOBS, name_some
from benchtop.shards import FEW_DOCUMENTS

# ------------------------------------------------------------------------------------------------
# Runs and groups
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SavedRun:
    """The content of a run folder. `summary` is empty while the run is unfinished."""
    folder: Path
    knobs: dict
    summary: dict

    @property
    def name(self) -> str:
        """The folder's path below experiments/ if it is there, else its name."""
        folder, home = self.folder.resolve(), places.EXPERIMENTS.resolve()
        return str(folder.relative_to(home)) if folder.is_relative_to(home) else folder.name

    @property
    def began(self) -> str:
        """The YYYYMMDD_HHMMSS that the folder's name begins with; empty if it has none, like a kept run."""
        date = re.match(r"\d{8}_\d{6}(?=_)", self.folder.resolve().name)
        return date[0] if date else ""

    @property
    def status(self) -> str:
        """finished, failed and why, or unfinished"""
        return " ".join(str(self.summary.get("status", "unfinished")).split())

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    @functools.cached_property
    def rows(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, without empty cells.

        raises  UserError if it is not what a run writes
        """
        path = self.folder / "metrics.csv"
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                return [{column: float(cell) for column, cell in row.items() if cell}
                        for row in csv.DictReader(file)]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{path} is not a valid run file ({error})") from error

    @functools.cached_property
    def documents(self) -> dict[str, list[float]]:
        """The columns of held_out.csv, a value for each held-out document; empty if there is no such file.

        raises  UserError if it is not what a run writes or does not add up to the run's val_loss and val_bpb
        """
        path = self.folder / HELD_OUT_FILE
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                title, *rows = csv.reader(file)
            columns = dict(zip(title, map(list, zip(*[map(float, row) for row in rows], strict=True)),
                               strict=True))
        except FileNotFoundError:
            return {}
        except (ValueError, csv.Error) as error:
            raise UserError(f"{path} is not a valid run file ({error})") from error
        problem = problem_of_documents(columns, self.summary)
        if problem:
            raise UserError(f"{path} is not a valid run file: {problem}")
        return columns

    @functools.cached_property
    def samples(self) -> list[dict]:
        return texts_of(self.folder / "samples.jsonl")

    @property
    def bench(self) -> dict[str, str]:
        """The hash of each file of the bench; empty for runs made before these were recorded."""
        return self.summary.get("bench") or {}

    @property
    def benchmarks(self) -> dict[str, dict]:
        """The run's results on benchmarks, by name."""
        return self.summary.get("benchmarks") or {}

    def items(self, benchmark: str) -> list[dict]:
        """The rows of a benchmark that the run was scored on: name, label, and the choice by each metric."""
        path = self.folder / f"{benchmark}.jsonl"
        items = lines_of(path)
        for item in items:
            if not ({"name", "label"} <= item.keys() and isinstance(item.get("acc"), dict)
                    and "choice" in item["acc"]):
                raise UserError(f"{path} is not a valid run file: each line needs name, label and acc")
        return items


def lines_of(path: Path) -> list[dict]:
    """The objects in a .jsonl file of a run folder; none if it is missing.

    raises  UserError if it holds anything else
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")    # splitlines() would cut at U+2028 in a sample
        rows = [json.loads(line) for line in lines if line]
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a valid run file ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is not a valid run file: each line must be an object")
    return rows


def texts_of(path: Path) -> list[dict]:
    """The prompts and texts in a .jsonl file of a run folder; none if it is missing."""
    rows = lines_of(path)
    if not all(isinstance(row.get(field), str) for row in rows for field in ("prompt", "text")):
        raise UserError(f"{path} is not a valid run file: each line needs a prompt and a text")
    return rows


# fields of a summary: numbers that every finished run has, further numbers, objects, texts
MEASURED = ("seed", "tokens", "train_seconds", "val_loss", "val_bpb", "tokens_per_second")
COUNTED = ("parameters", "cost", "held_out_documents", "held_out_tokens", "peak_memory_mib")
NAMED = ("sources", "bench", "benchmarks")
WORDS = ("script", "data", "tokenizer", "device", "code_sha256", "bench_sha256", "data_sha256",
         "tokenizer_sha256", "held_out_sha256")


def read_run(folder: Path) -> SavedRun:
    """raises  UserError if the folder's files are not what a run writes"""
    path = folder / "summary.json"
    summary = read_object(path) if path.is_file() else {}
    run = SavedRun(folder, read_object(folder / "config.json"), summary)
    problem = problem_of(summary)
    if not problem and run.knobs.get("gpu_cost_per_hour") and not is_measured(run.knobs["gpu_cost_per_hour"]):
        path, problem = folder / "config.json", "its gpu_cost_per_hour is not a finite number >= 0"
    if problem:
        raise UserError(f"{path} is not a valid run file: {problem}")
    last = run.rows[-1].get("step") if run.rows else None
    if run.is_finished and (folder / "metrics.csv").is_file() and last != summary.get("step", last):
        raise UserError(f"{folder / 'metrics.csv'} is cut off or damaged: its rows end at step {last}, the "
                        f"run at {summary['step']}")
    return run


def problem_of(summary: dict) -> str:
    """What is wrong with a summary; empty if nothing is."""
    finished = summary.get("status") == "finished"
    missing = [fact for fact in MEASURED if summary.get(fact) is None]
    if finished and missing:
        return f"it lacks {missing[0]}"
    if type(summary.get("seed", 0)) is not int:
        return f"its seed is {summary['seed']!r}, not a whole number"
    for fact in (*MEASURED, *COUNTED):
        value = summary.get(fact)
        # a failed run may have a loss that is not finite
        right = is_measured(value) or (not finished and isinstance(value, float))
        if fact != "seed" and value is not None and not right:
            return f"its {fact} is {str(value)[:40]}, not a finite number >= 0"
    for fact in NAMED:
        if not isinstance(summary.get(fact, {}), dict):
            return f"its {fact} is not an object"
    for fact in WORDS:
        if not isinstance(summary.get(fact, ""), str | None):
            return f"its {fact} is {str(summary[fact])[:40]}, not a string"
    for name, result in summary.get("benchmarks", {}).items():
        parts = result.get("acc") if isinstance(result, dict) else None
        if not isinstance(parts, dict) or not all(is_measured(parts.get(part), 1)
                                                  for part in ("value", "low", "high")):
            return f"its accuracy on {name} must have value, low and high from 0 to 1"
        if not is_measured(result.get("perplexity", 1)):
            return f"its perplexity on {name} is {str(result['perplexity'])[:40]}, not a number >= 0"
    return ""


def problem_of_documents(columns: dict[str, list[float]], summary: dict) -> str:
    """What is wrong with a held_out.csv; empty if nothing is."""
    if tuple(columns) != HELD_OUT_COLUMNS:
        return f"its columns are {name_some(list(columns))}"
    if columns["document"] != list(range(len(columns["document"]))):
        return "its documents are not numbered 0, 1, 2, ..."
    if not all(is_measured(value) for values in columns.values() for value in values):
        return "it has a value that is not a finite number >= 0"
    tokens, num_bytes, nats, text_nats = (sum(columns[name]) for name in HELD_OUT_COLUMNS[1:])
    for fact, whole, part in (("val_loss", tokens, nats), ("val_bpb", num_bytes, text_nats / math.log(2))):
        # up to the rounding of each document's values
        if not math.isclose(part, whole * summary.get(fact, math.nan), rel_tol=1e-6):
            return f"it does not add up to the run's {fact}"
    return ""


def is_measured(value: object, most: float = 1e300) -> bool:
    """Whether this is a number from 0 to `most`, neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


@dataclass(frozen=True)
class Group:
    """Runs of one configuration with several seeds, or a single run that was named on its own."""
    name: str
    runs: list[SavedRun]
    is_alone: bool = False

    @property
    def finished(self) -> list[SavedRun]:
        return [run for run in self.runs if run.is_finished]

    @property
    def count(self) -> str:
        """The number of finished runs, followed by `of` the number of all if some are not finished."""
        finished = len(self.finished)
        return str(finished) if finished == len(self.runs) else f"{finished} of {len(self.runs)}"

    def values(self, metric: str) -> list[float]:
        return [run.summary[metric] for run in self.finished]

    def by_seed(self, metric: str) -> dict[int, float]:
        """The metric by seed; empty if two runs share a seed."""
        runs = {run.summary["seed"]: run.summary[metric] for run in self.finished}
        return runs if len(runs) == len(self.finished) else {}


def benchmarks_of(groups: list[Group]) -> list[str]:
    """The names of all benchmarks that any run was scored on."""
    return list(dict.fromkeys(name for group in groups for run in group.runs for name in run.benchmarks))


def open_groups(specs: list[str]) -> list[Group]:
    """The groups that arguments of a command line name, each run once.

    raises  UserError if one names no run, all runs are damaged, or two groups share a run or a name
    """
    groups, seen = [], {}
    for spec in specs:
        name, found = "", matches(spec)
        if not found and "=" in spec:
            name, spec = spec.split("=", 1)
            found = matches(spec)
        holding = [folder for path in found for folder in holding_runs(path)]
        if len(specs) > 1 and not name and found and not holding:   # a README.md that * matched
            print(f"left out: {spec} is not a run folder", file=sys.stderr)
            continue
        if not holding:
            home = places.EXPERIMENTS
            known = [path.name for path in home.iterdir()] if home.is_dir() else []
            near = difflib.get_close_matches(Path(spec).name, known, n=1, cutoff=0.4)
            raise UserError(f"{spec or 'nothing'} is not a run folder and matches no run folder here or in "
                            "experiments/" + (f"; did you mean {near[0]}?" if near else ""))
        if name:
            groups.append(Group(name, without_copies(run for path in holding for run in runs_in(path))))
            continue
        for path in holding:
            alone = is_run(path)
            # a damaged run is an error if it is the only one named, else it is left out
            only = alone and len(specs) == len(holding) == 1
            runs = [read_run(path)] if only else without_copies(runs_in(path))
            called = runs[0].name if alone and runs else path.name if path in found else side_name(path)
            groups += [Group(called, runs, alone)] if runs else []
    if not any(group.runs for group in groups):
        raise UserError(f"{' '.join(specs)} has no run that can be read")
    for group in groups:
        for run in group.runs:
            other = seen.setdefault(run.folder.resolve(), group.name)
            if other != group.name:
                raise UserError(f"{run.name} is in two groups, {other} and {group.name}; leave it out of one")
    names = [group.name for group in groups]
    double = next((name for name in names if names.count(name) > 1), None)
    if double:
        raise UserError(f"two groups are called {double}; rename one, as in a=GLOB")
    return groups


def without_copies(runs: Iterable[SavedRun]) -> list[SavedRun]:
    """Each run once, even if links or --keep gave it two names."""
    kept: list[SavedRun] = []
    known: dict[object, SavedRun] = {}      # by folder, and by what the summary says
    for run in runs:
        marks = [run.folder.resolve(), *([json.dumps(run.summary, sort_keys=True)] if run.summary else [])]
        twin = next((known[mark] for mark in marks if mark in known), None)
        if twin:
            print(f"left out: {run.name} is a copy of {twin.name}", file=sys.stderr)
            continue
        kept.append(run)
        known |= dict.fromkeys(marks, run)
    return kept


def matches(pattern: str) -> list[Path]:
    """What a path or glob matches: here, or in experiments/ if it matches no run here."""
    pattern = os.path.expanduser(pattern)
    here, there = ([where / path for path in sorted(glob.glob(pattern, root_dir=where))] if pattern else []
                   for where in (Path(), places.EXPERIMENTS))
    return there if not any(map(holding_runs, here)) and there else here


def runs_in(path: Path) -> list[SavedRun]:
    """The run in this folder, or the runs in its subfolders; damaged ones are left out with a message."""
    runs = []
    for folder in [path] if is_run(path) else sorted(path.iterdir()):
        try:
            runs += [read_run(folder)] if is_run(folder) else []
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
        except OSError as error:
            print(f"left out: {folder} cannot be read ({error.strerror})", file=sys.stderr)
    return runs


def is_run(folder: Path) -> bool:
    """Whether this is a run's folder, even a damaged one; no error if it cannot be read."""
    return os.path.lexists(folder / "config.json") or os.path.isfile(folder / "summary.json")


def holding_runs(path: Path) -> list[Path]:
    """This folder if it is a run or has runs in it; the sides of a trial, its baseline first; else []."""
    if is_run(path) or any(map(is_run, path.glob("*"))):
        return [path]
    if not (path / "plan.json").is_file():
        return []
    keys = read_object(path / "plan.json").get("keys")
    sides = [path / side for side in keys] if isinstance(keys, dict) else []
    return [side for side in sides if any(map(is_run, side.glob("*")))]


def side_name(side: Path) -> str:
    """The name of a trial's side: its folder's, or the trial's if the baseline is the only side with runs."""
    return side.name if len(holding_runs(side.parent)) > 1 else side.parent.name


# ------------------------------------------------------------------------------------------------
# What may be compared
# ------------------------------------------------------------------------------------------------

# what --although may name -> its field in a summary. Of the bench, only DECISIVE files count, which determine
# a run's numbers: what it trains on, in which order, for how long, how it computes, and how it is measured
CONDITIONS = {"data": "data_sha256", "tokenizer": "tokenizer_sha256", "tokens": "tokens", "bench": "bench"}
DECISIVE = tuple(f"{name}.py" for name in (
    "processes", "documents", "held_out", "tokenizer", "shards", "batches", "machine", "memory", "initial",
    "warm_up", "compiled_check", "recorded", "steps", "evaluation", "tasks", "scoring", "knobs", "budget",
    "saved", "run"))
# knobs that do not say what was trained
PERSONAL_KNOBS = ("model_name", "seed", *NEUTRAL_KNOBS)


class NotComparable(UserError):
    """Two runs whose numbers must not be compared.

    advice  what to do about it, such as flags of compare.py
    """

    def __init__(self, problem: str, advice: str):
        super().__init__(f"{problem}; {advice}")
        self.problem = problem


def check_comparable(groups: list[Group], metric: str, although: Iterable[str] = ()) -> None:
    """Check that the metric of all finished runs, within and between groups, can be compared.

    raises  NotComparable that names what forbids it
    """
    runs = [(group.name, run) for group in groups for run in group.finished]
    base_group, base = runs[0]
    for name, run in runs[1:]:
        pair = f"{base_group} ({base.name}) and {name} ({run.name})" if name != base_group else (
            f"two runs of {name} ({base.name}, {run.name})")
        differing = {condition: difference for condition in CONDITIONS if condition not in although
                     and (difference := describe_difference(base, run, condition))}
        same_text = validated_on_one_text(base, run)
        if differing:
            values = [f"{condition}: {difference}" for condition, difference in differing.items()]
            advice = "they were not validated on the same text either, so no flag makes them comparable"
            raise NotComparable(f"{pair} differ in {' and in '.join(values)}",
                                how_to_allow(list(differing)) if same_text else advice)
        if not same_text:
            raise NotComparable(f"{pair} were validated on different text",
                                "train them with the same held-out documents and --val_tokens")
        tokenizers = {run.summary.get("tokenizer_sha256") for run in (base, run)}
        if metric != "val_bpb" and len(tokenizers) > 1:
            raise NotComparable(f"{pair} have different tokenizers, so {metric} counts different tokens",
                                "use --metric val_bpb")


def describe_difference(first: SavedRun, second: SavedRun, condition: str) -> str:
    """How two runs differ in their data, tokenizer, tokens or bench; empty if they do not."""
    if condition == "bench":
        unhashed = [run.name for run in (first, second) if not run.bench]
        if len(unhashed) == 1:
            return f"{unhashed[0]} was made before bench hashes were kept"
        return ", ".join(name for name in differing_files([first, second]) if name in DECISIVE)
    if first.summary.get(CONDITIONS[condition]) == second.summary.get(CONDITIONS[condition]):
        return ""
    return f"{describe_condition(first, condition)} against {describe_condition(second, condition)}"


def describe_condition(run: SavedRun, condition: str) -> str:
    """A run's data, tokenizer or tokens, in readable form."""
    value, sha256 = run.summary.get(condition), str(run.summary.get(CONDITIONS[condition]))
    return f"{value:,}" if condition == "tokens" else f"{value} {sha256[:8]}"


def how_to_allow(conditions: list[str]) -> str:
    """Which flags to use to compare runs that differ in these conditions but share the held-out text."""
    allow = " ".join(f"--although {condition}" for condition in conditions)
    if "bench" in conditions:
        return f"if you know that this does not change the numbers, use {allow}"
    return (f"if that is intended, use {allow}" if conditions == ["tokens"] else
            f"bits per byte of the same held-out text can still be compared: {allow}")


def differing_files(runs: list[SavedRun]) -> list[str]:
    """The files of the bench that differ between these runs."""
    names = sorted({name for run in runs for name in run.bench})
    return [name for name in names if len({run.bench.get(name) for run in runs}) > 1]


def describe_bench(runs: list[SavedRun]) -> str:
    """One line on whether all runs used the same bench."""
    unhashed = [run.name for run in runs if not run.bench]
    if len(unhashed) == len(runs):
        return "these runs were made before bench hashes were kept; only the sources they name are compared"
    if unhashed:
        others = f" and {len(unhashed) - 1} more were" if len(unhashed) > 1 else " was"
        return f"the runs used different benches: {unhashed[0]}{others} made before bench hashes were kept"
    files = differing_files(runs)
    if not files:
        return f"all runs used the same bench ({(runs[0].summary.get('bench_sha256') or '')[:8]})"
    decisive = [name for name in files if name in DECISIVE]
    return (f"the runs used different benches: {name_some(files)} "
            f"{'differ' if len(files) > 1 else 'differs'}; "
            + (f"{' and '.join(decisive)} can change the numbers" if decisive else
               "none of these can change the numbers" if len(files) > 1 else "it cannot change the numbers"))


def validated_on_one_text(a: SavedRun, b: SavedRun) -> bool:
    hashes = [run.summary.get("held_out_sha256") for run in (a, b)]
    if all(hashes):
        return hashes[0] == hashes[1]
    # for runs made before the text was hashed: equal data and equal token counts mean the same text
    facts = [(run.summary.get("data_sha256"), run.summary.get("held_out_tokens")) for run in (a, b)]
    return facts[0] == facts[1]


def few_documents(runs: list[SavedRun]) -> list[str]:
    """A warning if runs were validated on so few documents that others could change the result."""
    counts = [count for run in runs if (count := run.summary.get("held_out_documents")) is not None]
    if not counts or min(counts) >= FEW_DOCUMENTS:
        return []
    return [f"warning: the held-out text has only {counted(min(counts), 'document')}; "
            "intervals cover the choice of seeds, not of text, so other text may rank them differently"]


def differences_of(first: SavedRun, second: SavedRun) -> list[str]:
    """How two runs differ in knobs, scripts and machine; describe_bench is for the bench."""
    found = [f"--{knob} {first.knobs.get(knob)!r} against {second.knobs.get(knob)!r}"
             for knob in {**first.knobs, **second.knobs}
             if knob not in PERSONAL_KNOBS and first.knobs.get(knob) != second.knobs.get(knob)]
    sources = [run.summary.get("sources", {}) for run in (first, second)]
    scripts = [run.summary.get("script", "") for run in (first, second)]
    if first.summary.get("code_sha256") != second.summary.get("code_sha256"):
        found.append(f"the script, {scripts[0]} against {scripts[1]}" if scripts[0] != scripts[1] else
                     f"the code of {scripts[0]}")
    if bool(first.bench) == bool(second.bench):     # else one run has the bench among its sources
        found += [f"the code of {name}" for name in sorted({*sources[0], *sources[1]} - set(scripts))
                  if sources[0].get(name) != sources[1].get(name)]
    facts = ["device", "processes", "dtype", "torch"]
    if "threads" in first.summary and "threads" in second.summary:      # earlier versions did not record it
        facts.append("threads")
    found += [f"{fact} {first.summary.get(fact)} against {second.summary.get(fact)}" for fact in facts
              if first.summary.get(fact) != second.summary.get(fact)]
    return found


def mixed(group: Group) -> list[str]:
    """A warning if runs of one group differ in more than their seed."""
    runs = group.finished
    other = next((run for run in runs[1:] if differences_of(runs[0], run)), None)
    return [] if not other else [f"{group.name} is mixed: {runs[0].name} and {other.name} differ in "
                                 + "; ".join(differences_of(runs[0], other))]
