"""Train a GPT. This file is the experiment: copy it, change a few lines, run it.

    python train_gpt.py --preset demo                              one process: a CPU, or the first GPU
    torchrun --nproc_per_node=8 train_gpt.py --preset gpt2-small   one process per GPU; the same training
    python train_gpt.py --check --preset xs                        what that run would do, and whether it can
    python train_gpt.py --smoke                                    ten seconds: is this changed script sound?
    python train_gpt.py --sample experiments/RUN --prompt "It"     continue a prompt with a trained model
    python train_gpt.py --help                                     every knob with its help

It reads token shards (download_fineweb.py makes them) and a tokenizer (train_tokenizer.py makes it), and
leaves a folder experiments/DATE_TIME_NAME with all that made the result. What no experiment changes is the
bench, in benchtop/: data order, evaluation, machine, checkpoints, the run folder.

From top to bottom: Config, Masks, Model, Loss, Optimizer, Training loop, main.
Where experiments usually edit, search for "EDIT": config | mask | layer | loss | optimizer | schedule.

Shapes:  B batch   T tokens in a row   D model width   H heads   K width of one head   F MLP hidden
         V vocabulary   L layers   N tokens in a chunk   Q queries at once   J blocks of a row
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchtop.errors import UserError, first_line
from benchtop.initial import normal, uniform, zeros
from benchtop.knobs import RunConfig
from benchtop.machine import World
from benchtop.memory import chunk_rows
from benchtop.run import Experiment, Run

# ------------------------------------------------------------------------------------------------
# Config: the knobs of this experiment. The field is the flag, its comment is the help. The knobs of the run,
# the data and the machine are the bench's (benchtop/knobs.py); --help shows both.
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class CommonConfig(RunConfig):
    """What every transformer on this loop has; train_nanogpt.py and train_llama3.py have it, too."""
    head_width: ClassVar[int] = 128     # of attention heads, about, where num_heads is 0
    # the budget
    train_tokens: int = 0             # tokens to train on; 0: by steps or minutes, or 4 million, or 4 epochs
    num_steps: int = 0                # optimizer steps; 0: as many as train_tokens take
    train_minutes: float = 0          # end the schedule after so much training if that comes first; 0: never
    target_loss: float = 0            # end training when val_loss is this low; 0: no target
    batch_tokens: int = 0             # tokens per step, over all processes; 0: by a rule from train_tokens
    seq_len: int = 512                # tokens in a row
    max_doc_len: int = 0              # longer documents are cut into parts of this many tokens; 0: of a row
    # the size
    num_layers: int = 6               # transformer layers
    num_heads: int = 0                # attention heads; 0: one for about every 128 of the width
    model_dim: int = 256              # width of the model

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "train_tokens", "num_steps", "train_minutes", "target_loss", "batch_tokens",
                              "max_doc_len", "num_heads")
        self.require_at_least(1, "num_layers", "model_dim")
        self.require_at_least(2, "seq_len")
        self.require("max_doc_len", self.max_doc_len != 1, "at least 2, or 0")
        self.fill(max_doc_len=self.seq_len + 1)     # a row's tokens, and the last one's target
        self.require("batch_tokens", self.batch_tokens % self.seq_len == 0,
                     f"a multiple of --seq_len, {self.seq_len}")
        self.require("micro_batch_tokens", not 0 < self.micro_batch_tokens < self.seq_len,
                     f"at least --seq_len, {self.seq_len}, or 0")
        if self.num_heads:
            self.require("num_heads", self.model_dim % (4 * self.num_heads) == 0,
                         f"such that --model_dim, {self.model_dim}, is a multiple of 4 x --num_heads")
        self.fill(num_heads=self.heads_by_rule())

    def heads_by_rule(self) -> int:
        """As many heads as make them about head_width wide, and even enough to rotate by pairs."""
        fitting = (heads for heads in range(max(1, round(self.model_dim / self.head_width)), 0, -1)
                   if self.model_dim % (4 * heads) == 0)
        heads = next(fitting, 0)
        self.require("model_dim", heads > 0, "a multiple of 4")
        return heads

    def with_budget(self, epoch_tokens: int) -> "CommonConfig":
        """The Config with its one budget: steps, tokens in them, and all tokens.

        epoch_tokens  how many the data hold
        batch         the power of two nearest to 8,192 (D / 1 million)^0.59 for D tokens: what was best of
                      2,048 to 16,384 on a CPU (experiments/RECIPE.md), and, for 700 million, the 524,288 of
                      record 21 of Modded-NanoGPT
        """
        tokens = self.train_tokens or max(1, min(4_000_000, 4 * epoch_tokens))
        by_rule = 2 ** round(math.log2(8192 * (tokens / 1e6) ** 0.59))
        batch = self.batch_tokens or self.seq_len * max(1, round(by_rule / self.seq_len))
        asked_for = self.train_tokens or self.num_steps
        steps = self.num_steps or (math.ceil(tokens / batch) if asked_for else max(1, tokens // batch))
        if self.train_minutes and not asked_for:
            steps = 0       # the clock alone decides
        return replace(self, batch_tokens=batch, num_steps=steps, train_tokens=steps * batch)

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
    mlp_ratio: int = 4                # hidden width of an MLP, in model widths
    value_embeddings: int = 2         # tables of token values, each for one layer from either end
    attention_cap: float = 15         # attention logit of a query and a key that are equal
    logit_cap: float = 15             # logits are squeezed smoothly into plus or minus this; 0: no cap
    long_window: int = 0              # tokens every fourth layer and the last look back; 0: the whole row
    short_window: int = 0             # tokens the other layers look back; 0: half a row, and at least 512
    window_warmup_frac: float = 0     # fraction of training in which windows grow from 128 tokens; 0: none
    fp8: bool = False                 # the head's products in FP8; GPUs of capability 8.9 or more
    # the optimizer; learning rates are for 524,288 tokens a step and width 768, rules scale them
    muon_lr: float = 0.05             # learning rate of the matrices in layers
    embed_lr: float = 0.6             # learning rate of the token embedding and the value embeddings
    head_lr: float = 0.008            # learning rate of the output head
    scalar_lr: float = 0.04           # learning rate of the mixing scalars
    warmup_steps: int = 0             # steps in which the learning rate climbs from 0
    cooldown_frac: float = 0.6        # last fraction of training, in which the learning rate falls
    final_lr_frac: float = 0.1        # learning rate at the end, as a fraction of its peak
    grad_clip: float = 0              # clip the norm of all gradients together to this; 0: no clipping

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "value_embeddings", "logit_cap", "long_window", "short_window", "muon_lr",
                              "embed_lr", "head_lr", "scalar_lr", "warmup_steps", "grad_clip")
        self.require_at_least(1, "mlp_ratio")
        self.require_fraction("window_warmup_frac", "cooldown_frac", "final_lr_frac")
        self.require("attention_cap", self.attention_cap > 0, "more than 0")
        # logits span twice the cap, and exp(-80) is still a float32
        self.require("logit_cap", self.logit_cap <= 40, "at most 40")
        # one layer in four reads the whole row, the others half of it
        self.fill(short_window=min(self.long_window or self.seq_len, max(512, self.seq_len // 2)))
        if self.fp8:
            for knob in ("seq_len", "model_dim"):
                self.require(knob, getattr(self, knob) % 16 == 0, "a multiple of 16 for --fp8")

    @property
    def num_value_tables(self) -> int:
        """A table serves two layers, so there are no more than half as many."""
        return min(self.value_embeddings, self.num_layers // 2)

    def require_machine(self, device: torch.device, dtype: torch.dtype) -> None:
        problem = self.fp8 and fp8_problem(device, dtype)
        if problem:
            raise UserError(f"--fp8 {problem}; leave it out")


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


PRESETS = {
    # four minutes on two CPU cores; with AMX the steps end before the clock does
    "demo": dict(model_name="demo", num_layers=2, num_steps=700, batch_tokens=8192, train_minutes=4,
                 log_every=5, save_model=True),
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
# Masks: which token sees which, and attention over that; knows tensors only.
# ------------------------------------------------------------------------------------------------

def sees(query: Tensor, key: Tensor, query_doc: Tensor, key_doc: Tensor, window: Tensor) -> Tensor:
    """Whether the token at place `query` sees the one at place `key`: the one mask of every kernel."""
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
    # places past the end belong to the last document; nobody reads what they see
    padded = F.pad(docs[:, None], (0, -length % BLOCK), mode="replicate")[:, 0]             # (B, 128J)
    first, last = padded[:, ::BLOCK], padded[:, BLOCK - 1::BLOCK]                           # (B, J)
    place = torch.arange(first.size(1), dtype=docs.dtype, device=docs.device)               # (J)
    apart = BLOCK * (place[:, None] - place)    # of the first query and the first key      # (J, J)
    seen = (apart >= 0) & (apart - (BLOCK - 1) < window) & (last[:, None] >= first[..., None])  # (B, J, J)
    whole = (apart > 0) & (apart + BLOCK - 1 < window)                                      # (J, J)
    whole = whole & (first[:, None] == last[..., None])                                     # (B, J, J)
    return BlockMask.from_kv_blocks(*kv_block_lists(seen & ~whole), *kv_block_lists(whole), BLOCK, mask_mod,
                                    (length, length))


def kv_block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, J, J) which key blocks each query block reads -> their number (B, 1, J) and order (B, 1, J, J)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)                      # (B, J, J)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


QUERIES_AT_ONCE = 512


class DenseAttention(torch.autograd.Function):
    """Attention in plain products, which compile well on a CPU; also where FlexAttention does not work.

    On two AMX cores, rows of 512 take two thirds of the time of scaled_dot_product_attention, whose backward
    is slow there. The T x T weights are kept in the dtype of the activations, Q queries at a time.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, docs: Tensor, window: Tensor, scale: float) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        place = torch.arange(k.size(2), dtype=docs.dtype, device=docs.device)               # (T)
        all_exps, outputs, totals = [], [], []
        for part in query_blocks(q):
            seen = sees(place[part, None], place, docs[:, part, None], docs[:, None], window)   # (B, Q, T)
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


