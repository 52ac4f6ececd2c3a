"""Whole tiny runs: what they learn, write, refuse and survive. Run: ./run.sh test tests/test_training.py"""

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import (
    CALM,
    EAGER,
    ROOT,
    TINY,
    drive,
    flags,
    newest,
    redirect,
    rows_of,
    run,
    summary_of,
    torchrun,
    train_here,
)

import train_gpt
from benchtop import memory, places, shards
from benchtop.batches import Rows, batch_of
from benchtop.briefing import conclusion, num_parameters
from benchtop.checkpoints import read_checkpoint
from benchtop.errors import UserError
from benchtop.evaluation import HeldOut, TokenLosses, Validation
from benchtop.groups import read_run
from benchtop.initial import drawn, drawn_in_one_stream, normal_law
from benchtop.knobs import parse_config
from benchtop.log import RunLog
from benchtop.loss_picture import draw_loss
from benchtop.machine import World
from benchtop.redaction import without_secrets
from benchtop.run import COLUMNS, Experiment, Run, open_data
from benchtop.sampling import generate
from benchtop.tokenizer import PATTERNS, load_tokenizer, ranks_file_of
from benchtop.warm_up import warm_up
from train_gpt import EXPERIMENT, GPT, Config, Optimizer

pytestmark = pytest.mark.usefixtures("no_picture")


# ------------------------------------------------------------------------------------------------
# What a run learns and leaves
# ------------------------------------------------------------------------------------------------

def with_model(model: type[GPT]) -> Experiment:
    return dataclasses.replace(EXPERIMENT, Model=model)


@dataclasses.dataclass(frozen=True)
class Watched:
    """A run that several tests look at."""
    folder: Path
    said: str               # on stdout
    drawn: list[int]        # steps after which loss.png was drawn
    collecting: list[bool]  # whether the garbage collector was at work, at each step and after the run


KNOBS = {**CALM, "batch_tokens": 320, "num_steps": 8}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Where this module's runs lie: a new folder whenever a worker comes back to the module."""
    return tmp_path_factory.mktemp("shelf")


def watched(lab: Path, shelf: Path, experiment: Experiment = EXPERIMENT, **knobs) -> Watched:
    drawn, collecting, real_step = [], [], Optimizer.step

    def draw(path: Path, rows: list[dict], *others) -> None:
        drawn.append(rows[-1]["step"])
        draw_loss(path, rows, *others)

    def step(*given):
        collecting.append(gc.isenabled())
        return real_step(*given)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        redirect(patch, lab, shelf)
        patch.setattr("benchtop.log.PICTURE_SECONDS", 10**6)
        patch.setattr("benchtop.log.draw_loss", draw)
        patch.setattr(Optimizer, "step", step)
        folder = train_here(shelf, experiment, **{**KNOBS, **knobs})
    collecting.append(gc.isenabled() and not gc.get_freeze_count())
    return Watched(folder, said.getvalue(), drawn, collecting)


@pytest.fixture(scope="module")
def whole(lab, shelf) -> Watched:
    """A run that leaves everything that a run can leave."""
    return watched(lab, shelf, model_name="whole", save_model=True, gpu_cost_per_hour=3600.0, peak_tflops=0.1)


@pytest.fixture(scope="module")
def other(lab, shelf, whole) -> Watched:
    """The same with another seed."""
    return watched(lab, shelf, model_name="whole", save_model=True, seed=1)


@pytest.fixture(scope="module")
def again(lab, shelf, whole, other) -> Watched:
    """The first run once more, and compared with the two."""
    return watched(lab, shelf, model_name="again", save_model=True,
                   compare_to=f"base={shelf}/experiments/*_whole*")


def test_flops_are_those_of_the_windows_of_each_step(here):
    knobs = dict(seq_len=256, batch_tokens=256, window_warmup_frac=0.6)
    folder = train_here(here, **knobs)
    with torch.device("meta"):
        model = GPT(Config(**{**TINY, **knobs, "vocab_size": 301}), 300)
    steps = []
    for step in range(4):
        model.progress = step / 4
        steps.append(256 * model.flops_per_token())
    assert steps[0] == steps[1] < steps[2] < steps[3]
    assert [float(row["flops"]) for row in rows_of(folder)] == pytest.approx(np.cumsum(steps), rel=1e-5)


def test_a_run_ends_with_its_distance_from_a_baseline(here, whole, other, again):
    bpbs = [summary_of(run.folder)["val_bpb"] for run in (whole, other)]
    above = summary_of(again.folder)["val_bpb"] - np.mean(bpbs)
    side = "above" if above > 0 else "below"
    said = (f"val_bpb is {abs(above):.4f} {side} base, {abs(above) / np.std(bpbs, ddof=1):.1f} standard "
            "deviations (2 runs: ")
    assert abs(above) > 1e-4 and said in again.said
    assert said in (again.folder / "training_log.txt").read_text()
    with pytest.raises(UserError, match="nothing_there is not a run folder"):
        train_here(here, compare_to="nothing_there")


def test_the_summary_names_the_held_out_text(here, whole):
    """Runs with other tokenizers, but the same held-out documents, have the same hash."""
    summary = summary_of(whole.folder)
    dataset, tokenizer = shards.open_dataset("tiny", "")
    text = HeldOut(dataset.tokens("val"), Config(**TINY), tokenizer).text()
    assert summary["held_out_sha256"] == hashlib.sha256(text).hexdigest()
    assert summary["held_out_bytes"] == len(text)
    val = next(shard for shard in dataset.manifest["shards"] if shard["split"] == "val")
    assert (summary["held_out_documents"], summary["held_out_tokens"]) == (val["documents"], val["tokens"])
    assert f"{val['tokens']:,} tokens of {val['documents']:,} held-out documents" in whole.said


