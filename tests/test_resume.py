"""Checkpoints: a run that is stopped in any way goes on as if it had not been.

Run: ./run.sh test tests/test_resume.py
"""

import errno
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_runs import CALM, drive, newest, redirect, rows_of, run, summary_of, train_here
from tiny_runs import flags as tiny_flags

from benchtop.briefing import next_command
from benchtop.checkpoints import CHECKPOINT_FORMAT, load_checkpoint, read_checkpoint
from benchtop.command_line import program
from benchtop.errors import UserError
from benchtop.evaluation import HeldOut, Validation
from benchtop.folder import find_run, locked_log, new_folder
from benchtop.groups import read_run
from benchtop.identity import identity_of
from benchtop.knobs import parse_config
from benchtop.log import RunLog
from benchtop.machine import World
from benchtop.run import Run, start
from benchtop.warm_up import warm_up
from train_gpt import EXPERIMENT, Config

TIMES = ("train_seconds", "tokens_per_second", "mfu", "peak_memory_mib")

# lines for drive.py
KEEP = "benchtop.run.remove_checkpoints = lambda *_, **__: None\n"
DIE_AFTER = """
import os, signal
real_between_steps = benchtop.run.Run.between_steps
def between_steps(run):
    real_between_steps(run)
    if run.step == {step} and run.world.rank == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
benchtop.run.Run.between_steps = between_steps
"""


def last_state(folder: Path) -> dict:
    return load_checkpoint(folder / "checkpoint.pt")


def timeless(rows: list[dict]) -> list[dict]:
    return [{column: value for column, value in row.items() if column not in TIMES} for row in rows]


def tensors_of(state: dict) -> dict[str, torch.Tensor]:
    states = {f"{name} {kind}": tensor for name, kinds in state["optimizer"]["tensors"].items()
              for kind, tensor in kinds.items()}
    return state["model"] | states


def assert_same_run(one: Path, other: Path, exact: bool = True) -> None:
    """The same weights, optimizer states and rows of metrics.csv but for times."""
    ours, theirs = tensors_of(last_state(one)), tensors_of(last_state(other))
    assert set(ours) == set(theirs)
    for name in ours:
        if exact:
            assert torch.equal(ours[name], theirs[name]), name
        else:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-3, atol=2e-4, msg=name)
    rows, wanted = timeless(rows_of(one)), timeless(rows_of(other))
    if exact:
        assert rows == wanted
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, other_row in zip(rows, wanted, strict=True):
        for column in row:
            assert float(row[column] or 0) == pytest.approx(float(other_row[column] or 0), rel=1e-3), column


def flags(**knobs) -> list[str]:
    return tiny_flags(**{**CALM, **knobs})


LENGTH = dict(num_steps=24, val_every=0)        # the run decides by itself when to validate


@pytest.fixture(scope="session")
def whole(lab) -> Path:
    """A run of 24 steps that nothing disturbs."""
    done = drive(lab, KEEP, *flags(**LENGTH, model_name="undisturbed"))
    assert done.returncode == 0, done.stderr
    return newest(lab, "undisturbed")


# ------------------------------------------------------------------------------------------------
# Exactly
# ------------------------------------------------------------------------------------------------

def test_a_run_has_ten_validations_at_tenths_of_it_the_last_at_its_end(whole):
    rows = rows_of(whole)
    # the first step at or behind each tenth of 24
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [3, 5, 8, 10, 12, 15, 17, 20, 22, 24]
    assert len(rows) == 24


IN_EVALUATE = """
import os, signal
from benchtop.evaluation import HeldOut
def evaluate(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
HeldOut.evaluate = evaluate
"""


