"""--smoke: is a changed script sound? Some 20 seconds on the CPU, with random text, in a temporary folder.

Each check prints a line. Passing does not show that a model is good, but that its results mean something.
"""

import contextlib
import copy
import dataclasses
import io
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchtop import places
from benchtop.errors import UserError, first_line
from benchtop.files import write_json
from benchtop.initial import draw_weights
from benchtop.machine import World
from benchtop.sampling import generate
from benchtop.saved import load_trained
from benchtop.shards import FORMAT_VERSION, ShardWriter
from benchtop.tokenizer import PATTERNS, load_tokenizer, save_tokenizer, tokenizer_sha256

SMALL = dict(num_layers=4, num_heads=2, model_dim=64, seq_len=64, batch_tokens=256, micro_batch_tokens=128,
             num_steps=3, train_tokens=0, train_minutes=0.0, target_loss=0.0, max_doc_len=0, vocab_size=0,
             data="smoke", tokenizer="smoke", preset="", model_name="smoke", smoke=False, resume="",
             device="cpu", dtype="float32", compile="off", fp8=False, save_model=True, save_every_steps=0,
             val_every=0, log_every=1, val_tokens=0, num_samples=1, sample_tokens=4, benchmarks="",
             wandb="", trackio="", tensorboard=False, compare_to="", by_speed=False, num_kv_heads=1)
STEP_TO_STOP = 2        # step after which SIGTERM stops the second run, to be resumed


class Unsound(UserError):
    """A check found something wrong with a script."""


def smoke(experiment, cfg, start: Callable) -> None:
    """Run all checks on a script; `start` is benchtop.run.start.

    raises  Unsound, after printing the line of the check that failed
    """
    begun = time.perf_counter()
    torch.set_num_threads(1)        # more threads are slower on tensors this small
    cfg = dataclasses.replace(cfg, **{knob: value for knob, value in SMALL.items() if knob in cfg.names()})
    with empty_bench():
        make_data()
        tokenizer = load_tokenizer("smoke")
        cfg = dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab).with_budget(10**6)
        checks = Checks(experiment.script)
        model = checks.passes("the model is made and gives a loss", lambda: fresh_model(experiment, cfg))
        checks.passes("every parameter is in one group of the optimizer",
                      lambda: experiment.Optimizer(model, cfg, World(cfg)))
        whole = checks.passes("three steps are trained", lambda: trained(experiment, cfg, start, "whole"))
        checks.passes("stopped by SIGTERM and resumed, it ends with the same weights, bit for bit",
                      lambda: require_equal(whole, stopped_and_resumed(experiment, cfg, start)))
        model.load_state_dict(whole)
        model.eval()
        stir(model)
        checks.passes("every parameter has a gradient that is not zero",
                      lambda: require_gradients(model, cfg))
        checks.passes("gradients match finite differences of the loss",
                      lambda: require_slope(model, cfg))
        checks.passes("no token sees the future", lambda: require_causal(model, cfg))
        checks.passes("no document sees another one", lambda: require_apart(model, cfg))
        checks.passes("text is sampled from the saved model", lambda: sample(experiment, cfg))
    print(f"{experiment.script.name} is sound: {checks.count} checks passed in "
          f"{time.perf_counter() - begun:.0f} s")


class Checks:
    """Runs checks and prints a line for each; a check's own output is shown only if the check crashes."""

    def __init__(self, script: Path):
        self.script, self.count = script, 0

    def passes(self, claim: str, check: Callable):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                result = check()
        except UserError as error:
            print(f"FAILED  {claim}")
            raise Unsound(f"a check failed ({claim}): {error}") from error
        except Exception as error:
            print(f"FAILED  {claim}\n{said.getvalue()}")
            raise Unsound(f"a check failed ({claim}): {type(error).__name__}: {first_line(error)} "
                          f"({place_of(error, self.script)})") from error
        self.count += 1
        print(f"ok      {claim}", flush=True)
        return result