def test_a_tiny_model_learns_a_repeated_text(lab, here):
    """The floor is what a token costs where all before it are known, the entropy where only frequencies are:
    it has to come 19 twentieths of the way from the one to the other."""
    tokens = [300, *tokenizer_of(lab).encode_ordinary("abcdefghij" * 9)]
    cfg = Config(**{**TINY, "vocab_size": 301, "num_steps": 60, "model_dim": 32})
    rows = Rows([np.array(tokens * 50, dtype=np.uint16)], cfg, 300)
    after, alone = defaultdict(Counter), Counter()
    for number in range(rows.num_rows):
        begin = 0
        for place, (token, target) in enumerate(zip(*map(np.ndarray.tolist, rows.row(number)), strict=True)):
            begin = place if token == 300 else begin
            if target >= 0:
                after[tuple(rows.row(number)[0][begin:place + 1].tolist())][target] += 1
                alone[target] += 1
    floor, entropy = nats(after.values()), nats([alone])
    assert 0 < floor < 0.1 < 2 < entropy
    torch.manual_seed(0)
    model = GPT(cfg, 300)
    optimizer = Optimizer(model, cfg, World(cfg))
    losses = []
    for step in range(60):
        batch = batch_of(rows, cfg, step)
        (inputs, targets), = batch.micro_batches
        loss = model(inputs, targets) / batch.num_targets
        loss.backward()
        losses.append(loss.item())
        optimizer.step(1.0)
    assert losses[0] == pytest.approx(math.log(301), abs=0.01)
    assert np.mean(losses[-20:]) < floor + (entropy - floor) / 20
    likeliest = dataclasses.replace(cfg, temperature=0)
    assert generate(model, [tokens[:12]], likeliest) == [tokens[12:17]]


def tokenizer_of(lab: Path):
    return load_tokenizer(json.loads((lab / "data" / "tiny" / "manifest.json").read_text())["tokenizer"])


def nats(counts: Iterable[Counter]) -> float:
    """What a token costs on average where each of these frequencies is known."""
    counts = [np.array(list(counter.values()), dtype=float) for counter in counts]
    total = sum(count.sum() for count in counts)
    return float(sum(-(count * np.log(count / count.sum())).sum() for count in counts) / total)


def test_a_run_leaves_everything_that_made_it(lab, here, whole):
    folder = whole.folder
    assert re.fullmatch(r"\d{8}_\d{6}_whole", folder.name)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "summary.json", "metrics.csv", "training_log.txt", "loss.png",
                     "samples.jsonl", "git.diff", "requirements.txt", "meta.json", "model.safetensors",
                     "held_out.csv", "train_gpt.txt", "code"}
    assert not [name for name in names if name.endswith((".partial", ".pt"))]
    source = Path(train_gpt.__file__).read_text()
    assert source == (folder / "train_gpt.txt").read_text() == (folder / "code" / "train_gpt.py").read_text()
    for path in (ROOT / "benchtop").glob("*.py"):
        assert (folder / "code" / "benchtop" / path.name).read_bytes() == path.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == {field.name for field in dataclasses.fields(Config)}
    assert config["vocab_size"] == 301
    summary = summary_of(folder)
    assert summary["status"] == "finished" and summary["step"] == 8 and summary["tokens"] == 8 * 320
    assert summary["cost"] == pytest.approx(summary["total_seconds"], abs=0.06)
    tokenizer = lab / "tokenizers" / tokenizer_of(lab).name
    assert (folder / "meta.json").read_text() == (tokenizer / "meta.json").read_text()
    identity = (tokenizer / "ranks.tiktoken").read_bytes() + PATTERNS["gpt4"].encode()
    assert summary["tokenizer_sha256"] == hashlib.sha256(identity).hexdigest()
    assert summary["code_sha256"] == hashlib.sha256(source.encode()).hexdigest()
    assert f"torch=={torch.__version__}" in (folder / "requirements.txt").read_text()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_ends_with_lines_for_programs_that_agree_with_its_summary(shelf, whole, other):
    summary = summary_of(whole.folder)
    _, end = whole.said.split("\n---\n")
    block = dict(line.split(": ") for line in end.splitlines())
    assert list(block) == ["val_bpb", "val_loss", "train_seconds", "total_seconds", "peak_memory_mib",
                           "mfu_percent", "tokens", "steps", "parameters", "held_out_documents", "run"]
    wanted = {**summary, "steps": summary["step"], "mfu_percent": 100 * summary["mfu"]}
    for key, digits in (("val_bpb", 6), ("val_loss", 6), ("train_seconds", 1), ("total_seconds", 1),
                        ("peak_memory_mib", 1), ("mfu_percent", 2)):
        assert block[key] == f"{wanted[key]:.{digits}f}"
    for key in ("tokens", "steps", "parameters"):
        assert int(block[key]) == wanted[key]
    assert shelf / block["run"] == whole.folder
    assert "\n---\n" in other.said and "mfu_percent" not in other.said      # of a CPU, no peak is known


def test_the_picture_is_drawn_at_the_end_and_now_and_then_before(here, monkeypatch, whole):
    steps = []
    monkeypatch.setattr("benchtop.log.PICTURE_SECONDS", 0)
    monkeypatch.setattr("benchtop.log.draw_loss", lambda _path, rows, *_: steps.append(rows[-1]["step"]))
    train_here(here, num_steps=5)
    assert steps == [2, 4, 5, 5]
    assert whole.drawn == [8]       # it had no pause long enough


def test_a_run_ends_at_its_target_and_says_when(here, whole):
    losses = [float(row["val_loss"]) for row in rows_of(whole.folder) if row["val_loss"]]
    # a target between two validations of this very training, of which the later one is the best so far
    number = next(number for number in range(1, 3) if losses[number] < min(losses[:number]))
    step, target = 2 * (number + 1), (losses[number] + min(losses[:number])) / 2
    folder = train_here(here, **KNOBS, target_loss=target)
    summary, rows = summary_of(folder), rows_of(folder)
    reached = next(row for row in rows if row["val_loss"] and float(row["val_loss"]) <= target)
    assert int(reached["step"]) == step < 8 and rows[-1] == reached
    assert summary["target"] == {"target_loss": target, "step": step, "tokens": int(reached["tokens"]),
                                 "train_seconds": pytest.approx(float(reached["train_seconds"]), abs=0.01)}
    assert summary["status"] == "finished" and summary["budget"] == f"val_loss {target:g}"
    assert (folder / "training_log.txt").read_text().count(f"val_loss {target:g} is reached after") == 2
    missed = train_here(here, num_steps=2, target_loss=0.1, model_name="missed")
    assert summary_of(missed)["target"] is None and summary_of(missed)["step"] == 2