def test_a_run_that_is_killed_again_and_again_goes_on_to_the_bit(lab, whole):
    """Killed (1) after a step that was saved, (2) between a checkpoint and its validation, (3) between two
    validations, (4) right after one, (5) between two saves; with the same ten validations."""
    name, saved = "killedoften", [7, 8, 10, 12, 18]
    deaths = [("--save_every_steps=1", DIE_AFTER.format(step=7, rank=0)),
              ("--save_every_steps=0", IN_EVALUATE),
              ("--save_every_steps=0", DIE_AFTER.format(step=11, rank=0)),
              ("--save_every_steps=0", DIE_AFTER.format(step=12, rank=0)),
              ("--save_every_steps=9", DIE_AFTER.format(step=19, rank=0))]
    begins = flags(**LENGTH, model_name=name)
    for step, (saves, death) in zip(saved, deaths, strict=True):
        killed = drive(lab, KEEP + death, *begins, saves)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        folder = newest(lab, name)
        assert not (folder / "summary.json").exists()
        assert last_state(folder)["step"] == step
        begins = ["--resume", str(folder)]
    done = drive(lab, KEEP, *begins)
    assert done.returncode == 0, done.stderr
    assert newest(lab, name) == folder
    assert_same_run(folder, whole)
    assert summary_of(folder)["val_loss"] == summary_of(whole)["val_loss"]
    for name in ("samples.jsonl", "held_out.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert [session["from_step"] for session in summary_of(folder)["sessions"]] == [0, *saved]


COPY_AFTER_13 = """
import shutil
real_between_steps = benchtop.run.Run.between_steps
def between_steps(run):
    real_between_steps(run)
    if run.step == 13:
        shutil.copytree(run.log.folder, f"{run.log.folder}_copy")
benchtop.run.Run.between_steps = between_steps
"""


@pytest.mark.slow
def test_a_killed_compiled_run_goes_on_to_the_bit(lab):
    """From what a kill after step 13 would have left of its folder."""
    knobs = dict(num_steps=20, val_every=5, save_every_steps=10, compile="on", dtype="auto")
    done = drive(lab, KEEP + COPY_AFTER_13, *flags(**knobs, model_name="compiled"))
    assert done.returncode == 0, done.stderr
    folder = newest(lab, "compiled")
    killed = Path(f"{folder}_copy")
    assert last_state(killed)["step"] == 10 and len(rows_of(killed)) == 13
    done = drive(lab, KEEP, "--resume", str(killed))
    assert done.returncode == 0, done.stderr
    assert_same_run(killed, folder)


@pytest.mark.parametrize(("knobs", "wanted"), [
    (dict(save_every_minutes=0), [4, 8, 9]),
    (dict(save_every_minutes=0, save_every_steps=3), [3, 4, 6, 8, 9]),
    (dict(save_every_minutes=1e-9), [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    (dict(save_every_minutes=60), [4, 8, 9])])
def test_checkpoints_come_by_steps_by_minutes_and_before_every_validation(here, monkeypatch, knobs, wanted):
    saved, validated = [], []
    checkpoint, evaluate = RunLog.checkpoint, HeldOut.evaluate

    def recording(log, state):
        checkpoint(log, state)
        saved.append(state["step"])
        assert last_state(log.folder)["step"] == state["step"]

    def validating(*arguments):
        validated.append(saved[-1])
        return evaluate(*arguments)
    monkeypatch.setattr(RunLog, "checkpoint", recording)
    monkeypatch.setattr(HeldOut, "evaluate", validating)
    train_here(here, num_steps=9, val_every=4, **knobs)
    assert saved == wanted and validated == [4, 8, 9]


def test_a_run_by_the_clock_goes_on_with_the_time_it_had_left(stopped_run):
    before = 0.999 * float(rows_of(stopped_run)[-1]["train_seconds"])     # the csv has rounded it
    resume_here("--resume", str(stopped_run), "--train_minutes", str(before / 60), "--resume_changed")
    assert [row["step"] for row in rows_of(stopped_run)] == list("123")     # its time was up
    assert summary_of(stopped_run)["status"] == "finished"


def test_time_for_compiling_is_that_of_all_sessions(here, monkeypatch):
    real = warm_up

    def slow(*arguments):
        time.sleep(0.3)
        real(*arguments)
    monkeypatch.setattr("benchtop.warm_up.warm_up", slow)
    folder = stop_here(here)
    first = last_state(folder)["compile_seconds"]
    resume_here("--resume", str(folder))
    said = re.findall(r"kernels ready after ([\d.]+) s", (folder / "training_log.txt").read_text())
    assert len(said) == 2 and float(said[0]) == pytest.approx(first, abs=0.05) and first >= 0.3
    # of what is rounded to a tenth
    assert summary_of(folder)["compile_seconds"] == pytest.approx(sum(map(float, said)), abs=0.16)


def test_the_loss_scale_and_the_best_go_on(here, stopped_run, monkeypatch):
    monkeypatch.setattr("benchtop.run.remove_checkpoints", lambda *_, **__: None)
    whole = last_state(train_here(here, num_steps=6, save_every_steps=1, dtype="float16"))
    folder = stop_here(here, dtype="float16")
    assert last_state(folder)["loss_scale"]["good_steps"] == 3
    resume_here("--resume", str(folder))
    for part in ("loss_scale", "best"):
        assert last_state(folder)[part] == whole[part]
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_: Validation(99.0, 99.0))
    resume_here("--resume", str(stopped_run))
    assert summary_of(stopped_run)["best_step"] == 2 and summary_of(stopped_run)["val_loss"] == 99.0
    assert last_state(stopped_run)["best"]["step"] == 2


def test_a_run_may_be_made_longer(stopped_run):
    resume_here("--resume", str(stopped_run), "--num_steps", "9", "--resume_changed")
    assert [row["step"] for row in rows_of(stopped_run)] == list("123456789")


# ------------------------------------------------------------------------------------------------
# On any number of processes
# ------------------------------------------------------------------------------------------------

KEEP_FIRST = """
import shutil
from benchtop.log import RunLog
real_checkpoint = RunLog.checkpoint
def checkpoint(log, state):
    real_checkpoint(log, state)
    if log.active and state["step"] == 1:
        shutil.copy(log.folder / "checkpoint.pt", log.folder / "first.pt")
RunLog.checkpoint = checkpoint
"""


@pytest.fixture(scope="session")
def four_micro_batches(lab) -> Path:
    """Ten steps of 1 process x 4 micro-batches, with checkpoints of the first and the last."""
    return equal_run(lab, "1x4", processes=1)


def equal_run(lab: Path, name: str, processes: int) -> Path:
    knobs = dict(num_steps=10, val_every=5, model_name=name, save_every_steps=1, micro_batch_tokens=32)
    done = drive(lab, KEEP + KEEP_FIRST, *flags(**knobs), processes=processes)
    assert done.returncode == 0, done.stderr
    return newest(lab, name)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_ends_where_one_does(lab, four_micro_batches, processes):
    """1x4 = 2x2 = 4x1 (processes x micro-batches), and 3 processes, after one step and after ten."""
    folder = equal_run(lab, f"by{processes}", processes)
    for checkpoint, tolerance in (("first.pt", 1e-6), ("checkpoint.pt", 1e-4)):
        ours = tensors_of(load_checkpoint(folder / checkpoint))
        theirs = tensors_of(load_checkpoint(four_micro_batches / checkpoint))
        assert set(ours) == set(theirs)
        most = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
        print(f"{processes} processes, {checkpoint}: largest difference {most:.2e}")
        assert most < tolerance
    for row, wanted in zip(timeless(rows_of(folder)), timeless(rows_of(four_micro_batches)), strict=True):
        for column, value in wanted.items():
            assert value == row[column] or float(value) == pytest.approx(float(row[column]), rel=1e-4), column
    documents, wanted = read_run(folder).documents, read_run(four_micro_batches).documents
    assert len(wanted["nats"]) == summary_of(folder)["held_out_documents"] > 1
    for column, values in wanted.items():
        assert documents[column] == pytest.approx(values, rel=1e-4), column


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_processes(lab, whole):
    """From one process to two, and back to one."""
    words, processes = flags(**LENGTH, model_name="moved"), [1, 2, 1]
    for number, dies_after in zip(processes, (7, 13, 0), strict=True):
        death = DIE_AFTER.format(step=dies_after, rank=0) if dies_after else KEEP
        done = drive(lab, death, *words, processes=number)
        assert bool(done.returncode) == bool(dies_after), done.stderr
        words = ["--resume", str(newest(lab, "moved"))]
    folder = newest(lab, "moved")
    assert_same_run(folder, whole, exact=False)
    sessions = [(session["from_step"], session["processes"]) for session in summary_of(folder)["sessions"]]
    assert sessions == [(0, 1), (5, 2), (12, 1)]


SIGNAL_AFTER = """
import os
real_between_steps = benchtop.run.Run.between_steps
def between_steps(run):
    real_between_steps(run)
    if run.step == {step} and run.world.rank == {rank}:
        os.kill(os.getpid(), {signal})
benchtop.run.Run.between_steps = between_steps
"""


def test_a_signal_saves_and_stops_after_the_step(lab, whole):
    """And the command that it prints then goes on, also when that one is stopped in its turn."""
    words = flags(**LENGTH, model_name="told")
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 8)):
        stopped = drive(lab, KEEP + SIGNAL_AFTER.format(step=step, rank=0, signal=int(number)), *words)
        assert stopped.returncode == 128 + number and "Traceback" not in stopped.stderr, stopped.stderr
        folder = newest(lab, "told")
        last_line = stopped.stdout.strip().splitlines()[-1]
        assert f"--resume {folder.relative_to(lab)}" in last_line and f"of step {step + 1}" in last_line
        assert not (folder / "summary.json").exists() and rows_of(folder)[-1]["step"] == str(step)
        words = shlex.split(last_line.split("resume with: python ")[1])[1:]
    done = drive(lab, KEEP, *words)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, whole)


