"""The race: train_gpt.py, its yardsticks and checkouts of its peers, on the same text for the same time.

    python benchmarks/race.py --text books/ --seconds 60 120 240 nanochat/ nanoGPT/
    python benchmarks/race.py --sides train_gpt,llama3 --seconds 60 --keep

A checkout is a clone of karpathy/nanochat or karpathy/nanoGPT that you have; benchmarks/peer.py puts it on
this loop. Each side is tuned first with as many runs as any other, of --tune_seconds, with a seed that does
not race: its learning rates, then its batch, then its warm-up. Then all sides train with several seeds, in
turns, once for each budget, with a whole schedule each. A run that is there is not repeated.

When train_gpt.py is as low as another side's mean is read off the line between its own budgets, over the
logarithm of their time. Figures are of this machine: a CPU's dtype decides much of it.
"""

import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
from settings import SETTINGS, Setting, prepare

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop import places
from benchtop.command_line import Parser, command, positive
from benchtop.errors import UserError
from benchtop.files import write_text
from benchtop.groups import Group, SavedRun, check_comparable
from benchtop.ideas import Side, key_of, machine_facts
from benchtop.redaction import without_secrets
from benchtop.shards import open_dataset
from benchtop.significance import interval
from benchtop.tables import as_markdown, mean_and_spread
from benchtop.trials import KEPT, copy_small, ended_run
from benchtop.turns import Job, Turns, last_line

FIRST = "train_gpt"
OURS = {FIRST: {"muon_lr": 0.05, "embed_lr": 0.6, "head_lr": 0.008, "scalar_lr": 0.04},
        "nanogpt": {"learning_rate": 6e-4}, "llama3": {"learning_rate": 3e-4}}
TUNING_SEED = 100
# what is tried in turn, from the best so far
AXES = {"rate": (0.5, 1.0, 2.0, 4.0), "batch": (4096, 8192, 16384), "warmup": (0.0, 0.02, 0.2)}


@dataclass(frozen=True)
class Point:
    """What is tuned: a factor of all learning rates, tokens in a step, share of the budget in warm-up."""
    rate: float = 1.0
    batch: int = 8192
    warmup: float = 0.02

    def __str__(self) -> str:
        return f"rates x {self.rate:g}, {self.batch:,} tokens a step, warm-up {self.warmup:g}"


@dataclass(frozen=True)
class Racer:
    """One side: a script and its flags; rates are those that a Point multiplies."""
    name: str
    script: Path
    rates: dict[str, float]
    flags: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        """Its name in the names of files."""
        return self.name.split("'")[0]

    def words(self, point: Point, seconds: float) -> list[str]:
        rates = [f"--{knob}={rate * point.rate:g}" for knob, rate in self.rates.items()]
        # train_gpt.py warms up by steps; a minute has some 200 of 8,192 tokens
        warmup = (["--warmup_steps", str(round(point.warmup * 200 * seconds / 60))] if self.name == FIRST else
                  ["--warmup_frac", f"{point.warmup:g}"])
        return [*self.flags, *rates, *warmup, "--batch_tokens", str(point.batch), "--num_steps", "1000000",
                "--train_minutes", f"{seconds / 60:g}"]


def racers_of(sides: list[str], checkouts: list[str]) -> list[Racer]:
    """raises  UserError if a side is not known, or a checkout is none"""
    unknown = [side for side in sides if side not in OURS]
    if unknown or FIRST not in sides:
        raise UserError(f"--sides must be {FIRST} and others of {', '.join(OURS)}; it is {','.join(sides)}")
    scripts = {name: places.ROOT / f"train_{name.removeprefix('train_')}.py" for name in OURS}
    racers = [Racer(side, scripts[side], OURS[side]) for side in sides]
    for checkout in checkouts:
        folder = Path(checkout).resolve()
        if not any((folder / file).is_file() for file in ("nanochat/gpt.py", "model.py")):
            raise UserError(f"{checkout} is no clone of nanochat or nanoGPT")
        # by a link in this folder, so that no run's command has a path of this machine
        link = places.ROOT / "peers" / folder.name
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.symlink_to(folder)
        racers.append(Racer(f"{folder.name}'s own", places.ROOT / "benchmarks/peer.py", {"rates": 1.0},
                            ("--checkout", f"peers/{folder.name}")))
    return racers


