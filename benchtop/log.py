"""What a run prints and writes: the log, metrics.csv, loss.png, checkpoints, summary.json."""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tiktoken import Encoding
from tqdm import tqdm

from benchtop import places
from benchtop.checkpoints import keep_best_checkpoint, withdraw_checkpoint, write_checkpoint
from benchtop.command_line import minutes, program, tell
from benchtop.files import save_tensors, write_text
from benchtop.folder import HELD_OUT_COLUMNS, HELD_OUT_FILE, locked_log, new_folder, write_items
from benchtop.identity import Origin
from benchtop.loss_picture import draw_loss
from benchtop.redaction import without_secrets
from benchtop.trackers import Trackers, check_packages

if TYPE_CHECKING:
    from torch import nn

PICTURE_SECONDS = 10    # minimum between drawings of loss.png during a run
RISE = 0.01             # relative rise of the held-out loss above its minimum that counts as over-fitting


class RunLog:
    """Write everything about a run into experiments/DATE_TIME_NAME, and its progress to the screen.

    cfg       the dataclass of all knobs
    columns   of metrics.csv
    identity  the result of identity_of
    active    False on processes other than the first, where every method does nothing

    A resumed run (`saved` is its checkpoint, `text` its log) continues in its folder: metrics.csv is cut back
    to the checkpoint's step. Once the session has saved something, its knobs and code are in the folder; the
    earlier ones are kept beside them if they differ.
    """

    def __init__(self, cfg, columns: tuple[str, ...], identity: dict, tokenizer: Encoding, saved: dict | None,
                 text: TextIO | None, active: bool):
        self.cfg, self.columns, self.active = cfg, columns, active
        self.rows: list[dict] = saved["rows"] if saved else []
        self.saved_step = saved["step"] if saved else 0
        self.begun = time.perf_counter() - (saved["total_seconds"] if saved else 0)
        self.last_line = self.last_picture = time.perf_counter()
        self.unheard = False    # whether stdout is a pipe that its reader has closed
        if not self.active:
            return
        check_packages(cfg)
        self.folder = Path(cfg.resume) if saved else new_folder(cfg.model_name)
        self.text = text or locked_log(self.folder)
        # a terminal shows a bar instead of most lines; elsewhere a line is printed now and then
        self.bar = tqdm(total=1.0, leave=False, disable=not sys.stderr.isatty(),
                        bar_format="{percentage:3.0f}% |{bar}| {desc}")
        self.sessions = [*(saved["sessions"] if saved else []), {
            "from_step": self.saved_step,
            **{fact: identity[fact] for fact in ("processes", "device", "code_sha256", "bench_sha256",
                                                 "command")}}]
        # a resumed run keeps the command that it began with
        self.identity = identity | ({"command": saved["identity"]["command"]} if saved else {})
        self.origin = Origin(cfg, identity, tokenizer)
        if not saved:
            self._write_origin()
        (self.folder / "summary.json").unlink(missing_ok=True)      # of a failed run that is resumed
        self._write("metrics.csv", "\n".join([",".join(columns), *map(self._csv_row, self.rows), ""]))
        self.csv = open(self.folder / "metrics.csv", "a", encoding="utf-8")  # noqa: SIM115
        self.trackers = Trackers(cfg, self.folder, self.saved_step)

    def _write_origin(self) -> None:
        self.origin.write(self.folder, self.sessions[-1]["from_step"])

    def _write(self, name: str, content: str) -> None:
        write_text(self.folder / name, without_secrets(content))

    def say(self, line: str) -> None:
        """Write a line to the log and to the screen."""
        if self.active:
            self.note(line)
            self.bar.clear()
            self.unheard |= not tell(line, sys.stderr if self.unheard else sys.stdout)
            self.last_line = time.perf_counter()

    def note(self, line: str) -> None:
        """Write a line to the log only."""
        if self.active:
            self.text.write(without_secrets(line) + "\n")
            self.text.flush()

    def row(self, values: dict, progress: float) -> None:
        """Write a row of metrics.csv and a line of the log; on screen, update the bar or print some lines."""
        if not self.active:
            return
        self.rows.append(values)
        self.csv.write(self._csv_row(values) + "\n")
        self.csv.flush()
        self.trackers.row(values["step"], values)
        left = values["train_seconds"] * (1 - progress) / progress
        line = self._line(values, left)
        if "val_loss" in values or (self.bar.disable and time.perf_counter() - self.last_line > 15):
            self.say(line)
        else:
            self.note(line)
        self.bar.set_description_str(f"{self._step(values)}  loss {values['train_loss']:.3f}  "
                                     f"{minutes(left)} left", refresh=False)
        self.bar.update(progress - self.bar.n)

    def _step(self, values: dict) -> str:
        steps = str(self.cfg.num_steps or "")       # 0 if only the clock ends the run
        return f"step {values['step']:>{len(steps)}}" + f"/{steps}" * bool(steps)

    def _line(self, values: dict, seconds_left: float) -> str:
        """A row of metrics.csv as a line for people."""
        parts = [self._step(values), f"train_loss {values['train_loss']:.4f}"]
        if "val_loss" in values:
            best = best_row(self.rows)
            is_best = best is None or best["step"] == values["step"]
            parts += [f"val_loss {values['val_loss']:.4f}", f"val_bpb {values['val_bpb']:.4f}"
                      + ("" if is_best else f" (best: {best['val_bpb']:.4f} at step {best['step']})")]
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in values:
            parts.append(f"mfu {values['mfu']:.1%}")
        parts.append(f"{minutes(values['train_seconds'])} of training done, {minutes(seconds_left)} left")
        return "  ".join(parts)

    def _csv_row(self, values: dict) -> str:
        """The line of metrics.csv; a cell is empty where nothing was measured."""
        cells = (values.get(column, "") for column in self.columns)
        return ",".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells)

    def picture(self, documents: int, bar: dict, at_end: bool = True) -> None:
        """Draw loss.png; before the end at most every PICTURE_SECONDS, since it takes a moment."""
        if self.active and (at_end or time.perf_counter() - self.last_picture > PICTURE_SECONDS):
            draw_loss(self.folder / "loss.png", self.rows, self.cfg.model_name, documents, bar)
            self.last_picture = time.perf_counter()

    def samples(self, samples: list[dict]) -> None:
        if self.active:
            lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in samples]
            self._write("samples.jsonl", "".join(lines))

    def held_out(self, table: list[tuple]) -> None:
        """Write held_out.csv: one line for each held-out document, from benchtop.evaluation.HeldOut.table."""
        if self.active:
            lines = [f"{number},{tokens},{num_bytes},{nats:.6f},{text_nats:.6f}"
                     for number, tokens, num_bytes, nats, text_nats in table]
            self._write(HELD_OUT_FILE, "\n".join([",".join(HELD_OUT_COLUMNS), *lines, ""]))

    def benchmark(self, name: str, items: list[dict]) -> None:
        if self.active:
            write_items(self.folder, name, items)

    def weights(self, model: "nn.Module") -> dict[str, str]:
        """Write model.safetensors; returns its facts for the summary."""
        if not self.active:
            return {}
        # a copy of each, since safetensors refuses tensors that share memory, as a tied head does
        tensors = {name: value.cpu().clone().contiguous() for name, value in model.state_dict().items()}
        return {"weights_sha256": save_tensors(self.folder / "model.safetensors", tensors)}

    def no_weights(self, error: OSError) -> None:
        """Warn that a full disk prevented model.safetensors; the results are not affected."""
        self.say(f"warning: model.safetensors was not saved ({error.strerror}); the checkpoints are kept; "
                 f"to get it, make room, delete {os.path.relpath(self.folder)}/summary.json and resume; "
                 + self.last_good())

    def summary(self, status: str, results: dict) -> dict:
        """Write summary.json: the run's final numbers, its best validation, and its identity."""
        if not self.active:
            return {}
        best = best_row(self.rows)
        if best:
            results = results | {"best_val_loss": best["val_loss"], "best_val_bpb": best["val_bpb"],
                                 "best_step": best["step"]}
        if status == "finished" and (warning := rise_of_held_out_loss(self.rows)):
            self.say(warning)
        hours = (time.perf_counter() - self.begun) / 3600
        results = {"status": status, "run": self.folder.name, **results,
                   "total_seconds": round(3600 * hours, 1), "sessions": self.sessions, **self.identity}
        if self.cfg.gpu_cost_per_hour:
            results["cost"] = round(hours * self.cfg.gpu_cost_per_hour, 4)
        self._write_origin()
        self._write("summary.json", json.dumps(results, indent=2) + "\n")
        self.trackers.summary(results)
        return results

    def checkpoint(self, state: dict) -> None:
        """Save everything that a run needs to resume; on a full disk, the earlier checkpoints stay."""
        if not self.active:
            return
        state |= {"rows": self.rows, "sessions": self.sessions, "identity": self.identity,
                  "config": dataclasses.asdict(self.cfg), "total_seconds": time.perf_counter() - self.begun}
        try:
            write_checkpoint(self.folder, state)
            self.saved_step = state["step"]
            self._write_origin()
        except OSError as error:
            self.say(f"warning: step {state['step']} was not saved ({error.strerror}); {self.last_good()}")

    def withdraw(self, step: int) -> None:
        """Discard the checkpoint of this step, if there is one; the previous one takes its place."""
        if self.active and self.saved_step == step:
            self.saved_step = withdraw_checkpoint(self.folder)

    def last_good(self) -> str:
        if not self.active:
            return "start the same command again with --resume auto"
        if not self.saved_step or not self.folder.is_dir():
            return "there is no checkpoint"
        return (f"the last good checkpoint is of step {self.saved_step}; resume with: "
                + shlex.join([*program(), "--resume", os.path.relpath(self.folder)]))

    def keep_best(self, step: int) -> None:
        """Keep the checkpoint of this step, if there is one, as the best so far."""
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


