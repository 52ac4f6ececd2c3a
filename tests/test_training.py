"""Whole tiny runs: what they learn, write, refuse and survive. Run: ./run.sh test tests/test_training.py"""

import dataclasses
import gc
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import TINY, drive, flags, newest, rows_of, run, summary_of, train_here

import documents
import run_folder
import shards
import train_gpt
import train_tokenizer
from documents import UserError
from train_gpt import GPT, PRESETS, Config, HeldOut, World, generate, parse_config, xz_bits_per_byte

# ------------------------------------------------------------------------------------------------
# What a run learns and leaves
# ------------------------------------------------------------------------------------------------

def test_flops_are_those_of_the_layers_at_work(here):
    folder = train_here(here)
    log = (folder / "training_log.txt").read_text()
    assert "layers      1 of 2 in the first 40% of training\n" in log
    said = re.search(r"over samples of (\d+) tokens in the first 60%", log)
    cfg = Config(**TINY, vocab_size=301, softmax_sample=int(said[1]))
    assert 0 < cfg.softmax_sample < 301
    with torch.device("meta"):
        model = GPT(cfg, 300)
    steps = [128 * model.flops_per_token(train_gpt.stage_at(cfg, step, step / 4)) for step in range(4)]
    assert steps[0] == steps[1] < steps[2] < steps[3]
    assert [float(row["flops"]) for row in rows_of(folder)] == pytest.approx(np.cumsum(steps), rel=1e-5)


def test_a_step_whose_targets_are_too_many_for_the_sample_is_over_all_tokens(here, monkeypatch):
    """Where that is every step, the run is the one without samples, to the bit."""
    none = train_here(here, sampled_softmax_frac=0)
    sampled = train_here(here, model_name="sampled")
    monkeypatch.setattr(train_gpt.Candidates, "of", lambda self, step: None)
    small = train_here(here, model_name="small")
    timeless = [[{key: row[key] for key in ("train_loss", "val_loss", "grad_norm", "flops")}
                 for row in rows_of(run)] for run in (none, small, sampled)]
    assert timeless[0] == timeless[1] != timeless[2]
    # the size is found, not a knob: it may differ from seed to seed
    assert json.loads((sampled / "config.json").read_text())["softmax_sample"] == 0
    assert "over samples of" in (sampled / "training_log.txt").read_text()
    assert "over samples of" not in (none / "training_log.txt").read_text()


def test_a_run_ends_with_its_distance_from_a_baseline(here, capsys):
    bpbs = [summary_of(train_here(here, model_name="base", seed=seed))["val_bpb"] for seed in (1, 2, 3)]
    run = train_here(here, compare_to="base=*_base*")
    above = summary_of(run)["val_bpb"] - np.mean(bpbs)
    said = f"you are {above:+.4f} bits per byte, {abs(above) / np.std(bpbs, ddof=1):.1f} sigma, "
    assert said in capsys.readouterr().out and said in (run / "training_log.txt").read_text()
    with pytest.raises(UserError, match="nothing_there is no run folder"):
        train_here(here, compare_to="nothing_there")


def test_the_summary_names_the_held_out_text(lab, here):
    """Runs with other tokenizers, but the same held-out documents, have the same hash."""
    summary = summary_of(train_here(here))
    dataset, tokenizer = shards.open_dataset("tiny", "")
    text = HeldOut(dataset.tokens("val"), Config(**TINY), tokenizer).text()
    assert summary["held_out_sha256"] == hashlib.sha256(text).hexdigest()
    assert summary["held_out_bytes"] == len(text)


def test_a_tiny_model_learns_a_repeated_text(lab, here):
    (here / "repeated.jsonl").write_text((json.dumps({"text": "abcdefghij" * 9}) + "\n") * 50
                                         + json.dumps({"text": "x"}) + "\n")
    tokens = [300, *train_tokenizer.load_tokenizer("tiny_v300_n1073741824").encode_ordinary("abcdefghij" * 9)]
    shards = [np.array(tokens * 50, dtype=np.uint16)]
    cfg = Config(**{**TINY, "vocab_size": 301, "num_steps": 60, "model_dim": 32, "muon_lr": 0.5,
                    "embed_lr": 3.5, "head_lr": 0.35})
    rows = train_gpt.Rows(shards, cfg, 300)
    torch.manual_seed(0)
    model = GPT(cfg, 300)
    optimizer = train_gpt.Optimizer(model, cfg, World(cfg))
    losses = []
    for step in range(120):
        for inputs, targets in rows.micro_batches(step, cfg):
            loss = model(inputs, targets) / rows.targets_in_step(step, cfg.rows_per_step)
            loss.backward()
        losses.append(loss.item())
        optimizer.step(1.0 if step < 60 else 0.1)       # small steps last, so that it settles on any machine
    assert losses[0] == pytest.approx(math.log(301), abs=0.01)
    # what a model can reach that knows how often each token occurs and nothing of those before it
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert losses[-1] < 0.05 * -(shares * np.log(shares)).sum()
    prompt = tokens[:12]
    likeliest = dataclasses.replace(cfg, temperature=0)
    assert generate(model, torch.tensor([prompt]), likeliest)[0] == tokens[12:17]


