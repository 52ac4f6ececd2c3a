"""Before a long run: compare compiled with eager gradients on one batch of a small model of equal width.

Some releases of torch compile wrong gradients, and a loss curve does not show it. machine.set_up_torch()
switches off what torch 2.10 gets wrong; this comparison finds errors that are not known yet.
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

LONG_RUN_SECONDS = 600      # planned training time from which on the check is worth its cost
# allowed error relative to the norm of a parameter's gradient; eager and compiled kernels round differently
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
FEW = 16        # parameters with fewer elements share one bound, see worst()
# FLOP/s of devices whose peak is unknown: a low guess, so that a long run is not taken for a short one
GUESSED_FLOPS = {"cpu": 1e11}
SLOW_GPU_FLOPS = 2e13


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far compiled gradients are from eager ones, for the parameter with the largest error / bound.

    error  norm of the difference, divided by the norm of the eager gradient in float32
    bound  largest error that rounding explains
    """
    parameter: str
    error: float
    bound: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.error:.1%} ({self.parameter}; rounding explains up to {self.bound:.1%})"


def small_config(cfg):
    """cfg with few layers, a small vocabulary and about 1,024 tokens. Width, heads and row length (at most
    1,024) stay, since they decide which kernels run. Of three layers, one has no value embedding."""
    small = dict(num_layers=min(3, cfg.num_layers), vocab_size=min(cfg.vocab_size or 509, 509),
                 seq_len=min(cfg.seq_len, 1024), long_window=min(cfg.seq_len, 500), short_window=300,
                 batch_tokens=0, max_doc_len=0, micro_batch_tokens=0, fp8=False)
    return dataclasses.replace(cfg, **{knob: value for knob, value in small.items() if knob in cfg.names()})


def small_batch(cfg, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) inputs with several documents per row, and their targets, some of which are masked (-1)."""
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
    """The gradient of every parameter after one batch, as float64 on the CPU."""
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
    """Compare gradients of compiled kernels in the run's dtype with eager ones in float32.

    The bound on their relative error is four times the error of eager kernels in the run's dtype, or
    TOLERANCE if that is larger.
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
    """The comparison of the parameter whose error is largest relative to its bound."""
    def errors(gradients: dict[str, Tensor]) -> dict[str, float]:
        return {name: float((gradients[name] - wanted).norm() / wanted.norm().clamp(min=1e-30))
                for name, wanted in exact.items()}
    usual = errors(eager)
    # a few numbers may, by chance, round well in eager kernels and badly in compiled ones; they share a bound
    few = [name for name, wanted in exact.items() if wanted.numel() < FEW]
    usual |= dict.fromkeys(few, max((usual[name] for name in few), default=0.0))
    comparisons = [Comparison(name, error, max(tolerance, 4 * usual[name]))
                   for name, error in errors(found).items()]
    # NaN counts as the largest error
    return max(comparisons, key=lambda one: one.error / one.bound if one.error == one.error else float("inf"))


@contextmanager
def own_compilations() -> Iterator[None]:
    """Discard compiled code before and after, so that it does not fill the caches that a run's layers use."""
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


def planned_seconds(experiment, cfg, world: World) -> float:
    """Rough time for the budget at 40 % of the device's peak, which is guessed low where it is unknown."""
    with torch.device("meta"):
        model = experiment.Model(cfg, 0, world.dtype)
    known = world.peak_flops(cfg) or world.size * GUESSED_FLOPS.get(world.device.type, SLOW_GPU_FLOPS)
    by_clock = 60 * cfg.train_minutes or float("inf")
    by_tokens = cfg.num_steps * cfg.batch_tokens * model.flops_per_token() / (0.4 * known) or float("inf")
    return min(by_clock, by_tokens)


def trusted_kernels(experiment, cfg, world: World, kernels: Kernels,
                    compare: Callable[..., Comparison] = compare_compiled) -> Kernels:
    """The kernels for a run: eager ones if the run is long and its compiled gradients are wrong.

    compile_reason, which the log prints as "compile", says what was found. All ranks decide alike.
    """
    seconds = max(world.gather(planned_seconds(experiment, cfg, world)))
    if not kernels.compiled or seconds < LONG_RUN_SECONDS:
        return kernels
    if world.is_main:
        print("comparing compiled gradients with eager ones, since this is a long run", flush=True)
    try:
        found = compare(experiment, cfg, world, kernels)
        verdict = (found.agrees, found.error, f"compiled gradients differ from eager ones by {found}")
    except UserError:
        raise       # from a rule of the experiment; its message says what to change
    except Exception as error:      # what fails in a small model would stop or corrupt the run
        verdict = (False, float("inf"), f"comparing compiled gradients with eager ones failed "
                   f"({type(error).__name__}: {first_line(error)})")
    agrees, _, said = min(world.gather(verdict), key=lambda one: (one[0], -one[1]))
    if agrees:
        return dataclasses.replace(kernels, compile_reason=f"{kernels.compile_reason}; {said}")
    return dataclasses.replace(
        kernels, compiled=False, flex=None, compile_reason=said,
        attention="plain products: FlexAttention needs torch.compile" if kernels.flex is not None
        else kernels.attention)
