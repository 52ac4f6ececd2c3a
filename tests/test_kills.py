"""kill -9 at random moments of tokenizing, sharding, training and saving: nothing is lost.

Run: ./run.sh test tests/test_kills.py -s      (-s shows where they fell; KILLS=3 does three times as many)
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import copy_scripts, start
from test_resume import tensors_of, timeless
from tiny_runs import flags, rows_of, summary_of

from benchtop.checkpoints import load_checkpoint

TIMES = int(os.environ.get("KILLS", "1"))
KILLS = {"train_tokenizer": 3 * TIMES, "download_fineweb": 3 * TIMES, "train_gpt": 8 * TIMES}
TOKENIZE = ["--source", "text.jsonl", "--vocabsize", "600", "--name", "tok", "--num_workers", "1"]
SHARD = ["--version", "text.jsonl", "--tokenizer", "tok", "--num_workers", "1",
         "--name", "cut", "--shard_size", "10000"]
STEPS = 10 + 8 * KILLS["train_gpt"]
TRAIN = flags(num_steps=STEPS, val_every=STEPS // 2, save_every_steps=1, model_dim=64)
MAKES = {"train_tokenizer": "tokenizers/tok", "download_fineweb": "data/cut"}


class Bench:
    """A Benchtop whose scripts can be killed at any moment of their lives."""

    def __init__(self, folder: Path):
        copy_scripts(folder)
        rng = random.Random(0)
        words = ["".join(rng.choices("aeinorst", k=rng.randint(2, 9))) for _ in range(3000)]
        rows = [{"text": " ".join(rng.choices(words, k=rng.randint(50, 900)))} for _ in range(300)]
        (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.folder = folder

    def start(self, script: str, arguments: list[str], event: Callable[[], bool] | None = None) -> int:
        """Run a script to its end, or kill it with all its processes when an event comes; its exit code."""
        said = str(self.folder / "said.txt")
        process = start(self.folder, f"{script}.py", *arguments, out=said, err=said)
        if event:
            while process.is_alive() and not event():
                time.sleep(0.001)
            for kill in (os.kill, os.killpg):       # it may not head its group yet, or have ended
                with contextlib.suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)
        process.join()
        return process.exitcode

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()


def after(seconds: float) -> Callable[[], bool]:
    until = time.time() + seconds
    return lambda: time.time() > until


def after_steps(folder: Path, steps: int, seconds: float) -> Callable[[], bool]:
    """So many seconds after a run has written so many more rows of metrics.csv."""
    def rows() -> int:
        return sum(path.read_text().count("\n") for path in folder.glob("experiments/*/metrics.csv"))
    wanted, until = rows() + steps, 0.0

    def event() -> bool:
        nonlocal until
        if not until and rows() >= wanted:
            until = time.time() + seconds
        return until and time.time() > until
    return event


@pytest.fixture
def two_benches(tmp_path):
    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    return [Bench(folder) for folder in folders]


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its SHA-256."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def final_files(folder: Path) -> list[Path]:
    """Tokenizer and data folders under names that are not temporary."""
    return [path for path in (*folder.glob("tokenizers/*"), *folder.glob("data/*"))
            if not path.name.startswith(".")]


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(two_benches):
    """Half of the kills of training come at any time, also before its first step; half after more steps."""
    undisturbed, killed = two_benches
    durations = {}
    jobs = {"train_tokenizer": TOKENIZE, "download_fineweb": SHARD, "train_gpt": [*TRAIN, "--resume", "auto"]}
    for script, arguments in jobs.items():
        begun = time.time()
        assert undisturbed.start(script, arguments) == 0, undisturbed.said()
        durations[script] = time.time() - begun
    theirs, = undisturbed.folder.glob("experiments/*")
    summary = summary_of(theirs)
    step_seconds = (summary["train_seconds"] + summary["checkpoint_seconds"]) / STEPS
    durations["train_gpt"] -= (STEPS - 10) * step_seconds       # to begin, ten steps, and to end
    rng = random.Random(time.time_ns())
    fell = Counter()
    for script, arguments in jobs.items():
        kills = 0
        while kills < KILLS[script]:
            if script != "train_gpt":       # what was finished before the kill came is made anew
                shutil.rmtree(killed.folder / MAKES[script], ignore_errors=True)
            event = after(rng.uniform(0, durations[script]))
            if script == "train_gpt" and kills % 2:
                event = after_steps(killed.folder, rng.randint(2, 6), 2 * step_seconds * rng.random())
            code = killed.start(script, arguments, event)
            check_what_is_final(killed.folder, undisturbed.folder)
            if code == -signal.SIGKILL:
                kills += 1
                fell[stage(killed.folder, script)] += 1
            else:       # the kill came too late
                durations[script] *= 0.9
        assert killed.start(script, arguments) == 0, killed.said()
    print(f"\nkills fell on: {dict(fell)}")
    assert sum(fell.values()) == sum(KILLS.values())
    assert fell["training"] + fell["saving"] == KILLS["train_gpt"]
    assert "Traceback" not in killed.said()
    for kind in ("tokenizers", "data"):
        assert hashes(killed.folder / kind) == hashes(undisturbed.folder / kind)
    finished = [path for path in killed.folder.glob("experiments/*") if (path / "summary.json").exists()]
    for ours in finished:
        assert timeless(rows_of(ours)) == timeless(rows_of(theirs))
        assert summary_of(ours)["val_loss"] == summary_of(theirs)["val_loss"]
    assert max(len(summary_of(ours)["sessions"]) for ours in finished) > 3


def stage(folder: Path, script: str) -> str:
    if script != "train_gpt":
        return {"train_tokenizer": "tokenizing", "download_fineweb": "sharding"}[script]
    if any(folder.glob("experiments/*/*.partial")):
        for partial in folder.glob("experiments/*/*.partial"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        return "saving"
    return "training"


def check_what_is_final(folder: Path, undisturbed: Path) -> None:
    """What has a final name is whole and right."""
    for path in final_files(folder):
        twin = undisturbed / path.relative_to(folder)
        assert path.is_dir() and hashes(path) == hashes(twin)
    for checkpoint in folder.glob("experiments/*/checkpoint*.pt"):
        state = load_checkpoint(checkpoint)
        assert set(tensors_of(state)) and len(state["rows"]) == state["step"] - 1
