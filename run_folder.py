"""The folder of a run: its log, its checkpoints, its picture, and the facts about what made it.

    experiments/20261121_011504_demo/
        config.json  metrics.csv  training_log.txt  loss.png  samples.jsonl  summary.json
        hellaswag.jsonl and other .jsonl of benchmarks, model.safetensors        if asked for
        train_gpt.txt and other .txt, git.diff, requirements.txt, meta.json      what made it
        checkpoint.pt  checkpoint_previous.pt  checkpoint_best.pt                while it is unfinished

A checkpoint is one file of torch.save: weights, optimizer state and all the rest a run needs to go on, as one
process alone would have them. It is read with weights_only=True, so it can run no code, and only if all its
CRC-32 are right.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TextIO

from tiktoken import Encoding
from tqdm import tqdm

from documents import UserError, first_line, sha256_of
from trackers import Trackers, check_packages
from train_tokenizer import TOKENIZERS, load_tokenizer, tokenizer_sha256

if TYPE_CHECKING:       # who only reads what runs left need not wait for it
    import torch

ROOT = Path(__file__).resolve().parent
EXPERIMENTS = ROOT / "experiments"

CHECKPOINT_FORMAT = "benchtop checkpoint 1"
# knobs that leave every result as it is; data and tokenizer are compared by their content
NEUTRAL_KNOBS = ("check", "sample", "prompt", "resume", "resume_changed", "save_every_steps",
                 "save_every_minutes", "data", "tokenizer", "timeout_seconds", "micro_batch_tokens",
                 "gpu_cost_per_hour", "benchmarks", "compare_to", "wandb", "tensorboard")
LAST, PREVIOUS, BEST = "checkpoint.pt", "checkpoint_previous.pt", "checkpoint_best.pt"
PICTURE_SECONDS = 10    # between drawings of loss.png while a run goes on


# ------------------------------------------------------------------------------------------------
# The log
# ------------------------------------------------------------------------------------------------

class RunLog:
    """Writes all that made a result into experiments/DATE_TIME_NAME, and what one wants to see on screen.

    cfg       the dataclass of all knobs
    columns   of metrics.csv
    identity  what identity_of gives
    active    False on processes other than the first: there every method does nothing

    A resumed run (`saved` is its checkpoint, `text` its log) goes on in its folder: metrics.csv is cut back
    to the checkpoint's step and the log says where it goes on. When it has saved something of its own, the
    folder tells of the new knobs and code; those before stay beside them.
    """

    def __init__(self, cfg, columns: tuple[str, ...], identity: dict, tokenizer: Encoding, saved: dict | None,
                 text: TextIO | None, active: bool):
        self.cfg, self.columns, self.active = cfg, columns, active
        self.rows: list[dict] = saved["rows"] if saved else []
        self.saved_step = saved["step"] if saved else 0
        self.begun = time.perf_counter() - (saved["total_seconds"] if saved else 0)
        self.last_line = self.last_picture = time.perf_counter()
        if not self.active:
            return
        check_packages(cfg)
        self.folder = Path(cfg.resume) if saved else new_folder(cfg.model_name)
        self.text = text or locked_log(self.folder)
        # the bar is a picture of what the lines say, for a terminal; elsewhere the lines come sparsely
        self.bar = tqdm(total=cfg.num_steps, unit="step", disable=not sys.stderr.isatty(), leave=False,
                        initial=self.saved_step,
                        bar_format="{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt} {postfix}")
        self.sessions = [*(saved["sessions"] if saved else []), {
            "from_step": self.saved_step,
            **{fact: identity[fact] for fact in ("processes", "device", "code_sha256", "command")}}]
        # a run is known by the command that began it, also when it goes on by another
        self.identity = identity | ({"command": saved["identity"]["command"]} if saved else {})
        # the knobs of resuming speak of one session only
        knobs = dataclasses.asdict(cfg) | {"resume": "", "resume_changed": False}
        self.origin = {"config.json": json.dumps(knobs, indent=2) + "\n",
                       "requirements.txt": installed_packages(), "git.diff": git("diff", "HEAD"),
                       "meta.json": tokenizer_meta(tokenizer),
                       **{f"{path.stem}.txt": path.read_text(encoding="utf-8") for path in own_sources()}}
        if not saved:
            self._tell_origin()
        (self.folder / "summary.json").unlink(missing_ok=True)      # of a run that failed and goes on
        self._write("metrics.csv", "\n".join([",".join(columns), *map(self._csv_row, self.rows), ""]))
        self.csv = open(self.folder / "metrics.csv", "a", encoding="utf-8")  # noqa: SIM115
        self.trackers = Trackers(cfg, self.folder, self.saved_step)

    def _tell_origin(self) -> None:
        """Write what makes this session's results; what made those before it stays beside it."""
        began = self.sessions[-1]["from_step"]
        for name, content in self.origin.items():
            path = self.folder / name
            before = path.with_stem(f"{path.stem}_until_step_{began}")
            changed = path.exists() and path.read_text(encoding="utf-8") != without_secrets(content)
            if changed and not before.exists():
                os.replace(path, before)
            self._write(name, content)
        self.origin = {}

    def _write(self, name: str, content: str) -> None:
        write_whole(self.folder / name, content)

    def say(self, line: str) -> None:
        """A line for the log and the screen."""
        if self.active:
            self.note(line)
            self.bar.clear()
            print(line, flush=True)
            self.last_line = time.perf_counter()

    def note(self, line: str) -> None:
        """A line for the log only."""
        if self.active:
            self.text.write(without_secrets(line) + "\n")
            self.text.flush()

    def row(self, values: dict, progress: float) -> None:
        """A row of metrics.csv, and its line in the log; on screen as a bar, or now and then as a line."""
        if not self.active:
            return
        self.rows.append(values)
        self.csv.write(self._csv_row(values) + "\n")
        self.csv.flush()
        self.trackers.row(values["step"], values)
        left = values["train_seconds"] * (1 - progress) / progress
        line = (f"step {values['step']:>{len(str(self.cfg.num_steps))}}/{self.cfg.num_steps}  "
                f"train_loss {values['train_loss']:.4f}  "
                + (f"val_loss {values['val_loss']:.4f}  val_bpb {values['val_bpb']:.4f}  "
                   if "val_loss" in values else "")
                + f"{values['tokens_per_second']:,.0f} tokens/s  "
                + (f"mfu {values['mfu']:.1%}  " if "mfu" in values else "")
                + f"{minutes(values['train_seconds'])} trained, {minutes(left)} to go")
        if "val_loss" in values or (self.bar.disable and time.perf_counter() - self.last_line > 15):
            self.say(line)
        else:
            self.note(line)
        self.bar.set_postfix_str(f"loss {values['train_loss']:.3f}, {minutes(left)} to go", refresh=False)
        self.bar.update(values["step"] - self.bar.n)

    def _csv_row(self, values: dict) -> str:
        """The line of metrics.csv; a cell is empty where nothing was measured."""
        cells = (values.get(column, "") for column in self.columns)
        return ",".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells)

    def picture(self, xz_bpb: float | None = None, at_end: bool = True) -> None:
        """Draw loss.png; before the end only if the last drawing, which takes a moment, is some time ago."""
        if self.active and (at_end or time.perf_counter() - self.last_picture > PICTURE_SECONDS):
            draw_loss(self.folder / "loss.png", self.rows, self.cfg.model_name, xz_bpb)
            self.last_picture = time.perf_counter()

    def samples(self, samples: list[dict]) -> None:
        if self.active:
            lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in samples]
            self._write("samples.jsonl", "".join(lines))

    def benchmark(self, name: str, items: list[dict]) -> None:
        if self.active:
            write_items(self.folder, name, items)

    def weights(self, model: "torch.nn.Module") -> None:
        if self.active:
            from safetensors.torch import save_file
            tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
            save_file(tensors, self.folder / "model.safetensors.partial")
            os.replace(self.folder / "model.safetensors.partial", self.folder / "model.safetensors")

    def summary(self, status: str, results: dict) -> dict:
        """The numbers that the run ends with, and what made them."""
        if not self.active:
            return {}
        hours = (time.perf_counter() - self.begun) / 3600
        results = {"status": status, **results, "total_seconds": round(3600 * hours, 1),
                   "sessions": self.sessions, **self.identity}
        if self.cfg.gpu_cost_per_hour:
            results["cost"] = round(hours * self.cfg.gpu_cost_per_hour, 4)
        self._tell_origin()
        self._write("summary.json", json.dumps(results, indent=2) + "\n")
        self.trackers.summary(results)
        return results

    def checkpoint(self, state: dict) -> None:
        """Save all that a run needs to go on; a full disk leaves the checkpoints that are there."""
        if not self.active:
            return
        state |= {"rows": self.rows, "sessions": self.sessions, "identity": self.identity,
                  "config": dataclasses.asdict(self.cfg), "total_seconds": time.perf_counter() - self.begun}
        try:
            write_checkpoint(self.folder, state)
            self.saved_step = state["step"]
            self._tell_origin()
        except OSError as error:
            self.say(f"warning: no checkpoint of step {state['step']} ({error.strerror}); {self.last_good()}")

    def last_good(self) -> str:
        if not self.active or not self.saved_step:
            return "there is no checkpoint"
        return (f"the last good checkpoint is of step {self.saved_step}; go on with: "
                + shlex.join([*program(), "--resume", os.path.relpath(self.folder)]))

    def keep_best(self, step: int) -> None:
        """The checkpoint of this step, if it was saved, is the best so far."""
        if self.active and self.saved_step == step:
            keep_best_checkpoint(self.folder)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self.active:
            self.bar.close()
            self.trackers.close(failed=kind is not None)
            for file in (self.text, self.csv):
                with contextlib.suppress(OSError):      # a full disk, which has been reported
                    file.close()


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def program() -> list[str]:
    """What one types to start this script, on as many processes of one machine as now."""
    bin_folder = ".venv/bin/" if Path(sys.prefix).resolve() == ROOT / ".venv" else ""
    script = os.path.relpath(sys.argv[0])
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return [f"{bin_folder}python", script]
    processes = f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
    return [f"{bin_folder}torchrun", "--standalone", processes, script]


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
    """The folder that --resume means; None where `auto` finds no unfinished run with a checkpoint.

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
    folders = [folder for folder in folders if saved_name(folder) == name]
    if folders and status_of(folders[0]).startswith("failed"):
        raise UserError(f"the newest run of {name}, {os.path.relpath(folders[0])}, {status_of(folders[0])}; "
                        "name its folder with --resume to go on from its checkpoint, or take another "
                        "--model_name")
    unfinished = (folder for folder in folders if not status_of(folder))
    return next((folder for folder in unfinished
                 if is_locked(folder) or any((folder / name).exists() for name in (LAST, PREVIOUS))), None)


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
    try:
        return read_object(folder / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        return {}


def read_object(path: Path) -> dict:
    """The JSON object of a file in a run folder; raises UserError if it holds something else"""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not what a run writes") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what a run writes")
    return content


def read_weights(folder: Path) -> "dict[str, torch.Tensor]":
    """raises  UserError if the run left none, or they are damaged"""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has no model.safetensors; train it with --save_model")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error})") from error


def saved_tokenizer(folder: Path) -> Encoding:
    """The tokenizer that a run was trained with, which must still be what it was."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        name, sha256 = meta["name"], summary_of(folder)["tokenizer_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not tell its tokenizer ({type(error).__name__}: {error})") from error
    if not isinstance(name, str):
        raise UserError(f"{folder / 'meta.json'} is not what a run writes")
    tokenizer = load_tokenizer(name)
    if tokenizer_sha256(tokenizer) != sha256:
        raise UserError(f"tokenizer {name} has changed since {folder} was trained")
    return tokenizer


