"""Train a GPT. This file is the experiment: copy it, change a few lines, run it.

    python train_gpt.py --preset demo                              one process: a CPU, or the first GPU
    torchrun --nproc_per_node=8 train_gpt.py --preset gpt2-small   one process per GPU; the same training
    python train_gpt.py --check --preset xs                        what that run would do, and whether it can
    python train_gpt.py --sample experiments/RUN --prompt "It"     go on with a text, as the run learned to
    python train_gpt.py --help                                     every knob with its help

It reads token shards (download_fineweb.py makes them) and a tokenizer (train_tokenizer.py makes it), and
leaves a folder experiments/DATE_TIME_NAME with all that made the result. It touches no network, but that
tiktoken fetches its own `gpt2` encoding the first time it is asked for.

Sections, by how soon you need them: Config, Rules, Model, Optimizer, Data, Evaluation, FP8, World, Run log,
Training.
Where experiments usually edit, search for "EDIT": config | mask | layer | optimizer | schedule.

Shapes:  B batch   T tokens in a row   D model width   H heads   K width of one head   F MLP hidden
         V vocabulary   L layers   N tokens in a chunk   Q queries at once   J blocks of a row
         G groups of targets   S tokens in a group's sample
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import itertools
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import EllipsisType
from typing import ClassVar, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiktoken import Encoding
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import documents
from documents import (
    Parser,
    UserError,
    available_cores,
    command,
    first_line,
    leave_the_word_to_the_first,
)
from download_hellaswag import (
    BENCHMARKS,
    Question,
    Scores,
    Task,
    benchmark_if_here,
    command_to_fetch,
    hellaswag_accuracy,
)
from run_folder import (
    RunLog,
    changes_since,
    find_run,
    identity_of,
    locked_log,
    minutes,
    program,
    read_checkpoint,
    read_weights,
    remove_checkpoints,
    saved_knobs,
    saved_tokenizer,
    summary_of,
)
from shards import Dataset, open_dataset
from train_tokenizer import encode, token_bytes

ROOT = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------
# Config: every knob, its default and its help. The field is the flag; the comment is the help.
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    script: ClassVar[Path] = Path(__file__)     # where these knobs and their helps stand
    head_width: ClassVar[int] = 128             # that heads have, more or less, by rule
    # EDIT: config
    # the run
    model_name: str = "gpt"           # last part of the run folder's name
    preset: str = ""                  # demo, xs, s, m, gpt2-small, gpt2-medium or gpt2-xl: flags win
    tokenizer: str = ""               # folder in tokenizers/; empty: the one the data was made with
    data: str = ""                    # folder in data/; empty: the only one there is (for the tokenizer)
    seed: int = 0                     # decides weights, order of the data and samples
    check: bool = False               # only say what the run would do, and whether it could
    sample: str = ""                  # folder of a run with --save_model: only write texts with its weights
    prompt: str = ""                  # what they begin with; without one, lines are read from the terminal
    # stopping and going on
    resume: str = ""                  # folder of a run to go on with; auto: newest unfinished one of the name
    resume_changed: bool = False      # go on although code, data or knobs are not those the run began with
    save_every_steps: int = 0         # steps between checkpoints; 0: by minutes and before validations only
    save_every_minutes: float = 10    # minutes between checkpoints; 0: by steps and before validations only
    # the budget; what is 0 follows from the rest by the rules below Config
    train_tokens: int = 4_096_000     # tokens to train on, for steps and batch where those are 0
    num_steps: int = 0                # optimizer steps; 0: as many as train_tokens take
    train_minutes: float = 0          # end the schedule after so much training if that comes first; 0: never
    target_loss: float = 0            # end training when val_loss is this low, and say when; 0: no target
    batch_tokens: int = 0             # tokens of a step, over all processes; 0: by the rule for train_tokens
    micro_batch_tokens: int = 0       # tokens a process takes at once, at most; 0: as many as memory holds
    seq_len: int = 512                # tokens in a row
    max_doc_len: int = 0              # longer documents are cut into parts of this many tokens; 0: of a row
    # the model
    num_layers: int = 6               # transformer layers
    num_heads: int = 0                # attention heads; 0: about one for 128 of the width
    model_dim: int = 256              # width of the model
    vocab_size: int = 0               # 0: the tokenizer's; any other number must be the tokenizer's
    mlp_ratio: int = 4                # hidden width of an MLP, in model widths
    value_embeddings: int = 2         # tables of token values, each for one layer from either end
    attention_cap: float = 15         # the attention logit of a query and a key that are equal
    logit_cap: float = 15             # logits are squeezed into plus or minus this; 0: as they are
    long_window: int = 0              # tokens every fourth layer and the last look back; 0: the whole row
    short_window: int = 0             # tokens the other layers look back; 0: half a row, and at least 512
    window_warmup_frac: float = 0     # first part of training, in which windows grow from 128 tokens; 0: none
    depth_warmup_frac: float = 0.9    # first part, in which only layer 1 works; a rule bounds it; 0: none
    sampled_softmax_frac: float = 0.9  # first part, with targets told from a sample of tokens; likewise
    softmax_sample: int = 0           # tokens in that sample; 0: by the rule in class Candidates
    # the optimizer; learning rates are for 524,288 tokens a step and width 768, rules scale them
    muon_lr: float = 0.05             # matrices in layers
    embed_lr: float = 0.6             # token embedding and value embeddings
    head_lr: float = 0.008            # output head
    scalar_lr: float = 0.04           # mixing scalars
    warmup_steps: int = 0             # steps in which the learning rate climbs from 0
    cooldown_frac: float = 0.6        # last part of training, in which the learning rate falls
    final_lr_frac: float = 0.1        # to this share of its height
    grad_clip: float = 0              # gradients that are longer, all together, are cut to it; 0: none are
    # looking at the run
    log_every: int = 10               # steps between rows of metrics.csv
    val_every: int = 100              # steps between validations; 0: only at the end
    val_tokens: int = 0               # held-out tokens to validate on; 0: all there are
    benchmarks: str = "hellaswag"     # scored if here: hellaswag, arc_easy, piqa, lambada; all; empty: none
    hellaswag_rows: int = 0           # HellaSwag rows to score at the end, if it is here; 0: all 10,042
    num_samples: int = 4              # texts to write at the end
    sample_tokens: int = 64           # tokens in each
    temperature: float = 0.8          # of sampling; 0 takes the likeliest token
    top_k: int = 50                   # sample among this many of the likeliest tokens; 0: among all
    save_model: bool = False          # leave the weights as model.safetensors
    compare_to: str = ""              # folder or glob of runs, from which the end is measured in their sigmas
    wandb: str = ""                   # project of Weights & Biases to log to, too; WANDB_MODE=offline works
    tensorboard: bool = False         # leave event files for TensorBoard in the run folder, too
    gpu_cost_per_hour: float = 0      # price of all GPUs (or the box) per hour, for the cost in summary.json
    # the machine
    device: str = "auto"              # cpu, cuda, or auto: cuda if there is one
    dtype: str = "auto"               # bfloat16, float16, float32, or auto: what is native to the hardware
    compile: str = "auto"             # on, off, or auto: on where torch.compile works
    fp8: bool = False                 # the head's products in FP8; GPUs of capability 8.9 or more
    peak_tflops: float = 0            # of one device, for the MFU; 0: from a table, or no MFU if not there
    deterministic: bool = False       # only kernels that repeat to the bit, as CPUs have; slower on a GPU
    timeout_seconds: float = 600      # give up on another process that is silent for so long

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else field.type
            self.require(field.name, isinstance(value, kinds), f"of type {field.type.__name__}")
            if field.type in (int, float):
                self.require(field.name, 0 <= value < 2**53, "0 or more, and less than 2**53")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.model_name):
            raise UserError("--model_name must be letters, digits, '.', '_' and '-', "
                            f"since it becomes a folder; it is {self.model_name!r}")
        for knob, allowed in (("device", ("auto", "cpu", "cuda")), ("compile", ("auto", "on", "off")),
                              ("dtype", ("auto", "bfloat16", "float16", "float32")),
                              ("preset", ("", *PRESETS))):
            self.require(knob, getattr(self, knob) in allowed, f"one of {', '.join(filter(None, allowed))}")
        self.require("benchmarks", set(self.benchmark_names) <= set(BENCHMARKS),
                     f"all, or some of {', '.join(BENCHMARKS)}, with commas between")
        for knob in ("train_tokens", "num_layers", "model_dim", "mlp_ratio", "log_every", "attention_cap",
                     "timeout_seconds"):
            self.require(knob, getattr(self, knob) > 0, "more than 0")
        # logits span twice the cap, and exp(-80) is still a float32
        self.require("logit_cap", self.logit_cap <= 40, "at most 40")
        self.require("timeout_seconds", self.timeout_seconds <= 10**7, "at most 10,000,000")
        for knob in ("cooldown_frac", "final_lr_frac", "window_warmup_frac", "depth_warmup_frac",
                     "sampled_softmax_frac"):
            self.require(knob, getattr(self, knob) <= 1, "between 0 and 1")
        self.require("seq_len", self.seq_len >= 2, "at least 2")
        self.require("max_doc_len", self.max_doc_len != 1, "at least 2, or 0")
        for knob, value in by_rule(self).items():
            object.__setattr__(self, knob, value)
        self.require("batch_tokens", self.batch_tokens % self.seq_len == 0,
                     f"a multiple of --seq_len, {self.seq_len}")
        if self.fp8:
            for knob in ("seq_len", "model_dim", "softmax_sample"):
                self.require(knob, getattr(self, knob) % 16 == 0, "a multiple of 16 for --fp8")
        self.require("micro_batch_tokens", not 0 < self.micro_batch_tokens < self.seq_len,
                     f"at least --seq_len, {self.seq_len}, or 0")
        self.require("model_dim", self.model_dim % (4 * self.num_heads) == 0,
                     f"a multiple of 4 x --num_heads, {4 * self.num_heads}, "
                     "so that heads can rotate by pairs")
        self.require("sample_tokens", self.sample_tokens > 0 or self.num_samples == 0,
                     "more than 0 for samples")

    def require(self, knob: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"--{knob} must be {rule}; it is {getattr(self, knob)!r}")

    @classmethod
    def preset_knobs(cls, preset: str) -> dict:
        """The knobs that a preset sets, of those there are here."""
        names = {field.name for field in dataclasses.fields(cls)}
        return {knob: value for knob, value in PRESETS.get(preset, {}).items() if knob in names}

    def new_model(self, eot_id: int, dtype: torch.dtype, flex: dict | None = None) -> "Model":
        """What these knobs configure; another script with the same loop has a model of its own here."""
        return GPT(self, eot_id, dtype, flex)

    @property
    def optimizer_class(self) -> type["Optimizer"]:
        return Optimizer

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def num_value_tables(self) -> int:
        """A table serves two layers, so there are no more than half as many."""
        return min(self.value_embeddings, self.num_layers // 2)

    @property
    def rows_per_step(self) -> int:
        return self.batch_tokens // self.seq_len

    @property
    def benchmark_names(self) -> list[str]:
        names = BENCHMARKS if self.benchmarks == "all" else map(str.strip, self.benchmarks.split(","))
        return [name for name in names if name]

    @property
    def padded_vocab_size(self) -> int:
        """The head has some columns more, which are never predicted: products of round sizes are faster."""
        return 64 * math.ceil(self.vocab_size / 64)


# ------------------------------------------------------------------------------------------------
# Rules: what follows from the size and the budget, so that another size needs no tuning. Their figures come
# from experiments/RECIPE.md and, for large budgets, from published runs.
# ------------------------------------------------------------------------------------------------

def by_rule(cfg: Config) -> dict[str, int]:
    """Values for the knobs that are 0.

    batch    the power of two nearest to 8,192 (D / 1 million)^0.59 for D tokens: what was best of 2,048 to
             16,384 here, and, for 700 million, the 524,288 of Modded-NanoGPT's record 21; the demo and the
             presets of GPT-2's sizes have their own
    heads    as many as make them about head_width wide and even enough to rotate
    windows  one layer in four reads the whole row, the others half of it
    """
    values = {}
    if not cfg.batch_tokens:
        power = round(math.log2(8192 * (cfg.train_tokens / 1e6) ** 0.59))
        values["batch_tokens"] = cfg.seq_len * max(1, round(2**power / cfg.seq_len))
    if not cfg.num_steps:
        values["num_steps"] = math.ceil(cfg.train_tokens / (cfg.batch_tokens or values["batch_tokens"]))
    if not cfg.num_heads:
        fitting = (heads for heads in range(max(1, round(cfg.model_dim / cfg.head_width)), 0, -1)
                   if cfg.model_dim % (4 * heads) == 0)
        values["num_heads"] = next(fitting, 1)
    if not cfg.max_doc_len:
        values["max_doc_len"] = cfg.seq_len + 1     # a row's tokens, and the last one's target
    if not cfg.short_window:
        values["short_window"] = min(cfg.long_window or cfg.seq_len, max(512, cfg.seq_len // 2))
    return values


def most_early_tokens(cfg: Config) -> int:
    """After how many tokens all layers work on the whole softmax, whatever share of the budget that is.

    20 for each weight of layer 1 (the ratio of Hoffmann et al. 2022, arXiv:2203.15556, from where a larger
    model makes more of the compute): 16 million at width 256, where the warm-ups won up to 13 million.
    """
    return 20 * (4 + 2 * cfg.mlp_ratio) * cfg.model_dim**2


def learning_rates(cfg: Config) -> dict[str, float]:
    """The learning rate of each group of parameters.

    batch    all go with the twelfth root. At a given number of steps it would be the square root, but the
             batch grows with the budget, and longer runs want lower rates
    width    rates of embeddings and head go with 1 / sqrt(width); Muon's needs no rule: its updates have
             unit spectral norm, times sqrt(max(1, rows / columns)), at any width
    """
    by_batch = (cfg.batch_tokens / 524288) ** (1 / 12)
    by_width = math.sqrt(768 / cfg.model_dim)
    return {"matrices": cfg.muon_lr * by_batch, "embeddings": cfg.embed_lr * by_batch * by_width,
            "head": cfg.head_lr * by_batch * by_width, "scalars": cfg.scalar_lr * by_batch}


# larger presets train all layers and the full softmax from the start: nobody has measured the warm-ups there
ALL_AT_WORK = dict(depth_warmup_frac=0, sampled_softmax_frac=0)

PRESETS = {
    # a few minutes on two CPU cores
    "demo": dict(model_name="demo", num_steps=900, batch_tokens=8192, train_minutes=4, val_every=40,
                 log_every=5),
    # the three baselines of gpt-lab: 98, 397 and 986 million tokens
    "xs": dict(model_name="xs", num_layers=8, num_heads=4, model_dim=256, value_embeddings=2, seq_len=1024,
               train_tokens=98_304_000, val_every=125, **ALL_AT_WORK),
    "s": dict(model_name="s", num_layers=12, num_heads=6, model_dim=384, value_embeddings=3, seq_len=1024,
              train_tokens=396_492_800, val_every=125, **ALL_AT_WORK),
    "m": dict(model_name="m", num_layers=16, num_heads=12, model_dim=768, value_embeddings=4, seq_len=2048,
              train_tokens=986_316_800, val_every=125, **ALL_AT_WORK),
    # the two tracks of Modded-NanoGPT: targets 3.28 and 2.92 on FineWeb with GPT-2's tokenizer
    "gpt2-small": dict(model_name="gpt2-small", num_layers=12, num_heads=6, model_dim=768, value_embeddings=3,
                       seq_len=2048, batch_tokens=393216, num_steps=1770, val_every=125, long_window=1792,
                       short_window=896, window_warmup_frac=1, val_tokens=10_485_760, target_loss=3.28,
                       **ALL_AT_WORK),
    "gpt2-medium": dict(model_name="gpt2-medium", num_layers=16, num_heads=8, model_dim=1024,
                        value_embeddings=3, seq_len=2048, batch_tokens=524288, num_steps=5960, val_every=125,
                        short_window=1024, window_warmup_frac=1, val_tokens=10_485_760, target_loss=2.92,
                        **ALL_AT_WORK),
    # 1.5 billion parameters, for one box with 8 GPUs of 80 GB: 10 billion tokens
    "gpt2-xl": dict(model_name="gpt2-xl", num_layers=24, num_heads=16, model_dim=2048, value_embeddings=1,
                    seq_len=2048, batch_tokens=1_048_576, num_steps=9536, val_every=500, short_window=1024,
                    window_warmup_frac=1, val_tokens=10_485_760, **ALL_AT_WORK),
}


def parse_config(argv: list[str], config: type[Config] = Config) -> Config:
    """Defaults, then the preset's knobs, then the flags."""
    def layout(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=31, width=110)
    parser = Parser("Train a GPT. Each knob below is a field of Config, with its default in [].",
                    usage="%(prog)s [--KNOB VALUE ...]", add_help=False, formatter_class=layout)
    types = {field.name: field.type for field in dataclasses.fields(config)}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for title, knobs in knob_helps(config).items():
        group = parser.add_argument_group(title)
        for knob, text in knobs.items():
            shown = f"{text} [{defaults[knob]}]" if defaults[knob] not in ("", False) else text
            how = ({"action": "store_true"} if types[knob] is bool else
                   {"type": types[knob], "metavar": types[knob].__name__.upper()})
            how |= {"help": shown.replace("%", "%%"), "default": argparse.SUPPRESS}
            group.add_argument(f"--{knob}", **how)
    parser.add_argument("-h", "--help", action="help", help="show this help")
    flags = vars(parser.parse_args(argv))
    # another number of tokens decides steps and batch anew
    decided = () if "train_tokens" not in flags else ("num_steps", "batch_tokens")
    preset = config.preset_knobs(flags.get("preset", ""))
    knobs = {**{knob: value for knob, value in preset.items() if knob not in decided}, **flags}
    if "sample" in knobs:
        # of the run's own knobs those count that its weights need; a CPU decodes fastest in float32
        own = known_knobs(script_checked(Path(knobs["sample"]), config), config)
        here = {"device": "auto", "dtype": "float32", "compile": "off", "fp8": False, "resume": "",
                "num_samples": 1, "sample_tokens": 256, "seed": 0}
        return config(**own | here | knobs)
    if "resume" not in knobs:
        return config(**knobs)
    folder = find_run(knobs["resume"], knobs.get("model_name", defaults["model_name"]))
    saved = known_knobs(folder, config) if folder else {}
    knobs = {**{knob: value for knob, value in saved.items() if knob not in decided}, **knobs}
    return config(**{**knobs, "resume": str(folder or "")})