def test_a_second_ctrl_c_ends_a_run_at_once(lab):
    twice = SIGNAL_AFTER.format(step=3, rank=0, signal=int(signal.SIGINT)) + """
import signal
real_accepts_step = benchtop.run.Run.accepts_step
def accepts_step(run, *arguments):
    if run.step == 3:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10**6):      # Python hears of a signal within a few of these
            pass
        print("not reached")
    return real_accepts_step(run, *arguments)
benchtop.run.Run.accepts_step = accepts_step
"""
    stopped = drive(lab, twice, *flags(num_steps=20, val_every=2, model_name="twice"))
    assert stopped.returncode == 130 and "not reached" not in stopped.stdout
    assert "Traceback" not in stopped.stderr and "interrupted" in stopped.stderr
    assert last_state(newest(lab, "twice"))["step"] == 2


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(lab):
    stopped = drive(lab, SIGNAL_AFTER.format(step=3, rank=1, signal=int(signal.SIGTERM)),
                    *flags(num_steps=20, model_name="oneofall"), processes=2)
    assert stopped.returncode and "exitcode: 143" in re.sub(r"exitcode\s*: ", "exitcode: ", stopped.stderr)
    assert stopped.stdout.count("stopped by SIGTERM; the last good checkpoint is of step 4") == 1
    assert last_state(newest(lab, "oneofall"))["step"] == 4


