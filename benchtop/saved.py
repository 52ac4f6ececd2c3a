"""Models saved by finished runs (--save_model): loading, sampling, scoring.

`experiment` is the benchtop.run.Experiment of the run's script: Config, Model, Optimizer, train.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tiktoken import Encoding
from torch import Tensor, nn

from benchtop.errors import UserError
from benchtop.evaluation import TokenLosses
from benchtop.files import sha256_of
from benchtop.folder import read_weights, saved_tokenizer, summary_of
from benchtop.knobs import known_knobs, parse_config
from benchtop.machine import World, choose_compile
from benchtop.sampling import generate
from benchtop.scoring import Scores, hellaswag_accuracy
from benchtop.tasks import Question, Task
from benchtop.tokenizer import CannotEncode, encode

WORTH_COMPILING = 1000              # from this many questions on, compiling a loaded model pays


def saved_config(experiment, folder: Path, **changes):
    """The Config of a saved run on this machine; knobs that the script no longer has are dropped."""
    here = {"device": "auto", "compile": "auto", "deterministic": False}
    return experiment.Config(**known_knobs(folder, experiment.Config) | here | changes)


def load_trained(experiment, folder: Path, cfg, world: World) -> tuple[nn.Module, Encoding]:
    """The model that a run left with --save_model, and its tokenizer.

    raises  UserError if the weights are missing or damaged, or do not fit this script's model
    """
    tokenizer, weights = saved_tokenizer(folder), read_weights(folder)
    if cfg.vocab_size != tokenizer.n_vocab:
        raise UserError(f"{folder / 'config.json'} is missing or not what the run wrote: its vocabulary of "
                        f"{cfg.vocab_size} is not that of the run's tokenizer, {tokenizer.n_vocab}")
    model = experiment.Model(cfg, tokenizer.eot_token, world.dtype)
    check_shapes(weights, model)
    model.load_state_dict(weights)
    return model.to(world.device).eval(), tokenizer


def check_shapes(weights: dict[str, Tensor], model: nn.Module) -> None:
    """raises  UserError if the names or shapes of saved weights are not those of the model"""
    then = {name: list(weight.shape) for name, weight in weights.items()}
    now = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differing:
        name = differing[0]
        raise UserError(f"the saved weights are of another model: {name} has shape {now.get(name)}, was "
                        f"{then.get(name)}; change only knobs and code that leave all shapes as they are")


def sample_run(experiment, cfg, world: World) -> None:
    """Print text sampled from a run's weights: after --prompt, or after each line typed at the terminal."""
    folder = Path(cfg.sample)
    if summary_of(folder).get("code_sha256") != sha256_of(experiment.script):
        print(f"warning: {experiment.script.name} has changed since it trained {folder}", file=sys.stderr)
    if not world.is_main:
        return
    if not cfg.prompt and not sys.stdin.isatty():
        raise UserError("--sample needs a --prompt unless it can read prompts from a terminal")
    model, tokenizer = load_trained(experiment, folder, cfg, world)
    seeds = itertools.count(cfg.seed)
    for prompt in [cfg.prompt] if cfg.prompt else typed_lines():
        prompts = [tokens_of(tokenizer, prompt)] * max(1, cfg.num_samples)
        for text in generate(model, prompts, cfg, list(itertools.islice(seeds, len(prompts)))):
            print(prompt + tokenizer.decode(text), end="\n\n", flush=True)


def tokens_of(tokenizer: Encoding, prompt: str) -> list[int]:
    """The tokens of a prompt at the beginning of a document."""
    try:
        return [tokenizer.eot_token, *encode(tokenizer, prompt)[0]]
    except CannotEncode as error:
        raise UserError("tiktoken cannot encode the prompt") from error


def typed_lines() -> Iterator[str]:
    """The lines that a person types, until Ctrl-D."""
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def continue_prompts(experiment, folder: Path, prompts: list[str], **sampling) -> Iterator[str]:
    """Continue each prompt with a run's weights, prompt number n (from 0) with seed n; for judge.py."""
    cfg = parse_config([f"--sample={folder}"], experiment.Config, experiment.script)
    cfg = dataclasses.replace(cfg, **sampling)
    world = World(cfg)
    try:
        model, tokenizer = load_trained(experiment, folder, cfg, world)
        tokens = [tokens_of(tokenizer, prompt) for prompt in prompts]
        yield from map(tokenizer.decode, generate(model, tokens, cfg, list(range(len(prompts)))))
    finally:
        world.close()


# ------------------------------------------------------------------------------------------------
# Benchmarks
# ------------------------------------------------------------------------------------------------

def score(losses_of: TokenLosses, tokenizer: Encoding, questions: list[Question], rows: int, world: World,
          ) -> Scores:
    """Score a model on a benchmark, `rows` rows at a time; all processes call it and share the work.

    With as many rows as in training, only the kernel for likeliest tokens must be compiled anew.
    """
    def log_probabilities(inputs: np.ndarray, targets: np.ndarray, likeliest: bool = False) -> np.ndarray:
        inputs = torch.from_numpy(inputs).to(world.device)
        found = losses_of(inputs, torch.from_numpy(targets), likeliest).cpu().numpy()
        return np.stack([-found[0], found[1]]) if likeliest else -found

    def add_up(sums: np.ndarray) -> np.ndarray:
        return world.sum(torch.from_numpy(sums).to(world.float64_device)).cpu().numpy()
    losses_of.model.eval()
    return hellaswag_accuracy(log_probabilities, tokenizer, questions, (rows, losses_of.model.cfg.seq_len),
                              world.rank, world.size, add_up)


def scored_on(experiment, world: World) -> dict:
    """The machine facts that a score's last digits may depend on, and the script's hash."""
    return world.facts() | {"code_sha256": sha256_of(experiment.script)}


def score_saved(experiment, folder: Path, task: Task) -> tuple[Scores, dict, bool]:
    """Score a run's saved weights, on all processes that torchrun started.

    returns  the scores, the facts of scored_on, and whether this is the first process
    """
    cfg = saved_config(experiment, folder)
    world = World(cfg)
    try:
        model, tokenizer = world.raise_on_all_ranks(lambda: load_trained(experiment, folder, cfg, world))
        compiled = len(task.questions) >= WORTH_COMPILING and choose_compile(cfg, world.device)[0]
        if compiled:
            model.compile_parts()
        with torch.no_grad():
            rows = max(1, 2**14 // cfg.seq_len)
            scores = score(TokenLosses(model, world, compiled), tokenizer, task.questions, rows, world)
        return scores, scored_on(experiment, world), world.is_main
    finally:
        world.close()