def script_checked(folder: Path, config: type[Config]) -> Path:
    """The folder of a finished run of this script; raises UserError if another one trained it"""
    script = summary_of(folder).get("script")
    if script != config.script.name:
        raise UserError(f"{folder} was trained by {script}; use that script with --sample")
    return folder


def known_knobs(folder: Path, config: type[Config] = Config) -> dict:
    """The knobs of a run that its Config still has."""
    names = {field.name for field in dataclasses.fields(config)}
    return {knob: value for knob, value in saved_knobs(folder).items() if knob in names}


def knob_helps(config: type[Config] = Config) -> dict[str, dict[str, str]]:
    """The fields of a Config under their headings, each with the comment behind it.

    One that inherits from another keeps the other's headings; what it defines itself stands under its own.
    """
    helps: dict[str, dict[str, str]] = {}
    for scripted in (part for part in reversed(config.__mro__) if "script" in vars(part)):
        source = scripted.script.read_text(encoding="utf-8")
        fields = re.search(r"^class Config\b.*?:\n(.*?)^    def ", source, re.DOTALL | re.MULTILINE)[1]
        lines = re.findall(r"^    (?:(\w+): \w+ = .*?  # (.+)|# (?!EDIT)(.+))$", fields, re.MULTILINE)
        for knob, text, title in lines:
            if title:
                heading = helps.setdefault(title, {})
            else:
                for knobs in helps.values():
                    knobs.pop(knob, None)
                heading[knob] = text
    names = {field.name for field in dataclasses.fields(config)}
    helps = {title: {knob: text for knob, text in knobs.items() if knob in names}
             for title, knobs in helps.items()}
    return {title: knobs for title, knobs in helps.items() if knobs}


# ------------------------------------------------------------------------------------------------
# Model: knows tensors and Config; no ranks, no files.
# ------------------------------------------------------------------------------------------------

def sees(query: Tensor, key: Tensor, query_doc: Tensor, key_doc: Tensor, window: Tensor) -> Tensor:
    """Whether the token at place `query` looks at the one at place `key`: the one mask of every kernel."""
    # EDIT: mask
    return (key <= query) & (query - key < window) & (query_doc == key_doc)


@dataclass(frozen=True)
class DenseMask:
    """The mask as DenseAttention computes it; docs (B, T) number of the document at each place, window ()."""
    docs: Tensor
    window: Tensor


BLOCK = 128     # places in a block of FlexAttention's mask


def block_mask(docs: Tensor, window: Tensor) -> BlockMask:
    """The mask as FlexAttention skips by it: the same function, known in blocks of 128 x 128.

    Which blocks are seen, and which as a whole, follows from the first and last document of each block; no
    T x T mask is evaluated, and every window has the same shapes, so that nothing is compiled anew.
    """
    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key, docs[batch, query], docs[batch, key], window)
    length = docs.size(1)
    # places behind the end belong to the last document; nobody reads what they see
    padded = F.pad(docs[:, None], (0, -length % BLOCK), mode="replicate")[:, 0]             # (B, 128J)
    first, last = padded[:, ::BLOCK], padded[:, BLOCK - 1::BLOCK]                           # (B, J)
    place = torch.arange(first.size(1), dtype=docs.dtype, device=docs.device)               # (J)
    apart = BLOCK * (place[:, None] - place)    # of the first query and the first key      # (J, J)
    seen = (apart >= 0) & (apart - (BLOCK - 1) < window) & (last[:, None] >= first[..., None])  # (B, J, J)
    whole = (apart > 0) & (apart + BLOCK - 1 < window)                                      # (J, J)
    whole = whole & (first[:, None] == last[..., None])                                     # (B, J, J)
    return BlockMask.from_kv_blocks(*listed(seen & ~whole), *listed(whole), BLOCK, mask_mod, (length, length))


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, J, J) which key blocks each query block reads -> their number (B, 1, J) and order (B, 1, J, J)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)                      # (B, J, J)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: DenseMask | BlockMask, scale: float,
           kernel_options: dict | None = None) -> Tensor:
    """Softmax attention over what the mask shows; all tensors (B, H, T, K); options are FlexAttention's."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=kernel_options)
    return DenseAttention.apply(q, k, v, mask.docs, mask.window, scale)


QUERIES_AT_ONCE = 512


class DenseAttention(torch.autograd.Function):
    """Attention in plain products, which compile well on a CPU; also where FlexAttention does not work.

    On two AMX cores, rows of 512 take two thirds of the time of scaled_dot_product_attention, whose backward
    is slow there. The T x T weights are kept in the dtype of the activations, Q queries at a time. Queries
    may be fewer than keys: then they are those of the last places.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, docs: Tensor, window: Tensor, scale: float) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        place = torch.arange(k.size(2), dtype=docs.dtype, device=docs.device)               # (T)
        query_place, query_docs = place[-q.size(2):], docs[:, -q.size(2):]
        all_exps, outputs, totals = [], [], []
        for part in query_blocks(q):
            seen = sees(query_place[part, None], place, query_docs[:, part, None], docs[:, None],
                        window)                                                             # (B, Q, T)
            z = (q[:, :, part] @ k.mT).to(wide) * scale                                     # (B, H, Q, T)
            z = torch.where(seen[:, None], z, -math.inf)                                    # (B, H, Q, T)
            all_exps.append(torch.exp(z - z.amax(-1, keepdim=True)).to(v.dtype))            # (B, H, Q, T)
            totals.append(all_exps[-1].sum(-1, keepdim=True, dtype=wide))                   # (B, H, Q, 1)
            outputs.append(((all_exps[-1] @ v) / totals[-1]).to(v.dtype))                   # (B, H, Q, K)
        y, total = torch.cat(outputs, dim=2), torch.cat(totals, dim=2)
        ctx.save_for_backward(q, k, v, y, total, *all_exps)
        ctx.scale = scale
        return y                                                                            # (B, H, T, K)

    @staticmethod
    def backward(ctx, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, total, *all_exps = ctx.saved_tensors
        # the part of the gradient that softmax takes away from all logits of a query alike
        common = (y_grad.to(total.dtype) * y).sum(-1, keepdim=True)                         # (B, H, T, 1)
        shared = (y_grad / total).to(y.dtype)                                               # (B, H, T, K)
        q_grads, k_grad, v_grad = [], 0, 0
        for part, exps in zip(query_blocks(q), all_exps, strict=True):
            z_grad = y_grad[:, :, part] @ v.mT - common[:, :, part]                         # (B, H, Q, T)
            z_grad = (exps * z_grad * (ctx.scale / total[:, :, part])).to(q.dtype)          # (B, H, Q, T)
            q_grads.append(z_grad @ k)                                                      # (B, H, Q, K)
            k_grad = k_grad + z_grad.mT @ q[:, :, part]                                     # (B, H, T, K)
            v_grad = v_grad + exps.mT @ shared[:, :, part]                                  # (B, H, T, K)
        return torch.cat(q_grads, dim=2), k_grad, v_grad, None, None, None


def query_blocks(q: Tensor) -> list[slice]:
    starts = range(0, q.size(2), QUERIES_AT_ONCE)
    return [slice(start, min(start + QUERIES_AT_ONCE, q.size(2))) for start in starts]


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Weights are float32; products are made in the dtype of the activations."""
    return F.linear(x, weight.to(x.dtype))


def rotary_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles by which each pair of dimensions turns at each place.

    Half of the pairs turn, at frequencies from 1 down to 1/1024; the rest stand still and carry content only.
    returns  two of (T, K/2) float32
    """
    frequency = 1024.0 ** -torch.linspace(0, 1, head_dim // 4, device=device)               # (K/4)
    frequency = torch.cat([frequency, torch.zeros_like(frequency)])                         # (K/2)
    angle = torch.arange(length, device=device)[:, None] * frequency                        # (T, K/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864); x (B, H, T, K), pairs are (i, i + K/2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)                                             # (T, K/2)
    first, second = x.chunk(2, dim=-1)                                                      # (B, H, T, K/2)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)      # (B, H, T, K)


def offset_keys(k: Tensor, begins: Tensor) -> Tensor:
    """Keys whose dimensions that do not turn are those of the token before, zeros where a document begins.

    So a query finds what came behind its like within one layer. A key of two tokens may be sqrt(2) times as
    long as that of one, and so its logits.
    k        (B, H, T, K) behind rotate()
    begins   (B, T) bool
    returns  (B, H, T, K)
    source   record 49 of Modded-NanoGPT
    """
    before = F.pad(k, (0, 0, 1, 0))[:, :, :-1].masked_fill(begins[:, None, :, None], 0)     # (B, H, T, K)
    pairs = k.size(-1) // 2
    still = torch.arange(k.size(-1), device=k.device) % pairs >= pairs // 2                 # (K)
    return torch.where(still, before, k)                                                    # (B, H, T, K)


class Layer(nn.Module):
    """One transformer layer: attention, then an MLP, each on normed input and added to the stream."""

    def __init__(self, cfg: Config, flex: dict | None = None):
        super().__init__()
        width, hidden = cfg.model_dim, cfg.mlp_ratio * cfg.model_dim
        self.num_heads, self.head_dim = cfg.num_heads, cfg.head_dim
        self.attention_scale, self.flex = cfg.attention_cap / cfg.head_dim, flex
        self.qkv = nn.Parameter(uniform(3, width, width, std=0.5 / math.sqrt(width)))
        self.out = nn.Parameter(torch.zeros(width, width))
        self.up = nn.Parameter(uniform(hidden, width, std=0.5 / math.sqrt(width)))
        self.down = nn.Parameter(torch.zeros(width, hidden))
        self.stream_mix = nn.Parameter(torch.tensor([1.0, 0.0]))     # of the stream and the embedding
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5]))      # of the values and the value embedding

    def forward(self, x: Tensor, x0: Tensor, value_embedding: Tensor | None, mask: DenseMask | BlockMask,
                begins: Tensor, cos: Tensor, sin: Tensor, past: "LayerPast | None" = None) -> Tensor:
        # EDIT: layer
        stream, embedding = self.stream_mix.to(x.dtype)
        x = stream * x + embedding * x0                                                     # (B, T, D)
        x = x + self.attention(rms_norm(x), value_embedding, mask, begins, cos, sin, past)  # (B, T, D)
        hidden = F.relu(linear(rms_norm(x), self.up)).square()                              # (B, T, F)
        return x + linear(hidden, self.down)                                                # (B, T, D)

    def attention(self, x: Tensor, value_embedding: Tensor | None, mask: DenseMask | BlockMask,
                  begins: Tensor, cos: Tensor, sin: Tensor, past: "LayerPast | None") -> Tensor:
        B, T, D = x.shape
        qkv = linear(x, self.qkv.flatten(0, 1))                                             # (B, T, 3D)
        qkv = qkv.view(B, T, 3 * self.num_heads, self.head_dim)                             # (B, T, 3H, K)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)                                       # (B, H, T, K)
        # queries and keys of root mean square 1 bound the attention logits (QK-norm, arXiv:2010.04245)
        q, k = rotate(rms_norm(q), cos, sin), rotate(rms_norm(k), cos, sin)                 # (B, H, T, K)
        own, table = self.value_mix.to(x.dtype)
        v = own * v                                                                         # (B, H, T, K)
        if value_embedding is not None:
            value_embedding = value_embedding.view(B, T, self.num_heads, self.head_dim)     # (B, T, H, K)
            v = v + table * value_embedding.transpose(1, 2).to(v.dtype)                     # (B, H, T, K)
        if past is not None:
            k, v = past.extended(k, v)      # (B, H, more than T, K)
        k = offset_keys(k, begins)                                                          # (B, H, T, K)
        y = attend(q, k, v, mask, self.attention_scale, self.flex)                          # (B, H, T, K)
        y = y.transpose(1, 2)                                                               # (B, T, H, K)
        y = y.reshape(B, T, D)                                                              # (B, T, D)
        return linear(y, self.out)                                                          # (B, T, D)


class LayerPast:
    """Keys and values that a layer has made of a text so far; both (B, H, T, K)."""

    def __init__(self):
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All there are, with these of the next places."""
        if self.keys is not None:
            k, v = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        self.keys, self.values = k, v
        return k, v


class Past:
    """What a model keeps of texts to read on from there: tokens (B, T), and each layer's keys and values."""

    def __init__(self, num_layers: int):
        self.tokens: Tensor | None = None
        self.layers = [LayerPast() for _ in range(num_layers)]

    def extended(self, tokens: Tensor) -> Tensor:
        """All tokens, with these at the end."""
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)
        return self.tokens


@dataclass(frozen=True)
class Stage:
    """What of a model works at a moment of training: its first layers, with a share of their windows, and the
    head for so many tokens; 0: for all.

    The other layers are left out. They begin as identities, since what they add is zero at first, so nothing
    jumps when they join.
    """
    depth: int
    window_frac: float = 1.0
    softmax_sample: int = 0


