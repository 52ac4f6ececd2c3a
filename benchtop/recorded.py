"""Record a micro-batch as one CUDA graph, for models so small that launching kernels one by one takes longer
than running them.

A graph replays the addresses and Python values of its recording: nothing that Python decides may change from
one micro-batch to the next.
"""

import time

import torch
from torch import Tensor, nn

from benchtop.errors import first_line
from benchtop.machine import World

WORTH_IT = 0.8      # record if launching the kernels takes at least this share of a micro-batch's time


def record(model: nn.Module, inputs: Tensor, targets: Tensor, cfg, world: World) -> list[str]:
    """Record forward and backward of the model where that is faster; returns lines for the log.

    Losses and gradients do not change. The model must be compiled and warmed up; inputs and targets are
    (B, T) as in every micro-batch.
    """
    if world.device.type != "cuda":
        return []
    started, done = launch_seconds(model, inputs, targets, world)
    pace = f"it takes {1000 * done:.1f} ms, {1000 * started:.1f} ms of them to launch its kernels"
    if started < WORTH_IT * done:
        return []
    if cfg.deterministic:       # cuBLAS may choose other kernels while they are recorded
        return [f"launches    a micro-batch is not recorded with --deterministic; {pace}"]
    progress = vars(model).pop("progress")      # reading it while recording raises AttributeError
    # while recording, gradients come from a stream of their own; newer torch versions warn about that
    getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", bool)(False)
    try:
        torch.cuda.make_graphed_callables(model, (inputs, targets), allow_unused_input=True)
    except AttributeError as error:
        # a property that reads it is itself reported as missing
        missing = str(error).rpartition("no attribute ")[2].strip("'")
        if missing != "progress" and not isinstance(getattr(type(model), missing, None), property):
            raise
        return [f"launches    a micro-batch changes with model.progress, so it is not recorded; {pace}"]
    except (RuntimeError, AssertionError) as error:     # out of memory, or not allowed in a graph
        world.empty_cache()
        return [f"launches    a micro-batch cannot be recorded ({first_line(error)}); {pace}"]
    finally:
        model.progress = progress
        clear(model)
    # gradients arrive in memory that the next micro-batch overwrites
    for parameter in model.parameters():
        parameter.register_hook(torch.clone)
    _, recorded = launch_seconds(model, inputs, targets, world)
    return [f"launches    a micro-batch is recorded as one CUDA graph, {1000 * recorded:.1f} ms; else {pace}"]


def launch_seconds(model: nn.Module, inputs: Tensor, targets: Tensor, world: World) -> tuple[float, float]:
    """Seconds until all kernels of a micro-batch are launched, and until they are done."""
    for _ in range(2):      # the first time warms up
        world.synchronize()
        begun = time.perf_counter()
        model(inputs, targets).backward()
        started = time.perf_counter() - begun
        world.synchronize()
        done = time.perf_counter() - begun
    clear(model)
    return started, done


def clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
