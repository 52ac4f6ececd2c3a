"""What a run tells its user: at the start, what it will do and need; at the end, the results."""

import os
import shlex
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchtop.batches import Rows, micro_batch_shape
from benchtop.budget import MOST_EPOCHS
from benchtop.command_line import counted, minutes, program
from benchtop.conclusions import standing
from benchtop.errors import UserError
from benchtop.evaluation import HeldOut
from benchtop.groups import read_run
from benchtop.machine import Kernels, World
from benchtop.shards import Dataset, too_few
from benchtop.tasks import Task, command_to_fetch
from benchtop.xz import bar_in_words

# ------------------------------------------------------------------------------------------------
# Before
# ------------------------------------------------------------------------------------------------

def plan(cfg, model: nn.Module, folder: Path) -> str:
    return (f"plan        train {num_parameters(model) / 1e6:.3g} million parameters for "
            f"{budget_in_words(cfg)}; results go to {os.path.relpath(folder)}")


def introduction(cfg, world: World, model: nn.Module, kernels: Kernels, memory_mib: float) -> list[str]:
    count, rows = micro_batch_shape(cfg, world.size)
    return [
        f"device      {world.size} x {world.device_name()}, torch {torch.__version__}",
        f"dtype       {str(world.dtype).removeprefix('torch.')}: {world.dtype_reason}",
        f"compile     {'on' if kernels.compiled else 'off'}: {kernels.compile_reason}",
        f"attention   by {kernels.attention}",
        *cfg.remarks(),
        f"model       {num_parameters(model):,} parameters: {counted(cfg.num_layers, 'layer')}, "
        f"width {cfg.model_dim}, {counted(cfg.num_heads, 'head')} of {cfg.head_dim}, "
        f"{cfg.vocab_size:,} tokens",
        f"budget      {budget_in_words(cfg)}; {world.size} x {count} micro-batches of {rows} x {cfg.seq_len}",
        f"memory      about {memory_mib:,.0f} MiB for each process",
    ]


def describe_git(identity: dict) -> list[str]:
    problem = identity["git_problem"]
    return [f"git         warning: the commit of the code is not known ({problem})"] if problem else []


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def budget_in_words(cfg) -> str:
    clock = f"{counted(cfg.train_minutes, 'minute')} of training"
    if not cfg.num_steps:
        return f"{clock} in steps of {cfg.batch_tokens:,} tokens"
    steps = f"{steps_in_words(cfg)} ({cfg.train_tokens:,} in all)"
    return steps + (f", or {clock} if that ends first" if cfg.train_minutes else "")


def steps_in_words(cfg) -> str:
    return f"{counted(cfg.num_steps, 'step')} of {cfg.batch_tokens:,} tokens"


def what_ended(cfg, step: int, target: dict | None) -> str:
    """The limit that ended the run: its steps, its minutes, or its target loss."""
    if target:
        return f"val_loss {target['target_loss']:g}"
    return (steps_in_words(cfg) if step == cfg.num_steps else
            f"{counted(cfg.train_minutes, 'minute')} of training")


def describe_tasks(tasks: dict[str, Task | None]) -> list[str]:
    return [f"{name:<12}" + (f"{counted(len(task.questions), 'row')} at the end{task.note}" if task else
                             f"not downloaded; run: {command_to_fetch(name)}")
            for name, task in tasks.items()]


def describe_data(cfg, dataset: Dataset, rows: Rows, held_out: HeldOut) -> list[str]:
    used = rows.num_tokens / rows.bases[-1]
    lines = [f"data        {dataset.folder.name}: {rows.bases[-1]:,} tokens, {used:.0%} in training rows",
             f"held out    {len(held_out.tokens):,} tokens of {counted(held_out.num_documents, 'document')}"]
    if few := too_few(held_out.num_documents, len(held_out.tokens)):
        lines.append(f"note        {few}{'' if held_out.is_whole else '; --val_tokens 0 uses all'}")
    if cfg.num_steps:
        epochs = cfg.num_steps * cfg.rows_per_step / rows.num_rows
        advice = f" (beyond {MOST_EPOCHS}, repeated text teaches little: use more text or fewer steps)"
        lines.append(f"epochs      {counted(cfg.num_steps, 'step')}: {epochs:.2f} epochs"
                     + (advice if epochs > MOST_EPOCHS else ""))
    return lines


def operations_of(cfg, model: nn.Module) -> float:
    """Floating-point operations of all steps, averaging the cost per token over ten points of the budget."""
    each = []
    for tenth in range(10):
        model.progress = tenth / 10
        each.append(model.flops_per_token())
    model.progress = 1.0
    return cfg.num_steps * cfg.batch_tokens * float(np.mean(each))


