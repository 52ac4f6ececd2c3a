"""Trains presets for three steps on a make-believe GPU, by their script's own loop, and says what happened.

    python tests/make_believe_steps.py H100 train_gpt demo,gpt2-small

One line of JSON per preset, memory in MiB: see measure(). test_gpu_code.py judges the figures.
"""

import collections
import contextlib
import gc
import importlib
import json
import sys
import time
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path

import make_believe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    make_believe.plug_in()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch._guards import TracingContext  # noqa: E402
from torch._subclasses.fake_tensor import (  # noqa: E402
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from benchtop import memory  # noqa: E402
from benchtop.batches import Batch, micro_batch_shape  # noqa: E402
from benchtop.budget import Clock  # noqa: E402
from benchtop.evaluation import TokenLosses  # noqa: E402
from benchtop.knobs import parse_config  # noqa: E402
from benchtop.machine import Kernels, World, choose_kernels  # noqa: E402
from benchtop.run import Experiment, Run  # noqa: E402
from benchtop.steps import LossScale  # noqa: E402
from benchtop.warm_up import warm_up  # noqa: E402

VOCABULARY = {"demo": 1024}     # of the tokenizers that presets are for; all others: GPT-2's, 50,257
# tokens of a micro-batch, about as many as an H100 takes
TOKENS = {"xs": 131072, "s": 131072, "m": 65536, "gpt2-small": 49152, "gpt2-medium": 32768, "gpt2-xl": 8192}
# (progress, micro-batches) of each step: the first of a step, and one that adds to its gradients
STEPS = ((0.0, 2), (0.5, 1), (1.0, 2))

# operations that launch nothing: they make views, or memory without content
FREE = {"view", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute", "expand", "slice", "select",
        "squeeze", "unsqueeze", "split", "split_with_sizes", "unbind", "unfold", "diagonal", "unflatten",
        "detach", "as_strided", "alias", "empty", "empty_like", "empty_strided", "new_empty",
        "new_empty_strided", "set_", "lift_fresh", "device", "is_same_size", "resize_"}


class Card(FakeTensorMode):
    """Follows what runs on the card, phase by phase.

    live      bytes of all tensors that are alive, as an allocator without waste would have them
    peaks     the most of that, by phase; ends: what was alive when the phase last ended
    launches  of kernels that torch.compile made, by phase; ops: of torch's own, by phase
    waits     calls that wait for the card, and where in the project
    """

    def __init__(self):
        super().__init__()
        self.live, self.phase, self.waits, self.inside = 0, "", [], False
        self.clear()
        make_believe.LAUNCHES[:], make_believe.WAITS[:] = [self.note_launch], [self.note_wait]

    def clear(self) -> None:
        self.peaks, self.ends, self.launches, self.ops = (collections.Counter() for _ in range(4))

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        around, self.phase = self.phase, phase
        self.peaks[phase] = max(self.peaks[phase], self.live)
        try:
            yield
        finally:
            self.phase, self.ends[phase] = around, self.live

    def note_launch(self, _kernel: str, _arguments: tuple) -> None:
        self.launches[self.phase] += 1

    def dispatch(self, func, types, args=(), kwargs=None):
        # torch.compile asks for shapes; and to find shapes, some operations are replaced by several others
        if TracingContext.try_get() or self.inside:
            return super().dispatch(func, types, args, kwargs)
        self.inside = True
        try:
            return self.noted(func, types, args, kwargs or {})
        finally:
            self.inside = False

    def noted(self, func, types, args, kwargs):
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        try:
            if name == "nonzero":       # make-believe: everything is, and the call waits to know how many
                self.note_wait(name)
                with self:
                    out = args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
            elif name == "_pin_memory":
                with self:
                    out = torch.empty_like(args[0])
                out.untyped_storage().pinned = True
            else:
                out = super().dispatch(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.note_wait(name)
            raise
        given, made = tensors_in((args, kwargs)), tensors_in(out)
        comes_back = any(tensor.is_cuda for tensor in given) and not all(tensor.is_cuda for tensor in made)
        copies = name in ("_to_copy", "copy_")
        if copies and comes_back and not (kwargs.get("non_blocking") or any(args[2:])):
            self.note_wait(name)
        goes = any(tensor.is_cuda for tensor in made) and not all(tensor.is_cuda for tensor in given)
        if copies and goes and not any(hasattr(tensor.untyped_storage(), "pinned") for tensor in given):
            self.note_wait("copy of memory that is not pinned")
        if name not in FREE and any(tensor.is_cuda for tensor in (*given, *made)):
            self.ops[self.phase] += 1
        for tensor in made:
            self.follow(tensor)
        return out

    def follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_cuda and not hasattr(storage, "followed"):
            storage.followed = True
            self.live += storage.nbytes()
            self.peaks[self.phase] = max(self.peaks[self.phase], self.live)
            weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, nbytes: int) -> None:
        self.live -= nbytes

    def note_wait(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))
                  and "make_believe" not in frame.filename]
        places = [f"{Path(frame.filename).name} line {frame.lineno}" for frame in frames]
        self.waits.append([self.phase, name, *places[-1:]])