def load_script(folder: Path) -> ModuleType:
    """The script that trained a run, if it still lies here; with a warning if it has changed.

    raises  UserError if it cannot be loaded, or cannot score a saved run
    """
    facts = summary_of(folder)
    name = str(facts.get("script") or str(facts.get("command", "")).split(" ")[0])
    path = ROOT / name
    if not name.endswith(".py") or path.parent != ROOT or not path.is_file():
        raise UserError(f"{folder} was trained by {name or 'an unknown script'}; put that script into {ROOT}")
    if sha256_of(path) != facts.get("code_sha256"):
        print(f"warning: {name} has changed since it trained {folder}", file=sys.stderr)
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", path.stem), path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    try:
        spec.loader.exec_module(script)
    except SyntaxError as error:
        raise UserError(f"{name} is no valid Python: {error}") from error
    if not hasattr(script, "score_saved"):
        raise UserError(f"{name} cannot score a saved run; it lacks the function score_saved of train_gpt.py")
    return script


def summary_of(folder: Path) -> dict:
    """raises  UserError if the folder is not that of a finished run"""
    try:
        return read_object(folder / "summary.json")
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no summary.json; name the folder of a finished run") from error


def write_items(folder: Path, name: str, items: list[dict]) -> None:
    """NAME.jsonl of a run folder: a line for each row of a benchmark."""
    write_whole(folder / f"{name}.jsonl", "".join(json.dumps(item) + "\n" for item in items))


