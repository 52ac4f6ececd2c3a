"""The folder of a run: finding it, locking it, reading what the run left in it.

    experiments/20261121_011504_demo/
        config.json  metrics.csv  held_out.csv  training_log.txt  loss.png  samples.jsonl  summary.json
        hellaswag.jsonl, .jsonl of other benchmarks, model.safetensors           if asked for
        code/  train_gpt.txt  git.diff  requirements.txt  meta.json              what made it (identity.py)
        checkpoint.pt  checkpoint_previous.pt  checkpoint_best.pt                while it is unfinished

log.py writes it during the run.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TextIO

from tiktoken import Encoding

from benchtop import places
from benchtop.checkpoints import LAST, PREVIOUS
from benchtop.errors import UserError, first_line
from benchtop.files import sha256_of, write_text
from benchtop.redaction import without_secrets
from benchtop.tokenizer import load_tokenizer, tokenizer_sha256

if TYPE_CHECKING:       # slow to import, and not needed to read most files
    import torch

# results of the last validation for each held-out document; text_nats leaves out special tokens, which have
# no bytes
HELD_OUT_FILE = "held_out.csv"
HELD_OUT_COLUMNS = ("document", "tokens", "bytes", "nats", "text_nats")


# ------------------------------------------------------------------------------------------------
# Find
# ------------------------------------------------------------------------------------------------

def new_folder(name: str) -> Path:
    """Make experiments/DATE_TIME_NAME, or _2 etc. when runs of the same name begin in the same second."""
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    for attempt in range(1, 1000):
        folder = places.EXPERIMENTS / (f"{stamp}_{name}" if attempt == 1 else f"{stamp}_{name}_{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise UserError(f"{places.EXPERIMENTS} has 999 runs of {name} from this second already; try again")


def find_run(resume: str, name: str) -> Path | None:
    """The folder that --resume means; None if `auto` finds no unfinished run with a checkpoint.

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
    names = os.listdir(places.EXPERIMENTS) if places.EXPERIMENTS.is_dir() else ()
    matches = filter(None, map(pattern.fullmatch, names))
    newest_first = sorted(matches, key=lambda match: (match[1], int(match[2] or 1)), reverse=True)
    folders = [places.EXPERIMENTS / match.string for match in newest_first]
    folders = [folder for folder in folders if saved_name(folder) == name]
    if folders and status_of(folders[0]).startswith("failed"):
        raise UserError(f"the newest run of {name}, {os.path.relpath(folders[0])}, {status_of(folders[0])}; "
                        "pass its folder to --resume to continue from its checkpoint, or choose another "
                        "--model_name")
    unfinished = (folder for folder in folders if not status_of(folder))
    return next((folder for folder in unfinished
                 if is_locked(folder) or any((folder / name).exists() for name in (LAST, PREVIOUS))), None)


def saved_name(folder: Path) -> str | None:
    """The --model_name of a run; None, with a warning, if config.json is damaged."""
    try:
        return saved_knobs(folder).get("model_name")
    except UserError as error:
        print(f"warning: {error}; --resume auto skips it", file=sys.stderr)
        return None


def status_of(folder: Path) -> str:
    """The status of a run in summary.json: finished, or failed and why; empty while it is unfinished."""
    try:
        return str(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["status"])
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'summary.json'} is not a valid run file; delete it to resume") from error


def locked_log(folder: Path) -> TextIO:
    """The log of a run, locked while this process lives, so that no second process trains the run.

    raises  UserError if another process holds it
    """
    log = open(folder / "training_log.txt", "a", encoding="utf-8", errors="backslashreplace")   # noqa: SIM115
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{os.path.relpath(folder)} is being trained by another process; wait for it, "
                        "or begin another run with another --model_name") from error
    except OSError as error:
        print(f"warning: no locks on this file system ({error.strerror}); make sure that nothing else trains "
              f"{folder}", file=sys.stderr)
    return log


def is_locked(folder: Path) -> bool:
    try:
        with open(folder / "training_log.txt", encoding="utf-8") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:     # no log, or no locks on this file system
        return False
    return False


# ------------------------------------------------------------------------------------------------
# Read
# ------------------------------------------------------------------------------------------------

