r"""The race: train_gpt.py, its yardsticks and checkouts of its peers, on the same text for the same time.

    python benchmarks/race.py nanochat/ nanoGPT/ --text books/ --seconds 60 120 240
    python benchmarks/race.py --sides train_gpt,llama3 --seconds 60 --keep
    python benchmarks/race.py nanochat/ --sides train_gpt --untuned train_gpt,nanochat=4:8192:0.02 \
        --seconds 1200 --own_seconds 600

A checkout is a clone of karpathy/nanochat or karpathy/nanoGPT that you have; benchmarks/peer.py puts it on
this loop. Each side, except those of --untuned, is tuned first with runs of --tune_seconds and a seed that
does not race: its learning rates, then its batch, further while the best is the last value tried; then its
warm-up (train_gpt.py uses none). --untuned nanochat=4:8192:0.02 races with what an earlier tuning found: the
factor of its learning rates, tokens in a step, and share of warm-up. Then all sides train with several
seeds, in turns, once for each budget, with a complete schedule each. Finished runs are not repeated, so do
not pause a race for long on a machine whose speed changes.

When train_gpt.py reaches another side's value is interpolated between the means of its own budgets, over the
logarithm of their time. Figures are of this machine; a CPU's dtype decides much of it.
"""

import dataclasses
import functools
import hashlib
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from settings import SETTINGS, Setting, prepare

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop import places
from benchtop.command_line import Parser, command, positive
from benchtop.errors import UserError
from benchtop.files import sha256_of, write_text
from benchtop.groups import Group, SavedRun, check_comparable
from benchtop.ideas import Side, key_of, machine_facts
from benchtop.progress import BEFORE_THE_FIRST, NOT_REACHED, reached_at
from benchtop.redaction import without_secrets
from benchtop.shards import open_dataset
from benchtop.tables import as_markdown, mean_and_spread
from benchtop.trials import KEPT, copy_small, ended_run
from benchtop.turns import Job, Turns, last_words

FIRST = "train_gpt"
OURS = {FIRST: {"muon_lr": 0.05, "embed_lr": 0.6, "head_lr": 0.008, "scalar_lr": 0.04},
        "nanogpt": {"learning_rate": 6e-4}, "llama3": {"learning_rate": 3e-4}}
TUNING_SEED = 100
# what is tried in turn, from the best so far
AXES = {"rate": (1.0, 0.5, 2.0), "batch": (8192, 4096, 16384), "warmup": (0.02, 0.0, 0.2)}
FURTHEST = 3        # times that a best value at the edge of an axis is halved or doubled


@dataclass(frozen=True)
class Point:
    """What is tuned: a factor of all learning rates, tokens in a step, share of the budget in warm-up."""
    rate: float = 1.0
    batch: int = 8192
    warmup: float = 0.02

    @property
    def without_warmup(self) -> str:
        return f"rates x {self.rate:g}, {self.batch:,} tokens per step"

    def __str__(self) -> str:
        return f"{self.without_warmup}, warm-up {self.warmup:g}"


