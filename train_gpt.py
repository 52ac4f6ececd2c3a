"""Train a GPT. This file is the experiment: copy it, change a few lines, run it.

    python train_gpt.py --preset demo                              one process: a CPU, or the first GPU
    torchrun --nproc_per_node=8 train_gpt.py --preset gpt2-small   one process per GPU; the same training
    python train_gpt.py --check --preset xs                        what that run would do, and whether it can
    python train_gpt.py --smoke                                    seconds: is this changed script sound?
    python train_gpt.py --sample experiments/RUN --prompt "It"     continue a prompt with a trained model
    python train_gpt.py --help                                     the main knobs; --help all shows every one

It reads token shards (made by download_fineweb.py) and a tokenizer (made by train_tokenizer.py), and writes a
run folder, experiments/DATE_TIME_NAME, with everything that made the result. What experiments should not
change is in benchtop/, the bench: data order, evaluation, machine, checkpoints, the run folder.

From top to bottom: Config, Masks, Model, Loss, Optimizer, Training loop.
Places to edit are marked EDIT: config | mask | layer | attention | loss | schedule | optimizer.
If an edit makes a hand-written kernel wrong, that kernel is not used, and the log says so.

Shapes:  B batch   T tokens in a row   D model width   H heads   K width of one head   F MLP hidden
         V vocabulary   N tokens in a chunk   Q queries at once   J blocks in a row   P parameters
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchtop.budget import MOST_EPOCHS
from benchtop.errors import SharedError, UserError
from benchtop.initial import normal, uniform, zeros
from benchtop.knobs import RunConfig
from benchtop.machine import World, fp8_problem
from benchtop.memory import chunk_rows
from benchtop.run import Experiment, Run
from benchtop.speed import SizedBySpeed

# ------------------------------------------------------------------------------------------------
# Config: the knobs of this experiment. A field is a flag, and its comment is the flag's help. Knobs of the
# run, the data and the machine are in benchtop/knobs.py; --help all shows both.
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class CommonConfig(SizedBySpeed, RunConfig):
    """The knobs that train_nanogpt.py and train_llama3.py share with this script: budget and size."""
    head_width = 128                    # approximate width of an attention head if num_heads is 0
    logit_cap, fp8 = 0.0, False         # of the loss; knobs of Config below
    # the budget
    train_tokens: int = 0             # tokens to train on; 0: by steps or minutes, else min(4M, 4 epochs)
    num_steps: int = 0                # optimizer steps; 0: as many as train_tokens need
    train_minutes: float = 0          # limit on training time in minutes; 0: none
    target_loss: float = 0            # stop when val_loss is this low; 0: no target
    batch_tokens: int = 0             # tokens per step, over all processes; 0: set by train_tokens
    seq_len: int = 512                # tokens in a row
    max_doc_len: int = 0              # split longer documents into parts of this many tokens; 0: row length
    # the size
    num_layers: int = 6               # transformer layers; 0, with --by_speed: by rule
    num_heads: int = 0                # attention heads; 0: about model_dim / 128
    model_dim: int = 256              # width of the model; 0, with --by_speed: by rule

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "train_tokens", "num_steps", "train_minutes", "target_loss", "batch_tokens",
                              "max_doc_len", "num_heads")
        self.require_at_least(0 if self.by_speed else 1, "num_layers", "model_dim")
        self.require_at_least(2, "seq_len")
        self.require("train_minutes", self.train_minutes > 0 or not self.by_speed, "above 0 for --by_speed")
        self.require("max_doc_len", self.max_doc_len != 1, "at least 2, or 0")
        self.fill(max_doc_len=self.seq_len + 1)     # a row's tokens, and the last one's target
        self.require("batch_tokens", self.batch_tokens % self.seq_len == 0,
                     f"a multiple of --seq_len, {self.seq_len}")
        self.require("micro_batch_tokens", not 0 < self.micro_batch_tokens < self.seq_len,
                     f"at least --seq_len, {self.seq_len}, or 0")
        if self.num_heads:
            self.require("num_heads", self.model_dim % (4 * self.num_heads) == 0,
                         f"such that --model_dim, {self.model_dim}, is a multiple of 4 x --num_heads")
        if self.model_dim:      # with 0 a rule sets it later, and this runs again
            self.fill(num_heads=self.heads_by_rule())

    def heads_by_rule(self) -> int:
        """The number of heads that makes each about head_width wide, a multiple of 4 so that pairs rotate."""
        fitting = (heads for heads in range(max(1, round(self.model_dim / self.head_width)), 0, -1)
                   if self.model_dim % (4 * heads) == 0)
        heads = next(fitting, 0)
        self.require("model_dim", heads > 0, "a multiple of 4")
        return heads

    def with_budget(self, epoch_tokens: int) -> "CommonConfig":
        """The Config with its budget resolved: steps, tokens per step, tokens in all.

        epoch_tokens  tokens in one pass over the data
        batch         by rule the power of two nearest to 8,192 (D / 1 million)^0.59 for D tokens of training:
                      near the 393,216 that record 21 of Modded-NanoGPT takes for 700 million. With --by_speed
                      the power of two below, since slow devices want more steps
        """
        tokens = (self.train_tokens or self.tokens_by_speed
                  or max(1, min(4_000_000, MOST_EPOCHS * epoch_tokens)))
        rounded = math.floor if self.by_speed else round
        by_rule = 2 ** rounded(math.log2(8192 * (tokens / 1e6) ** 0.59))
        batch = self.batch_tokens or self.seq_len * max(1, round(by_rule / self.seq_len))
        asked_for = self.train_tokens or self.num_steps
        steps = self.num_steps or (math.ceil(tokens / batch) if asked_for else max(1, tokens // batch))
        if self.train_minutes and not asked_for:
            steps = 0       # only the clock ends training
        val_tokens = self.val_tokens or min(20_971_520, self.tokens_by_speed // 4)
        return replace(self, batch_tokens=batch, num_steps=steps, train_tokens=steps * batch,
                       val_tokens=val_tokens)

    @classmethod
    def presets(cls) -> dict[str, dict]:
        return PRESETS

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads


@dataclass(frozen=True)
class Config(CommonConfig):
    # EDIT: config
    # the model
    mlp_ratio: int = 4                # hidden width of an MLP, as a multiple of model_dim
    value_embeddings: int = 2         # value embedding tables; the i-th serves layer i from each end; 0: none
    attention_cap: float = 15         # scale of the attention logits; they stay below 1.42 times this
    logit_cap: float = 15             # soft cap: bounds output logits to plus or minus this; 0: none
    long_window: int = 0              # attention window of every fourth layer and the last; 0: the whole row
    short_window: int = 0             # attention window of the others; 0: half a row, but at least 512 tokens
    window_warmup_frac: float = 0     # fraction of training in which windows grow from 128 tokens; 0: none
    fp8: bool = False                 # two of the head's products in FP8; needs a GPU like RTX 4090 or H100
    # the optimizer; learning rates are for 524,288 tokens a step and width 768, and scaled by rules
    muon_lr: float = 0.05             # learning rate of the matrices in layers
    embed_lr: float = 0.6             # learning rate of the token embedding and the value embeddings
    head_lr: float = 0.008            # learning rate of the output head
    scalar_lr: float = 0.04           # learning rate of vectors and scalars: mixing weights, smear
    warmup_steps: int = 0             # steps of learning rate warm-up from 0; 0: none
    cooldown_frac: float = 0.6        # last fraction of training, in which the learning rate falls; 0: none
    final_lr_frac: float = 0.1        # learning rate at the end, as a fraction of its peak
    grad_clip: float = 0              # clip the global gradient norm to this; 0: no clipping

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "value_embeddings", "logit_cap", "long_window", "short_window", "muon_lr",
                              "embed_lr", "head_lr", "scalar_lr", "warmup_steps", "grad_clip")
        self.require_at_least(1, "mlp_ratio")
        self.require_fraction("window_warmup_frac", "cooldown_frac", "final_lr_frac")
        self.require("attention_cap", self.attention_cap > 0, "more than 0")
        # logits span twice the cap, and exp(-80) is still a float32
        self.require("logit_cap", self.logit_cap <= 40, "at most 40")
        # in rows of more than 512 tokens, three layers of four see half of the row
        self.fill(short_window=min(self.long_window or self.seq_len, max(512, self.seq_len // 2)))
        if self.fp8:
            for knob in ("seq_len", "model_dim"):
                self.require(knob, getattr(self, knob) % 16 == 0, "a multiple of 16 for --fp8")

    @property
    def num_value_tables(self) -> int:
        """A table serves two layers, so there are at most half as many tables as layers."""
        return min(self.value_embeddings, self.num_layers // 2)

    def require_machine(self, device: torch.device, dtype: torch.dtype) -> None:
        problem = self.fp8 and fp8_problem(device, dtype)
        if problem:
            raise UserError(f"--fp8 {problem}; leave it out")


def learning_rates(cfg: Config) -> dict[str, float]:
    """The learning rate of each group of parameters.

    batch    all grow with its twelfth root (measured for an earlier recipe). At a fixed number of steps it
             would be the square root, but the batch grows with the budget, and longer runs want lower rates
    width    rates of embeddings and head fall as 1 / sqrt(width). Muon's needs no rule: at any width its
             updates have singular values near 1, times sqrt(max(1, rows / columns))
    """
    by_batch = (cfg.batch_tokens / 524288) ** (1 / 12)
    by_width = math.sqrt(768 / cfg.model_dim)
    return {"matrices": cfg.muon_lr * by_batch, "embeddings": cfg.embed_lr * by_batch * by_width,
            "head": cfg.head_lr * by_batch * by_width, "scalars": cfg.scalar_lr * by_batch}


PRESETS = {
    # four minutes on two CPU cores; without AMX the clock ends it after 150 to 200 steps, and more frequent
    # validation would take half as long as training
    "demo": dict(model_name="demo", num_layers=2, num_steps=600, batch_tokens=8192, train_minutes=4,
                 val_every=40, log_every=5, save_model=True),
    # the common measure since karpathy/autoresearch: 300 seconds on any device, validated at the end
    "five-minutes": dict(model_name="five-minutes", by_speed=True, num_layers=0, model_dim=0, train_minutes=5,
                         seq_len=2048, vocab_size=8192, val_every=10**6),
    # the three baselines of gpt-lab: 98, 397 and 986 million tokens
    "xs": dict(model_name="xs", num_layers=8, num_heads=4, model_dim=256, value_embeddings=2, seq_len=1024,
               train_tokens=98_304_000, val_every=125),
    "s": dict(model_name="s", num_layers=12, num_heads=6, model_dim=384, value_embeddings=3, seq_len=1024,
              train_tokens=396_492_800, val_every=125),
    "m": dict(model_name="m", num_layers=16, num_heads=12, model_dim=768, value_embeddings=4, seq_len=2048,
              train_tokens=986_316_800, val_every=125),
    # the two tracks of Modded-NanoGPT: targets 3.28 and 2.92 on FineWeb with GPT-2's tokenizer
    "gpt2-small": dict(model_name="gpt2-small", num_layers=12, num_heads=6, model_dim=768, value_embeddings=3,
                       seq_len=2048, batch_tokens=393216, num_steps=1770, val_every=125, long_window=1792,
                       short_window=896, window_warmup_frac=1, val_tokens=10_485_760, target_loss=3.28),
    "gpt2-medium": dict(model_name="gpt2-medium", num_layers=16, num_heads=8, model_dim=1024,
                        value_embeddings=3, seq_len=2048, batch_tokens=524288, num_steps=5960, val_every=125,
                        short_window=1024, window_warmup_frac=1, val_tokens=10_485_760, target_loss=2.92),
    # 1.5 billion parameters, for one box with 8 GPUs of 80 GB: 10 billion tokens
    "gpt2-xl": dict(model_name="gpt2-xl", num_layers=24, num_heads=16, model_dim=2048, value_embeddings=1,
                    seq_len=2048, batch_tokens=1_048_576, num_steps=9536, val_every=500, short_window=1024,
                    window_warmup_frac=1, val_tokens=10_485_760),
}


# ------------------------------------------------------------------------------------------------
# Masks: which token sees which, and attention with that mask; knows only tensors.
# ------------------------------------------------------------------------------------------------

def sees(query: Tensor, key: Tensor, query_doc: Tensor, key_doc: Tensor, window: Tensor) -> Tensor:
    """Whether the token at place `query` sees the one at place `key`; every kernel takes its mask from here.

    The arguments are tensors that broadcast: places in the row, their documents' numbers, and () a window.
    """
    # EDIT: mask
    return (key <= query) & (query - key < window) & (query_doc == key_doc)


def dense_mask(docs: Tensor, window: Tensor, queries: slice = slice(None)) -> Tensor:
    """Which keys each of the queries sees: docs (B, T) -> (B, Q, T) bool."""
    place = torch.arange(docs.size(1), dtype=docs.dtype, device=docs.device)                # (T)
    seen = sees(place[queries, None], place, docs[:, queries, None], docs[:, None], window)
    return seen.expand(len(docs), -1, -1)                                                   # (B, Q, T)


BLOCK = 128     # places in a block of FlexAttention's mask


def block_mask(docs: Tensor, window: Tensor, blocks: Callable) -> BlockMask:
    """The mask for FlexAttention: which blocks of 128 x 128 to skip, and in which to evaluate sees(); docs
    (B, T) are the documents' numbers, blocks is seen_blocks or evaluated_blocks."""
    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key, docs[batch, query], docs[batch, key], window)
    length = docs.size(1)
    # padding belongs to the last document; what it sees is never read
    padded = F.pad(docs[:, None], (0, -length % BLOCK), mode="replicate")[:, 0]             # (B, 128J)
    seen, whole = blocks(padded, window)                                                    # (B, J, J)
    # blocks to evaluate and blocks seen as a whole; for each block of queries its keys, and for gradients the
    # reverse. BlockMask.from_kv_blocks does the same in 2.9 ms of Python instead of 0.2
    kinds = torch.stack([seen & ~whole, whole.expand_as(seen)])                             # (2, B, J, J)
    both = torch.stack([kinds, kinds.mT])[:, :, :, None].int()                          # (2, 2, B, 1, J, J)
    counts = both.sum(-1, dtype=torch.int32)                                                # (2, 2, B, 1, J)
    orders = both.argsort(dim=-1, descending=True, stable=True).int()                   # (2, 2, B, 1, J, J)
    lists = itertools.chain(*zip(counts.flatten(0, 1), orders.flatten(0, 1), strict=True))
    return BlockMask((length, length), *lists, (BLOCK, BLOCK), mask_mod)


