"""Repeat a run with several seeds; what is finished is skipped, what was cut off goes on.

    python seeds.py 8 --name demo -- python train_gpt.py --preset demo
    python seeds.py 5 --name gelu --keep gelu -- python my_experiment.py --preset demo
    python compare.py demo 'gelu=experiments/*_gelu_seed*'

The command after -- is run as it is, with --seed, --model_name and --resume auto behind it, once for each
seed from 0 on. So kill this, start it again, and it goes on where it was; ask for more seeds later, and only
those are run. A run that diverged stays as a failure and is counted. At the end stand the runs, their mean
and their spread. --keep copies what is small of each run to experiments/NAME/seedN, to be committed, with
the changes that the script has against train_gpt.py.
"""

import difflib
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import significance
from compare import Group, Run, as_text, check_comparable, groups_table, read_run, runs_in, runs_table
from documents import Parser, UserError, command, positive, sha256_of
from run_folder import EXPERIMENTS, ROOT

KEPT = ("config.json", "summary.json", "metrics.csv", "samples.jsonl")


def ended_run(name: str, words: list[str]) -> Run | None:
    """The newest run of this --model_name, if it finished or failed.

    raises  UserError if another command or other code made it
    """
    folders = [folder for folder in sorted(EXPERIMENTS.glob(f"*_{name}"))
               if (folder / "config.json").is_file() and (folder / "summary.json").is_file()]
    runs = [run for run in map(read_run, folders) if run.knobs.get("model_name") == name]
    if not runs or not runs[-1].summary:
        return None
    run, place = runs[-1], script_place(words)
    made = run.summary.get("command", "")
    if made != " ".join([Path(words[place]).name, *words[place + 1:]]):
        raise UserError(f"{run.name} was made by {made}; take another --name, or move it away")
    sources = run.summary.get("sources", {})
    changed = [source for source, sha256 in sources.items()
               if not (ROOT / source).is_file() or sha256_of(ROOT / source) != sha256]
    if changed:
        raise UserError(f"{', '.join(changed)} changed since {run.name} was made; take another --name, so "
                        "that all seeds are of one code, or move it away")
    return run


def script_place(words: list[str]) -> int:
    """Where in a command the training script stands."""
    place = next((place for place, word in enumerate(words)
                  if word.endswith(".py") and "torch/distributed" not in word), None)
    if place is None:
        raise UserError("the command after -- must run a script, as in: -- python train_gpt.py --preset demo")
    return place


def run_seed(words: list[str]) -> int:
    """Run a command to its end; SIGTERM is passed on, so that it saves. Its exit code."""
    process = subprocess.Popen(words)

    def pass_on(number: int, _frame) -> None:
        process.send_signal(number)
    before = signal.signal(signal.SIGTERM, pass_on), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return process.wait()       # Ctrl-C reaches the process by itself
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def check_room(runs: list[Run], folder: Path) -> None:
    """raises  UserError if the folder to keep these runs in, and those yet to come, holds other runs"""
    if (folder / "config.json").exists():
        raise UserError(f"{folder} is a run itself; take another name for --keep")
    summaries = [run.summary for run in runs]
    there = runs_in(folder) if folder.is_dir() else []
    strange = [run.name for run in there if run.summary not in summaries]
    if strange:
        raise UserError(f"{', '.join(strange)} of an earlier time would stand among these runs; move it "
                        "away, or take another name for --keep")


def keep(runs: list[Run], folder: Path) -> None:
    """Copy what is small of these runs to seed0, seed1, ..., and what their script changes in train_gpt.py,
    if it is a copy of that.

    raises  UserError if the folder holds other runs
    """
    check_room(runs, folder)
    for run in runs:
        target = folder / f"seed{run.knobs['seed']}"
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (run.folder / name).is_file():
                shutil.copyfile(run.folder / name, target / name)
    script = str(runs[0].summary.get("script", "train_gpt.py"))
    if "train_gpt.py" not in runs[0].summary.get("sources", {"train_gpt.py": ""}):     # it is a changed copy
        sides = [path.read_text(encoding="utf-8").splitlines(keepends=True)
                 for path in (ROOT / "train_gpt.py", runs[0].folder / f"{Path(script).stem}.txt")]
        (folder / "changes.diff").write_text("".join(difflib.unified_diff(*sides, "train_gpt.py", script)))


def verdict(group: Group) -> str:
    """Mean and spread of a group, and what they are good for."""
    values = group.values("val_bpb")
    if len(values) < 2:
        return f"{group.name}: {len(values)} finished of {len(group.runs)}; a spread takes two"
    low, high = significance.interval(values)
    smallest = significance.detectable_effect(stdev(values), len(values), len(values))
    return (f"{group.name}: val_bpb {fmean(values):.4f} on average of {len(values)} runs (95 % interval "
            f"{low:.4f} to {high:.4f}), standard deviation {stdev(values):.4f}; beside as many runs of "
            f"another recipe, a true difference of {smallest:.4f} would be found four times in five")


@command
def main() -> None:
    parser = Parser("Repeat a run with several seeds.",
                    usage="%(prog)s N --name NAME [--keep NAME] -- COMMAND")
    parser.add_argument("seeds", type=positive, metavar="N", help="how many: 0 to N - 1")
    parser.add_argument("--name", required=True, help="of the runs: NAME_seed0, NAME_seed1, ...")
    parser.add_argument("--keep", default="", metavar="NAME", help="copy small results to experiments/NAME")
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:place])
    words = sys.argv[place + 1:]
    script_place(words)
    own = ("--seed", "--model_name", "--resume")
    taken = next((word for word in words if word.split("=")[0] in own), None)
    if args.keep and not re.fullmatch(r"[A-Za-z][\w.-]*", args.keep):
        raise UserError(f"--keep must be a name that begins with a letter; it is {args.keep!r}")
    if taken:
        raise UserError(f"leave {taken} out of the command; seeds.py sets it for each run")
    names = [f"{args.name}_seed{seed}" for seed in range(args.seeds)]
    lines = {name: [*words, "--seed", str(seed), "--model_name", name, "--resume", "auto"]
             for seed, name in enumerate(names)}
    if args.keep:
        check_room([run for run in map(ended_run, lines, lines.values()) if run], EXPERIMENTS / args.keep)
    runs = []
    for seed, (name, line) in enumerate(lines.items()):
        run = ended_run(name, line)
        if not run:
            print(f"seed {seed}: {shlex.join(line)}", flush=True)
            code = run_seed(line)
            run = ended_run(name, line)
            if not run:
                raise UserError(f"seed {seed} ended with exit code {code} before it was done; its last lines "
                                "say why, and the same command goes on from here")
        print(f"seed {seed}: {run.status}, {run.name}"
              + (f", val_bpb {run.summary['val_bpb']:.4f}" if run.is_finished else ""), flush=True)
        runs.append(run)
    group = Group(args.name, runs)
    print(f"\n{as_text(runs_table([group]))}\n")
    if args.keep:
        keep(runs, EXPERIMENTS / args.keep)
    if not group.finished:
        raise UserError(f"none of the {len(runs)} runs finished")
    check_comparable([group], "val_bpb")        # data may have been made anew meanwhile
    print(f"{as_text(groups_table([group]))}\n\n{verdict(group)}")


if __name__ == "__main__":
    main()