class Model(nn.Module):
    """What every model here does with its hidden states: losses, logits, masks and figures.

    A model has `layers`, a `head` (V, D) and `hidden`.
    eot_id  id of the token that begins every document
    dtype   of the activations and of the products
    flex    attend by FlexAttention with these kernel options; None: by DenseAttention
    """

    def __init__(self, cfg: Config, eot_id: int, dtype: torch.dtype = torch.float32,
                 flex: dict | None = None):
        super().__init__()
        self.cfg, self.eot_id, self.dtype, self.flex = cfg, eot_id, dtype, flex
        self.chunk_kernel, self.losses_kernel = chunk_loss_and_gradient, chunk_losses
        self.is_compiled = False
        is_token = torch.arange(cfg.padded_vocab_size) < cfg.vocab_size
        self.register_buffer("padding", torch.where(is_token, 0.0, -math.inf), persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor, stage: Stage | None = None,
                sample: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Sum of the losses of all targets, in nats.

        inputs       (B, T) token ids
        targets      (B, T) token ids; -1 where there is nothing to predict
        stage        of training; None: all of the model
        sample       (G, S) token ids that rise, and (G, S) logs of the tokens they count as: what the targets
                     of every G-th place are told from; None: from all
        returns      () float32, with a sample an estimate
        """
        x = self.hidden(inputs, stage)                                                      # (B, T, D)
        if sample is None:
            return self.loss(x.flatten(0, 1), self.head, targets.flatten(), self.padding)
        tokens, log_counts = sample                                                         # (G, S), (G, S)
        heads = F.embedding(tokens, self.head)                                              # (G, S, D)
        parts = x.unflatten(1, (-1, len(tokens))).unbind(2)
        wanted = targets.unflatten(1, (-1, len(tokens))).unbind(2)
        losses = []
        for group, (part, head) in enumerate(zip(parts, heads, strict=True)):
            ids = wanted[group].flatten().contiguous()                                      # (BT/G)
            places = torch.searchsorted(tokens[group], ids).where(ids >= 0, -1)             # (BT/G)
            losses.append(self.loss(part.flatten(0, 1), head, places, log_counts[group]))
        return torch.stack(losses).sum()                                                    # ()

    def loss(self, x: Tensor, head: Tensor, targets: Tensor, log_counts: Tensor) -> Tensor:
        """ChunkedLoss of (N, D) with some head, as the knobs say."""
        return ChunkedLoss.apply(x, head, targets, log_counts, self.cfg.logit_cap, self.chunk_kernel,
                                 self.cfg.fp8)

    def token_losses(self, inputs: Tensor, targets: Tensor, stage: Stage | None = None,
                     likeliest: bool = False) -> Tensor:
        """Loss of each target in nats, 0 where there is none; all (B, T), the result float32, no graph.

        likeliest  the result is (2, B, T): the losses, then 1 where the target is the likeliest token, else 0
        """
        # detached only here: with gradients on, the layers compiled for training serve for validation too
        x = self.hidden(inputs, stage).detach().flatten(0, 1)                               # (BT, D)
        weight, wanted = self.head.detach().to(x.dtype), targets.flatten()                  # (V, D), (BT)
        found = torch.zeros(1 + likeliest, len(wanted), device=x.device)
        places = (wanted >= 0).nonzero()[:, 0]      # the head is spared the others
        with torch.no_grad():
            for some in places.split(chunk_rows(x, weight.size(0))):
                # filled up to the size of all chunks, so that one kernel serves them
                filled = F.pad(some, (0, chunk_rows(x, weight.size(0)) - len(some)))
                found[:, some] = self.losses_kernel(x[filled], weight, wanted[filled], self.padding,
                                                    self.cfg.logit_cap, likeliest)[:, :len(some)]
        found = found.view(1 + likeliest, *targets.shape)
        return found if likeliest else found[0]

    @torch.no_grad()
    def logits(self, inputs: Tensor, past: Past | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, V) float32, only columns of real tokens.

        past  of the text that the tokens go on with; they are added to it
        """
        return self.head_logits(self.hidden(inputs, past=past))                             # (B, T, V)

    def head_logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32"""
        z = linear(x, self.head).float()                                                    # (..., V)
        return soft_cap(z, self.cfg.logit_cap)[..., :self.cfg.vocab_size]                   # (..., V)

    def hidden(self, inputs: Tensor, stage: Stage | None = None, past: Past | None = None) -> Tensor:
        """What the head reads: (B, T) token ids -> (B, T, D).

        past  of the text that the tokens go on with; they are added to it
        """
        raise NotImplementedError(f"{type(self).__name__} has no hidden states")

    def asleep(self, stage: Stage) -> set[str]:
        """Names of the parameters that have nothing to do yet."""
        return set()

    def windows(self, length: int, window_frac: float) -> list[int]:
        """How far each layer looks back in a text of `length` tokens: every fourth and the last have the long
        window, the others the short one; none looks further than in training."""
        windows = []
        for number in range(1, len(self.layers) + 1):
            is_long = number % 4 == 0 or number == len(self.layers)
            knob = self.cfg.long_window if is_long else self.cfg.short_window
            full = min(knob or self.cfg.seq_len, self.cfg.seq_len, length)
            windows.append(min(full, max(128, round(window_frac * full))))
        return windows

    def masks(self, inputs: Tensor, window_frac: float) -> list[DenseMask | BlockMask]:
        """The mask of each layer; layers with equal windows share one."""
        docs = (inputs == self.eot_id).cumsum(1, dtype=torch.int32)                         # (B, T)
        windows = self.windows(inputs.size(1), window_frac)
        made: dict[int, DenseMask | BlockMask] = {}
        for length in set(windows):
            # a tensor, so that kernels compiled for one window serve all
            window = torch.full((), length, dtype=docs.dtype, device=inputs.device)         # ()
            made[length] = (DenseMask(docs, window) if self.flex is None else
                            block_mask(docs, window))
        return [made[length] for length in windows]

    def compile_parts(self) -> None:
        """Compile what repeats, so that one layer serves all layers and one chunk of the loss all chunks."""
        self.is_compiled = True
        for layer in self.layers:
            layer.compile(dynamic=False)
        self.chunk_kernel = torch.compile(chunk_loss_and_gradient, dynamic=False)
        self.losses_kernel = torch.compile(chunk_losses, dynamic=False)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, stage: Stage | None = None) -> float:
        """Floating-point operations of one trained token, forward and backward.

        6 per weight of a matrix, and 12 per model dimension and key that a token attends to on average.
        source  Kaplan et al. 2020, arXiv:2001.08361
        """
        length, stage = self.cfg.seq_len, stage or Stage(len(self.layers))
        layers, windows = self.layers[:stage.depth], self.windows(length, stage.window_frac)[:stage.depth]
        matrices = (stage.softmax_sample or len(self.head)) * self.head.size(1)
        matrices += sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)
        keys = sum(window - window**2 / (2 * length) for window in windows)
        return 6 * matrices + 12 * self.cfg.model_dim * keys


class GPT(Model):
    """Embedding -> norm -> layers -> norm -> head; logits within plus or minus logit_cap."""

    def __init__(self, cfg: Config, eot_id: int, dtype: torch.dtype = torch.float32,
                 flex: dict | None = None):
        super().__init__(cfg, eot_id, dtype, flex)
        self.embed = nn.Parameter(torch.randn(cfg.vocab_size, cfg.model_dim))
        self.value_embeds = nn.ParameterList(
            torch.randn(cfg.vocab_size, cfg.model_dim) for _ in range(cfg.num_value_tables))
        self.smear = nn.Parameter(torch.zeros(cfg.model_dim))       # share of the token before
        self.layers = nn.ModuleList(Layer(cfg, flex) for _ in range(cfg.num_layers))
        self.head = nn.Parameter(torch.zeros(cfg.padded_vocab_size, cfg.model_dim))
        self.smear_kernel, self.norm_kernel = smeared, rms_norm

    def hidden(self, inputs: Tensor, stage: Stage | None = None, past: Past | None = None) -> Tensor:
        stage = stage or Stage(len(self.layers))
        text = past.extended(inputs) if past else inputs
        masks = self.masks(text, stage.window_frac)
        cos, sin = rotary_table(text.size(1), self.cfg.head_dim, inputs.device)
        start = text.size(1) - inputs.size(1)
        cos, sin = cos[start:], sin[start:]                                                 # (T, K/2)
        begins = text == self.eot_id                                                        # (B, T)
        # the first token carries the one before it, which is embedded once more for that
        read, read_begins = (part[:, max(0, start - 1):] for part in (text, begins))
        x0 = self.smear_kernel(F.embedding(read, self.embed), read_begins, self.smear)
        x0 = (x0[:, 1:] if start else x0).to(self.dtype)                                    # (B, T, D)
        x = x0.view_as(x0)      # another object, or the first layer would be compiled apart # (B, T, D)
        for number, layer in enumerate(self.layers[:stage.depth]):
            table = self.value_table(number)
            values = None if table is None else F.embedding(inputs, table)                  # (B, T, D)
            layer_past = past.layers[number] if past else None
            x = layer(x, x0, values, masks[number], begins, cos, sin, layer_past)           # (B, T, D)
        return self.norm_kernel(x)                                                          # (B, T, D)

    def asleep(self, stage: Stage) -> set[str]:
        awake = {id(self.value_table(number)) for number in range(stage.depth)}
        tables = {f"value_embeds.{number}" for number, table in enumerate(self.value_embeds)
                  if id(table) not in awake}
        layers = {f"layers.{number}.{name}" for number in range(stage.depth, len(self.layers))
                  for name, _ in self.layers[number].named_parameters()}
        return tables | layers

    def value_table(self, layer: int) -> Tensor | None:
        """Table i of n serves the i-th of the first n layers and the i-th of the last n."""
        n, behind = len(self.value_embeds), layer - (len(self.layers) - len(self.value_embeds))
        place = layer if layer < n else behind
        return self.value_embeds[place] if 0 <= place < n else None

    def compile_parts(self) -> None:
        """Also the small operations before and behind the layers."""
        super().compile_parts()
        self.smear_kernel = torch.compile(smeared, dynamic=False)
        self.norm_kernel = torch.compile(rms_norm, dynamic=False)


def smeared(x: Tensor, begins: Tensor, share: Tensor) -> Tensor:
    """Embeddings, each with a share (D) of the one before it, unless it begins a document; normed.

    x        (B, T, D)
    begins   (B, T) bool
    returns  (B, T, D)
    """
    before = F.pad(x, (0, 0, 1, 0))[:, :-1].masked_fill(begins[..., None], 0)               # (B, T, D)
    return rms_norm(x + share * before)                                                     # (B, T, D)


def uniform(*shape: int, std: float) -> Tensor:
    return torch.empty(shape).uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)


def chunk_rows(x: Tensor, columns: int) -> int:
    """Rows of a chunk of x, so that its logits would take at most 128 MiB on a CPU and 256 MiB on a GPU as
    float32; it multiplies in fewer and larger products."""
    limit = (2**27 if x.device.type == "cpu" else 2**28) // (4 * columns)
    return 2 ** int(math.log2(max(1, min(limit, x.size(0)))))


def soft_cap(z: Tensor, cap: float) -> Tensor:
    """Squeeze logits smoothly into plus or minus cap: z / sqrt(1 + (z / cap)^2); a cap of 0 leaves them."""
    return z * torch.rsqrt(1 + (z / cap).square()) if cap else z


def chunk_loss_and_gradient(logits: Tensor, targets: Tensor, log_counts: Tensor, cap: float,
                            ) -> tuple[Tensor, Tensor]:
    """Losses of a chunk, and their gradient at uncapped logits: softmax minus one-hot, times the cap's slope.

    logits      (N, V) uncapped
    targets     (N) columns; -1 where there is nothing to predict
    log_counts  (V) float32, the log of how many tokens a column stands for where it is not the target: 0, or
                more in a sample, or minus infinity where it is no token
    returns     (N) float32 and (N, V) in the dtype of the logits
    """
    z = logits.float()                                                                      # (N, V)
    shrink = torch.rsqrt(1 + (z * (1 / cap)).square()) if cap else torch.ones_like(z)       # (N, V)
    # what bounds z: the cap, which costs no pass over the logits, or the largest of a row
    most = cap or (z + log_counts).amax(-1, keepdim=True)                                   # (N, 1)
    exps = torch.exp(z * shrink - most + log_counts)                                        # (N, V)
    counted = (targets >= 0).float()[:, None]                                               # (N, 1)
    place = targets.clamp(min=0)[:, None]                                                   # (N, 1)
    wanted, bend = z.gather(1, place), shrink.gather(1, place)                              # (N, 1)
    exp_there = torch.exp(wanted * bend - most)                                             # (N, 1)
    # the target stands for itself alone
    total = exps.sum(-1, keepdim=True) - exp_there * torch.expm1(log_counts[place])         # (N, 1)
    slope = exps * (counted / total) * shrink**3                                            # (N, V)
    losses = counted * (most + total.log() - wanted * bend)                                 # (N, 1)
    slope_there = counted * (exp_there / total - 1) * bend**3                               # (N, 1)
    return losses[:, 0], slope.to(logits.dtype).scatter(1, place, slope_there.to(logits.dtype))


def chunk_losses(x: Tensor, weight: Tensor, targets: Tensor, padding: Tensor, cap: float,
                 likeliest: bool = False) -> Tensor:
    """(1, N) float32 losses of a chunk x (N, D) of a head's weight (V, D), without their gradient.

    likeliest  (2, N): the losses, then 1 where the target's logit is the largest (the first such), else 0
    """
    z = soft_cap((x @ weight.T).float(), cap) + padding                                     # (N, V)
    losses = F.cross_entropy(z, targets, ignore_index=-1, reduction="none")                 # (N)
    return torch.stack([losses, (z.argmax(-1) == targets).float()]) if likeliest else losses[None]


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of a linear head, chunk by chunk, with its gradient made on the way forward.

    Only one chunk's logits exist at a time: 256 MiB instead of 6.6 GB for 32,768 tokens and 50,304 columns.
    x (N, D), weight (V, D) float32, targets (N), log_counts and kernel as chunk_loss_and_gradient has them
    fp8      products in FP8: logits from e4m3, gradients from e5m2 slopes
    returns  () float32, the summed loss
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, log_counts: Tensor, cap: float,
                kernel: Callable, fp8: bool = False) -> Tensor:
        x, narrow = x.detach(), weight.detach().to(x.dtype)                                 # (N, D), (V, D)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)                 # (N, D), (V, D)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        if fp8:
            by_columns, by_rows = to_fp8(narrow, E4M3), to_fp8(narrow.T, E4M3)
        start = 0
        rows = chunk_rows(x, weight.size(0))
        for part, wanted in zip(x.split(rows), targets.split(rows), strict=True):
            logits = fp8_product(to_fp8(part, E4M3), by_columns) if fp8 else part @ narrow.T    # (N, V)
            losses, slope = kernel(logits, wanted, log_counts, cap)                            # (N), (N, V)
            total += losses.sum()
            if fp8:
                slope, unit = to_fp8(slope, E5M2)                                           # (N, V), ()
                x_grad[start:start + len(part)] = fp8_product((slope, unit), by_rows)       # (N, D)
                turned = (slope.T.contiguous(), unit)
                weight_grad += fp8_product(turned, to_fp8(part.T, E4M3))                    # (V, D)
            else:
                torch.mm(slope, narrow, out=x_grad[start:start + len(part)])                # (N, D)
                weight_grad += slope.T @ part                                               # (V, D)
            start += len(part)
        ctx.save_for_backward(x_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad.to(x_grad.dtype), weight_grad * grad, None, None, None, None, None


# ------------------------------------------------------------------------------------------------
# Optimizer: knows parameters, their names and gradients, and which process owns which piece of them.
# ------------------------------------------------------------------------------------------------

def group_of(name: str, parameter: Tensor) -> str:
    """The one group of a parameter. A new parameter lands in a sensible one by its place and shape."""
    # EDIT: optimizer
    if parameter.ndim < 2:
        return "scalars"
    if name.startswith("layers."):
        return "matrices"
    return "head" if name == "head" else "embeddings"


def newton_schulz(G: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Push every singular value of a matrix towards 1 and keep its singular vectors, without an SVD.

    G        (..., M, N) float of any scale; leading dimensions are separate matrices
    dtype    of the products; bfloat16 is precise enough
    returns  (..., M, N) in `dtype`; singular values land between 0.7 and 1.2
    raises   ValueError if G has fewer than two dimensions
    source   Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """
    if G.ndim < 2:
        raise ValueError(f"newton_schulz needs matrices; it got a tensor of shape {tuple(G.shape)}")
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (torch.linalg.vector_norm(G.float(), dim=(-2, -1), keepdim=True) + 1e-7)        # (..., M, N)
    X = X.to(dtype).flatten(0, -3) if G.ndim > 2 else X.to(dtype)[None]                     # (..., M, N)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    for _ in range(steps):
        A = X @ X.mT                                                                        # (..., M, M)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)     # b A + c A A                       # (..., M, M)
        X = torch.baddbmm(X, B, X, beta=a)              # a X + B X                         # (..., M, N)
    return (X.mT if tall else X).view(G.shape)


def adam_update(parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, lr: Tensor,
                beta1: float, beta2: float, step: Tensor, eps: float) -> None:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) in place; all tensors of one shape, lr and step () float32."""
    mean.lerp_(grad, 1 - beta1)
    square.lerp_(grad.square(), 1 - beta2)
    mean_hat, square_hat = mean / (1 - beta1**step), square / (1 - beta2**step)
    parameter.sub_(lr * mean_hat / (square_hat.sqrt() + eps))


@dataclass
class Piece:
    """Rows of a parameter that one process, the owner, updates; only there `state` has tensors."""
    name: str
    parameter: nn.Parameter
    rows: slice | EllipsisType      # ... is the whole parameter
    owner: int
    state: dict[str, Tensor]

    @property
    def weights(self) -> Tensor:
        return self.parameter.detach()[self.rows]

    @property
    def grad(self) -> Tensor:
        return self.parameter.grad[self.rows]


def lr_scale(cfg: Config, step: int, progress: float) -> float:
    """Warm-up over steps, a plateau, and a linear cooldown over the last part of the budget.

    step      optimizer steps done
    progress  share of the budget that is used, 0 to 1
    """
    # EDIT: schedule
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    cooldown = min(1.0, (1 - progress) / cfg.cooldown_frac) if cfg.cooldown_frac else 1.0
    return warmup * (cfg.final_lr_frac + (1 - cfg.final_lr_frac) * cooldown)


class Optimizer:
    """Muon for matrices in layers, Adam for everything else; every parameter is in exactly one group.

    learning_rates() has the rates. Momentum climbs from 0.85 to 0.95 over the first 300 steps; a run of 100
    steps did worse when it climbed faster.

    With several processes each parameter is cut into pieces: a matrix that Muon orthogonalises is one piece,
    a table of Adam's has as many blocks of rows as there are processes. Gradients are added up where a piece
    is owned, only the owner keeps its state and updates it, and then all copy its weights.
    source  Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054
    """

    # a script with another optimizer has its own
    group_of, learning_rates, lr_scale = map(staticmethod, (group_of, learning_rates, lr_scale))
    betas, eps = (0.8, 0.95), 1e-10
    kinds = {"matrices": ("momentum",), "embeddings": ("mean", "square"), "head": ("mean", "square"),
             "scalars": ("mean", "square")}

    def __init__(self, model: Model, cfg: Config, world: "World",
                 product_dtype: torch.dtype = torch.float32):
        self.cfg, self.world, self.product_dtype = cfg, world, product_dtype
        self.asleep: set[str] = set()   # names of parameters that are not trained yet
        self.lrs = self.learning_rates(cfg)
        self.parameters = dict(model.named_parameters())
        self.groups: dict[str, list[Piece]] = {group: [] for group in self.lrs}
        # parameters of one shape follow each other, so that their pieces are dealt to the processes evenly
        for name, parameter in sorted(self.parameters.items(), key=lambda item: tuple(item[1].shape)):
            group = self.group_of(name, parameter)
            pieces = self._cut(name, parameter, group, dealt=len(self.groups[group]))
            self.groups[group] += pieces
            if world.size > 1:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._send, pieces))
        self.pieces = [piece for group in self.groups.values() for piece in group]
        self.adam_kernel = adam_update
        self.steps_done = 0
        self.last_backward = False      # then gradients set out for their owners while it still runs

    def _cut(self, name: str, parameter: nn.Parameter, group: str, dealt: int) -> list[Piece]:
        """The pieces of a parameter; `dealt` of its group exist already."""
        size, cuts = self.world.size, []
        if group == "matrices" and parameter.ndim > 2:
            cuts = range(len(parameter) + 1)
        elif group != "matrices" and parameter.ndim == 2:
            cuts = sorted({len(parameter) * rank // size for rank in range(size + 1)})
        rows = [slice(first, last) for first, last in itertools.pairwise(cuts)] or [...]
        pieces = [Piece(name, parameter, part, (dealt + number) % size, {})
                  for number, part in enumerate(rows)]
        for piece in self._own(pieces):
            piece.state = {kind: torch.zeros_like(piece.weights) for kind in self.kinds[group]}
        return pieces

    def _own(self, pieces: list[Piece]) -> list[Piece]:
        return [piece for piece in pieces if piece.owner == self.world.rank and piece.name not in self.asleep]

    def _send(self, pieces: list[Piece], _parameter: nn.Parameter) -> None:
        for piece in pieces if self.last_backward else ():
            self.world.begin_sum(piece.grad, piece.owner)

    def compile_parts(self) -> None:
        self.adam_kernel = torch.compile(adam_update, dynamic=True)

    def gradient_norms(self) -> Tensor:
        """(P) norms of the parameters' gradients, added up over all processes.

        raises  RuntimeError that names a parameter without gradient, before any process waits for another
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is None and self.asleep:
                self.asleep.add(name)       # it serves sleeping layers; warm_up() has seen it at work
            elif parameter.grad is None:
                raise RuntimeError(f"parameter {name} has no gradient: the loss does not depend on it")
        self.world.wait()
        places = {name: place for place, name in enumerate(self.parameters)}
        squares = torch.zeros(len(places), device=self.world.device)                        # (P)
        for piece in self._own(self.pieces):
            squares[places[piece.name]] += torch.linalg.vector_norm(piece.grad).square()
        return self.world.sum(squares).sqrt()                                               # (P)

    def divide_gradients(self, divisor: float | Tensor) -> None:
        for piece in self._own(self.pieces):
            piece.grad.div_(divisor)

    def clear_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update every parameter from its gradient and clear the gradients.

        scale  what the schedule multiplies all learning rates by
        """
        momentum = 0.85 + 0.1 * min(1, self.steps_done / 300)
        self.steps_done += 1
        for group, pieces in self.groups.items():
            lr = self.lrs[group] * scale
            if group == "matrices":
                self.muon_step(self._own(pieces), lr, momentum)
            else:
                self.adam_step(self._own(pieces), lr)
            for piece in pieces:    # they travel while the next group is computed
                if piece.name not in self.asleep:
                    self.world.begin_copy(piece.weights, piece.owner)
        self.world.wait()
        self.clear_gradients()

    def adam_step(self, pieces: list[Piece], lr: float) -> None:
        for piece in pieces:
            self.adam_kernel(piece.weights.view(-1), piece.grad.view(-1), piece.state["mean"].view(-1),
                             piece.state["square"].view(-1), torch.tensor(lr), *self.betas,
                             torch.tensor(float(self.steps_done)), self.eps)

    def muon_step(self, pieces: list[Piece], lr: float, momentum: float) -> None:
        """Muon with Nesterov momentum; matrices of one shape, lying or standing, are orthogonalised as one
        batch."""
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor, float]]] = {}
        for piece in pieces:
            average = piece.state["momentum"]
            average.lerp_(piece.grad, 1 - momentum)
            ahead = piece.grad.lerp(average, momentum)
            rows, columns = ahead.shape[-2:]
            for matrix, part in zip(piece.weights.view(-1, rows, columns), ahead.view(-1, rows, columns),
                                    strict=True):
                lying = (part, matrix) if rows <= columns else (part.mT, matrix.mT)
                by_shape.setdefault(lying[0].shape, []).append((*lying, math.sqrt(max(1, rows / columns))))
        for some in by_shape.values():
            updates = newton_schulz(torch.stack([ahead for ahead, _, _ in some]), dtype=self.product_dtype)
            for (_, matrix, factor), update in zip(some, updates, strict=True):
                matrix.sub_(update, alpha=lr * factor)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile the kernels on tensors of their own, so that nothing changes."""
        for group, pieces in self.groups.items():
            for piece in self._own(pieces) if group != "matrices" else ():
                tensors = [torch.zeros_like(piece.weights).view(-1) for _ in range(4)]
                self.adam_kernel(*tensors, torch.tensor(0.0), *self.betas, torch.tensor(1.0), self.eps)

    def state(self) -> dict:
        """All state, as one process alone would have it; tensors are whole on the first process only."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for group, pieces in self.groups.items():
            for piece, kind in itertools.product(pieces, self.kinds[group]):
                part = piece.state.get(kind, torch.empty_like(piece.weights))
                self.world.begin_copy(part, piece.owner)
                self.world.wait()
                if self.world.is_main:
                    kinds = tensors.setdefault(piece.name, {})
                    if kind not in kinds:
                        kinds[kind] = torch.empty(piece.parameter.shape)
                    kinds[kind][piece.rows] = part.cpu()
        return {"steps_done": self.steps_done, "tensors": tensors}

    def load(self, state: dict | None) -> None:
        """Take over what `state` gave, from the first process; the others pass None."""
        self.steps_done = self.world.same(state and state["steps_done"])
        for group, pieces in self.groups.items():
            for piece, kind in itertools.product(pieces, self.kinds[group]):
                part = torch.empty_like(piece.weights)
                if self.world.is_main:
                    part.copy_(state["tensors"][piece.name][kind][piece.rows])
                self.world.begin_copy(part, 0)
                self.world.wait()
                if piece.state:
                    piece.state[kind] = part


def stage_at(cfg: Config, step: int, progress: float) -> Stage:
    """One layer, then all (Bu 2025, arXiv:2511.04981); windows that grow; a sample of tokens, then all.

    step      optimizer steps done
    progress  share of the budget that is used, 0 to 1
    """
    is_early = step * cfg.batch_tokens < most_early_tokens(cfg)
    depth = 1 if is_early and progress < cfg.depth_warmup_frac else cfg.num_layers
    windows = min(1.0, progress / cfg.window_warmup_frac) if cfg.window_warmup_frac else 1.0
    samples = is_early and progress < cfg.sampled_softmax_frac
    return Stage(depth, windows, cfg.softmax_sample if samples else 0)


# ------------------------------------------------------------------------------------------------
# Data: knows tokens and Config; batches are a pure function of (manifest, seed, step).
# ------------------------------------------------------------------------------------------------

class Rows:
    """The rows of all epochs: which tokens are trained on together, and when.

    A document longer than a row or than max_doc_len is cut into parts; each part but the first gets an
    <|endoftext|> of its own in front, so every row starts like a document and the mask keeps parts apart.
    A row is one part of full length, or short parts one after the other in an order that the seed decides;
    what does not fit at the end of the row is dropped. So an epoch has each token at most once. The order of
    the rows is drawn anew for each epoch. All is planned from document lengths at the start; any step is
    then looked up.

    seq_len  tokens in a row (T); a row reads T + 1 tokens, the last only as a target
    """

    def __init__(self, shards: list[np.ndarray], cfg: Config, eot_id: int):
        self.shards, self.eot_id, self.seed = shards, eot_id, cfg.seed
        self.length = cfg.seq_len + 1
        self.bases = np.cumsum([0] + [len(shard) for shard in shards])
        self._cut_documents(min(cfg.max_doc_len, self.length))
        self._pack_rows()
        self._orders: dict[int, np.ndarray] = {}
        if not self.num_rows:
            raise UserError(f"the training data are {self.bases[-1]:,} tokens, too few for one row of "
                            f"--seq_len {cfg.seq_len}; lower it or add text")

    def _cut_documents(self, longest: int) -> None:
        """Fill `starts`, `sizes`, `continues` and `ends`: a part's first token, its length with the
        <|endoftext|> that it begins with, whether that one is its own, whether the document ends with it."""
        starts, lengths = [], []
        for base, shard in zip(self.bases, self.shards, strict=False):
            begins = np.flatnonzero(shard == self.eot_id)
            starts.append(begins + base)
            lengths.append(np.diff(begins, append=len(shard)))
        start, length = np.concatenate(starts), np.concatenate(lengths)
        if not len(start):
            raise UserError(f"the training data have no <|endoftext|> (token {self.eot_id}) at a document's "
                            "beginning; they were made with another tokenizer")
        # the first part holds `longest` tokens, each later one its own <|endoftext|> and longest - 1 more
        parts = 1 + np.maximum(0, -(-(length - longest) // (longest - 1)))
        document = np.repeat(np.arange(len(start)), parts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
        offset = np.where(number == 0, 0, longest + (number - 1) * (longest - 1))
        self.starts = start[document] + offset
        self.continues = number > 0
        self.sizes = np.minimum(longest, length[document] - offset + self.continues)
        self.ends = number == parts[document] - 1

    def _pack_rows(self) -> None:
        """Fill `order`, and for each row the slice of it (`first`, `last`) that it is made of."""
        rng = np.random.default_rng([self.seed, 0])
        whole = np.flatnonzero(self.sizes == self.length)
        short = rng.permutation(np.flatnonzero(self.sizes < self.length))
        reach = np.concatenate([[0], np.cumsum(self.sizes[short])])
        # the part after the one in which a row of tokens beginning at part i ends
        after = np.searchsorted(reach, reach[:-1] + self.length, side="left").tolist()
        first, place = [], 0
        while place < len(short) and after[place] <= len(short):
            first.append(place)
            place = after[place]
        first = np.array(first, dtype=np.int64)
        last = np.array([after[place] for place in first], dtype=np.int64)
        self.order = np.concatenate([whole, short])
        self.first = np.concatenate([np.arange(len(whole)), first + len(whole)])
        self.last = np.concatenate([np.arange(len(whole)) + 1, last + len(whole)])
        self.num_rows = len(self.first)
        # a part cut short in the middle of a row is followed by a token that its document does not have there
        cut = np.concatenate([[0], np.cumsum(~self.ends[self.order])])
        self.num_targets = self.length - 1 - (cut[self.last - 1] - cut[self.first])

    def numbers(self, step: int, rows_per_step: int) -> np.ndarray:
        """(rows_per_step) numbers of the rows of a step, counted from 0."""
        position = np.arange(step * rows_per_step, (step + 1) * rows_per_step)
        epochs, places = np.divmod(position, self.num_rows)
        return np.array([self._order_of(epoch)[place]
                         for epoch, place in zip(epochs.tolist(), places, strict=True)])

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, 1, epoch]).permutation(self.num_rows)
        return self._orders[epoch]

    def targets_in_step(self, step: int, rows_per_step: int) -> int:
        """How many tokens a step predicts: all but those whose true successor is not in the row."""
        return int(self.num_targets[self.numbers(step, rows_per_step)].sum())

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a row, (T) int64 each; a target of -1 is not to be predicted."""
        tokens = np.empty(self.length, dtype=np.int64)
        ignored = []
        filled = 0
        for part in self.order[self.first[number]:self.last[number]]:
            if self.continues[part]:
                tokens[filled] = self.eot_id
                filled += 1
            size = min(int(self.sizes[part]) - bool(self.continues[part]), self.length - filled)
            shard = int(np.searchsorted(self.bases, self.starts[part], side="right")) - 1
            start = int(self.starts[part] - self.bases[shard])
            tokens[filled:filled + size] = self.shards[shard][start:start + size]
            filled += size
            if not self.ends[part] and filled < self.length:
                ignored.append(filled - 1)
        inputs, targets = tokens[:-1], tokens[1:].copy()
        targets[ignored] = -1
        return inputs, targets

    def micro_batches(self, step: int, cfg: Config, rank: int = 0, world_size: int = 1,
                      ) -> Iterator[tuple[Tensor, Tensor]]:
        """What one process takes of a step: (B, T) int64 inputs and targets, always of the same B.

        Rows are dealt to processes in turn. Where they do not come out even, rows without targets fill up.
        """
        mine = list(self.numbers(step, cfg.rows_per_step)[rank::world_size])
        count, rows = micro_batch_shape(cfg, world_size)
        mine += [-1] * (count * rows - len(mine))
        for start in range(0, len(mine), rows):
            batch = [self.row(number) if number >= 0 else self._empty_row()
                     for number in mine[start:start + rows]]
            inputs, targets = zip(*batch, strict=True)
            yield torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))

    def _empty_row(self) -> tuple[np.ndarray, np.ndarray]:
        return np.full(self.length - 1, self.eot_id), np.full(self.length - 1, -1)


