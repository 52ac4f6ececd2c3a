"""train_gpt.py beside train_nanogpt.py and train_llama3.py: equal data, size and minutes of training.

    python benchmarks/yardstick.py --minutes 2 --seeds 3            on the demo's data; ./run.sh makes them
    python benchmarks/yardstick.py --minutes 2 --seeds 3 --keep     also writes experiments/YARDSTICK.md

It is a trial (trial.py) with the other two scripts as ideas, so the scripts take turns, and a run that is
there is not repeated. Each ends its schedule with its minutes. What stands at a quarter and at half of them
is read off the line between the validations before and after: a schedule cut short there would have done
better.
"""

import math
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop import places
from benchtop.command_line import Parser, command
from benchtop.conclusions import compare
from benchtop.curves import save_curves
from benchtop.errors import UserError
from benchtop.files import write_text
from benchtop.groups import Group, check_comparable, runs_in
from benchtop.progress import curve
from benchtop.redaction import without_secrets
from benchtop.tables import as_markdown, mean_and_spread

SIDES = {"train_gpt": "baseline", "train_nanogpt": "nanogpt", "train_llama3": "llama3"}   # in the trial


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
    parser.add_argument("--seeds", type=int, default=3, help="number of runs per script, from 2 on")
    parser.add_argument("--preset", default="demo", help="preset of train_gpt.py, for data and size")
    parser.add_argument("--keep", action="store_true", help="write experiments/YARDSTICK.md and its curves")
    args, flags = parser.parse_known_args()
    trial = f"yardstick_{args.preset}_{args.minutes:g}min"
    ideas = [f"{side}: {script}.py" for script, side in SIDES.items() if side != "baseline"]
    # a margin so large that no script is stopped early
    done = subprocess.run([sys.executable, "trial.py", *ideas, "--name", trial, "--seeds", str(args.seeds),
                           "--minutes", str(args.minutes), "--margin", "1", "--no_check", "--",
                           "--preset", args.preset, "--val_every", "20", *flags], cwd=places.ROOT)
    folder = places.EXPERIMENTS / "trials" / trial
    if not (folder / "results.json").is_file():
        raise UserError(f"trial.py ended with exit code {done.returncode}; its last lines say why")
    groups = [Group(script, runs_in(folder / side)) for script, side in SIDES.items()]
    check_comparable(groups, "val_bpb", ["tokens"])     # the minutes are equal, not the tokens
    report = as_markdown(table(groups, args.minutes))
    print(f"\n{report}")
    if args.keep:
        save_curves(groups, "val_bpb", places.EXPERIMENTS / "yardstick")
        write_text(places.EXPERIMENTS / "YARDSTICK.md",
                   without_secrets(describe(groups, args.minutes, report)))


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