def seen_blocks(docs: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks are seen at all, and which as a whole: docs (B, 128J) -> two of (B, J, J), query by key.

    Derived from the first and last document of each block. A new window compiles nothing.
    """
    first, last = docs[:, ::BLOCK], docs[:, BLOCK - 1::BLOCK]                               # (B, J)
    place = torch.arange(first.size(1), dtype=docs.dtype, device=docs.device)               # (J)
    apart = BLOCK * (place[:, None] - place)    # of the first query and the first key      # (J, J)
    seen = (apart >= 0) & (apart - (BLOCK - 1) < window) & (last[:, None] >= first[..., None])  # (B, J, J)
    whole = (apart > 0) & (apart + BLOCK - 1 < window)                                      # (J, J)
    return seen, whole & (first[:, None] == last[..., None])


def evaluated_blocks(docs: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """The same for any mask, by evaluating sees() for all pairs of places."""
    pairs = dense_mask(docs, window)                                                        # (B, 128J, 128J)
    pairs = pairs.unflatten(2, (-1, BLOCK))                                             # (B, 128J, J, 128)
    pairs = pairs.unflatten(1, (-1, BLOCK))                                             # (B, J, 128, J, 128)
    return pairs.any(4).any(2), pairs.all(4).all(2)


def choose_blocks() -> Callable:
    """seen_blocks if it agrees with sees(), else evaluated_blocks; so editing sees() is enough."""
    place = torch.arange(4 * BLOCK, dtype=torch.int32, device="cpu")
    docs = torch.stack([place // 300, place // 7, 0 * place])       # of long, short and endless documents
    for length in (1, 100, 300, 10**6):
        window = torch.tensor(length, dtype=torch.int32, device="cpu")
        (seen, whole), (some, every) = seen_blocks(docs, window), evaluated_blocks(docs, window)
        if (some & ~seen).any() or (whole & ~every).any():
            return evaluated_blocks
    return seen_blocks


QUERIES_AT_ONCE = 512     # limits the memory that longer rows take


class DenseAttention(torch.autograd.Function):
    """Attention by plain matrix products, for CPUs and wherever FlexAttention does not work. With rows of 512
    tokens on two AMX cores, it takes two thirds of the time of torch's scaled_dot_product_attention."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, docs: Tensor, window: Tensor, scale: float) -> Tensor:
        at_least_float32 = torch.promote_types(q.dtype, torch.float32)
        all_exps, outputs, totals = [], [], []
        for part in query_blocks(q):
            seen = dense_mask(docs, window, part)                                           # (B, Q, T)
            z = (q[:, :, part] @ k.mT).to(at_least_float32) * scale                         # (B, H, Q, T)
            z = torch.where(seen[:, None], z, -math.inf)                                    # (B, H, Q, T)
            all_exps.append(torch.exp(z - z.amax(-1, keepdim=True)).to(v.dtype))            # (B, H, Q, T)
            totals.append(all_exps[-1].sum(-1, keepdim=True, dtype=at_least_float32))       # (B, H, Q, 1)
            outputs.append(((all_exps[-1] @ v) / totals[-1]).to(v.dtype))                   # (B, H, Q, K)
        y, total = torch.cat(outputs, dim=2), torch.cat(totals, dim=2)
        ctx.save_for_backward(q, k, v, y, total, *all_exps)
        ctx.scale = scale
        return y                                                                            # (B, H, T, K)

    @staticmethod
    def backward(ctx, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, total, *all_exps = ctx.saved_tensors
        # with weights p = exps / total, the gradient of a logit is p (y_grad v - sum(y_grad y))
        row_sum = (y_grad.to(total.dtype) * y).sum(-1, keepdim=True)                        # (B, H, T, 1)
        y_grad_by_total = (y_grad / total).to(y.dtype)                                      # (B, H, T, K)
        q_grads, k_grad, v_grad = [], 0, 0
        for part, exps in zip(query_blocks(q), all_exps, strict=True):
            z_grad = y_grad[:, :, part] @ v.mT - row_sum[:, :, part]                        # (B, H, Q, T)
            z_grad = (exps * z_grad * (ctx.scale / total[:, :, part])).to(q.dtype)          # (B, H, Q, T)
            q_grads.append(z_grad @ k)                                                      # (B, H, Q, K)
            k_grad = k_grad + z_grad.mT @ q[:, :, part]                                     # (B, H, T, K)
            v_grad = v_grad + exps.mT @ y_grad_by_total[:, :, part]                         # (B, H, T, K)
        return torch.cat(q_grads, dim=2), k_grad, v_grad, None, None, None


def query_blocks(q: Tensor) -> list[slice]:
    starts = range(0, q.size(2), QUERIES_AT_ONCE)
    return [slice(start, min(start + QUERIES_AT_ONCE, q.size(2))) for start in starts]


# ------------------------------------------------------------------------------------------------
# Model: knows tensors and Config; no ranks, no files.
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Context:
    """What every layer receives besides its own input.

    Information moves between places only by `attend` and `previous`, which stop where a document begins.
    docs            (B, T) int32, number of the document at each place
    begins          (B, T) bool, whether a document begins at that place
    window          () int32, how many tokens the layer looks back, the current one included
    cos, sin        (T, K/2) float32, of the angles by which each pair of dimensions rotates at each place
    unrotated       (K) bool: dimensions that do not rotate
    blocks          the mask for FlexAttention; None: attend by DenseAttention
    kernel_options  of FlexAttention
    """
    docs: Tensor
    begins: Tensor
    window: Tensor
    cos: Tensor
    sin: Tensor
    unrotated: Tensor
    blocks: BlockMask | None = None
    kernel_options: dict | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Softmax attention over the keys that the mask shows; all tensors (B, T, H, K)."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                   # (B, H, T, K)
        if self.blocks is None:
            y = DenseAttention.apply(q, k, v, self.docs, self.window, scale)                # (B, H, T, K)
        else:
            y = flex_attention(q, k, v, block_mask=self.blocks, scale=scale,
                               kernel_options=self.kernel_options)                          # (B, H, T, K)
        return y.transpose(1, 2)                                                            # (B, T, H, K)

    def mask(self) -> Tensor:
        """(B, 1, T, T) bool, which keys each query sees: for your own attention in plain PyTorch."""
        return dense_mask(self.docs, self.window)[:, None]                                  # (B, 1, T, T)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding (arXiv:2104.09864); x (B, T, H, K), pairs are (i, i + K/2)."""
        cos, sin = self.cos.to(x.dtype)[:, None], self.sin.to(x.dtype)[:, None]             # (T, 1, K/2)
        first, second = x.chunk(2, dim=-1)                                                  # (B, T, H, K/2)
        return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)  # (B, T, H, K)

    def previous(self, x: Tensor) -> Tensor:
        """x of the previous token, zeros where a document begins; x (B, T, ...)."""
        begins = self.begins.view(*self.begins.shape, *[1] * (x.ndim - 2))
        return F.pad(x, (0, 0) * (x.ndim - 2) + (1, 0))[:, :-1].masked_fill(begins, 0)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T; weights are float32, the product is in the dtype of the activations."""
    return F.linear(x, weight.to(x.dtype))


class Layer(nn.Module):
    """One transformer layer: attention, then an MLP; each takes normed input and is added to the stream."""

    def __init__(self, cfg: Config):
        super().__init__()
        width, hidden = cfg.model_dim, cfg.mlp_ratio * cfg.model_dim
        self.num_heads, self.head_dim = cfg.num_heads, cfg.head_dim
        self.attention_scale = cfg.attention_cap / cfg.head_dim
        self.qkv = uniform(3, width, width, std=0.5 / math.sqrt(width))
        self.out = zeros(width, width)
        self.up = uniform(hidden, width, std=0.5 / math.sqrt(width))
        self.down = zeros(width, hidden)
        self.stream_mix = nn.Parameter(torch.tensor([1.0, 0.0]))     # of the stream and the embedding
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5]))      # of the values and the value embedding

    def forward(self, x: Tensor, x0: Tensor, value_embedding: Tensor | None, ctx: Context) -> Tensor:
        # EDIT: layer
        stream, embedding = self.stream_mix.to(x.dtype)                                     # ()
        x = stream * x + embedding * x0                                                     # (B, T, D)
        x = x + self.attention(rms_norm(x), value_embedding, ctx)                           # (B, T, D)
        hidden = F.relu(linear(rms_norm(x), self.up)).square()                              # (B, T, F)
        return x + linear(hidden, self.down)                                                # (B, T, D)

    def attention(self, x: Tensor, value_embedding: Tensor | None, ctx: Context) -> Tensor:
        B, T, D = x.shape
        qkv = linear(x, self.qkv.flatten(0, 1))                                             # (B, T, 3D)
        q, k, v = qkv.view(B, T, 3 * self.num_heads, self.head_dim).chunk(3, dim=2)         # (B, T, H, K)
        # EDIT: attention
        # queries and keys of root mean square 1 bound the attention logits (QK-norm, arXiv:2010.04245)
        q, k = ctx.rotate(rms_norm(q)), ctx.rotate(rms_norm(k))                             # (B, T, H, K)
        # key offset: unrotated dimensions hold the key of the previous token, so that a single layer can find
        # an earlier occurrence of a token and copy what followed it (record 49 of Modded-NanoGPT)
        k = torch.where(ctx.unrotated, ctx.previous(k), k)                                  # (B, T, H, K)
        own, table = self.value_mix.to(x.dtype)                                             # ()
        v = own * v     # in every layer; without a table, values begin at half their size  # (B, T, H, K)
        if value_embedding is not None:
            v = v + table * value_embedding.view(v.shape)                                   # (B, T, H, K)
        y = ctx.attend(q, k, v, self.attention_scale)                                       # (B, T, H, K)
        y = y.reshape(B, T, D)                                                              # (B, T, D)
        return linear(y, self.out)                                                          # (B, T, D)


class Model(nn.Module):
    """What the bench and the loop need of a model: the base of GPT below, and of the models of
    train_nanogpt.py and train_llama3.py. A subclass has `layers`, a `head` (V, D) and the method `hidden`.

    eot_id    id of the token that begins every document
    dtype     of the activations and of the products
    flex      kernel options for FlexAttention; None: attend by DenseAttention
    longest   tokens that the model can read at once; None: any number
    progress  fraction of the budget used, 0 to 1, for what changes during training; the bench sets it.
              Validation leaves it as it is; it is 1 for samples and benchmarks
    """

    longest = None

    def __init__(self, cfg: CommonConfig, eot_id: int, dtype: torch.dtype = torch.float32,
                 flex: dict | None = None):
        super().__init__()
        self.cfg, self.eot_id, self.dtype, self.flex, self.progress = cfg, eot_id, dtype, flex, 1.0
        self.blocks, self.loss_kernel = choose_blocks(), choose_loss_kernel(cfg)
        self.fp8_kernel = to_fp8

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses of all targets, in nats.

        inputs   (B, T) token ids
        targets  (B, T) token ids; -1 where there is nothing to predict
        returns  () float32
        """
        x = self.hidden(inputs).flatten(0, 1)                                               # (BT, D)
        return ChunkedLoss.apply(x, self.head, targets.flatten(), self.cfg, self.loss_kernel, self.fp8_kernel)

    def hidden(self, inputs: Tensor) -> Tensor:
        """What the head reads: (B, T) token ids -> (B, T, D)."""
        raise NotImplementedError(f"{type(self).__name__} has no hidden states")

    def logits(self, x: Tensor) -> Tensor:
        """Capped logits of hidden states, (N, D) -> (N, V) float32; minus infinity in the padding of V."""
        z = soft_cap(linear(x, self.head).float(), self.cfg.logit_cap)                      # (N, V)
        return z.masked_fill(torch.arange(z.size(-1), device=z.device) >= self.cfg.vocab_size, -math.inf)

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians by which each pair of dimensions rotates from one token to the next, (K/2) float32."""
        return torch.zeros(self.cfg.head_dim // 2, device=device)

    def windows(self, length: int) -> list[int]:
        """How many tokens each layer looks back in rows of `length` tokens."""
        return [length] * len(self.layers)

    def contexts(self, inputs: Tensor) -> list[Context]:
        """The Context of each layer; layers with equal windows share one."""
        begins = inputs == self.eot_id                                                      # (B, T)
        docs = begins.cumsum(1, dtype=torch.int32)                                          # (B, T)
        frequency = self.frequencies(inputs.device)                                         # (K/2)
        angle = torch.arange(inputs.size(1), device=inputs.device)[:, None] * frequency     # (T, K/2)
        unrotated = (frequency == 0).repeat(2)                                              # (K)
        windows, by_window = self.windows(inputs.size(1)), {}
        for length in set(windows):
            # a tensor, so that a kernel compiled for one window serves all
            window = torch.full((), length, dtype=docs.dtype, device=inputs.device)         # ()
            mask = None if self.flex is None else block_mask(docs, window, self.blocks)
            by_window[length] = Context(docs, begins, window, angle.cos(), angle.sin(), unrotated, mask,
                                        self.flex)
        return [by_window[length] for length in windows]

    def compile_parts(self) -> None:
        """Compile what repeats: one layer serves all layers, and one chunk of the loss all chunks."""
        for layer in self.layers:
            layer.compile(dynamic=False)
        self.loss_kernel = torch.compile(self.loss_kernel, dynamic=False)
        self.fp8_kernel = torch.compile(to_fp8, dynamic=False)

    def remarks(self) -> list[str]:
        """Lines about this model for the log."""
        edited = []
        if not loss_is_plain():
            edited.append("loss        edited: its gradient is by autograd, slower than the built-in kernel")
        if self.flex is not None and self.blocks is evaluated_blocks:
            edited.append("mask        edited: its blocks are found by a slower way, for all pairs")
        return edited

    def flops_per_token(self) -> float:
        """Floating-point operations per trained token, forward and backward: 6 for each weight of a matrix,
        and 12 for each model dimension and key that a token attends to on average (arXiv:2001.08361)."""
        length = self.cfg.seq_len
        matrices = sum(p.numel() for layer in self.layers for p in layer.parameters() if p.ndim > 1)
        # mean of min(place, window) over all places
        keys = sum(window - window**2 / (2 * length) for window in self.windows(length))
        return 6 * (self.head.numel() + matrices) + 12 * self.cfg.model_dim * keys


class GPT(Model):
    """Embedding -> norm -> layers -> norm -> head; logits are capped to plus or minus logit_cap."""

    def __init__(self, cfg: Config, eot_id: int, dtype: torch.dtype = torch.float32,
                 flex: dict | None = None):
        super().__init__(cfg, eot_id, dtype, flex)
        self.embed = normal(cfg.vocab_size, cfg.model_dim)
        self.value_embeds = nn.ParameterList(
            normal(cfg.vocab_size, cfg.model_dim) for _ in range(cfg.num_value_tables))
        self.smear = zeros(cfg.model_dim)       # share of the token before
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))
        self.head = zeros(cfg.padded_vocab_size, cfg.model_dim)
        self.look_up, self.smear_kernel, self.norm_kernel = look_up, smeared, rms_norm

    def hidden(self, inputs: Tensor) -> Tensor:
        contexts = self.contexts(inputs)
        x0 = self.look_up(inputs, self.embed, self.dtype)                                   # (B, T, D)
        x0 = self.smear_kernel(x0, contexts[0], self.smear)                                 # (B, T, D)
        # a separate tensor object: with x0 twice, the first layer would be compiled separately
        x = x0.view_as(x0)                                                                  # (B, T, D)
        for number, (layer, ctx) in enumerate(zip(self.layers, contexts, strict=True)):
            table = self.value_table(number)
            values = None if table is None else self.look_up(inputs, table, self.dtype)     # (B, T, D)
            x = layer(x, x0, values, ctx)                                                   # (B, T, D)
        return self.norm_kernel(x)                                                          # (B, T, D)

    def value_table(self, layer: int) -> Tensor | None:
        """Table i of n serves the i-th of the first n layers and the i-th of the last n layers."""
        n, behind = len(self.value_embeds), layer - (len(self.layers) - len(self.value_embeds))
        place = layer if layer < n else behind
        return self.value_embeds[place] if 0 <= place < n else None

    def frequencies(self, device: torch.device) -> Tensor:
        """Half of the pairs rotate, by 1 down to 1/1024 radians per token; the others are those of the key
        offset in Layer.attention."""
        rotating = 1024.0 ** -torch.linspace(0, 1, self.cfg.head_dim // 4, device=device)   # (K/4)
        return torch.cat([rotating, torch.zeros_like(rotating)])                            # (K/2)

    def windows(self, length: int) -> list[int]:
        """Every fourth layer and the last have the long window, the others the short one; no window is longer
        than a row in training."""
        cfg, windows = self.cfg, []
        grown = min(1.0, self.progress / cfg.window_warmup_frac) if cfg.window_warmup_frac else 1.0
        for number in range(1, len(self.layers) + 1):
            is_long = number % 4 == 0 or number == len(self.layers)
            full = min((cfg.long_window if is_long else cfg.short_window) or cfg.seq_len, cfg.seq_len, length)
            windows.append(min(full, max(128, round(grown * full))))
        return windows

    def compile_parts(self) -> None:
        """Also compile the small operations before and after the layers."""
        super().compile_parts()
        self.smear_kernel = torch.compile(smeared, dynamic=False)
        self.norm_kernel = torch.compile(rms_norm, dynamic=False)
        if self.flex is not None:       # on a CPU, the gradient of a look-up is faster uncompiled
            self.look_up = torch.compile(look_up, dynamic=False)


def look_up(inputs: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of a table (V, D) for token ids (B, T), in the dtype of the activations: (B, T, D)."""
    return F.embedding(inputs, table).to(dtype)


def smeared(x: Tensor, ctx: Context, share: Tensor) -> Tensor:
    """Embeddings (B, T, D), each plus a share (D) of the previous one in its document; normed."""
    return rms_norm(x + share.to(x.dtype) * ctx.previous(x))                                # (B, T, D)


# ------------------------------------------------------------------------------------------------
# Loss: the head and its cross-entropy, chunk by chunk, in FP8 on request; knows tensors and Config.
# ------------------------------------------------------------------------------------------------

def soft_cap(z: Tensor, cap: float) -> Tensor:
    """Squeeze logits smoothly into plus or minus cap: z / sqrt(1 + (z / cap)^2); a cap of 0 does nothing."""
    return z * torch.rsqrt(1 + (z / cap).square()) if cap else z


def token_losses(z: Tensor, targets: Tensor, cfg: CommonConfig) -> Tensor:
    """The loss of each token, (N) float32. For another loss, or one more term, edit only this function.

    z        (N, V) float32, capped logits of the real tokens
    targets  (N) token ids; the loss must be 0 where the target is -1. A z-loss, for example, adds
                 1e-4 * z.logsumexp(-1).square() * (targets >= 0)
    train_loss includes what you add here; val_loss stays plain cross-entropy (benchtop/evaluation.py).
    """
    # EDIT: loss
    return F.cross_entropy(z, targets, ignore_index=-1, reduction="none")                   # (N)


def losses_and_gradient(logits: Tensor, targets: Tensor, cfg: CommonConfig) -> tuple[Tensor, Tensor]:
    """token_losses of a chunk and, by autograd, their gradient with respect to the uncapped logits.

    logits   (N, V) uncapped; columns from cfg.vocab_size on are padding
    targets  (N) token ids; -1 where there is nothing to predict
    returns  (N) float32 and (N, V) in the dtype of the logits
    """
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()                                           # (N, V)
        z = soft_cap(logits[:, :cfg.vocab_size].float(), cfg.logit_cap)
        losses = token_losses(z, targets, cfg)                                              # (N)
        gradient, = torch.autograd.grad(losses.sum(), logits)                               # (N, V)
    return losses.detach(), gradient


def fast_losses_and_gradient(logits: Tensor, targets: Tensor, cfg: CommonConfig) -> tuple[Tensor, Tensor]:
    """The same for plain cross-entropy, in half the time: softmax minus one-hot, times the cap's slope.

    To change the loss, edit token_losses; choose_loss_kernel then no longer takes this hand-written kernel.
    """
    cap, z = cfg.logit_cap, logits.float()                                                  # (N, V)
    real = torch.arange(z.size(1), device=z.device) < cfg.vocab_size                        # (V)
    shrink = torch.rsqrt(1 + (z * (1 / cap)).square()) if cap else torch.ones_like(z)       # (N, V)
    # keeps exp from overflowing; the cap needs no pass over the logits for that
    bound = cap or z.masked_fill(~real, -math.inf).amax(-1, keepdim=True)
    exps = torch.where(real, torch.exp(z * shrink - bound), 0)                              # (N, V)
    counted = (targets >= 0).float()[:, None]                                               # (N, 1)
    column = targets.clamp(min=0)[:, None]                                                  # (N, 1)
    target_z, target_shrink = z.gather(1, column), shrink.gather(1, column)                 # (N, 1)
    target_exp = torch.exp(target_z * target_shrink - bound)                                # (N, 1)
    total = exps.sum(-1, keepdim=True)                                                      # (N, 1)
    gradient = exps * (counted / total) * shrink**3                                         # (N, V)
    losses = counted * (bound + total.log() - target_z * target_shrink)                     # (N, 1)
    at_target = counted * (target_exp / total - 1) * target_shrink**3                       # (N, 1)
    return losses[:, 0], gradient.to(logits.dtype).scatter(1, column, at_target.to(logits.dtype))


def plain_losses(z: Tensor, targets: Tensor, cfg: CommonConfig) -> Tensor:
    """token_losses as it is before anyone edits it: the loss of fast_losses_and_gradient."""
    return F.cross_entropy(z, targets, ignore_index=-1, reduction="none")


def loss_is_plain() -> bool:
    """Whether token_losses does what plain_losses does."""
    ours, plain = token_losses.__code__, plain_losses.__code__      # the first constant is the docstring
    return (ours.co_code, ours.co_names, ours.co_consts[1:]) == (
        plain.co_code, plain.co_names, plain.co_consts[1:])


def choose_loss_kernel(cfg: CommonConfig) -> Callable:
    """fast_losses_and_gradient while token_losses is plain, else losses_and_gradient; wrapped for FP8.

    raises  UserError if ChunkedLoss returns anything else than token_losses and their gradient by autograd
    """
    kernel = fast_losses_and_gradient if loss_is_plain() else losses_and_gradient
    in_fp8 = functools.partial(fp8_losses_and_gradients, kernel) if cfg.fp8 else kernel
    # FP8 rounds too much for the comparison, and a mistyped vocabulary must not fill the memory
    exact = {"fp8": False} if cfg.fp8 else {}
    cfg = replace(cfg, vocab_size=min(cfg.vocab_size, 2**16), **exact)
    draw = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.enable_grad():
        x = torch.randn(24, 16, generator=draw).requires_grad_()
        weight = (1.5 * torch.randn(cfg.padded_vocab_size, 16, generator=draw)).requires_grad_()
        targets = torch.randint(cfg.vocab_size, (24,), generator=draw)
        targets[::8] = -1
        z = soft_cap((x @ weight.T)[:, :cfg.vocab_size], cfg.logit_cap)
        both = token_losses(z, targets, cfg).sum(), ChunkedLoss.apply(x, weight, targets, cfg, kernel, to_fp8)
        found = [(loss, *torch.autograd.grad(loss, (x, weight))) for loss in both]
    if not all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(*found, strict=True)):
        raise UserError("ChunkedLoss or its kernel returns another loss or gradient than token_losses; edit "
                        "token_losses alone, whose gradient follows by autograd")
    return in_fp8


