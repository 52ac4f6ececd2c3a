"""A trial: ideas against a baseline, in pairs of runs that share a seed, until each idea has a verdict.

Everything that decides a verdict is written to experiments/trials/NAME/plan.json before the first run. Runs
are ordinary runs whose names hold a key of what determines their results (benchtop/ideas.py). So a trial that
was killed finds its runs again, and another trial with the same baseline reuses the baseline's runs.
"""

import json
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchtop import ledger, places
from benchtop.command_line import counted, minutes
from benchtop.errors import UserError
from benchtop.files import sha256_of, write_json, write_text
from benchtop.groups import Group, SavedRun, check_comparable, read_run
from benchtop.held_out import TEST, VAL
from benchtop.ideas import BASELINE, Side
from benchtop.identity import bench_hashes, bench_sha256
from benchtop.redaction import without_secrets
from benchtop.sequential import Look, Sequential
from benchtop.signals import STOPS
from benchtop.turns import Job, Turns, last_words

METRIC = "val_bpb"
KEPT = ("config.json", "summary.json", "metrics.csv", "held_out.csv", "samples.jsonl")
FIRST_FRESH_SEED = 1000     # of a confirmation; other trials start at seed 0


@dataclass(frozen=True)
class Plan:
    """What is decided before the first run.

    margin       smallest gain that matters, in the metric's unit; 0: the standard deviation of the baseline
                 over its first seeds
    alpha        chance of keeping any idea without gain, over all ideas of the trial
    first, most  pairs of runs before the first verdict, and the maximum
    flags        flags of every run, including the budget
    ideas        name -> the idea as typed, its own flags, and the hash of its change
    keys         name -> key of its runs (benchtop/ideas.py), including the baseline
    split        held-out text that decides: val, or test for a confirmation
    """
    against: str
    margin: float
    alpha: float
    first: int
    most: int
    flags: list[str]
    by_clock: bool
    ideas: dict[str, dict]
    keys: dict[str, str]
    data: str
    split: str
    machine: dict
    description: str


@dataclass
class Fate:
    """State of an idea: the gains of its pairs so far, and its verdict once there is one."""
    gains: dict[int, float] = field(default_factory=dict)       # by seed
    look: Look | None = None
    verdict: str = ""
    reason: str = ""


