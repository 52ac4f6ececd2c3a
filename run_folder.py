"""The folder of a run: who trains it, its checkpoints, its picture, and the facts about what made it.

    experiments/20261121_011504_demo/
        checkpoint.pt  checkpoint_previous.pt  checkpoint_best.pt     while it is unfinished

A checkpoint is one file of torch.save: weights, optimizer state and all the rest a run needs to go on, as one
process alone would have them. It is read with weights_only=True, so it can run no code, and only if all its
CRC-32 are right.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from datetime import datetime
from pathlib import Path
from typing import TextIO

import torch

from documents import UserError

ROOT = Path(__file__).resolve().parent
EXPERIMENTS = ROOT / "experiments"

CHECKPOINT_FORMAT = "benchtop checkpoint 1"
LAST, PREVIOUS, BEST = "checkpoint.pt", "checkpoint_previous.pt", "checkpoint_best.pt"


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------

def new_folder(name: str) -> Path:
    """experiments/DATE_TIME_NAME, with a number behind when two runs of a name begin in the same second."""
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    for attempt in range(1, 1000):
        folder = EXPERIMENTS / (f"{stamp}_{name}" if attempt == 1 else f"{stamp}_{name}_{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise UserError(f"{EXPERIMENTS} has too many runs of {name} from this second")


def find_run(resume: str, name: str) -> Path | None:
    """The folder that --resume means; None where `auto` finds no unfinished run that nobody trains.

    raises  UserError if it cannot be resumed
    """
    if resume != "auto":
        folder = Path(resume)
        if status_of(folder) == "finished":
            raise UserError(f"{folder} is finished; begin a new run without --resume")
        if not (folder / "config.json").is_file():
            raise UserError(f"--resume must be the folder of a run, or auto; {resume} has no config.json")
        return folder
    pattern = re.compile(rf"(\d{{8}}_\d{{6}})_{re.escape(name)}(?:_(\d+))?")
    matches = filter(None, map(pattern.fullmatch, os.listdir(EXPERIMENTS) if EXPERIMENTS.is_dir() else ()))
    newest_first = sorted(matches, key=lambda match: (match[1], int(match[2] or 1)), reverse=True)
    folders = [EXPERIMENTS / match.string for match in newest_first]
    folders = [folder for folder in folders if saved_knobs(folder).get("model_name") == name]
    if folders and status_of(folders[0]).startswith("failed"):
        raise UserError(f"the newest run of {name}, {os.path.relpath(folders[0])}, {status_of(folders[0])}; "
                        "name its folder with --resume to go on from its checkpoint, or take another "
                        "--model_name")
    return next((folder for folder in folders if not status_of(folder) and not is_locked(folder)
                 and any((folder / name).exists() for name in (LAST, PREVIOUS))), None)


def status_of(folder: Path) -> str:
    """What summary.json says of a run: finished, or failed and why; nothing while it is unfinished."""
    try:
        return str(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["status"])
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'summary.json'} is not what a run writes; delete it to resume") from error


def saved_knobs(folder: Path) -> dict:
    """What config.json of a run says; nothing where the file is missing."""
    path = folder / "config.json"
    try:
        knobs = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not what a run writes") from error
    if not isinstance(knobs, dict):
        raise UserError(f"{path} is not what a run writes")
    return knobs


def lock(log: TextIO) -> None:
    """Hold a run by its log, as long as this process lives, against a second process that would train it."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{Path(log.name).parent} is being trained by another process") from error


def is_locked(folder: Path) -> bool:
    try:
        with open(folder / "training_log.txt", encoding="utf-8") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------

def write_checkpoint(folder: Path, state: dict) -> None:
    """Save under a temporary name, sync, rename; the one before stays as checkpoint_previous.pt.

    raises  OSError, and then nothing has changed
    """
    partial = folder / f"{LAST}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save({"format": CHECKPOINT_FORMAT} | state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):      # torch wraps what the disk says
            raise error.__context__ from None
        raise
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(partial, folder / LAST)
    sync(folder)