def saved_knobs(folder: Path) -> dict:
    """The knobs in a run's config.json; empty if the file is missing."""
    try:
        return read_object(folder / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        return {}


def summary_of(folder: Path) -> dict:
    """A run's summary.json; raises UserError if it is missing or damaged."""
    try:
        return read_object(folder / "summary.json")
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no summary.json; name the folder of a finished run") from error


def require_script(folder: Path, name: str) -> None:
    """raises  UserError if a script other than `name` trained the run: its knobs mean other things"""
    script = summary_of(folder).get("script", name)
    if script != name:
        raise UserError(f"{folder} was trained by {script}; use that script with --sample")


def read_object(path: Path) -> dict:
    """The JSON object in a file of a run folder; raises UserError if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a valid run file ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a valid run file")
    return content


def read_weights(folder: Path) -> "dict[str, torch.Tensor]":
    """A run's weights; raises UserError if they are missing, damaged, changed since, or not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has no model.safetensors; train it with --save_model")
    summary = folder / "summary.json"       # earlier runs and other programs record no SHA-256
    wanted = read_object(summary).get("weights_sha256") if summary.is_file() else None
    try:
        if wanted and wanted != sha256_of(path):
            raise UserError(f"{path} is damaged: it has changed since it was written (its SHA-256 is not "
                            "that in summary.json); train the run again")
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    diverged = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if diverged:
        raise UserError(f"{path} comes from a run that diverged: {diverged} is not finite")
    return weights


def saved_tokenizer(folder: Path) -> Encoding:
    """The tokenizer that a run was trained with; raises UserError if it is unknown or has changed."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        name, sha256 = meta["name"], summary_of(folder)["tokenizer_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not say which tokenizer it was trained with "
                        f"({type(error).__name__}: {error})") from error
    if not isinstance(name, str):
        raise UserError(f"{folder / 'meta.json'} is not a valid run file")
    tokenizer = load_tokenizer(name)
    if tokenizer_sha256(tokenizer) != sha256:
        raise UserError(f"tokenizer {name} has changed since {folder} was trained")
    return tokenizer


def module_of(script: Path) -> ModuleType:
    """Import a script as a module; its exceptions pass through. Its name has a hash of the path, so that it
    does not replace a module of a script with the same name in another folder."""
    place = hashlib.sha256(str(script.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", f"{script.stem}_{place}"), script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_script(folder: Path) -> ModuleType:
    """Import the script that trained a run; warns if the script has changed since.

    returns  the module, whose EXPERIMENT the functions of benchtop/saved.py take
    raises   UserError if the script is missing, is no valid Python or has no EXPERIMENT
    """
    facts = summary_of(folder)
    name = str(facts.get("script") or str(facts.get("command", "")).split(" ")[0])
    path = places.ROOT / name
    if not name.endswith(".py") or path.parent != places.ROOT or not path.is_file():
        raise UserError(f"{folder} was trained by {name or 'an unknown script'}; "
                        f"put that script into {places.ROOT}")
    if sha256_of(path) != facts.get("code_sha256"):
        print(f"warning: {name} has changed since it trained {folder}", file=sys.stderr)
    try:
        script = module_of(path)
    except SyntaxError as error:
        raise UserError(f"{name} is not valid Python: {error}") from error
    if not hasattr(script, "EXPERIMENT"):
        raise UserError(f"{name} cannot score a saved run; it lacks the EXPERIMENT of train_gpt.py")
    return script


# ------------------------------------------------------------------------------------------------
# Add to a finished run
# ------------------------------------------------------------------------------------------------

def write_items(folder: Path, name: str, items: list[dict]) -> None:
    """Write NAME.jsonl into a run folder: one line for each row of a benchmark."""
    lines = [json.dumps(item) + "\n" for item in items]
    write_text(folder / f"{name}.jsonl", without_secrets("".join(lines)))


def write_benchmark(folder: Path, name: str, result: dict, items: list[dict]) -> None:
    """Add a benchmark's result to a finished run's folder, as if it had been scored at the run's end."""
    write_items(folder, name, items)
    facts = summary_of(folder)
    facts["benchmarks"] = facts.get("benchmarks", {}) | {name: result}
    write_text(folder / "summary.json", without_secrets(json.dumps(facts, indent=2) + "\n"))