@dataclass(frozen=True)
class Batch:
    """What one process takes of a step.

    num_targets    of the step, over all processes
    micro_batches  (B, T) inputs and targets each
    sample         what Candidates.of() drew; None: targets are told from all tokens
    """
    num_targets: int
    micro_batches: list[tuple[Tensor, Tensor]]
    sample: tuple[Tensor, Tensor] | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with every tensor changed, as by sending it to a device."""
        pairs = [(change(inputs), change(targets)) for inputs, targets in self.micro_batches]
        return Batch(self.num_targets, pairs, self.sample and tuple(map(change, self.sample)))


class Candidates:
    """The tokens that a step's targets are told from while the softmax is sampled: the targets of the step,
    and others at random. The head then takes a fraction of its time.

    Targets are dealt to groups of some 2,048 (more in short rows), each with every so manieth place of all
    rows, and each group has a sample of its own: its distinct targets, filled up with other tokens. A token
    that is in a sample with probability q counts as 1 / q tokens in the softmax's sum, so that over all
    samples the sum is right on average; q is from how many of the first 256 groups have it. For a given text
    it is not quite: what recurs in it is in its sample more often than elsewhere.

    All follows from data, seed and step, for any processes and micro-batches. A process looks at all targets
    of the step for that.
    size     tokens of a sample: by rule a tenth more than the most distinct targets of those groups, in whole
             64s; 0 where that is more than half of the vocabulary, and nothing would be gained
    raises   UserError if cfg.softmax_sample is smaller than those targets, or larger than the vocabulary
    source   Bengio & Senecal 2008, doi:10.1109/TNN.2007.912312; Jean et al. 2015, arXiv:1412.2007
    """

    def __init__(self, rows: Rows, cfg: Config):
        self.rows, self.cfg, self.num_groups = rows, cfg, softmax_groups(cfg)
        steps = math.ceil(min(256 / self.num_groups, 2**21 / cfg.batch_tokens,
                              rows.num_rows / cfg.rows_per_step))
        had = np.zeros(cfg.vocab_size)
        most = 0
        for step in range(steps):
            for tokens in self._distinct_targets(step):
                had[tokens] += 1
                most = max(most, len(tokens))
        self.share = (had + 0.5) / (steps * self.num_groups + 1)                            # (V)
        if cfg.softmax_sample and not most <= cfg.softmax_sample <= cfg.vocab_size:
            raise UserError(f"--softmax_sample must be between {most}, the distinct targets that meet, and "
                            f"{cfg.vocab_size}, the tokens there are; it is {cfg.softmax_sample}")
        by_rule = 64 * math.ceil(1.1 * most / 64)
        self.size = cfg.softmax_sample or (by_rule if by_rule <= cfg.vocab_size // 2 else 0)

    def _distinct_targets(self, step: int) -> list[np.ndarray]:
        numbers = self.rows.numbers(step, self.cfg.rows_per_step)
        targets = np.stack([self.rows.row(number)[1] for number in numbers])                # (rows, T)
        groups = [targets[:, group::self.num_groups] for group in range(self.num_groups)]
        return [np.unique(group[group >= 0]) for group in groups]

    def of(self, step: int) -> tuple[Tensor, Tensor] | None:
        """(groups, size) token ids that rise, int64, and the logs of the tokens they count as, float32; None
        if a group has more distinct targets than that."""
        random = np.random.default_rng([self.cfg.seed, 2, step])
        tokens, log_counts = [], []
        for wanted in self._distinct_targets(step):
            taken = np.zeros(self.cfg.vocab_size, dtype=bool)                               # (V)
            taken[wanted] = True
            others, room = np.flatnonzero(~taken), self.size - len(wanted)
            if room < 0:
                return None
            taken[random.choice(others, room, replace=False, shuffle=False)] = True
            tokens.append(np.flatnonzero(taken))                                            # (S)
            drawn = room / len(others) if len(others) else 1.0
            log_counts.append(-np.log(1 - (1 - self.share[tokens[-1]]) * (1 - drawn)))      # (S)
        return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(log_counts)).float()


def softmax_groups(cfg: Config) -> int:
    """Into how many groups a step's targets are dealt: a power of two that divides rows into parts of whole
    16s, if there is one."""
    sixteens, odd = divmod(cfg.seq_len, 16)
    return 1 if odd else math.gcd(2 ** int(math.log2(max(1, cfg.batch_tokens / 2048))), sixteens)


def micro_batch_shape(cfg: Config, world_size: int) -> tuple[int, int]:
    """(micro-batches a step, rows in each) for every process."""
    rows = math.ceil(cfg.rows_per_step / world_size)
    count = math.ceil(rows / (cfg.micro_batch_tokens // cfg.seq_len or rows))
    return count, math.ceil(rows / count)


# ------------------------------------------------------------------------------------------------
# Evaluation: knows a model and held-out tokens; the sums are the same for any number of processes.
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Validation:
    """What the model makes of held-out tokens: nats per token, and bits per byte of text without specials."""
    val_loss: float
    val_bpb: float


class HeldOut:
    """The held-out tokens in fixed windows of seq_len, one after the other; each token is predicted once.

    A window begins with an <|endoftext|>, as rows do in training, and predicts its seq_len tokens.
    """

    def __init__(self, shards: list[np.ndarray], cfg: Config, tokenizer: Encoding):
        stream = np.concatenate(shards)
        self.tokens = stream[:cfg.val_tokens or len(stream)].astype(np.int64)
        self.seq_len, self.eot_id = cfg.seq_len, tokenizer.eot_token
        self.token_bytes = token_bytes(tokenizer)
        self.num_bytes = torch.tensor([len(token) for token in self.token_bytes])           # (V)
        self.num_windows = math.ceil(len(self.tokens) / self.seq_len)

    def text(self) -> bytes:
        """The bytes that the windows hold, special tokens left out."""
        return b"".join(self.token_bytes[token] for token in self.tokens.tolist())

    def windows(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """(B, T) inputs and targets of these windows; -1 in targets behind the end and where no window is."""
        targets = np.full((len(numbers), self.seq_len), -1)
        for place, number in enumerate(numbers):
            window = self.tokens[number * self.seq_len:(number + 1) * self.seq_len]
            targets[place, :len(window)] = window
        inputs = np.roll(targets, 1, axis=1)
        inputs[:, 0] = self.eot_id
        return torch.from_numpy(np.where(inputs < 0, self.eot_id, inputs)), torch.from_numpy(targets)

    def evaluate(self, model: Model, rows: int, world: "World", stage: Stage | None = None) -> Validation:
        """Validate with `rows` rows at a time and the attention windows of the moment; sums in float64."""
        sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # nats, tokens, nats in text, bytes
        num_bytes = self.num_bytes.to(world.device)
        model.eval()
        rounds = math.ceil(self.num_windows / (rows * world.size))
        for start in range(world.rank * rows, rounds * rows * world.size, rows * world.size):
            inputs, targets = self.windows(list(range(start, start + rows)))
            targets = targets.to(world.device)
            losses = model.token_losses(inputs.to(world.device), targets, stage).double()           # (B, T)
            counted = targets >= 0
            byte_count = num_bytes[targets.clamp(min=0)] * counted                          # (B, T)
            sums += torch.stack([losses.sum(), counted.sum(), losses[byte_count > 0].sum(), byte_count.sum()])
        model.train()
        nats, tokens, text_nats, text_bytes = world.sum(sums).tolist()
        return Validation(nats / tokens, text_nats / math.log(2) / text_bytes)


def score(model: Model, tokenizer: Encoding, questions: list[Question], rows: int, world: "World") -> Scores:
    """Accuracy of a model on a benchmark, `rows` rows at a time, as in training, so no kernel is compiled for
    it, but for one where likeliest tokens are asked for; called on all processes, which share the work."""
    def log_probabilities(inputs: np.ndarray, targets: np.ndarray, likeliest: bool = False) -> np.ndarray:
        inputs, targets = (torch.from_numpy(array).to(world.device) for array in (inputs, targets))
        found = model.token_losses(inputs, targets, likeliest=likeliest).cpu().numpy()
        return np.stack([-found[0], found[1]]) if likeliest else -found

    def add_up(sums: np.ndarray) -> np.ndarray:
        return world.sum(torch.from_numpy(sums).to(world.device)).cpu().numpy()
    model.eval()
    return hellaswag_accuracy(log_probabilities, tokenizer, questions, (rows, model.cfg.seq_len), world.rank,
                              world.size, add_up)


def xz_bits_per_byte(text: bytes) -> float | None:
    """Bits per byte that `xz -9e` needs for a text: what a model has to beat. None without Python's lzma."""
    if not importlib.util.find_spec("_lzma"):
        return None
    import lzma
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