def test_a_held_out_loss_that_rises_is_said_and_the_best_is_named(here, monkeypatch, capsys):
    losses = iter([(3.0, 1.5), (2.0, 1.0), (2.5, 1.25), (4.0, 2.0)])
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_: Validation(*next(losses)))
    folder = train_here(here, num_steps=8)
    said = capsys.readouterr().out
    assert "held-out loss has risen since step 4 (val_loss 2.0000 there, 4.0000 now)" in said
    assert "best        val_bpb 1.0000 at step 4\n" in said
    assert (summary_of(folder)["best_val_bpb"], summary_of(folder)["val_bpb"]) == (1.0, 2.0)


def test_steps_that_are_reported_later_are_the_same_steps(here, whole, monkeypatch):
    """As on a GPU, where Python does not wait for a step to end."""
    at_once = {row["step"]: row for row in rows_of(whole.folder)}
    monkeypatch.setattr(World, "reports_behind", 2)
    later = rows_of(train_here(here, **KNOBS, log_every=3, val_every=4, save_every_steps=5))
    assert [int(row["step"]) for row in later] == [1, 3, 4, 6, 8]
    for row in later:
        same = at_once[row["step"]]
        assert [row[name] for name in ("train_loss", "grad_norm", "lr_scale")] == [
            same[name] for name in ("train_loss", "grad_norm", "lr_scale")]
        assert row["val_loss"] == (same["val_loss"] if int(row["step"]) in (4, 8) else "")


def trains(inputs: torch.Tensor, targets: torch.Tensor) -> bool:
    """Whether a forward pass is of a step; others count memory on the meta device, or only warm up."""
    return inputs.device.type != "meta" and bool((targets >= 0).any())


def test_a_loss_gone_wrong_is_named_by_its_step_also_when_reported_later(lab, here, monkeypatch):
    real, calls = GPT.forward, []

    def forward(model, *arguments):
        calls.extend([1] * trains(*arguments))
        return real(model, *arguments) * (math.nan if len(calls) == 4 else 1)
    monkeypatch.setattr(GPT, "forward", forward)
    monkeypatch.setattr(World, "reports_behind", 1)
    with pytest.raises(UserError, match="the loss of step 4 is nan"):
        train_here(here, num_steps=20, log_every=20, val_every=20, save_every_steps=3)
    saved = read_checkpoint(max((here / "experiments").iterdir()))
    assert saved["step"] == 3 and all(weight.isfinite().all() for weight in saved["model"].values())


def test_the_garbage_collector_rests_while_a_run_trains(whole):
    assert whole.collecting == [False] * 8 + [True]


def test_every_row_of_the_metrics_has_its_train_loss(here, whole):
    rows = rows_of(train_here(here, log_every=3, val_every=5, num_steps=11))
    assert list(rows[0]) == list(COLUMNS)
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 6, 9, 10, 11]
    for row in rows:
        always = ("tokens", "epoch", "train_seconds", "train_loss", "lr_scale", "grad_norm",
                  "tokens_per_second", "peak_memory_mib")
        assert all(math.isfinite(float(row[column])) for column in always)
        assert bool(row["val_loss"]) == bool(row["val_bpb"]) == (int(row["step"]) in (5, 10, 11))
        assert row["mfu"] == ""      # the peak of a CPU is not known
    assert float(rows_of(whole.folder)[0]["mfu"]) > 0       # and here it was given


def test_the_same_seed_gives_the_same_numbers(whole, again, other):
    def losses(run: Watched) -> list:
        return ([(row["train_loss"], row["val_loss"]) for row in rows_of(run.folder)]
                + [(run.folder / "samples.jsonl").read_text()])
    assert losses(whole) == losses(again) != losses(other)


@pytest.fixture(scope="module")
def row_by_row(lab, shelf) -> SimpleNamespace:
    """The same run again in micro-batches of one row; and how many graphs of them were alive at a time."""
    alive, most = 0, 0

    class Counting(GPT):
        def forward(self, inputs, targets):
            nonlocal alive, most
            loss = super().forward(inputs, targets)
            if trains(inputs, targets):
                alive += 1
                most = max(most, alive)
                loss.register_hook(lambda grad: done())
            return loss

    def done() -> None:
        nonlocal alive
        alive -= 1
    run = watched(lab, shelf, with_model(Counting), micro_batch_tokens=32, model_name="row_by_row")
    return SimpleNamespace(folder=run.folder, most=most, left=alive)


def test_micro_batches_do_not_change_the_mathematics(whole, row_by_row):
    """Not in one micro-batch of 10 rows, not in 10 of one; test_micro_batches_halve has uneven ones."""
    def losses(folder: Path) -> list[float]:
        return [float(row[column]) for row in rows_of(folder)
                for column in ("train_loss", "val_loss") if row[column]]
    assert losses(row_by_row.folder) == pytest.approx(losses(whole.folder), rel=1e-4)


def test_memory_is_freed_between_micro_batches(row_by_row):
    """Backward runs for each micro-batch, so that only one graph is alive at a time."""
    assert row_by_row.most == 1 and row_by_row.left == 0


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------

def held_out_of(lab: Path, **knobs) -> tuple[HeldOut, Config]:
    dataset, tokenizer = shards.open_dataset("tiny", "")
    cfg = Config(**{**TINY, "vocab_size": 301, **knobs})
    return HeldOut(dataset.tokens("val"), cfg, tokenizer), cfg


def test_validation_predicts_every_held_out_token_once(lab, here):
    held_out, _ = held_out_of(lab)
    inputs, targets = held_out.windows(list(range(held_out.num_windows)))
    assert targets[targets >= 0].tolist() == held_out.tokens.tolist()
    # within a window the input is the token before the target
    assert torch.equal(inputs[:, 1:][targets[:, 1:] >= 0], targets[:, :-1][targets[:, 1:] >= 0])
    assert (inputs[:, 0] == 300).all()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_validation_is_the_same_for_any_batch(lab, here, rows):
    """And it is the cross-entropy of the model's logits, all at once in float64."""
    held_out, cfg = held_out_of(lab)
    torch.manual_seed(0)
    model = GPT(cfg, 300)
    torch.nn.init.normal_(model.head)
    world = World(cfg)
    inputs, targets = held_out.windows(list(range(held_out.num_windows)))
    logits = model.logits(model.hidden(inputs)).double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                                               reduction="none").view(targets.shape)
    num_bytes = torch.tensor([len(held_out.token_bytes[token]) for token in range(301)])
    lengths = num_bytes[targets.clamp(min=0)] * (targets >= 0)
    result = held_out.evaluate(TokenLosses(model, world), rows, world)
    assert result.val_loss == pytest.approx(losses.sum().item() / len(held_out.tokens), rel=1e-6)
    bits = losses[lengths > 0].sum().item() / math.log(2)
    assert result.val_bpb == pytest.approx(bits / len(held_out.text()), rel=1e-6)
    assert lengths.sum() == len(held_out.text())


