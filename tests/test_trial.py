"""trial.py: from an idea to a verdict. Run: ./run.sh test tests/test_trial.py"""

import functools
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import PATIENCE, forking, start
from launch import run as run_script
from tiny_runs import flags

import trial
from benchtop import ideas, ledger, places, sequential, turns
from benchtop.errors import UserError
from benchtop.files import locked, sha256_of
from benchtop.groups import open_groups
from benchtop.trials import Trial
from benchtop.turns import Job, Turns

TINY = flags(num_samples=0, data="tiny")


def without_budget(**knobs) -> list[str]:
    return [word for word in flags(num_samples=0, data="tiny", **knobs) if "num_steps" not in word]


NOISE = [0.000, 0.004, -0.003, 0.002, -0.001, 0.003, -0.002, 0.001]


FOLDERS = itertools.count()


class Machine:
    """Stands for training: writes what a run leaves, with the val_bpb that a test wants.

    worth     name of an idea -> its gain over the baseline
    scatter   of the pairs
    broken    name of an idea -> what its run says before it dies
    started   the --model_name of each run
    """

    def __init__(self, worth: dict[str, float], scatter: float = 0.001, broken: dict[str, str] | None = None):
        self.worth, self.scatter, self.broken, self.started = worth, scatter, broken or {}, []

    def run_one(self, turns: Turns, job: Job, slot: str, output: Path) -> int:
        knobs = {word.lstrip("-").partition("=")[0]: after for word, after
                 in zip(job.words, [*job.words[1:], ""], strict=True) if word.startswith("--")}
        name, seed = knobs["model_name"], int(knobs["seed"])
        self.started.append(name)
        idea = name.rsplit("-", 2)[-2]      # of TRIAL-IDEA-KEY_seedN; a shared baseline has no TRIAL
        if idea in self.broken:
            output.write_text(f"much\n{self.broken[idea]}\n")
            return 1
        bpb = 1.25 + NOISE[seed % 8]
        if idea in self.worth:
            bpb -= self.worth[idea] + self.scatter * NOISE[(seed + 3) % 8] / 0.003
        if knobs.get("held_out") == "test":
            bpb += 0.1
        folder = places.EXPERIMENTS / f"20261126_{next(FOLDERS):06d}_{name}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_name": name, "seed": seed}))
        (folder / "summary.json").write_text(json.dumps({
            "status": "finished", "seed": seed, "val_bpb": bpb, "val_loss": 3.0, "tokens": 1000,
            "train_seconds": 2.0, "tokens_per_second": 500, "peak_memory_mib": 700.0,
            "command": " ".join([Path(job.words[0]).name, *job.words[1:]])}))
        return 0


