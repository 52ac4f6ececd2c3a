"""A run, from its knobs to its run folder. An experiment's script ends with

    EXPERIMENT = Experiment(Config, GPT, Optimizer, train)
    EXPERIMENT.main()

and its `train` loops over Run.batches(). Everything between two steps happens here: counting the budget,
validation, checkpoints, stop signals, logging.

What an experiment supplies:
    Config     a frozen dataclass that inherits from benchtop.knobs.RunConfig and has the budget: seq_len,
               batch_tokens, max_doc_len, num_steps, train_tokens, train_minutes, target_loss, with_budget()
    Model      Model(cfg, eot_id, dtype, flex): an nn.Module that returns the summed loss of inputs and
               targets. It has hidden, logits, head, layers, cfg, eot_id, longest, flops_per_token,
               compile_parts and remarks; the run sets its `progress`
    Optimizer  Optimizer(model, cfg, world, dtype) with parameters, sum_gradients, divide_gradients,
               clear_gradients, state, load, remarks and, for the memory estimate, group_of and state_of
    train      train(run), the training loop
train_gpt.Model and train_gpt.Optimizer have all of this; a script only overrides what differs.
"""

import contextlib
import dataclasses
import gc
import hashlib
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from tiktoken import Encoding
from torch import Tensor, nn

from benchtop import memory, places
from benchtop.batches import Batch, Rows, micro_batch_shape
from benchtop.briefing import (
    conclusion,
    describe_data,
    describe_git,
    describe_tasks,
    introduction,
    num_parameters,
    plan,
    target_in_words,
    time_estimate,
    time_to_the_end,
    what_ended,
)
from benchtop.budget import Clock, budget_used, is_multiple, validates
from benchtop.checkpoints import read_checkpoint, remove_checkpoints
from benchtop.command_line import command, counted
from benchtop.compiled_check import trusted_kernels
from benchtop.conclusions import baseline
from benchtop.errors import NonFinite, SharedError, UserError, exit_quietly_on_other_ranks, first_line
from benchtop.evaluation import HeldOut, TokenLosses, bpb_by_source
from benchtop.folder import locked_log
from benchtop.held_out import VAL
from benchtop.identity import changes_since, identity_of, require_equal_machines
from benchtop.initial import drawn_in_one_stream
from benchtop.knobs import RunConfig, parse_config
from benchtop.log import RunLog, last_lines
from benchtop.machine import World, choose_kernels, is_recompile_limit
from benchtop.sampling import sample_held_out
from benchtop.saved import check_shapes, sample_run, score, scored_on
from benchtop.shards import Dataset, open_dataset
from benchtop.signals import Stopped, StopSignals
from benchtop.smoke import smoke
from benchtop.speed import with_speed
from benchtop.steps import CURE, LossScale, Report, check_weights, collector_at_rest, prepared_batches
from benchtop.tasks import BENCHMARKS, Task, benchmark_if_here
from benchtop.warm_up import make_model, ready, step_seconds

COLUMNS = ("step", "tokens", "epoch", "train_seconds", "train_loss", "val_loss", "val_bpb", "lr_scale",
           "grad_norm", "tokens_per_second", "mfu", "peak_memory_mib", "flops")


@dataclass(frozen=True)
class Experiment:
    """What a script supplies; see the top of this file.

    script  the file that made this, whose hash each run records; Config and Model may come from another.
            dataclasses.replace() keeps it, so give script=__file__ there
    """
    Config: type[RunConfig]
    Model: Callable[..., nn.Module]
    Optimizer: type
    train: Callable[["Run"], None]
    script: Path | None = None

    def __post_init__(self) -> None:
        if self.script is None:
            maker = sys._getframe(2).f_globals.get("__file__")      # beyond __init__; None in a notebook
            object.__setattr__(self, "script", Path(maker or sys.modules[self.Config.__module__].__file__))

    @command
    def main(self) -> None:
        """Do what the command line asks for."""
        world = None
        try:
            try:
                cfg = parse_config(sys.argv[1:], self.Config, self.script)
            except UserError as error:
                raise SharedError(str(error)) from error
            world = World(cfg)
            if cfg.sample:
                sample_run(self, cfg, world)
            elif cfg.smoke:
                if world.size > 1:
                    raise SharedError("--smoke runs in one process; start it without torchrun")
                smoke(self, cfg, start)
            elif not cfg.check:
                start(self, cfg, world)
            elif not check(self, cfg, world):
                sys.exit(1)
        except SharedError:
            exit_quietly_on_other_ranks()
            raise
        finally:
            if world:
                world.close()