def test_bits_per_byte_count_the_bytes_of_the_text(lab, here):
    """An untrained model gives every token ln V nats, so its bits per byte follow from the counts alone."""
    held_out, cfg = held_out_of(lab)
    manifest = json.loads((lab / "data" / "tiny" / "manifest.json").read_text())
    val = next(shard for shard in manifest["shards"] if shard["split"] == "val")
    assert len(held_out.text()) == val["bytes"] and held_out.num_documents == val["documents"]
    texts = [json.loads(line)["text"] for line in (lab / "text.jsonl").read_text().splitlines()]
    begins = [*np.flatnonzero(held_out.tokens == 300), len(held_out.tokens)]
    held_out_texts = [tokenizer_of(lab).decode(held_out.tokens[begin + 1:end].tolist())
                      for begin, end in pairwise(begins)]
    assert all(any(text in whole for whole in texts) for text in held_out_texts)
    assert val["bytes"] == sum(len(text.encode()) for text in held_out_texts)
    result = held_out.evaluate(TokenLosses(GPT(cfg, 300), World(cfg)), 4, World(cfg))
    assert result.val_loss == pytest.approx(math.log(301))
    assert result.val_bpb == pytest.approx(math.log2(301) * (val["tokens"] - val["documents"]) / val["bytes"])


@torch.no_grad()
@pytest.mark.parametrize(("rows", "knobs"), [(1, {}), (3, {}), (1000, {}), (3, {"val_tokens": 333})])
def test_each_held_out_document_has_its_own_nats(lab, here, rows, knobs):
    """Windows hold parts of several documents; each token's loss counts for the one that it is of."""
    held_out, cfg = held_out_of(lab, **knobs)
    torch.manual_seed(0)
    model = GPT(cfg, 300)
    torch.nn.init.normal_(model.head)
    inputs, targets = held_out.windows(list(range(held_out.num_windows)))
    logits = model.logits(model.hidden(inputs)).double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                                               reduction="none")[:len(held_out.tokens)].tolist()
    wanted = []
    for token, loss in zip(held_out.tokens.tolist(), losses, strict=True):
        if token == 300:
            wanted.append([len(wanted), 0, 0, 0.0, 0.0])
        num_bytes = len(held_out.token_bytes[token])
        for column, more in enumerate((1, num_bytes, loss, loss * (num_bytes > 0)), 1):
            wanted[-1][column] += more
    assert len(wanted) == held_out.num_documents > 1
    result = held_out.evaluate(TokenLosses(model, World(cfg)), rows, World(cfg))
    table = held_out.table(result.nats)
    assert [row[:3] for row in table] == [tuple(row[:3]) for row in wanted]
    assert [row[3:] for row in table] == [pytest.approx(row[3:], rel=1e-6) for row in wanted]
    _, tokens, num_bytes, nats, text_nats = map(sum, zip(*table, strict=True))
    assert nats / tokens == pytest.approx(result.val_loss, rel=1e-12)
    assert text_nats / math.log(2) / num_bytes == pytest.approx(result.val_bpb, rel=1e-12)


def test_what_stands_before_the_first_document_is_one_too(lab, here):
    held_out, cfg = held_out_of(lab)
    cut = HeldOut([held_out.tokens[5:]], cfg, tokenizer_of(lab))
    assert (cut.document_of == held_out.document_of[5:]).all()


def test_a_run_keeps_what_its_last_validation_found_of_each_document(lab, here, whole, row_by_row):
    """And on any number of rows at a time it finds the same."""
    held_out, _ = held_out_of(lab)
    documents = read_run(row_by_row.folder).documents   # which compares its sums with val_loss and val_bpb
    assert len(documents["document"]) == held_out.num_documents
    assert sum(documents["tokens"]) == len(held_out.tokens)
    for column, values in read_run(whole.folder).documents.items():
        assert values == pytest.approx(documents[column], rel=1e-5)


@torch.no_grad()
def test_the_losses_of_the_bench_are_those_that_training_reports(lab, here):
    """The evaluator computes the cross-entropy itself, and so notices what an experiment adds to its loss."""
    _, cfg = held_out_of(lab)
    torch.manual_seed(0)
    model = GPT(cfg, 300)
    torch.nn.init.normal_(model.head)
    inputs = torch.randint(0, 300, (4, 32))
    targets = torch.randint(-1, 300, (4, 32))
    losses = TokenLosses(model, World(cfg))(inputs, targets)
    assert losses.sum().item() == pytest.approx(model(inputs, targets).item(), rel=1e-6)
    found, likeliest = TokenLosses(model, World(cfg))(inputs, targets, likeliest=True)
    assert torch.equal(found, losses)
    assert torch.equal(likeliest.bool(), model.logits(model.hidden(inputs)).argmax(-1) == targets)


# ------------------------------------------------------------------------------------------------
# What a run refuses and survives
# ------------------------------------------------------------------------------------------------

def test_a_gradient_that_is_not_finite_ends_the_run_with_its_name(lab, here, monkeypatch):
    real = Optimizer.sum_gradients

    def poisoned(optimizer):
        if optimizer.steps_done == 2:
            optimizer.parameters["layers.1.up"].grad[0, 0] = math.nan
        return real(optimizer)
    monkeypatch.setattr(Optimizer, "sum_gradients", poisoned)
    with pytest.raises(UserError, match=r"layers\.1\.up .* step 3"):
        train_here(here)
    folder = next((here / "experiments").iterdir())
    assert summary_of(folder)["status"].startswith("failed: the gradient of layers.1.up")
    assert len(rows_of(folder)) == 2


def test_a_parameter_without_gradient_is_named(lab, here):
    class Forgetful(GPT):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.forgotten = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="forgotten has no gradient"):
        train_here(here, with_model(Forgetful))