def test_a_run_leaves_everything_that_made_it(lab, here):
    folder = train_here(here, save_model=True, gpu_cost_per_hour=3600.0, model_name="whole")
    assert re.fullmatch(r"\d{8}_\d{6}_whole", folder.name)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "summary.json", "metrics.csv", "training_log.txt", "loss.png",
                     "samples.jsonl", "git.diff", "requirements.txt", "meta.json", "model.safetensors",
                     "train_gpt.txt", "train_tokenizer.txt", "download_fineweb.txt", "documents.txt"}
    assert not [name for name in names if name.endswith((".partial", ".pt"))]
    assert (folder / "train_gpt.txt").read_text() == Path(train_gpt.__file__).read_text()
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == {field.name for field in dataclasses.fields(Config)}
    assert config["vocab_size"] == 301
    summary = summary_of(folder)
    assert summary["status"] == "finished" and summary["step"] == 4 and summary["tokens"] == 512
    assert summary["cost"] == pytest.approx(summary["total_seconds"], abs=0.06)
    tokenizer = lab / "tokenizers" / "tiny_v300_n1073741824"
    assert (folder / "meta.json").read_text() == (tokenizer / "meta.json").read_text()
    identity = (tokenizer / "ranks.tiktoken").read_bytes() + train_tokenizer.PATTERNS["gpt4"].encode()
    assert summary["tokenizer_sha256"] == hashlib.sha256(identity).hexdigest()
    assert summary["code_sha256"] == hashlib.sha256(Path(train_gpt.__file__).read_bytes()).hexdigest()
    assert f"torch=={torch.__version__}" in (folder / "requirements.txt").read_text()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("pause", "drawn"), [(0, [2, 4, 5, 5]), (10**6, [5])])
def test_the_picture_is_drawn_at_the_end_and_now_and_then_before(here, monkeypatch, pause, drawn):
    steps = []
    monkeypatch.setattr(run_folder, "PICTURE_SECONDS", pause)
    monkeypatch.setattr(run_folder, "draw_loss", lambda _path, rows, *_: steps.append(rows[-1]["step"]))
    train_here(here, num_steps=5)
    assert steps == drawn


def test_a_run_ends_at_its_target_and_says_when(lab, here):
    folder = train_here(here, num_steps=30, val_every=2, target_loss=5.6, muon_lr=0.5, embed_lr=2.5,
                        head_lr=0.25)
    summary, rows = summary_of(folder), rows_of(folder)
    reached = next(row for row in rows if row["val_loss"] and float(row["val_loss"]) <= 5.6)
    assert 0 < int(reached["step"]) < 30 and rows[-1] == reached
    assert summary["target"] == {"target_loss": 5.6, "step": int(reached["step"]),
                                 "tokens": int(reached["tokens"]),
                                 "train_seconds": pytest.approx(float(reached["train_seconds"]), abs=0.01)}
    assert summary["status"] == "finished"
    assert (folder / "training_log.txt").read_text().count("val_loss 5.6 is reached after") == 2
    missed = train_here(here, target_loss=0.1, model_name="missed")
    assert summary_of(missed)["target"] is None and summary_of(missed)["step"] == 4


def test_steps_that_are_heard_from_later_are_the_same_steps(lab, here, monkeypatch):
    """As on a GPU, where Python does not wait for a step to end."""
    knobs = dict(num_steps=7, log_every=3, val_every=4, save_every_steps=5)
    at_once = rows_of(train_here(here, **knobs, model_name="at_once"))
    monkeypatch.setattr(World, "reports_behind", 2)
    later = rows_of(train_here(here, **knobs, model_name="later"))
    kept = ("step", "train_loss", "val_loss", "grad_norm", "lr_scale")
    for ours, theirs in zip(at_once, later, strict=True):
        assert [ours[name] for name in kept] == [theirs[name] for name in kept]


def test_a_loss_gone_wrong_is_named_by_its_step_also_when_heard_from_later(lab, here, monkeypatch):
    real, calls = GPT.forward, []

    def forward(model, *arguments):
        calls.append(1)
        return real(model, *arguments) * (math.nan if len(calls) == 6 else 1)       # the warm-up makes two
    monkeypatch.setattr(GPT, "forward", forward)
    monkeypatch.setattr(World, "reports_behind", 1)
    with pytest.raises(UserError, match="the loss of step 4 is nan"):
        train_here(here, num_steps=20, log_every=20, val_every=0, save_every_steps=3)
    saved = run_folder.read_checkpoint(max((here / "experiments").iterdir()))
    assert saved["step"] == 3 and all(weight.isfinite().all() for weight in saved["model"].values())


def test_the_garbage_collector_rests_while_a_run_trains(lab, here, monkeypatch):
    real, at_work = train_gpt.train_step, []
    monkeypatch.setattr(train_gpt, "train_step",
                        lambda *arguments: at_work.append(gc.isenabled()) or real(*arguments))
    train_here(here)
    assert at_work == [False] * 4 and gc.isenabled() and not gc.get_freeze_count()