@torch.no_grad()
def generate(model: Model, prompts: Tensor, cfg: Config) -> list[list[int]]:
    """Continue texts by at most sample_tokens tokens, the same ones for the same seed.

    prompts  (B, T) token ids, at least one each; any length
    returns  B lists of tokens, without the <|endoftext|> that ends a text
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    past, inputs, made = Past(len(model.layers)), prompts, []
    for _ in range(cfg.sample_tokens):
        x = model.hidden(inputs, past=past)[:, -1]                                          # (B, D)
        made.append(sample(model.head_logits(x).cpu(), cfg, generator))
        if all(model.eot_id in text for text in zip(*made, strict=True)):
            break
        inputs = torch.tensor(made[-1], device=prompts.device)[:, None]                     # (B, 1)
    return [list(itertools.takewhile(lambda token: token != model.eot_id, text))
            for text in zip(*made, strict=True)]


def sample(logits: Tensor, cfg: Config, generator: torch.Generator) -> list[int]:
    """One token per row of (B, V) logits."""
    if cfg.temperature == 0:
        return logits.argmax(-1).tolist()
    if cfg.top_k:
        kth = logits.topk(min(cfg.top_k, logits.size(-1))).values[:, -1:]                   # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)                                # (B, V)
    probabilities = torch.softmax(logits / cfg.temperature, dim=-1)                         # (B, V)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].tolist()


# ------------------------------------------------------------------------------------------------
# FP8: products of 8-bit floats for the head, with scales from the numbers at hand.
# ------------------------------------------------------------------------------------------------

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def fp8_product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """a times b transposed, both as to_fp8 gives them: (N, K), (M, K) -> (N, M) bfloat16.

    N, K and M must be multiples of 16, and one of the two e4m3.
    """
    return torch._scaled_mm(a[0], b[0].T, a[1], b[1], out_dtype=torch.bfloat16)


def fp8_problem(device: torch.device, dtype: torch.dtype) -> str:
    """Why there are no FP8 products here; nothing if there are. CPUs have them for trying out, slowly."""
    if dtype != torch.bfloat16:
        return f"needs --dtype bfloat16; it is {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 9):
        return "needs a GPU of compute capability 8.9 or more, such as an RTX 4090, L40S or H100"
    if device.type == "cpu":
        try:
            fp8_product(*(to_fp8(torch.ones(16, 16), E4M3) for _ in range(2)))
        except RuntimeError as error:       # a CPU without AVX-512 may have none
            return f"does not work on this CPU ({first_line(error)})"
    return ""


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in FP8, row by row in memory, and the () float32 unit that it is measured in.

    The unit makes the largest magnitude of x the largest of the dtype. e4m3 has finer steps, e5m2 the wider
    range that gradients need.
    source  Micikevicius et al. 2022, arXiv:2209.05433
    """
    largest = torch.finfo(dtype).max
    unit = x.abs().amax().float().clamp(min=1e-12) / largest                                # ()
    return (x.float() / unit).clamp(-largest, largest).to(dtype).contiguous(), unit


# ------------------------------------------------------------------------------------------------
# World: the machine and its processes; the only section that names torch.distributed.
# ------------------------------------------------------------------------------------------------

# dense bfloat16 TFLOP/s without sparsity, from the makers' data sheets
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
               "A40": 149.7, "A10": 125, "L40S": 362, "L4": 121, "RTX 3090": 71, "RTX 4090": 165.2,
               "RTX 5090": 209.5}


PR_SET_PDEATHSIG = 1        # of linux/prctl.h


def places_by_torchrun() -> tuple[int, int, int, int]:
    """Rank and number of processes, in all and on this machine; 0, 1, 0, 1 without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not any(name in os.environ for name in names):
        return 0, 1, 0, 1
    try:
        return tuple(int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(f"{' '.join(names)} come from torchrun, and here not all are there ({error}); "
                        "start with torchrun, or unset them") from error


class EveryonesError(UserError):
    """Raised on all processes at once, so one of each machine says it."""


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, instead of getting them anew from the system page by page:
    a step allocates the same ones again. It saves a tenth of the time on two cores."""
    top_pad, trim_threshold, mmap_max = -2, -1, -4      # of malloc.h
    with contextlib.suppress(AttributeError):           # other systems' libraries have no such call
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)