def test_shards_of_another_tokenizer_are_refused(lab, here, monkeypatch):
    name = tokenizer_of(lab).name
    other = json.loads((lab / "tokenizers" / name / "meta.json").read_text())
    folder = here / "tokenizers" / "other"
    folder.mkdir(parents=True)
    ranks = ranks_file_of([bytes([byte]) for byte in range(256)])
    (folder / "ranks.tiktoken").write_bytes(ranks)
    other |= {"ranks_sha256": hashlib.sha256(ranks).hexdigest(), "vocab_size": 257, "eot_id": 256,
              "special_tokens": {"<|endoftext|>": 256}}
    (folder / "meta.json").write_text(json.dumps(other))
    monkeypatch.setattr(places, "TOKENIZERS", here / "tokenizers")
    with pytest.raises(UserError, match=f"use --tokenizer {name}"):
        train_here(here, tokenizer="other", data="tiny")


def test_a_wrong_vocabulary_size_is_refused_with_the_right_one(lab, here):
    with pytest.raises(UserError, match=r"must be 301.*it is 302"):
        train_here(here, vocab_size=302)
    cfg = Config(**TINY, vocab_size=301)
    assert open_data(cfg, World(cfg))[0].vocab_size == 301


def test_a_pickle_name_of_older_days_is_understood(lab, here, capsys):
    cfg = Config(**TINY, tokenizer=f"{tokenizer_of(lab).name}.pkl")
    assert open_data(cfg, World(cfg))[1].tokenizer.name == tokenizer_of(lab).name
    assert "folders now" in capsys.readouterr().err


def test_shards_without_manifest_need_a_tokenizer(lab, here, monkeypatch):
    name = tokenizer_of(lab).name
    (here / "data" / "bare").mkdir(parents=True)
    for path in (lab / "data" / "tiny").glob("*.bin"):
        shutil.copy(path, here / "data" / "bare" / f"fineweb_{path.name}")
    monkeypatch.setattr(places, "DATA", here / "data")
    with pytest.raises(UserError, match="name it with --tokenizer"):
        train_here(here, data="bare")
    folder = train_here(here, data="bare", tokenizer=name)
    assert summary_of(folder)["status"] == "finished"
    assert summary_of(folder)["xz_bpb"] is None


def test_the_bar_is_the_manifests_and_the_verdict_is_said(lab, here, capsys, monkeypatch):
    """What xz needs for the held-out text after the training text stands in the manifest."""
    shutil.copytree(lab / "data" / "tiny", here / "data" / "tiny")
    path = here / "data" / "tiny" / "manifest.json"
    manifest = json.loads(path.read_text())
    monkeypatch.setattr(places, "DATA", here / "data")
    tokens = next(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "val")
    path.write_text(json.dumps(manifest | {"xz_bpb": 0.5, "xz_training_bytes": 12 * 2**20}))
    summary = summary_of(train_here(here, num_steps=1, val_every=1, val_tokens=tokens))
    assert summary["xz_bpb"] == 0.5
    said = "(xz -9e after the last 12 MiB of the training text: 0.5000; the model is worse)"
    assert said in capsys.readouterr().out

    def bar_and_words(xz_bpb: float, val_tokens: int = 0) -> tuple[float | None, str]:
        path.write_text(json.dumps(manifest | {"xz_bpb": xz_bpb}))
        cfg = Config(**TINY, val_tokens=val_tokens)
        bar = open_data(cfg, World(cfg))[1].bar
        return bar["xz_bpb"], "\n".join(conclusion(cfg, here, summary | bar, []))
    for xz_bpb, verdict in ((0.5, "worse"), (50.0, "better")):
        bar, words = bar_and_words(xz_bpb)
        said = f"(xz -9e after the training text: {xz_bpb:.4f}; the model is {verdict})"
        assert bar == xz_bpb and said in words
    bar, words = bar_and_words(0.5, tokens - 1)
    assert bar is None and "xz -9e" not in words, "it is a bar for all held-out text only"


@pytest.mark.parametrize(("flags", "message"), [
    (["--num_layers", "0"], "--num_layers must be 1 or more; it is 0"),
    (["--val_tokens", "1"], "--val_tokens 1 leaves no text to validate on; use more, or 0 for all"),
    (["--num_layers", "two"], "argument --num_layers: must be a whole number, not 'two'"),
    (["--num_layers", "2.5"], "argument --num_layers: must be a whole number, not '2.5'"),
    (["--muon_lr", "fast"], "argument --muon_lr: invalid float value: 'fast'"),
    (["--muon_lr", "-1e-3"], "--muon_lr must be 0 or more; it is -0.001"),
    (["--model_dim", "30", "--num_heads", "4"],
     "--num_heads must be such that --model_dim, 30, is a multiple of 4 x --num_heads; it is 4"),
    (["--model_dim", "30"], "--model_dim must be a multiple of 4; it is 30"),
    (["--batch_tokens", "1000"], "--batch_tokens must be a multiple of --seq_len, 512"),
    (["--cooldown_frac", "1.5"], "--cooldown_frac must be between 0 and 1; it is 1.5"),
    (["--muon_lr", "nan"], "--muon_lr must be less than 2**53; it is nan"),
    (["--dtype", "int8"], "--dtype must be one of auto, bfloat16, float16, float32; it is 'int8'"),
    (["--preset", "xxl"], "--preset must be one of demo, five-minutes, xs"),
    (["--model_name", "../../x"], "--model_name must be 1 to 100 letters"),
    (["--num_layer", "3"], "there is no flag --num_layer; did you mean --num_layers?"),
    (["--micro_batch_tokens", "8"], "--micro_batch_tokens must be at least --seq_len, 512"),
    (["--data", "../secrets"], "--data must be the name of a folder"),
    (["--tokenizer", "nobody"],
     "there is no tokenizer nobody, only tiny; to make nobody: python train_tokenizer.py"),
    (["--data", "nobody"], "there is no nobody in"),
])
def test_each_mistake_is_one_line_that_says_what_to_do(lab, here, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--compile", "off", *flags])
    with pytest.raises(SystemExit) as stop:
        train_gpt.main()
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
    assert not (here / "experiments").exists()


def test_parameters_that_draw_from_the_common_stream_are_named_whatever_their_shape():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    drawn(model[0].weight, normal_law(1.0))
    line, = drawn_in_one_stream(model)
    assert line.startswith("weights     drawn from one shared random stream") and ": 0.bias; " in line
    drawn(model[0].bias, normal_law(1.0))
    assert drawn_in_one_stream(model) == []
    assert drawn_in_one_stream(GPT(Config(vocab_size=101, num_layers=2, model_dim=16), 100)) == []


# ------------------------------------------------------------------------------------------------
# The command line, the file and the machine
# ------------------------------------------------------------------------------------------------

def test_the_presets_have_the_sizes_that_are_published():
    """gpt-lab's baselines with its 50,257 tokens: 57,766,692, 117,745,206 and 342,507,334 parameters."""
    for preset, published in (("xs", 57_766_692), ("s", 117_745_206), ("m", 342_507_334)):
        cfg = parse_config(["--preset", preset, "--vocab_size", "50257"], Config)
        with torch.device("meta"):
            assert num_parameters(GPT(cfg, 50256)) == pytest.approx(published, rel=0.01)


@pytest.fixture
def script(here, monkeypatch, capsys) -> Callable:
    """script("--check") does what `python train_gpt.py --check` does, in this process."""
    def script(*words: str, expect: int = 0) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *words])
        capsys.readouterr()
        code = None
        try:
            EXPERIMENT.main()
        except SystemExit as end:
            code = end.code     # Python prints a text on stderr, and exits with 1
        out, err = capsys.readouterr()
        assert (1 if isinstance(code, str) else code or 0) == expect, (code, out, err)
        return SimpleNamespace(stdout=out, stderr=err + (f"{code}\n" if isinstance(code, str) else ""))
    return script


