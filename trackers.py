"""Runs followed elsewhere: Weights & Biases and TensorBoard, only when asked for and installed.

A tracker gets what metrics.csv gets, on the first process, and is never needed: the run folder has it all.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Protocol

from documents import UserError, first_line


class Tracker(Protocol):
    def row(self, step: int, values: dict[str, float]) -> None: ...
    def summary(self, results: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def open_trackers(cfg, folder: Path, step: int) -> list[Tracker]:
    """What --wandb and --tensorboard ask for; `step` is the one that a resumed run goes on from."""
    trackers: list[Tracker] = []
    if cfg.wandb:
        trackers.append(WandB(cfg, folder))
    if cfg.tensorboard:
        trackers.append(TensorBoard(folder, step))
    return trackers


def numbers_in(values: dict) -> dict[str, float]:
    return {name: value for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)}


class WandB:
    """A run in a project of Weights & Biases, named as the folder; WANDB_MODE=offline needs no account.

    raises  UserError if the package is missing, or does not let the run begin
    """

    def __init__(self, cfg, folder: Path):
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs the package wandb: pip install wandb") from error
        try:
            # the folder's name is the run's id, so a resumed run goes on in its curve
            self.run = wandb.init(project=cfg.wandb, name=folder.name, id=folder.name, resume="allow",
                                  dir=folder, config=dataclasses.asdict(cfg),
                                  settings=wandb.Settings(silent=True, x_disable_stats=True, console="off"))
        except wandb.Error as error:
            raise UserError(f"--wandb {cfg.wandb} does not work here ({first_line(error)}); type `wandb "
                            "login`, or set WANDB_MODE=offline") from error

    def row(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def summary(self, results: dict[str, float]) -> None:
        self.run.summary.update(results)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in the run folder: tensorboard --logdir experiments

    raises  UserError if the package is missing
    """

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
        # what a killed run wrote behind its checkpoint is shown no more
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    def row(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def summary(self, results: dict[str, float]) -> None:
        with contextlib.suppress(KeyError):
            self.writer.add_scalar("final/val_bpb", results["val_bpb"], results["step"])

    def close(self) -> None:
        self.writer.close()