class ChunkedLoss(torch.autograd.Function):
    """The loss of a linear head, chunk by chunk; the forward pass computes the gradient as well.

    Only one chunk's logits exist at a time: 0.8 GB on a GPU instead of 10 GB for 49,152 tokens and 50,304
    columns. With cfg.fp8 two of the three products are in FP8: the logits and the gradient of x.
    x (BT, D), weight (V, D) float32, targets (BT), kernel from choose_loss_kernel; low is to_fp8
    returns  () float32, the summed loss
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, cfg: CommonConfig, kernel: Callable,
                low: Callable) -> Tensor:
        x, weight_low = x.detach(), weight.detach().to(x.dtype)                             # (BT, D), (V, D)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight)                 # (BT, D), (V, D)
        total = torch.zeros((), dtype=torch.float32, device=x.device)                       # ()
        if cfg.fp8:
            by_columns, by_rows = low(weight_low, E4M3), low(weight_low.T, E4M3)

        def add(chunk: Tensor, wanted: Tensor, chunk_grad: Tensor) -> None:
            if cfg.fp8:
                logits = fp8_product(low(chunk, E4M3), by_columns, fast=True)               # (N, V)
                losses, gradient, *in_fp8 = kernel(logits, wanted, cfg)                     # (N), (N, V)
                chunk_grad.copy_(fp8_product(in_fp8, by_rows))                              # (N, D)
            else:
                logits = chunk @ weight_low.T                                               # (N, V)
                losses, gradient = kernel(logits, wanted, cfg)                              # (N), (N, V)
                torch.mm(gradient, weight_low, out=chunk_grad)                              # (N, D)
            add_product(weight_grad, gradient.T, chunk)
            total.add_(losses.sum())
        rows = chunk_rows(x, weight.size(0))
        for parts in zip(x.split(rows), targets.split(rows), x_grad.split(rows), strict=True):
            add(*parts)     # a function, so that no chunk's logits outlive it
        ctx.save_for_backward(x_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad.to(x_grad.dtype), weight_grad * grad, None, None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with total in float32; on an NVIDIA GPU the product is added before it is rounded."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and torch.version.cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def fp8_losses_and_gradients(kernel: Callable, logits: Tensor, targets: Tensor, cfg: CommonConfig,
                             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernel returns, and then the gradient in e5m2 with its scale."""
    losses, gradient = kernel(logits, targets, cfg)                                         # (N), (N, V)
    # softmax minus one-hot, times the slope of the cap, is at most 1, which saves a search for the largest
    bound = 1.0 if kernel is fast_losses_and_gradient else None
    return losses, gradient, *to_fp8(gradient, E5M2, bound)


