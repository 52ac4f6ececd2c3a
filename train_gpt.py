"""Train a GPT. This file is the experiment: copy it, change a few lines, run it.

    python train_gpt.py --preset demo                              one process: a CPU, or the first GPU
    torchrun --nproc_per_node=8 train_gpt.py --preset gpt2-small   one process per GPU; the same training
    python train_gpt.py --check --preset xs                        what that run would do, and whether it can
    python train_gpt.py --help                                     every knob with its help

It reads token shards (download_fineweb.py makes them) and a tokenizer (train_tokenizer.py makes it), and
leaves a folder experiments/DATE_TIME_NAME with all that made the result. It touches no network, but that
tiktoken fetches its own `gpt2` encoding the first time it is asked for.

Sections, by how soon you need them: Config, Model, Optimizer, Data, Evaluation, World, Run log, Training.
Where experiments usually edit, search for "EDIT": config | mask | layer | optimizer | schedule.

Shapes:  B batch   T tokens in a row   D model width   H heads   K width of one head   F MLP hidden
         V vocabulary   L layers   N tokens in a chunk
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiktoken import Encoding
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from tqdm import tqdm

from documents import Parser, UserError, available_cores, command
from download_fineweb import Dataset, open_dataset
from train_tokenizer import TOKENIZERS, token_bytes, tokenizer_sha256

ROOT = Path(__file__).resolve().parent
EXPERIMENTS = ROOT / "experiments"


# ------------------------------------------------------------------------------------------------
# Config: every knob, its default and its help. The field is the flag; the comment is the help.
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    # EDIT: config
    # the run
    model_name: str = "gpt"           # last part of the run folder's name
    preset: str = ""                  # demo, xs, s, m, gpt2-small or gpt2-medium: many knobs; flags win
    tokenizer: str = ""               # folder in tokenizers/; empty: the one the data was made with
    data: str = ""                    # folder in data/; empty: the only one there is (for the tokenizer)
    seed: int = 0                     # decides weights, order of the data and samples
    check: bool = False               # only say what the run would do, and whether it could
    # the budget
    num_steps: int = 500              # optimizer steps
    train_minutes: float = 0          # end the schedule after so much training if that comes first; 0: never
    batch_tokens: int = 8192          # tokens of a step, over all processes and micro-batches
    micro_batch_tokens: int = 16384   # tokens a process takes at once, at most; smaller needs less memory
    seq_len: int = 512                # tokens in a row
    max_doc_len: int = 2048           # longer documents are cut into parts of this many tokens
    # the model
    num_layers: int = 6               # transformer layers
    num_heads: int = 2                # attention heads; each is model_dim / num_heads wide
    model_dim: int = 256              # width of the model
    vocab_size: int = 0               # 0: the tokenizer's; any other number must be the tokenizer's
    mlp_ratio: int = 4                # hidden width of an MLP, in model widths
    value_embeddings: int = 2         # tables of token values, each for one layer from either end
    attention_cap: float = 15         # the largest attention logit that unit-norm queries and keys can have
    logit_cap: float = 15             # logits are squeezed into plus or minus this
    long_window: int = 0              # tokens every fourth layer and the last look back; 0: the whole row
    short_window: int = 0             # tokens the other layers look back; 0: as long_window
    window_warmup_frac: float = 0     # first part of training, in which windows grow from 128 tokens; 0: none
    # the optimizer; learning rates are for 524,288 tokens a step and width 768, Optimizer scales them
    muon_lr: float = 0.05             # matrices in layers
    embed_lr: float = 0.6             # token embedding and value embeddings
    head_lr: float = 0.012            # output head
    scalar_lr: float = 0.04           # mixing scalars
    warmup_steps: int = 0             # steps in which the learning rate climbs from 0
    cooldown_frac: float = 0.6        # last part of training, in which the learning rate falls
    final_lr_frac: float = 0.1        # to this share of its height
    # looking at the run
    log_every: int = 10               # steps between rows of metrics.csv
    val_every: int = 100              # steps between validations; 0: only at the end
    val_tokens: int = 0               # held-out tokens to validate on; 0: all there are
    num_samples: int = 4              # texts to write at the end
    sample_tokens: int = 64           # tokens in each
    temperature: float = 0.8          # of sampling; 0 takes the likeliest token
    top_k: int = 50                   # sample among this many of the likeliest tokens; 0: among all
    save_model: bool = False          # leave the weights as model.safetensors
    gpu_cost_per_hour: float = 0      # price of all GPUs (or the box) per hour, for the cost in summary.json
    # the machine
    device: str = "auto"              # cpu, cuda, or auto: cuda if there is one
    dtype: str = "auto"               # bfloat16, float16, float32, or auto: what is native to the hardware
    compile: str = "auto"             # on, off, or auto: on where torch.compile works
    peak_tflops: float = 0            # of one device, for the MFU; 0: from a table, or no MFU if not there

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.model_name):
            raise UserError("--model_name must be letters, digits, '.', '_' and '-', "
                            f"since it becomes a folder; it is {self.model_name!r}")
        for knob, allowed in (("device", ("auto", "cpu", "cuda")), ("compile", ("auto", "on", "off")),
                              ("dtype", ("auto", "bfloat16", "float16", "float32")),
                              ("preset", ("", *PRESETS))):
            self.require(knob, getattr(self, knob) in allowed, f"one of {', '.join(filter(None, allowed))}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float):
                self.require(field.name, math.isfinite(value) and value >= 0, "0 or more")
        for knob in ("num_steps", "batch_tokens", "micro_batch_tokens", "num_layers", "num_heads",
                     "model_dim", "mlp_ratio", "log_every", "attention_cap", "logit_cap"):
            self.require(knob, getattr(self, knob) > 0, "more than 0")
        # logits span twice the cap, and exp(-80) is still a float32
        self.require("logit_cap", self.logit_cap <= 40, "at most 40")
        for knob in ("cooldown_frac", "final_lr_frac", "window_warmup_frac"):
            self.require(knob, getattr(self, knob) <= 1, "between 0 and 1")
        for knob in ("seq_len", "max_doc_len"):
            self.require(knob, getattr(self, knob) >= 2, "at least 2")
        self.require("batch_tokens", self.batch_tokens % self.seq_len == 0,
                     f"a multiple of --seq_len, {self.seq_len}")
        self.require("micro_batch_tokens", self.micro_batch_tokens >= self.seq_len,
                     f"at least --seq_len, {self.seq_len}")
        self.require("model_dim", self.model_dim % (4 * self.num_heads) == 0,
                     f"a multiple of 4 x --num_heads, {4 * self.num_heads}, "
                     "so that heads can rotate by pairs")
        self.require("sample_tokens", self.sample_tokens > 0 or self.num_samples == 0,
                     "more than 0 for samples")

    def require(self, knob: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"--{knob} must be {rule}; it is {getattr(self, knob)!r}")

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
    def padded_vocab_size(self) -> int:
        """The head has some columns more, which are never predicted: products of round sizes are faster."""
        return 64 * math.ceil(self.vocab_size / 64)


PRESETS = {
    # a few minutes on two CPU cores
    "demo": dict(model_name="demo", num_steps=260, train_minutes=4, val_every=40, log_every=5),
    # the three baselines of gpt-lab: 98, 397 and 986 million tokens
    "xs": dict(model_name="xs", num_layers=8, num_heads=4, model_dim=256, value_embeddings=2, seq_len=1024,
               batch_tokens=32768, num_steps=3000, val_every=250),
    "s": dict(model_name="s", num_layers=12, num_heads=6, model_dim=384, value_embeddings=3, seq_len=1024,
              batch_tokens=90112, num_steps=4400, val_every=250),
    "m": dict(model_name="m", num_layers=16, num_heads=12, model_dim=768, value_embeddings=4, seq_len=2048,
              batch_tokens=229376, num_steps=4300, val_every=250),
    # the two tracks of Modded-NanoGPT: targets 3.28 and 2.92 on FineWeb with GPT-2's tokenizer
    "gpt2-small": dict(model_name="gpt2-small", num_layers=12, num_heads=6, model_dim=768, value_embeddings=3,
                       seq_len=2048, batch_tokens=393216, num_steps=1770, val_every=125, long_window=1792,
                       short_window=896, window_warmup_frac=1, val_tokens=10_485_760),
    "gpt2-medium": dict(model_name="gpt2-medium", num_layers=16, num_heads=8, model_dim=1024,
                        value_embeddings=3, seq_len=2048, batch_tokens=524288, num_steps=5960, val_every=125,
                        short_window=1024, window_warmup_frac=1, val_tokens=10_485_760),
}


def parse_config(argv: list[str]) -> Config:
    """Defaults, then the preset's knobs, then the flags."""
    def layout(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=31, width=110)
    parser = Parser("Train a GPT. Each knob below is a field of Config, with its default in [].",
                    usage="%(prog)s [--KNOB VALUE ...]", add_help=False, formatter_class=layout)
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for title, knobs in knob_helps().items():
        group = parser.add_argument_group(title)
        for knob, text in knobs.items():
            shown = f"{text} [{defaults[knob]}]" if defaults[knob] not in ("", False) else text
            how = ({"action": "store_true"} if types[knob] is bool else
                   {"type": types[knob], "metavar": types[knob].__name__.upper()})
            how |= {"help": shown.replace("%", "%%"), "default": argparse.SUPPRESS}
            group.add_argument(f"--{knob}", **how)
    parser.add_argument("-h", "--help", action="help", help="show this help")
    flags = vars(parser.parse_args(argv))
    return Config(**{**PRESETS.get(flags.get("preset", ""), {}), **flags})