def give_back_memory() -> None:
    """Give what keep_freed_memory kept back to the system."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class World:
    """One process, or as many as torchrun started. With one, every method leaves things as they are."""

    def __init__(self, cfg: Config):
        self.rank, self.size, self.local_rank, self.local_size = places_by_torchrun()
        self.is_main = self.rank == 0
        self.timeout_seconds = cfg.timeout_seconds
        self._pending, self._lost = [], False
        self.phase, self.peaks = "training", {}
        if cfg.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"   # cuBLAS reads it once, when it starts
            torch.use_deterministic_algorithms(True)
        self.device = self._choose_device(cfg, self.local_rank)
        self.dtype, self.dtype_reason = choose_dtype(cfg, self.device)
        if cfg.fp8 and (problem := fp8_problem(self.device, self.dtype)):
            raise UserError(f"--fp8 {problem}; leave it out")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            threads = torch.get_num_threads() if self.size == 1 else available_cores() // self.local_size
            torch.set_num_threads(max(1, threads))
            keep_freed_memory()
            give_back_memory()      # of a run before this one, so that it is not counted
        if self.size > 1:
            with contextlib.suppress(AttributeError):   # Linux stops us if torchrun is killed, others do not
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            gpu = self.device.type == "cuda"
            with self._contact():
                dist.init_process_group("nccl" if gpu else "gloo", device_id=self.device if gpu else None,
                                        timeout=timedelta(seconds=cfg.timeout_seconds))

    def _choose_device(self, cfg: Config, local_rank: int) -> torch.device:
        if cfg.device == "cpu" or (cfg.device == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise UserError("--device cuda needs an NVIDIA or AMD GPU that torch can use; torch "
                            f"{torch.__version__} finds none; use --device cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"there are more processes than GPUs: process {local_rank + 1} on this machine "
                            f"finds {torch.cuda.device_count()}; "
                            f"use --nproc_per_node={torch.cuda.device_count()}")
        return torch.device("cuda", local_rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, in place."""
        if self.size > 1:
            with self._contact():
                dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: Tensor, owner: int) -> None:
        """Begin to add up every process's tensor on the owner, in place; done after wait()."""
        if self.size > 1:
            with self._contact():
                self._pending.append(dist.reduce(tensor, dst=owner, async_op=True))

    def begin_copy(self, tensor: Tensor, owner: int) -> None:
        """Begin to give every process the owner's tensor, in place; done after wait()."""
        if self.size > 1:
            with self._contact():
                self._pending.append(dist.broadcast(tensor, src=owner, async_op=True))

    def wait(self) -> None:
        """Wait for all that was begun."""
        with self._contact():
            for work in self._pending:
                work.wait()
        self._pending.clear()

    def share_weights(self, model: nn.Module) -> None:
        """Give every process the weights of the first."""
        for parameter in model.parameters():
            self.begin_copy(parameter.detach(), 0)
        self.wait()

    def gather(self, thing: object) -> list:
        """Every process's thing, in the order of ranks."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        with self._contact():
            dist.all_gather_object(things, thing)
        return things

    def same(self, thing: object) -> object:
        """The first process's thing, on every process."""
        if self.size == 1:
            return thing
        things = [thing]
        with self._contact():
            dist.broadcast_object_list(things, src=0)
        return things[0]

    def together(self, work: Callable) -> object:
        """What `work` returns; where it fails on one process with a UserError, all raise it."""
        problem = result = None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        problem = next(filter(None, self.gather(problem)), None)
        if problem:
            raise EveryonesError(problem)
        return result

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        """Turn the loss of another process into one clear line."""
        try:
            yield
        except RuntimeError as error:
            self._lost = True
            raise UserError(f"process {self.rank} of {self.size} lost another one, which died or was silent "
                            f"for {self.timeout_seconds:g} s (--timeout_seconds); see what it said, then "
                            f"start again with --resume auto ({first_line(error)})") from error

    def close(self) -> None:
        """Leave the other processes; at once if one of them is lost, or this could wait for it."""
        if self.size > 1 and not self._lost:
            dist.destroy_process_group()

    @property
    def reports_behind(self) -> int:
        """How many steps may be queued before what they found is read: a GPU need not wait for Python. The
        gradients of float16 have to be looked at before they are used."""
        return int(self.device.type == "cuda" and self.dtype != torch.float16)

    def synchronize(self) -> None:
        """Wait until the device has done what it was told, so that a clock may be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def memory_of(self, phase: str) -> Iterator[None]:
        """Count memory for `phase`, and no more for the phase around it."""
        around, self.phase = self.phase, self._close_phase(phase)
        yield
        self.phase = self._close_phase(around)

    def _close_phase(self, following: str) -> str:
        self.peaks[self.phase] = self.peak_memory_mib(self.phase)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back_memory()
            with contextlib.suppress(OSError):      # where it cannot be reset, the peak is the process's
                Path("/proc/self/clear_refs").write_text("5")
        return following

    def peak_memory_mib(self, phase: str = "training") -> float:
        """Peak memory of this process in a phase so far: on its GPU, or as a whole on a CPU."""
        known = self.peaks.get(phase, 0.0)
        if phase != self.phase:
            return known
        if self.device.type == "cuda":
            return max(known, torch.cuda.max_memory_allocated() / 2**20)
        status = Path("/proc/self/status")
        if status.exists():
            return max(known, int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # bytes on macOS, else KiB
        return max(known, peak / (2**20 if sys.platform == "darwin" else 2**10))

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        name = cpu_facts().get("model name", platform.processor() or platform.machine())
        return f"{name}, {available_cores()} cores"

    def facts(self) -> dict:
        return {"device": self.device_name(), "processes": self.size,
                "dtype": str(self.dtype).removeprefix("torch.")}

    def peak_flops(self, cfg: Config) -> float:
        """Floating-point operations per second that all devices could do; 0 if that is not known."""
        device = self.device_name() if self.device.type == "cuda" and self.dtype != torch.float32 else ""
        suffix = r"(-(SXM\d?|PCIE))?(-\d+GB)?( \d+GB( HBM\w+)?)?"    # memory and socket, but no other model
        known = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}{suffix}$", device))
        return 1e12 * self.size * (cfg.peak_tflops or next(known, 0))


def cpu_facts() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; nothing on systems without it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except FileNotFoundError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def choose_dtype(cfg: Config, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of products, and why: what the hardware multiplies natively, not what it can emulate."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype), "asked for with --dtype"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = f"compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return torch.bfloat16, f"{name} multiplies it natively"
        return torch.float16, f"{name} has no bfloat16; losses are scaled"
    native = {"amx_bf16", "avx512_bf16"}.intersection(cpu_facts().get("flags", "").split())
    if native:
        return torch.bfloat16, f"the CPU multiplies it natively ({', '.join(sorted(native))})"
    return torch.float32, "the CPU has neither AMX nor AVX512-BF16"


def choose_compile(cfg: Config, device: torch.device) -> tuple[bool, str]:
    """Whether to use torch.compile, and why; `auto` tries it on a tiny function.

    raises  UserError if --compile on does not work
    """
    if cfg.compile == "off":
        return False, "asked for with --compile off"
    try:
        torch.compile(lambda x: (x.sin() + 1).sum())(
            torch.ones(8, device=device, requires_grad=True)).backward()
        # with its scalars on the CPU, this one needs a C++ compiler even where the rest runs on a GPU
        one = torch.tensor(1.0)
        torch.compile(adam_update)(*torch.ones(4, 8, device=device).unbind(), one, 0.9, 0.9, one, 1e-8)
        return True, "a tiny function compiled"
    except Exception as error:      # a missing compiler, header or kernel: each has its own; all say "no"
        reason = f"torch.compile does not work here ({type(error).__name__}: {first_line(error)})"
        if cfg.compile == "on":
            raise UserError(f"{reason}; on Debian it needs: apt install g++ python3-dev") from error
        return False, reason


@dataclass(frozen=True)
class Kernels:
    """What computes the model, and why it is that."""
    compiled: bool
    compile_reason: str
    flex: dict | None       # options of FlexAttention; None: DenseAttention
    attention: str


def choose_kernels(cfg: Config, world: World) -> Kernels:
    """What works on all processes; every process asks the others, whatever works on it."""
    compiled, reason = min(world.gather(choose_compile(cfg, world.device)))     # one that cannot decides
    kernels = Kernels(compiled, reason, None, "plain products")
    if world.device.type == "cpu":      # FlexAttention has no backward there
        return kernels
    problem = flex_problem(cfg, world) if compiled else "FlexAttention needs torch.compile"
    problem = next(filter(None, world.gather(problem)), "")
    if problem:
        return dataclasses.replace(kernels, attention=f"plain products: {problem}")
    return dataclasses.replace(kernels, flex=flex_options(world.device), attention="FlexAttention")


def flex_problem(cfg: Config, world: World) -> str:
    """What goes wrong when a tiny row attends by FlexAttention, forward and backward; nothing if it works."""
    if cfg.head_dim < 16:
        return f"FlexAttention takes heads of 16 or more; these have {cfg.head_dim}"
    try:
        heads = (3, 1, 1, 2 * BLOCK, cfg.head_dim)
        q, k, v = torch.ones(heads, dtype=world.dtype, device=world.device, requires_grad=True).unbind()
        docs = torch.zeros(1, 2 * BLOCK, dtype=torch.int32, device=world.device)
        mask = block_mask(docs, torch.tensor(BLOCK, dtype=torch.int32, device=world.device))
        torch.compile(attend)(q, k, v, mask, 1.0, flex_options(world.device)).sum().backward()
        torch.cuda.synchronize()
        return ""
    except Exception as error:      # a compiler's, a driver's, a kernel's: each has its own; all say "no"
        return f"FlexAttention does not work here ({type(error).__name__}: {first_line(error)})"


def flex_options(device: torch.device) -> dict:
    """Smaller tiles for GPUs with 100 KB of shared memory, where those for 164 KB and more do not fit."""
    if torch.cuda.get_device_capability(device) not in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return {}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}


# ------------------------------------------------------------------------------------------------
# Run log: what a run says and measures; run_folder.py writes it.
# ------------------------------------------------------------------------------------------------

COLUMNS = ("step", "tokens", "epoch", "train_seconds", "train_loss", "val_loss", "val_bpb", "lr_scale",
           "grad_norm", "tokens_per_second", "mfu", "peak_memory_mib", "flops")


def introduction(cfg: Config, world: World, model: Model, kernels: Kernels) -> list[str]:
    """What is about to happen, in lines for people."""
    count, rows = micro_batch_shape(cfg, world.size)
    return [
        f"device      {world.size} x {world.device_name()}, torch {torch.__version__}",
        f"dtype       {str(world.dtype).removeprefix('torch.')}: {world.dtype_reason}",
        f"compile     {'on' if kernels.compiled else 'off'}: {kernels.compile_reason}",
        f"attention   by {kernels.attention}",
        f"model       {model.num_parameters():,} parameters: {cfg.num_layers} layers, width {cfg.model_dim}, "
        f"{cfg.num_heads} heads of {cfg.head_dim}, {cfg.vocab_size:,} tokens, "
        f"{cfg.num_value_tables} value embeddings",
        f"budget      {cfg.num_steps:,} steps of {cfg.batch_tokens:,} tokens"
        + (f", or {cfg.train_minutes:g} minutes of training if they end first" if cfg.train_minutes else "")
        + f"; {world.size} x {count} micro-batches of {rows} x {cfg.seq_len}",
        *early_lines(cfg),
        f"memory      about {memory_estimate_mib(cfg, model, world):,.0f} MiB for each process",
    ]


def early_lines(cfg: Config) -> list[str]:
    """What is not at work from the start, and until when."""
    def until(share: float) -> str:
        most = most_early_tokens(cfg)
        is_bound = most < share * cfg.num_steps * cfg.batch_tokens
        return (f"in the first {share:.0%} of training"
                + (f", or {most / 1e6:,.1f} million tokens if that is less" if is_bound else ""))
    stage, lines = stage_at(cfg, 0, 0), []
    if stage.depth < cfg.num_layers:
        lines.append(f"layers      1 of {cfg.num_layers} {until(cfg.depth_warmup_frac)}")
    if stage.softmax_sample:
        lines.append(f"softmax     over samples of {stage.softmax_sample:,} tokens "
                     f"{until(cfg.sampled_softmax_frac)}")
    return lines


def describe_tasks(tasks: dict[str, Task | None]) -> list[str]:
    return [f"{name:<12}" + (f"{len(task.questions):,} rows at the end{task.note}" if task else
                             f"not here; {command_to_fetch(name)} fetches it")
            for name, task in tasks.items()]


def describe_data(cfg: Config, dataset: Dataset, rows: Rows, held_out: HeldOut) -> str:
    used = rows.num_rows * cfg.seq_len / rows.bases[-1]
    epochs = cfg.num_steps * cfg.rows_per_step / rows.num_rows
    advice = " (beyond 4, repeated text teaches little: take more text or fewer steps)" if epochs > 4 else ""
    return (f"data        {dataset.folder.name}: {rows.bases[-1]:,} tokens, "
            f"and {len(held_out.tokens):,} held out; rows hold {used:.0%} of them\n"
            f"            {cfg.num_steps:,} steps are {epochs:.2f} epochs{advice}")


def pace(run: "Run") -> dict[str, float]:
    """How far a run is, and how fast since the last row."""
    cfg, seconds = run.cfg, run.clock.seconds
    step, second, flops = run.logged
    speed = cfg.batch_tokens * (run.step - step) / (seconds - second)
    values = {"step": run.step, "tokens": run.step * cfg.batch_tokens,
              "epoch": run.step * cfg.rows_per_step / run.rows.num_rows, "train_seconds": seconds,
              "tokens_per_second": speed, "peak_memory_mib": run.world.peak_memory_mib("training"),
              "flops": run.flops}
    peak = run.world.peak_flops(cfg)
    return values | ({"mfu": (run.flops - flops) / (seconds - second) / peak} if peak else {})


def conclusion(cfg: Config, folder: Path, summary: dict, samples: list[dict]) -> list[str]:
    xz = ""
    if summary.get("xz_bpb"):
        verdict = "more than this model" if summary["xz_bpb"] > summary["val_bpb"] else "less than this model"
        xz = f"; xz -9e needs {summary['xz_bpb']:.3f} for the same text, {verdict}"
    change = ["--num_layers", str(cfg.num_layers + 2), "--model_name", "try"]
    again = shlex.join([*program(), *sys.argv[1:], *change])
    lines = ["", "=" * 100,
             f"run         {os.path.relpath(folder)}  "
             "(loss.png, summary.json, samples.jsonl and the code that ran)",
             f"val_loss    {summary['val_loss']:.4f} nats per token "
             f"on {summary['held_out_tokens']:,} held-out tokens",
             f"val_bpb     {summary['val_bpb']:.4f} bits per byte of that text{xz}",
             f"time        {minutes(summary['train_seconds'])} of training "
             f"at {summary['tokens_per_second']:,.0f} tokens/s, "
             f"{minutes(summary['compile_seconds'])} of compiling; "
             f"peak memory {summary['peak_memory_mib']:,.0f} MiB"]
    if summary.get("target"):
        lines.append(in_words(summary["target"]))
    for name, result in summary.get("benchmarks", {}).items():
        lines.append(f"{name:<12}{task_in_words(result)}")
    if "cost" in summary:
        lines.append(f"cost        {summary['cost']:.2f}")
    if cfg.compare_to:
        from compare import read_run, standing
        try:
            lines.append(f"compare     {standing(read_run(folder), cfg.compare_to)}")
        except (UserError, OSError) as error:       # the baseline has gone since the run began
            lines.append(f"compare     not possible: {error}")
    if samples:
        text = samples[0]["prompt"] + "⟨⟩" + samples[0]["text"]
        lines += ["sample      held-out beginning ⟨⟩ continuation:",
                  *("            " + line for line in text.splitlines())]
    lines += [f"try next    change one thing and compare: {again}",
              "            your own text: see \"Your own text\" in README.md", "=" * 100]
    return lines


def in_words(target: dict) -> str:
    return (f"target      val_loss {target['target_loss']:g} is reached after {target['step']:,} steps, "
            f"{target['tokens']:,} tokens and {minutes(target['train_seconds'])} of training, its end")


def task_in_words(result: dict) -> str:
    acc = result["acc"]
    other = (f"perplexity {result['perplexity']:.2f}" if "perplexity" in result else
             f"{result['acc_norm_bytes']['value']:.4f} by bytes")
    return (f"{acc['value']:.4f} right ({acc['low']:.4f} to {acc['high']:.4f}), {other}; "
            f"chance {result['chance']:.4f}; {result['rows']:,} rows")


# ------------------------------------------------------------------------------------------------
# Training: the sections above, put together.
# ------------------------------------------------------------------------------------------------

LARGEST_XZ_TEXT = 2**24             # bytes; xz -9e takes a second for each two million
LARGEST_CPU_MICRO_BATCH = 2**14     # tokens; more are not faster on a CPU
WORTH_COMPILING = 1000              # rows of multiple choice to score with weights from a file


class Clock:
    """Seconds of training; it stands while a run compiles, validates or writes.

    A GPU is waited for when the clock starts and stops; in between, steps queue up.
    """

    def __init__(self, world: World):
        self.world, self.stopped_at, self.begun = world, 0.0, None

    @property
    def seconds(self) -> float:
        return self.stopped_at + (time.perf_counter() - self.begun if self.begun else 0.0)

    def start(self) -> None:
        self.world.synchronize()
        self.begun = time.perf_counter()

    def stop(self) -> None:
        self.world.synchronize()
        self.stopped_at, self.begun = self.seconds, None


class NonFinite(EveryonesError):
    """A loss or gradient that is not a number; the run cannot go on."""


def open_data(cfg: Config, world: World) -> tuple[Config, Dataset, Encoding, Rows, HeldOut]:
    """The verified data of a run with their tokenizer, and its Config with the vocabulary that follows."""
    dataset, tokenizer = open_dataset(cfg.data, cfg.tokenizer)
    if cfg.vocab_size not in (0, tokenizer.n_vocab):
        raise UserError(f"--vocab_size must be {tokenizer.n_vocab}, the tokens of {tokenizer.name} with "
                        f"<|endoftext|>; it is {cfg.vocab_size}")
    cfg = dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab)
    dataset.verify(world.local_rank, world.local_size)      # each machine has its own disk
    rows = Rows(dataset.tokens("train"), cfg, tokenizer.eot_token)
    return cfg, dataset, tokenizer, rows, HeldOut(dataset.tokens("val"), cfg, tokenizer)


def candidates_of(rows: Rows, cfg: Config) -> Candidates | None:
    return Candidates(rows, cfg) if cfg.sampled_softmax_frac else None


def with_sample(cfg: Config, candidates: Candidates | None) -> Config:
    """The Config with the size of the softmax's sample; 0: none is taken."""
    return dataclasses.replace(cfg, softmax_sample=candidates.size) if candidates else cfg


def memory_estimate_mib(cfg: Config, model: Model, world: World) -> float:
    """Roughly what a process needs: weights, gradients, optimizer state, activations and loss chunks.

    Between 0.9 and 1.3 of what was measured on CPUs, where torch itself counts, too; compiled needs less.
    """
    optimizer, named = cfg.optimizer_class, model.named_parameters()
    kept = sum(p.numel() * len(optimizer.kinds[optimizer.group_of(name, p)]) for name, p in named)
    states = 4 * (2 * model.num_parameters() + kept / world.size)
    _, rows = micro_batch_shape(cfg, world.size)
    width = model.dtype.itemsize
    per_token = cfg.num_layers * width * cfg.model_dim * (21 + 5 * cfg.mlp_ratio) + 2 * width * cfg.model_dim
    masks = 0 if model.flex is not None else 2 * rows * cfg.seq_len**2 * width
    loss = 4 * model.head.numel() * 2 + (2**25 if world.device.type == "cpu" else 2**28) * 4
    loss += 12 * softmax_groups(cfg) * stage_at(cfg, 0, 0).softmax_sample * cfg.model_dim
    torch_itself = 450 * 2**20 if world.device.type == "cpu" else 0
    return (torch_itself + states + rows * cfg.seq_len * per_token + masks + loss) / 2**20


def choose_micro_batch(cfg: Config, model: Model, world: World, saved: dict | None = None) -> Config:
    """The Config with micro-batches that seem to fit: all a process has in a step, or half, and so on."""
    share = cfg.seq_len * math.ceil(cfg.rows_per_step / world.size)
    if cfg.micro_batch_tokens:
        return dataclasses.replace(cfg, micro_batch_tokens=min(cfg.micro_batch_tokens, share))
    if saved and saved["identity"]["processes"] == world.size:
        # sums over other micro-batches would differ in the last bit
        return dataclasses.replace(cfg, micro_batch_tokens=saved["micro_batch_tokens"])
    if world.device.type == "cpu":
        share = min(share, max(cfg.seq_len, LARGEST_CPU_MICRO_BATCH))
    cfg = dataclasses.replace(cfg, micro_batch_tokens=share)
    while memory_estimate_mib(cfg, model, world) > 0.8 * free_memory_mib(world) and share > cfg.seq_len:
        cfg = with_half_micro_batch(cfg)
        share = cfg.micro_batch_tokens
    return cfg