# ------------------------------------------------------------------------------------------------
# During the run
# ------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """The parts and the state of a run; the training loop calls `batches`, `backward` and `accepts_step`."""
    experiment: Experiment
    cfg: RunConfig
    world: World
    model: nn.Module
    optimizer: object
    data: "Data"
    losses_of: TokenLosses
    log: RunLog
    clock: Clock
    loss_scale: LossScale
    step: int = 0                       # optimizer steps done
    progress: float = 0.0               # fraction of the budget used, 0 to 1
    progress_before: float = 0.0        # `progress` one step earlier
    clock_share: float = 0.0            # fraction of --train_minutes used, by rank 0's clock
    values: dict = dataclasses.field(default_factory=dict)      # metrics.csv columns of the last step read
    flops: float = 0.0                  # floating-point operations so far
    logged: tuple[int, float, float] = (0, 0.0, 0.0)    # step, seconds and flops at metrics.csv's last row
    best_val_loss: float = math.inf
    best_step: int = 0
    document_nats: Tensor | None = None     # Validation.nats of the last validation
    reports: list[Report] = dataclasses.field(default_factory=list)     # of steps not read yet
    target: dict | None = None          # when val_loss first reached --target_loss
    save_seconds: float = 0.0           # time spent on checkpoints
    compile_seconds: float = 0.0        # time spent compiling, over all sessions
    last_save: float = dataclasses.field(default_factory=time.perf_counter)
    signals: StopSignals = dataclasses.field(default_factory=StopSignals)

    # ---- what the training loop uses

    def batches(self) -> Iterator[Batch]:
        """The batch of each step, until the budget is used up or the target is reached.

        The code after `yield` runs when the loop asks for the next batch: it counts the step, and validates,
        saves and logs if that is due.
        raises  Stopped on all ranks, after saving, when one of them was told to stop
        """
        if self.step:
            self.validate_and_log()     # a checkpoint is written before its step is validated and logged
        with prepared_batches(self.data.rows, self.cfg, self.world, self.step) as batches:
            self.clock.start()
            while self.progress < 1 and not self.target:
                self.model.progress = self.progress
                self.flops += self.cfg.batch_tokens * self.model.flops_per_token()
                yield next(batches)
                self.step += 1
                self.between_steps()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a part of the step's loss."""
        self.loss_scale.backward(loss)

    def accepts_step(self, loss: Tensor, norms: Tensor, lr_scale: float) -> bool:
        """Whether to apply a step's gradients; False if float16 overflowed and they were cleared.

        Undoes the loss scaling of float16, in gradients and in `norms`, and records the step for the log.
        loss      () this rank's part of the step's mean loss
        norms     (P) gradient norm of each parameter, over all ranks
        lr_scale  factor of the schedule on all learning rates, for the log
        raises    NonFinite if loss or gradients are not finite: at once, before weights change; on CUDA
                  (except in float16) one step later, to avoid waiting, and nothing is saved in between
        """
        # all ranks learn the loss, whether one was told to stop, and by rank 0's clock whether a save is due
        # and which fraction of --train_minutes is used
        clock_share = self.clock.share(self.cfg) if self.world.is_main else 0.0
        told = torch.tensor([float(self.told_to_stop), float(self.is_time_to_save), clock_share])
        shared = self.world.sum(torch.cat([loss[None], self.world.sent(told)]))             # (4)
        fits = self.loss_scale.unscale(self.optimizer, norms)
        report = Report(self.step + 1, lr_scale, torch.cat([shared, norms]), fits, self.world)
        if not self.world.reports_behind:
            report.read(self.optimizer)
        self.reports.append(report)
        return fits

    # ---- between two steps

    def between_steps(self) -> None:
        """Read the reports of steps; save, stop, validate and log if that is due."""
        stops, saves = self.read_reports(behind=0 if self.is_log_step else self.world.reports_behind)
        self.progress_before = self.progress
        self.progress = self.model.progress = budget_used(self.cfg, self.step, self.clock_share)
        saves = saves or self.validates or is_multiple(self.step, self.cfg.save_every_steps)
        if stops or saves or self.logs:
            stops_later, saves_later = self.read_reports(behind=0)
            stops = stops or stops_later
            self.clock.stop()
            if stops or saves or saves_later:
                self.save()
            if stops:
                raise Stopped(self.told_to_stop or signal.SIGTERM)
            self.validate_and_log()
            self.clock.start()

    def read_reports(self, behind: int) -> tuple[bool, bool]:
        """Read the reports of all but the last `behind` steps; returns whether to stop, and to save."""
        stops = saves = False
        while len(self.reports) > behind:
            report = self.reports.pop(0)
            report.read(self.optimizer)
            self.values, self.clock_share = report.values, report.clock_share
            stops, saves = stops or report.stops, saves or report.saves
        return stops, saves

    @property
    def validates(self) -> bool:
        return validates(self.cfg, self.step, self.progress, self.progress_before)

    @property
    def is_log_step(self) -> bool:
        return self.step == 1 or is_multiple(self.step, self.cfg.log_every)

    @property
    def logs(self) -> bool:
        return self.validates or self.is_log_step

    @property
    def is_time_to_save(self) -> bool:
        """Whether this is rank 0 and the last checkpoint is older than --save_every_minutes."""
        age = time.perf_counter() - self.last_save
        return self.world.is_main and 0 < 60 * self.cfg.save_every_minutes < age

    def validate_and_log(self) -> None:
        """Validate and write a row of metrics.csv, if that is due after this step."""
        if not self.logs:
            return
        gc.collect()
        self.values |= self.pace()
        self.logged = (self.step, self.clock.seconds, self.flops)
        if self.validates:
            self.validate()
        self.log.row(self.values, self.progress)
        if self.validates:
            self.log.picture(self.data.held_out.num_documents, self.data.bar, at_end=False)
        if self.target:
            self.log.note(target_in_words(self.target))

    def validate(self) -> None:
        _, rows_at_once = micro_batch_shape(self.cfg, self.world.size)
        with self.world.memory_of("validation"):
            result = self.data.held_out.evaluate(self.losses_of, rows_at_once, self.world)
        if not math.isfinite(result.val_loss) or not math.isfinite(result.val_bpb):
            self.log.withdraw(self.step)    # nobody should resume from this step's checkpoint
            raise NonFinite(f"the val_loss of step {self.step} is {result.val_loss}; {CURE}")
        self.values |= {"val_loss": result.val_loss, "val_bpb": result.val_bpb}
        self.document_nats = result.nats
        if result.val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step = result.val_loss, self.step
            self.log.keep_best(self.step)
        if result.val_loss <= self.cfg.target_loss:
            self.target = {"target_loss": self.cfg.target_loss, "step": self.step,
                           "tokens": self.step * self.cfg.batch_tokens,
                           "train_seconds": round(self.clock.seconds, 2)}

    def pace(self) -> dict[str, float]:
        """How far the run is, and its speed since the last row of metrics.csv."""
        cfg, seconds = self.cfg, self.clock.seconds
        step, second, flops = self.logged
        speed = cfg.batch_tokens * (self.step - step) / (seconds - second)
        values = {"step": self.step, "tokens": self.step * cfg.batch_tokens,
                  "epoch": self.step * cfg.rows_per_step / self.data.rows.num_rows, "train_seconds": seconds,
                  "tokens_per_second": speed, "peak_memory_mib": self.world.peak_memory_mib("training"),
                  "flops": self.flops}
        peak = self.world.peak_flops(cfg)
        return values | ({"mfu": (self.flops - flops) / (seconds - second) / peak} if peak else {})

    # ---- stopping and resuming

    @property
    def told_to_stop(self) -> int:
        """The number of the stop signal received, SIGPIPE if the pipe for output was closed, or 0."""
        return self.signals.received or signal.SIGPIPE * self.log.unheard

    def save(self) -> None:
        """Write a checkpoint: all that a run needs to resume, on any number of processes.

        raises  NonFinite if the weights are not finite
        """
        begun = time.perf_counter()
        self.world.synchronize()
        check_weights(self.model, self.step)
        weights = self.model.state_dict().items() if self.world.is_main else ()
        state = {
            "step": self.step, "tokens": self.step * self.cfg.batch_tokens,
            "model": {name: value.cpu() for name, value in weights},
            "optimizer": self.optimizer.state(),
            "loss_scale": self.loss_scale.state(),
            "random_states": self.world.gather(self.world.random_state()),
            "values": self.values, "logged": self.logged, "flops": self.flops,
            "best": {"val_loss": self.best_val_loss, "step": self.best_step},
            "progress_before": self.progress_before,
            "train_seconds": self.clock.seconds, "save_seconds": self.save_seconds,
            "compile_seconds": self.compile_seconds,
            "peak_memory_mib": {phase: self.world.peak_memory_mib(phase) for phase in self.world.peaks},
            "micro_batch_tokens": self.cfg.micro_batch_tokens}
        self.log.checkpoint(state)
        self.last_save = time.perf_counter()
        self.save_seconds += self.last_save - begun

    def load(self, saved: dict | None) -> None:
        """Resume from the checkpoint that rank 0 passes; all other ranks pass None."""
        if saved:
            self.model.load_state_dict(saved["model"])
        self.world.share_weights(self.model)
        self.optimizer.load(saved and saved["optimizer"])
        large = ("model", "optimizer", "rows")
        small = self.world.same(saved and {key: saved[key] for key in saved if key not in large})
        self.step, self.values, self.logged = small["step"], small["values"], small["logged"]
        self.flops = small["flops"]
        self.clock.stopped_at = small["train_seconds"]
        self.clock_share = self.clock.share(self.cfg)
        self.progress = self.model.progress = budget_used(self.cfg, self.step, self.clock_share)
        self.progress_before = small.get("progress_before", 0.0)
        self.best_val_loss, self.best_step = small["best"]["val_loss"], small["best"]["step"]
        self.save_seconds = small["save_seconds"]
        self.compile_seconds += small.get("compile_seconds", 0.0)
        self.loss_scale.load(small["loss_scale"])
        self.world.peaks |= small["peak_memory_mib"]
        states = small["random_states"]
        if len(states) == self.world.size:      # states of another number of processes do not fit
            self.world.set_random_state(states[self.world.rank])