def knob_helps() -> dict[str, dict[str, str]]:
    """The fields of Config under their headings, each with the comment behind it."""
    source = Path(__file__).read_text(encoding="utf-8")
    fields = re.search(r"^class Config:\n(.*?)^    def ", source, re.DOTALL | re.MULTILINE)[1]
    helps: dict[str, dict[str, str]] = {}
    lines = re.findall(r"^    (?:(\w+): \w+ = .*?  # (.+)|# (?!EDIT)(.+))$", fields, re.MULTILINE)
    for knob, text, title in lines:
        if title:
            helps[title] = {}
        else:
            list(helps.values())[-1][knob] = text
    return helps


# ------------------------------------------------------------------------------------------------
# Model: knows tensors and Config; no ranks, no files.
# ------------------------------------------------------------------------------------------------

def sees(query: Tensor, key: Tensor, query_doc: Tensor, key_doc: Tensor, window: Tensor) -> Tensor:
    """Whether the token at place `query` looks at the one at place `key`: the one mask of every kernel."""
    # EDIT: mask
    return (key <= query) & (query - key < window) & (query_doc == key_doc)


def dense_mask(docs: Tensor, window: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as scaled_dot_product_attention adds it: 0 or minus infinity.

    docs     (B, T) number of the document at each place
    returns  (B, 1, T, T) in `dtype`
    """
    place = torch.arange(docs.size(1), device=docs.device)                                  # (T)
    seen = sees(place[:, None], place, docs[:, :, None], docs[:, None, :], window)          # (B, T, T)
    visible = torch.zeros(seen.shape, dtype=dtype, device=docs.device)                      # (B, T, T)
    return visible.masked_fill(~seen, -math.inf)[:, None]                                   # (B, 1, T, T)


def block_mask(docs: Tensor, window: Tensor) -> BlockMask:
    """The mask as FlexAttention skips by it: the same function, known in blocks of 128 x 128."""
    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key, docs[batch, query], docs[batch, key], window)
    rows, length = docs.shape
    return create_block_mask(mask_mod, rows, None, length, length, device=docs.device)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask, scale: float) -> Tensor:
    """Softmax attention over what the mask shows; all tensors (B, H, T, K)."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


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


class Layer(nn.Module):
    """One transformer layer: attention, then an MLP, each on normed input and added to the stream."""

    def __init__(self, cfg: Config):
        super().__init__()
        width, hidden = cfg.model_dim, cfg.mlp_ratio * cfg.model_dim
        self.num_heads, self.head_dim = cfg.num_heads, cfg.head_dim
        self.attention_scale = cfg.attention_cap / cfg.head_dim
        self.qkv = nn.Parameter(uniform(3, width, width, std=0.5 / math.sqrt(width)))
        self.out = nn.Parameter(torch.zeros(width, width))
        self.up = nn.Parameter(uniform(hidden, width, std=0.5 / math.sqrt(width)))
        self.down = nn.Parameter(torch.zeros(width, hidden))
        self.stream_mix = nn.Parameter(torch.tensor([1.0, 0.0]))     # of the stream and the embedding
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5]))      # of the values and the value embedding

    def forward(self, x: Tensor, x0: Tensor, value_embedding: Tensor | None, mask: Tensor | BlockMask,
                cos: Tensor, sin: Tensor) -> Tensor:
        # EDIT: layer
        stream, embedding = self.stream_mix.to(x.dtype)
        x = stream * x + embedding * x0                                                     # (B, T, D)
        x = x + self.attention(rms_norm(x), value_embedding, mask, cos, sin)                # (B, T, D)
        hidden = F.relu(linear(rms_norm(x), self.up)).square()                              # (B, T, F)
        return x + linear(hidden, self.down)                                                # (B, T, D)

    def attention(self, x: Tensor, value_embedding: Tensor | None, mask: Tensor | BlockMask,
                  cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = linear(x, self.qkv.flatten(0, 1))                                             # (B, T, 3D)
        qkv = qkv.view(B, T, 3 * self.num_heads, self.head_dim)                             # (B, T, 3H, K)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)                                       # (B, H, T, K)
        # unit-norm queries and keys bound the attention logits (QK-norm, arXiv:2010.04245)
        q, k = rotate(rms_norm(q), cos, sin), rotate(rms_norm(k), cos, sin)                 # (B, H, T, K)
        own, table = self.value_mix.to(x.dtype)
        v = own * v                                                                         # (B, H, T, K)
        if value_embedding is not None:
            value_embedding = value_embedding.view(B, T, self.num_heads, self.head_dim)     # (B, T, H, K)
            v = v + table * value_embedding.transpose(1, 2)                                 # (B, H, T, K)
        y = attend(q, k, v, mask, self.attention_scale)                                     # (B, H, T, K)
        y = y.transpose(1, 2)                                                               # (B, T, H, K)
        y = y.reshape(B, T, D)                                                              # (B, T, D)
        return linear(y, self.out)                                                          # (B, T, D)


class GPT(nn.Module):
    """Embedding -> norm -> layers -> norm -> head; logits within plus or minus logit_cap.

    eot_id  id of the token that begins every document
    dtype   of the activations and of the products
    flex    attend by FlexAttention instead of scaled_dot_product_attention
    """

    def __init__(self, cfg: Config, eot_id: int, dtype: torch.dtype = torch.float32, flex: bool = False):
        super().__init__()
        self.cfg, self.eot_id, self.dtype, self.flex = cfg, eot_id, dtype, flex
        self.embed = nn.Parameter(torch.randn(cfg.vocab_size, cfg.model_dim))
        self.value_embeds = nn.ParameterList(
            torch.randn(cfg.vocab_size, cfg.model_dim) for _ in range(cfg.num_value_tables))
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))
        self.head = nn.Parameter(torch.zeros(cfg.padded_vocab_size, cfg.model_dim))
        self.chunk_kernel = chunk_loss_and_gradient
        is_token = torch.arange(cfg.padded_vocab_size) < cfg.vocab_size
        self.register_buffer("padding", torch.where(is_token, 0.0, -math.inf), persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor, window_frac: float = 1.0) -> Tensor:
        """Sum of the losses of all targets, in nats.

        inputs       (B, T) token ids
        targets      (B, T) token ids; -1 where there is nothing to predict
        window_frac  share of their full length that the attention windows have
        returns      () float32
        """
        x = self.hidden(inputs, window_frac)                                                # (B, T, D)
        return ChunkedLoss.apply(x.flatten(0, 1), self.head, targets.flatten(), self.padding,
                                 self.cfg.logit_cap, self.chunk_kernel)

    def token_losses(self, inputs: Tensor, targets: Tensor, window_frac: float = 1.0) -> Tensor:
        """Loss of each target in nats, 0 where there is none; all (B, T), the result float32, no graph."""
        # detached only here: with gradients on, the layers compiled for training serve for validation too
        x = self.hidden(inputs, window_frac).detach().flatten(0, 1)                         # (BT, D)
        weight = self.head.detach().to(x.dtype)                                             # (V, D)
        with torch.no_grad():
            losses = [self.chunk_kernel(chunk, weight, wanted, self.padding, self.cfg.logit_cap)[0]
                      for chunk, wanted in chunks(x, targets.flatten(), weight.size(0))]
        return torch.cat(losses).view(targets.shape)                                        # (B, T)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, V) float32, only columns of real tokens."""
        return self.head_logits(self.hidden(inputs))                                        # (B, T, V)

    def head_logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32"""
        z = linear(x, self.head).float()                                                    # (..., V)
        return soft_cap(z, self.cfg.logit_cap)[..., :self.cfg.vocab_size]                   # (..., V)

    def hidden(self, inputs: Tensor, window_frac: float = 1.0) -> Tensor:
        """What the head reads: (B, T) token ids -> (B, T, D)."""
        masks = self.masks(inputs, window_frac)
        cos, sin = rotary_table(inputs.size(1), self.cfg.head_dim, inputs.device)           # (T, K/2)
        x0 = rms_norm(F.embedding(inputs, self.embed).to(self.dtype))                       # (B, T, D)
        x = x0.view_as(x0)      # another object, or the first layer would be compiled apart # (B, T, D)
        for number, layer in enumerate(self.layers):
            table = self.value_table(number)
            values = None if table is None else F.embedding(inputs, table).to(self.dtype)   # (B, T, D)
            x = layer(x, x0, values, masks[number], cos, sin)                               # (B, T, D)
        return rms_norm(x)                                                                  # (B, T, D)

    def value_table(self, layer: int) -> Tensor | None:
        """Table i of n serves the i-th of the first n layers and the i-th of the last n."""
        n, behind = len(self.value_embeds), layer - (len(self.layers) - len(self.value_embeds))
        place = layer if layer < n else behind
        return self.value_embeds[place] if 0 <= place < n else None

    def windows(self, length: int, window_frac: float) -> list[int]:
        """How far each layer looks back in a row of `length` tokens: every fourth and the last have the long
        window, the others the short one."""
        windows = []
        for number in range(1, len(self.layers) + 1):
            is_long = number % 4 == 0 or number == len(self.layers)
            knob = self.cfg.long_window if is_long else self.cfg.short_window or self.cfg.long_window
            full = min(knob or length, length)
            windows.append(min(full, max(128, round(window_frac * full))))
        return windows

    def masks(self, inputs: Tensor, window_frac: float) -> list[Tensor | BlockMask]:
        """The mask of each layer; layers with equal windows share one."""
        docs = (inputs == self.eot_id).cumsum(1)                                            # (B, T)
        windows = self.windows(inputs.size(1), window_frac)
        made: dict[int, Tensor | BlockMask] = {}
        for length in set(windows):
            # a tensor, so that kernels compiled for one window serve all
            window = torch.tensor(length, device=inputs.device)                             # ()
            made[length] = block_mask(docs, window) if self.flex else dense_mask(docs, window, self.dtype)
        return [made[length] for length in windows]

    def compile_parts(self) -> None:
        """Compile what repeats: one layer serves all layers, one chunk of the loss all chunks."""
        for layer in self.layers:
            layer.compile(dynamic=False)
        self.chunk_kernel = torch.compile(chunk_loss_and_gradient, dynamic=False)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """Floating-point operations of one trained token, forward and backward.

        6 per weight of a matrix, and 12 per model dimension and key that a token attends to on average.
        source  Kaplan et al. 2020, arXiv:2001.08361
        """
        length = self.cfg.seq_len
        matrices = self.head.numel() + sum(p.numel() for layer in self.layers for p in layer.parameters()
                                           if p.ndim > 1)
        keys = sum(window - window**2 / (2 * length) for window in self.windows(length, 1.0))
        return 6 * matrices + 12 * self.cfg.model_dim * keys


def uniform(*shape: int, std: float) -> Tensor:
    return torch.empty(shape).uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)


def chunks(x: Tensor, targets: Tensor, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Rows of x and targets in chunks of N rows, so that a chunk's float32 logits take at most 32 MiB on a
    CPU, near its caches, and 256 MiB on a GPU."""
    limit = (2**25 if x.device.type == "cpu" else 2**28) // (4 * columns)
    rows = 2 ** int(math.log2(max(1, min(limit, x.size(0)))))
    return list(zip(x.split(rows), targets.split(rows), strict=True))