def tensors_in(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class ShortRun(Run):
    """The steps of STEPS; windows grow with progress."""
    card: Card
    steps: list
    told_to_stop = 0

    def batches(self) -> Iterator[Batch]:
        most, rows = micro_batch_shape(self.cfg, 1)
        for progress, count in STEPS:
            self.progress = self.model.progress = progress
            pairs = [torch.zeros(2, rows, self.cfg.seq_len, dtype=torch.int64, device="cuda").unbind()
                     for _ in range(min(most, count))]
            self.card.clear()
            with self.card.during("loop"):
                yield Batch(1000, pairs)
            del pairs
            self.step += 1
            self.reports.clear()
            self.steps.append({
                "progress": progress, "micro_batches": min(most, count), "graphs": graphs(),
                "live": mib(self.card.live), "launches": dict(self.card.launches), "ops": dict(self.card.ops),
                "peaks": {phase: mib(peak) for phase, peak in self.card.peaks.items()},
                "ends": {phase: mib(live) for phase, live in self.card.ends.items()}})

    def backward(self, loss: torch.Tensor) -> None:
        with self.card.during("backward"):
            super().backward(loss)


def mib(nbytes: int) -> int:
    return round(nbytes / 2**20)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def in_phase(card: Card, owner: object, method: str, phase: str) -> None:
    """Count what a method does as a phase of its own."""
    original = getattr(owner, method)

    def counted(*args, **options):
        with card.during(phase):
            return original(*args, **options)
    setattr(owner, method, counted)


def put_on_card(model: nn.Module) -> None:
    """Give a model without content weights on the card."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            module._parameters[name] = nn.Parameter(torch.empty(weight.shape, device="cuda"))


KERNELS: dict[int, Kernels] = {}


def kernels_for(cfg, world: World) -> Kernels:
    """What choose_kernels finds, which depends on the width of heads."""
    if cfg.head_dim not in KERNELS:
        KERNELS[cfg.head_dim] = choose_kernels(cfg, world)
    return KERNELS[cfg.head_dim]


def measure(experiment: Experiment, flags: list[str]) -> dict:
    """What a run of an experiment does on the card.

    attention, micro_batches, rows, estimate, states   what is chosen, and what is alive before the first step
    warm-up, validation                                peaks of memory
    graphs, graphs_after, breaks                       graphs that are compiled in the warm-up, and at the end
    waits                                              calls that wait for the card, after the warm-up
    steps                                              as ShortRun.batches notes them
    """
    began = time.process_time()
    cfg = parse_config(flags, experiment.Config)
    cfg = cfg.with_budget(cfg.train_tokens or 2**40)
    torch._dynamo.reset()
    world, card = World(cfg), Card()
    with card:
        kernels = kernels_for(cfg, world)
    with torch.device("meta"):
        model = experiment.Model(cfg, cfg.vocab_size - 1, world.dtype, kernels.flex)
    sized = memory.choose_micro_batch(experiment, cfg, world, kernels)     # no more than a step has
    count, rows = micro_batch_shape(sized, 1)
    found = {"attention": kernels.attention, "micro_batches": count, "rows": rows,
             "estimate": memory.memory_estimate_mib(experiment, sized, world, kernels)}
    torch._dynamo.utils.counters.clear()
    with card, torch.autograd.set_multithreading_enabled(False):
        put_on_card(model)
        optimizer = experiment.Optimizer(model, sized, world, torch.bfloat16)
        model.compile_parts()
        found["states"] = mib(card.live)
        losses_of = TokenLosses(model, world, compiled=True)
        with card.during("warm-up"):
            warm_up(losses_of, sized, world)
            optimizer.sum_gradients()
            optimizer.clear_gradients()
        found |= {"warm-up": mib(card.peaks["warm-up"]), "graphs": graphs()}
        card.waits.clear()
        run = ShortRun(experiment, sized, world, model, optimizer, None, losses_of, None, Clock(world),
                       LossScale(enabled=False))
        found["steps"] = steps_of(run, card)
        inputs = torch.zeros(rows, cfg.seq_len, dtype=torch.int64, device="cuda")
        with card.during("validation"):
            losses_of(inputs, torch.zeros(rows, cfg.seq_len, dtype=torch.int64, device="cpu"))
    return found | {"validation": mib(card.peaks["validation"]), "graphs_after": graphs(),
                    "breaks": dict(torch._dynamo.utils.counters["graph_break"]), "waits": card.waits,
                    "seconds": round(time.process_time() - began, 1)}


def steps_of(run: ShortRun, card: Card) -> list[dict]:
    """Train; a call that needs a value from the card ends it, and is among the card's waits."""
    in_phase(card, run.model, "forward", "loss")
    in_phase(card, run.model, "hidden", "forward")
    in_phase(card, run.optimizer, "sum_gradients", "norms")
    in_phase(card, run.optimizer, "step", "optimizer")
    run.card, run.steps = card, []
    gc.collect()
    gc.disable()        # as collector_at_rest does
    with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
        run.experiment.train(run)
    gc.enable()
    return run.steps


if __name__ == "__main__":
    _, _, script, presets = sys.argv[:4]
    make_believe.become(make_believe.CARDS[sys.argv[1]], machine_code=False)
    torch._logging.set_logs(recompiles=True)
    chosen = importlib.import_module(script).EXPERIMENT
    for preset in presets.split(","):
        size = VOCABULARY.get(preset, 50257)
        flags = ["--preset", preset, "--vocab_size", str(size),
                 "--micro_batch_tokens", str(TOKENS.get(preset, 0))]
        print(json.dumps({"preset": preset} | measure(chosen, flags)), flush=True)