# ------------------------------------------------------------------------------------------------
# Start and end
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Data:
    """The data that a run trains and validates on."""
    dataset: Dataset
    tokenizer: Encoding
    rows: Rows
    held_out: HeldOut
    split: str

    @property
    def bar(self) -> dict:
        """xz's figures from the manifest; the values are None unless the whole val split is validated on."""
        facts = self.dataset.manifest if self.held_out.is_whole and self.split == VAL else {}
        return {fact: facts.get(fact) for fact in ("xz_bpb", "xz_training_bytes")}


def open_data(cfg: RunConfig, world: World) -> tuple[RunConfig, Data]:
    """The verified data of a run, and its Config with the vocabulary and the budget that follow from them.

    raises  UserError on all ranks together
    """
    dataset, tokenizer = world.raise_on_all_ranks(lambda: open_dataset(cfg.data, cfg.tokenizer))
    dataset = dataset.verified(world)

    def rows_and_budget() -> tuple[RunConfig, Data]:
        cfg.require_vocabulary(tokenizer.name, tokenizer.n_vocab)
        rows = Rows(dataset.tokens("train"), cfg, tokenizer.eot_token)
        full = dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab).with_budget(rows.num_rows * cfg.seq_len)
        return full, Data(dataset, tokenizer, rows, HeldOut(dataset.tokens(cfg.held_out), full, tokenizer),
                          cfg.held_out)
    return world.raise_on_all_ranks(rows_and_budget)