def with_half_micro_batch(cfg: Config) -> Config:
    rows = math.ceil(cfg.micro_batch_tokens / cfg.seq_len / 2)
    return dataclasses.replace(cfg, micro_batch_tokens=rows * cfg.seq_len)


def memory_advice(cfg: Config, world: World, flex: dict | None) -> str:
    """The three flags that would save most memory, by the estimate, the most effective first."""
    smaller = {"seq_len": cfg.seq_len // 2, "model_dim": cfg.model_dim // 2,
               "num_layers": cfg.num_layers // 2, "value_embeddings": 0, "mlp_ratio": cfg.mlp_ratio // 2}
    needs, names = [], {field.name for field in dataclasses.fields(cfg)}
    for knob, value in smaller.items():
        if knob not in names:       # of another model
            continue
        with contextlib.suppress(UserError):    # a rule of Config forbids this one
            changed = dataclasses.replace(cfg, **{knob: value, "micro_batch_tokens": 0})
            changed = dataclasses.replace(changed, micro_batch_tokens=changed.seq_len)
            with torch.device("meta"):
                model = changed.new_model(0, world.dtype, flex)
            needs.append((memory_estimate_mib(changed, model, world), f"--{knob} {value}"))
    return ", then ".join(f"{flag} (about {mib:,.0f} MiB)" for mib, flag in sorted(needs)[:3])


def make_model(cfg: Config, eot_id: int, world: World, kernels: Kernels) -> tuple[Model, Optimizer]:
    torch.manual_seed(cfg.seed)
    model = cfg.new_model(eot_id, world.dtype, kernels.flex).to(world.device)
    world.share_weights(model)
    products = torch.bfloat16 if world.dtype == torch.bfloat16 else torch.float32
    optimizer = cfg.optimizer_class(model, cfg, world, products)
    if kernels.compiled:
        model.compile_parts()
        optimizer.compile_parts()
    return model, optimizer


def warm_up(model: Model, optimizer: Optimizer, cfg: Config, world: World) -> None:
    """Compile every kernel before the clock starts, on rows that predict nothing; no weight changes."""
    _, rows = micro_batch_shape(cfg, world.size)
    inputs = torch.full((rows, cfg.seq_len), model.eot_id, device=world.device)
    targets = torch.full_like(inputs, -1)
    stage = stage_at(cfg, 0, 0)
    model(inputs, targets, Stage(cfg.num_layers, stage.window_frac)).backward()
    optimizer.gradient_norms()      # names a parameter without gradient now, not when its layer wakes up
    if stage.softmax_sample:
        sample = torch.arange(stage.softmax_sample, device=world.device).expand(softmax_groups(cfg), -1)
        model(inputs, targets, stage, (sample, torch.zeros_like(sample, dtype=torch.float32))).backward()
    model.token_losses(inputs, targets)
    optimizer.clear_gradients()
    optimizer.warm_up()
    world.synchronize()


def fit_micro_batch(model: Model, optimizer: Optimizer, cfg: Config, world: World, log: RunLog) -> Config:
    """Warm up with the micro-batch of cfg, or half of it, and so on, until all processes have the memory.

    The tokens of a step stay the same, so nothing changes but its speed.
    raises  UserError with three flags that need less memory if one row is too much
    """
    while True:
        fits = True
        try:
            warm_up(model, optimizer, cfg, world)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if all(world.gather(fits)):
            return cfg
        optimizer.clear_gradients()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = with_half_micro_batch(cfg)
        if smaller == cfg:
            raise EveryonesError(f"not even one row of {cfg.seq_len} tokens fits into memory; use "
                                 + memory_advice(cfg, world, model.flex))
        log.say(f"micro-batches of {cfg.micro_batch_tokens:,} tokens do not fit into memory; "
                f"trying {smaller.micro_batch_tokens:,}")
        cfg = smaller


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a class for it on GPUs; for CPUs and for cuBLAS only words."""
    words = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or any(word in str(error) for word in words))


class StopSignals:
    """SIGTERM and SIGINT (Ctrl-C) let a run save and stop after its step; a second Ctrl-C ends it at once.

    at_once  raise Stopped wherever the run is, as when all is saved
    """

    def __init__(self, at_once: bool = False):
        self.at_once, self.received = at_once, 0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._receive)
                       for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if self.at_once:
            raise Stopped(number)
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class Stopped(Exception):
    """The run was told to stop by the signal of this number, and is saved."""


@dataclass
class Run:
    """All that a run consists of, and how far it is."""
    cfg: Config
    world: World
    model: Model
    optimizer: Optimizer
    rows: Rows
    candidates: Candidates | None
    held_out: HeldOut
    log: RunLog
    clock: Clock
    loss_scale: "LossScale"
    step: int = 0
    progress: float = 0.0               # share of the budget that is used
    values: dict = dataclasses.field(default_factory=dict)      # of the last step, as metrics.csv has them
    flops: float = 0.0                  # floating-point operations so far
    logged: tuple[int, float, float] = (0, 0.0, 0.0)    # step, seconds and flops of metrics.csv's last row
    best_val_loss: float = math.inf
    best_step: int = 0
    reports: list["Report"] = dataclasses.field(default_factory=list)   # of steps not yet heard from
    target: dict | None = None          # when val_loss first was as low as --target_loss
    save_seconds: float = 0.0           # time that went into checkpoints
    last_save: float = dataclasses.field(default_factory=time.perf_counter)

    @functools.cached_property
    def work(self) -> list[float]:
        return work_by_percent(self.cfg, self.model)

    @property
    def validates(self) -> bool:
        return self.progress >= 1 or is_multiple(self.step, self.cfg.val_every)

    @property
    def looks(self) -> bool:
        return self.validates or self.step == 1 or is_multiple(self.step, self.cfg.log_every)

    @property
    def is_time_to_save(self) -> bool:
        """Whether the first process finds the last checkpoint old."""
        age = time.perf_counter() - self.last_save
        return self.world.is_main and 0 < 60 * self.cfg.save_every_minutes < age

    def save(self) -> None:
        """Write a checkpoint: all a run needs to go on, on any number of processes."""
        begun = time.perf_counter()
        self.world.synchronize()
        weights = self.model.state_dict().items() if self.world.is_main else ()
        state = {
            "step": self.step, "tokens": self.step * self.cfg.batch_tokens,
            "model": {name: value.cpu() for name, value in weights},
            "optimizer": self.optimizer.state(),
            "loss_scale": self.loss_scale.state(),
            "random_states": self.world.gather(random_state(self.world)),
            "values": self.values, "logged": self.logged, "flops": self.flops,
            "best": {"val_loss": self.best_val_loss, "step": self.best_step},
            "train_seconds": self.clock.seconds, "save_seconds": self.save_seconds,
            "peak_memory_mib": {phase: self.world.peak_memory_mib(phase) for phase in self.world.peaks},
            "micro_batch_tokens": self.cfg.micro_batch_tokens}
        self.log.checkpoint(state)
        self.last_save = time.perf_counter()
        self.save_seconds += self.last_save - begun

    def load(self, saved: dict | None) -> None:
        """Go on where the first process's checkpoint was made; the other processes pass None."""
        if saved:
            self.model.load_state_dict(saved["model"])
        self.world.share_weights(self.model)
        self.optimizer.load(saved and saved["optimizer"])
        large = ("model", "optimizer", "rows")
        small = self.world.same(saved and {key: saved[key] for key in saved if key not in large})
        self.step, self.values, self.logged = small["step"], small["values"], small["logged"]
        self.flops = small["flops"]
        self.clock.stopped_at = small["train_seconds"]
        self.progress = budget_used(self.cfg, self.world, self.step, self.clock)
        self.best_val_loss, self.best_step = small["best"]["val_loss"], small["best"]["step"]
        self.save_seconds = small["save_seconds"]
        self.loss_scale.load(small["loss_scale"])
        self.world.peaks |= small["peak_memory_mib"]
        states = small["random_states"]
        if len(states) == self.world.size:      # another number of processes draws other random numbers
            set_random_state(self.world, states[self.world.rank])


def random_state(world: World) -> dict[str, Tensor]:
    gpu = {"cuda": torch.cuda.get_rng_state()} if world.device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | gpu


def set_random_state(world: World, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def check_norms(optimizer: Optimizer, norms: Tensor, loss: float, step: int) -> float:
    """The norm of all gradients together, from the norms of each parameter's, (P).

    raises  NonFinite that names the step and what is not finite
    """
    total = torch.linalg.vector_norm(norms).item()
    if not math.isfinite(loss):
        raise NonFinite(f"the loss of step {step} is {loss}; try a lower learning rate, or --dtype float32")
    if not math.isfinite(total):
        culprit = next(name for name, norm in zip(optimizer.parameters, norms.tolist(), strict=True)
                       if not math.isfinite(norm))
        raise NonFinite(f"the gradient of {culprit} is not finite in step {step}; try a lower learning rate, "
                        "or --dtype float32")
    return total


def open_run(cfg: Config, world: World) -> tuple[Config, TextIO | None, dict | None]:
    """The first process's knobs for all; on it alone, the log and the checkpoint of the run that goes on."""
    cfg = world.same(cfg)

    def hold_and_read() -> tuple[TextIO | None, dict | None]:
        if not cfg.resume or not world.is_main:
            return None, None
        folder = Path(cfg.resume)
        return locked_log(folder), read_checkpoint(folder)
    return cfg, *world.together(hold_and_read)


def check_baseline(cfg: Config) -> None:
    """raises  UserError if --compare_to names no finished run"""
    if cfg.compare_to:
        # here, since it is no part of what makes a result
        from compare import baseline
        baseline(cfg.compare_to)


def check_shapes(weights: dict[str, Tensor], model: Model) -> None:
    """raises  UserError if the weights of a checkpoint do not belong to this model"""
    then = {name: list(weight.shape) for name, weight in weights.items()}
    now = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differing:
        name = differing[0]
        raise UserError(f"the saved weights are of another model: {name} has shape {now.get(name)}, had "
                        f"{then.get(name)}; only knobs and code that leave all shapes as they are can change")


def train(cfg: Config, world: World) -> None:
    """Train, validate, sample, and leave a run folder; or go on with a run that was stopped."""
    cfg, text, saved = open_run(cfg, world)
    cfg, dataset, tokenizer, rows, held_out = world.together(lambda: open_data(cfg, world))
    # read only when all processes have found their share of the data as it should be
    candidates = world.together(lambda: candidates_of(rows, cfg))
    tasks = world.together(lambda: tasks_of(cfg) if world.is_main else None)
    tasks = world.same(tasks)   # other machines need not have the files
    identity = identity_of(cfg.script, cfg, world, tokenizer, dataset)
    facts = world.gather(identity)
    for fact in ("data_sha256", "tokenizer_sha256", "sources"):
        if any(other[fact] != identity[fact] for other in facts):
            raise EveryonesError(f"the machines differ in {fact}; copy scripts, data and tokenizer to all")
    changes = world.same(saved and changes_since(saved, cfg, identity)) or []
    if changes and not cfg.resume_changed:
        raise EveryonesError(f"{cfg.resume} began otherwise: {'; '.join(changes)}. "
                             "Undo that, or go on all the same with --resume_changed")
    world.together(lambda: world.is_main and check_baseline(cfg))
    kernels = choose_kernels(cfg, world)
    model, optimizer = make_model(cfg, tokenizer.eot_token, world, kernels)
    world.together(lambda: saved and check_shapes(saved["model"], model))
    log = world.together(lambda: RunLog(cfg, COLUMNS, identity, tokenizer, saved, text, world.is_main))
    with log, last_words(log):
        # sizes that are found here stay out of config.json, which has the knobs as they were given
        sized = world.same(choose_micro_batch(with_sample(cfg, candidates), model, world, saved))
        log.say("\n".join([*introduction(sized, world, model, kernels),
                           describe_data(cfg, dataset, rows, held_out), *describe_tasks(tasks)]))
        begun = time.perf_counter()
        sized = fit_micro_batch(model, optimizer, sized, world, log)
        compile_seconds = time.perf_counter() - begun
        run = Run(sized, world, model, optimizer, rows, candidates, held_out, log, Clock(world),
                  LossScale(enabled=world.dtype == torch.float16))
        torch.manual_seed(cfg.seed + 1 + world.rank)
        if cfg.resume:
            run.load(saved)
        for change in changes:
            log.say(f"resumed although {change}")
        log.say(f"kernels ready after {compile_seconds:.1f} s; training "
                + (f"goes on after step {run.step}" if cfg.resume else "begins"))
        saved = None    # its memory is needed
        training_loop(run)
        with StopSignals(at_once=True):
            finish(run, tokenizer, [task for task in tasks.values() if task], compile_seconds)


def tasks_of(cfg: Config) -> dict[str, Task | None]:
    """What --benchmarks names; None for one that is not here."""
    return {name: benchmark_if_here(name, cfg.hellaswag_rows if name == "hellaswag" else 0)
            for name in cfg.benchmark_names}


@contextlib.contextmanager
def last_words(log: RunLog) -> Iterator[None]:
    """Let whatever ends a run early say in one line how to go on."""
    try:
        yield
    except NonFinite as error:
        log.note(str(error))
        log.summary(f"failed: {error}", {})
        raise EveryonesError(f"{error}; {log.last_good()}") from error
    except Stopped as stop:
        log.say(f"stopped by {signal.Signals(stop.args[0]).name}; {log.last_good()}")
        sys.exit(128 + stop.args[0])
    except KeyboardInterrupt:
        log.say(f"interrupted; {log.last_good()}")
        raise
    except OSError as error:
        raise UserError(f"{error.strerror}: {error.filename or log.folder}; {log.last_good()}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("the memory does not suffice; a smaller --micro_batch_tokens needs less and changes "
                        f"no result; {log.last_good()}") from error


def training_loop(run: Run) -> None:
    """Step until the budget is used or the target reached.

    raises  Stopped, saved, on all processes when one of them was told to stop
    """
    if run.step:
        look(run)       # checkpoints are made before the look that belongs to their step
    with StopSignals() as signals, collector_at_rest(), prepared_steps(run) as steps:
        run.clock.start()
        while run.progress < 1 and not run.target:
            run.reports.append(train_step(run, next(steps), signals))
            run.step += 1
            run.progress = budget_used(run.cfg, run.world, run.step, run.clock)
            stops, saves = hear(run, behind=0 if run.looks else run.world.reports_behind)
            saves = saves or stops or run.validates or is_multiple(run.step, run.cfg.save_every_steps)
            if saves or run.looks:
                hear(run, behind=0)
                run.clock.stop()
                if saves:
                    run.save()
                if stops:
                    raise Stopped(signals.received or signal.SIGTERM)
                look(run)
                run.clock.start()


def train_step(run: Run, batch: Batch, signals: "StopSignals") -> "Report":
    """One step of the optimizer; on a GPU it is only queued. An overflow of float16 leaves the weights alone.

    raises  NonFinite, before the weights are touched, where the report can be read at once
    """
    cfg, world, model, optimizer = run.cfg, run.world, run.model, run.optimizer
    stage = stage_at(cfg, run.step, run.progress)
    sample = batch.sample if stage.softmax_sample else None
    if sample is None:
        stage = dataclasses.replace(stage, softmax_sample=0)
    run.flops += cfg.batch_tokens * model.flops_per_token(stage)
    optimizer.asleep = model.asleep(stage)
    # the loss of a step is the mean over all its targets, whoever computes them
    loss = torch.zeros((), device=world.device)
    for number, (inputs, targets) in enumerate(batch.micro_batches, start=1):
        optimizer.last_backward = number == len(batch.micro_batches)
        part = model(inputs, targets, stage, sample) / batch.num_targets
        run.loss_scale.backward(part)
        loss += part.detach()
    # all processes learn the loss, whether one was told to stop, whether the first wants to save
    told = torch.tensor([float(signals.received), float(run.is_time_to_save)])
    shared = world.sum(torch.cat([loss[None], told.to(world.device, non_blocking=True)]))   # (3)
    norms = optimizer.gradient_norms()                                                      # (P)
    scale = optimizer.lr_scale(cfg, run.step, run.progress)
    fits = run.loss_scale.unscale(optimizer, norms)
    if cfg.grad_clip and fits:
        optimizer.divide_gradients((torch.linalg.vector_norm(norms) / cfg.grad_clip).clamp(min=1))
    report = Report(run.step + 1, scale, torch.cat([shared, norms]), fits)
    if not world.reports_behind:
        report.read(optimizer)
    if fits:
        optimizer.step(scale)
    return report


class Report:
    """What a step found: loss, whether to stop and to save, norms of gradients. On its way from the device
    while later steps are queued; reading it waits for it.

    numbers  (3 + P) on the device
    fits     whether the gradients fitted into their dtype
    """

    def __init__(self, step: int, scale: float, numbers: Tensor, fits: bool):
        self.step, self.scale, self.fits = step, scale, fits
        self.arrival = torch.cuda.Event() if numbers.is_cuda else None
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.values: dict[str, float] = {}      # for metrics.csv, once read
        self.stops = self.saves = False
        if self.arrival:
            self.arrival.record()

    def read(self, optimizer: Optimizer) -> None:
        """Wait for the numbers and fill in what they say, the first time.

        raises  NonFinite that names the step and what is not finite
        """
        if self.values:
            return
        if self.arrival:
            self.arrival.synchronize()
        loss, stops, saves = self.numbers[:3].tolist()
        self.stops, self.saves = stops > 0, saves > 0
        self.values = {"train_loss": loss, "lr_scale": self.scale}
        if self.fits:
            self.values["grad_norm"] = check_norms(optimizer, self.numbers[3:], loss, self.step)


def hear(run: Run, behind: int) -> tuple[bool, bool]:
    """Read the reports of all steps but the last `behind`: whether one asks to stop, and whether to save."""
    stops = saves = False
    while len(run.reports) > behind:
        report = run.reports.pop(0)
        report.read(run.optimizer)
        run.values, stops, saves = report.values, stops or report.stops, saves or report.saves
    return stops, saves


@contextlib.contextmanager
def prepared_steps(run: Run) -> Iterator[Iterator[Batch]]:
    """The batch of each step from now on, on the device; made while the step before runs."""
    cfg, world = run.cfg, run.world

    def make(step: int) -> Batch:
        # progress only grows, so a step that samples has its sample
        samples = stage_at(cfg, step, run.progress).softmax_sample
        batch = Batch(run.rows.targets_in_step(step, cfg.rows_per_step),
                      list(run.rows.micro_batches(step, cfg, world.rank, world.size)),
                      run.candidates.of(step) if samples else None)
        return batch.each(Tensor.pin_memory) if world.device.type == "cuda" else batch

    def steps() -> Iterator[Batch]:
        following = helper.submit(make, run.step)
        for step in itertools.count(run.step + 1):
            batch, following = following.result(), helper.submit(make, step)
            yield batch.each(lambda tensor: tensor.to(world.device, non_blocking=True))

    with ThreadPoolExecutor(1) as helper:
        yield steps()


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Keep Python's garbage collector from stopping a step to walk through all modules; look() calls it."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def look(run: Run) -> None:
    """Validate and write a row of metrics.csv, where the step is one for that."""
    if not run.looks:
        return
    gc.collect()
    run.values |= pace(run)
    run.logged = (run.step, run.clock.seconds, run.flops)
    if run.validates:
        _, rows_at_once = micro_batch_shape(run.cfg, run.world.size)
        with run.world.memory_of("validation"):
            result = run.held_out.evaluate(run.model, rows_at_once, run.world,
                                           stage_at(run.cfg, run.step, run.progress))
        run.values |= dataclasses.asdict(result)
        if result.val_loss < run.best_val_loss:
            run.best_val_loss, run.best_step = result.val_loss, run.step
            run.log.keep_best(run.step)
        if result.val_loss <= run.cfg.target_loss:
            run.target = {"target_loss": run.cfg.target_loss, "step": run.step,
                          "tokens": run.step * run.cfg.batch_tokens,
                          "train_seconds": round(run.clock.seconds, 2)}
    run.log.row(run.values, work_done(run))
    if run.validates:
        run.log.picture(at_end=False)
    if run.target:
        run.log.note(in_words(run.target))


def work_done(run: Run) -> float:
    """Share of the run's work that is done, 0 to 1."""
    if run.cfg.train_minutes and run.progress > run.step / run.cfg.num_steps:
        return run.progress     # the clock decides
    done = np.interp(run.progress, np.linspace(0, 1, 101), [0, *np.cumsum(run.work)])
    return float(done / sum(run.work))


def work_by_percent(cfg: Config, model: Model) -> list[float]:
    """Floating-point operations of each hundredth of the budget; steps of all layers take more."""
    steps = cfg.num_steps / 100
    stages = [stage_at(cfg, int(percent * steps), percent / 100) for percent in range(100)]
    return [steps * cfg.batch_tokens * model.flops_per_token(stage) for stage in stages]


def is_multiple(step: int, every: int) -> bool:
    """Whether `step` is one of every so many; never where that is 0."""
    return every > 0 and step % every == 0


def budget_used(cfg: Config, world: World, step: int, clock: Clock) -> float:
    """Share of the budget that is used, 0 to 1: of the steps, or of the minutes if that is more."""
    shares = [step / cfg.num_steps]
    if cfg.train_minutes:
        shares.append(world.same(clock.seconds) / (60 * cfg.train_minutes))
    return min(1.0, max(shares))


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, arXiv:1710.03740); 1 where not enabled.

    float16 has few small numbers: losses are scaled up before backward, gradients down after. The scale
    doubles after 1,000 steps without overflow; after one with, it halves and the step is left out.
    """

    def __init__(self, enabled: bool):
        self.enabled, self.value, self.good_steps = enabled, 2.0**16 if enabled else 1.0, 0

    def backward(self, loss: Tensor) -> None:
        (loss * self.value).backward()

    def unscale(self, optimizer: Optimizer, norms: Tensor) -> bool:
        """Bring gradients and their norms (P) to their true size; False if they overflowed and were cleared.

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


def finish(run: Run, tokenizer: Encoding, tasks: list[Task], compile_seconds: float) -> None:
    """Weights, benchmarks, samples, the comparison with xz, picture, summary, and last what a newcomer wants
    to know."""
    cfg, model, held_out, log = run.cfg, run.model, run.held_out, run.log
    results = run.values | {"compile_seconds": round(compile_seconds, 1)}
    if cfg.save_model:
        log.weights(model)
    with run.world.memory_of("evaluation"):
        for task in tasks:
            log.say(f"scoring {len(task.questions):,} rows of {BENCHMARKS[task.name].title}")
            _, rows_at_once = micro_batch_shape(cfg, run.world.size)
            scores = score(model, tokenizer, task.questions, rows_at_once, run.world)
            log.benchmark(task.name, scores.items)
            for line in scores.lines():
                log.note(line)
            result = task.facts() | scores.summary() | scored_on(cfg, run.world)
            results.setdefault("benchmarks", {})[task.name] = result
        if not run.world.is_main:
            return
        model.eval()
        model.flex = None       # texts have many lengths, and none is worth compiling for
        # the compiler takes a second to import; only a model that is compiled has loaded it
        eager = torch.compiler.set_stance("force_eager") if model.is_compiled else contextlib.nullcontext()
        with eager:
            samples = write_samples(cfg, run.world, model, tokenizer, held_out)
    log.samples(samples)
    text = held_out.text()
    if len(text) <= LARGEST_XZ_TEXT:
        results["xz_bpb"] = xz_bits_per_byte(text)
    log.picture(results.get("xz_bpb"))
    results["parameters"] = model.num_parameters()
    results["tokens_per_second"] = results["tokens"] / results["train_seconds"]
    results["held_out_tokens"], results["held_out_bytes"] = len(held_out.tokens), len(text)
    results["held_out_sha256"] = hashlib.sha256(text).hexdigest()
    results["best_val_loss"], results["best_step"] = run.best_val_loss, run.best_step
    results["target"] = run.target
    results["checkpoint_seconds"] = round(run.save_seconds, 2)
    for phase in ("training", "validation", "evaluation"):
        results[f"peak_memory_mib_{phase}"] = round(run.world.peak_memory_mib(phase), 1)
    summary = log.summary("finished", results)
    remove_checkpoints(log.folder, keep_best=cfg.save_model and run.best_step < run.step)
    for line in conclusion(cfg, log.folder, summary, samples):
        log.say(line)


def write_samples(cfg: Config, world: World, model: Model, tokenizer: Encoding, held_out: HeldOut,
                  ) -> list[dict]:
    """Continue the beginnings of held-out documents, which the model has never seen."""
    begins = np.flatnonzero(held_out.tokens == held_out.eot_id)
    begins = begins[np.linspace(0, len(begins) - 1, min(cfg.num_samples, len(begins))).astype(int)]
    prompts = [held_out.tokens[begin:begin + 17].tolist() for begin in begins]
    if not prompts:
        return []
    continuations = [generate(model, torch.tensor([prompt], device=world.device), cfg)[0]
                     for prompt in prompts]
    return [{"prompt": tokenizer.decode(prompt[1:]), "text": tokenizer.decode(continuation),
             "temperature": cfg.temperature, "top_k": cfg.top_k, "seed": cfg.seed}
            for prompt, continuation in zip(prompts, continuations, strict=True)]


def typed_lines() -> Iterator[str]:
    """What a person types, until Ctrl-D."""
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def sample_run(cfg: Config, world: World) -> None:
    """Write texts with the weights that a run left: of --prompt, or of each line that is typed."""
    folder = Path(cfg.sample)
    if summary_of(folder).get("code_sha256") != documents.sha256_of(cfg.script):
        print(f"warning: {cfg.script.name} has changed since it trained {folder}", file=sys.stderr)
    if not world.is_main:
        return
    if not cfg.prompt and not sys.stdin.isatty():
        raise UserError("--sample needs a --prompt; it reads lines from a terminal, and this is none")
    model, tokenizer = load_trained(folder, cfg, world)
    model.eval()
    for number, prompt in enumerate([cfg.prompt] if cfg.prompt else typed_lines()):
        tokens = [tokenizer.eot_token, *encode(tokenizer, prompt)[0]]
        prompts = torch.tensor([tokens] * max(1, cfg.num_samples), device=world.device)
        for text in generate(model, prompts, dataclasses.replace(cfg, seed=cfg.seed + number)):
            print(prompt + tokenizer.decode(text), end="\n\n", flush=True)


def scored_on(cfg: Config, world: World) -> dict:
    """What a score may depend on in its last digits, and the script."""
    return world.facts() | {"code_sha256": documents.sha256_of(cfg.script)}


def score_saved(folder: Path, task: Task, config: type[Config] = Config) -> tuple[Scores, dict, bool]:
    """Score the weights that a run left, on as many processes as there are.

    returns  the scores, what they were made on, and whether this is the first process
    """
    cfg = config(**known_knobs(folder, config) | {"device": "auto", "compile": "auto", "deterministic": False,
                                          "fp8": False})
    world = World(cfg)
    try:
        model, tokenizer = world.together(lambda: load_trained(folder, cfg, world))
        if len(task.questions) >= WORTH_COMPILING and choose_compile(cfg, world.device)[0]:
            model.compile_parts()
        with torch.no_grad():
            scores = score(model, tokenizer, task.questions, max(1, 2**14 // cfg.seq_len), world)
        return scores, scored_on(cfg, world), world.is_main
    finally:
        world.close()


def continue_prompts(folder: Path, prompts: list[str], config: type[Config] = Config, **sampling,
                     ) -> Iterator[str]:
    """Go on with each text by the weights that a run left, the n-th one with seed n; for judge.py."""
    cfg = dataclasses.replace(parse_config([f"--sample={folder}"], config), **sampling)
    world = World(cfg)
    try:
        model, tokenizer = load_trained(folder, cfg, world)
        model.eval()
        for seed, prompt in enumerate(prompts):
            tokens = torch.tensor([[tokenizer.eot_token, *encode(tokenizer, prompt)[0]]], device=world.device)
            yield tokenizer.decode(generate(model, tokens, dataclasses.replace(cfg, seed=seed))[0])
    finally:
        world.close()


def load_trained(folder: Path, cfg: Config, world: World) -> tuple[Model, Encoding]:
    """The model that a run left with --save_model, and its tokenizer."""
    tokenizer, weights = saved_tokenizer(folder), read_weights(folder)
    if cfg.vocab_size != tokenizer.n_vocab:
        raise UserError(f"{folder / 'config.json'} is missing or not what the run wrote")
    model = cfg.new_model(tokenizer.eot_token, world.dtype)
    check_shapes(weights, model)
    model.load_state_dict(weights)
    return model.to(world.device), tokenizer


def check(cfg: Config, world: World) -> bool:
    """Say what a run would do; False if it could not train."""
    problems = []
    kernels = choose_kernels(cfg, world)
    try:
        cfg, dataset, tokenizer, rows, held_out = open_data(cfg, world)
        cfg = with_sample(cfg, candidates_of(rows, cfg))
        about_data = [describe_data(cfg, dataset, rows, held_out), f"tokenizer   {tokenizer.name}"]
    except UserError as error:
        problems.append(str(error))
        cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 50257)
        about_data = [f"data        not usable; a vocabulary of {cfg.vocab_size:,} is assumed"]
    try:
        about_data += describe_tasks(tasks_of(cfg))
    except UserError as error:
        problems.append(str(error))
    with torch.device("meta"):
        model = cfg.new_model(0, world.dtype, kernels.flex)
    cfg = choose_micro_batch(cfg, model, world)
    free_memory, free_disk = free_memory_mib(world), shutil.disk_usage(ROOT).free / 2**20
    lines = [*introduction(cfg, world, model, kernels), *about_data,
             f"free        {free_memory:,.0f} MiB of memory for each process, {free_disk:,.0f} MiB of disk"]
    lines += time_estimate(cfg, model, world)
    if memory_estimate_mib(cfg, model, world) > free_memory:
        problems.append("the run needs more memory than is free; use "
                        + memory_advice(cfg, world, kernels.flex))
    weights = 4 * model.num_parameters() / 2**20
    if free_disk < 100 + (weights if cfg.save_model else 0):
        problems.append(f"only {free_disk:,.0f} MiB of disk are free")
    if world.is_main:
        print("\n".join([*lines, *(f"problem     {problem}" for problem in problems),
                         "cannot train" if problems else "ready to train"]), flush=True)
    world.gather(None)      # torchrun ends all processes when the first one fails, so the word comes first
    return not problems


def time_estimate(cfg: Config, model: Model, world: World) -> list[str]:
    """What the budget's arithmetic takes and costs, if it comes to 40 % of what the devices can do."""
    operations = sum(work_by_percent(cfg, model))
    if not world.peak_flops(cfg):
        return [f"time        not known: {operations:.1e} floating-point operations, and no table has this "
                "device; give its --peak_tflops, or measure some steps"]
    seconds = operations / (0.4 * world.peak_flops(cfg))
    seconds = min(seconds, 60 * cfg.train_minutes or math.inf)
    lines = [f"time        about {seconds / 3600:,.1f} hours of training, if {operations:.1e} floating-point "
             f"operations come to a guessed 40 % of {world.peak_flops(cfg) / 1e12:,.0f} TFLOP/s"]
    if cfg.gpu_cost_per_hour:
        lines.append(f"cost        about {cfg.gpu_cost_per_hour * seconds / 3600:,.2f} for that time")
    return lines


def free_memory_mib(world: World) -> float:
    """What a process may take: of its GPU, or its share of the machine's memory."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**20
    return documents.free_memory_mib() / world.local_size


@command
def main(config: type[Config] = Config) -> None:
    world = None
    try:
        try:
            cfg = parse_config(sys.argv[1:], config)
        except UserError as error:
            raise EveryonesError(str(error)) from error
        world = World(cfg)
        if cfg.sample:
            sample_run(cfg, world)
        elif not cfg.check:
            train(cfg, world)
        elif not check(cfg, world):
            sys.exit(1)
    except EveryonesError:
        leave_the_word_to_the_first()
        raise
    finally:
        if world:
            world.close()


if __name__ == "__main__":
    main()