def soft_cap(z: Tensor, cap: float) -> Tensor:
    """Squeeze logits smoothly into plus or minus cap: z / sqrt(1 + (z / cap)^2)."""
    return z * torch.rsqrt(1 + (z / cap).square())


def chunk_loss_and_gradient(x: Tensor, weight: Tensor, targets: Tensor, padding: Tensor, cap: float,
                            ) -> tuple[Tensor, Tensor]:
    """Losses of a chunk, and their gradient at uncapped logits: softmax minus one-hot, times the cap's slope.

    x (N, D), weight (V, D), targets (N)
    padding  (V) float32, minus infinity in columns that are no token, else 0
    returns  (N) float32 and (N, V) in the dtype of x
    """
    z = (x @ weight.T).float()                                                              # (N, V)
    shrink = torch.rsqrt(1 + (z / cap).square())                                            # (N, V)
    exps = torch.exp(z * shrink - cap + padding)    # no maximum needed: the cap bounds z   # (N, V)
    total = exps.sum(-1, keepdim=True)                                                      # (N, 1)
    counted = (targets >= 0).float()[:, None]                                               # (N, 1)
    slope = exps * (counted / total) * shrink**3                                            # (N, V)
    place = targets.clamp(min=0)[:, None]                                                   # (N, 1)
    z, shrink = z.gather(1, place), shrink.gather(1, place)                                 # (N, 1)
    losses = counted * (cap + total.log() - z * shrink)                                     # (N, 1)
    slope_there = counted * (torch.exp(z * shrink - cap) / total - 1) * shrink**3           # (N, 1)
    return losses[:, 0], slope.to(x.dtype).scatter(1, place, slope_there.to(x.dtype))


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of a linear head, chunk by chunk, with its gradient made on the way forward.

    Only one chunk's logits exist at a time: 256 MiB instead of 6.6 GB for 32,768 tokens and 50,304 columns.
    x (N, D), weight (V, D) float32, targets (N), padding and kernel as chunk_loss_and_gradient has them
    returns  () float32, the summed loss
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, padding: Tensor, cap: float,
                kernel: Callable) -> Tensor:
        x, narrow = x.detach(), weight.detach().to(x.dtype)                                 # (N, D), (V, D)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)                 # (N, D), (V, D)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        start = 0
        for part, wanted in chunks(x, targets, weight.size(0)):
            losses, slope = kernel(part, narrow, wanted, padding, cap)                      # (N), (N, V)
            total += losses.sum()
            torch.mm(slope, narrow, out=x_grad[start:start + len(part)])                    # (N, D)
            weight_grad += slope.T @ part                                                   # (V, D)
            start += len(part)
        ctx.save_for_backward(x_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad.to(x_grad.dtype), weight_grad * grad, None, None, None, None


# ------------------------------------------------------------------------------------------------
# Optimizer: knows parameters, their names and gradients; no ranks.
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
    X = X.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    for _ in range(steps):
        A = X @ X.mT                                                                        # (..., M, M)
        X = a * X + (b * A + c * A @ A) @ X                                                 # (..., M, N)
    return X.mT if tall else X


def adam_update(parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, lr: Tensor,
                beta1: float, beta2: float, step: Tensor, eps: float) -> None:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) in place; all tensors of one shape, lr and step () float32."""
    mean.lerp_(grad, 1 - beta1)
    square.lerp_(grad.square(), 1 - beta2)
    mean_hat, square_hat = mean / (1 - beta1**step), square / (1 - beta2**step)
    parameter.sub_(lr * mean_hat / (square_hat.sqrt() + eps))


class Optimizer:
    """Muon for matrices in layers, Adam for everything else; every parameter is in exactly one group.

    Learning rates are knobs at 524,288 tokens a step and width 768. For other sizes all go with the fourth
    root of batch_tokens; those of embeddings and head also with 1 / sqrt(model_dim); Muon's does not depend
    on the width, since its update has unit spectral norm times sqrt(max(1, rows / columns)). The fourth root
    is a compromise: at 8,192 tokens a step the square root leaves all rates too low (measured), and from
    131,072 to 524,288 the best rates of published runs hardly differ. Momentum climbs from 0.85 to 0.95 over
    the first 300 steps, or the first fifth of a shorter run.
    """

    betas, eps = (0.8, 0.95), 1e-10

    def __init__(self, model: GPT, cfg: Config, product_dtype: torch.dtype = torch.float32):
        self.cfg, self.product_dtype = cfg, product_dtype
        by_batch = (cfg.batch_tokens / 524288) ** 0.25
        by_width = math.sqrt(768 / cfg.model_dim)
        self.lrs = {"matrices": cfg.muon_lr * by_batch, "embeddings": cfg.embed_lr * by_batch * by_width,
                    "head": cfg.head_lr * by_batch * by_width, "scalars": cfg.scalar_lr * by_batch}
        self.groups: dict[str, dict[str, nn.Parameter]] = {group: {} for group in self.lrs}
        for name, parameter in model.named_parameters():
            self.groups[group_of(name, parameter)][name] = parameter
        self.adam_kernel = adam_update
        self.steps_done = 0
        self.state = {name: self._new_state(group, parameter)
                      for group, members in self.groups.items() for name, parameter in members.items()}

    @staticmethod
    def _new_state(group: str, parameter: Tensor) -> dict[str, Tensor]:
        kinds = ("momentum",) if group == "matrices" else ("mean", "square")
        return {kind: torch.zeros_like(parameter) for kind in kinds}

    def compile_parts(self) -> None:
        self.adam_kernel = torch.compile(adam_update, dynamic=True)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update every parameter from its gradient and clear the gradients.

        scale  what the schedule multiplies all learning rates by
        """
        warmup = min(300, math.ceil(0.2 * self.cfg.num_steps))
        momentum = 0.85 + 0.1 * min(1, self.steps_done / warmup)
        self.steps_done += 1
        self.muon_step(self.groups["matrices"], self.lrs["matrices"] * scale, momentum)
        for group in ("embeddings", "head", "scalars"):
            for name, parameter in self.groups[group].items():
                state = self.state[name]
                self.adam_kernel(parameter.detach().view(-1), parameter.grad.view(-1),
                                 state["mean"].view(-1), state["square"].view(-1),
                                 torch.tensor(self.lrs[group] * scale), *self.betas,
                                 torch.tensor(float(self.steps_done)), self.eps)
        for members in self.groups.values():
            for parameter in members.values():
                parameter.grad = None

    def muon_step(self, members: dict[str, nn.Parameter], lr: float, momentum: float) -> None:
        """Muon with Nesterov momentum; matrices of one shape are orthogonalised as one batch."""
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for name, parameter in members.items():
            average = self.state[name]["momentum"]
            average.lerp_(parameter.grad, 1 - momentum)
            ahead = parameter.grad.lerp(average, momentum)
            shape = parameter.shape[-2:]
            matrices = zip(parameter.view(-1, *shape), ahead.view(-1, *shape), strict=True)
            by_shape.setdefault(shape, []).extend(matrices)
        for (rows, columns), pairs in by_shape.items():
            updates = newton_schulz(torch.stack([ahead for _, ahead in pairs]), dtype=self.product_dtype)
            for (matrix, _), update in zip(pairs, updates, strict=True):
                matrix.sub_(update, alpha=lr * math.sqrt(max(1, rows / columns)))

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile the kernels on tensors of their own, so that nothing changes."""
        for group in ("embeddings", "head", "scalars"):
            for parameter in self.groups[group].values():
                tensors = [torch.zeros_like(parameter).view(-1) for _ in range(4)]
                self.adam_kernel(*tensors, torch.tensor(0.0), *self.betas, torch.tensor(1.0), self.eps)


def lr_scale(cfg: Config, step: int, progress: float) -> float:
    """Warm-up over steps, a plateau, and a linear cooldown over the last part of the budget.

    step      optimizer steps done
    progress  share of the budget that is used, 0 to 1
    """
    # EDIT: schedule
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    cooldown = min(1.0, (1 - progress) / cfg.cooldown_frac) if cfg.cooldown_frac else 1.0
    return warmup * (cfg.final_lr_frac + (1 - cfg.final_lr_frac) * cooldown)


def window_frac(cfg: Config, progress: float) -> float:
    return min(1.0, progress / cfg.window_warmup_frac) if cfg.window_warmup_frac else 1.0


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


def micro_batch_shape(cfg: Config, world_size: int) -> tuple[int, int]:
    """(micro-batches a step, rows in each) for every process."""
    rows = math.ceil(cfg.rows_per_step / world_size)
    count = math.ceil(rows / max(1, cfg.micro_batch_tokens // cfg.seq_len))
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

    def evaluate(self, model: GPT, rows: int, world: "World", window_frac: float = 1.0) -> Validation:
        """Validate with `rows` rows at a time and the attention windows of the moment; sums in float64."""
        sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # nats, tokens, nats in text, bytes
        num_bytes = self.num_bytes.to(world.device)
        rounds = math.ceil(self.num_windows / (rows * world.size))
        for start in range(world.rank * rows, rounds * rows * world.size, rows * world.size):
            inputs, targets = self.windows(list(range(start, start + rows)))
            targets = targets.to(world.device)
            losses = model.token_losses(inputs.to(world.device), targets, window_frac).double()     # (B, T)
            counted = targets >= 0
            byte_count = num_bytes[targets.clamp(min=0)] * counted                          # (B, T)
            sums += torch.stack([losses.sum(), counted.sum(), losses[byte_count > 0].sum(), byte_count.sum()])
        nats, tokens, text_nats, text_bytes = world.sum(sums).tolist()
        return Validation(nats / tokens, text_nats / math.log(2) / text_bytes)


def xz_bits_per_byte(text: bytes) -> float | None:
    """Bits per byte that `xz -9e` needs for a text: what a model has to beat. None without Python's lzma."""
    if not importlib.util.find_spec("_lzma"):
        return None
    import lzma
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], cfg: Config, device: torch.device) -> list[list[int]]:
    """Continue each prompt by sample_tokens tokens, the same ones for the same seed.

    prompts  token ids, at least one each, of any length; the model sees the last seq_len tokens
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    texts = [list(prompt) for prompt in prompts]
    for _ in range(cfg.sample_tokens):
        seen = [text[-cfg.seq_len:] for text in texts]
        longest = max(map(len, seen))
        # the mask looks back only, so what stands behind a text's end changes nothing
        inputs = torch.tensor([text + [model.eot_id] * (longest - len(text)) for text in seen])     # (B, T)
        x = model.hidden(inputs.to(device))                                                 # (B, T, D)
        x = torch.stack([row[len(text) - 1] for row, text in zip(x, seen, strict=True)])    # (B, D)
        for text, token in zip(texts, sample(model.head_logits(x).cpu(), cfg, generator), strict=True):
            text.append(token)
    return [text[len(prompt):] for text, prompt in zip(texts, prompts, strict=True)]


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
# World: the machine and its processes; the only section that names torch.distributed.
# ------------------------------------------------------------------------------------------------

# dense bfloat16 TFLOP/s without sparsity, from the makers' data sheets
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
               "A40": 149.7, "A10": 125, "L40S": 362, "L4": 121, "RTX 3090": 71, "RTX 4090": 165.2,
               "RTX 5090": 209.5}


class World:
    """One process, or as many as torchrun started. With one, every method leaves things as they are."""

    def __init__(self, cfg: Config):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.is_main = self.rank == 0
        self.device = self._choose_device(cfg, local_rank)
        self.dtype, self.dtype_reason = choose_dtype(cfg, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            threads = torch.get_num_threads() if self.size == 1 else available_cores() // self.local_size
            torch.set_num_threads(max(1, threads))
        if self.size > 1:
            gpu = self.device.type == "cuda"
            dist.init_process_group("nccl" if gpu else "gloo", device_id=self.device if gpu else None)

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
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up all processes' gradients.

        raises  RuntimeError that names a parameter without gradient, before any process waits for another
        """
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                raise RuntimeError(f"parameter {name} has no gradient: the loss does not depend on it")
        if self.size > 1:
            waiting = [dist.all_reduce(parameter.grad, async_op=True) for parameter in model.parameters()]
            for work in waiting:
                work.wait()

    def share_weights(self, model: nn.Module) -> None:
        """Give every process the weights of the first."""
        if self.size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    def same(self, value: float) -> float:
        """The first process's value, on every process."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, src=0)
        return tensor.item()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def synchronize(self) -> None:
        """Wait until the device has done what it was told, so that a clock may be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_memory_mib(self) -> float:
        """Peak memory of this process: on its GPU, or as a whole on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # bytes on macOS, else KiB
        return peak / (2**20 if sys.platform == "darwin" else 2**10)

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        name = cpu_facts().get("model name", platform.processor() or platform.machine())
        return f"{name}, {available_cores()} cores"

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
        first_line = (str(error).strip() or "no message").splitlines()[0][:200]
        reason = f"torch.compile does not work here ({type(error).__name__}: {first_line})"
        if cfg.compile == "on":
            raise UserError(f"{reason}; on Debian it needs: apt install g++ python3-dev") from error
        return False, reason


# ------------------------------------------------------------------------------------------------
# Run log: the one writer of the run folder. On other processes than the first it does nothing.
# ------------------------------------------------------------------------------------------------

COLUMNS = ("step", "tokens", "epoch", "train_seconds", "train_loss", "val_loss", "val_bpb", "lr_scale",
           "grad_norm", "tokens_per_second", "mfu", "peak_memory_mib")


class RunLog:
    """Writes all that made a result into experiments/DATE_TIME_NAME, and what one wants to see on screen."""

    def __init__(self, cfg: Config, world: World, tokenizer: Encoding, dataset: Dataset):
        self.cfg, self.active = cfg, world.is_main
        self.rows: list[dict] = []
        self.begun = self.last_line = time.perf_counter()
        if not self.active:
            return
        self.folder = new_folder(cfg.model_name)
        self.text = open(self.folder / "training_log.txt", "w", encoding="utf-8")  # noqa: SIM115
        self.csv = open(self.folder / "metrics.csv", "w", encoding="utf-8", newline="")  # noqa: SIM115
        csv.writer(self.csv, lineterminator="\n").writerow(COLUMNS)
        # the bar is a picture of what the lines say, for a terminal; elsewhere the lines come sparsely
        self.bar = tqdm(total=cfg.num_steps, unit="step", disable=not sys.stderr.isatty(), leave=False,
                        bar_format="{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt} {postfix}")
        self._write("config.json", json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
        self._write("requirements.txt", installed_packages())
        self._write("git.diff", git("diff", "HEAD"))
        self._write("meta.json", tokenizer_meta(tokenizer))
        for path in own_sources():
            self._write(f"{path.stem}.txt", path.read_text(encoding="utf-8"))
        self.made_with = {
            "model_name": cfg.model_name, "preset": cfg.preset, "seed": cfg.seed,
            "data": dataset.folder.name, "data_sha256": dataset.sha256,
            "tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "code_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
            "git_commit": git("rev-parse", "HEAD").strip(), "git_dirty": bool(git("status", "--porcelain")),
            "device": world.device_name(), "processes": world.size,
            "dtype": str(world.dtype).removeprefix("torch."), "dtype_reason": world.dtype_reason,
            "python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}

    def _write(self, name: str, content: str) -> None:
        """A file appears under its name when it is complete."""
        partial = self.folder / f"{name}.partial"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, self.folder / name)

    def say(self, line: str) -> None:
        """A line for the log and the screen."""
        if self.active:
            self.note(line)
            self.bar.clear()
            print(line, flush=True)
            self.last_line = time.perf_counter()

    def note(self, line: str) -> None:
        """A line for the log only."""
        if self.active:
            self.text.write(line + "\n")
            self.text.flush()

    def row(self, values: dict, progress: float) -> None:
        """A row of metrics.csv, and its line in the log; on screen as a bar, or now and then as a line."""
        if not self.active:
            return
        self.rows.append(values)
        cells = [csv_cell(values.get(column)) for column in COLUMNS]
        csv.writer(self.csv, lineterminator="\n").writerow(cells)
        self.csv.flush()
        left = values["train_seconds"] * (1 - progress) / progress
        line = (f"step {values['step']:>{len(str(self.cfg.num_steps))}}/{self.cfg.num_steps}  "
                f"train_loss {values['train_loss']:.4f}  "
                + (f"val_loss {values['val_loss']:.4f}  val_bpb {values['val_bpb']:.4f}  "
                   if "val_loss" in values else "")
                + f"{values['tokens_per_second']:,.0f} tokens/s  "
                + (f"mfu {values['mfu']:.1%}  " if "mfu" in values else "")
                + f"{minutes(values['train_seconds'])} trained, {minutes(left)} to go")
        if "val_loss" in values or (self.bar.disable and time.perf_counter() - self.last_line > 15):
            self.say(line)
        else:
            self.note(line)
        self.bar.set_postfix_str(f"loss {values['train_loss']:.3f}, {minutes(left)} to go", refresh=False)
        self.bar.update(values["step"] - self.bar.n)

    def picture(self, xz_bpb: float | None = None) -> None:
        if self.active:
            draw_loss(self.folder / "loss.png", self.rows, self.cfg.model_name, xz_bpb)

    def samples(self, samples: list[dict]) -> None:
        if self.active:
            lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in samples]
            self._write("samples.jsonl", "".join(lines))

    def weights(self, model: GPT) -> None:
        if self.active:
            from safetensors.torch import save_file
            tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
            save_file(tensors, self.folder / "model.safetensors.partial")
            os.replace(self.folder / "model.safetensors.partial", self.folder / "model.safetensors")

    def summary(self, status: str, results: dict) -> dict:
        """The numbers that the run ends with, and what made them."""
        if not self.active:
            return {}
        hours = (time.perf_counter() - self.begun) / 3600
        results = {"status": status, **results, "total_seconds": round(3600 * hours, 1), **self.made_with}
        if self.cfg.gpu_cost_per_hour:
            results["cost"] = round(hours * self.cfg.gpu_cost_per_hour, 4)
        self._write("summary.json", json.dumps(results, indent=2) + "\n")
        return results

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.text.close()
            self.csv.close()


def new_folder(name: str) -> Path:
    """experiments/DATE_TIME_NAME, with a number behind when two runs of a name begin in the same second."""
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    for attempt in range(1, 1000):
        folder = EXPERIMENTS / (f"{stamp}_{name}" if attempt == 1 else f"{stamp}_{name}_{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise UserError(f"{EXPERIMENTS} has too many runs of {name} from this second")


def csv_cell(value) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def installed_packages() -> str:
    """What pip freeze would say."""
    found = {f"{package.metadata['Name']}=={package.version}"
             for package in importlib.metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def git(*arguments: str) -> str:
    """What git says in this folder; nothing where there is no repository or no git."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True,
                              errors="replace").stdout
    except FileNotFoundError:
        return ""