def to_fp8(x: Tensor, dtype: torch.dtype, bound: float | None = None) -> tuple[Tensor, Tensor]:
    """x / scale in FP8, row by row in memory, and the scale, () float32.

    The scale maps the largest magnitude of x, or a bound on it, to the dtype's largest number. e4m3 has finer
    steps, e5m2 the wider range that gradients need.
    source  Micikevicius et al. 2022, arXiv:2209.05433
    """
    limit = torch.finfo(dtype).max
    largest = x.abs().amax().float() if bound is None else torch.full((), bound, device=x.device)
    scale = largest.clamp(min=1e-12) / limit                                                # ()
    return (x.float() / scale).clamp(-limit, limit).to(dtype).contiguous(), scale


def fp8_product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], fast: bool = False) -> Tensor:
    """a @ b.T in bfloat16; a and b are pairs from to_fp8, at least one in e4m3, with sizes divisible by 16;
    fast: add up less exactly, enough for logits but not for gradients."""
    return torch._scaled_mm(a[0], b[0].T, a[1], b[1], out_dtype=torch.bfloat16, use_fast_accum=fast)


# ------------------------------------------------------------------------------------------------
# Optimizer: knows parameters, their names and gradients, and which process owns which piece.
# ------------------------------------------------------------------------------------------------