def test_check_tells_by_its_exit_code(here, script):
    done = script("--check", "--compile", "off", "--num_layers", "2", "--value_embeddings", "1")
    assert done.stdout.endswith("ready to train\n")
    assert "parameters" in done.stdout and "memory" in done.stdout
    for missing, maker in (("--data", "download_fineweb"), ("--tokenizer", "train_tokenizer")):
        done = script("--check", "--compile", "off", missing, "nobody", expect=1)
        assert f"python {maker}.py" in done.stdout and done.stdout.endswith("cannot train\n")
    done = script("--check", "--compile", "off", "--compare_to", "nobody", expect=1)
    assert "nobody is not a run folder" in done.stdout and done.stdout.endswith("cannot train\n")
    assert not (here / "experiments").exists()


def test_a_copy_beside_the_original_works_at_once(lab):
    source = (lab / "train_gpt.py").read_text()
    marked = source.replace("class Config(CommonConfig):",
                            "class Config(CommonConfig):\n    calmness: float = -1.5")
    assert marked != source
    (lab / "my_experiment.py").write_text(marked)
    run(lab, "my_experiment.py", *flags(model_name="copy"), "--calmness", "-1e-3")
    folder = newest(lab, "copy")
    assert (folder / "my_experiment.txt").read_text() == marked
    assert (folder / "code" / "my_experiment.py").read_text() == marked
    assert not (folder / "code" / "train_gpt.py").exists()      # it took no part
    assert json.loads((folder / "config.json").read_text())["calmness"] == -0.001
    assert summary_of(folder)["script"] == "my_experiment.py"
    assert summary_of(folder)["code_sha256"] == hashlib.sha256(marked.encode()).hexdigest()


