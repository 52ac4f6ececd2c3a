"""Prepares a model for training: compiles it, finds micro-batches that fit in memory, and records one as a
CUDA graph if that is faster.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchtop import memory
from benchtop.batches import micro_batch_shape
from benchtop.evaluation import TokenLosses
from benchtop.initial import draw_weights
from benchtop.knobs import RunConfig
from benchtop.machine import Kernels, World
from benchtop.measure import seconds_of
from benchtop.recorded import record


def make_model(experiment, cfg: RunConfig, eot_id: int, world: World, kernels: Kernels,
               ) -> tuple[nn.Module, object]:
    torch.manual_seed(cfg.seed)
    model = experiment.Model(cfg, eot_id, world.dtype, kernels.flex)
    draw_weights(model, cfg.seed)
    model.to(world.device)
    world.share_weights(model)
    products = torch.bfloat16 if world.dtype == torch.bfloat16 else torch.float32
    optimizer = experiment.Optimizer(model, cfg, world, products)
    if kernels.compiled:
        model.compile_parts()
    return model, optimizer


def eot_rows(model: nn.Module, cfg: RunConfig, world: World) -> tuple[Tensor, Tensor]:
    """(B, T) inputs and targets of a micro-batch in which every target is masked (-1), on the device."""
    _, rows = micro_batch_shape(cfg, world.size)
    inputs = torch.full((rows, cfg.seq_len), model.eot_id, device=world.device)
    return inputs, torch.full_like(inputs, -1)


def warm_up(losses_of: TokenLosses, cfg: RunConfig, world: World) -> None:
    """Compile every kernel before the clock starts, on rows without targets, which leaves gradients of 0."""
    model = losses_of.model
    inputs, targets = eot_rows(model, cfg, world)
    # the end may take other kernels; the last pass adds to existing gradients, as later micro-batches do
    for model.progress in (1.0, 0.0, 0.0):
        model(inputs, targets).backward()
    losses_of(inputs, torch.full(inputs.shape, -1))
    world.synchronize()


def step_seconds(losses_of: TokenLosses, optimizer, cfg: RunConfig, world: World) -> float:
    """Estimated seconds per step, from one timed micro-batch; weights do not change."""
    model, count = losses_of.model, micro_batch_shape(cfg, world.size)[0]
    inputs, targets = eot_rows(model, cfg, world)
    inputs[:, 1:] = (model.eot_id + 1) % cfg.vocab_size     # each row is one document, which takes longest

    def work() -> None:
        model(inputs, targets).backward()
    seconds = count * seconds_of(work, world, times=1, warm_ups=0)
    optimizer.clear_gradients()
    return seconds


def ready(experiment, cfg: RunConfig, world: World, kernels: Kernels, losses_of: TokenLosses,
          optimizer, say: Callable[[str], None]) -> RunConfig:
    """Compile, find micro-batches that fit, record one if faster; returns the Config with their size."""
    cfg = memory.fit_micro_batch(
        cfg, world, lambda sized: warm_up(losses_of, sized, world), optimizer.clear_gradients, say,
        lambda: memory.memory_advice(experiment, cfg, world, kernels))
    # once all processes are through, since they wait for each other here; raises now, not in step 1, if a
    # parameter has no gradient
    optimizer.sum_gradients()
    optimizer.clear_gradients()
    if kernels.compiled:
        model = losses_of.model
        for line in record(model, *eot_rows(model, cfg, world), cfg, world):
            say(line)
    return cfg
