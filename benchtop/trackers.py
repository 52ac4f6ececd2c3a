"""Experiment trackers: Weights & Biases, Trackio and TensorBoard, only when asked for and installed.

A tracker gets what metrics.csv gets, from the first process. It is never needed: the run folder has it all.
"""

import contextlib
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Protocol

from benchtop.errors import UserError, first_line
from benchtop.redaction import without_secrets


class Tracker(Protocol):
    def row(self, step: int, values: dict[str, float]) -> None: ...
    def summary(self, results: dict[str, float]) -> None: ...
    def close(self, failed: bool) -> None: ...


def check_packages(cfg) -> None:
    """raises  UserError if a package that --wandb, --trackio or --tensorboard needs is missing"""
    for package, wanted in (("wandb", cfg.wandb), ("trackio", cfg.trackio), ("tensorboard", cfg.tensorboard)):
        if wanted and not importlib.util.find_spec(package):
            raise UserError(f"--{package} needs the package {package}: pip install {package}")


class Trackers:
    """The trackers that --wandb, --trackio and --tensorboard ask for. A tracker that fails is dropped with a
    warning; the run continues.

    step  where a resumed run continues
    """

    def __init__(self, cfg, folder: Path, step: int):
        self.trackers: list[Tracker] = []
        if cfg.wandb:
            self.trackers.append(WandB(cfg, folder))
        if cfg.trackio:
            self.trackers.append(Trackio(cfg, folder))
        if cfg.tensorboard:
            self.trackers.append(TensorBoard(folder, step))

    def row(self, step: int, values: dict) -> None:
        self._each("row", step, numbers_in(values))

    def summary(self, results: dict) -> None:
        self._each("summary", numbers_in(results))

    def close(self, failed: bool) -> None:
        self._each("close", failed)

    def _each(self, method: str, *arguments) -> None:
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:      # of any kind: the run has its own files
                self.trackers.remove(tracker)
                print(f"warning: no longer logging to {type(tracker).__name__} "
                      f"({without_secrets(first_line(error))})", file=sys.stderr)


def numbers_in(values: dict) -> dict[str, float]:
    return {name: value for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)}


def knobs_without_secrets(cfg) -> dict:
    return {knob: without_secrets(value) if isinstance(value, str) else value
            for knob, value in dataclasses.asdict(cfg).items()}


class WandB:
    """A run in a project of Weights & Biases, named like the folder; WANDB_MODE=offline needs no account.

    raises  UserError if wandb cannot start the run
    """

    def __init__(self, cfg, folder: Path):
        import wandb
        # command line and uncommitted changes may hold secrets; the run folder has both with secrets removed
        settings = wandb.Settings(silent=True, x_disable_stats=True, console="off", x_disable_meta=True,
                                  disable_git=True, disable_code=True)
        try:
            # the folder's name is the run's id, so a resumed run continues its curve
            self.run = wandb.init(project=cfg.wandb, name=folder.name, id=folder.name, resume="allow",
                                  dir=folder, config=knobs_without_secrets(cfg), settings=settings)
        except wandb.Error as error:
            raise UserError(f"--wandb {cfg.wandb} does not work here ({without_secrets(first_line(error))}); "
                            "type `wandb login`, or set WANDB_MODE=offline") from error

    def row(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def summary(self, results: dict[str, float]) -> None:
        self.run.summary.update(results)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio:
    """A run in a project of Trackio on this machine, named like the folder; to see it: trackio show

    raises  UserError if trackio cannot start the run
    """

    def __init__(self, cfg, folder: Path):
        # trackio prints a greeting; stdout is for the programs that read our output
        with contextlib.redirect_stdout(sys.stderr):
            import trackio
            try:
                trackio.init(project=cfg.trackio, name=folder.name, config=knobs_without_secrets(cfg),
                             resume="allow")
            except Exception as error:      # trackio has no exception class of its own
                raise UserError(f"--trackio {cfg.trackio} does not work here "
                                f"({without_secrets(first_line(error))})") from error
        self.trackio, self.last_step = trackio, 0

    def row(self, step: int, values: dict[str, float]) -> None:
        self.last_step = step
        self.trackio.log(values, step=step)

    def summary(self, results: dict[str, float]) -> None:
        final = {f"final/{name}": results[name] for name in ("val_loss", "val_bpb") if name in results}
        if final:
            self.trackio.log(final, step=self.last_step)

    def close(self, failed: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.trackio.finish()


class TensorBoard:
    """Event files in the run folder: tensorboard --logdir experiments"""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter
        # drop what was written from the checkpoint's step on: it is written again
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step or None)

    def row(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def summary(self, results: dict[str, float]) -> None:
        for name in ("val_loss", "val_bpb"):
            if name in results:
                self.writer.add_scalar(f"final/{name}", results[name], results["step"])

    def close(self, failed: bool) -> None:
        self.writer.close()