def retouch(job: Job, **facts) -> None:
    """Let the summary that a Machine has just written say something else."""
    file = next(places.EXPERIMENTS.glob(f"*{job.name}/summary.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


@pytest.fixture(autouse=True, scope="module")
def fewer_paths():
    """Verdicts here are plain, so a tenth of the simulated paths will do; test_sequential.py has them all."""
    def draw(number: int) -> None:
        sequential.PATHS = number
        sequential.paths.cache_clear()
        sequential.limits.cache_clear()
    before = sequential.PATHS
    draw(before // 10)
    yield
    draw(before)


@functools.cache
def imported(path: Path, sha256: str):
    """A script as a module, once for each of its texts."""
    return ideas.import_script(path)


@pytest.fixture
def run(lab, here, monkeypatch, capsys):
    """run(machine, "trial's words", *flags of every run) -> its exit status; what it said is in run.said."""
    monkeypatch.setattr(trial, "import_script", lambda path: imported(path, sha256_of(path)))

    def call(machine: Machine, *words: str, checks: bool = False) -> int:
        monkeypatch.setattr(Turns, "_run_one", lambda self, *rest: (machine.run_one(self, *rest), 0.0))
        place = words.index("--") if "--" in words else len(words)
        bare = [] if checks else ["--no_check"]
        monkeypatch.setattr(sys, "argv", ["trial.py", *words[:place], *bare, *words[place:]])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            trial.main()
        call.said, call.complaint = capsys.readouterr()
        return end.value.code
    monkeypatch.chdir(here)
    return call


def verdicts() -> dict[str, str]:
    return {entry.idea: entry.verdict for entry in ledger.read()}


# ------------------------------------------------------------------------------------------------
# Verdicts
# ------------------------------------------------------------------------------------------------

def test_a_gain_is_kept_a_loss_discarded_and_the_ledger_says_so(run):
    machine = Machine({"good": 0.02, "bad": -0.02})
    status = run(machine, "good: --muon_lr 0.1", "bad: --muon_lr 9", "--name", "t", "--margin", "0.01", "--",
                 *TINY)
    assert status == trial.KEPT and verdicts() == {"good": "keep", "bad": "discard"}
    entry = ledger.read()[0]
    assert entry.gain == pytest.approx(0.02, abs=0.002) and entry.low > 0 and entry.runs == 3
    assert entry.tokens == 3000 and entry.seconds == 6 and entry.memory_mib == 700
    assert entry.description == "good: --muon_lr 0.1" and entry.split == "val"
    assert len(machine.started) == 9, "three pairs were enough for both"
    kept = places.EXPERIMENTS / "trials/t"
    assert json.loads((kept / "good/seed2/summary.json").read_text())["val_bpb"] < 1.25
    assert json.loads((kept / "results.json").read_text())["ideas"]["bad"]["verdict"] == "discard"


def test_exit_statuses_tell_the_verdict(run):
    assert run(Machine({"no": -0.02}), "no: --muon_lr 9", "--margin", "0.01", "--", *TINY) == trial.NONE_KEPT
    machine = Machine({"may": 0.005}, scatter=0.02)
    assert run(machine, "may: --muon_lr 9", "--margin", "0.01", "--", *TINY) == trial.SOME_UNDECIDED
    assert "detecting a gain of 0.0100 with 80 % power would take up to about" in run.said
    assert len(machine.started) == 13, "5 more pairs; three runs of the baseline were there already"
    assert run(Machine({}), "nothing", "--", *TINY) == trial.NO_TRIAL and "is not an idea" in run.complaint
    assert run(Machine({}), "no: --muon_lr 9", "--sedes", "3") == trial.NO_TRIAL
    assert "did you mean --seeds?" in run.complaint


def test_without_a_margin_the_spread_of_the_baseline_is_taken(run):
    run(Machine({"good": 0.02}), "good: --muon_lr 0.1", "--name", "t", "--", *TINY)
    results = json.loads((places.EXPERIMENTS / "trials/t/results.json").read_text())
    assert results["margin"] == pytest.approx(0.0035119, abs=1e-6)      # of 0.000, 0.004 and -0.003


def test_more_ideas_need_plainer_gains(run):
    """The chance of keeping any of them by luck stays alpha."""
    assert run(Machine({"one": 0.004}, scatter=0.002), "one: --muon_lr 9", "--name", "alone", "--seeds", "3",
               "--margin", "0.004", "--", *TINY) == trial.KEPT
    worth = {name: 0.004 for name in ("one", *"abcdefghi")}
    typed = [f"{name}: --muon_lr 0.{number}1" for number, name in enumerate(worth)]
    run(Machine(worth, scatter=0.002), *typed, "--name", "many", "--seeds", "3", "--margin", "0.004", "--",
        *TINY)
    assert [entry.verdict for entry in ledger.read() if entry.trial == "many"].count("keep") == 0


@pytest.mark.parametrize(("says", "verdict"), [
    ("train_gpt.py: error: out of memory; a smaller ...", "out of memory"),
    ("idea_memory_1a2b3c4d.py: error: --x must be 1", "crash"),
    ("NameError: name 'x' is not defined", "crash"), ("", "crash")])
def test_an_idea_that_fails_is_written_down_and_the_others_go_on(run, says, verdict):
    machine = Machine({"good": 0.02, "broken": 0.0}, broken={"broken": says})
    assert run(machine, "broken: --muon_lr 9", "good: --muon_lr 0.1", "--margin", "0.01", "--", *TINY) == 0
    assert verdicts() == {"broken": verdict, "good": "keep"}
    assert says.split(";")[0][-20:] in run.said


def test_a_baseline_that_fails_ends_the_trial(run):
    class Broken(Machine):
        def run_one(self, turns, job, slot, output):
            output.write_text("out of luck\n")
            return 1
    assert run(Broken({}), "good: --muon_lr 0.1", "--", *TINY) == trial.NO_TRIAL
    assert "the baseline ended with exit code 1 at seed 0: out of luck" in run.complaint
    assert ledger.read() == []


# ------------------------------------------------------------------------------------------------
# What is trained, and what is not
# ------------------------------------------------------------------------------------------------

def test_sides_take_turns(run):
    machine = Machine({"a": 0.02, "b": 0.02})
    run(machine, "a: --muon_lr 0.1", "b: --muon_lr 0.2", "--name", "t", "--margin", "0.01", "--", *TINY)
    order = [name.split("-")[1] if name.startswith("t-") else "baseline" for name in machine.started]
    assert order == ["baseline", "a", "b", "b", "a", "baseline", "baseline", "a", "b"]


def test_runs_of_the_baseline_serve_every_trial_unless_they_race_the_clock(run):
    first, second = Machine({"a": 0.02}), Machine({"b": 0.02})
    run(first, "a: --muon_lr 0.1", "--margin", "0.01", "--", *TINY)
    run(second, "b: --muon_lr 0.2", "--margin", "0.01", "--", *TINY)
    assert len(first.started) == 6 and len(second.started) == 3
    assert run.said.count("(trained before)") == 3
    for idea in "cd":
        machine = Machine({idea: 0.02})
        run(machine, f"{idea}: --muon_lr 0.3", "--minutes", "1", "--margin", "0.01", "--",
            *without_budget())
        assert len(machine.started) == 6, "speeds are compared only between runs that took turns"


def test_another_flag_script_or_bench_is_another_baseline(run, monkeypatch):
    keys = set()
    for change in (None, "flag", "bench"):
        if change == "bench":
            monkeypatch.setattr(ideas, "bench_sha256", lambda bench: "other")
        machine = Machine({"a": 0.02})
        run(machine, "a: --muon_lr 0.1", "--margin", "0.01", "--name", f"t{change}", "--", *TINY,
            *(["--grad_clip", "1"] if change == "flag" else []))
        keys.add(machine.started[0])
    assert len(keys) == 3


def test_an_interrupted_trial_goes_on_and_a_finished_one_only_tells(run):
    class Dies(Machine):
        def run_one(self, *rest):
            if len(self.started) == 4:
                raise KeyboardInterrupt
            return super().run_one(*rest)
    words = ["a: --muon_lr 0.1", "--name", "t", "--margin", "0.01", "--", *TINY]
    assert run(Dies({"a": 0.02}), *words) == 130
    rest = Machine({"a": 0.02})
    assert run(rest, *words) == trial.KEPT and len(rest.started) == 2
    again = Machine({"a": 0.02})
    assert run(again, *words) == trial.KEPT and not again.started
    assert "has ended; this is what it found" in run.said and len(ledger.read()) == 1


def test_what_was_decided_beforehand_stays(run):
    words = ["a: --muon_lr 0.1", "--name", "t", "--", *TINY]
    run(Machine({"a": 0.02}), *words)
    for changed in (["--margin", "0.5"], ["--alpha", "0.2"], ["--seeds", "3..9"]):
        assert run(Machine({"a": 0.02}), *words[:3], *changed, *words[3:]) == trial.NO_TRIAL
        assert f"was started with different {changed[0][2:].replace('seeds', 'most')}" in run.complaint


def test_without_an_idea_only_the_baseline_is_repeated(run):
    machine = Machine({})
    assert run(machine, "--seeds", "4", "--name", "floor", "--", *TINY) == 0 and len(machine.started) == 4
    assert ledger.read() == [] and "1.2500 1.2540 1.2470 1.2520" in run.said
    assert "floor: mean val_bpb 1.2508 of 4 runs" in run.said and "standard deviation 0.0030" in run.said
    # more seeds can be asked for later: nothing was decided by those that are there
    assert run(machine, "--seeds", "6", "--name", "floor", "--", *TINY) == 0 and len(machine.started) == 6
    assert "of 6 runs" in run.said
    assert run(machine, "--seeds", "6", "--name", "floor", "--", *TINY, "--grad_clip", "1") == trial.NO_TRIAL


def test_a_repeated_baseline_that_diverges_is_counted_not_refused(run):
    class Wild(Machine):
        def run_one(self, turns, job, slot, output):
            super().run_one(turns, job, slot, output)
            if "seed1" in job.name:
                retouch(job, status="failed: the loss is nan")
            return 0
    assert run(Wild({}), "--seeds", "3", "--name", "floor", "--", *TINY) == 0
    assert "failed: the loss is nan" in run.said and "of 2 runs" in run.said


def test_compare_takes_a_trial_as_its_groups(run):
    run(Machine({"good": 0.02}), "good: --muon_lr 0.1", "--name", "t", "--margin", "0.01", "--", *TINY)
    assert [(group.name, len(group.runs)) for group in open_groups(["trials/t"])] == [
        ("baseline", 3), ("good", 3)]
    run(Machine({}), "--seeds", "3", "--name", "floor", "--", *TINY)
    assert [group.name for group in open_groups(["trials/floor"])] == ["floor"]


# ------------------------------------------------------------------------------------------------
# Ideas
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder with train_gpt.py that stands for the project's."""
    (tmp_path / "train_gpt.py").write_text("a = 1\nb = 2\nc = 3\n")
    monkeypatch.setattr(places, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return ideas.baseline_side("train_gpt.py")


def test_an_idea_is_a_script_a_patch_or_flags(scripts, tmp_path):
    changed = "a = 1\nb = 5\nc = 3\n"
    (tmp_path / "five.py").write_text(changed)
    five = ideas.open_idea("five.py", scripts)
    assert (five.name, five.flags) == ("five", ()) and five.script.read_text() == changed
    assert re.fullmatch(r"idea_five_[0-9a-f]{8}\.py", five.script.name)
    (tmp_path / "five.py").write_text("a = 6\n")       # a later edit changes nothing of what was made
    assert five.script.read_text() == changed and ideas.open_idea("five.py", scripts).script != five.script
    (tmp_path / "patch.diff").write_text("Why it should help.\n" + five.patch)
    patched = ideas.open_idea("patch.diff", scripts)
    assert patched.script.name.startswith("idea_patch_") and patched.script.read_text() == changed
    assert patched.patch == five.patch and patched.change_sha256 == five.change_sha256
    mixed = ideas.open_idea("mixed: patch.diff --muon_lr 0.1", scripts)
    assert mixed.flags == ("--muon_lr", "0.1") and mixed.patch == five.patch
    rate = ideas.open_idea("lr2: --muon_lr 0.1", scripts)
    assert (rate.name, rate.script, rate.patch) == ("lr2", scripts.script, "")
    assert len({side.change_sha256 for side in (five, mixed, rate)}) == 3


@pytest.mark.parametrize(("typed", "complaint"), [
    ("gelu", "is not an idea"), ("x:", "changes nothing"), ("x: --seed 3", "leave --seed out"),
    ("x: --held_out=test", "leave --held_out out"),
    ("x: --num_steps 900", "leave --num_steps out"), ("../x: --a 1", "name must be"),
    ("baseline: --a 1", "name must"), ("output: --a 1", "name must"), ("results.json: --a 1", "name must"),
    ("lärm: --a 1", "name must"), ("x: --val_tokens 9", "leave --val_tokens out"),
    ("x: --data other", "leave --data out"), ("more.diff", "also changes benchtop/run.py"),
    ("none.py", "does not exist"), ("none.diff", "does not exist"),
    ("same.py", "changes nothing in train_gpt.py"),
    ("x: 'open", "cannot be read"), ("x: a.py b.py", "has 2 files"), ("stale.diff", "does not apply"),
    ("noise.diff", "does not apply"), ("latin.py", "not UTF-8 text")])
def test_what_is_no_idea_is_said_in_one_line(scripts, tmp_path, typed, complaint):
    (tmp_path / "same.py").write_text("a = 1\nb = 2\nc = 3\n")
    head = "--- a/train_gpt.py\n+++ b/train_gpt.py\n@@ -1 +1 @@\n"
    (tmp_path / "stale.diff").write_text(f"{head}-z = 1\n+z = 2\n")
    other = "--- a/benchtop/run.py\n+++ b/benchtop/run.py\n@@ -1 +1 @@\n-a\n+b\n"
    (tmp_path / "more.diff").write_text(f"{head}-a = 1\n+a = 2\n{other}")
    (tmp_path / "noise.diff").write_bytes(b"\xff\0\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    with pytest.raises(UserError, match=complaint) as error:
        ideas.open_idea(typed, scripts)
    assert "\n" not in str(error.value)


def test_a_broken_idea_is_discarded_before_anything_is_trained(run, lab, monkeypatch):
    """By the script's own --smoke, in a process of its own."""
    (lab / "broken.py").write_text((lab / "train_gpt.py").read_text().replace("class GPT(", "class GTP(", 1))
    monkeypatch.setattr(places, "ROOT", lab)
    bare = SimpleNamespace(plan=SimpleNamespace(flags=[]))
    said = Trial._smoke(bare, ideas.Side("broken", lab / "broken.py", "broken.py"))
    assert said == "NameError: name 'GPT' is not defined"
    monkeypatch.setattr(Trial, "_smoke", lambda self, side: said if side.name == "broken" else "")
    machine = Machine({"broken": 0.1})
    assert run(machine, "broken.py", "--", *TINY, checks=True) == trial.NONE_KEPT
    assert machine.started == [] and verdicts() == {"broken": "crash"} and said in run.said


def test_an_idea_without_a_last_newline_can_be_made_again(scripts, tmp_path):
    (tmp_path / "bare.py").write_text("a = 1\nb = 2\nc = 4")
    bare = ideas.open_idea("bare.py", scripts)
    (tmp_path / "bare.diff").write_text(bare.patch)
    assert ideas.open_idea("bare.diff", scripts).script.read_text() == "a = 1\nb = 2\nc = 4\n"


def test_two_ideas_never_share_a_script(scripts, tmp_path):
    for name, value in (("a-b", 5), ("a_b", 6)):
        (tmp_path / f"{name}.py").write_text(f"a = 1\nb = {value}\nc = 3\n")
    first, second = (ideas.open_idea(f"{name}.py", scripts) for name in ("a-b", "a_b"))
    assert first.script != second.script and "b = 5" in first.script.read_text()


def test_runs_that_must_not_be_compared_are_not(run):
    class Longer(Machine):
        def run_one(self, turns, job, slot, output):
            super().run_one(turns, job, slot, output)
            if "more" in job.name:
                retouch(job, tokens=2000)
            return 0
    words = ["more: --batch_tokens 256", "--margin", "0.01"]
    assert run(Longer({"more": 0.02}), *words, "--name", "t", "--", *TINY) == trial.NO_TRIAL
    assert "differ in tokens" in run.complaint and ledger.read() == []
    status = run(Longer({"more": 0.02}), *words, "--name", "u", "--minutes", "1", "--", *without_budget())
    assert status == trial.KEPT, "by the clock, a faster idea has more tokens"


def test_code_that_changes_while_a_trial_runs_ends_it_and_its_run_is_not_used(run, lab, monkeypatch):
    class Edits(Machine):
        def run_one(self, turns, job, slot, output):
            super().run_one(turns, job, slot, output)
            retouch(job, sources={"train_gpt.py": "of another text"})
            return 0
    words = ["a: --muon_lr 0.1", "--name", "t", "--margin", "0.01", "--", *TINY]
    assert run(Edits({"a": 0.02}), *words) == trial.NO_TRIAL
    assert "was changed while seed 0 was trained" in run.complaint
    again = Machine({"a": 0.02})
    assert run(again, *words) == trial.KEPT and len(again.started) == 6


@pytest.mark.parametrize(("code", "says"), [
    (143, "stopped by SIGTERM; the last good checkpoint is of step 6"), (-9, ""),
    (1, "train_gpt.py: error: No space left on device: 'x'")])
def test_a_run_that_was_stopped_says_nothing_of_its_idea(run, code, says):
    class Stopped(Machine):
        def run_one(self, turns, job, slot, output):
            if "-a-" not in job.name:
                return super().run_one(turns, job, slot, output)
            output.write_text(says)
            return code
    words = ["a: --muon_lr 0.1", "--name", "t", "--margin", "0.01", "--", *TINY]
    assert run(Stopped({}), *words) == trial.NO_TRIAL and "run the same command again" in run.complaint
    assert ledger.read() == []
    assert run(Machine({"a": 0.02}), *words) == trial.KEPT


@pytest.mark.parametrize("code", [-11, 128 + 6])
def test_an_idea_that_crashes_by_a_signal_gets_a_verdict(run, code):
    class Crashing(Machine):
        def run_one(self, turns, job, slot, output):
            if "-a-" not in job.name:
                return super().run_one(turns, job, slot, output)
            output.write_text("")
            return code
    assert run(Crashing({}), "a: --muon_lr 0.1", "--", *TINY) == trial.NONE_KEPT
    assert verdicts() == {"a": "crash"} and "ended by SIG" in run.said


def test_runs_with_other_numbers_of_threads_have_other_names():
    keys, before = set(), torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        keys.add(ideas.key_of(ideas.Side("x", Path(__file__), ""), [], [], ideas.machine_facts(1)))
    torch.set_num_threads(before)
    assert len(keys) == 2


def test_no_idea_and_no_name_is_one_line(run):
    assert run(Machine({}), "--", *TINY) == trial.NO_TRIAL and "give an IDEA" in run.complaint


def test_a_trial_that_waits_for_another_one_says_so_and_ends_with_a_signal(here, monkeypatch):
    waiting, said = Turns([""]), []

    def stopped_once_it_says(line: str, **_) -> None:
        said.append(line)
        waiting.stop(signal.SIGTERM)
    monkeypatch.setattr(turns, "print", stopped_once_it_says, raising=False)
    with locked(places.EXPERIMENTS / "device_cpu.lock"), pytest.raises(SystemExit) as end:
        waiting.run([Job("x", ["-c", "pass"])], here, lambda *_: pytest.fail("it ran"))
    assert end.value.code == 143 and said[0].startswith("another trial is training on the CPU; waiting")


def test_a_trial_that_waits_is_next(here):
    """Two trials on one device take turns, though the first is at its next run within milliseconds."""
    order, two = [], [Turns([""]), Turns([""])]
    begun = threading.Event()

    def tell(job: Job, *_) -> None:
        order.append(job.name)
        begun.set()

    def go(turn: Turns, letter: str) -> None:
        jobs = [Job(f"{letter}{number}", ["-c", "import time; time.sleep(0.3)"]) for number in range(4)]
        for job in jobs:        # run() needs the main thread
            turn._run_one(job, "", here / job.name)
            tell(job)
    first = threading.Thread(target=go, args=(two[0], "a"))
    second = threading.Thread(target=go, args=(two[1], "b"))
    first.start()
    begun.wait(PATIENCE)
    second.start()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert "".join(name[0] for name in order) in ("aabababb", "abababab")


def test_a_broken_idea_costs_one_run_and_can_be_mended_under_its_name(run, monkeypatch):
    machine = Machine({}, broken={"a": "NameError: x"})
    assert run(machine, "a: --muon_lr 9", "--seeds", "4", "--margin", "0.01", "--", *TINY) == trial.NONE_KEPT
    assert sum("-a-" in name for name in machine.started) == 1
    checks = iter(["", "it is broken", "", ""])
    monkeypatch.setattr(Trial, "_smoke", lambda self, side: next(checks))
    words = ["--name", "m", "--margin", "0.01", "--", *TINY]
    assert run(Machine({}), "b: --muon_lr 9", *words, checks=True) == trial.NONE_KEPT
    assert run(Machine({"b": 0.02}), "b: --muon_lr 8", *words, checks=True) == trial.KEPT


def test_an_idea_that_was_tried_before_is_tried_again_with_a_note(run):
    for name in "tu":
        run(Machine({"a": 0.02}), "a: --muon_lr 0.1", "--name", name, "--margin", "0.01", "--", *TINY)
    assert "note: a was tried before, in t (keep), with the same seeds" in run.said


@pytest.mark.parametrize("words", [["--", *TINY, "--sedes", "3"], ["--", "--help"],
                                   ["--description", "x" * 300, "--name", "y" * 300, "--", *TINY]])
def test_what_cannot_be_tried_is_no_verdict(run, words):
    assert run(Machine({}), "a: --muon_lr 0.1", *words) == trial.NO_TRIAL


def test_results_as_json_are_one_object_also_where_there_are_none(run):
    assert run(Machine({}), "nothing", "--json", "--", *TINY) == trial.NO_TRIAL
    assert "is not an idea" in json.loads(run.said)["error"]
    run(Machine({"a": 0.02}), "a: --muon_lr 0.1", "--name", "t", "--margin", "0.01", "--json", "--", *TINY)
    assert json.loads(run.said)["ideas"]["a"]["verdict"] == "keep"
    run(Machine({"a": 0.02}), "--confirm", "t", "--json")
    assert json.loads(run.said)["ideas"]["a"]["selection"] == pytest.approx(0, abs=0.01)


# ------------------------------------------------------------------------------------------------
# Confirming
# ------------------------------------------------------------------------------------------------

def test_a_kept_idea_is_confirmed_once_with_fresh_seeds_on_the_test_split(run):
    run(Machine({"a": 0.02, "b": -0.02}), "a: --muon_lr 0.1", "b: --muon_lr 9", "--name", "t", "--margin",
        "0.01", "--", *TINY)
    machine = Machine({"a": 0.012})
    assert run(machine, "--confirm", "t") == trial.KEPT
    assert all("seed100" in name for name in machine.started) and len(machine.started) == 6
    assert "confirmation number 1 on the test split" in run.said
    assert re.search(r"the gain was \+0\.0\d+ when it was selected and is \+0\.012\d on unseen", run.said)
    last = ledger.read()[-1]
    assert (last.trial, last.idea, last.verdict, last.split) == ("t-confirm", "a", "confirmed", "test")
    again = Machine({"a": 0.02})
    assert run(again, "--confirm", "t") == trial.KEPT and not again.started, "it only tells what was found"
    run(Machine({"a": 0.02}), "a: --muon_lr 0.1", "--name", "other", "--margin", "0.01", "--", *TINY)
    assert run(Machine({}), "--confirm", "other") == trial.NO_TRIAL
    assert "was already evaluated on the test split, in the trial t-confirm" in run.complaint


def test_a_look_is_counted_when_it_begins_and_an_unclear_one_is_no_refutation(run):
    for name, rate in (("t", 0.1), ("u", 0.2)):
        words = ["--name", name, "--margin", "0.01", "--", *TINY]
        run(Machine({name: 0.02}), f"{name}: --muon_lr {rate}", *words)

    class Dies(Machine):
        def run_one(self, *rest):
            raise KeyboardInterrupt
    run(Dies({}), "--confirm", "t")
    assert run(Machine({"u": 0.004}, scatter=0.06), "--confirm", "u") == trial.SOME_UNDECIDED
    assert "confirmation number 2 on the test split" in run.said
    assert ledger.read()[-1].verdict == "undecided" and ledger.read()[-1].split == "test"
    assert run(Machine({"t": 0.02}), "--confirm", "t") == trial.KEPT, "a look that was broken off goes on"


def test_a_changed_baseline_is_not_confirmed(run, monkeypatch):
    run(Machine({"a": 0.02}), "a: --muon_lr 0.1", "--name", "t", "--margin", "0.01", "--", *TINY)
    monkeypatch.setattr(ideas, "bench_sha256", lambda bench: "other")
    assert run(Machine({"a": 0.02}), "--confirm", "t") == trial.NO_TRIAL
    assert "has changed since the trial t" in run.complaint


def test_what_was_not_kept_cannot_be_confirmed(run):
    run(Machine({"b": -0.02}), "b: --muon_lr 9", "--name", "t", "--margin", "0.01", "--", *TINY)
    assert run(Machine({}), "--confirm", "t") == trial.NO_TRIAL and "kept no idea" in run.complaint
    assert run(Machine({}), "--confirm", "nope") == trial.NO_TRIAL and "only t" in run.complaint


# ------------------------------------------------------------------------------------------------
# Devices
# ------------------------------------------------------------------------------------------------

def test_runs_work_side_by_side_and_never_two_on_one_device(tmp_path):
    """Each run notes its device while it works; the test lets them go once two are at work."""
    script = tmp_path / "work.py"
    script.write_text("import os, sys, time, pathlib\n"
                      "here = pathlib.Path(sys.argv[1])\n"
                      "mine = here / ('gpu' + os.environ['CUDA_VISIBLE_DEVICES'])\n"
                      "mine.mkdir()\n"
                      "while not (here / 'go').exists(): time.sleep(0.01)\n"
                      "mine.rmdir()\n")
    ended = []
    both = threading.Thread(target=lambda: (wait_for(lambda: len(list(tmp_path.glob("gpu*"))) == 2),
                                            (tmp_path / "go").touch()))
    both.start()
    jobs = [Job(f"r{number}", [str(script), str(tmp_path)]) for number in range(5)]
    Turns(["0", "1"]).run(jobs, tmp_path / "out", lambda job, code, seconds: ended.append((job.name, code)))
    both.join()
    assert sorted(ended) == [(f"r{number}", 0) for number in range(5)]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, "what a test waits for does not come"
        time.sleep(0.01)


def test_each_run_gets_as_many_gpus_as_it_wants(monkeypatch):
    monkeypatch.setattr(turns, "nvidia_gpus", lambda: [{}] * 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Turns.on_this_machine(1, "auto").slots == list("01234567")
    assert Turns.on_this_machine(4, "auto").slots == ["0,1,2,3", "4,5,6,7"]
    assert Turns.on_this_machine(3, "auto").slots == ["0,1,2", "3,4,5"]
    assert Turns.on_this_machine(1, "cpu").slots == [""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2")
    assert Turns.on_this_machine(1, "cuda").slots == ["5", "2"]
    with pytest.raises(UserError, match="there are 2"):
        Turns.on_this_machine(3, "auto")
    monkeypatch.setattr(turns, "nvidia_gpus", lambda: [])
    assert Turns.on_this_machine(1, "auto").slots == [""]


@pytest.mark.slow
def test_a_trial_that_is_told_to_stop_lets_its_run_save(lab, tmp_path):
    words = without_budget(val_every=0)
    said = tmp_path / "said"
    driver = start(lab, forking(lab), "trial.py", "--seeds", "2", "--name", "told", "--no_check", "--steps",
                   "100000", "--", *words, out=os.devnull, err=str(said))
    name = "experiments/2*_train_gpt-*_seed0/training_log.txt"
    known = {*lab.glob(name)}
    wait_for(lambda: any(" 20/100000 " in log.read_text() for log in {*lab.glob(name)} - known))
    driver.terminate()
    driver.join(timeout=PATIENCE)
    assert driver.exitcode == 128 + signal.SIGTERM
    assert "run the same command again to resume" in said.read_text()
    log, = {*lab.glob(name)} - known
    assert log.with_name("checkpoint.pt").exists() and not log.with_name("summary.json").exists()


KILLS_BOTH = """
import os, signal
real_between_steps = benchtop.run.Run.between_steps
def between_steps(run):
    real_between_steps(run)
    if run.step == 8:
        os.kill({driver}, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
benchtop.run.Run.between_steps = between_steps
"""


@pytest.mark.slow
def test_a_killed_and_resumed_trial_ends_equal_to_an_undisturbed_one(lab, tmp_path):
    """Real runs in processes of their own; trial and run are killed at once, in the middle of an idea's run.

    The second trial finds the baseline of seed 0, and has to train that of seed 1.
    """
    knobs = without_budget(save_every_steps=3, val_every=1000)
    words = ["rate: --muon_lr 0.2", "--seeds", "2", "--steps", "30", "--margin", "0.001", "--no_check",
             "--json", "--", *knobs]
    script, found = forking(lab), {}
    for name in ("whole", "killed"):
        line = [script, "trial.py", words[0], "--name", name, *words[1:]]
        if name == "killed":
            last, = (lab / "experiments").glob("2*train_gpt-*_seed1")
            last.rename(tmp_path / last.name)
            driver = start(lab, *line, out=os.devnull, err=os.devnull,
                           env=os.environ | {"TAMPER": KILLS_BOTH})
            driver.join()
            assert driver.exitcode == -signal.SIGKILL
            broken, = (lab / "experiments").glob("2*killed-rate*")
            assert (broken / "checkpoint.pt").exists() and not (broken / "summary.json").exists()
        done = run_script(lab, *line, expect=None)
        found[name] = json.loads(done.stdout)
        assert done.returncode in (0, 1, 2), done.stderr
    whole, killed = found["whole"], found["killed"]
    assert killed["baseline"] == whole["baseline"] and len(whole["baseline"]) == 2
    assert killed["ideas"] == whole["ideas"]