def test_importing_has_no_side_effects(lab):
    before = sorted(lab.rglob("*"))
    code = ("import socket, sys\ndef no(*a): raise OSError('network')\nsocket.socket.connect = no\n"
            "import train_gpt, torch\n"
            "assert not torch.distributed.is_initialized()\nassert not torch.cuda.is_initialized()")
    done = subprocess.run([sys.executable, "-B", "-c", code, "--nonsense"], cwd=lab, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert sorted(lab.rglob("*")) == before


def test_the_marks_for_editing_are_those_that_the_file_announces():
    source = Path(train_gpt.__file__).read_text(encoding="utf-8")
    announced = re.search(r'marked EDIT: ([\w |]+)\.', source)[1].split(" | ")
    assert re.findall(r"# EDIT: (\w+)$", source, re.MULTILINE) == announced


def test_only_the_machine_names_torch_distributed():
    naming = {path.name for path in (*ROOT.glob("*.py"), *(ROOT / "benchtop").glob("*.py"))
              if re.search(r"\bdist\.|^ *(import|from) torch\.distributed", path.read_text(encoding="utf-8"),
                           re.MULTILINE)}
    assert naming == {"launch.py", "machine.py", "processes.py"}


def test_float16_with_scaled_losses_is_near_float32(here, whole):
    def losses(folder: Path) -> list[float]:
        return [float(row["train_loss"]) for row in rows_of(folder)]
    assert losses(train_here(here, **KNOBS, dtype="float16")) == pytest.approx(losses(whole.folder), rel=5e-3)


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_run(here, whole):
    def losses(folder: Path) -> list[float]:
        return [float(row[column]) for row in rows_of(folder)
                for column in ("train_loss", "val_loss", "grad_norm") if row[column]]
    assert losses(train_here(here, **KNOBS, compile="on")) == pytest.approx(losses(whole.folder), rel=1e-3)


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------

def test_the_largest_preset_fits_a_box_of_eight_gpus(monkeypatch):
    """By the estimate that chooses the micro-batch; no such box was at hand."""
    world = SimpleNamespace(size=8, local_size=8, device=torch.device("cuda"), dtype=torch.bfloat16,
                            free_memory_mib=lambda: 79_000)
    monkeypatch.setattr(memory, "largest_chunk", lambda device: 2**30)
    kernels = dataclasses.replace(EAGER, compiled=True, flex={})
    cfg = parse_config(["--preset", "gpt2-xl", "--vocab_size", "50257"], Config)
    with torch.device("meta"):
        model = GPT(cfg, 50256, torch.bfloat16, flex={})
    assert num_parameters(model) == pytest.approx(1.5e9, rel=0.02)
    cfg = memory.choose_micro_batch(EXPERIMENT, cfg, world, kernels)
    needed = memory.memory_estimate_mib(EXPERIMENT, cfg, world, kernels)
    print(f"gpt2-xl on 8 GPUs: {needed:,.0f} MiB each, micro-batches of {cfg.micro_batch_tokens:,} tokens")
    assert 15_000 < needed < 0.9 * 79_000 and cfg.micro_batch_tokens >= 4 * cfg.seq_len


def out_of_memory_above(tokens: int, monkeypatch) -> list[int]:
    """The model's forward pass runs out of memory with more tokens at a time; returns what was tried."""
    real, tried = GPT.forward, []

    def forward(model, inputs, targets):
        if inputs.device.type == "meta":        # that takes no memory
            return real(model, inputs, targets)
        tried.append(inputs.numel())
        if inputs.numel() > tokens:
            raise torch.OutOfMemoryError("as a GPU says it")
        return real(model, inputs, targets)
    monkeypatch.setattr(GPT, "forward", forward)
    return tried


def test_micro_batches_halve_until_they_fit_and_change_no_result(here, whole, monkeypatch, capsys):
    tried = out_of_memory_above(100, monkeypatch)
    folder = train_here(here, **KNOBS)
    said = capsys.readouterr().out
    assert tried[:3] == [320, 160, 96]      # 10 rows, 5, 3
    assert "micro-batches of 320 tokens do not fit into memory; trying 160" in said
    for row, other in zip(rows_of(folder), rows_of(whole.folder), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-5)
        assert row["tokens"] == other["tokens"]


def test_where_nothing_fits_three_flags_are_named_the_most_effective_first(lab, here, monkeypatch):
    out_of_memory_above(31, monkeypatch)
    with pytest.raises(UserError) as error:
        train_here(here, seq_len=32, model_dim=512, num_layers=2, vocab_size=301)
    assert "not even one row of 32 tokens fits" in str(error.value)
    flags_named = re.findall(r"--(\w+) (\d+) \(about ([\d,]+) MiB\)", str(error.value))
    needs = [int(mib.replace(",", "")) for *_, mib in flags_named]
    assert len(flags_named) == 3 and needs == sorted(needs) and flags_named[0][:2] == ("model_dim", "256")
    for knob, value, _ in flags_named:
        dataclasses.replace(Config(**{**TINY, "model_dim": 512}), **{knob: int(value)})


def test_a_micro_batch_that_was_asked_for_is_tried_first(lab, here, monkeypatch):
    tried = out_of_memory_above(10**9, monkeypatch)
    train_here(here, micro_batch_tokens=64, num_steps=1, val_every=1)
    assert set(tried) == {64}


@pytest.mark.slow
def test_a_cpu_without_memory_takes_smaller_micro_batches(lab):
    """With half of what the micro-batch keeps for backward; threads, which have stacks, are always two."""
    limited = """
import resource, re, pathlib, torch
from benchtop import machine, memory
real = memory.fit_micro_batch
def fit_micro_batch(cfg, world, *rest):
    torch.set_num_threads(2)
    rows = cfg.micro_batch_tokens // cfg.seq_len
    kept = rows * memory.kept_mib(train_gpt.GPT, cfg, world.dtype, machine.Kernels(False, "", None, ""))[0]
    used = int(re.search(r"VmData:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(kept / 2) * 2**20, resource.RLIM_INFINITY))
    fitting = real(cfg, world, *rest)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return fitting
memory.fit_micro_batch = fit_micro_batch
"""
    knobs = dict(num_steps=1, batch_tokens=4096, seq_len=512, model_dim=256, num_layers=4)
    done = drive(lab, limited, *flags(**knobs, model_name="limited"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "do not fit into memory; trying" in done.stdout
    assert rows_of(newest(lab, "limited"))[-1]["tokens"] == "4096"


@pytest.mark.slow
def test_one_process_out_of_memory_makes_all_take_smaller_micro_batches(lab):
    """The other one must not wait for it in an exchange of gradients."""
    limited = """
import os, torch
real = train_gpt.GPT.forward
def forward(model, inputs, targets):
    if os.environ["RANK"] == "1" and inputs.device.type != "meta" and inputs.numel() > 200:
        raise torch.OutOfMemoryError("as a GPU says it")
    return real(model, inputs, targets)
train_gpt.GPT.forward = forward
"""
    knobs = dict(num_steps=2, batch_tokens=640, model_name="onelimited", timeout_seconds=30)
    done = drive(lab, limited, *flags(**knobs), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "micro-batches of 320 tokens do not fit into memory; trying 160" in done.stdout


def test_an_error_that_is_not_of_memory_is_not_taken_for_one(lab, here, monkeypatch):
    real = GPT.forward

    def forward(model, inputs, targets):
        if inputs.device.type != "meta":
            raise RuntimeError("shapes do not match")
        return real(model, inputs, targets)
    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_here(here)


def test_memory_is_counted_for_training_validation_and_evaluation_apart(lab, here, monkeypatch):
    def wasting(real):
        def function(*arguments, **options):
            waste = torch.ones(75 * 2**20)      # 300 MiB
            result = real(*arguments, **options)
            del waste
            return result
        return function
    monkeypatch.setattr(HeldOut, "evaluate", wasting(HeldOut.evaluate))
    summary = summary_of(train_here(here, num_steps=2))
    training, validation, evaluation = (summary[f"peak_memory_mib{phase}"]
                                        for phase in ("", "_validation", "_evaluation"))
    assert validation - training > 250 and evaluation - training < 100


@pytest.mark.parametrize(("dtype", "tokens"), [("float32", 4096), ("auto", 4096)])
def test_the_estimate_is_near_what_is_used(lab, dtype, tokens):
    done = drive(lab, "", *flags(num_steps=1, batch_tokens=tokens, seq_len=512, model_dim=256, num_layers=4,
                                 model_name=f"estimate_{dtype}", dtype=dtype))
    assert done.returncode == 0, done.stderr
    estimate = float(re.search(r"about ([\d,]+) MiB", done.stdout)[1].replace(",", ""))
    used = summary_of(newest(lab, f"estimate_{dtype}"))["peak_memory_mib"]
    print(f"{dtype}: {estimate} MiB by the estimate, {used} MiB used")
    assert 0.7 < estimate / used < 1.5, (estimate, used)


# ------------------------------------------------------------------------------------------------
# Determinism and secrets
# ------------------------------------------------------------------------------------------------

def test_the_seed_decides_weights_order_and_samples(whole, again, other):
    one, same, another = (run.folder for run in (whole, again, other))
    for name in ("model.safetensors", "samples.jsonl"):
        assert (one / name).read_bytes() == (same / name).read_bytes() != (another / name).read_bytes()


def test_deterministic_is_asked_of_torch(here, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "as it was")
    try:
        train_here(here, num_steps=1, val_every=1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


class Cut(Exception):
    """The end of a run between two of its steps."""


def test_random_numbers_of_a_changed_model_survive_warm_up_and_resume(here, monkeypatch):
    """With dropout added, as an experiment might: a run that is cut off and resumed draws what an undisturbed
    one draws, and so does one that warms up twice."""
    class WithDropout(GPT):
        def hidden(self, *arguments, **more):
            x = super().hidden(*arguments, **more)
            return torch.nn.functional.dropout(x, 0.3, training=self.training)

    def trained(name: str, **knobs) -> Path:
        return train_here(here, with_model(WithDropout), num_steps=8, save_every_steps=1, model_name=name,
                          **knobs)

    def cut_off(run: Run, between_steps=Run.between_steps) -> None:
        between_steps(run)
        if run.step == 5:
            raise Cut
    undisturbed = trained("undisturbed")
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Run, "between_steps", cut_off)
        trained("cut")
    cut = newest(here, "cut")
    assert len(rows_of(cut)) == 5 and read_checkpoint(cut)["step"] in (4, 5)
    resumed = trained("cut", resume=str(cut))

    def twice(*arguments) -> None:
        warm_up(*arguments)
        warm_up(*arguments)
    monkeypatch.setattr("benchtop.warm_up.warm_up", twice)
    losses = [[[row[column] for column in ("train_loss", "val_loss", "grad_norm")] for row in rows_of(folder)]
              for folder in (undisturbed, resumed, trained("warmer"))]
    assert losses[0] == losses[1] == losses[2]


def test_knobs_that_a_job_script_exports_are_no_secrets(monkeypatch):
    monkeypatch.setenv("TOKENIZER", "tiny_v300_n1073741824")
    monkeypatch.setenv("BATCH_TOKENS", "bigbatches")
    monkeypatch.setenv("MY_KEY", "10485760")
    monkeypatch.setenv("HUB_TOKEN", "very-secret")
    line = "tiny_v300_n1073741824 bigbatches 10485760"
    assert without_secrets(f"{line} very-secret") == f"{line} [HUB_TOKEN]"


def test_no_secret_reaches_the_run_folder(here, monkeypatch):
    """Not even if every line of the log, and all that git says, holds the whole environment."""
    secrets = {"HF_TOKEN": "hf_" + "abcDEF123" * 4, "WANDB_API_KEY": "0123456789abcdef",
               "MY_PASSWORD": "swordfish1"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)

    def say(log: RunLog, line: str, say=RunLog.say) -> None:
        say(log, line + " ".join(os.environ.values()))
    monkeypatch.setattr(RunLog, "say", say)
    monkeypatch.setattr("benchtop.identity.git", lambda *words: " ".join(os.environ.values()))
    folder = train_here(here, num_steps=2)
    for path in filter(Path.is_file, folder.rglob("*")):
        assert not [name for name, value in secrets.items() if value.encode() in path.read_bytes()], path
    assert "[MY_PASSWORD]" in (folder / "training_log.txt").read_text()
    assert "[MY_PASSWORD]" in (folder / "git.diff").read_text()


# ------------------------------------------------------------------------------------------------
# Using a model
# ------------------------------------------------------------------------------------------------

def test_sample_goes_on_with_a_prompt(script, whole):
    words = ["--sample", str(whole.folder), "--prompt", "the cat", "--sample_tokens", "8"]
    first = script(*words, "--num_samples", "3").stdout
    assert len(first.strip().split("\n\nthe cat")) == 3 and first.startswith("the cat")
    assert script(*words, "--num_samples", "3").stdout == first
    assert script(*words, "--num_samples", "3", "--seed", "7").stdout != first
    assert script(*words, "--temperature", "0").stdout == script(*words, "--top_k", "1").stdout


def test_sample_answers_what_is_typed(script, whole, monkeypatch):
    import pty
    ours, theirs = pty.openpty()
    os.write(ours, b"the cat\nthe dog\n\x04")
    with open(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        out = script("--sample", str(whole.folder), "--sample_tokens", "3").stdout
    os.close(ours)
    assert out.index("the cat") < out.index("the dog") and out.count("> ") == 3


def changed(run: Watched, folder: Path, name: str = "summary.json", **facts) -> Path:
    """A copy of a run with other facts in one of its files."""
    shutil.copytree(run.folder, folder)
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | facts))
    return folder


def test_sample_says_in_a_line_what_is_missing(script, here, whole):
    def complaint(*words: str) -> str:
        done = script("--sample", *words, expect=1)
        assert len(done.stderr.splitlines()) == 1
        return done.stderr
    assert "--sample needs a --prompt" in complaint(str(whole.folder))
    assert "has no summary.json" in complaint("experiments/nothing", "--prompt", "a")
    other = changed(whole, here / "of_another_script", script="gelu.py")
    assert "was trained by gelu.py; use that script" in complaint(str(other), "--prompt", "a")
    weightless = changed(whole, here / "weightless")
    (weightless / "model.safetensors").unlink()
    assert "train it with --save_model" in complaint(str(weightless), "--prompt", "a")


def test_sample_of_a_changed_script_warns(script, here, whole):
    folder = changed(whole, here / "of_changed_code", code_sha256="0" * 64)
    done = script("--sample", str(folder), "--prompt", "a", "--sample_tokens", "2")
    assert done.stdout.startswith("a") and "train_gpt.py has changed since it trained" in done.stderr
    done = script("--sample", str(whole.folder), "--prompt", "a", "--sample_tokens", "2")
    assert done.stderr == ""


def test_fp8_is_needed_to_train_with_it_and_not_to_sample(script, here, whole):
    trained = changed(whole, here / "with_fp8", "config.json", fp8=True)
    done = script("--sample", str(trained), "--prompt", "a", "--sample_tokens", "2")
    assert done.stdout.startswith("a")
    problem = "--fp8 needs --dtype bfloat16; it is float32; leave it out"
    assert problem in script(*flags(), "--fp8", expect=1).stderr
    assert f"problem     {problem}" in script(*flags(), "--fp8", "--check", expect=1).stdout
    assert not (here / "experiments").exists()


def test_only_the_first_process_samples(lab, script, whole):
    words = ["--sample", str(whole.folder), "--prompt", "the cat", "--sample_tokens", "3"]
    assert run(lab, *torchrun(2)[1:], "train_gpt.py", *words).stdout == script(*words).stdout


def test_the_pages_snippet_loads_a_model(lab, whole):
    readme = (Path(train_gpt.__file__).parent / "docs/sampling.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert len(snippet.splitlines()) <= 10
    (lab / "snippet.py").write_text(snippet.replace("experiments/DATE_TIME_NAME", str(whole.folder)))
    assert run(lab, "snippet.py").stdout.strip()
