"""What a run says and writes while it goes on.

Run: ./run.sh test tests/test_log.py
"""

import errno
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiktoken
import torch
from tiny_runs import summary_of, train_here

from benchtop import identity, places
from benchtop.errors import UserError
from benchtop.files import save_tensors, whole_file, whole_path
from benchtop.folder import read_weights
from benchtop.log import RunLog, last_lines, rise_of_held_out_loss
from benchtop.loss_picture import STYLE, draw_loss, loss_figure

BYTES = tiktoken.Encoding("bytes", pat_str="(?s).", special_tokens={"<|endoftext|>": 256},
                          mergeable_ranks={bytes([byte]): byte for byte in range(256)})
COLUMNS = ("step", "tokens", "train_seconds", "train_loss", "val_loss", "val_bpb", "tokens_per_second")
IDENTITY = {"script": "mine.py", "processes": 1, "device": "a CPU", "code_sha256": "c", "bench_sha256": "b",
            "command": "mine.py --lr 1"}


@dataclass(frozen=True)
class Knobs:
    model_name: str = "mine"
    num_steps: int = 100
    resume: str = ""
    resume_changed: bool = False
    gpu_cost_per_hour: float = 0
    wandb: str = ""
    trackio: str = ""
    tensorboard: bool = False


@pytest.fixture
def new_log(tmp_path, monkeypatch):
    """Begins the log of a run; with `saved`, of one that goes on."""
    monkeypatch.setattr(places, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.setattr(identity, "code_that_runs", lambda: {"mine.py": ""})
    logs = []

    def begin(saved: dict | None = None, **knobs) -> RunLog:
        logs.append(RunLog(Knobs(**knobs), COLUMNS, IDENTITY, BYTES, saved, None, active=True))
        return logs[-1]
    yield begin
    for each in logs:
        each.__exit__(None)


def row(step: int, val_loss: float | None = None, **more: float) -> dict:
    validation = {} if val_loss is None else {"val_loss": val_loss, "val_bpb": val_loss / 2}
    return {"step": step, "tokens": 1000 * step, "train_seconds": 2.0 * step, "train_loss": 3.0,
            "tokens_per_second": 12345.6, **validation, **more}


# ------------------------------------------------------------------------------------------------
# The log
# ------------------------------------------------------------------------------------------------

def test_a_step_is_one_line_in_plain_words(new_log, capsys):
    run = new_log()
    run.row(row(5), progress=0.05)
    run.row(row(10, 2.5, mfu=0.3125), progress=0.1)
    run.row(row(100, 2.75), progress=1)
    assert (run.folder / "training_log.txt").read_text().splitlines() == [
        "step   5/100  train_loss 3.0000  12,346 tokens/s  0:10 of training done, 3:10 left",
        "step  10/100  train_loss 3.0000  val_loss 2.5000  val_bpb 1.2500  12,346 tokens/s  mfu 31.2%  "
        "0:20 of training done, 3:00 left",
        "step 100/100  train_loss 3.0000  val_loss 2.7500  val_bpb 1.3750 (best: 1.2500 at step 10)  "
        "12,346 tokens/s  3:20 of training done, 0:00 left"]
    assert capsys.readouterr().out.count("step ") == 3      # two lines, one of which names the best step


def test_a_run_by_the_clock_alone_has_no_number_of_steps(new_log):
    run = new_log(num_steps=0)
    run.row(row(5), progress=0.05)
    assert (run.folder / "training_log.txt").read_text().startswith("step 5  train_loss 3.0000  ")


def test_metrics_csv_has_a_row_for_each_line(new_log):
    run = new_log()
    run.row(row(5), progress=0.05)
    run.row(row(10, 1 / 3), progress=0.1)
    assert (run.folder / "metrics.csv").read_text() == (
        ",".join(COLUMNS) + "\n5,5000,10,3,,,12345.6\n10,10000,20,3,0.333333,0.166667,12345.6\n")


def summarized(run: RunLog, status: str = "finished", **results) -> dict:
    returned = run.summary(status, results)
    written = json.loads((run.folder / "summary.json").read_text())
    assert written == json.loads(json.dumps(returned))
    return written


def test_the_best_validation_stands_beside_the_last(new_log):
    run = new_log()
    for step, loss in ((10, 2.5), (20, 2.0), (30, 2.0), (40, math.nan), (50, 2.25)):
        run.row(row(step, loss), progress=step / 50)
    found = summarized(run, val_loss=2.25, val_bpb=1.125)
    assert (found["best_val_loss"], found["best_val_bpb"], found["best_step"]) == (2.0, 1.0, 20)
    assert (found["val_loss"], found["val_bpb"]) == (2.25, 1.125)


def test_a_run_that_was_never_validated_has_no_best(new_log):
    run = new_log()
    run.row(row(1), progress=0.01)
    run.row(row(2, math.nan), progress=0.02)
    assert not [fact for fact in summarized(run, "failed: the loss is nan") if fact.startswith("best")]


def test_a_resumed_run_knows_the_best_of_all_its_sessions(new_log):
    saved = {"step": 20, "rows": [row(10, 2.0), row(20)], "total_seconds": 50.0, "identity": IDENTITY,
             "sessions": [{"from_step": 0, "command": "mine.py --lr 1", "anything": 7}]}
    first = new_log()
    first.__exit__(None)
    run = new_log(saved, resume=str(first.folder))
    run.row(row(30, 2.5), progress=0.3)
    found = summarized(run)
    assert (found["best_step"], found["best_val_bpb"]) == (10, 1.0) and found["total_seconds"] >= 50
    assert found["sessions"] == [
        {"from_step": 0, "command": "mine.py --lr 1", "anything": 7},
        {"from_step": 20, "processes": 1, "device": "a CPU", "code_sha256": "c", "bench_sha256": "b",
         "command": "mine.py --lr 1"}]


@pytest.mark.parametrize(("losses", "says"), [
    ([2.5, 2.0, 2.021], True), ([2.5, 2.0, 2.019], False), ([2.5, 2.0, 4.0, 2.0], False), ([2.0], False),
    ([], False), ([2.5, 2.0, math.inf], True)])
def test_a_risen_held_out_loss_is_said_in_one_line(new_log, losses, says, capsys):
    run = new_log()
    for number, loss in enumerate(losses, start=1):
        run.row(row(10 * number, loss), progress=0.5)
        run.row(row(10 * number + 5), progress=0.5)
    capsys.readouterr()
    run.summary("finished", {})
    wanted = ("held-out loss has risen since step 20 (val_loss 2.0000 there, "
              f"{losses[-1] if losses else 0:.4f} now): the model is over-fitting; train fewer steps or on "
              "more text\n")
    assert capsys.readouterr().out == (wanted if says else "")
    assert ("over-fitting" in (run.folder / "training_log.txt").read_text()) == says


def test_a_run_that_failed_is_not_called_over_fitted(new_log, capsys):
    run = new_log()
    for step, loss in ((10, 2.0), (20, 4.0)):
        run.row(row(step, loss), progress=0.5)
    run.summary("failed: the loss is nan", {})
    assert "over-fitting" not in capsys.readouterr().out and rise_of_held_out_loss(run.rows)


def test_the_end_can_be_read_by_a_program():
    summary = {"val_bpb": 0.8719528, "val_loss": 2.05, "train_seconds": 240.04, "total_seconds": 301.0,
               "peak_memory_mib": 1316.25, "tokens": 2048000, "step": 250, "parameters": 9_000_000,
               "held_out_documents": 44, "run": "20261121_011504_demo", "mfu": 0.31234, "device": "a CPU"}
    assert last_lines(summary) == [
        "---", "val_bpb: 0.871953", "val_loss: 2.050000", "train_seconds: 240.0", "total_seconds: 301.0",
        "peak_memory_mib: 1316.2", "mfu_percent: 31.23", "tokens: 2048000", "steps: 250",
        "parameters: 9000000", "held_out_documents: 44", "run: experiments/20261121_011504_demo"]
    del summary["mfu"]
    facts = dict(line.split(": ") for line in last_lines(summary)[1:])
    assert list(facts) == ["val_bpb", "val_loss", "train_seconds", "total_seconds", "peak_memory_mib",
                           "tokens", "steps", "parameters", "held_out_documents", "run"]


def test_a_summary_names_its_run_as_the_folder_is_called(new_log):
    run = new_log()
    name = summarized(run)["run"]
    assert name == run.folder.name and re.fullmatch(r"\d{8}_\d{6}_mine", name)


def test_weights_appear_when_they_are_whole(new_log, monkeypatch):
    run, model = new_log(), torch.nn.Linear(3, 2)
    run.weights(model)
    path = run.folder / "model.safetensors"
    content = path.read_bytes()
    import safetensors.torch

    def fail(tensors: dict, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError("No space left")
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        run.weights(model)
    assert path.read_bytes() == content and not list(run.folder.glob("*.partial"))


FULL = "I/O error: No space left on device (os error 28)"       # as safetensors says it


def fill_the_disk(monkeypatch) -> None:
    import safetensors.torch

    def full(tensors: dict, path: Path, **options) -> None:
        path.write_bytes(b"a part")
        raise safetensors.SafetensorError(FULL)
    monkeypatch.setattr(safetensors.torch, "save_file", full)


def test_a_full_disk_under_safetensors_is_one_that_names_its_file(tmp_path, monkeypatch):
    fill_the_disk(monkeypatch)
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="No space left on device") as error:
        save_tensors(path, {"head": torch.ones(2)})
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert not list(tmp_path.iterdir())


def test_weights_that_find_no_space_cost_no_result_and_no_checkpoint(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        run = train_here(here, save_model=True, save_every_steps=1)
    said, = (line for line in capsys.readouterr().out.splitlines() if "model.safetensors" in line)
    assert said.startswith("warning: model.safetensors was not saved (No space left on device); the ch")
    wanted = summary_of(run)
    assert wanted["status"] == "finished" and not (run / "model.safetensors").exists()
    (run / "summary.json").unlink()     # and the rest of what the line says
    train_here(here, save_model=True, save_every_steps=1, resume=str(run))
    assert summary_of(run)["val_bpb"] == wanted["val_bpb"] and read_weights(run)


@pytest.mark.parametrize("where", [-1, -6])
def test_weights_that_changed_are_not_used(here, where):
    run = train_here(here, save_model=True)
    path = run / "model.safetensors"
    assert read_weights(run)
    raw = bytearray(path.read_bytes())
    raw[where] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: it has changed since"):
        read_weights(run)
    path.write_bytes(raw[:-4] + b"\xff\xff\xff\x7f")      # a NaN, which is no divergence then
    with pytest.raises(UserError, match="has changed since"):
        read_weights(run)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "EXPERIMENTS", tmp_path / "experiments")
    with RunLog(Knobs(), COLUMNS, IDENTITY, BYTES, None, None, active=False) as run:
        run.row(row(1, 2.0), progress=0.1)
        run.say("something")
        run.picture(1, {})
        run.weights(torch.nn.Linear(3, 2))
        assert run.summary("finished", {}) == {}
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# The picture
# ------------------------------------------------------------------------------------------------

ROWS = [row(1), row(10, 2.5), row(20, 2.0), row(25), row(30, 2.25)]


def drawn(rows: list[dict], xz_bpb: float | None = None, documents: int = 44, **bar):
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    with rc_context(STYLE):
        figure = loss_figure(rows, "a_name_of_some_length", documents, {"xz_bpb": xz_bpb, **bar})
        FigureCanvasAgg(figure).draw()
    return figure


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_bar_says_that_xz_has_seen_the_training_text():
    left, right = drawn(ROWS, 1.19).axes
    assert labels(right) == ["this model", "best: 1.000 at step 20", "xz -9e after the training text: 1.190"]
    assert labels(left) == ["training batches", "held-out text"]
    assert right.get_ylim()[1] > 1.25 and right.get_ylim()[0] == 0
    assert "xz" not in " ".join(labels(drawn(ROWS).axes[1]))
    capped = drawn(ROWS, 1.19, xz_training_bytes=12 * 2**20).axes[1]
    assert labels(capped)[-1] == "xz -9e after the last 12 MiB of the training text: 1.190"
    assert drawn(ROWS, 9.0).axes[1].get_ylim()[1] > 9


def test_the_picture_says_how_many_documents_are_held_out():
    assert drawn(ROWS).axes[1].get_title("left") == "held-out text (44 documents)"
    assert drawn(ROWS, documents=1).axes[1].get_title("left") == "held-out text (1 document)"


def test_the_best_validation_is_marked():
    marks = [line for line in drawn(ROWS).axes[1].lines if line.get_label().startswith("best")]
    assert [(*mark.get_xdata(), *mark.get_ydata()) for mark in marks] == [(0.02, 1.0)]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:2], [row(10 ** 7, 2.5), row(10 ** 9, 1.5)]])
