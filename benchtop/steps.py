"""Around a training step: its batch, prepared during the previous step; its report, read when the device is
done; loss scaling for float16.
"""

import contextlib
import gc
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from benchtop.batches import Batch, Rows, batch_of
from benchtop.errors import NonFinite
from benchtop.machine import World


@contextlib.contextmanager
def prepared_batches(rows: Rows, cfg, world: World, first_step: int) -> Iterator[Iterator[Batch]]:
    """The batch of each step from `first_step` on, on the device; prepared during the previous step."""
    def make(step: int) -> Batch:
        return batch_of(rows, cfg, step, world.rank, world.size).each(world.pinned)

    def batches() -> Iterator[Batch]:
        following = helper.submit(make, first_step)
        for step in itertools.count(first_step + 1):
            batch, following = following.result(), helper.submit(make, step)
            yield batch.each(world.to_device)

    with ThreadPoolExecutor(1, initializer=world.use_device) as helper:
        yield batches()


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Switch off Python's garbage collector, which would interrupt a step to traverse all modules."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Report:
    """Results of a step: loss, whether to stop, whether to save, share of --train_minutes used, and gradient
    norms. They are copied from the device while later steps are queued; read() waits for the copy.

    numbers  (4 + P) these results, on the device
    fits     whether the gradients fit into their dtype (False if float16 overflowed)
    """

    def __init__(self, step: int, scale: float, numbers: Tensor, fits: bool, world: World):
        self.step, self.scale, self.fits, self.world = step, scale, fits, world
        self.numbers, self.arrival = world.fetch(numbers)
        self.values: dict[str, float] = {}      # for metrics.csv, once read
        self.stops, self.saves, self.clock_share = False, False, 0.0

    def read(self, optimizer) -> None:
        """Wait for the numbers and set the attributes from them, the first time.

        raises  NonFinite that names the step and what is not finite
        """
        if self.values:
            return
        self.world.wait_for(self.arrival)
        loss, stops, saves, self.clock_share = self.numbers[:4].tolist()
        self.stops, self.saves = stops > 0, saves > 0
        self.values = {"train_loss": loss, "lr_scale": self.scale}
        if self.fits:
            self.values["grad_norm"] = check_norms(optimizer, self.numbers[4:], loss, self.step)


CURE = "try a lower learning rate, or --dtype float32"


def check_weights(model: nn.Module, step: int) -> None:
    """raises  NonFinite that names the step and the first parameter that is not finite"""
    named = dict(model.named_parameters())
    finite = torch.stack([weight.isfinite().all() for weight in named.values()]).tolist()
    if not all(finite):
        raise NonFinite(f"{[*named][finite.index(False)]} is not finite after step {step}; {CURE}")


def check_norms(optimizer, norms: Tensor, loss: float, step: int) -> float:
    """The global gradient norm, from the gradient norm of each parameter, (P).

    raises  NonFinite that names the step and what is not finite
    """
    total = torch.linalg.vector_norm(norms).item()
    if not math.isfinite(loss):
        cause = "check the script's loss and initial values" if step == 1 else CURE
        raise NonFinite(f"the loss of step {step} is {loss}; {cause}")
    if not math.isfinite(total):
        culprit = next(name for name, norm in zip(optimizer.parameters, norms.tolist(), strict=True)
                       if not math.isfinite(norm))
        raise NonFinite(f"the gradient of {culprit} is not finite in step {step}; {CURE}")
    return total


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, arXiv:1710.03740); 1 where not enabled.

    Small gradients underflow in float16: losses are scaled up before backward, gradients down after. The
    scale doubles after 1,000 steps without overflow; on overflow it halves and the step is skipped.
    """

    def __init__(self, enabled: bool):
        self.enabled, self.value, self.good_steps = enabled, 2.0**16 if enabled else 1.0, 0

    def backward(self, loss: Tensor) -> None:
        (loss * self.value).backward()

    def unscale(self, optimizer, norms: Tensor) -> bool:
        """Divide gradients and their norms (P) by the scale; False if they overflowed and were cleared.

        raises  NonFinite if even a scale of 1 overflows
        """
        if not self.enabled:
            return True
        if norms.isfinite().all():
            optimizer.divide_gradients(self.value)
            norms /= self.value
            self.good_steps += 1
            if self.good_steps % 1000 == 0:
                self.value *= 2
            return True
        if self.value <= 1:
            raise NonFinite("gradients overflow float16 at any scale; try --dtype float32")
        self.value, self.good_steps = self.value / 2, 0
        optimizer.clear_gradients()
        return False

    def state(self) -> dict:
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: dict) -> None:
        self.value, self.good_steps = state["value"], state["good_steps"]