def open_run(cfg: RunConfig, world: World) -> tuple[RunConfig, TextIO | None, dict | None]:
    """Rank 0's Config on all ranks; on rank 0 alone, also the log and checkpoint of a run to resume."""
    cfg = world.same(cfg)

    def hold_and_read() -> tuple[TextIO | None, dict | None]:
        if not cfg.resume or not world.is_main:
            return None, None
        folder = Path(cfg.resume)
        return locked_log(folder), read_checkpoint(folder)
    return cfg, *world.raise_on_all_ranks(hold_and_read)


def tasks_of(cfg: RunConfig) -> dict[str, Task | None]:
    """The benchmarks that --benchmarks names; None for one that is not downloaded."""
    names = BENCHMARKS if cfg.benchmarks == "all" else map(str.strip, cfg.benchmarks.split(","))
    names = [name for name in names if name]
    cfg.require("benchmarks", set(names) <= set(BENCHMARKS),
                f"all, or some of {', '.join(BENCHMARKS)}, separated by commas")
    return {name: benchmark_if_here(name, cfg.hellaswag_rows if name == "hellaswag" else 0) for name in names}


def start(experiment: Experiment, cfg: RunConfig, world: World) -> None:
    """Train, validate, sample and leave a run folder; or resume a run that was stopped."""
    on_all = world.raise_on_all_ranks
    cfg, text, saved = open_run(cfg, world)
    on_all(lambda: cfg.require_machine(world.device, world.dtype))
    cfg = with_speed(cfg, world)
    cfg, data = open_data(cfg, world)
    tasks = on_all(lambda: tasks_of(cfg) if world.is_main else None)
    tasks = world.same(tasks)   # other machines need not have the files
    identity = identity_of(experiment.script, cfg, world, data.tokenizer, data.dataset)
    require_equal_machines(identity, world)
    changes = world.same(saved and changes_since(saved, cfg, identity)) or []
    if changes and not cfg.resume_changed:
        raise SharedError(f"{cfg.resume} cannot be resumed as is: {'; '.join(changes)}. "
                          "Undo that, or resume anyway with --resume_changed")
    on_all(lambda: world.is_main and cfg.compare_to and baseline(cfg.compare_to))
    kernels = trusted_kernels(experiment, cfg, world, choose_kernels(cfg, world))
    model, optimizer = make_model(experiment, cfg, data.tokenizer.eot_token, world, kernels)
    losses_of = TokenLosses(model, world, kernels.compiled)
    on_all(lambda: saved and check_shapes(saved["model"], model))
    log = on_all(lambda: RunLog(cfg, COLUMNS, identity, data.tokenizer, saved, text, world.is_main))
    with log, say_how_to_resume(log):
        # config.json does not get the sizes chosen here; it keeps the knobs as they were given
        sized = world.same(memory.choose_micro_batch(experiment, cfg, world, kernels, saved))
        needs = memory.memory_estimate_mib(experiment, sized, world, kernels)
        if world.is_main:
            log.say(plan(sized, model, log.folder))
        log.say("\n".join([*introduction(sized, world, model, kernels, needs),
                           *describe_data(cfg, data.dataset, data.rows, data.held_out),
                           *describe_tasks(tasks), *describe_git(identity), *model.remarks(),
                           *optimizer.remarks(), *drawn_in_one_stream(model)]))
        if kernels.compiled:
            log.say("compiling   kernels; on a CPU about a minute the first time, less when they are cached")
        begun = time.perf_counter()
        sized = ready(experiment, sized, world, kernels, losses_of, optimizer, log.say)
        compile_seconds = time.perf_counter() - begun
        each = step_seconds(losses_of, optimizer, sized, world)
        run = Run(experiment, sized, world, model, optimizer, data, losses_of, log, Clock(world),
                  LossScale(enabled=world.dtype == torch.float16), compile_seconds=compile_seconds)
        torch.manual_seed(cfg.seed + 1 + world.rank)
        if cfg.resume:
            run.load(saved)
        for change in changes:
            log.say(f"resumed although {change}")
        left = time_to_the_end(sized, each, run.progress)
        log.say(f"kernels ready after {compile_seconds:.1f} s; training "
                + (f"resumes after step {run.step}" if cfg.resume else "begins") + f", {left}")
        saved = None    # its memory is needed for training
        with StopSignals() as run.signals, collector_at_rest():
            experiment.train(run)
        with StopSignals(at_once=True):     # everything is saved, so there is no step to wait for
            finish(run, [task for task in tasks.values() if task])