def sync(folder: Path) -> None:
    """Make renames in a folder outlast a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_best_checkpoint(folder: Path) -> None:
    """The last checkpoint stays as checkpoint_best.pt, too; where there are links, without taking space."""
    partial = folder / f"{BEST}.partial"
    partial.unlink(missing_ok=True)
    try:
        os.link(folder / LAST, partial)
    except OSError:
        shutil.copyfile(folder / LAST, partial)
    os.replace(partial, folder / BEST)


def remove_checkpoints(folder: Path, keep_best: bool) -> None:
    for name in (LAST, PREVIOUS) if keep_best else (LAST, PREVIOUS, BEST):
        (folder / name).unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> dict:
    """The newest whole checkpoint of a run; a damaged one gives way to the one before it, with a warning.

    raises  UserError if there is none
    """
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError,
                IndexError, AttributeError, NotImplementedError) as error:
            first_line = (str(error) or type(error).__name__).splitlines()[0][:100]
            print(f"warning: {path} is damaged ({first_line})", file=sys.stderr)
            continue
        if name == PREVIOUS:
            print(f"warning: going on from the one before it, of step {state['step']}", file=sys.stderr)
            os.replace(path, folder / LAST)
        return state
    raise UserError(f"{folder} has no whole checkpoint to go on from; begin a new run without --resume")


def load_checkpoint(path: Path) -> dict:
    """raises  one of many errors if the file is damaged; UserError if it is whole but something else"""
    with zipfile.ZipFile(path) as archive:      # torch.load does not look at the CRC-32
        if archive.testzip():
            raise zipfile.BadZipFile("a CRC-32 is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a {CHECKPOINT_FORMAT}; begin a new run without --resume")
    return state


# ------------------------------------------------------------------------------------------------
# Text and picture
# ------------------------------------------------------------------------------------------------

def write_whole(path: Path, text: str) -> None:
    """A text without secrets, which appears under its name when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(without_secrets(text), encoding="utf-8")
    os.replace(partial, path)


def without_secrets(text: str) -> str:
    """The text, with values of the environment's tokens, keys and passwords replaced by their names."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", name, re.IGNORECASE):
            text = text.replace(value, f"[{name}]")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "[a Hugging Face token]", text)


def draw_loss(path: Path, rows: list[dict], title: str, xz_bpb: float | None) -> None:
    """Loss in nats per token on the left, bits per byte of the held-out text on the right, over tokens."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    validated = [row for row in rows if "val_loss" in row]
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.grid": True, "grid.alpha": 0.25,
                            "axes.titleweight": "bold", "axes.titlelocation": "left"}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        left.plot([row["tokens"] / 1e6 for row in rows], [row["train_loss"] for row in rows],
                  color="#9bb7d4", linewidth=1, label="training batches")
        left.plot([row["tokens"] / 1e6 for row in validated], [row["val_loss"] for row in validated],
                  color="#1f4e79", marker="o", markersize=4, label="held-out text")
        left.set(title=f"{title}: loss", xlabel="million tokens trained on", ylabel="nats per token")
        right.plot([row["tokens"] / 1e6 for row in validated], [row["val_bpb"] for row in validated],
                   color="#1f4e79", marker="o", markersize=4, label="this model")
        if validated:
            last = validated[-1]
            right.annotate(f"{last['val_bpb']:.3f}", (last["tokens"] / 1e6, last["val_bpb"]),
                           textcoords="offset points", xytext=(0, -14),
                           ha="right", color="#1f4e79", weight="bold")
            right.set_ylim(0, 1.1 * max([row["val_bpb"] for row in validated] + [xz_bpb or 0]))
        if xz_bpb:
            right.axhline(xz_bpb, color="#b5532a", linestyle="--", linewidth=1, label=f"xz -9e: {xz_bpb:.3f}")
        right.set(title="held-out text", xlabel="million tokens trained on", ylabel="bits per byte")
        for axes, place in ((left, "upper right"), (right, "lower left")):
            axes.set_xlim(left=0)
            if axes.lines:
                axes.legend(frameon=False, loc=place)
        partial = path.with_suffix(".png.partial")
        figure.savefig(partial, dpi=150, format="png")
        pyplot.close(figure)
    os.replace(partial, path)


# ------------------------------------------------------------------------------------------------
# What made a result
# ------------------------------------------------------------------------------------------------

def installed_packages() -> str:
    """What pip freeze would say."""
    found = {f"{package.metadata['Name']}=={package.version}"
             for package in importlib.metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def git(*arguments: str) -> str:
    """What git says in this folder; nothing where there is no repository or no git."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True,
                              errors="replace").stdout
    except FileNotFoundError:
        return ""


def own_sources() -> list[Path]:
    """Every .py file beside this one that this process runs."""
    files = {Path(module.__file__).resolve() for module in list(sys.modules.values())
             if getattr(module, "__file__", None)}
    return sorted(path for path in files if path.parent == ROOT and path.suffix == ".py" and path.is_file())