@dataclass
class Trial:
    """Runs and verdicts of a trial; `say` prints a line for the user."""
    name: str
    plan: Plan
    baseline: Side
    ideas: list[Side]
    turns: Turns
    say: Callable[[str], None] = print
    runs: dict[tuple[str, int], SavedRun] = field(default_factory=dict)
    fates: dict[str, Fate] = field(default_factory=dict)
    margin: float = 0.0
    seconds: list[float] = field(default_factory=list)      # wall-clock time of each run of this session
    failed: dict[str, SavedRun] = field(default_factory=dict)       # runs that diverged, by idea

    @property
    def folder(self) -> Path:
        return places.EXPERIMENTS / "trials" / self.name

    @property
    def open_ideas(self) -> list[Side]:
        return [idea for idea in self.ideas if not self.fates[idea.name].verdict]

    # ---- from the plan to the verdicts

    def begin(self) -> bool:
        """Whether the trial has finished already; also resets `fates`.

        raises  UserError if a trial of this name was started with a different plan
        """
        file, results = self.folder / "plan.json", self.folder / "results.json"
        self.fates = {idea.name: Fate() for idea in self.ideas}
        if not file.is_file():
            return False
        before, plan = read(file), json.loads(json.dumps(asdict(self.plan)))
        changed = [what for what in plan if before.get(what) != plan[what]]
        # the plan may change while nothing is decided: seeds may be added if there are no ideas, and anything
        # may change if no idea was sound enough to be trained
        is_open = ((not self.ideas and not {*changed} - {"first", "most"}) or
                   (results.is_file() and not read(results)["baseline"]))
        if changed and not is_open:
            raise UserError(f"the trial {self.name} was started with different {', '.join(changed)}; undo "
                            "that, or use another --name")
        return results.is_file() and not changed

    def write_plan(self) -> None:
        """Write plan.json and patches, before the first run and after all scripts were checked."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "plan.json", asdict(self.plan))
        (self.folder / "results.json").unlink(missing_ok=True)
        for idea in self.ideas:
            if idea.patch:
                write_text(self.folder / f"{idea.name}.diff", idea.patch)

    def check(self) -> None:
        """Run the --smoke checks of each script, with all its flags.

        An idea that fails gets the verdict "crash".
        raises  UserError if the baseline fails, or a check was stopped
        """
        checked: dict[tuple, str] = {}
        for side in (self.baseline, *self.ideas):
            what = (side.script, side.flags)
            if what not in checked:
                checked[what] = self._smoke(side)
            if checked[what] and side is self.baseline:
                raise UserError(f"the baseline is not sound: {checked[what]}")
            if checked[what]:
                self.decide(side, "crash", checked[what])
            else:
                self.say(f"{side.name}: sound")

    def _smoke(self, side: Side) -> str:
        done = subprocess.run([sys.executable, str(side.script), *self.plan.flags, *side.flags, "--smoke"],
                              text=True, capture_output=True, errors="replace", stdin=subprocess.DEVNULL)
        if was_stopped(done.returncode, done.stderr):
            raise UserError(f"the check of {side.name} was stopped; run the same command again")
        words = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        return words[-1].removeprefix(f"{side.script.name}: error: ") if done.returncode else ""

    def run(self) -> None:
        """Train pairs of runs, seed by seed, until every idea has a verdict."""
        first, most = self.plan.first, self.plan.most
        rounds = [list(range(first)), *([seed] for seed in range(first, most))]
        for seeds in rounds:
            if self.ideas and not self.open_ideas:
                break
            self.train(seeds)
            self.judge(seeds[-1] + 1)
        for idea in self.open_ideas:
            self.decide(idea, ledger.UNDECIDED, self.what_more_takes(self.fates[idea.name]))

    def seed_of(self, number: int) -> int:
        return number + (FIRST_FRESH_SEED if self.plan.split == TEST else 0)

    def train(self, numbers: list[int]) -> None:
        """Train the missing runs of these seeds; the order of the sides alternates from seed to seed."""
        jobs, sides = [], {}
        for number in numbers:
            seed, line = self.seed_of(number), [self.baseline, *self.open_ideas]
            for side in line[::-1] if number % 2 else line:
                job = Job(self.run_name(side, seed), self.words(side, seed))
                run = ended_run(job.name)
                if run:
                    self.note(side, seed, run, " (trained before)")
                else:
                    jobs.append(job)
                    sides[job.name] = side, seed
        total = len(jobs)

        def tell(job: Job, code: int, seconds: float) -> None:
            side, seed = sides[job.name]
            self.seconds.append(seconds)
            run = ended_run(job.name)
            if run:
                self.note(side, seed, run, f", {minutes(seconds)} elapsed")
            elif not code:
                raise UserError(f"{side.script.name} or the bench was changed while seed {seed} was trained; "
                                "undo that, and run the same command again")
            else:
                self.note_crash(side, seed, code, last_words(self.folder / "output" / f"{job.name}.txt"))

        def wanted(job: Job) -> bool:
            side, _ = sides[job.name]
            return side is self.baseline or not self.fates[side.name].verdict
        if total:
            self.say(f"training {counted(total, 'run')}{self.time_left(total)}")
        self.turns.run(jobs, self.folder / "output", tell, wanted)

    def time_left(self, runs: int) -> str:
        if not self.seconds:
            return ""
        rounds = -(-runs // len(self.turns.slots))
        return f", about {minutes(rounds * statistics.median(self.seconds))}"

    def note(self, side: Side, seed: int, run: SavedRun, more: str) -> None:
        if run.is_finished:
            self.runs[side.name, seed] = run
            self.say(f"seed {seed}  {side.name:<16} {METRIC} {run.summary[METRIC]:.4f}{more}")
        elif not self.ideas:
            self.runs[side.name, seed] = run
            self.say(f"seed {seed}  {side.name:<16} {run.status}{more}")
        elif side is self.baseline:
            raise UserError(f"the baseline {run.status} with seed {seed}; a trial needs one that finishes")
        elif not self.fates[side.name].verdict:
            self.failed[side.name] = run
            self.decide(side, "diverged", f"seed {seed} {run.status}")

    def note_crash(self, side: Side, seed: int, code: int, words: str) -> None:
        ended_by = signal_of(code)
        said = words or (f"ended by {ended_by.name}" if ended_by else f"exit code {code}")
        if was_stopped(code, said):
            killed = ("; if this repeats, memory runs out: use a smaller model, or leave the idea out, under "
                      "another --name")
            raise UserError(f"{side.name}, seed {seed}, was stopped ({said}); run the same command again"
                            + killed * (ended_by == signal.SIGKILL))
        if side is self.baseline:
            raise UserError(f"the baseline ended with exit code {code} at seed {seed}: {said}")
        if re.search("another process( is|;)", said):   # writes or trains the same; not the idea's fault
            raise UserError(f"{side.name}, seed {seed}: {said}")
        if not self.fates[side.name].verdict:
            out_of_memory = re.search("(out of|enough|allocate) memory|into memory", said)
            self.decide(side, "out of memory" if out_of_memory else "crash", f"seed {seed}: {said}")

    # ---- judging the pairs

    def judge(self, pairs: int) -> None:
        """Look at each open idea after this many pairs.

        raises  UserError if runs of an idea and of the baseline are not comparable
        """
        if not self.ideas:
            return
        for idea in self.open_ideas:
            sides = [Group(side.name, [run for (name, _), run in self.runs.items() if name == side.name])
                     for side in (self.baseline, idea)]
            check_comparable(sides, METRIC, ["tokens"] if self.plan.by_clock else [])
        values = [self.value(BASELINE, self.seed_of(number)) for number in range(pairs)]
        if not self.margin:
            self.margin = self.plan.margin or self.noise_floor(values)
        test = Sequential(self.margin, self.plan.alpha, self.plan.first, self.plan.most, len(self.ideas))
        for idea in self.open_ideas:
            fate = self.fates[idea.name]
            fate.gains = {self.seed_of(number): values[number] - self.value(idea.name, self.seed_of(number))
                          for number in range(pairs)}
            fate.look = test.look(list(fate.gains.values()))
            self.say(f"after {pairs} pairs  {idea.name:<16} gain {fate.look.gain:+.4f} "
                     f"({fate.look.low:+.4f} to {fate.look.high:+.4f}); standard deviation of the gains "
                     f"{fate.look.sd:.4f}; power to detect {self.margin:.4f}: {test.power(fate.look.sd):.0%}")
            good, bad = ((ledger.KEEP, ledger.DISCARD) if self.plan.split == VAL else
                         (ledger.CONFIRMED, ledger.NOT_CONFIRMED))
            if fate.look.verdict == ledger.KEEP:
                self.decide(idea, good, "the interval of its gain lies above 0")
            elif fate.look.verdict == ledger.DISCARD:
                self.decide(idea, bad, self.why_discarded(fate.look))

    def why_discarded(self, look: Look) -> str:
        if look.high < 0:
            return "it is worse: the interval of its gain lies below 0"
        why = "there is a gain, but" if look.low > 0 else "if there is a gain,"
        return f"{why} it is smaller than {self.margin:.4f}, the smallest that matters"

    def value(self, name: str, seed: int) -> float:
        return self.runs[name, seed].summary[METRIC]

    def noise_floor(self, values: list[float]) -> float:
        """The margin if none is given: the standard deviation of the baseline over its first seeds."""
        floor = statistics.stdev(values[:self.plan.first])
        if not floor:
            raise UserError(f"all seeds of the baseline reach the same {METRIC}, so there is no spread to "
                            "derive the margin from; set --margin")
        self.say(f"margin {floor:.4f}, the standard deviation of the baseline over its first "
                 f"{self.plan.first} seeds")
        return floor

    def what_more_takes(self, fate: Fate) -> str:
        test = Sequential(self.margin, self.plan.alpha, self.plan.first, self.plan.most, len(self.ideas))
        return (f"{fate.look.pairs} pairs are inconclusive; detecting a gain of {self.margin:.4f} with 80 % "
                f"power would take up to about {test.more(fate.look.sd):,} pairs, at this standard deviation")

    def decide(self, idea: Side, verdict: str, reason: str) -> None:
        fate = self.fates[idea.name]
        fate.verdict, fate.reason = verdict, reason
        self.say(f"{idea.name}: {verdict.upper()}; {reason}")

    # ---- names and files

    def run_name(self, side: Side, seed: int) -> str:
        key = self.plan.keys[side.name]
        if side is self.baseline and not self.plan.by_clock:    # other trials reuse its runs
            return f"{side.script.stem}-{key}_seed{seed}"
        return f"{self.name}-{side.name}-{key}_seed{seed}"

    def words(self, side: Side, seed: int) -> list[str]:
        return [str(side.script), *self.plan.flags, *side.flags, "--seed", str(seed), "--model_name",
                self.run_name(side, seed), "--resume", "auto"]

    def finish(self) -> dict:
        """Copy the runs' small files, write results.json, and add a line for each idea to the ledger."""
        for (name, seed), run in self.runs.items():
            copy_small(run, self.folder / name / f"seed{seed}", KEPT)
        entries = [self.entry(idea) for idea in self.ideas]
        results = {"trial": self.name, "metric": METRIC, "split": self.plan.split, "margin": self.margin,
                   "alpha": self.plan.alpha, "baseline": self.values_of(BASELINE),
                   "ideas": {idea.name: self.result_of(idea) for idea in self.ideas}}
        there = {(entry.trial, entry.idea, entry.change, entry.verdict) for entry in ledger.read()}
        for entry in entries:       # some may be there, if an earlier finish() was killed
            if (entry.trial, entry.idea, entry.change, entry.verdict) not in there:
                ledger.add(entry)
        write_json(self.folder / "results.json", results)
        shutil.rmtree(self.folder / "output", ignore_errors=True)
        return results

    def values_of(self, name: str) -> dict[str, float]:
        return {str(seed): run.summary[METRIC] for (side, seed), run in self.runs.items()
                if side == name and run.is_finished}

    def tokens_of(self, name: str) -> float | None:
        """Mean number of tokens that a side's runs trained on."""
        tokens = [run.summary["tokens"] for (side, _), run in self.runs.items() if side == name]
        return statistics.fmean(tokens) if tokens else None

    def result_of(self, idea: Side) -> dict:
        fate = self.fates[idea.name]
        look = asdict(fate.look) if fate.look else {}
        look.pop("verdict", None)
        return {"verdict": fate.verdict, "reason": without_secrets(fate.reason), **look,
                "values": self.values_of(idea.name), "tokens": self.tokens_of(idea.name),
                "change": idea.change_sha256}

    def entry(self, idea: Side) -> ledger.Entry:
        fate = self.fates[idea.name]
        runs = [run.summary for (name, _), run in self.runs.items() if name == idea.name]
        runs += [self.failed[idea.name].summary] if idea.name in self.failed else []
        seeds = list(fate.gains)
        known = bool(seeds)
        mean = {name: statistics.fmean(self.value(name, seed) for seed in seeds) if known else None
                for name in (BASELINE, idea.name)}
        look, tokens = fate.look, sum(run.get("tokens", 0) for run in runs)
        return ledger.Entry(
            ledger.now(), self.name, idea.name, idea.change_sha256[:12], METRIC, mean[BASELINE],
            mean[idea.name], look and look.gain, look and look.low, look and look.high, len(runs), tokens,
            round(sum(run.get("train_seconds", 0.0) for run in runs), 1),
            max((run.get("peak_memory_mib") or 0.0 for run in runs), default=None), fate.verdict,
            self.plan.split, self.plan.data, without_secrets(self.plan.description or idea.typed),
            without_secrets(shlex.join(idea.flags)), without_secrets(shlex.join(self.plan.flags)),
            self.plan.keys[BASELINE])