@contextlib.contextmanager
def say_how_to_resume(log: RunLog) -> Iterator[None]:
    """If an error or a signal ends the run early, say in one line how to resume it."""
    try:
        yield
    except NonFinite as error:
        log.note(str(error))
        log.summary(f"failed: {error}", {})
        raise SharedError(f"{error}; {log.last_good()}") from error
    except Stopped as stop:
        log.say(f"stopped by {signal.Signals(stop.args[0]).name}; {log.last_good()}")
        sys.exit(128 + stop.args[0])
    except KeyboardInterrupt:
        log.say(f"interrupted; {log.last_good()}")
        raise
    except OSError as error:
        where = error.filename or log.folder
        raise UserError(f"{error.strerror or first_line(error)}: {where}; {log.last_good()}") from error
    except UserError:
        raise
    except Exception as error:
        if is_recompile_limit(error):
            raise UserError("torch.compile gave up: a compiled function met too many shapes or values of a "
                            "Python number; TORCH_LOGS=recompiles lists them; --compile off avoids this; "
                            f"{log.last_good()}") from error
        if not memory.is_out_of_memory(error):
            raise
        raise UserError("out of memory; a smaller --micro_batch_tokens needs less and does not change the "
                        f"results; {log.last_good()}") from error


def finish(run: Run, tasks: list[Task]) -> None:
    """Write weights, benchmark scores, samples, picture and summary, then print the results."""
    cfg, model, held_out, log, tokenizer = run.cfg, run.model, run.data.held_out, run.log, run.data.tokenizer
    results = run.values | {"compile_seconds": round(run.compile_seconds, 1)}
    model.progress = 1.0
    unsaved = False
    if cfg.save_model:
        try:
            results |= log.weights(model)
        except OSError as error:
            log.no_weights(error)
            unsaved = True
    with run.world.memory_of("evaluation"):
        if tasks:
            results["benchmarks"] = {task.name: scores_of(run, task) for task in tasks}
        if not run.world.is_main:
            return
        model.eval()
        model.flex = None       # samples have many lengths, none of which is worth compiling for
        # importing torch.compiler takes a second, unless a compiled model has imported it already
        compiled = run.losses_of.compiled
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            samples = sample_held_out(model, tokenizer, held_out, cfg)
    log.samples(samples)
    if run.document_nats is not None:
        table = held_out.table(run.document_nats)
        log.held_out(table)
        if by_source := bpb_by_source(table, run.data.dataset.documents_by_source(run.data.split)):
            results["val_bpb_by_source"] = by_source
    text = held_out.text()
    results |= run.data.bar
    log.picture(held_out.num_documents, run.data.bar)
    results["parameters"] = num_parameters(model)
    results["tokens_per_second"] = results["tokens"] / results["train_seconds"]
    results["held_out_tokens"], results["held_out_bytes"] = len(held_out.tokens), len(text)
    results["held_out_documents"] = held_out.num_documents
    results["held_out_sha256"] = hashlib.sha256(text).hexdigest()
    results["budget"], results["target"] = what_ended(cfg, run.step, run.target), run.target
    results["checkpoint_seconds"] = round(run.save_seconds, 2)
    for phase in ("validation", "evaluation"):
        results[f"peak_memory_mib_{phase}"] = round(run.world.peak_memory_mib(phase), 1)
    summary = log.summary("finished", results)
    if not unsaved:
        remove_checkpoints(log.folder, keep_best=cfg.save_model and run.best_step < run.step)
    for line in [*conclusion(cfg, log.folder, summary, samples), *last_lines(summary)]:
        log.say(line)


