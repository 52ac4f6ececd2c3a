"""Checkpoints: everything that a run needs to resume, in one file.

    checkpoint.pt   checkpoint_previous.pt   checkpoint_best.pt     in the folder of an unfinished run

torch.save writes it: weights, optimizer state and all the rest, as a single process would have them.
It is loaded with weights_only=True, so it cannot run code, and only if all its CRC-32 checksums match.
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
    """Save under a temporary name, sync, rename; the last checkpoint becomes checkpoint_previous.pt.

    raises  OSError if the disk is full, for example; the earlier checkpoints are then unchanged
    """
    import torch
    try:
        with whole_file(folder / LAST) as file:
            torch.save({"format": CHECKPOINT_FORMAT} | state, file)
            file.flush()
            os.fsync(file.fileno())     # the last checkpoint is renamed only once this one is complete
            if (folder / LAST).exists():
                os.replace(folder / LAST, folder / PREVIOUS)
    except BaseException as error:
        if isinstance(error.__context__, OSError):      # torch wraps the disk's error
            raise error.__context__ from None
        raise
    sync(folder)


def keep_best_checkpoint(folder: Path) -> None:
    """Keep the last checkpoint as checkpoint_best.pt, too: a hard link where possible, else a copy."""
    with whole_path(folder / BEST) as partial:
        partial.unlink(missing_ok=True)
        link(folder / LAST, partial)


def withdraw_checkpoint(folder: Path) -> int:
    """Delete the last checkpoint, put the previous one in its place and return that one's step, or 0."""
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
    """The newest intact checkpoint of a run: the last one or, with a warning, the previous one.

    Hold the lock on the run's log meanwhile, or the process that trains the run may move these files.
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
            print(f"warning: resuming from the previous checkpoint, of step {state['step']}", file=sys.stderr)
            if (folder / LAST).is_dir():
                raise UserError(f"{folder / LAST} is a folder, not a file; delete it")
            os.replace(path, folder / LAST)     # or the next checkpoint would replace it
        return state
    raise UserError(f"{folder} has no intact checkpoint to resume from; begin a new run without --resume")


def load_checkpoint(path: Path) -> dict:
    """raises  any kind of error if the file is damaged or is not a checkpoint"""
    import torch
    with zipfile.ZipFile(path) as archive:      # torch.load checks no CRC-32, and reads no "folder" entries
        if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
            raise zipfile.BadZipFile("a CRC-32 or an attribute is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"it is not a {CHECKPOINT_FORMAT}")
    return state