@dataclass(frozen=True)
class Context:
    """What all layers receive alike. Tokens of a row learn of each other only through `attend` and
    `previous`, which keep documents apart.

    mask            of a window that several layers share
    begins          (B, T) bool: a document begins here
    cos, sin        (T, K/2) float32, of the angles by which each pair of dimensions rotates at each place
    still           (K) bool: dimensions that do not rotate
    kernel_options  of FlexAttention
    """
    mask: DenseMask | BlockMask
    begins: Tensor
    cos: Tensor
    sin: Tensor
    still: Tensor
    kernel_options: dict | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Softmax attention over what the mask shows; all tensors (B, H, T, K)."""
        return attend(q, k, v, self.mask, scale, self.kernel_options)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding (arXiv:2104.09864); x (B, H, T, K), pairs are (i, i + K/2)."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)                               # (T, K/2)
        first, second = x.chunk(2, dim=-1)                                                  # (B, H, T, K/2)
        return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)  # (B, H, T, K)

    def previous(self, x: Tensor) -> Tensor:
        """What stands at the token before, zeros where a document begins; x (B, T, D) or (B, H, T, K)."""
        begins = self.begins[..., None] if x.ndim == 3 else self.begins[:, None, :, None]
        return F.pad(x, (0, 0, 1, 0))[..., :-1, :].masked_fill(begins, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: DenseMask | BlockMask, scale: float,
           kernel_options: dict | None = None) -> Tensor:
    """Softmax attention by the kernel that the mask is for; q, k, v and the result (B, H, T, K)."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=kernel_options)
    return DenseAttention.apply(q, k, v, mask.docs, mask.window, scale)