def own_sources() -> list[Path]:
    """Every .py file beside this one that this process runs."""
    files = {Path(module.__file__).resolve() for module in list(sys.modules.values())
             if getattr(module, "__file__", None)}
    return sorted(path for path in files if path.parent == ROOT and path.suffix == ".py" and path.is_file())


def tokenizer_meta(tokenizer: Encoding) -> str:
    path = TOKENIZERS / tokenizer.name / "meta.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return json.dumps({"name": tokenizer.name, "vocab_size": tokenizer.n_vocab, "eot_id": tokenizer.eot_token,
                       "tokenizer_sha256": tokenizer_sha256(tokenizer)}, indent=2) + "\n"


def draw_loss(path: Path, rows: list[dict], title: str, xz_bpb: float | None) -> None:
    """Loss in nats per token on the left, bits per byte of the held-out text on the right, over tokens."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    validated = [row for row in rows if "val_loss" in row]
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.grid": True, "grid.alpha": 0.25,
                            "axes.titleweight": "bold", "axes.titlelocation": "left"}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        left.plot([row["tokens"] / 1e6 for row in rows], [row["train_loss"] for row in rows],
                  color="#9bb7d4", linewidth=1, label="training batches")
        left.plot([row["tokens"] / 1e6 for row in validated], [row["val_loss"] for row in validated],
                  color="#1f4e79", marker="o", markersize=4, label="held-out text")
        left.set(title=f"{title}: loss", xlabel="million tokens trained on", ylabel="nats per token")
        right.plot([row["tokens"] / 1e6 for row in validated], [row["val_bpb"] for row in validated],
                   color="#1f4e79", marker="o", markersize=4, label="this model")
        if validated:
            last = validated[-1]
            right.annotate(f"{last['val_bpb']:.3f}", (last["tokens"] / 1e6, last["val_bpb"]),
                           textcoords="offset points", xytext=(0, -14),
                           ha="right", color="#1f4e79", weight="bold")
            right.set_ylim(0, 1.1 * max([row["val_bpb"] for row in validated] + [xz_bpb or 0]))
        if xz_bpb:
            right.axhline(xz_bpb, color="#b5532a", linestyle="--", linewidth=1, label=f"xz -9e: {xz_bpb:.3f}")
        right.set(title="held-out text", xlabel="million tokens trained on", ylabel="bits per byte")
        for axes, place in ((left, "upper right"), (right, "lower left")):
            axes.set_xlim(left=0)
            if axes.lines:
                axes.legend(frameon=False, loc=place)
        partial = path.with_suffix(".png.partial")
        figure.savefig(partial, dpi=150, format="png")
        pyplot.close(figure)
    os.replace(partial, path)


# ------------------------------------------------------------------------------------------------
# Training: the sections above, put together.
# ------------------------------------------------------------------------------------------------

LARGEST_XZ_TEXT = 2**24     # bytes; xz -9e takes a second for each two million


class Clock:
    """Seconds of training: compiling, validating and writing do not count."""

    def __init__(self, world: World):
        self.world, self.seconds = world, 0.0

    def __enter__(self) -> None:
        self.world.synchronize()
        self.begun = time.perf_counter()

    def __exit__(self, *error) -> None:
        self.world.synchronize()
        self.seconds += time.perf_counter() - self.begun


class NonFinite(UserError):
    """A loss or gradient that is not a number; the run cannot go on."""


def open_data(cfg: Config, world: World) -> tuple[Config, Dataset, Encoding, Rows, HeldOut]:
    """The verified data of a run with their tokenizer, and its Config with the vocabulary that follows."""
    dataset, tokenizer = open_dataset(cfg.data, cfg.tokenizer)
    if cfg.vocab_size not in (0, tokenizer.n_vocab):
        raise UserError(f"--vocab_size must be {tokenizer.n_vocab}, the tokens of {tokenizer.name} with "
                        f"<|endoftext|>; it is {cfg.vocab_size}")
    cfg = dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab)
    dataset.verify(world.rank, world.size)
    rows = Rows(dataset.tokens("train"), cfg, tokenizer.eot_token)
    return cfg, dataset, tokenizer, rows, HeldOut(dataset.tokens("val"), cfg, tokenizer)


def memory_estimate_mib(cfg: Config, model: GPT, world: World) -> float:
    """Roughly what a process needs: weights, gradients, optimizer state, activations and loss chunks."""
    matrices = sum(p.numel() for layer in model.layers for p in layer.parameters())
    others = model.num_parameters() - matrices
    states = 4 * (3 * matrices + 4 * others)
    _, rows = micro_batch_shape(cfg, world.size)
    width = model.dtype.itemsize
    per_token = cfg.num_layers * width * cfg.model_dim * (12 + 3 * cfg.mlp_ratio) + 2 * width * cfg.model_dim
    masks = 0 if model.flex else 2 * rows * cfg.seq_len**2 * width
    loss = 4 * model.head.numel() * 2 + (2**25 if world.device.type == "cpu" else 2**28) * 4
    return (states + rows * cfg.seq_len * per_token + masks + loss) / 2**20


def uses_flex_attention(cfg: Config, world: World, compiled: bool) -> bool:
    """FlexAttention is a compiled CUDA kernel for heads of at least 16."""
    return world.device.type == "cuda" and compiled and cfg.head_dim >= 16


def make_model(cfg: Config, tokenizer: Encoding, world: World, compiled: bool) -> tuple[GPT, Optimizer]:
    torch.manual_seed(cfg.seed)
    flex = uses_flex_attention(cfg, world, compiled)
    model = GPT(cfg, tokenizer.eot_token, world.dtype, flex).to(world.device)
    world.share_weights(model)
    optimizer = Optimizer(model, cfg, torch.bfloat16 if world.dtype == torch.bfloat16 else torch.float32)
    if compiled:
        model.compile_parts()
        optimizer.compile_parts()
    return model, optimizer


def warm_up(model: GPT, optimizer: Optimizer, cfg: Config, world: World) -> float:
    """Compile every kernel before the clock starts, on rows that predict nothing; weights stay as they are.

    returns  seconds that it took
    """
    begun = time.perf_counter()
    _, rows = micro_batch_shape(cfg, world.size)
    inputs = torch.full((rows, cfg.seq_len), model.eot_id, device=world.device)
    targets = torch.full_like(inputs, -1)
    model(inputs, targets, window_frac(cfg, 0)).backward()
    model.token_losses(inputs, targets)
    model.zero_grad(set_to_none=True)
    optimizer.warm_up()
    world.synchronize()
    return time.perf_counter() - begun


def gradient_norm(model: GPT, loss: float, step: int) -> float:
    """The norm of all gradients together.

    raises  NonFinite that names the step and what is not finite
    """
    norms = torch.stack([torch.linalg.vector_norm(parameter.grad) for parameter in model.parameters()])
    total = torch.linalg.vector_norm(norms).item()
    if not math.isfinite(loss):
        raise NonFinite(f"the loss of step {step} is {loss}; try a lower learning rate, or --dtype float32")
    if not math.isfinite(total):
        culprit = next(name for (name, _), norm in zip(model.named_parameters(), norms, strict=True)
                       if not math.isfinite(norm))
        raise NonFinite(f"the gradient of {culprit} is not finite in step {step}; try a lower learning rate, "
                        "or --dtype float32")
    return total


def train(cfg: Config, world: World) -> None:
    """Train, validate, sample, and leave a run folder."""
    cfg, dataset, tokenizer, rows, held_out = open_data(cfg, world)
    compiled, compile_reason = choose_compile(cfg, world.device)
    model, optimizer = make_model(cfg, tokenizer, world, compiled)
    log = RunLog(cfg, world, tokenizer, dataset)
    try:
        log.say("\n".join([*introduction(cfg, world, model, compiled, compile_reason),
                           describe_data(cfg, dataset, rows, held_out)]))
        compile_seconds = warm_up(model, optimizer, cfg, world)
        log.say(f"kernels ready after {compile_seconds:.1f} s; training begins")
        clock = Clock(world)
        try:
            last = training_loop(cfg, world, model, optimizer, rows, held_out, log, clock)
        except NonFinite as error:
            log.note(str(error))
            log.summary(f"failed: {error}", {"train_seconds": clock.seconds})
            raise
        if world.is_main:
            results = last | {"compile_seconds": round(compile_seconds, 1)}
            finish(cfg, world, model, tokenizer, held_out, log, results)
    except KeyboardInterrupt:
        log.note("interrupted")
        raise
    finally:
        log.close()


def training_loop(cfg: Config, world: World, model: GPT, optimizer: Optimizer, rows: Rows, held_out: HeldOut,
                  log: RunLog, clock: Clock) -> dict:
    """Step until the budget is used; returns the values of the last row of metrics.csv."""
    loss_scale = LossScale(enabled=world.dtype == torch.float16)
    _, rows_at_once = micro_batch_shape(cfg, world.size)
    step, progress, since = 0, 0.0, (0, 0.0)
    while progress < 1:
        with clock:
            # the loss of a step is the mean over all its targets, whoever computes them
            loss = torch.zeros((), device=world.device)
            num_targets = rows.targets_in_step(step, cfg.rows_per_step)
            for inputs, targets in rows.micro_batches(step, cfg, world.rank, world.size):
                inputs, targets = inputs.to(world.device), targets.to(world.device)
                part = model(inputs, targets, window_frac(cfg, progress)) / num_targets
                loss_scale.backward(part)
                loss += part.detach()
            world.sum_gradients(model)
            values = {"train_loss": world.sum(loss).item(), "lr_scale": lr_scale(cfg, step, progress)}
            if loss_scale.unscale(model):
                values["grad_norm"] = gradient_norm(model, values["train_loss"], step + 1)
                optimizer.step(values["lr_scale"])
        step += 1
        progress = budget_used(cfg, world, step, clock)
        validates = progress >= 1 or (cfg.val_every and step % cfg.val_every == 0)
        if validates or step == 1 or step % cfg.log_every == 0:
            values |= pace(cfg, world, model, rows, step, clock, since)
            since = (step, clock.seconds)
            if validates:
                result = held_out.evaluate(model, rows_at_once, world, window_frac(cfg, progress))
                values |= dataclasses.asdict(result)
            log.row(values, progress)
            if validates:
                log.picture()
    return values


def budget_used(cfg: Config, world: World, step: int, clock: Clock) -> float:
    """Share of the budget that is used, 0 to 1: of the steps, or of the minutes if that is more."""
    shares = [step / cfg.num_steps]
    if cfg.train_minutes:
        shares.append(world.same(clock.seconds) / (60 * cfg.train_minutes))
    return min(1.0, max(shares))


def pace(cfg: Config, world: World, model: GPT, rows: Rows, step: int, clock: Clock,
         since: tuple[int, float]) -> dict[str, float]:
    """How far a run is and how fast since the (step, seconds) of the last row."""
    speed = cfg.batch_tokens * (step - since[0]) / (clock.seconds - since[1])
    values = {"step": step, "tokens": step * cfg.batch_tokens,
              "epoch": step * cfg.rows_per_step / rows.num_rows, "train_seconds": clock.seconds,
              "tokens_per_second": speed, "peak_memory_mib": world.peak_memory_mib()}
    peak = world.peak_flops(cfg)
    return values | ({"mfu": speed * model.flops_per_token() / peak} if peak else {})


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, arXiv:1710.03740); 1 where not enabled.

    float16 has few small numbers: losses are scaled up before backward, gradients down after. The scale
    doubles after 1,000 steps without overflow; after one with, it halves and the step is left out.
    """

    def __init__(self, enabled: bool):
        self.enabled, self.value, self.good_steps = enabled, 2.0**16 if enabled else 1.0, 0

    def backward(self, loss: Tensor) -> None:
        (loss * self.value).backward()

    def unscale(self, model: nn.Module) -> bool:
        """Bring gradients to their true size; False if they overflowed, and then they are cleared.

        raises  NonFinite if even a scale of 1 overflows
        """
        if not self.enabled:
            return True
        finite = all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
        if finite:
            for parameter in model.parameters():
                parameter.grad /= self.value
            self.good_steps += 1
            if self.good_steps % 1000 == 0:
                self.value *= 2
            return True
        if self.value <= 1:
            raise NonFinite("gradients overflow float16 at any scale; try --dtype float32")
        self.value, self.good_steps = self.value / 2, 0
        model.zero_grad(set_to_none=True)
        return False


