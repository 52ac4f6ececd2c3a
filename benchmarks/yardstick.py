"""train_gpt.py beside train_nanogpt.py and train_llama3.py: equal data, size and minutes of training.

    python benchmarks/yardstick.py --minutes 2 --seeds 3            on the demo's data; ./run.sh makes them
    python benchmarks/yardstick.py --minutes 2 --seeds 3 --keep     also writes experiments/YARDSTICK.md

The scripts take turns, so that a machine that slows down slows them all. A run that is there is not repeated.
Each ends its schedule with its minutes. What stands at a quarter and at half of them is read off the line
between the validations before and after: a schedule cut short there would have done better.
"""

import itertools
import math
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop import places
from benchtop.command_line import Parser, command, positive
from benchtop.conclusions import compare
from benchtop.curves import save_curves
from benchtop.errors import UserError
from benchtop.files import write_text
from benchtop.groups import Group, check_comparable
from benchtop.progress import curve
from benchtop.redaction import without_secrets
from benchtop.repeats import check_room, ended_run, keep
from benchtop.tables import as_markdown, mean_and_spread

SCRIPTS = ("train_gpt", "train_nanogpt", "train_llama3")


def bpb_at(group: Group, minutes: float) -> str:
    """Mean and spread of the bits per byte that runs had after so many minutes of training, or at the end."""
    return mean_and_spread([float(np.interp(minutes, *curve(run, "time", "val_bpb")))
                            for run in group.finished])


def seconds_to(group: Group, target: float) -> str:
    """Mean of the seconds of training after which runs were as low as a target; each of them must be.

    Where one was as low when it was first validated, the mean is a bound.
    """
    reached, bound = [], ""
    for run in group.finished:
        minutes, bpbs = curve(run, "time", "val_bpb")
        after = next((place for place, bpb in enumerate(bpbs) if bpb <= target), None)
        if after is None:
            return "not by all runs"
        ends = slice(max(0, after - 1), after + 1)
        bound = bound if after else "at most "
        reached.append(60 * float(np.interp(-target, [-bpb for bpb in bpbs[ends]], minutes[ends])))
    return f"{bound}{fmean(reached):.0f} s"


def table(groups: list[Group], minutes: float) -> list[list[str]]:
    """A line for each script; the first one's time to the others' end stands with them."""
    first = groups[0]
    lines = [["script", "parameters", "tokens/s", "tokens", "val_bpb at 1/4", "at 1/2", "at the end",
              f"{first.name} is there after", "difference, 95 % interval"]]
    for group in groups:
        facts = group.finished[0].summary
        there = difference = ""
        if group is not first:
            there = seconds_to(first, fmean(group.values("val_bpb")))
            test = compare(first, group, "val_bpb").test
            difference = f"{test.mean:+.4f} ({test.low:+.4f} to {test.high:+.4f})" if test else ""
        lines.append([f"{group.name}.py", f"{facts['parameters'] / 1e6:.1f}M",
                      f"{median(group.values('tokens_per_second')):,.0f}",
                      f"{median(group.values('tokens')) / 1e6:.2f}M",
                      *(bpb_at(group, share * minutes) for share in (0.25, 0.5, math.inf)), there,
                      difference])
    return lines


@command
def main() -> None:
    parser = Parser("Train the yardsticks beside train_gpt.py.", epilog="Further flags go to all three.")
    parser.add_argument("--minutes", type=float, default=2, help="minutes of training per run")
    parser.add_argument("--seeds", type=positive, default=3, help="number of runs per script")
    parser.add_argument("--preset", default="demo", help="preset of train_gpt.py, for data and size")
    parser.add_argument("--keep", action="store_true", help="keep the runs, and write YARDSTICK.md")
    args, flags = parser.parse_known_args()
    if args.minutes <= 0:
        raise UserError(f"--minutes must be more than 0; it is {args.minutes:g}")
    # so many steps that the minutes decide
    words = ["--preset", args.preset, "--num_steps", "1000000", "--train_minutes", f"{args.minutes:g}",
             "--val_every", "20", *flags]
    groups = {script: Group(script, []) for script in SCRIPTS}
    lines: dict[tuple[str, int], tuple[str, list[str]]] = {}
    for seed, script in itertools.product(range(args.seeds), SCRIPTS):
        name = f"yardstick_{script}_{args.preset}_{args.minutes:g}min_seed{seed}"
        lines[script, seed] = name, [sys.executable, f"{script}.py", *words, "--seed", str(seed),
                                     "--model_name", name]
    for script in SCRIPTS if args.keep else ():
        ended = [ended_run(*lines[script, seed]) for seed in range(args.seeds)]
        check_room([run for run in ended if run], kept_in(script))
    for seed in range(args.seeds):
        for script, group in groups.items():
            name, line = lines[script, seed]
            run = ended_run(name, line)
            if not run:
                done = subprocess.run(line, cwd=places.ROOT, stdout=subprocess.PIPE, text=True)
                run = ended_run(name, line)
                if not run:
                    raise UserError(f"{script}.py with seed {seed} ended with exit code {done.returncode}; "
                                    "its last lines say why")
            if not run.is_finished:
                raise UserError(f"{run.name} {run.status}; move it away to try again")
            print(f"{script} seed {seed}: val_bpb {run.summary['val_bpb']:.4f}, "
                  f"{run.summary['tokens_per_second']:,.0f} tokens/s", flush=True)
            group.runs.append(run)
    results = list(groups.values())
    check_comparable(results, "val_bpb", ["tokens"])    # the minutes are equal, not the tokens
    report = as_markdown(table(results, args.minutes))
    print(f"\n{report}")
    if args.keep:
        for group in results:
            keep(group.runs, kept_in(group.name))
        save_curves(results, "val_bpb", places.EXPERIMENTS / "yardstick")
        write_text(places.EXPERIMENTS / "YARDSTICK.md",
                   without_secrets(describe(results, args.minutes, report)))


def kept_in(script: str) -> Path:
    return places.EXPERIMENTS / f"yardstick_{script.removeprefix('train_')}"


def describe(groups: list[Group], minutes: float, report: str) -> str:
    first = groups[0].finished[0]
    facts = first.summary
    command = shlex.join(["python", "benchmarks/yardstick.py", *sys.argv[1:]])
    return "\n".join([
        "# The yardsticks", "",
        f"Written by `{command}`: each script trains for {minutes:g} minutes on the data of the preset "
        f"{facts.get('preset')} ({facts['data']}), on {facts['processes']} x {facts['device']}, torch "
        f"{facts['torch']}. Mean and standard deviation over seeds; what stands at a quarter and at half is "
        "read off between validations.", "", report, "",
        "All use the same batch size. How they compare after hours on a GPU is not measured here.", "",
        "![bits per byte by minutes of training](yardstick_time.png)", ""])


if __name__ == "__main__":
    main()