# ------------------------------------------------------------------------------------------------
# Which run, and whether it is the same
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def stopped_once(lab, tmp_path_factory) -> Path:
    """What stopped_run is a copy of."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("stopped")
        redirect(patch, lab, folder)
        return stop_here(folder)


@pytest.fixture
def stopped_run(here, stopped_once) -> Path:
    """A run in this process that was stopped after step 3 of 6; checkpoints of steps 2 and 3 are there."""
    return another(stopped_once)


def another(run_folder: Path, name: str = "gpt") -> Path:
    """A copy of a run, as if it had begun just now under this name."""
    folder = new_folder(name)
    shutil.copytree(run_folder, folder, dirs_exist_ok=True)
    knobs = json.loads((folder / "config.json").read_text()) | {"model_name": name}
    (folder / "config.json").write_text(json.dumps(knobs, indent=2) + "\n")
    return folder


def stop_here(here: Path, **knobs) -> Path:
    real = Run.between_steps

    def between_steps(run):
        real(run)
        if run.step == 3:
            raise KeyboardInterrupt
    before = set(here.glob("experiments/*"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "between_steps", between_steps)
        train_here(here, num_steps=6, save_every_steps=1, **knobs)
    folder, = set(here.glob("experiments/*")) - before
    assert last_state(folder)["step"] == 3
    return folder


def resume_here(*arguments: str) -> None:
    cfg = parse_config(list(arguments), Config)
    start(EXPERIMENT, cfg, World(cfg))


def interrupt(run: Run) -> None:
    raise KeyboardInterrupt


def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped_once, here, capsys):
    content = bytearray((stopped_once / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:5000], b"", None):
        folder = another(stopped_once)
        path = folder / "checkpoint.pt"
        path.unlink() if damaged is None else path.write_bytes(damaged)
        before = (folder / "checkpoint_previous.pt").read_bytes()
        assert read_checkpoint(folder)["step"] == 2 and path.read_bytes() == before
        assert "warning: resuming from the previous checkpoint, of step 2" in capsys.readouterr().err
    path.write_bytes(content)
    (folder / "checkpoint_previous.pt").write_bytes(before)
    resume_here("--resume", str(folder))
    said = capsys.readouterr()
    assert "warning: resuming from the previous checkpoint, of step 2" in said.err
    assert "resumes after step 2" in said.out
    assert [row["step"] for row in rows_of(folder)] == list("123456")
    assert summary_of(folder)["status"] == "finished" and not list(folder.glob("*.pt*"))


def test_two_damaged_checkpoints_are_one_clear_line(stopped_run, capsys):
    for path in stopped_run.glob("checkpoint*.pt"):
        path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="no intact checkpoint to resume from"):
        resume_here("--resume", str(stopped_run))


def test_any_flipped_bit_is_noticed_or_harmless(stopped_run):
    path, previous = stopped_run / "checkpoint.pt", stopped_run / "checkpoint_previous.pt"
    content, content_before = path.read_bytes(), previous.read_bytes()
    state = load_checkpoint(path)
    rng = random.Random(0)
    entries = range(len(content) - 5000, len(content))      # they say where everything stands
    spots = [*rng.sample(entries, 150), *rng.sample(range(len(content)), 50)]
    noticed = 0
    for spot in spots:
        flip_bit(path, content, spot, 1 << rng.randrange(8))
        loaded = read_checkpoint(stopped_run)
        if loaded["step"] == state["step"]:
            assert all(torch.equal(tensor, tensors_of(loaded)[name])
                       for name, tensor in tensors_of(state).items())
        else:
            assert loaded["step"] == state["step"] - 1
            noticed += 1
            previous.write_bytes(content_before)
    assert noticed > 100
    for entry in zipfile.ZipFile(io.BytesIO(content)).infolist():
        flip_bit(path, content, content.rindex(entry.filename.encode()) - 8, 0x10)      # "it is a folder"
        with pytest.raises(zipfile.BadZipFile):
            load_checkpoint(path)


def flip_bit(path: Path, content: bytes, place: int, bit: int) -> None:
    damaged = bytearray(content)
    damaged[place] ^= bit
    path.write_bytes(damaged)


def test_a_checkpoint_cannot_run_code(stopped_run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)
    for path in stopped_run.glob("checkpoint*.pt"):
        torch.save({"format": CHECKPOINT_FORMAT, "step": Evil()}, path)
    with pytest.raises(UserError, match="no intact checkpoint"):
        resume_here("--resume", str(stopped_run))
    assert not (tmp_path / "executed").exists()


def test_other_knobs_are_named_and_refused_unless_told(stopped_run):
    with pytest.raises(UserError, match=r"--muon_lr is 0\.1, was 0\.05\. Undo that, .* --resume_changed"):
        resume_here("--resume", str(stopped_run), "--muon_lr", "0.1")
    resume_here("--resume", str(stopped_run), "--muon_lr", "0.1", "--resume_changed")
    log = (stopped_run / "training_log.txt").read_text()
    assert "resumed although --muon_lr is 0.1, was 0.05" in log
    assert json.loads((stopped_run / "config.json").read_text())["muon_lr"] == 0.1
    assert json.loads((stopped_run / "config_until_step_3.json").read_text())["muon_lr"] == 0.05


def test_another_shape_is_refused_and_leaves_the_run_as_it_was(stopped_run):
    for knob, value in (("--model_dim", "64"), ("--num_layers", "4")):
        with pytest.raises(UserError, match=r"are of another model: .* has shape .*, was"):
            resume_here("--resume", str(stopped_run), knob, value, "--resume_changed")
    resume_here("--resume", str(stopped_run))


def test_knobs_of_a_session_that_saved_nothing_are_forgotten(stopped_run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "validate_and_log", interrupt)      # what a resumed run does first
        resume_here("--resume", str(stopped_run), "--muon_lr", "0.1", "--resume_changed")
    resume_here("--resume", str(stopped_run))
    assert json.loads((stopped_run / "config.json").read_text())["muon_lr"] == 0.05


def test_another_dtype_is_refused(stopped_run):
    with pytest.raises(UserError, match="the dtype is bfloat16, was float32"):
        resume_here("--resume", str(stopped_run), "--dtype", "bfloat16")


def test_knobs_that_change_no_result_may_change(stopped_run):
    resume_here("--resume", str(stopped_run), "--micro_batch_tokens", "32", "--save_every_steps", "2")
    assert summary_of(stopped_run)["status"] == "finished"


def test_other_code_and_data_are_named_and_refused(stopped_run, monkeypatch):
    real = identity_of

    def other(*arguments):
        identity = real(*arguments)
        identity["sources"]["train_gpt.py"] = "other"
        return identity | {"data_sha256": "other"}
    monkeypatch.setattr("benchtop.run.identity_of", other)
    with pytest.raises(UserError, match=r"the data changed; train_gpt\.py changed\. Undo"):
        resume_here("--resume", str(stopped_run))


def test_auto_takes_the_newest_unfinished_run_of_the_name(here, stopped_once):
    others, first, second = (another(stopped_once, name) for name in ("gpt_2", "gpt", "gpt"))
    again = tiny_flags(num_steps=6, save_every_steps=1)
    (second / "config.json").rename(second / "away")
    (second / "config.json").write_text("")     # as a loss of power may leave it
    assert find_run("auto", "gpt") == first
    (second / "away").replace(second / "config.json")
    with locked_log(second), pytest.raises(UserError, match="by another process; wait for it"):
        resume_here("--resume", "auto", *again)     # neither an older run nor a new one
    for wanted in (second, first):
        checkpoint = (wanted / "checkpoint.pt").read_bytes()
        resume_here("--resume", "auto", *again)
        assert summary_of(wanted)["status"] == "finished"
        (wanted / "checkpoint.pt").write_bytes(checkpoint)      # as if killed before it was deleted
    assert not (others / "summary.json").exists()
    before = set((here / "experiments").iterdir())
    resume_here("--resume", "auto", *again)       # nothing is left, so a new run begins
    new, = set((here / "experiments").iterdir()) - before
    assert summary_of(new)["sessions"][0]["from_step"] == 0


def test_auto_does_not_repeat_a_failure(stopped_run):
    (stopped_run / "summary.json").write_text('{"status": "failed: the loss is nan"}')
    with pytest.raises(UserError, match=r"the newest run of gpt, .* failed: the loss is nan; pass its "):
        resume_here("--resume", "auto")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "validate_and_log", interrupt)      # what a resumed run does first
        resume_here("--resume", str(stopped_run))
    assert find_run("auto", "gpt") == stopped_run       # it goes on, so it has not failed any more


def test_a_run_is_trained_by_one_process_at_a_time(stopped_run):
    with locked_log(stopped_run), pytest.raises(UserError, match="trained by another process"):
        resume_here("--resume", str(stopped_run))


def test_what_cannot_be_resumed_says_so(here, stopped_run):
    with pytest.raises(UserError, match="must be the folder of a run, or auto; nowhere has no config"):
        resume_here("--resume", "nowhere")
    resume_here("--resume", str(stopped_run))
    with pytest.raises(UserError, match="is finished; begin a new run"):
        resume_here("--resume", str(stopped_run))
    (stopped_run / "config.json").write_text("[1, 2")
    (stopped_run / "summary.json").unlink()
    with pytest.raises(UserError, match="is not a valid run file"):
        resume_here("--resume", str(stopped_run))


def test_the_best_checkpoint_is_of_the_best_validation(here, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 4.0])
    monkeypatch.setattr(HeldOut, "evaluate",
                        lambda *_: Validation(next(losses), 1.0))
    folder = train_here(here, num_steps=8, save_model=True)
    assert load_checkpoint(folder / "checkpoint_best.pt")["step"] == 4
    assert {path.name for path in folder.glob("checkpoint*")} == {"checkpoint_best.pt"}
    assert summary_of(folder)["best_step"] == 4 and summary_of(folder)["best_val_loss"] == 2.0


# ------------------------------------------------------------------------------------------------
# What to try next
# ------------------------------------------------------------------------------------------------

def test_the_command_to_try_next_works_as_it_is_printed_also_after_a_resume(lab):
    """It is the run's own, as it began, with one more layer: no word of the one that resumed it is in it."""
    arguments = flags(num_steps=4, model_name="shallow", save_every_steps=1)
    killed = drive(lab, DIE_AFTER.format(step=2, rank=0), *arguments, "--temperature", "0.5")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = drive(lab, "", "--resume", str(newest(lab, "shallow")), "--micro_batch_tokens", "64")
    assert done.returncode == 0, done.stderr
    said = re.search(r"^try next    python (train_gpt\.py .*)$", done.stdout, re.MULTILINE)[1]
    run(lab, *shlex.split(said))
    before, after = (json.loads((newest(lab, name) / "config.json").read_text())
                     for name in ("shallow", "deeper"))
    differing = {knob for knob in after if after[knob] != before[knob]}
    assert differing == {"num_layers", "model_name", "micro_batch_tokens"}
    assert (after["num_layers"], after["micro_batch_tokens"]) == (3, 0)