def write_benchmark(folder: Path, name: str, result: dict, items: list[dict]) -> None:
    """Leave what a finished run scores in its folder, as if it had been scored at its end."""
    write_items(folder, name, items)
    facts = summary_of(folder)
    facts["benchmarks"] = facts.get("benchmarks", {}) | {name: result}
    write_whole(folder / "summary.json", json.dumps(facts, indent=2) + "\n")


def saved_name(folder: Path) -> str | None:
    """The --model_name of a run; none, with a warning, where config.json is damaged."""
    try:
        return saved_knobs(folder).get("model_name")
    except UserError as error:
        print(f"warning: {error}; --resume auto passes over it", file=sys.stderr)
        return None


def locked_log(folder: Path) -> TextIO:
    """The log of a run, which this process holds as long as it lives, so that no second one trains the run.

    raises  UserError if another process holds it
    """
    log = open(folder / "training_log.txt", "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{os.path.relpath(folder)} is being trained by another process; wait for it, "
                        "or begin another run with another --model_name") from error
    except OSError as error:
        print(f"warning: no locks on this file system ({error.strerror}); take care that nothing else trains "
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
# Checkpoints
# ------------------------------------------------------------------------------------------------

def write_checkpoint(folder: Path, state: dict) -> None:
    """Save under a temporary name, sync, rename; the one before stays as checkpoint_previous.pt.

    raises  OSError, and then nothing has changed
    """
    import torch
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
    partial.unlink(missing_ok=True)     # renaming a file to another name of its own does nothing


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


# ------------------------------------------------------------------------------------------------
# Text and picture
# ------------------------------------------------------------------------------------------------

def write_whole(path: Path, text: str) -> None:
    """A text without secrets, which appears under its name when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(without_secrets(text))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def without_secrets(text: str) -> str:
    """The text, with values of the environment's tokens, keys and passwords replaced by their names.

    BATCH_TOKENS and TOKENIZER are no secrets, nor is a number, which could stand anywhere.
    """
    secret = r"(?:^|_)(?:TOKEN|\w*KEY|SECRETS?|PASSW\w*|PASSPHRASE|CREDENTIALS?|PAT)(?:_|$)"
    for name, value in os.environ.items():
        if len(value) >= 8 and not value.isdigit() and re.search(secret, name, re.IGNORECASE):
            text = text.replace(value, f"[{name}]")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "[a Hugging Face token]", text)


def draw_loss(path: Path, rows: list[dict], title: str, xz_bpb: float | None) -> None:
    """Loss in nats per token on the left, bits per byte of the held-out text on the right, over tokens."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    validated = [row for row in rows if "val_loss" in row]
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.grid": True, "grid.alpha": 0.25,
                     "axes.titleweight": "bold", "axes.titlelocation": "left"}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
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