def group_of(name: str, parameter: Tensor) -> str:
    """The group of a parameter. Fewer than two dimensions: scalars. "embed" in its name: embeddings, so name
    a lookup table that way. The head, even if tied to an embedding, has the name "head". Others are matrices.
    """
    if parameter.ndim < 2:
        return "scalars"
    if name == "head":
        return "head"
    return "embeddings" if "embed" in name else "matrices"


def newton_schulz(G: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Push every singular value of a matrix towards 1, keeping its singular vectors, without an SVD.

    G        (..., rows, columns) float of any scale; leading dimensions are separate matrices
    dtype    of the products; bfloat16 is precise enough
    returns  (..., rows, columns) in `dtype`; singular values land between 0.7 and 1.2
    raises   ValueError if G has fewer than two dimensions
    source   Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """
    if G.ndim < 2:
        raise ValueError(f"newton_schulz needs matrices; it got a tensor of shape {tuple(G.shape)}")
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (torch.linalg.vector_norm(G.float(), dim=(-2, -1), keepdim=True) + 1e-7)
    X = X.to(dtype).flatten(0, -3) if G.ndim > 2 else X.to(dtype)[None]
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT        # the smaller products
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)     # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)              # a X + B X
    return (X.mT if tall else X).view(G.shape)


def adam_update(parameters: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor],
                lr: float, beta1: float, beta2: float, step: int, eps: float) -> None:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980), in place, for all tensors of a group at once."""
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    # both averages begin at 0; the divisors correct that bias
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, math.sqrt(1 - beta2**step))
    torch._foreach_add_(roots, eps)
    torch._foreach_addcdiv_(parameters, means, roots, -lr / (1 - beta1**step))