@pytest.mark.parametrize(("command", "wanted"), [
    ("train_gpt.py", []),
    ("train_gpt.py --preset demo --seed 3", ["--preset", "demo", "--seed", "3"]),
    ("train_gpt.py --num_layers 2 --model_name x --seed=3", ["--seed=3"]),
    ("train_gpt.py --num_layers=2 --seed 3 --model_name=x", ["--seed", "3"]),
    ("train_gpt.py --resume auto --seed 3", ["--seed", "3"]),
    ("train_gpt.py --resume=auto --resume_changed --seed 3", ["--seed", "3"]),
    ("train_gpt.py --compare_to 'my runs=experiments/*_x' --seed 3",
     ["--compare_to", "my runs=experiments/*_x", "--seed", "3"]),
    ("train_gpt.py --prompt it's --seed 3", ["--prompt", "it's", "--seed", "3"])])      # an earlier version's
def test_the_command_to_try_next_keeps_every_other_word(monkeypatch, command, wanted):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
    said = shlex.split(next_command(Config(num_layers=6), {"command": command}))
    assert said == [*program(), *wanted, "--num_layers", "7", "--model_name", "deeper"]


def test_the_command_is_recorded_as_a_shell_takes_it(here, monkeypatch):
    words = ["train_gpt.py", "--compare_to", "my runs=experiments/*_x", "--prompt", "it's"]
    monkeypatch.setattr(sys, "argv", words)
    assert shlex.split(summary_of(train_here(here))["command"]) == words