def ended_run(name: str) -> SavedRun | None:
    """The newest run with this --model_name, if it finished or failed, and the code is still the same."""
    folders = [folder for folder in sorted(places.EXPERIMENTS.glob(f"*_{name}"))
               if (folder / "config.json").is_file() and (folder / "summary.json").is_file()]
    runs = [run for run in map(read_run, folders) if run.knobs.get("model_name") == name]
    return runs[-1] if runs and runs[-1].summary and is_by_this_code(runs[-1]) else None


def is_by_this_code(run: SavedRun) -> bool:
    """Whether the run's scripts and the bench are unchanged since it was made."""
    sources, bench = run.summary.get("sources", {}), run.summary.get("bench_sha256")
    return bench in (None, bench_sha256(bench_hashes())) and all(
        (places.ROOT / name).is_file() and sha256_of(places.ROOT / name) == sha256
        for name, sha256 in sources.items())


def signal_of(code: int) -> signal.Signals | None:
    """The signal that ended a process, if one did: exit code -15 (of Python) or 143 (of a shell)."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number) if number in {*signal.Signals} else None


def was_stopped(code: int, words: str) -> bool:
    """Whether a process ended for a reason that says nothing about its script: somebody's signal, or a full
    disk, which may be SIGBUS. SIGKILL may be of the system when memory runs out; SIGSEGV is a crash."""
    return (signal_of(code) in (*STOPS, signal.SIGQUIT, signal.SIGKILL, signal.SIGBUS)
            or "No space left on device" in words)


def copy_small(run: SavedRun, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the named files that a run has."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, target / name)


def read(file: Path) -> dict:
    """plan.json or results.json of a trial."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); try the idea again under another --name") from error