@dataclass
class Piece:
    """Rows of a parameter that one process, the owner, updates; on all others `state` is empty."""
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
    progress  fraction of the budget used, 0 to 1
    """
    # EDIT: schedule
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    cooldown = min(1.0, (1 - progress) / cfg.cooldown_frac) if cfg.cooldown_frac else 1.0
    return warmup * (cfg.final_lr_frac + (1 - cfg.final_lr_frac) * cooldown)


class Optimizer:
    """Muon for matrices in layers, Adam for everything else, no weight decay.

    Every parameter is in exactly one group (group_of). `learning_rates` has the rate of each group, `rules`
    the method that updates it, and `state_names` which tensors, of the parameter's shape, that method needs.
    To add a rule, write a method NAME_step and its line in state_names; checkpoints and the rest follow.

    With several processes each parameter is cut into pieces: a matrix that Muon orthogonalizes is one piece;
    a table of Adam's has a block of rows for each process. A piece's gradients are summed on its owner, which
    alone keeps its state and updates it; then all processes copy its weights.
    source  Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054
    """

    # EDIT: optimizer
    rules = {"matrices": "muon", "embeddings": "adam", "head": "adam", "scalars": "adam"}
    state_names = {"muon": ("momentum",), "adam": ("mean", "square")}
    betas, eps = (0.8, 0.95), 1e-10     # Adam's
    # functions of this file; a script with another optimizer overrides them
    group_of, learning_rates, lr_scale = map(staticmethod, (group_of, learning_rates, lr_scale))

    def __init__(self, model: Model, cfg: Config, world: World, product_dtype: torch.dtype = torch.float32):
        self.cfg, self.world, self.product_dtype = cfg, world, product_dtype
        self.lrs = self.learning_rates(cfg)
        self.parameters = dict(model.named_parameters())
        self.groups: dict[str, list[Piece]] = {group: [] for group in self.lrs}
        # sorted by shape, so that the pieces of one shape are spread evenly over the processes
        for name, parameter in sorted(self.parameters.items(), key=lambda item: tuple(item[1].shape)):
            group = self.group_of("head" if parameter is model.head else name, parameter)
            pieces = self._cut(name, parameter, group, first=len(self.groups[group]))
            self.groups[group] += pieces
            if world.size > 1:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._send_gradient, pieces))
        self.pieces = [piece for group in self.groups.values() for piece in group]
        places = {name: place for place, name in enumerate(self.parameters)}
        self.own_places = torch.tensor([places[piece.name] for piece in self._own(self.pieces)],
                                       dtype=torch.int64, device=world.device)
        self.steps_done = 0
        self.last_backward = False      # of a step: each gradient is sent to its owners once it is complete

    def remarks(self) -> list[str]:
        """The learning rate and the parameters of each group, for the log."""
        lines = []
        for group, pieces in self.groups.items():
            names = dict.fromkeys(piece.name.split(".", 2)[-1] if piece.name.startswith("layers.")
                                  else piece.name.split(".")[0] for piece in pieces)
            lines.append(f"{group} {self.lrs[group]:.3g} ({', '.join(names)})")
        return [f"rates       {'; '.join(lines)}"]

    def _cut(self, name: str, parameter: nn.Parameter, group: str, first: int) -> list[Piece]:
        """The pieces of a parameter, numbered from `first` on within the group."""
        size, cuts, whole = self.world.size, [], self.rules[group] == "muon"
        if whole and parameter.ndim > 2:
            cuts = range(len(parameter) + 1)
        elif not whole and parameter.ndim > 1:
            cuts = sorted({len(parameter) * rank // size for rank in range(size + 1)})
        rows = [slice(start, stop) for start, stop in itertools.pairwise(cuts)] or [...]
        pieces = [Piece(name, parameter, part, number % size, {}) for number, part in enumerate(rows, first)]
        for piece in self._own(pieces):
            piece.state = {kind: torch.zeros_like(piece.weights) for kind in self.state_of(group)}
        return pieces

    @classmethod
    def state_of(cls, group: str) -> tuple[str, ...]:
        return cls.state_names[cls.rules[group]]

    def _own(self, pieces: list[Piece]) -> list[Piece]:
        return [piece for piece in pieces if piece.owner == self.world.rank]

    def _send_gradient(self, pieces: list[Piece], _parameter: nn.Parameter) -> None:
        for piece in pieces if self.last_backward else ():
            self.world.begin_sum(piece.grad, piece.owner)

    def sum_gradients(self) -> Tensor:
        """Wait until all gradients are summed on their owners; returns their norms, (P).

        raises  UserError that names a parameter without gradient, before any process waits for another
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                raise SharedError(f"parameter {name} has no gradient: the loss does not depend on it")
        self.world.wait()
        squares = torch.zeros(len(self.parameters), device=self.world.device)               # (P)
        grads = [piece.grad for piece in self._own(self.pieces)]
        if grads:
            squares.index_add_(0, self.own_places, torch.stack(torch._foreach_norm(grads)).square())
        return self.world.sum(squares).sqrt()                                               # (P)

    def divide_gradients(self, divisor: float | Tensor) -> None:
        for piece in self._own(self.pieces):
            piece.grad.div_(divisor)

    def clear_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update every parameter from its gradient, with all rates times `scale`; clear the gradients."""
        self.steps_done += 1
        for group, pieces in self.groups.items():
            update, own = getattr(self, f"{self.rules[group]}_step"), self._own(pieces)
            if own:
                update(own, self.lrs[group] * scale)
            for piece in pieces:    # copied while the next group is updated
                self.world.begin_copy(piece.weights, piece.owner)
        self.world.wait()
        self.clear_gradients()

    def adam_step(self, pieces: list[Piece], lr: float) -> None:
        means, squares = ([piece.state[kind] for piece in pieces] for kind in ("mean", "square"))
        adam_update([piece.weights for piece in pieces], [piece.grad for piece in pieces], means, squares, lr,
                    *self.betas, self.steps_done, self.eps)

    def muon_step(self, pieces: list[Piece], lr: float) -> None:
        """Muon with Nesterov momentum; matrices of one shape, some of them transposed, make one batch."""
        # a faster climb than over 300 steps lost (experiments/RECIPE.md)
        momentum = 0.85 + 0.1 * min(1, (self.steps_done - 1) / 300)
        grads, averages = [piece.grad for piece in pieces], [piece.state["momentum"] for piece in pieces]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor, float]]] = {}
        for piece, nesterov in zip(pieces, torch._foreach_lerp(grads, averages, momentum), strict=True):
            rows, columns = nesterov.shape[-2:]
            factor = math.sqrt(max(1, rows / columns))
            for weights, update in zip(piece.weights.view(-1, rows, columns),
                                       nesterov.view(-1, rows, columns), strict=True):
                wide = (update, weights) if rows <= columns else (update.mT, weights.mT)
                by_shape.setdefault(wide[0].shape, []).append((*wide, factor))
        for matrices in by_shape.values():
            updates = newton_schulz(torch.stack([update for update, _, _ in matrices]),
                                    dtype=self.product_dtype)
            for (_, weights, factor), update in zip(matrices, updates, strict=True):
                weights.sub_(update, alpha=lr * factor)

    def state(self) -> dict:
        """The state as a single process would have it; tensors are complete only on the first process."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for group, pieces in self.groups.items():
            for piece, kind in itertools.product(pieces, self.state_of(group)):
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
        """Restore what `state` returned; the first process passes it, the others pass None."""
        self.steps_done = self.world.same(state and state["steps_done"])
        for group, pieces in self.groups.items():
            for piece, kind in itertools.product(pieces, self.state_of(group)):
                part = torch.empty_like(piece.weights)
                if self.world.is_main:
                    part.copy_(state["tensors"][piece.name][kind][piece.rows])
                self.world.begin_copy(part, 0)
                self.world.wait()
                if piece.state:
                    piece.state[kind] = part