# ------------------------------------------------------------------------------------------------
# A full disk
# ------------------------------------------------------------------------------------------------

def test_a_disk_full_while_saving_leaves_the_last_good_checkpoint(here, monkeypatch, capsys):
    real_save = torch.save

    class Full:
        """A file on a disk that is full after 1,000 bytes."""

        def __init__(self, file):
            self.file, self.left = file, 1000

        def write(self, content):
            self.left -= len(content)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

        def flush(self):
            self.file.flush()

    def save(state, file):
        real_save(state, Full(file) if state["step"] >= 3 else file)
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr("benchtop.run.remove_checkpoints", lambda *_, **__: None)
    folder = train_here(here, save_every_steps=1)
    said = capsys.readouterr().out
    assert ("warning: step 3 was not saved (No space left on device); "
            f"the last good checkpoint is of step 2; resume with: {' '.join(program())} ") in said
    assert last_state(folder)["step"] == 2 and not list(folder.glob("*.partial"))
    assert summary_of(folder)["status"] == "finished"       # training needed no disk


def test_a_real_disk_full_while_saving(lab, whole, tmp_path):
    """The run folder on a file system of 6 MiB, in a mount namespace of its own."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(small)]
    probe = subprocess.run(["unshare", "-rm", *mount], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no mount namespaces here: {probe.stderr.strip()}")
    lines = KEEP + f"""