def tokenizer_meta(tokenizer: Encoding) -> str:
    path = TOKENIZERS / tokenizer.name / "meta.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return json.dumps({"name": tokenizer.name, "vocab_size": tokenizer.n_vocab, "eot_id": tokenizer.eot_token,
                       "tokenizer_sha256": tokenizer_sha256(tokenizer)}, indent=2) + "\n"


def identity_of(script: Path, cfg, world, tokenizer: Encoding, dataset) -> dict:
    """What made a result, for its summary and for whoever resumes it."""
    import torch
    sources = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in own_sources()}
    return {"model_name": cfg.model_name, "preset": cfg.preset, "seed": cfg.seed,
            "data": dataset.folder.name, "data_sha256": dataset.sha256,
            "tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "script": script.name, "code_sha256": sources[script.name], "sources": sources,
            "git_commit": git("rev-parse", "HEAD").strip(), "git_dirty": bool(git("status", "--porcelain")),
            **world.facts(), "dtype_reason": world.dtype_reason,
            "python": platform.python_version(), "torch": str(torch.__version__),
            "platform": platform.platform(),
            "command": without_secrets(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))}


def changes_since(saved: dict, cfg, identity: dict) -> list[str]:
    """What differs, but for neutral knobs, between the run that was saved and the one that would go on."""
    now, then = dataclasses.asdict(cfg), saved["config"]
    changes = [f"--{knob} is {now.get(knob)!r}, was {then.get(knob)!r}" for knob in {**then, **now}
               if knob not in NEUTRAL_KNOBS and now.get(knob) != then.get(knob)]
    if identity["dtype"] != saved["identity"]["dtype"]:
        changes.append(f"it computes in {identity['dtype']}, did in {saved['identity']['dtype']}")
    for thing in ("data", "tokenizer"):
        if identity[f"{thing}_sha256"] != saved["identity"][f"{thing}_sha256"]:
            changes.append(f"the {thing} changed")
    now, then = identity["sources"], saved["identity"]["sources"]
    for name in sorted({*then, *now}):
        if now.get(name) != then.get(name):
            changes.append(f"{name} " + ("changed" if name in now and name in then else
                                         "is new" if name in now else "is missing"))
    return changes