def time_estimate(cfg, model: nn.Module, world: World) -> list[str]:
    """Estimated time and cost of the budget, assuming 40 % of the devices' peak FLOP/s."""
    operations, peak = operations_of(cfg, model), world.peak_flops(cfg)
    if not cfg.num_steps:
        seconds, how = 60 * cfg.train_minutes, "the budget"
    elif peak:
        seconds = min(operations / (0.4 * peak), 60 * cfg.train_minutes or float("inf"))
        how = f"{operations:.1e} floating-point operations at an assumed 40 % of {peak / 1e12:,.0f} TFLOP/s"
    else:
        lines = [f"time        not known: {operations:.1e} floating-point operations, and the peak of this "
                 "device is not listed; set --peak_tflops, or time a few steps"]
        if cfg.gpu_cost_per_hour:
            lines.append("cost        not known without the time; --peak_tflops 989 gives the cost on H100s")
        return lines
    lines = [f"time        about {duration(seconds)} of training ({how})"]
    if cfg.gpu_cost_per_hour:
        lines.append(f"cost        about {cfg.gpu_cost_per_hour * seconds / 3600:,.2f} for that time")
    return lines


def time_to_the_end(cfg, seconds_of_step: float, progress: float) -> str:
    """Estimated time for the rest of the budget, in words, without validation."""
    by_clock, by_steps = 60 * cfg.train_minutes, cfg.num_steps * seconds_of_step
    whole = min(seconds for seconds in (by_clock, by_steps) if seconds)
    return f"about {minutes(whole * (1 - progress))} remaining, estimated from one micro-batch"


def duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{minutes(seconds)} minutes"


# ------------------------------------------------------------------------------------------------
# After
# ------------------------------------------------------------------------------------------------

def conclusion(cfg, folder: Path, summary: dict, samples: list[dict]) -> list[str]:
    lines = ["", "=" * 100,
             f"run         {os.path.relpath(folder)}  (loss.png, summary.json, samples, the code that ran)",
             f"val_loss    {summary['val_loss']:.4f} nats per token on {summary['held_out_tokens']:,} tokens "
             f"of {counted(summary['held_out_documents'], 'held-out document')}",
             f"val_bpb     {summary['val_bpb']:.4f} bits per byte{verdict_in_words(summary)}",
             *(f"            {bpb:.4f} on the held-out documents of {name}"
               for name, bpb in summary.get("val_bpb_by_source", {}).items())]
    if summary["best_step"] < summary["step"]:
        lines.append(f"best        val_bpb {summary['best_val_bpb']:.4f} at step {summary['best_step']:,}")
    lines.append(f"time        {minutes(summary['train_seconds'])} of training "
                 f"at {summary['tokens_per_second']:,.0f} tokens/s, {minutes(summary['compile_seconds'])} of "
                 f"compiling; peak memory {summary['peak_memory_mib']:,.0f} MiB")
    if summary.get("target"):
        lines.append(target_in_words(summary["target"]))
    for name, result in summary.get("benchmarks", {}).items():
        lines.append(f"{name:<12}{task_in_words(result)}")
    if "cost" in summary:
        lines.append(f"cost        {summary['cost']:.2f}")
    if cfg.compare_to:
        try:
            lines.append(f"compare     {standing(read_run(folder), cfg.compare_to)}")
        except (UserError, OSError) as error:       # the baseline was removed after the run began
            lines.append(f"compare     not possible: {error}")
    if samples:
        text = samples[0]["prompt"] + "⟨⟩" + samples[0]["text"]
        lines += ["sample      beginning of a held-out document ⟨⟩ continuation:",
                  *("            " + line for line in text.splitlines())]
    if cfg.save_model:
        sample = shlex.join([*program(), "--sample", os.path.relpath(folder)])
        lines.append(f"sample it   {sample} --prompt \"...\"")
    lines += [f"try next    {next_command(cfg, summary)}",
              "            your own text: see \"Your own text\" in README.md", "=" * 100]
    return lines


def verdict_in_words(summary: dict) -> str:
    """Whether the model beats xz, which has also read the training text, on the held-out text."""
    if not summary.get("xz_bpb"):
        return ""
    verdict = "better" if summary["val_bpb"] < summary["xz_bpb"] else "worse"
    return f" ({bar_in_words(summary)}: {summary['xz_bpb']:.4f}; the model is {verdict})"


def next_command(cfg, summary: dict) -> str:
    """The command that started the run, with one more layer and another name."""
    command = summary.get("command", "")
    try:
        words = shlex.split(command)
    except ValueError:      # an earlier version recorded commands without quoting
        words = command.split()
    replaced, flags, skip = ("--num_layers", "--model_name", "--resume"), [], False
    for word in words[1:]:
        if not skip and word.split("=")[0] not in (*replaced, "--resume_changed"):
            flags.append(word)
        skip = not skip and word in replaced
    return shlex.join([*program(), *flags, "--num_layers", str(cfg.num_layers + 1), "--model_name", "deeper"])


def target_in_words(target: dict) -> str:
    steps = counted(target["step"], "step")
    return (f"target      val_loss {target['target_loss']:g} is reached after {steps}, "
            f"{target['tokens']:,} tokens and {minutes(target['train_seconds'])} of training")


def task_in_words(result: dict) -> str:
    acc = result["acc"]
    other = (f"perplexity {result['perplexity']:.2f}" if "perplexity" in result else
             f"{result['acc_norm_bytes']['value']:.4f} by bytes")
    return (f"{acc['value']:.4f} right ({acc['low']:.4f} to {acc['high']:.4f}), {other}; "
            f"chance {result['chance']:.4f}; {counted(result['rows'], 'row')}")
