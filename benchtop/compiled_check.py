"""Compiled equals eager: one step's gradients of both, on a small model of the same width, before a long run.

Some releases of torch compile wrong gradients, and a loss curve does not show it. What torch 2.10 gets wrong
is switched off by set_up_torch() in machine.py; what nobody knows yet is found by comparing.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchtop.errors import UserError, first_line
from benchtop.initial import draw_weights
from benchtop.machine import Kernels, World
from benchtop.smoke import stir

LONG_RUN_SECONDS = 600      # of planned training, from which the check is worth its time
# of the norm of a parameter's gradient; eager and compiled kernels round at different places
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
FEW = 16        # numbers in a parameter whose gradient's rounding is a matter of chance
# without tables of a device's speed: as slow as they come, so that a long run is not taken for a short one
GUESSED_FLOPS = {"cpu": 1e11}
SLOW_GPU_FLOPS = 2e13


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far compiled gradients are from eager ones: of the parameter that is worst beside its bound.

    error  norm of the difference, by the norm of the eager gradient in float32
    bound  what rounding explains
    """
    parameter: str
    error: float
    bound: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.error:.1%} in {self.parameter}, where rounding explains {self.bound:.1%}"


def small_config(cfg):
    """Few layers, a small vocabulary and about 1,024 tokens; width, heads and rows as they are, since kernels
    are chosen by those. Three layers, so that one has no value embedding."""
    small = dict(num_layers=min(3, cfg.num_layers), vocab_size=min(cfg.vocab_size or 509, 509),
                 seq_len=min(cfg.seq_len, 1024), long_window=min(cfg.seq_len, 500), short_window=300,
                 batch_tokens=0, max_doc_len=0, micro_batch_tokens=0, fp8=False)
    return dataclasses.replace(cfg, **{knob: value for knob, value in small.items() if knob in cfg.names()})


def small_batch(cfg, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) inputs of several documents a row and their targets, some of which are not to be predicted."""
    draw = torch.Generator().manual_seed(0)
    shape = max(1, 1024 // cfg.seq_len), cfg.seq_len + 1
    tokens = torch.randint(cfg.vocab_size - 1, shape, generator=draw)
    tokens[torch.rand(shape, generator=draw) < 4 / cfg.seq_len] = cfg.vocab_size - 1
    tokens[:, 0] = cfg.vocab_size - 1
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    targets[:, ::50] = -1
    return inputs.to(device), targets.to(device)


def gradients(experiment, cfg, device: torch.device, dtype: torch.dtype, flex: dict | None, compiled: bool,
              ) -> dict[str, Tensor]:
    """The gradient of every parameter of a model, after one batch, as float64 on the CPU."""
    torch.manual_seed(cfg.seed)
    model = experiment.Model(cfg, cfg.vocab_size - 1, dtype, flex)
    draw_weights(model, cfg.seed)
    stir(model)
    model.to(device)
    if compiled:
        model.compile_parts()
    inputs, targets = small_batch(cfg, device)
    (model(inputs, targets) / targets.numel()).backward()
    return {name: parameter.grad.cpu().double() for name, parameter in model.named_parameters()}


def compare_compiled(experiment, cfg, world: World, kernels: Kernels) -> Comparison:
    """Compare the gradients of compiled kernels, in the run's dtype, with those of eager ones in float32.

    Eager kernels in the run's dtype, too, are compared with float32: compiled ones may be four times as far
    from it as those are, or as far as TOLERANCE, whichever is more.
    """
    cfg, device = small_config(cfg), world.device
    with own_compilations():
        found = gradients(experiment, cfg, device, world.dtype, kernels.flex, compiled=True)
    exact = gradients(experiment, cfg, device, torch.float32, None, compiled=False)
    eager = exact
    if world.dtype != torch.float32:
        eager = gradients(experiment, cfg, device, world.dtype, None, compiled=False)
    return worst(found, eager, exact, TOLERANCE[world.dtype])


def worst(found: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float,
          ) -> Comparison:
    """The comparison of the parameter that is furthest beyond its bound, or nearest to it."""
    def errors(gradients: dict[str, Tensor]) -> dict[str, float]:
        return {name: float((gradients[name] - wanted).norm() / wanted.norm().clamp(min=1e-30))
                for name, wanted in exact.items()}
    usual = errors(eager)
    # a few numbers may by chance be rounded well in one way and badly in another; all such have one bound
    few = [name for name, wanted in exact.items() if wanted.numel() < FEW]
    usual |= dict.fromkeys(few, max((usual[name] for name in few), default=0.0))
    comparisons = [Comparison(name, error, max(tolerance, 4 * usual[name]))
                   for name, error in errors(found).items()]
    # an error that is no number is larger than any
    return max(comparisons, key=lambda one: one.error / one.bound if one.error == one.error else float("inf"))


@contextmanager
def own_compilations() -> Iterator[None]:
    """Forget what is compiled here: layers of the run would find it in their caches and fill them up."""
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


def planned_seconds(experiment, cfg, world: World) -> float:
    """Roughly what the budget takes at 40 % of the device's peak; one that no table has is guessed low."""
    with torch.device("meta"):
        model = experiment.Model(cfg, 0, world.dtype)
    known = world.peak_flops(cfg) or world.size * GUESSED_FLOPS.get(world.device.type, SLOW_GPU_FLOPS)
    by_clock = 60 * cfg.train_minutes or float("inf")
    by_tokens = cfg.num_steps * cfg.batch_tokens * model.flops_per_token() / (0.4 * known) or float("inf")
    return min(by_clock, by_tokens)


def trusted_kernels(experiment, cfg, world: World, kernels: Kernels,
                    compare: Callable[..., Comparison] = compare_compiled) -> Kernels:
    """The kernels of a run; eager ones where this would be a long run and compiled gradients are wrong.

    The reason, which the log's line "compile" gives, says what was found. All processes decide as one.
    """
    seconds = max(world.gather(planned_seconds(experiment, cfg, world)))
    if not kernels.compiled or seconds < LONG_RUN_SECONDS:
        return kernels
    if world.is_main:
        print("comparing compiled gradients with eager ones, since this is a long run", flush=True)
    try:
        found = compare(experiment, cfg, world, kernels)
        verdict = (found.agrees, found.error, str(found))
    except UserError:
        raise       # of a rule of the experiment, which names what to change
    except Exception as error:      # whatever fails in a small model would fail in the run, or mislead it
        verdict = (False, float("inf"), f"an error ({type(error).__name__}: {first_line(error)})")
    agrees, _, said = min(world.gather(verdict), key=lambda one: (one[0], -one[1]))
    if agrees:
        return dataclasses.replace(
            kernels, compile_reason=f"{kernels.compile_reason}; its gradients are eager ones up to {said}")
    return dataclasses.replace(
        kernels, compiled=False, flex=None,
        compile_reason=f"compiled gradients differ from eager ones by {said}",
        attention="plain products: FlexAttention needs torch.compile" if kernels.flex is not None
        else kernels.attention)
