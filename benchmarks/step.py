"""Time a training step, compare it with its matrix products alone, and measure Muon's share.

    python benchmarks/step.py demo xs                                  presets
    python benchmarks/step.py gpt2-small --fp8                         other flags are train_gpt.py's

It uses one process and random tokens. One micro-batch is timed and multiplied by the number of micro-batches
in a step; Muon and Adam are timed separately. The floor is the time of the step's matrix products alone:
three per weight, and six per layer for attention without FlexAttention.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop.batches import micro_batch_shape
from benchtop.briefing import num_parameters
from benchtop.command_line import Parser, command
from benchtop.knobs import parse_config
from benchtop.machine import World, choose_kernels
from benchtop.memory import choose_micro_batch, chunk_rows
from benchtop.speed import with_speed
from benchtop.warm_up import make_model
from train_gpt import EXPERIMENT, GPT, PRESETS, Config, group_of


def seconds_of(work: Callable[[], object], world: World, times: int) -> float:
    """Median of several calls, after one warm-up call."""
    taken = []
    for _ in range(times + 1):
        world.synchronize()
        begun = time.perf_counter()
        work()
        world.synchronize()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


def products(model: GPT, tokens: int, world: World) -> Callable[[], None]:
    """A function that does a micro-batch's matrix products: outputs, input and weight gradients."""
    cfg, pairs = model.cfg, []

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=world.device).to(model.dtype)
    weights = [weight.flatten(0, -2) for layer in model.layers for weight in layer.parameters()
               if weight.ndim > 1]
    rows = chunk_rows(some(tokens, 1), model.head.size(0))
    chunked = [(model.head, min(rows, tokens - start)) for start in range(0, tokens, rows)]
    for weight, count in [*((weight, tokens) for weight in weights), *chunked]:
        x, w, grad = some(count, weight.size(1)), weight.detach().to(model.dtype), some(count, len(weight))
        pairs += [(x, w.T), (grad, w), (grad.T, x)]
    heads, length = tokens // cfg.seq_len * cfg.num_heads, cfg.seq_len
    if model.flex is None:
        head, scores = some(heads, length, cfg.head_dim), some(heads, length, length)
        pairs += [(head, head.mT), (scores, head), (head, head.mT), (scores, head), (scores.mT, head),
                  (scores.mT, head)] * cfg.num_layers

    def multiply() -> None:
        for a, b in pairs:
            a @ b
    return multiply


def measure(cfg: Config, times: int) -> str:
    """One preset's row of the table."""
    torch.compiler.reset()      # several presets would exceed the limit of recompilations per function
    world = World(cfg)
    kernels = choose_kernels(cfg, world)
    model, optimizer = make_model(EXPERIMENT, cfg, cfg.vocab_size - 1, world, kernels)
    cfg = choose_micro_batch(EXPERIMENT, cfg, world, kernels)
    count, rows = micro_batch_shape(cfg, world.size)
    targets = torch.randint(0, cfg.vocab_size - 1, (rows, cfg.seq_len), device=world.device)
    tokens = targets.roll(1, 1)
    tokens[:, 0] = model.eot_id

    def micro_batch() -> None:
        (model(tokens, targets) / tokens.numel()).backward()
    with world.memory_of("micro-batch"):
        learning = count * seconds_of(micro_batch, world, times)
    peak = world.peak_memory_mib("micro-batch")

    def by_muon() -> None:
        with torch.no_grad():
            optimizer.muon_step(optimizer.groups["matrices"], 0.0)

    def by_adam() -> None:
        optimizer.steps_done = 1
        with torch.no_grad():
            for group in ("embeddings", "head", "scalars"):
                optimizer.adam_step(optimizer.groups[group], 0.0)
    muon, adam = seconds_of(by_muon, world, times), seconds_of(by_adam, world, times)
    step = learning + muon + adam
    floor = count * seconds_of(products(model, rows * cfg.seq_len, world), world, times)
    matrices = sum(parameter.numel() for name, parameter in model.named_parameters()
                   if group_of(name, parameter) == "matrices")
    others = num_parameters(model) - matrices
    speed = cfg.batch_tokens / step
    flops = world.peak_flops(cfg)
    mfu = f"{speed * model.flops_per_token() / flops:.0%}" if flops else "-"
    return (f"| {cfg.preset} | {cfg.batch_tokens:,} | {speed:,.0f} | {floor / step:.2f} | {mfu} | "
            f"{peak:,.0f} | {1000 * muon:,.0f} of {1000 * step:,.0f} ms, {muon / step:.1%} | "
            f"{4 * matrices / 2**20:,.0f} (with Adam: {8 * matrices / 2**20:,.0f}); all else, with Adam: "
            f"{8 * others / 2**20:,.0f} |")


@command
def main() -> None:
    parser = Parser("Time a training step of presets, its floor, and Muon's share.",
                    epilog="Further flags go to train_gpt.py.")
    parser.add_argument("presets", nargs="+", choices=PRESETS, help="presets to time, one table row each")
    parser.add_argument("--times", type=int, default=3, help="repetitions; the median is reported")
    args, flags = parser.parse_known_args()
    print("| preset | tokens per step | tokens/s | floor / step | MFU | peak MiB | Muon's time | "
          "Muon's memory, MiB |\n|---|---|---|---|---|---|---|---|")
    for preset in args.presets:
        cfg = parse_config(["--preset", preset, *flags], Config)
        cfg = with_speed(cfg, World(cfg))
        vocabulary = cfg.vocab_size or (4097 if preset == "demo" else 50257)
        print(measure(replace(cfg, vocab_size=vocabulary).with_budget(2**53), args.times), flush=True)


if __name__ == "__main__":
    main()