# ------------------------------------------------------------------------------------------------
# Training loop: one iteration is one step. Between steps the bench validates, saves, logs and counts the
# budget; val_loss is plain cross-entropy, computed by the bench, whatever the loss above.
# ------------------------------------------------------------------------------------------------

def train(run: Run) -> None:
    """Train until the budget is used up or --target_loss is reached."""
    cfg, model, optimizer = run.cfg, run.model, run.optimizer
    for batch in run.batches():
        # the loss of a step is the mean over all its targets, on all processes
        loss = torch.zeros((), device=run.world.device)                                     # ()
        for number, (inputs, targets) in enumerate(batch.micro_batches, start=1):
            optimizer.last_backward = number == len(batch.micro_batches)
            part = model(inputs, targets) / batch.num_targets                               # ()
            run.backward(part)
            loss += part.detach()
        # gradients are complete once all processes have added theirs
        norms = optimizer.sum_gradients()                                                   # (P)
        scale = optimizer.lr_scale(cfg, run.step, run.progress)
        # the bench logs the step, and ends the run if the loss or a gradient is not finite; if only float16
        # overflowed, it does not accept the step, and the update is skipped
        if run.accepts_step(loss, norms, scale):
            if cfg.grad_clip:
                optimizer.divide_gradients((torch.linalg.vector_norm(norms) / cfg.grad_clip).clamp(min=1))
            optimizer.step(scale)


EXPERIMENT = Experiment(Config, GPT, Optimizer, train)
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