# ------------------------------------------------------------------------------------------------
# What rows and summaries say
# ------------------------------------------------------------------------------------------------

def best_row(rows: list[dict]) -> dict | None:
    """The row with the lowest val_loss, the first of equal ones; None if no validation was finite."""
    validated = [row for row in rows if math.isfinite(row.get("val_loss", math.nan))]
    return min(validated, key=lambda row: row["val_loss"], default=None)


def rise_of_held_out_loss(rows: list[dict]) -> str:
    """A warning if the last val_loss is more than 1 % above the best one; else an empty text."""
    best, last = best_row(rows), next((row for row in reversed(rows) if "val_loss" in row), None)
    if not best or last["val_loss"] <= (1 + RISE) * best["val_loss"]:
        return ""
    return (f"held-out loss has risen since step {best['step']} (val_loss {best['val_loss']:.4f} there, "
            f"{last['val_loss']:.4f} now): the model is over-fitting; train fewer steps or on more text")


def last_lines(summary: dict) -> list[str]:
    """The end of a run's output, for programs: a line of dashes, then one number per line; mfu_percent only
    if known, val_bpb_by_source (JSON) only for a mixture.

        ---
        val_bpb: 0.871953
        ...
        run: experiments/20261121_011504_demo
    """
    return ["---",
            f"val_bpb: {summary['val_bpb']:.6f}",
            f"val_loss: {summary['val_loss']:.6f}",
            *([f"val_bpb_by_source: {rounded(summary['val_bpb_by_source'])}"]
              if "val_bpb_by_source" in summary else []),
            f"train_seconds: {summary['train_seconds']:.1f}",
            f"total_seconds: {summary['total_seconds']:.1f}",
            f"peak_memory_mib: {summary['peak_memory_mib']:.1f}",
            *([f"mfu_percent: {100 * summary['mfu']:.2f}"] if "mfu" in summary else []),
            f"tokens: {summary['tokens']}",
            f"steps: {summary['step']}",
            f"parameters: {summary['parameters']}",
            f"held_out_documents: {summary['held_out_documents']}",
            f"run: {places.EXPERIMENTS.name}/{summary['run']}"]


def rounded(numbers: dict[str, float]) -> str:
    """Numbers by name, as one line of JSON."""
    return json.dumps({name: round(number, 6) for name, number in numbers.items()})