def test_the_largest_preset_fits_a_box_of_eight_gpus(monkeypatch):
    """By the estimate that chooses the micro-batch; no such box was at hand."""
    world = SimpleNamespace(size=8, local_size=8, device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(train_gpt, "free_memory_mib", lambda world: 79_000)
    cfg = parse_config(["--preset", "gpt2-xl", "--vocab_size", "50257"])
    with torch.device("meta"):
        model = GPT(cfg, 50256, torch.bfloat16, flex={})
    assert model.num_parameters() == pytest.approx(1.5e9, rel=0.02)
    cfg = train_gpt.choose_micro_batch(cfg, model, world)
    needed = train_gpt.memory_estimate_mib(cfg, model, world)
    print(f"gpt2-xl on 8 GPUs: {needed:,.0f} MiB each, micro-batches of {cfg.micro_batch_tokens:,} tokens")
    assert 15_000 < needed < 0.8 * 79_000 and cfg.micro_batch_tokens >= 4 * cfg.seq_len


def test_attention_falls_back_where_flex_attention_fails_and_says_why(monkeypatch):
    world = World(Config(device="cpu"))
    assert train_gpt.choose_kernels(Config(compile="off"), world).attention == "plain products"
    world.device = torch.device("cuda")     # there is none here, so the probe fails
    monkeypatch.setattr(train_gpt, "choose_compile", lambda cfg, device: (True, "pretended"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    kernels = train_gpt.choose_kernels(Config(), world)
    assert kernels.flex is None
    assert kernels.attention.startswith("plain products: FlexAttention does not work here (")
    monkeypatch.setattr(train_gpt, "flex_problem", lambda cfg, world: "")
    assert train_gpt.choose_kernels(Config(), world).flex["BLOCK_M"] == 64
    monkeypatch.setattr(train_gpt, "choose_compile", lambda cfg, device: (False, "pretended"))
    assert "needs torch.compile" in train_gpt.choose_kernels(Config(), world).attention


def test_all_is_at_work_after_a_share_of_the_budget_or_so_many_tokens_for_each_weight():
    cfg = Config(**{**TINY, "num_steps": 1000, "softmax_sample": 64})
    with torch.device("meta"):
        layer = GPT(dataclasses.replace(cfg, vocab_size=301), 300).layers[0]
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)
    last = math.ceil(20 * weights / cfg.batch_tokens)      # 480 steps of 128 tokens
    early, late = train_gpt.Stage(1, 1.0, 64), train_gpt.Stage(2, 1.0, 0)
    assert train_gpt.stage_at(cfg, last - 1, 0.39) == early and train_gpt.stage_at(cfg, last, 0.39) == late
    assert train_gpt.stage_at(cfg, 1, 0.59) == train_gpt.Stage(2, 1.0, 64)
    assert train_gpt.stage_at(cfg, 1, 0.6) == late
    of_tokens = " of training, or 0.1 million tokens if that is less"
    lines = train_gpt.early_lines(dataclasses.replace(cfg, num_steps=1300))
    assert [line[12:] for line in lines] == [
        f"1 of 2 in the first 40%{of_tokens}", f"over samples of 64 tokens in the first 60%{of_tokens}"]


def test_every_row_of_the_metrics_has_its_train_loss(lab, here):
    rows = rows_of(train_here(here, log_every=3, val_every=5, num_steps=11))
    assert list(rows[0]) == list(train_gpt.COLUMNS)
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 6, 9, 10, 11]
    for row in rows:
        always = ("tokens", "epoch", "train_seconds", "train_loss", "lr_scale", "grad_norm",
                  "tokens_per_second", "peak_memory_mib")
        assert all(math.isfinite(float(row[column])) for column in always)
        assert bool(row["val_loss"]) == bool(row["val_bpb"]) == (int(row["step"]) in (5, 10, 11))
        assert row["mfu"] == ""      # the peak of a CPU is not known
    assert float(rows_of(train_here(here, peak_tflops=0.1))[0]["mfu"]) > 0


def test_the_same_seed_gives_the_same_numbers(lab, here):
    def losses(seed: int) -> list:
        folder = train_here(here, seed=seed, num_steps=6)
        return ([(row["train_loss"], row["val_loss"]) for row in rows_of(folder)]
                + [(folder / "samples.jsonl").read_text()])
    first, again, other = losses(0), losses(0), losses(1)
    assert first == again != other


def test_micro_batches_do_not_change_the_mathematics(lab, here):
    def losses(micro_batch_tokens: int) -> list[float]:
        rows = rows_of(train_here(here, micro_batch_tokens=micro_batch_tokens, num_steps=6))
        return [float(row[column]) for row in rows for column in ("train_loss", "val_loss") if row[column]]
    assert losses(32) == pytest.approx(losses(128), rel=1e-4)
    assert losses(96) == pytest.approx(losses(128), rel=1e-4)       # 4 rows as 2 x 2


def test_training_minutes_end_a_run_and_its_schedule(lab, here):
    folder = train_here(here, num_steps=10**6, train_minutes=0.02, val_every=0, log_every=1)
    rows = rows_of(folder)
    assert 1.2 <= float(rows[-1]["train_seconds"]) < 5
    assert float(rows[-1]["lr_scale"]) < 0.5 and rows[-1]["val_loss"]


def test_memory_is_freed_between_micro_batches(lab, here):
    """Backward runs for each micro-batch, so that only one graph is alive at a time."""
    alive, most = 0, 0

    class Counting(GPT):
        def forward(self, *arguments):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            loss = super().forward(*arguments)
            loss.register_hook(lambda grad: done())
            return loss

    def done() -> None:
        nonlocal alive
        alive -= 1
    original, train_gpt.GPT = train_gpt.GPT, Counting
    try:
        train_here(here, micro_batch_tokens=32)
    finally:
        train_gpt.GPT = original
    assert most == 1


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


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_validation_is_the_same_for_any_batch(lab, here, rows):
    held_out, cfg = held_out_of(lab)
    torch.manual_seed(0)
    model = GPT(cfg, 300)
    torch.nn.init.normal_(model.head)
    world = World(cfg)
    inputs, targets = held_out.windows(list(range(held_out.num_windows)))
    losses = model.token_losses(inputs, targets).double()
    num_bytes = torch.tensor([len(held_out.token_bytes[token]) for token in range(301)])
    lengths = num_bytes[targets.clamp(min=0)] * (targets >= 0)
    result = held_out.evaluate(model, rows, world)
    assert result.val_loss == pytest.approx(losses.sum().item() / len(held_out.tokens), rel=1e-6)
    bits = losses[lengths > 0].sum().item() / math.log(2)
    assert result.val_bpb == pytest.approx(bits / len(held_out.text()), rel=1e-6)
    assert lengths.sum() == len(held_out.text())


def test_bits_per_byte_count_the_bytes_of_the_text(lab, here):
    """An untrained model gives every token ln V nats, so its bits per byte follow from the counts alone."""
    held_out, cfg = held_out_of(lab)
    manifest = json.loads((lab / "data" / "tiny" / "manifest.json").read_text())
    val = next(shard for shard in manifest["shards"] if shard["split"] == "val")
    assert len(held_out.text()) == val["bytes"]
    texts = [json.loads(line)["text"] for line in (lab / "text.jsonl").read_text().splitlines()]
    held_out_texts = filter(documents.is_held_out, set(texts))
    assert val["bytes"] == sum(len(text.encode()) for text in held_out_texts)
    result = held_out.evaluate(GPT(cfg, 300), 4, World(cfg))
    assert result.val_loss == pytest.approx(math.log(301))
    assert result.val_bpb == pytest.approx(math.log2(301) * (val["tokens"] - val["documents"]) / val["bytes"])


def test_xz_is_that_of_the_command(tmp_path):
    text = Path(train_gpt.__file__).read_bytes()
    if not shutil.which("xz"):
        pytest.skip("xz is not installed")
    packed = subprocess.run(["xz", "-9e", "--stdout"], input=text, capture_output=True, check=True).stdout
    assert xz_bits_per_byte(text) == pytest.approx(8 * len(packed) / len(text), rel=0.001)


def talkative(**knobs) -> tuple[GPT, Config]:
    """A model that says something: all that begins at zero is drawn at random; <|endoftext|> is unlikely."""
    cfg = Config(**{**TINY, "vocab_size": 301, "num_layers": 4, "temperature": 0, **knobs})
    torch.manual_seed(0)
    model = GPT(cfg, 300)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.head)
    model.head.data[300] = 0
    return model.eval(), cfg


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100, 127, 128, 129])
def test_generation_crosses_any_length(length):
    model, cfg = talkative(sample_tokens=3, temperature=1.0)
    made = generate(model, torch.tensor([[300, *range(length - 1)]] * 2), cfg)
    assert [len(text) for text in made] == [3, 3]
    assert all(0 <= token < 301 for text in made for token in text)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 80, [7, 1, 1, 40, 1, 30], [80], [33, 47]])