def introduction(cfg: Config, world: World, model: GPT, compiled: bool, compile_reason: str) -> list[str]:
    """What is about to happen, in lines for people."""
    count, rows = micro_batch_shape(cfg, world.size)
    kernel = "FlexAttention" if model.flex else "scaled_dot_product_attention"
    return [
        f"device      {world.size} x {world.device_name()}, torch {torch.__version__}",
        f"dtype       {str(world.dtype).removeprefix('torch.')}: {world.dtype_reason}",
        f"compile     {'on' if compiled else 'off'}: {compile_reason}; attention by {kernel}",
        f"model       {model.num_parameters():,} parameters: {cfg.num_layers} layers, width {cfg.model_dim}, "
        f"{cfg.num_heads} heads of {cfg.head_dim}, {cfg.vocab_size:,} tokens, "
        f"{cfg.num_value_tables} value embeddings",
        f"budget      {cfg.num_steps:,} steps of {cfg.batch_tokens:,} tokens"
        + (f", or {cfg.train_minutes:g} minutes of training if they end first" if cfg.train_minutes else "")
        + f"; {world.size} x {count} micro-batches of {rows} x {cfg.seq_len}",
        f"memory      about {memory_estimate_mib(cfg, model, world):,.0f} MiB for each process",
    ]