# ------------------------------------------------------------------------------------------------
# Model: knows tensors and Config; no ranks, no files.
# ------------------------------------------------------------------------------------------------

def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Weights are float32; products are made in the dtype of the activations."""
    return F.linear(x, weight.to(x.dtype))


class Layer(nn.Module):
    """One transformer layer: attention, then an MLP, each on normed input and added to the stream."""

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
        stream, embedding = self.stream_mix.to(x.dtype)
        x = stream * x + embedding * x0                                                     # (B, T, D)
        x = x + self.attention(rms_norm(x), value_embedding, ctx)                           # (B, T, D)
        hidden = F.relu(linear(rms_norm(x), self.up)).square()                              # (B, T, F)
        return x + linear(hidden, self.down)                                                # (B, T, D)

    def attention(self, x: Tensor, value_embedding: Tensor | None, ctx: Context) -> Tensor:
        B, T, D = x.shape
        qkv = linear(x, self.qkv.flatten(0, 1))                                             # (B, T, 3D)
        qkv = qkv.view(B, T, 3 * self.num_heads, self.head_dim)                             # (B, T, 3H, K)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)                                       # (B, H, T, K)
        # queries and keys of root mean square 1 bound the attention logits (QK-norm, arXiv:2010.04245)
        q, k = ctx.rotate(rms_norm(q)), ctx.rotate(rms_norm(k))                             # (B, H, T, K)
        # dimensions that do not rotate carry the key of the token before, so a query finds what followed its
        # like within one layer (record 49 of Modded-NanoGPT)
        k = torch.where(ctx.still, ctx.previous(k), k)                                      # (B, H, T, K)
        own, table = self.value_mix.to(x.dtype)
        v = own * v                                                                         # (B, H, T, K)
        if value_embedding is not None:
            value_embedding = value_embedding.view(B, T, self.num_heads, self.head_dim)     # (B, T, H, K)
            v = v + table * value_embedding.transpose(1, 2).to(v.dtype)                     # (B, H, T, K)
        y = ctx.attend(q, k, v, self.attention_scale)                                       # (B, H, T, K)
        y = y.transpose(1, 2)                                                               # (B, T, H, K)
        y = y.reshape(B, T, D)                                                              # (B, T, D)
        return linear(y, self.out)                                                          # (B, T, D)


class Model(nn.Module):
    """What the bench and the loop ask of a model; GPT below and those of the yardsticks fill in `hidden`.

    A model has `layers` and a `head` (V, D).
    eot_id    id of the token that begins every document
    dtype     of the activations and of the products
    flex      attend by FlexAttention with these kernel options; None: by DenseAttention
    longest   tokens that can be read at once; None: any number
    progress  share of the budget that is used, 0 to 1; the bench sets it, and outside training it is 1
    """

    longest = None

    def __init__(self, cfg: CommonConfig, eot_id: int, dtype: torch.dtype = torch.float32,
                 flex: dict | None = None):
        super().__init__()
        self.cfg, self.eot_id, self.dtype, self.flex, self.progress = cfg, eot_id, dtype, flex, 1.0
        self.logit_cap, self.fp8 = getattr(cfg, "logit_cap", 0.0), getattr(cfg, "fp8", False)
        self.loss_kernel = loss_kernel(self.logit_cap)
        self.loss_is_edited = self.loss_kernel is losses_and_slope
        is_token = torch.arange(cfg.padded_vocab_size) < cfg.vocab_size
        self.register_buffer("padding", torch.where(is_token, 0.0, -math.inf), persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses of all targets, in nats.

        inputs   (B, T) token ids
        targets  (B, T) token ids; -1 where there is nothing to predict
        returns  () float32
        """
        x = self.hidden(inputs).flatten(0, 1)                                               # (BT, D)
        return ChunkedLoss.apply(x, self.head, targets.flatten(), self.padding, self.logit_cap,
                                 self.loss_kernel, self.fp8)

    def hidden(self, inputs: Tensor) -> Tensor:
        """What the head reads: (B, T) token ids -> (B, T, D)."""
        raise NotImplementedError(f"{type(self).__name__} has no hidden states")

    def logits(self, x: Tensor) -> Tensor:
        """What the head makes of hidden states, as training sees it: (N, D) -> (N, V) float32."""
        return soft_cap(linear(x, self.head).float(), self.logit_cap) + self.padding       # (N, V)

    def frequencies(self, device: torch.device) -> Tensor:
        """By how much each pair of dimensions rotates from a token to the next, (K/2) float32; 0: it stands
        still."""
        return torch.zeros(self.cfg.head_dim // 2, device=device)

    def windows(self, length: int) -> list[int]:
        """How many tokens each layer looks back in rows of `length` tokens."""
        return [length] * len(self.layers)

    def contexts(self, inputs: Tensor) -> list[Context]:
        """What each layer receives beside its stream; layers with equal windows share one."""
        begins = inputs == self.eot_id                                                      # (B, T)
        docs = begins.cumsum(1, dtype=torch.int32)                                          # (B, T)
        frequency = self.frequencies(inputs.device)                                         # (K/2)
        angle = torch.arange(inputs.size(1), device=inputs.device)[:, None] * frequency     # (T, K/2)
        still = (frequency == 0).repeat(2)                                                  # (K)
        windows, made = self.windows(inputs.size(1)), {}
        for length in set(windows):
            # a tensor, so that kernels compiled for one window serve all
            window = torch.full((), length, dtype=docs.dtype, device=inputs.device)         # ()
            mask = DenseMask(docs, window) if self.flex is None else block_mask(docs, window)
            made[length] = Context(mask, begins, angle.cos(), angle.sin(), still, self.flex)
        return [made[length] for length in windows]

    def compile_parts(self) -> None:
        """Compile what repeats, so that one layer serves all layers and one chunk of the loss all chunks."""
        for layer in self.layers:
            layer.compile(dynamic=False)
        self.loss_kernel = torch.compile(self.loss_kernel, dynamic=False)

    def remarks(self) -> list[str]:
        """What the log should say of this model."""
        return ["loss        edited: its gradient is by autograd, which takes longer than the built-in kernel"
                ] if self.loss_is_edited else []

    def flops_per_token(self) -> float:
        """Floating-point operations of one trained token, forward and backward.

        6 per weight of a matrix, and 12 per model dimension and key that a token attends to on average.
        source  Kaplan et al. 2020, arXiv:2001.08361
        """
        length = self.cfg.seq_len
        matrices = sum(p.numel() for layer in self.layers for p in layer.parameters() if p.ndim > 1)
        keys = sum(window - window**2 / (2 * length) for window in self.windows(length))
        return 6 * (self.head.numel() + matrices) + 12 * self.cfg.model_dim * keys


class GPT(Model):
    """Embedding -> norm -> layers -> norm -> head; logits within plus or minus logit_cap."""

    def __init__(self, cfg: Config, eot_id: int, dtype: torch.dtype = torch.float32,
                 flex: dict | None = None):
        super().__init__(cfg, eot_id, dtype, flex)
        self.embed = normal(cfg.vocab_size, cfg.model_dim)
        self.value_embeds = nn.ParameterList(
            normal(cfg.vocab_size, cfg.model_dim) for _ in range(cfg.num_value_tables))
        self.smear = zeros(cfg.model_dim)       # share of the token before
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))
        self.head = zeros(cfg.padded_vocab_size, cfg.model_dim)
        self.smear_kernel, self.norm_kernel = smeared, rms_norm

    def hidden(self, inputs: Tensor) -> Tensor:
        contexts = self.contexts(inputs)
        x0 = self.smear_kernel(F.embedding(inputs, self.embed), contexts[0], self.smear)    # (B, T, D)
        x0 = x0.to(self.dtype)                                                              # (B, T, D)
        x = x0.view_as(x0)      # another object, or the first layer would be compiled apart # (B, T, D)
        for number, (layer, ctx) in enumerate(zip(self.layers, contexts, strict=True)):
            table = self.value_table(number)
            values = None if table is None else F.embedding(inputs, table)                  # (B, T, D)
            x = layer(x, x0, values, ctx)                                                   # (B, T, D)
        return self.norm_kernel(x)                                                          # (B, T, D)

    def value_table(self, layer: int) -> Tensor | None:
        """Table i of n serves the i-th of the first n layers and the i-th of the last n."""
        n, behind = len(self.value_embeds), layer - (len(self.layers) - len(self.value_embeds))
        place = layer if layer < n else behind
        return self.value_embeds[place] if 0 <= place < n else None

    def frequencies(self, device: torch.device) -> Tensor:
        """Half of the pairs rotate, from 1 down to 1/1024 radians per token; the others carry content."""
        rotating = 1024.0 ** -torch.linspace(0, 1, self.cfg.head_dim // 4, device=device)   # (K/4)
        return torch.cat([rotating, torch.zeros_like(rotating)])                            # (K/2)

    def windows(self, length: int) -> list[int]:
        """Every fourth layer and the last have the long window, the others the short one; none looks further
        back than in training."""
        cfg, windows = self.cfg, []
        grown = min(1.0, self.progress / cfg.window_warmup_frac) if cfg.window_warmup_frac else 1.0
        for number in range(1, len(self.layers) + 1):
            is_long = number % 4 == 0 or number == len(self.layers)
            full = min((cfg.long_window if is_long else cfg.short_window) or cfg.seq_len, cfg.seq_len, length)
            windows.append(min(full, max(128, round(grown * full))))
        return windows

    def compile_parts(self) -> None:
        """Also the small operations before and behind the layers."""
        super().compile_parts()
        self.smear_kernel = torch.compile(smeared, dynamic=False)
        self.norm_kernel = torch.compile(rms_norm, dynamic=False)


def smeared(x: Tensor, ctx: Context, share: Tensor) -> Tensor:
    """Embeddings (B, T, D), each with a share (D) of the one before it in its document; normed."""
    return rms_norm(x + share * ctx.previous(x))                                            # (B, T, D)


# ------------------------------------------------------------------------------------------------
# Loss: cross-entropy of the head, chunk by chunk, its products in FP8 if asked for.
# ------------------------------------------------------------------------------------------------

def soft_cap(z: Tensor, cap: float) -> Tensor:
    """Squeeze logits smoothly into plus or minus cap: z / sqrt(1 + (z / cap)^2); a cap of 0 leaves them."""
    return z * torch.rsqrt(1 + (z / cap).square()) if cap else z


def token_losses(z: Tensor, targets: Tensor) -> Tensor:
    """The loss of each token (N) from capped logits (N, V) float32 and targets (N); 0 where that is -1."""
    # EDIT: loss
    return F.cross_entropy(z, targets, ignore_index=-1, reduction="none")                   # (N)


def losses_and_slope(logits: Tensor, targets: Tensor, padding: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """token_losses of a chunk, and their gradient at uncapped logits, by autograd.

    logits   (N, V) uncapped
    targets  (N) columns; -1 where there is nothing to predict
    padding  (V) float32: 0, or minus infinity where a column is no token
    returns  (N) float32 and (N, V) in the dtype of the logits
    """
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()                                           # (N, V)
        losses = token_losses(soft_cap(logits.float(), cap) + padding, targets)             # (N)
        slope, = torch.autograd.grad(losses.sum(), logits)                                  # (N, V)
    return losses.detach(), slope


def fast_losses_and_slope(logits: Tensor, targets: Tensor, padding: Tensor, cap: float,
                          ) -> tuple[Tensor, Tensor]:
    """The same for plain cross-entropy, in half the time: softmax minus one-hot, times the cap's slope.

    Written by hand, so edit token_losses instead; loss_kernel() takes this one only where both agree.
    """
    z = logits.float()                                                                      # (N, V)
    shrink = torch.rsqrt(1 + (z * (1 / cap)).square()) if cap else torch.ones_like(z)       # (N, V)
    # what bounds z: the cap, which costs no pass over the logits, or the largest of a row
    most = cap or (z + padding).amax(-1, keepdim=True)                                      # (N, 1)
    exps = torch.exp(z * shrink - most + padding)                                           # (N, V)
    counted = (targets >= 0).float()[:, None]                                               # (N, 1)
    place = targets.clamp(min=0)[:, None]                                                   # (N, 1)
    wanted, bend = z.gather(1, place), shrink.gather(1, place)                              # (N, 1)
    exp_there = torch.exp(wanted * bend - most)                                             # (N, 1)
    total = exps.sum(-1, keepdim=True)                                                      # (N, 1)
    slope = exps * (counted / total) * shrink**3                                            # (N, V)
    losses = counted * (most + total.log() - wanted * bend)                                 # (N, 1)
    slope_there = counted * (exp_there / total - 1) * bend**3                               # (N, 1)
    return losses[:, 0], slope.to(logits.dtype).scatter(1, place, slope_there.to(logits.dtype))


def loss_kernel(cap: float) -> Callable:
    """The fast way to the losses and their gradient where it is one to token_losses, or else autograd's.

    raises  UserError if the fast one's gradient is not that of its own losses
    """
    logits = torch.linspace(-9, 9, 4 * 16, device="cpu")[torch.arange(64, device="cpu") * 37 % 64].view(4, 16)
    targets, padding = torch.tensor([3, -1, 0, 15], device="cpu"), torch.zeros(16, device="cpu")
    with torch.enable_grad():
        logits.requires_grad_()
        losses, slope = fast_losses_and_slope(logits, targets, padding, cap)
        own_slope, = torch.autograd.grad(losses.sum(), logits)
    if not torch.allclose(slope, own_slope, atol=1e-5):
        raise UserError("fast_losses_and_slope returns a gradient that is not that of its losses; edit "
                        "token_losses instead, whose gradient follows by autograd")
    plain_losses, plain_slope = losses_and_slope(logits, targets, padding, cap)
    agree = torch.allclose(losses, plain_losses, atol=1e-4) and torch.allclose(slope, plain_slope, atol=1e-5)
    return fast_losses_and_slope if agree else losses_and_slope


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of a linear head, chunk by chunk, with its gradient made on the way forward.

    Only one chunk's logits exist at a time: 256 MiB instead of 6.6 GB for 32,768 tokens and 50,304 columns.
    x (N, D), weight (V, D) float32, targets (N), padding and kernel as losses_and_slope has them
    fp8      products in FP8: logits from e4m3, gradients from e5m2 slopes
    returns  () float32, the summed loss
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, padding: Tensor, cap: float,
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
            losses, slope = kernel(logits, wanted, padding, cap)                            # (N), (N, V)
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


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def fp8_product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """a times b transposed, both as to_fp8 gives them: (N, K), (M, K) -> (N, M) bfloat16.

    N, K and M must be multiples of 16, and one of the two e4m3.
    """
    return torch._scaled_mm(a[0], b[0].T, a[1], b[1], out_dtype=torch.bfloat16)


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in FP8, row by row in memory, and the () float32 unit that it is measured in.

    The unit makes the largest magnitude of x the largest of the dtype. e4m3 has finer steps, e5m2 the wider
    range that gradients need.
    source  Micikevicius et al. 2022, arXiv:2209.05433
    """
    largest = torch.finfo(dtype).max
    unit = x.abs().amax().float().clamp(min=1e-12) / largest                                # ()
    return (x.float() / unit).clamp(-largest, largest).to(dtype).contiguous(), unit


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


# ------------------------------------------------------------------------------------------------
# Optimizer: knows parameters, their names and gradients, and which process owns which piece of them.
# ------------------------------------------------------------------------------------------------

def group_of(name: str, parameter: Tensor) -> str:
    """The one group of a parameter; the log lists them. A tied head is called "head", whatever else it is."""
    # EDIT: optimizer
    if parameter.ndim < 2:
        return "scalars"
    if name == "head":
        return "head"
    return "embeddings" if "embed" in name else "matrices"


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

    def __init__(self, model: Model, cfg: Config, world: World, product_dtype: torch.dtype = torch.float32):
        self.cfg, self.world, self.product_dtype = cfg, world, product_dtype
        self.lrs = self.learning_rates(cfg)
        self.parameters = dict(model.named_parameters())
        self.groups: dict[str, list[Piece]] = {group: [] for group in self.lrs}
        # parameters of one shape follow each other, so that their pieces are dealt to the processes evenly
        for name, parameter in sorted(self.parameters.items(), key=lambda item: tuple(item[1].shape)):
            group = self.group_of("head" if parameter is model.head else name, parameter)
            pieces = self._cut(name, parameter, group, dealt=len(self.groups[group]))
            self.groups[group] += pieces
            if world.size > 1:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._send, pieces))
        self.pieces = [piece for group in self.groups.values() for piece in group]
        self.adam_kernel = adam_update
        self.steps_done = 0
        self.last_backward = False      # then gradients set out for their owners while it still runs

    def remarks(self) -> list[str]:
        """The learning rate of each group, and what is in it."""
        lines = []
        for group, pieces in self.groups.items():
            names = dict.fromkeys(piece.name.split(".", 2)[-1] if piece.name.startswith("layers.")
                                  else piece.name.split(".")[0] for piece in pieces)
            lines.append(f"{group} {self.lrs[group]:.3g} ({', '.join(names)})")
        return [f"rates       {'; '.join(lines)}"]

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
        return [piece for piece in pieces if piece.owner == self.world.rank]

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
            if parameter.grad is None:
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


# ------------------------------------------------------------------------------------------------
# Training loop: one turn is one step. Between steps the bench validates, saves, logs and counts the budget.
# ------------------------------------------------------------------------------------------------

def train(run: Run) -> None:
    """Train until the budget is used up or the target is reached."""
    cfg, model, optimizer = run.cfg, run.model, run.optimizer
    for batch in run.batches():
        # the loss of a step is the mean over all its targets, whichever process computes them
        loss = torch.zeros((), device=run.world.device)
        for number, (inputs, targets) in enumerate(batch.micro_batches, start=1):
            optimizer.last_backward = number == len(batch.micro_batches)
            part = model(inputs, targets) / batch.num_targets
            run.backward(part)
            loss += part.detach()
        norms = optimizer.gradient_norms()                                                  # (P)
        scale = optimizer.lr_scale(cfg, run.step, run.progress)
        # a loss or gradient that is not finite ends the run here; an overflow of float16 only skips the step
        if run.check_step(loss, norms, scale):
            if cfg.grad_clip:
                optimizer.divide_gradients((torch.linalg.vector_norm(norms) / cfg.grad_clip).clamp(min=1))
            optimizer.step(scale)


EXPERIMENT = Experiment(Config, GPT, Optimizer, train)
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
