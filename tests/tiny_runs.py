"""Tiny runs in a temporary Benchtop: what the tests of training share."""

import csv
import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from launch import ROOT, run, torchrun  # noqa: F401  (for tests, which find all of this here)

from benchtop import places
from benchtop.machine import Kernels, World
from benchtop.run import Experiment, start
from train_gpt import EXPERIMENT

# a cache of compiled kernels for each kind of CPU: those of one write past the ends of tensors on another
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(
    tempfile.gettempdir(), f"benchtop_tests_{os.getuid()}_{torch.backends.cpu.get_cpu_capability()}"))
DRIVE = str(Path(__file__).with_name("drive.py"))
TINY = dict(num_layers=2, num_heads=2, model_dim=16, value_embeddings=1, seq_len=32, batch_tokens=128,
            num_steps=4, val_every=2, log_every=1, num_samples=2, sample_tokens=5, compile="off",
            device="cpu", dtype="float32")
EAGER = Kernels(compiled=False, compile_reason="", flex=None, attention="plain products")
# rates so low that some steps do not amplify what sums in another order differ by: Adam moves a weight by all
# of its rate, also where its gradient is nothing but rounding
CALM = dict(muon_lr=0.01, embed_lr=0.003, head_lr=0.002, scalar_lr=0.01)


def redirect(patch: pytest.MonkeyPatch, lab: Path, home: Path) -> None:
    """For code in this process: data and tokenizers are the lab's, run folders land below `home`."""
    for place, folder in (("DATA", lab), ("TOKENIZERS", lab), ("EXPERIMENTS", home)):
        patch.setattr(places, place, folder / place.lower())


def train_here(folder: Path, experiment: Experiment = EXPERIMENT, **knobs) -> Path:
    """Train in this process, with the knobs of TINY and these; the run's folder."""
    cfg = experiment.Config(**{**TINY, **knobs})
    before = set(folder.glob("experiments/*"))
    start(experiment, cfg, World(cfg))
    if cfg.resume:
        return Path(cfg.resume)
    made, = set(folder.glob("experiments/*")) - before
    return made


def rows_of(run_folder: Path) -> list[dict]:
    with open(run_folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def summary_of(run_folder: Path) -> dict:
    return json.loads((run_folder / "summary.json").read_text())


def flags(**knobs) -> list[str]:
    """The knobs of TINY and these, as a command line has them."""
    return [f"--{knob}={value}" for knob, value in {**TINY, **knobs}.items()]


def newest(folder: Path, name: str) -> Path:
    """The newest run of a name."""
    return max(folder.glob(f"experiments/*_{name}"), key=lambda path: path.stat().st_mtime_ns)


def drive(lab: Path, lines: str, *arguments: str, processes: int = 1, **options,
          ) -> subprocess.CompletedProcess:
    """Run the lab's train_gpt.py after these lines of Python have tampered with it or its bench."""
    launcher = [] if processes == 1 else torchrun(processes)[1:]
    return run(lab, *launcher, DRIVE, str(lab), lines, *arguments, expect=None, **options)