import ctypes, os, pathlib, subprocess
ids = {{"uid": os.getuid(), "gid": os.getgid()}}
assert ctypes.CDLL(None).unshare(0x10020000) == 0       # a user namespace and a mount namespace
pathlib.Path("/proc/self/setgroups").write_text("deny")
for kind, own in ids.items():
    pathlib.Path(f"/proc/self/{{kind}}_map").write_text(f"0 {{own}} 1")
subprocess.run({mount}, check=True)
from benchtop import places
from benchtop.checkpoints import load_checkpoint
places.EXPERIMENTS = pathlib.Path({str(small)!r})""" + """
real = benchtop.run.Run.validate_and_log
def validate_and_log(run):
    folder = run.log.folder
    if run.step == 2:       # then all is taken that is left of the disk, but half of what a checkpoint takes
        free, left = os.statvfs(folder), (folder / "checkpoint.pt").stat().st_size // 2
        (places.EXPERIMENTS / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize - left))
    if run.step == 3:
        print("found whole:", load_checkpoint(folder / "checkpoint.pt")["step"], flush=True)
    real(run)
benchtop.run.Run.validate_and_log = validate_and_log
"""
    done = drive(lab, lines, *flags(num_steps=4, val_every=4, save_every_steps=1, model_dim=24))
    assert "step 3 was not saved (No space left on device); the last good checkpoint is of step 2" \
        in done.stdout, done.stdout + done.stderr
    assert "found whole: 2" in done.stdout and "Traceback" not in done.stderr


def test_a_disk_full_while_logging_ends_in_one_line(here, monkeypatch):
    def full(log, values, progress):
        if values["step"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(RunLog, "row", full)
    with pytest.raises(UserError, match=r"No space left .*; the last good checkpoint is of step 2; resume"):
        train_here(here)


def test_a_folder_that_is_removed_while_its_run_trains_ends_it_in_one_line(here, monkeypatch):
    real = Run.between_steps

    def between_steps(run):
        real(run)
        if run.step == 2:
            shutil.rmtree(run.log.folder)
    monkeypatch.setattr(Run, "between_steps", between_steps)
    with pytest.raises(UserError, match=r"^No such file or directory: .*; there is no checkpoint$"):
        train_here(here, save_every_steps=1)