def describe_data(cfg: Config, dataset: Dataset, rows: Rows, held_out: HeldOut) -> str:
    used = rows.num_rows * cfg.seq_len / rows.bases[-1]
    epochs = cfg.num_steps * cfg.rows_per_step / rows.num_rows
    advice = " (beyond 4, repeated text teaches little: take more text or fewer steps)" if epochs > 4 else ""
    return (f"data        {dataset.folder.name}: {rows.bases[-1]:,} tokens, "
            f"and {len(held_out.tokens):,} held out; rows hold {used:.0%} of them\n"
            f"            {cfg.num_steps:,} steps are {epochs:.2f} epochs{advice}")


def finish(cfg: Config, world: World, model: GPT, tokenizer: Encoding, held_out: HeldOut, log: RunLog,
           results: dict) -> None:
    """Weights, samples, the comparison with xz, picture, summary, and last what a newcomer wants to know."""
    if cfg.save_model:
        log.weights(model)
    model.flex = False      # texts have many lengths, and none is worth compiling for
    with torch.compiler.set_stance("force_eager"):
        samples = write_samples(cfg, world, model, tokenizer, held_out)
    log.samples(samples)
    text = held_out.text()
    if len(text) <= LARGEST_XZ_TEXT:
        results["xz_bpb"] = xz_bits_per_byte(text)
    log.picture(results.get("xz_bpb"))
    results["parameters"] = model.num_parameters()
    results["tokens_per_second"] = results["tokens"] / results["train_seconds"]
    results["held_out_tokens"], results["held_out_bytes"] = len(held_out.tokens), len(text)
    summary = log.summary("finished", results)
    for line in conclusion(cfg, log.folder, summary, samples):
        log.say(line)


