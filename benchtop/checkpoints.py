"""Checkpoints: all that a run needs to go on, in one file.

    checkpoint.pt   checkpoint_previous.pt   checkpoint_best.pt     in the folder of an unfinished run

It is a file of torch.save: weights, optimizer state and all the rest, as one process alone would have them.
It is read with weights_only=True, so it can run no code, and only if all its CRC-32 are right.
"""

import os
import sys
import zipfile
from pathlib import Path

from benchtop.errors import UserError, first_line
from benchtop.files import link, sync, whole_file, whole_path

CHECKPOINT_FORMAT = "benchtop checkpoint 1"
LAST, PREVIOUS, BEST = "checkpoint.pt", "checkpoint_previous.pt", "checkpoint_best.pt"


def write_checkpoint(folder: Path, state: dict) -> None:
    """Save under a temporary name, sync, rename; the one before stays as checkpoint_previous.pt.

    raises  OSError, and then nothing has changed
    """
    import torch
    try:
        with whole_file(folder / LAST) as file:
            torch.save({"format": CHECKPOINT_FORMAT} | state, file)
            file.flush()
            os.fsync(file.fileno())     # the last checkpoint gives up its name only to a whole one
            if (folder / LAST).exists():
                os.replace(folder / LAST, folder / PREVIOUS)
    except BaseException as error:
        if isinstance(error.__context__, OSError):      # torch wraps what the disk says
            raise error.__context__ from None
        raise
    sync(folder)


def keep_best_checkpoint(folder: Path) -> None:
    """The last checkpoint stays as checkpoint_best.pt, too; where there are links, without taking space."""
    with whole_path(folder / BEST) as partial:
        partial.unlink(missing_ok=True)
        link(folder / LAST, partial)


def withdraw_checkpoint(folder: Path) -> int:
    """Take the last checkpoint back; the step of the one before, which goes on in its place, or 0."""
    (folder / LAST).unlink(missing_ok=True)
    if not (folder / PREVIOUS).exists():
        return 0
    os.replace(folder / PREVIOUS, folder / LAST)
    try:
        return read_checkpoint(folder)["step"]
    except UserError:
        return 0


def remove_checkpoints(folder: Path, keep_best: bool) -> None:
    for name in (LAST, PREVIOUS) if keep_best else (LAST, PREVIOUS, BEST):
        (folder / name).unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> dict:
    """The newest whole checkpoint of a run; a damaged one gives way to the one before it, with a warning.

    Hold the run's log meanwhile, or its writer moves these files.
    raises  UserError if there is none
    """
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
        except Exception as error:      # a damaged file can raise anything
            print(f"warning: {path} is damaged ({first_line(error)})", file=sys.stderr)
            continue
        if name == PREVIOUS:
            print(f"warning: going on from the one before it, of step {state['step']}", file=sys.stderr)
            if (folder / LAST).is_dir():
                raise UserError(f"{folder / LAST} is a folder; delete it")
            os.replace(path, folder / LAST)     # or the next checkpoint would push the whole one out
        return state
    raise UserError(f"{folder} has no whole checkpoint to go on from; begin a new run without --resume")


def load_checkpoint(path: Path) -> dict:
    """raises  any error if the file is damaged or something else"""
    import torch
    with zipfile.ZipFile(path) as archive:      # torch.load looks at no CRC-32, and into no "folder" at all
        if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
            raise zipfile.BadZipFile("a CRC-32 or an attribute is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"it is not a {CHECKPOINT_FORMAT}")
    return state
