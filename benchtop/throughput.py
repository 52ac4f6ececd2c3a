"""How fast an experiment trains here, and where a step's time goes: the real loop on synthetic tokens.

`speed` is a part of ./run.sh proof.
"""

import dataclasses
import functools
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchtop import memory
from benchtop.apart import OK, WARNING, Finding
from benchtop.batches import Batch, batch_of, micro_batch_shape
from benchtop.briefing import duration, operations_of
from benchtop.command_line import counted, figure
from benchtop.compiled_check import own_compilations
from benchtop.errors import first_line
from benchtop.evaluation import TokenLosses
from benchtop.fitness import Proof
from benchtop.machine import World
from benchtop.measure import by_kind, kernels_of, product_flops, seconds_of
from benchtop.smoke import stir
from benchtop.synthetic import SyntheticRun
from benchtop.warm_up import make_model, ready

NEVER = 2**40               # interval in steps of what must not happen during a measurement
SECONDS_OF_STEPS = 8        # total time of the measured steps
SECONDS_OF_CPU_STEP = 3     # on a CPU, longer steps are made smaller for the measurement
LATE = 0.9                  # fraction of a step's time; if queueing takes longer, the GPU waits for Python


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------

class Stopwatch:
    """Times the steps of a run: warm-up steps, then single steps with a synchronization after each. On a GPU,
    the last single step also records calls that wait for the GPU; then many steps are queued in a row.

    Called once a step is queued; returns True when enough is measured.
    queued, done  seconds until each single step was queued, and until it was done
    waits         calls within a step that wait for the GPU, as FILE:LINE
    """

    def __init__(self, world: World, on_cuda: bool, seconds: float = SECONDS_OF_STEPS):
        self.world, self.seconds, self.on_cuda = world, seconds, on_cuda
        self.left_to_warm_up, self.many, self.left_of_many = (2 if on_cuda else 1), 0, 0
        self.queued: list[float] = []
        self.done: list[float] = []
        self.waits: list[str] = []
        self.step_seconds = 0.0
        self.watch = None
        self.last = time.perf_counter()

    def __call__(self, run: SyntheticRun) -> bool:
        queued = time.perf_counter() - self.last
        if self.watch:
            self._stop_watching()
        if self.left_of_many > 1:
            self.left_of_many -= 1
            return False
        self.world.synchronize()
        done = time.perf_counter() - self.last
        is_enough = self._note(queued, done)
        self.last = time.perf_counter()
        return is_enough

    def _note(self, queued: float, done: float) -> bool:
        if self.many:
            self.step_seconds = done / self.many
            return True
        if self.left_to_warm_up:
            self.left_to_warm_up -= 1
            return False
        self.queued.append(queued)
        self.done.append(done)
        self.step_seconds = statistics.median(self.done)
        if not self.on_cuda:
            return len(self.done) == 9 or (len(self.done) > 1 and sum(self.done) > self.seconds)
        if len(self.done) == 3:
            self._start_watching()
        elif len(self.done) == 4:
            self.many = self.left_of_many = max(4, min(40, int(self.seconds / self.step_seconds)))
        return False

    def _start_watching(self) -> None:
        self.watch = warnings.catch_warnings(record=True)
        self.heard = self.watch.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def _stop_watching(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.watch.__exit__(None, None, None)
        self.watch = None
        self.waits = sorted({f"{Path(one.filename).name}:{one.lineno}" for one in self.heard
                             if "called a synchronizing" in str(one.message)})


def prepared(proof: Proof, say: Callable[[str], None]) -> tuple:
    """Config with micro-batches that fit, model and optimizer, compiled and warmed up as for a run."""
    cfg, world, kernels, experiment = proof.cfg, proof.world, proof.kernels, proof.experiment
    sized = memory.choose_micro_batch(experiment, cfg, world, kernels)
    model, optimizer = make_model(experiment, cfg, cfg.vocab_size - 1, world, kernels)
    stir(model)     # multiplying zeros takes less power and time than the products of a real run
    sized = ready(experiment, sized, world, kernels, TokenLosses(model, world, kernels.compiled), optimizer,
                  say)
    return sized, model, optimizer


def halfway(proof: Proof, cfg, model, optimizer, after_step: Callable[[SyntheticRun], bool]) -> SyntheticRun:
    """A run in the middle of its budget, where growing attention windows have their mean length."""
    cfg = dataclasses.replace(cfg, num_steps=cfg.num_steps or 1000, train_minutes=0.0, target_loss=0.0,
                              log_every=NEVER, val_every=NEVER)
    run = SyntheticRun(proof.experiment, cfg, proof.world, model, optimizer, proof.kernels.compiled,
                       after_step)
    run.step, run.progress, run.progress_before = cfg.num_steps // 2, 0.5, 0.5
    return run


def within_reach(proof: Proof) -> tuple[Proof, str]:
    """The Proof, with fewer tokens per step if a step would take too long on a CPU; and a note about that."""
    cfg = proof.cfg
    if not proof.on_cpu:
        return proof, ""
    with torch.device("meta"):
        per_token = proof.experiment.Model(cfg, 0).flops_per_token()
    able = SECONDS_OF_CPU_STEP * 0.3 * product_flops(proof.world, proof.dtype, 1024)
    rows = max(1, int(able / (per_token * cfg.seq_len)))
    if rows >= cfg.rows_per_step:
        return proof, ""
    fewer = dataclasses.replace(cfg, batch_tokens=rows * cfg.seq_len)
    return dataclasses.replace(proof, cfg=fewer), (
        f"measured with steps of {fewer.batch_tokens:,} tokens, since {cfg.batch_tokens:,} are slow on a CPU")


# ------------------------------------------------------------------------------------------------
# Findings
# ------------------------------------------------------------------------------------------------

def speed(proof: Proof) -> Iterator[Finding]:
    whole = proof.cfg
    proof, note = within_reach(proof)
    said, begun = [note] if note else [], time.perf_counter()
    gc.collect()
    if proof.on_cuda:
        torch.cuda.empty_cache()
    chosen = proof.kernels      # before own_compilations() discards what is compiled to choose them
    with own_compilations(), proof.world.memory_of("speed"):
        sized, model, optimizer = prepared(proof, said.append)
        took = time.perf_counter() - begun
        yield Finding("ready", "; ".join([f"after {took:.1f} s", f"attention by {chosen.attention}", *said]),
                      values={"seconds": took})
        watch = Stopwatch(proof.world, proof.on_cuda)
        run = halfway(proof, sized, model, optimizer, watch)
        proof.experiment.train(run)
        pace = pace_of(proof, run, watch)
        yield pace
        yield whole_run(proof, whole, model, pace.values["tokens_per_second"])
        if proof.on_cuda:
            yield known(queue, watch)
        yield known(peak_memory, proof, sized)
        for describe in (parts_of_step, *([kernels_of_step] if proof.on_cuda else [])):
            yield known(describe, proof, run, watch.step_seconds)


def known(describe: Callable[..., Finding], *arguments) -> Finding:
    """The finding of `describe`, or a warning if that fails: earlier findings stay valid."""
    try:
        return describe(*arguments)
    except Exception as error:
        return Finding(describe.__name__.split("_")[0],
                       f"not known: {type(error).__name__}: {first_line(error)}", WARNING)


def pace_of(proof: Proof, run: SyntheticRun, watch: Stopwatch) -> Finding:
    cfg, seconds = run.cfg, watch.step_seconds
    count, rows = micro_batch_shape(cfg, 1)
    tokens, peak = cfg.batch_tokens / seconds, proof.world.peak_flops(cfg)
    run.model.progress = 0.5
    mfu = tokens * run.model.flops_per_token() / peak if peak else None
    used = f", MFU {mfu:.1%}" if peak else ""
    says = (f"{tokens:,.0f} tokens/s{used}: {1000 * seconds:,.0f} ms for a step of "
            f"{cfg.batch_tokens:,} tokens, {count} x {rows} x {cfg.seq_len}")
    return Finding("speed", says, values={
        "tokens_per_second": tokens, "mfu": mfu, "step_seconds": seconds, "batch_tokens": cfg.batch_tokens,
        "micro_batches": count, "rows": rows, "single_step_seconds": watch.done})


def queue(watch: Stopwatch) -> Finding:
    """Whether Python queues work fast enough to keep the GPU busy."""
    queued, done = statistics.median(watch.queued), statistics.median(watch.done)
    waits = f"it waits in {', '.join(watch.waits)}" if watch.waits else "no call waits for the GPU"
    says = f"a step is queued after {1000 * queued:,.0f} ms and done after {1000 * done:,.0f}; {waits}"
    return Finding("queue", says, WARNING if queued > LATE * done or watch.waits else OK,
                   {"queued_seconds": queued, "done_seconds": done, "waits": watch.waits})


def whole_run(proof: Proof, cfg, model, tokens_per_second: float) -> Finding:
    """Time and cost of a whole run on all devices of this machine, if communication took no time."""
    devices = torch.cuda.device_count() if proof.on_cuda else 1
    model.progress = 0.5
    in_the_middle = model.flops_per_token()
    # number of tokens with mid-run cost that take the same arithmetic as the whole run
    work = operations_of(cfg, model) / in_the_middle if cfg.num_steps else math.inf
    by_steps, by_clock = work / (tokens_per_second * devices), 60 * cfg.train_minutes or math.inf
    seconds = min(by_steps, by_clock)
    tokens = cfg.train_tokens if by_steps <= by_clock else tokens_per_second * devices * seconds
    cost = cfg.gpu_cost_per_hour * seconds / 3600
    says = (f"{cfg.preset}: {tokens:,.0f} tokens in {duration(seconds)} on {counted(devices, 'device')}"
            + (f" at a cost of {cost:,.2f}" if cost else "") + "; validation not counted")
    return Finding("whole run", says, values={"seconds": seconds, "tokens": tokens, "devices": devices,
                                              "cost": cost or None})


def peak_memory(proof: Proof, cfg) -> Finding:
    peak = proof.world.peak_memory_mib("speed")
    estimate = memory.memory_estimate_mib(proof.experiment, cfg, proof.world, proof.kernels)
    reserved = torch.cuda.max_memory_reserved() / 2**20 if proof.on_cuda else None
    says = f"{peak:,.0f} MiB{f', reserved {reserved:,.0f}' if reserved else ''}; estimated {estimate:,.0f}"
    return Finding("peak memory", says,
                   values={"peak_mib": peak, "reserved_mib": reserved, "estimate_mib": estimate})


def parts_of_step(proof: Proof, run: SyntheticRun, step_seconds: float) -> Finding:
    """Time of each part by itself: of one micro-batch times their number, of the optimizer once."""
    model, optimizer, batch = run.model, run.optimizer, first_batch(run)
    inputs, targets = batch.micro_batches[0]
    model.progress, count = 0.5, len(batch.micro_batches)
    timed = functools.partial(seconds_of, world=proof.world, times=3 if proof.on_cpu else 5)
    x = model.hidden(inputs)
    slope = (torch.randn_like(x, dtype=torch.float32) / targets.numel()).to(x.dtype)
    del x

    def backward() -> None:
        (model(inputs, targets) / batch.num_targets).backward()
    masks = timed(lambda: model.contexts(inputs)) if hasattr(model, "contexts") else 0.0
    hidden, whole = timed(lambda: model.hidden(inputs).backward(slope)), timed(backward)
    norms, updates = [], []
    for _ in range(3):
        backward()
        norms.append(seconds_of(optimizer.sum_gradients, proof.world, times=1, warm_ups=0))
        updates.append(seconds_of(lambda: optimizer.step(0.0), proof.world, times=1, warm_ups=0))
    found = {"layers": count * (hidden - masks), "head": count * (whole - hidden), "masks": count * masks,
             "norms": statistics.median(norms), "optimizer": statistics.median(updates)}
    found["other"] = max(0.0, step_seconds - sum(found.values()))
    shares = ", ".join(f"{name} {figure(1000 * seconds)} ms ({seconds / step_seconds:.0%})"
                       for name, seconds in found.items())
    return Finding("parts", shares, values={"seconds": found})


def first_batch(run: SyntheticRun) -> Batch:
    """The batch of the run's next step, on the device."""
    batch = batch_of(run.data.rows, run.cfg, run.step)
    return batch.each(lambda tensor: tensor.to(run.world.device))


def kernels_of_step(proof: Proof, run: SyntheticRun, step_seconds: float) -> Finding:
    """Number of kernels that a step launches, and the time that each kind takes."""
    again = halfway(proof, run.cfg, run.model, run.optimizer, lambda run: True)
    names = kernels_of(lambda: proof.experiment.train(again), proof.world)
    count, busy = sum(n for n, _ in names.values()), sum(seconds for _, seconds in names.values())
    kinds = by_kind(names)
    says = ", ".join(f"{kind} {1000 * seconds:,.0f} ms" for kind, (_, seconds) in kinds.items())
    longest = sorted(names.items(), key=lambda item: -item[1][1])[:40]
    return Finding("kernels", f"{count:,} in a step, busy for {busy / step_seconds:.0%} of it: {says}",
                   values={"count": count, "seconds": busy, "kinds": kinds, "longest": longest})
