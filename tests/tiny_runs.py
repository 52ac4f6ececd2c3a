"""Tiny runs in a temporary Benchtop: what the tests of training share."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import train_gpt
from train_gpt import Config, World

ROOT = Path(train_gpt.__file__).parent
DRIVE = str(Path(__file__).with_name("drive.py"))
TINY = dict(num_layers=2, num_heads=2, model_dim=16, value_embeddings=1, seq_len=32, batch_tokens=128,
            num_steps=4, depth_warmup_frac=0.4, sampled_softmax_frac=0.6, val_every=2, log_every=1,
            num_samples=2, sample_tokens=5, compile="off", device="cpu", dtype="float32")


def run(folder: Path, script: str, *arguments: str, expect: int = 0, **options,
        ) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, script, *arguments], cwd=folder, capture_output=True, text=True,
                          timeout=300, **options)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def train_here(folder: Path, **knobs) -> Path:
    cfg = Config(**{**TINY, **knobs})
    train_gpt.train(cfg, World(cfg))
    return max((folder / "experiments").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def rows_of(run_folder: Path) -> list[dict]:
    with open(run_folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def summary_of(run_folder: Path) -> dict:
    return json.loads((run_folder / "summary.json").read_text())


def flags(**knobs) -> list[str]:
    """The knobs of TINY and these, as a command line has them."""
    return [f"--{knob}={value}" for knob, value in {**TINY, **knobs}.items()]


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def newest(folder: Path, name: str) -> Path:
    """The newest run of a name."""
    return max(folder.glob(f"experiments/*_{name}"), key=lambda path: path.stat().st_mtime_ns)


def drive(lab: Path, lines: str, *arguments: str, processes: int = 1, **options,
          ) -> subprocess.CompletedProcess:
    """Run the lab's train_gpt.py after these lines of Python have tampered with it."""
    launcher = [sys.executable] if processes == 1 else torchrun(processes)
    return subprocess.run([*launcher, DRIVE, str(lab), lines, *arguments], cwd=lab, capture_output=True,
                          text=True, timeout=400, **options)