def test_legends_lie_within_their_panels(rows):
    figure = drawn(rows, 1.19)
    for axes in figure.axes:
        legend, panel = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert panel.x0 <= legend.x0 < legend.x1 <= panel.x1
        assert panel.y0 <= legend.y0 < legend.y1 <= panel.y1
    assert (figure.axes[1].get_legend().get_window_extent().width
            < 0.75 * figure.axes[1].get_window_extent().width)


def test_a_loss_that_is_not_finite_is_left_out_of_the_picture(tmp_path):
    bad = {"train_loss": math.inf}
    rows = [*ROWS, row(40, math.nan), row(50, 2.1, **bad)]
    left, right = drawn(rows, 1.19).axes
    assert list(right.lines[0].get_xdata()) == [0.01, 0.02, 0.03, 0.05]
    assert list(left.lines[0].get_xdata()) == [0.001, 0.01, 0.02, 0.025, 0.03, 0.04]
    for number, some in enumerate(([], [row(1)], [row(1, math.nan, **bad)])):
        draw_loss(tmp_path / f"{number}.png", some, "name", 1, {})
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "1.png", "2.png"}


# ------------------------------------------------------------------------------------------------
# Whole files
# ------------------------------------------------------------------------------------------------

def test_a_file_gets_its_name_when_it_is_whole(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    real_fsync = os.fsync

    def fsync(handle: int) -> None:
        seen.append((path.exists(), os.fstat(handle).st_ino, os.fstat(handle).st_size))
        real_fsync(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    with whole_file(path, "w") as file:
        file.write("größer")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "größer"
    assert seen == [(False, path.stat().st_ino, 8)]     # all of it was on the disk before it had its name
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"something else")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "größer" and list(tmp_path.iterdir()) == [path]


def test_a_second_name_of_the_same_file_leaves_nothing_behind(tmp_path):
    path = tmp_path / "best"
    path.write_text("content")
    with whole_path(path) as partial:
        os.link(path, partial)      # renaming a file to another name of its own does nothing
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "content"