class Race:
    """All runs of a race in one setting; `say` is print."""

    def __init__(self, name: str, setting: Setting, flags: list[str]):
        self.name, self.flags = name, [*setting.words, *flags]
        dataset, _ = open_dataset(setting.data, "")
        self.data = [dataset.sha256, dataset.manifest["tokenizer_sha256"]]
        self.turns = Turns.on_this_machine(1, "auto")
        self.machine = machine_facts(1)

    def run(self, wanted: list[tuple[Racer, Point, float, int]]) -> list[SavedRun]:
        """These runs, of which those that are missing are trained in this order.

        raises  UserError if one does not finish
        """
        jobs = []
        for racer, point, seconds, seed in wanted:
            words = [*self.flags, *racer.words(point, seconds)]
            key = key_of(Side(racer.name, racer.script, ""), words, self.data, self.machine)
            name = f"race_{self.name}_{racer.word}_{seconds:g}s-{key}_seed{seed}"
            jobs.append(Job(name, [str(racer.script), *words, "--seed", str(seed), "--model_name", name,
                                   "--resume", "auto"]))
        outputs = places.EXPERIMENTS / "race" / "output"
        self.turns.run([job for job in jobs if not ended_run(job.name)], outputs, self.tell)
        runs = []
        for job in jobs:
            run = ended_run(job.name)
            if not run:
                raise UserError(f"{job.name} did not finish: {last_line(outputs / f'{job.name}.txt')}")
            runs.append(run)
        return runs

    def tell(self, job: Job, code: int, seconds: float) -> None:
        run = ended_run(job.name)
        value = f"val_bpb {run.summary['val_bpb']:.4f}" if run and run.is_finished else f"exit code {code}"
        print(f"{job.name}  {value}, {seconds:.0f} s by the clock", flush=True)

    def tune(self, racer: Racer, seconds: float) -> tuple[Point, list[tuple[Point, float]]]:
        """The best point, one axis after the other, and all that were tried. A run that diverged is worst."""
        best, tried = Point(), {}
        for axis, values in AXES.items():
            points = [dataclasses.replace(best, **{axis: value}) for value in values]
            new = [point for point in points if point not in tried]
            runs = self.run([(racer, point, seconds, TUNING_SEED) for point in new])
            ends = [run.summary.get("val_bpb", math.inf) for run in runs]
            tried |= dict(zip(new, ends, strict=True))
            best = min(points, key=tried.get)
        print(f"{racer.name}: best is {best}", flush=True)
        return best, list(tried.items())


def seconds_to(first: dict[float, Group], target: float) -> str:
    """When the first side is as low as a target, by the line between its budgets, seed by seed."""
    budgets, found = sorted(first), []
    for values in zip(*(first[seconds].values("val_bpb") for seconds in budgets), strict=True):
        if min(values) > target:
            return f"not within {budgets[-1]:g} s"
        if values[0] <= target:
            return f"less than {budgets[0]:g} s"
        logs = [math.log(seconds) for seconds in budgets]
        found.append(math.exp(float(np.interp(-target, [-value for value in values], logs))))
    if len(found) < 2:
        return f"{found[0]:.0f} s"
    low, high = interval(found)
    return f"{fmean(found):.0f} s ({max(0, low):.0f} to {high:.0f})"


def table(groups: dict[tuple[str, float], Group]) -> list[list[str]]:
    """A line for each side and budget."""
    first = {seconds: group for (name, seconds), group in groups.items() if name == FIRST}
    lines = [["seconds", "side", "parameters", "tokens/s", "tokens", "FLOPs", "val_bpb",
              f"{FIRST}.py is there after"]]
    for (name, seconds), group in groups.items():
        facts = group.finished[0].summary
        lines.append([f"{seconds:g}", name, f"{facts['parameters'] / 1e6:.1f}M",
                      f"{median(group.values('tokens_per_second')):,.0f}",
                      f"{median(group.values('tokens')) / 1e6:.2f}M",
                      f"{median(group.values('flops')):.1e}", mean_and_spread(group.values("val_bpb")),
                      "" if name == FIRST else seconds_to(first, fmean(group.values("val_bpb")))])
    return lines


