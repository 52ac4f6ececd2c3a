"""Runs that are repeated with several seeds: which of them have ended, what is kept, what their spread is."""

import difflib
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from statistics import fmean, stdev

from benchtop import places, significance
from benchtop.command_line import counted
from benchtop.errors import UserError
from benchtop.files import sha256_of, write_text
from benchtop.groups import Group, SavedRun, read_run, runs_in
from benchtop.identity import bench_hashes, differing
from benchtop.signals import heard_by

KEPT = ("config.json", "summary.json", "metrics.csv", "held_out.csv", "samples.jsonl")


def ended_run(name: str, words: list[str]) -> SavedRun | None:
    """The newest run of this --model_name, if it finished or failed.

    raises  UserError if another command or other code made it
    """
    folders = [folder for folder in sorted(places.EXPERIMENTS.glob(f"*_{name}"))
               if (folder / "config.json").is_file() and (folder / "summary.json").is_file()]
    runs = [run for run in map(read_run, folders) if run.knobs.get("model_name") == name]
    if not runs or not runs[-1].summary:
        return None
    run, place = runs[-1], script_place(words)
    made, typed = run.summary.get("command", ""), [Path(words[place]).name, *words[place + 1:]]
    if made not in (shlex.join(typed), " ".join(typed)):        # as earlier versions wrote it
        raise UserError(f"{run.name} was made by another command, {made}; take another --name, or move that "
                        "run away")
    changed = changed_code(run)
    if changed:
        raise UserError(f"{', '.join(changed)} changed since {run.name} was made; take another --name, so "
                        "that all seeds run the same code, or move that run away")
    return run


def changed_code(run: SavedRun) -> list[str]:
    """The files that are no longer as they were when a run was made: its scripts, and the bench."""
    sources = run.summary.get("sources", {})
    changed = [source for source, sha256 in sources.items()
               if not (places.ROOT / source).is_file() or sha256_of(places.ROOT / source) != sha256]
    if run.bench:       # earlier runs name what they used of it among their sources
        changed += [f"benchtop/{name}" for name in differing(run.bench, bench_hashes())]
    return changed


def script_place(words: list[str]) -> int:
    """Where in a command the training script stands."""
    place = next((place for place, word in enumerate(words)
                  if word.endswith(".py") and "torch/distributed" not in word), None)
    if place is None:
        raise UserError("the command after -- must run a script, as in: -- python train_gpt.py --preset demo")
    return place


def run_seed(words: list[str]) -> int:
    """Run a command to its end; stop signals are passed on, so that it saves. Its exit code."""
    process = None

    def pass_on(number: int, _frame) -> None:
        if process and number != signal.SIGINT:     # Ctrl-C reaches it by itself
            process.send_signal(number)
    with heard_by(pass_on):
        process = subprocess.Popen(words)
        return process.wait()


def check_room(runs: list[SavedRun], folder: Path) -> None:
    """raises  UserError if the folder to keep these runs in, and those yet to come, holds other runs"""
    if (folder / "config.json").exists():
        raise UserError(f"{folder} is a run itself; take another name for --keep")
    summaries = [run.summary for run in runs]
    there = runs_in(folder) if folder.is_dir() else []
    strange = [run.name for run in there if run.summary not in summaries]
    if strange:
        raise UserError(f"{folder} already holds other runs ({', '.join(strange)}); move them away, or take "
                        "another name for --keep")


def copy_small(run: SavedRun, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of these files of a run that it has."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, target / name)


def keep(runs: list[SavedRun], folder: Path) -> None:
    """Copy what is small of these runs to seed0, seed1, ..., and what their script changes in train_gpt.py,
    if it is a copy of that.

    raises  UserError if the folder holds other runs
    """
    check_room(runs, folder)
    for run in runs:
        copy_small(run, folder / f"seed{run.knobs['seed']}", KEPT)
    script = str(runs[0].summary.get("script", "train_gpt.py"))
    if "train_gpt.py" not in runs[0].summary.get("sources", {"train_gpt.py": ""}):     # it is a changed copy
        sides = [path.read_text(encoding="utf-8").splitlines(keepends=True)
                 for path in (places.ROOT / "train_gpt.py", runs[0].folder / f"{Path(script).stem}.txt")]
        write_text(folder / "changes.diff", "".join(difflib.unified_diff(*sides, "train_gpt.py", script)))


def verdict(group: Group) -> str:
    """Mean and spread of a group, and what they are good for."""
    values = group.values("val_bpb")
    if len(values) < 2:
        return (f"{group.name}: {len(values)} of {counted(len(group.runs), 'run')} finished; a standard "
                "deviation needs at least two")
    low, high = significance.interval(values)
    smallest = significance.detectable_effect(stdev(values), len(values), len(values))
    return (f"{group.name}: mean val_bpb {fmean(values):.4f} of {len(values)} runs (95 % interval {low:.4f} "
            f"to {high:.4f}), standard deviation {stdev(values):.4f}. Compared with as many runs of another "
            f"recipe, the smallest difference detectable with 80 % power is {smallest:.4f}.")