def test_reading_on_from_the_past_is_reading_it_all(chunks):
    """Over documents that begin within, beyond the rows of training, in one piece or many."""
    model, _ = talkative(short_window=9, long_window=20)
    tokens = torch.randint(0, 300, (2, 80), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = tokens[0, 30] = tokens[1, 47] = 300
    past = train_gpt.Past(4)
    made = torch.cat([model.logits(part, past) for part in tokens.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(made, model.logits(tokens), rtol=1e-4, atol=1e-4)
    assert past.tokens.equal(tokens)


@torch.no_grad()
def test_nothing_is_seen_further_back_than_in_training():
    model, cfg = talkative(num_layers=1)
    tokens = torch.randint(0, 300, (1, 80), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, :80 - cfg.seq_len - 2] = 7   # the oldest key in sight carries a token that carries another
    assert model.logits(tokens)[0, -1].equal(model.logits(changed)[0, -1])


@torch.no_grad()
def test_generation_is_the_likeliest_token_of_the_plain_forward():
    model, cfg = talkative(sample_tokens=64)
    for prompt in ([300, 5, 6], [300, 7, 8, 9, 10], [300]):
        text = list(prompt)
        for token in generate(model, torch.tensor([prompt]), cfg)[0]:
            assert token == int(model.logits(torch.tensor([text]))[0, -1].argmax())
            text.append(token)
        assert len(text) == len(prompt) + 64


def test_a_text_ends_where_the_model_ends_it():
    model, cfg = talkative(sample_tokens=200, temperature=1.0, top_k=0)
    model.head.data[:] = 0      # then all tokens are equally likely
    made = generate(model, torch.tensor([[300, 5, 6]] * 6), cfg)
    assert len({len(text) for text in made}) > 1 and not any(300 in text for text in made)
    assert made == generate(model, torch.tensor([[300, 5, 6]] * 6), cfg)
    assert made != generate(model, torch.tensor([[300, 5, 6]] * 6), dataclasses.replace(cfg, seed=1))
    model.head.data[300] = 5 * model.hidden(torch.tensor([[300]]))[0, 0].detach()
    assert generate(model, torch.tensor([[300]]), dataclasses.replace(cfg, temperature=0)) == [[]]


def test_sampling_keeps_to_the_top_k():
    cfg = Config(**{**TINY, "vocab_size": 301, "top_k": 3, "temperature": 2.0})
    logits = torch.randn(1, 301).expand(200, 301)
    drawn = set(train_gpt.sample(logits, cfg, torch.Generator().manual_seed(0)))
    assert drawn == set(logits[0].topk(3).indices.tolist())


# ------------------------------------------------------------------------------------------------
# What a run refuses and survives
# ------------------------------------------------------------------------------------------------

def test_a_gradient_that_is_not_finite_ends_the_run_with_its_name(lab, here, monkeypatch):
    real = train_gpt.Optimizer.gradient_norms

    def poisoned(optimizer):
        if optimizer.steps_done == 2:
            optimizer.parameters["layers.1.up"].grad[0, 0] = math.nan
        return real(optimizer)
    monkeypatch.setattr(train_gpt.Optimizer, "gradient_norms", poisoned)
    with pytest.raises(UserError, match=r"layers\.1\.up .* step 3"):
        train_here(here)
    folder = next((here / "experiments").iterdir())
    assert summary_of(folder)["status"].startswith("failed: the gradient of layers.1.up")
    assert len(rows_of(folder)) == 2


def test_a_parameter_without_gradient_is_named(lab, here, monkeypatch):
    class Forgetful(GPT):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.forgotten = torch.nn.Parameter(torch.zeros(3))
    monkeypatch.setattr(train_gpt, "GPT", Forgetful)
    with pytest.raises(RuntimeError, match="forgotten has no gradient"):
        train_here(here)


def test_shards_of_another_tokenizer_are_refused(lab, here):
    other = json.loads((lab / "tokenizers" / "tiny_v300_n1073741824" / "meta.json").read_text())
    folder = here / "tokenizers" / "other"
    folder.mkdir(parents=True)
    ranks = train_tokenizer.ranks_file_of([bytes([byte]) for byte in range(256)])
    (folder / "ranks.tiktoken").write_bytes(ranks)
    other |= {"ranks_sha256": hashlib.sha256(ranks).hexdigest(), "vocab_size": 257, "eot_id": 256,
              "special_tokens": {"<|endoftext|>": 256}}
    (folder / "meta.json").write_text(json.dumps(other))
    train_tokenizer.TOKENIZERS = here / "tokenizers"
    with pytest.raises(UserError, match="use --tokenizer tiny_v300"):
        train_here(here, tokenizer="other", data="tiny")


def test_a_wrong_vocabulary_size_is_refused_with_the_right_one(lab, here):
    with pytest.raises(UserError, match=r"must be 301.*it is 302"):
        train_here(here, vocab_size=302)
    train_here(here, vocab_size=301)


def test_a_pickle_name_of_older_days_is_understood(lab, here, capsys):
    train_here(here, tokenizer="tiny_v300_n1073741824.pkl")
    assert "folders now" in capsys.readouterr().err


def test_shards_without_manifest_need_a_tokenizer(lab, here, monkeypatch):
    (here / "data" / "bare").mkdir(parents=True)
    for path in (lab / "data" / "tiny").glob("*.bin"):
        shutil.copy(path, here / "data" / "bare" / f"fineweb_{path.name}")
    monkeypatch.setattr(shards, "DATA", here / "data")
    with pytest.raises(UserError, match="name it with --tokenizer"):
        train_here(here, data="bare")
    folder = train_here(here, data="bare", tokenizer="tiny_v300_n1073741824")
    assert summary_of(folder)["status"] == "finished"


@pytest.mark.parametrize(("flags", "message"), [
    (["--num_layers", "0"], "--num_layers must be more than 0; it is 0"),
    (["--num_layers", "two"], "invalid int value: 'two'"),
    (["--model_dim", "30", "--num_heads", "4"], "--model_dim must be a multiple of 4 x --num_heads, 16"),
    (["--batch_tokens", "1000"], "--batch_tokens must be a multiple of --seq_len, 512"),
    (["--cooldown_frac", "1.5"], "--cooldown_frac must be between 0 and 1; it is 1.5"),
    (["--muon_lr", "nan"], "--muon_lr must be 0 or more, and less than 2**53; it is nan"),
    (["--dtype", "int8"], "--dtype must be one of auto, bfloat16, float16, float32; it is 'int8'"),
    (["--preset", "xxl"], "--preset must be one of demo, xs"),
    (["--model_name", "../../x"], "--model_name must be letters"),
    (["--num_layer", "3"], "there is no flag --num_layer; did you mean --num_layers?"),
    (["--micro_batch_tokens", "8"], "--micro_batch_tokens must be at least --seq_len, 512"),
    (["--data", "../secrets"], "--data must be the name of a folder"),
    (["--tokenizer", "nobody"], "no data of tokenizer nobody"),
    (["--data", "nobody"], "there is no nobody in"),
])
def test_each_mistake_is_one_line_that_says_what_to_do(lab, here, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--compile", "off", *flags])
    with pytest.raises(SystemExit) as stop:
        train_gpt.main()
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
    assert not (here / "experiments").exists()


# ------------------------------------------------------------------------------------------------
# The command line, the file and the machine
# ------------------------------------------------------------------------------------------------

def test_every_knob_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    helps = {knob: help for knobs in train_gpt.knob_helps().values() for knob, help in knobs.items()}
    assert set(helps) == {field.name for field in dataclasses.fields(Config)}
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in text and " ".join(helps[field.name].split()) in text
    assert set(PRESETS) == set(re.findall(r"[\w-]+", helps["preset"].split(":")[0])) - {"or"}


def test_flags_win_over_a_preset_and_a_preset_over_defaults():
    cfg = parse_config(["--num_layers", "9", "--preset", "xs", "--save_model"])
    assert (cfg.num_layers, cfg.seq_len, cfg.save_model) == (9, 1024, True)


def test_the_presets_have_the_sizes_that_are_published():
    """gpt-lab's baselines with its 50,257 tokens: 57,766,692, 117,745,206 and 342,507,334 parameters."""
    for preset, published in (("xs", 57_766_692), ("s", 117_745_206), ("m", 342_507_334)):
        cfg = parse_config(["--preset", preset, "--vocab_size", "50257"])
        with torch.device("meta"):
            assert GPT(cfg, 50256).num_parameters() == pytest.approx(published, rel=0.01)


def test_check_tells_by_its_exit_code(lab):
    done = run(lab, "train_gpt.py", "--check", "--compile", "off", "--num_layers", "2",
               "--value_embeddings", "1")
    assert done.stdout.endswith("ready to train\n")
    assert "parameters" in done.stdout and "memory" in done.stdout
    done = run(lab, "train_gpt.py", "--check", "--compile", "off", "--tokenizer", "nobody", expect=1)
    assert "python download_fineweb.py" in done.stdout and done.stdout.endswith("cannot train\n")
    assert not list(lab.glob("experiments/*_gpt"))


def test_a_copy_beside_the_original_works_at_once(lab):
    shutil.copy(lab / "train_gpt.py", lab / "my_experiment.py")
    knobs = {**TINY, "model_name": "copy"}
    run(lab, "my_experiment.py", *(f"--{knob}={value}" for knob, value in knobs.items()))
    folder = next(lab.glob("experiments/*_copy"))
    assert (folder / "my_experiment.txt").exists()


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
    announced = re.search(r'search for "EDIT": ([\w |]+)\.', source)[1].split(" | ")
    assert re.findall(r"# EDIT: (\w+)$", source, re.MULTILINE) == announced


def test_only_world_names_torch_distributed():
    source = Path(train_gpt.__file__).read_text(encoding="utf-8")
    before, rest = source.split("\nclass World", 1)
    inside, after = rest.split("\ndef cpu_facts", 1)
    assert "dist." in inside
    assert not re.search(r"\bdist\.", before + after)


def test_the_dtype_is_what_the_hardware_multiplies(monkeypatch):
    for words, wanted in (("fma amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16),
                          ("avx2", torch.float32)):
        monkeypatch.setattr(train_gpt, "cpu_facts", lambda words=words: {"flags": words})
        assert train_gpt.choose_dtype(Config(), torch.device("cpu"))[0] == wanted
    for capability, wanted in (((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability",
                            lambda device, capability=capability: capability)
        assert train_gpt.choose_dtype(Config(), torch.device("cuda"))[0] == wanted


def test_a_machine_without_a_compiler_trains_without_one(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no g++\nand a long story")
    monkeypatch.setattr(torch, "compile", broken)
    works, reason = train_gpt.choose_compile(Config(), torch.device("cpu"))
    assert not works and "no g++" in reason and "story" not in reason
    with pytest.raises(UserError, match="no g"):
        train_gpt.choose_compile(Config(compile="on"), torch.device("cpu"))


def test_float16_with_scaled_losses_is_near_float32(lab, here):
    def losses(dtype: str) -> list[float]:
        folder = train_here(here, dtype=dtype, num_steps=8, muon_lr=0.25, embed_lr=0.15, head_lr=0.003)
        return [float(row["train_loss"]) for row in rows_of(folder)]
    assert losses("float16") == pytest.approx(losses("float32"), rel=5e-3)


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_run(lab, here):
    def losses(compile: str) -> list[float]:
        return [float(row["train_loss"]) for row in rows_of(train_here(here, compile=compile, num_steps=5))]
    assert losses("on") == pytest.approx(losses("off"), rel=1e-3)


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------

def out_of_memory_above(tokens: int, monkeypatch) -> list[int]:
    """The model's forward pass runs out of memory with more tokens at a time; returns what was tried."""
    real, tried = GPT.forward, []

    def forward(model, inputs, *arguments):
        tried.append(inputs.numel())
        if inputs.numel() > tokens:
            raise torch.OutOfMemoryError("as a GPU says it")
        return real(model, inputs, *arguments)
    monkeypatch.setattr(GPT, "forward", forward)
    return tried


def test_micro_batches_halve_until_they_fit_and_change_no_result(lab, here, monkeypatch, capsys):
    wanted = train_here(here, batch_tokens=320)
    tried = out_of_memory_above(100, monkeypatch)
    folder = train_here(here, batch_tokens=320)
    said = capsys.readouterr().out
    assert tried[:3] == [320, 160, 96]      # 10 rows, 5, 3
    assert "micro-batches of 320 tokens do not fit into memory; trying 160" in said
    for row, other in zip(rows_of(folder), rows_of(wanted), strict=True):
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
    train_here(here, micro_batch_tokens=64)
    assert set(tried) == {64}


@pytest.mark.slow
def test_a_cpu_without_memory_takes_smaller_micro_batches(lab):
    limited = """
import resource, re, pathlib
real = train_gpt.fit_micro_batch
def fit_micro_batch(*arguments):
    used = int(re.search(r"VmData:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 600 * 2**20, resource.RLIM_INFINITY))
    fitting = real(*arguments)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return fitting
train_gpt.fit_micro_batch = fit_micro_batch
"""
    knobs = dict(num_steps=2, batch_tokens=32768, seq_len=512, model_dim=256, num_layers=2)
    done = drive(lab, limited, *flags(**knobs, model_name="limited"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "do not fit into memory; trying" in done.stdout
    assert rows_of(newest(lab, "limited"))[-1]["tokens"] == "65536"


def test_an_error_that_is_not_of_memory_is_not_taken_for_one(lab, here, monkeypatch):
    monkeypatch.setattr(GPT, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
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
    plain = summary_of(train_here(here, val_every=0))
    monkeypatch.setattr(HeldOut, "evaluate", wasting(HeldOut.evaluate))
    summary = summary_of(train_here(here, val_every=0))
    phases = {phase: summary[f"peak_memory_mib_{phase}"] - plain[f"peak_memory_mib_{phase}"]
              for phase in ("training", "validation", "evaluation")}
    assert phases["validation"] > 250 and phases["training"] < 100 and phases["evaluation"] < 100


def test_the_estimate_is_near_what_is_used(lab):
    done = drive(lab, "", *flags(num_steps=2, batch_tokens=8192, seq_len=512, model_dim=256, num_layers=4,
                                 model_name="estimate", dtype="auto"))
    estimate = float(re.search(r"about ([\d,]+) MiB", done.stdout)[1].replace(",", ""))
    used = summary_of(newest(lab, "estimate"))["peak_memory_mib"]
    assert 0.7 < estimate / used < 1.5, (estimate, used)


# ------------------------------------------------------------------------------------------------
# Determinism and secrets
# ------------------------------------------------------------------------------------------------

def test_the_seed_decides_weights_order_and_samples(lab, here):
    one, same, other = (train_here(here, seed=seed, save_model=True) for seed in (1, 1, 2))
    for name in ("model.safetensors", "samples.jsonl"):
        assert (one / name).read_bytes() == (same / name).read_bytes() != (other / name).read_bytes()


def test_deterministic_is_asked_of_torch(lab):
    check = "import atexit, torch, os\natexit.register(lambda: print(" \
            "torch.are_deterministic_algorithms_enabled(), os.environ['CUBLAS_WORKSPACE_CONFIG']))"
    done = drive(lab, check, *flags(num_steps=1), "--deterministic")
    assert done.returncode == 0 and done.stdout.endswith("True :4096:8\n"), done.stderr


def test_random_numbers_of_a_changed_model_survive_warm_up_and_resume(lab):
    """With dropout added, as an experiment might: a killed run draws what an undisturbed one draws."""
    dropout = """
real = train_gpt.GPT.hidden
def hidden(model, *arguments, **more):
    return torch.nn.functional.dropout(real(model, *arguments, **more), 0.3, training=model.training)
import torch
train_gpt.GPT.hidden = hidden
"""
    stop = """
import os
real_look = train_gpt.look
def look(run):
    real_look(run)
    if run.step == 5:
        os.kill(os.getpid(), 9)
train_gpt.look = look
"""
    whole = drive(lab, dropout, *flags(num_steps=8, save_every_steps=1, model_name="dropout"))
    assert whole.returncode == 0, whole.stderr
    drive(lab, dropout + stop, *flags(num_steps=8, save_every_steps=1, model_name="dropped"))
    done = drive(lab, dropout, "--resume", str(newest(lab, "dropped")))
    assert done.returncode == 0, done.stderr
    twice = """
real_warm_up = train_gpt.warm_up
def warm_up(*arguments):
    real_warm_up(*arguments)
    real_warm_up(*arguments)
train_gpt.warm_up = warm_up
"""
    done = drive(lab, dropout + twice, *flags(num_steps=8, save_every_steps=1, model_name="warmer"))
    assert done.returncode == 0, done.stderr
    losses = [[[row[column] for column in ("train_loss", "val_loss", "grad_norm")]
               for row in rows_of(newest(lab, name))] for name in ("dropout", "dropped", "warmer")]
    assert losses[0] == losses[1] == losses[2]


def test_knobs_that_a_job_script_exports_are_no_secrets(monkeypatch):
    monkeypatch.setenv("TOKENIZER", "tiny_v300_n1073741824")
    monkeypatch.setenv("BATCH_TOKENS", "bigbatches")
    monkeypatch.setenv("MY_KEY", "10485760")
    monkeypatch.setenv("HUB_TOKEN", "very-secret")
    line = "tiny_v300_n1073741824 bigbatches 10485760"
    assert run_folder.without_secrets(f"{line} very-secret") == f"{line} [HUB_TOKEN]"


def test_no_secret_reaches_the_run_folder(lab):
    secrets = {"HF_TOKEN": "hf_" + "abcDEF123" * 4, "WANDB_API_KEY": "0123456789abcdef",
               "MY_PASSWORD": "swordfish1"}
    assert run(lab, "train_gpt.py", *flags(model_name="secret", num_steps=2), env=os.environ | secrets)
    leak = "import train_gpt\nreal = train_gpt.RunLog.say\n" \
           "train_gpt.RunLog.say = lambda log, line: real(log, line + ' '.join(os.environ.values()))\n" \
           "import os, run_folder\nrun_folder.git = lambda *words: ' '.join(os.environ.values())"
    done = drive(lab, leak, *flags(model_name="leaky", num_steps=2), env=os.environ | secrets)
    assert done.returncode == 0, done.stderr
    for folder in (newest(lab, "secret"), newest(lab, "leaky")):
        for path in folder.iterdir():
            assert not [name for name, value in secrets.items() if value.encode() in path.read_bytes()], path
    assert "[MY_PASSWORD]" in (newest(lab, "leaky") / "training_log.txt").read_text()


# ------------------------------------------------------------------------------------------------
# Using a model
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def saved_run(lab) -> Path:
    """A run in the lab that left its weights."""
    run(lab, "train_gpt.py", *flags(model_name="saved", num_samples=0, data="tiny"), "--save_model")
    return newest(lab, "saved")


def test_sample_goes_on_with_a_prompt(lab, saved_run):
    words = ["train_gpt.py", "--sample", str(saved_run), "--prompt", "the cat", "--sample_tokens", "8"]
    first = run(lab, *words, "--num_samples", "3").stdout
    assert len(first.strip().split("\n\nthe cat")) == 3 and first.startswith("the cat")
    assert run(lab, *words, "--num_samples", "3").stdout == first
    assert run(lab, *words, "--num_samples", "3", "--seed", "7").stdout != first
    assert run(lab, *words, "--temperature", "0").stdout == run(lab, *words, "--top_k", "1").stdout


def test_sample_answers_what_is_typed(lab, saved_run):
    import pty
    ours, theirs = pty.openpty()
    words = ["train_gpt.py", "--sample", str(saved_run), "--sample_tokens", "3"]
    process = subprocess.Popen([sys.executable, *words], cwd=lab, stdin=theirs, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    os.write(ours, b"the cat\nthe dog\n\x04")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out.index("the cat") < out.index("the dog") and out.count("> ") == 3


def test_sample_says_in_a_line_what_is_missing(lab, saved_run):
    def complaint(*words: str) -> str:
        done = run(lab, "train_gpt.py", "--sample", *words, expect=1, stdin=subprocess.DEVNULL)
        assert len(done.stderr.splitlines()) == 1
        return done.stderr
    assert "--sample needs a --prompt" in complaint(str(saved_run))
    assert "has no summary.json" in complaint("experiments/nothing", "--prompt", "a")
    other = lab / "experiments/of_another_script"
    shutil.copytree(saved_run, other)
    summary = summary_of(other)
    (other / "summary.json").write_text(json.dumps(summary | {"script": "gelu.py"}))
    assert "was trained by gelu.py; use that script" in complaint(str(other), "--prompt", "a")
    (other / "summary.json").write_text(json.dumps(summary))
    (other / "model.safetensors").unlink()
    assert "train it with --save_model" in complaint(str(other), "--prompt", "a")


def test_the_readmes_snippet_loads_a_model(lab, saved_run):
    readme = (Path(train_gpt.__file__).parent / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert len(snippet.splitlines()) == 10
    code = snippet.replace("experiments/DATE_TIME_NAME", str(saved_run))
    done = subprocess.run([sys.executable, "-c", code], cwd=lab, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