def tuning_table(tried: dict[str, list[tuple[Point, float]]]) -> list[list[str]]:
    lines = [["side", "rates x", "tokens a step", "warm-up", "val_bpb"]]
    for name, points in tried.items():
        best = min(value for _, value in points)
        lines += [[name, f"{point.rate:g}", f"{point.batch:,}", f"{point.warmup:g}",
                   f"**{value:.4f}**" if value == best else f"{value:.4f}"] for point, value in points]
    return lines


@command
def main() -> None:
    parser = Parser("Race train_gpt.py against yardsticks and peers.", epilog="Further flags go to all runs.")
    parser.add_argument("checkouts", nargs="*", metavar="CHECKOUT", help="clones of nanochat or nanoGPT")
    parser.add_argument("--sides", default=",".join(OURS), help="which scripts of this repository")
    parser.add_argument("--setting", choices=list(SETTINGS), default="minute", help="data and size of model")
    parser.add_argument("--text", default="", help="source of the text, where it was not prepared before")
    parser.add_argument("--seconds", type=float, nargs="+", default=[60, 120, 240], help="budgets")
    parser.add_argument("--seeds", type=positive, default=3, help="number of runs of each")
    parser.add_argument("--tune_seconds", type=float, default=60, help="of each run that tunes; 0: no tuning")
    parser.add_argument("--keep", action="store_true", help="keep small files, and write experiments/RACE.md")
    args, flags = parser.parse_known_args()
    if min(args.seconds) <= 0:
        raise UserError(f"--seconds must be above 0; one is {min(args.seconds):g}")
    racers = racers_of(args.sides.split(","), args.checkouts)
    os.environ["PYTHONPATH"] = str(places.ROOT)
    setting = SETTINGS[args.setting]
    prepare(setting, args.text)
    race = Race(args.setting, setting, flags)
    tuned = {racer.name: race.tune(racer, args.tune_seconds) if args.tune_seconds else (Point(), [])
             for racer in racers}
    groups = {}
    for seconds in sorted(args.seconds):
        wanted = [(racer, tuned[racer.name][0], seconds, seed) for seed in range(args.seeds)
                  for racer in (racers[::-1] if seed % 2 else racers)]
        runs = race.run(wanted)
        for racer in racers:
            own = [run for (side, *_), run in zip(wanted, runs, strict=True) if side is racer]
            groups[racer.name, seconds] = Group(racer.name, own)
    check_comparable(list(groups.values()), "val_bpb", ["tokens"])     # the time is equal, not the tokens
    report = as_markdown(table(groups))
    tuning = as_markdown(tuning_table({name: tried for name, (_, tried) in tuned.items() if tried}))
    print(f"\n{report}\n\n{tuning}")
    if args.keep:
        for racer, seconds in ((racer, seconds) for racer in racers for seconds in args.seconds):
            folder = places.EXPERIMENTS / "race" / f"{args.setting}_{racer.word}_{seconds:g}s"
            for run in groups[racer.name, seconds].runs:
                copy_small(run, folder / f"seed{run.knobs['seed']}", KEPT)
        write_text(places.EXPERIMENTS / "RACE.md",
                   without_secrets(describe(groups, report, tuning, args.setting)))


def describe(groups: dict, report: str, tuning: str, setting: str) -> str:
    facts = next(iter(groups.values())).finished[0].summary
    command = " ".join(["python", "benchmarks/race.py", *sys.argv[1:]])
    return "\n".join([
        "# The race", "",
        f"Written by `{command}`, on {facts['processes']} x {facts['device']}, {facts['dtype']}, torch "
        f"{facts['torch']}, in the setting *{setting}* of `benchmarks/settings.py`. Mean and standard "
        "deviation over seeds; each run has a whole schedule of its own.", "", report, "",
        "## How each side was tuned", "",
        "One run each, with a seed that does not race.", "", tuning, ""])


if __name__ == "__main__":
    main()
