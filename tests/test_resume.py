"""Checkpoints: a run that is stopped in any way goes on as if it had not been.

Run: ./run.sh test tests/test_resume.py
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import flags, newest, rows_of, summary_of, torchrun

import run_folder

DRIVE = str(Path(__file__).with_name("drive.py"))
TIMES = ("train_seconds", "tokens_per_second", "mfu", "peak_memory_mib")

# lines for drive.py
KEEP = "train_gpt.remove_checkpoints = lambda *_, **__: None\n"
DIE_AFTER = """
import os, signal
real_look = train_gpt.look
def look(run):
    real_look(run)
    if run.step == {step} and run.world.rank == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
train_gpt.look = look
"""


def drive(lab: Path, lines: str, *arguments: str, processes: int = 1, **options,
          ) -> subprocess.CompletedProcess:
    launcher = [sys.executable] if processes == 1 else torchrun(processes)
    return subprocess.run([*launcher, DRIVE, str(lab), lines, *arguments], cwd=lab, capture_output=True,
                          text=True, timeout=180, **options)


def in_lab(lab: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "train_gpt.py", *arguments], cwd=lab, capture_output=True,
                          text=True, timeout=120)


def last_state(folder: Path) -> dict:
    return run_folder.load_checkpoint(folder / "checkpoint.pt")


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


@pytest.fixture(scope="session")
def whole(lab) -> Path:
    """A run of 20 steps that nothing disturbs."""
    done = drive(lab, KEEP, *flags(num_steps=20, val_every=5, model_name="undisturbed"))
    assert done.returncode == 0, done.stderr
    return newest(lab, "undisturbed")


# ------------------------------------------------------------------------------------------------
# Exactly
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("saves", "dies_after", "saved"), [
    ("--save_every_steps=10", 13, 10), ("--save_every_steps=0", 10, 10), ("--save_every_steps=1", 7, 7)])
def test_a_killed_run_goes_on_to_the_bit(lab, whole, saves, dies_after, saved):
    name = f"killed{dies_after}"
    arguments = [*flags(num_steps=20, val_every=5, model_name=name), saves]
    killed = drive(lab, KEEP + DIE_AFTER.format(step=dies_after, rank=0), *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = newest(lab, name)
    assert not (folder / "summary.json").exists()
    done = drive(lab, KEEP, "--resume", str(folder))
    assert done.returncode == 0, done.stderr
    assert newest(lab, name) == folder
    assert_same_run(folder, whole)
    assert summary_of(folder)["val_loss"] == summary_of(whole)["val_loss"]
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    sessions = summary_of(folder)["sessions"]
    assert [session["from_step"] for session in sessions] == [0, saved]


@pytest.mark.slow
def test_a_killed_compiled_run_goes_on_to_the_bit(lab):
    def arguments(name: str) -> list[str]:
        return [*flags(num_steps=20, val_every=5, model_name=name, save_every_steps=10), "--compile=on",
                "--dtype=auto"]
    assert drive(lab, KEEP, *arguments("compiled")).returncode == 0
    killed = drive(lab, DIE_AFTER.format(step=13, rank=0), *arguments("compiledkilled"))
    assert killed.returncode == -signal.SIGKILL
    done = drive(lab, KEEP, "--resume", "auto", *arguments("compiledkilled"))
    assert done.returncode == 0, done.stderr
    assert_same_run(newest(lab, "compiledkilled"), newest(lab, "compiled"))