def scores_of(run: Run, task: Task) -> dict:
    """Score the model on a benchmark, by all processes; the results for the summary."""
    run.log.say(f"scoring {counted(len(task.questions), 'row')} of {BENCHMARKS[task.name].title}")
    _, rows_at_once = micro_batch_shape(run.cfg, run.world.size)
    scores = score(run.losses_of, run.data.tokenizer, task.questions, rows_at_once, run.world)
    run.log.benchmark(task.name, scores.items)
    for line in scores.lines():
        run.log.note(line)
    return task.facts() | scores.summary() | scored_on(run.experiment, run.world)


def check(experiment: Experiment, cfg: RunConfig, world: World) -> bool:
    """Print what a run would do (--check); returns False if it could not train."""
    problems = []
    cfg = with_speed(cfg, world)
    kernels = choose_kernels(cfg, world)
    try:
        cfg.require_machine(world.device, world.dtype)
    except UserError as error:
        problems.append(str(error))
    try:
        cfg, data = open_data(cfg, world)
        about_data = [*describe_data(cfg, data.dataset, data.rows, data.held_out),
                      f"tokenizer   {data.tokenizer.name}"]
    except UserError as error:
        problems.append(str(error))
        cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 50257).with_budget(2**53)
        about_data = [f"data        not usable; a vocabulary of {cfg.vocab_size:,} is assumed"]
    try:
        about_data += describe_tasks(tasks_of(cfg))
        if cfg.compare_to:
            baseline(cfg.compare_to)
    except UserError as error:
        problems.append(str(error))
    with torch.device("meta"):
        model = experiment.Model(cfg, 0, world.dtype, kernels.flex)
    cfg = memory.choose_micro_batch(experiment, cfg, world, kernels)
    needs = memory.memory_estimate_mib(experiment, cfg, world, kernels)
    free_memory, free_disk = world.free_memory_mib(), shutil.disk_usage(places.ROOT).free / 2**20
    lines = [*introduction(cfg, world, model, kernels, needs), *about_data,
             f"free        {free_memory:,.0f} MiB of memory for each process, {free_disk:,.0f} MiB of disk"]
    lines += time_estimate(cfg, model, world)
    if needs > free_memory:
        problems.append("the run needs more memory than is free; use "
                        + memory.memory_advice(experiment, cfg, world, kernels))
    weights = 4 * num_parameters(model) / 2**20
    if free_disk < 100 + (weights if cfg.save_model else 0):
        problems.append(f"only {free_disk:,.0f} MiB of disk are free")
    if world.is_main:
        print("\n".join([*lines, *(f"problem     {problem}" for problem in problems),
                         "cannot train" if problems else "ready to train"]), flush=True)
    world.barrier()     # torchrun kills all processes once one fails, so rank 0 prints first
    return not problems