def write_samples(cfg: Config, world: World, model: GPT, tokenizer: Encoding, held_out: HeldOut,
                  ) -> list[dict]:
    """Continue the beginnings of held-out documents, which the model has never seen."""
    begins = np.flatnonzero(held_out.tokens == held_out.eot_id)
    begins = begins[np.linspace(0, len(begins) - 1, min(cfg.num_samples, len(begins))).astype(int)]
    prompts = [held_out.tokens[begin:begin + 17].tolist() for begin in begins]
    if not prompts:
        return []
    continuations = generate(model, prompts, cfg, world.device)
    return [{"prompt": tokenizer.decode(prompt[1:]), "text": tokenizer.decode(continuation),
             "temperature": cfg.temperature, "top_k": cfg.top_k, "seed": cfg.seed}
            for prompt, continuation in zip(prompts, continuations, strict=True)]


def conclusion(cfg: Config, folder: Path, summary: dict, samples: list[dict]) -> list[str]:
    xz = ""
    if summary.get("xz_bpb"):
        verdict = "more than this model" if summary["xz_bpb"] > summary["val_bpb"] else "less than this model"
        xz = f"; xz -9e needs {summary['xz_bpb']:.3f} for the same text, {verdict}"
    python = ".venv/bin/python" if Path(sys.prefix).resolve() == ROOT / ".venv" else "python"
    change = ["--muon_lr", f"{2 * cfg.muon_lr:g}", "--model_name", "try"]
    again = shlex.join([python, Path(sys.argv[0]).name, *sys.argv[1:], *change])
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
    if "cost" in summary:
        lines.append(f"cost        {summary['cost']:.2f}")
    if samples:
        text = samples[0]["prompt"] + "⟨⟩" + samples[0]["text"]
        lines += ["sample      held-out beginning ⟨⟩ continuation:",
                  *("            " + line for line in text.splitlines())]
    lines += [f"try next    change one thing and compare: {again}",
              "            your own text: see \"Your own text\" in README.md", "=" * 100]
    return lines


