"""What only a device shows. Run: ./run.sh test -m gpu"""

import contextlib
import dataclasses
import os
import signal
import time

import pytest
import torch
from launch import start
from tiny_runs import CALM, TINY, newest, rows_of, run, summary_of, train_here

import train_gpt
from benchtop import memory, places, recorded
from benchtop.evaluation import TokenLosses
from benchtop.machine import World, choose_kernels
from benchtop.sampling import generate
from benchtop.saved import score
from benchtop.tasks import Question
from benchtop.tokenizer import load_tokenizer
from benchtop.warm_up import eot_rows, make_model, warm_up

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ON_GPU = {**TINY, **CALM, "model_dim": 64, "num_heads": 2, "seq_len": 128, "batch_tokens": 512,
          "num_steps": 8, "val_every": 4, "device": "cuda", "dtype": "bfloat16", "compile": "auto"}


def flags(**knobs) -> list[str]:
    return [f"--{knob}={value}" for knob, value in {**ON_GPU, **knobs}.items()]


def made(**knobs) -> tuple:
    """Config, World, model and optimizer of ON_GPU and these knobs, with weights that are not zero."""
    cfg = train_gpt.Config(**{**ON_GPU, "vocab_size": 300, "micro_batch_tokens": 256, **knobs})
    world = World(cfg)
    kernels = choose_kernels(cfg, world)
    model, optimizer = make_model(train_gpt.EXPERIMENT, cfg, 299, world, kernels)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return cfg, world, model, optimizer


def some_rows(number: int, rows: int = 2, length: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    inputs = torch.randint(299, (rows, length), generator=draw)
    inputs[:, ::50] = 299
    return inputs.cuda(), inputs.roll(-1, 1).cuda()


def test_each_check_of_proof_passes(lab):
    done = run(lab, "proof.py", "--preset=xs", "--only=machine,product,kernels,compiled,losses", expect=None)
    assert done.returncode == 0, done.stdout + done.stderr


def weights_of(folder) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


def test_sigterm_saves_and_a_resumed_run_ends_to_the_bit(lab):
    long, bare = dict(num_steps=400, val_every=0, log_every=5), ("--save_model", "--deterministic")
    run(lab, "train_gpt.py", *flags(**long, model_name="unbroken"), *bare)
    out, err = lab / "out", lab / "err"
    process = start(lab, "train_gpt.py", *flags(**long, model_name="broken"), *bare, out=str(out),
                    err=str(err))
    while not any(map(len, map(steps_of, lab.glob("experiments/*_broken")))) and process.is_alive():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=120)
    assert process.exitcode == 128 + signal.SIGTERM, out.read_text() + err.read_text()
    run(lab, "train_gpt.py", "--resume", str(newest(lab, "broken")))
    ends = [rows_of(newest(lab, name))[-1] for name in ("unbroken", "broken")]
    assert ends[0]["val_loss"] == ends[1]["val_loss"] and ends[0]["step"] == ends[1]["step"] == "400"
    assert weights_of(newest(lab, "unbroken")) == weights_of(newest(lab, "broken")) != b""


def steps_of(folder) -> list[dict]:
    with contextlib.suppress(FileNotFoundError):
        return [row for row in rows_of(folder) if int(row["step"]) > 20]
    return []


def test_a_micro_batch_that_does_not_fit_is_halved_until_it_does():
    cfg, world, model, optimizer = made(batch_tokens=2**17, micro_batch_tokens=2**17)
    losses_of, said = TokenLosses(model, world, compiled=True), []
    # leave room for some rows only
    hog = torch.empty(int(torch.cuda.mem_get_info()[0] - 600 * 2**20), dtype=torch.uint8, device="cuda")
    try:
        fitted = memory.fit_micro_batch(cfg, world, lambda cfg: warm_up(losses_of, cfg, world),
                                        optimizer.clear_gradients, said.append, lambda: "")
    finally:
        del hog
        torch.cuda.empty_cache()
    assert fitted.micro_batch_tokens < cfg.micro_batch_tokens and said
    assert "do not fit into memory" in said[0]


def test_a_recorded_micro_batch_has_the_losses_and_gradients_of_one_that_is_not(monkeypatch):
    found = []
    for worth_it in (1e9, 0):       # never, always
        monkeypatch.setattr(recorded, "WORTH_IT", worth_it)
        cfg, world, model, optimizer = made()
        warm_up(TokenLosses(model, world, True), cfg, world)
        optimizer.clear_gradients()
        said = recorded.record(model, *eot_rows(model, cfg, world), cfg, world)
        assert bool(said) == (worth_it == 0) and all("is recorded as one" in line for line in said)
        found.append([])
        for step in range(3):
            losses = []
            for number in range(2):
                loss = model(*some_rows(10 * step + number))
                (loss / 7).backward()
                losses.append(loss.detach().clone())
            found[-1] += [*losses, optimizer.sum_gradients()]
            optimizer.step(0.1)
    torch.testing.assert_close(*found, rtol=2e-3, atol=1e-5)


def test_what_changes_with_progress_is_not_recorded(monkeypatch):
    monkeypatch.setattr(recorded, "WORTH_IT", 0)
    cfg, world, model, optimizer = made(window_warmup_frac=1)
    warm_up(TokenLosses(model, world, True), cfg, world)
    optimizer.clear_gradients()
    line, = recorded.record(model, *eot_rows(model, cfg, world), cfg, world)
    assert "changes with model.progress" in line
    model.progress = 0.5
    model(*some_rows(0)).backward()


def test_no_step_waits_for_the_device():
    cfg, world, model, optimizer = made()
    warm_up(TokenLosses(model, world, True), cfg, world)
    optimizer.clear_gradients()
    rows = some_rows(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (model(*rows) / 7).backward()
        optimizer.sum_gradients()
        optimizer.step(1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_choices_in_a_benchmark_are_those_of_the_cpu(lab, monkeypatch):
    monkeypatch.setattr(places, "TOKENIZERS", lab / "tokenizers")
    tokenizer = load_tokenizer("tiny")
    endings = (" sat on the mat", " ran", " saw a big tree", " dog and then the mat")
    questions = [Question(number, "the cat" + number * " and then", endings, 0) for number in range(40)]
    chosen = []
    for device, dtype, how in (("cpu", "float32", "off"), ("cuda", "float32", "auto"),
                               ("cuda", "bfloat16", "auto")):
        _, world, model, _ = made(device=device, dtype=dtype, compile=how, vocab_size=tokenizer.n_vocab)
        model.eot_id = tokenizer.eot_token
        items = score(TokenLosses(model, world, how == "auto"), tokenizer, questions, 2, world).items
        chosen.append([max(range(4), key=item["log_probabilities"].__getitem__) for item in items])
    assert chosen[0] == chosen[1]
    assert sum(a == b for a, b in zip(chosen[0], chosen[2], strict=True)) >= 36


def test_texts_are_those_of_the_cpu():
    texts = []
    for device in ("cpu", "cuda"):
        cfg, _, model, _ = made(device=device, dtype="float32", compile="off")
        cfg = dataclasses.replace(cfg, sample_tokens=20, temperature=0)
        texts.append(generate(model.eval(), [[299, 1, 2, 3], [299, 7]], cfg))
    assert texts[0] == texts[1]


def test_a_run_by_the_command_line_validates_samples_and_ends(here):
    folder = train_here(here, **{**ON_GPU, "data": "tiny", "save_model": True})
    summary = summary_of(folder)
    assert summary["status"] == "finished" and summary["val_bpb"] > 0
    assert summary["device"] == torch.cuda.get_device_name()