@dataclass(frozen=True)
class Racer:
    """One side: a script and its flags; rates are those that a Point multiplies."""
    name: str
    script: Path
    rates: dict[str, float]
    flags: tuple[str, ...] = ()

    @property
    def checkout(self) -> Path | None:
        """The folder of a peer; None for what is in this repository."""
        return places.ROOT / self.flags[1] if self.flags else None

    @functools.cached_property
    def commit(self) -> str:
        """Of the checkout, with + where it was edited; empty for what is in this repository."""
        if not self.checkout:
            return ""
        head, changed = (subprocess.run(
            ["git", *words], cwd=self.checkout, capture_output=True, text=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"]))
        return head + "+" * bool(changed)

    @functools.cached_property
    def code_sha256(self) -> str:
        """Of all Python files of the checkout, edited or not; empty for what is in this repository."""
        folder = self.checkout
        if not folder:
            return ""
        names = sorted(path.relative_to(folder) for path in folder.rglob("*.py") if path.is_file())
        lines = [f"{name} {sha256_of(folder / name)}" for name in names if ".venv" not in name.parts]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def word(self) -> str:
        """Its name in the names of files."""
        return self.name.split("'")[0]

    def words(self, point: Point, seconds: float) -> list[str]:
        rates = [f"--{knob}={rate * point.rate:g}" for knob, rate in self.rates.items()]
        warmup = [] if self.name == FIRST else ["--warmup_frac", f"{point.warmup:g}"]
        return [*self.flags, *rates, *warmup, "--batch_tokens", str(point.batch), "--num_steps", "1000000",
                "--train_minutes", f"{seconds / 60:g}"]


def racers_of(sides: list[str], checkouts: list[str]) -> list[Racer]:
    """raises  UserError if a side is not known, or a checkout is none"""
    unknown = [side for side in sides if side not in OURS]
    if unknown or FIRST not in sides:
        raise UserError(f"--sides must be {FIRST} and any of {', '.join(OURS)}; it is {','.join(sides)}")
    scripts = {name: places.ROOT / f"train_{name.removeprefix('train_')}.py" for name in OURS}
    racers = [Racer(side, scripts[side], OURS[side]) for side in sides]
    names = [Path(checkout).resolve().name for checkout in checkouts]
    if len({*names}) < len(names):
        raise UserError(f"two clones have the same folder name, of {', '.join(names)}; rename one")
    for checkout in checkouts:
        folder = Path(checkout).resolve()
        if not any((folder / file).is_file() for file in ("nanochat/gpt.py", "model.py")):
            raise UserError(f"{checkout} is not a clone of nanochat or nanoGPT")
        # by a link in this folder, so that no run's command has a path of this machine
        link = places.ROOT / "peers" / folder.name
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        # a run keeps the script that it ran, which stands beside the bench
        text = Path(__file__).with_name("peer.py").read_text(encoding="utf-8")
        script = places.ROOT / f"idea_peer_{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"
        write_text(script, text)
        racers.append(Racer(f"{folder.name}'s own", script, {"rates": 1.0},
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
            side, data = Side(racer.name, racer.script, ""), [*self.data, racer.code_sha256]
            key = key_of(side, words, data, self.machine)
            name = f"race_{self.name}_{racer.word}_{seconds:g}s-{key}_seed{seed}"
            jobs.append(Job(name, [str(racer.script), *words, "--seed", str(seed), "--model_name", name,
                                   "--resume", "auto"]))
        outputs = places.EXPERIMENTS / "race" / "output"
        self.turns.run([job for job in jobs if not ended_run(job.name)], outputs, self.tell)
        runs = []
        for job in jobs:
            run = ended_run(job.name)
            if not run:
                raise UserError(f"{job.name} did not finish: {last_words(outputs / f'{job.name}.txt')}")
            runs.append(run)
        return runs

    def tell(self, job: Job, code: int, seconds: float) -> None:
        run = ended_run(job.name)
        value = f"val_bpb {run.summary['val_bpb']:.4f}" if run and run.is_finished else f"exit code {code}"
        print(f"{job.name}  {value}, {seconds:.0f} s wall-clock", flush=True)

    def tune(self, racer: Racer, seconds: float) -> tuple[Point, list[tuple[Point, float]]]:
        """The best point, one axis after the other, and all that were tried. A run that diverged is worst."""
        best, tried = Point(), {}

        def best_of(points: list[Point]) -> Point:
            new = [point for point in points if point not in tried]
            runs = self.run([(racer, point, seconds, TUNING_SEED) for point in new])
            ends = [run.summary.get("val_bpb", math.inf) if run.is_finished else math.inf for run in runs]
            tried.update(zip(new, ends, strict=True))
            return min(points, key=tried.get)
        for axis, values in AXES.items():
            if axis == "warmup" and racer.name == FIRST:
                continue
            best = best_of([dataclasses.replace(best, **{axis: value}) for value in values])
            for _ in range(FURTHEST if axis != "warmup" else 0):
                value = getattr(best, axis)
                known = [getattr(point, axis) for point in tried
                         if dataclasses.replace(point, **{axis: value}) == best]
                if min(known) < value < max(known):
                    break
                further = value * 2 if value == max(known) else value / 2
                best = best_of([best, dataclasses.replace(best, **{axis: type(value)(further)})])
        print(f"{racer.name}: best is {best}", flush=True)
        return best, list(tried.items())


def untuned_points(words: str, names: list[str]) -> dict[str, Point]:
    """The points of the sides that are not tuned, from 'llama3,nanochat=4:8192:0.02' or 'all'.

    raises  UserError if a side does not race, or a point is none
    """
    points = {}
    for word in names if words == "all" else words.split(",") if words else []:
        name, is_given, point = word.partition("=")
        try:
            rate, batch, warmup = point.split(":") if is_given else (1, Point.batch, Point.warmup)
            points[name] = Point(float(rate), int(batch), float(warmup))
            if not (0 < points[name].rate < math.inf and points[name].batch > 0 and points[name].warmup >= 0):
                raise ValueError
        except ValueError:
            raise UserError(f"--untuned {word} must be NAME, or NAME=RATE:BATCH:WARMUP as in "
                            "nanochat=4:8192:0.02") from None
    if not {*points} <= {*names}:
        raise UserError(f"--untuned must be all, or of {', '.join(names)}; it is {words}")
    return points


def seconds_to(first: dict[float, Group], target: float) -> str:
    """When the mean of the first side is as low as a target, by the line between its budgets."""
    budgets = sorted(seconds for seconds in first if first[seconds].finished)
    found = reached_at(budgets, [fmean(first[seconds].values("val_bpb")) for seconds in budgets], target)
    if found == NOT_REACHED:
        return f"not within {budgets[-1]:g} s" if budgets else "never"
    return f"less than {budgets[0]:g} s" if found == BEFORE_THE_FIRST else f"{found:.0f} s"


def table(groups: dict[tuple[str, float], Group]) -> list[list[str]]:
    """A line for each side and budget."""
    first = {seconds: group for (name, seconds), group in groups.items() if name == FIRST}
    lines = [["seconds", "side", "parameters", "tokens/s", "tokens", "FLOPs", "val_bpb",
              f"{FIRST}.py reaches it after"]]
    for (name, seconds), group in groups.items():
        if not group.finished:
            lines.append([f"{seconds:g}", name, *[""] * 4, f"none of {len(group.runs)} runs finished", ""])
            continue
        facts = group.finished[0].summary
        bpb = mean_and_spread(group.values("val_bpb"))
        bpb += f" ({group.count} runs)" if len(group.finished) < len(group.runs) else ""
        lines.append([f"{seconds:g}", name, f"{facts['parameters'] / 1e6:.1f}M",
                      f"{median(group.values('tokens_per_second')):,.0f}",
                      f"{median(group.values('tokens')) / 1e6:.2f}M",
                      f"{median(group.values('flops')):.1e}", bpb,
                      "" if name == FIRST else seconds_to(first, fmean(group.values("val_bpb")))])
    return lines


def tuning_table(tried: dict[str, list[tuple[Point, float]]]) -> list[list[str]]:
    lines = [["side", "rates x", "tokens per step", "warm-up", "val_bpb"]]
    for name, points in tried.items():
        best = min(value for _, value in points)
        lines += [[name, f"{point.rate:g}", f"{point.batch:,}", f"{point.warmup:g}",
                   f"**{value:.4f}**" if value == best else f"{value:.4f}"] for point, value in points]
    return lines


@command
def main() -> None:
    parser = Parser("Race train_gpt.py against yardsticks and peers.", epilog="Further flags go to all runs.")
    parser.add_argument("checkouts", nargs="*", metavar="CHECKOUT", help="clones of nanochat or nanoGPT")
    parser.add_argument("--sides", default=",".join(OURS), help="scripts of this repository to race")
    parser.add_argument("--setting", choices=list(SETTINGS), default="minute", help="data and size of model")
    parser.add_argument("--text", default="", help="source of the text, unless it is prepared already")
    parser.add_argument("--seconds", type=float, nargs="+", default=[60, 120, 240], help="time of each run")
    parser.add_argument("--own_seconds", type=float, nargs="+", metavar="SECONDS",
                        help=f"time of each run of {FIRST}.py, if not the same")
    parser.add_argument("--seeds", type=positive, default=3, help="runs per side and time")
    parser.add_argument("--tune_seconds", type=float, default=60, help="training time of each tuning run")
    parser.add_argument("--untuned", default="", help="sides not to tune, separated by commas, or all; "
                        "NAME=RATE:BATCH:WARMUP races with these")
    parser.add_argument("--keep", action="store_true", help="keep small files, and write --report")
    parser.add_argument("--report", default="RACE.md", help="name of the page in experiments/")
    args, flags = parser.parse_known_args()
    own_seconds = args.own_seconds or args.seconds
    if min(*args.seconds, *own_seconds, args.tune_seconds) <= 0:
        raise UserError("--seconds, --own_seconds and --tune_seconds must be above 0")
    racers = racers_of(args.sides.split(","), args.checkouts)
    untuned = untuned_points(args.untuned, [racer.word for racer in racers])
    setting = SETTINGS[args.setting]
    prepare(setting, args.text)
    race = Race(args.setting, setting, flags)
    tuned = {racer.name: (untuned[racer.word], []) if racer.word in untuned
             else race.tune(racer, args.tune_seconds) for racer in racers}
    starts = [(racer, seconds) for seconds in sorted({*args.seconds, *own_seconds}) for racer in racers
              if seconds in (own_seconds if racer.name == FIRST else args.seconds)]
    wanted = [(racer, tuned[racer.name][0], seconds, seed) for seed in range(args.seeds)
              for racer, seconds in (starts[::-1] if seed % 2 else starts)]
    runs = race.run(wanted)
    groups = {(racer.name, seconds): Group(racer.name, [
        run for (side, _, its, _), run in zip(wanted, runs, strict=True) if (side, its) == (racer, seconds)])
        for racer, seconds in starts}
    finished = [group for group in groups.values() if group.finished]
    if not finished:
        raise UserError("no run finished; their output is in experiments/race/output/")
    check_comparable(finished, "val_bpb", ["tokens"])       # the time is equal, not the tokens
    report = as_markdown(table(groups))
    tuning = as_markdown(tuning_table({name: tried for name, (_, tried) in tuned.items() if tried}))
    print(f"\n{report}\n\n{tuning}")
    if args.keep:
        for racer, seconds in starts:
            folder = places.EXPERIMENTS / "race" / f"{args.setting}_{racer.word}_{seconds:g}s"
            for run in groups[racer.name, seconds].runs:
                copy_small(run, folder / f"seed{run.knobs['seed']}", KEPT)
        write_text(places.EXPERIMENTS / args.report,
                   without_secrets(describe(groups, report, tuning, args.setting, racers, untuned)))


def describe(groups: dict, report: str, tuning: str, setting: str, racers: list[Racer],
             untuned: dict[str, Point]) -> str:
    facts = next(run.summary for group in groups.values() for run in group.finished)
    peers = "; ".join(f"{racer.name} {racer.commit}" for racer in racers if racer.commit)
    words = [Path(word).name if Path(word).is_dir() else word for word in sys.argv[1:]]
    command, are_tuned = shlex.join(["python", "benchmarks/race.py", *words]), len(untuned) < len(racers)
    return "\n".join([
        "# The race", "",
        f"Written by `{command}`, on {facts['processes']} x {facts['device']}, {facts['dtype']}, torch "
        f"{facts['torch']}, in the setting *{setting}* of `benchmarks/settings.py`. Mean and standard "
        "deviation over seeds; each run has its own complete schedule.", "", report, "",
        "## How each side was tuned", "",
        "One run each, with a seed that is not in the race. " * are_tuned + "".join(
            f"Not tuned here: {name}, with {point.without_warmup if name == FIRST else point}. "
            for name, point in untuned.items())
        + f"Commits: {peers or 'none'}.", *(["", tuning] if are_tuned else []), ""])


if __name__ == "__main__":
    main()