def check(cfg: Config, world: World) -> bool:
    """Say what a run would do; False if it could not train."""
    problems = []
    compiled, compile_reason = choose_compile(cfg, world.device)
    try:
        cfg, dataset, tokenizer, rows, held_out = open_data(cfg, world)
        about_data = [describe_data(cfg, dataset, rows, held_out), f"tokenizer   {tokenizer.name}"]
    except UserError as error:
        problems.append(str(error))
        cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 50257)
        about_data = [f"data        not usable; a vocabulary of {cfg.vocab_size:,} is assumed"]
    with torch.device("meta"):
        model = GPT(cfg, 0, world.dtype, uses_flex_attention(cfg, world, compiled))
    free_memory, free_disk = free_memory_mib(world), shutil.disk_usage(ROOT).free / 2**20
    lines = [*introduction(cfg, world, model, compiled, compile_reason), *about_data,
             f"free        {free_memory:,.0f} MiB of memory, {free_disk:,.0f} MiB of disk"]
    sharing = world.local_size if world.device.type == "cpu" else 1     # processes that share this memory
    if memory_estimate_mib(cfg, model, world) * sharing > free_memory:
        problems.append("the run needs more memory than is free; halve --micro_batch_tokens, "
                        "which changes no result, or lower --model_dim or --num_layers")
    weights = 4 * model.num_parameters() / 2**20
    if free_disk < 100 + (weights if cfg.save_model else 0):
        problems.append(f"only {free_disk:,.0f} MiB of disk are free")
    if world.is_main:
        print("\n".join([*lines, *(f"problem     {problem}" for problem in problems),
                         "cannot train" if problems else "ready to train"]))
    return not problems


def free_memory_mib(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**20
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return int(re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text())[1]) / 2**10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


@command
def main() -> None:
    cfg = parse_config(sys.argv[1:])
    world = World(cfg)
    try:
        if not cfg.check:
            train(cfg, world)
        elif not check(cfg, world):
            sys.exit(1)
    finally:
        world.close()


if __name__ == "__main__":
    main()