def place_of(error: Exception, script: Path) -> str:
    """FILE:LINE of an error: the innermost frame in the script if there is one, else the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == script]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


@contextlib.contextmanager
def empty_bench() -> Iterator[None]:
    """Keep data, tokenizers and runs in a temporary folder that is removed afterwards."""
    names = ("DATA", "TOKENIZERS", "EXPERIMENTS")
    before = {name: getattr(places, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:
                setattr(places, name, Path(folder) / name.lower())
                getattr(places, name).mkdir()
            yield
        finally:
            for name, place in before.items():
                setattr(places, name, place)


def make_data() -> None:
    """Write a tokenizer of single bytes, and shards with 200 documents of random words."""
    save_tokenizer("smoke", [], [bytes([byte]) for byte in range(256)], PATTERNS["gpt4"], {}, "")
    tokenizer, folder, entries = load_tokenizer("smoke"), places.DATA / "smoke", []
    folder.mkdir()
    draw = random.Random(0)
    words = ["bench", "model", "token", "loss", "seed", "step", "text", "run"]
    for name, split, count in (("train_000001.bin", "train", 180), ("val_000000.bin", "val", 20)):
        writer = ShardWriter(folder, tokenizer.n_vocab, 10**6)
        for _ in range(count):
            text = " ".join(draw.choices(words, k=draw.randint(3, 40)))
            writer.add(np.array([tokenizer.eot_token, *tokenizer.encode_ordinary(text)]), len(text))
        entries.append(writer.write(name, split))
    write_json(folder / "manifest.json", {
        "format_version": FORMAT_VERSION, "source": "smoke", "tokenizer": "smoke",
        "tokenizer_sha256": tokenizer_sha256(tokenizer), "vocab_size": tokenizer.n_vocab,
        "eot_id": tokenizer.eot_token, "shards": entries})


def fresh_model(experiment, cfg) -> nn.Module:
    torch.manual_seed(cfg.seed)
    model = experiment.Model(cfg, cfg.vocab_size - 1, torch.float32)
    draw_weights(model, cfg.seed)
    loss = model(*rows_of(cfg))
    if loss.shape or not loss.isfinite():
        raise Unsound(f"the model returned the loss {loss}; it must be one finite number")
    return model


def rows_of(cfg) -> tuple[Tensor, Tensor]:
    """(2, T) inputs, each row with two documents, and their targets."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, cfg.vocab_size - 1, (2, cfg.seq_len + 1), generator=generator)
    tokens[:, [0, cfg.seq_len // 2]] = cfg.vocab_size - 1
    return tokens[:, :-1], tokens[:, 1:]


def trained(experiment, cfg, start: Callable, name: str, **knobs) -> dict[str, Tensor]:
    """Train a run; returns its final weights."""
    cfg = dataclasses.replace(cfg, model_name=name, **knobs)
    start(experiment, cfg, World(cfg))
    return weights_of(folder_of(name))


def folder_of(name: str) -> Path:
    return next(places.EXPERIMENTS.glob(f"*_{name}"))


def weights_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


def stopped_and_resumed(experiment, cfg, start: Callable) -> dict[str, Tensor]:
    def train_and_stop(run) -> None:
        batches = run.batches

        def counted() -> Iterator:
            for batch in batches():
                if run.step == STEP_TO_STOP - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch
        run.batches = counted
        experiment.train(run)
    try:
        trained(dataclasses.replace(experiment, train=train_and_stop), cfg, start, "stopped")
        raise Unsound("SIGTERM did not stop the run")
    except SystemExit:
        return trained(experiment, cfg, start, "stopped", resume=str(folder_of("stopped")))


def require_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, weight in first.items():
        if not torch.equal(weight, second[name]):
            raise Unsound(f"{name} differs by up to {(weight - second[name]).abs().max():.2g}; is there "
                          "state that is neither a parameter nor in Optimizer.state()?")


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Fill parameters that are all zero, as in layers not trained yet, so that each has an effect."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(0, 0.02)


def require_gradients(model: nn.Module, cfg) -> None:
    model.zero_grad()
    model(*rows_of(cfg)).backward()
    missing = [name for name, parameter in model.named_parameters()
               if parameter.grad is None or not parameter.grad.any()]
    if missing:
        raise Unsound(f"{', '.join(missing)} has no gradient, or only zeros: the loss does not depend on it")


def require_slope(model: nn.Module, cfg) -> None:
    """Compare each parameter's gradient with a central finite difference of the loss along it.

    Runs in float64, except for what a model always computes in float32, such as the loss.
    """
    inputs, targets = rows_of(cfg)
    model = copy.deepcopy(model).double()
    model.dtype = torch.float64
    model.zero_grad()
    model(inputs, targets).backward()
    for name, parameter in model.named_parameters():
        size = float(parameter.grad.norm())
        step = parameter.grad * (1e-3 * max(1.0, float(parameter.detach().norm())) / size)
        with torch.no_grad():
            losses = []
            for sign in (1, -2):        # to the start + step, then to the start - step
                parameter.add_(step, alpha=sign)
                losses.append(float(model(inputs, targets)))
            parameter.add_(step)
        change, expected = (losses[0] - losses[1]) / 2, size * float(step.norm())
        if abs(change - expected) > 0.03 * expected + 1e-5 * abs(losses[0]):
            raise Unsound(f"along the gradient of {name} the loss changes by {change:.4g}; the gradient "
                          f"predicts {expected:.4g}; is its backward pass written by hand?")


@torch.no_grad()
def require_causal(model: nn.Module, cfg) -> None:
    inputs, _ = rows_of(cfg)
    for place in (cfg.seq_len // 4, 3 * cfg.seq_len // 4, cfg.seq_len - 1):
        changed = inputs.clone()
        changed[:, place] = (inputs[:, place] + 1) % (cfg.vocab_size - 1)
        difference = (model.hidden(inputs) - model.hidden(changed)).abs().amax((0, 2))      # (T)
        if difference[:place].max() > 0:
            raise Unsound("a token changes hidden states up to "
                          f"{place - int(difference.nonzero()[0])} positions before it")
        if not difference[place:].max() > 0:
            raise Unsound("changing a token changes no hidden state")


@torch.no_grad()
def require_apart(model: nn.Module, cfg) -> None:
    """Neither documents of one row nor rows of one batch may influence each other."""
    inputs, _ = rows_of(cfg)
    border, changed = cfg.seq_len // 2, inputs.clone()
    changed[0, 1:border] = (inputs[0, 1:border] + 1) % (cfg.vocab_size - 1)
    difference = (model.hidden(inputs) - model.hidden(changed)).abs().amax(2)               # (B, T)
    if difference[0, border:].max() > 0:
        raise Unsound("the first document of a row changes the second one, starting at its token "
                      f"{int(difference[0, border:].nonzero()[0])}")
    if difference[1:].max() > 0:
        raise Unsound("a row of the batch changes another row")


def sample(experiment, cfg) -> None:
    model, tokenizer = load_trained(experiment, folder_of("whole"), cfg, World(cfg))
    texts = generate(model, [[tokenizer.eot_token, 104, 105]], cfg)
    if any(not 0 <= token < cfg.vocab_size for text in texts for token in text):
        raise Unsound("a sampled token id is outside the vocabulary")
