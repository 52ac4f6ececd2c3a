"""GPT-2 as nanoGPT trains it, on the loop and the data of train_gpt.py: a well-known yardstick.

    python train_nanogpt.py --preset demo
    python seeds.py 3 --name nanogpt -- python train_nanogpt.py --preset demo
    python convert.py to_transformers experiments/RUN

It holds only what differs: learned positions, LayerNorm with bias, GELU, a head that is the embedding, AdamW
with weight decay on what has two dimensions, clipped gradients, a warm-up and a cosine. All else, from the
batches to the tables, is what every script here has, so a difference between runs is one of these.

Where it is not nanoGPT to the letter: documents in a row do not see each other, and positions count from a
document's beginning, since rows are packed (and so a benchmark's rows score as they would alone); GELU is by
tanh, as GPT-2 itself has it; activations are bfloat16 throughout, where nanoGPT adds layers up in float32;
biases are on, as in GPT-2; the warm-up is a share of the run (nanoGPT: 2,000 of 600,000 steps), and the rate
follows the width.

Shapes:  B batch   T tokens in a row   D model width   H heads   K width of one head   V vocabulary
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

import train_gpt
from train_gpt import DenseMask, LayerPast, Past, Stage, attend


@dataclass(frozen=True)
class Config(train_gpt.Config):
    script: ClassVar[Path] = Path(__file__)
    # EDIT: config
    # the run
    model_name: str = "nanogpt"       # last part of the run folder's name
    # the optimizer
    learning_rate: float = 6e-4       # for width 768; others have it by the root of the width
    weight_decay: float = 0.1         # of what has two dimensions, times the learning rate
    warmup_frac: float = 0.02         # first part of training, in which the learning rate climbs from 0
    final_lr_frac: float = 0.1        # share of its height that the cosine ends at
    grad_clip: float = 1.0            # gradients that are longer, all together, are cut to it; 0: none are
    # knobs of train_gpt.py's model and optimizer, at what leaves them out of this one
    head_width: ClassVar[int] = 64
    value_embeddings: ClassVar[int] = 0
    attention_cap: ClassVar[float] = 1
    logit_cap: ClassVar[float] = 0
    long_window: ClassVar[int] = 0
    short_window: ClassVar[int] = 2**31
    window_warmup_frac: ClassVar[float] = 0
    depth_warmup_frac: ClassVar[float] = 0
    sampled_softmax_frac: ClassVar[float] = 0
    softmax_sample: ClassVar[int] = 0
    muon_lr: ClassVar[float] = 0
    embed_lr: ClassVar[float] = 0
    head_lr: ClassVar[float] = 0
    scalar_lr: ClassVar[float] = 0
    warmup_steps: ClassVar[int] = 0
    cooldown_frac: ClassVar[float] = 0

    def __post_init__(self) -> None:
        self.require("warmup_frac", self.warmup_frac < 1, "less than 1")
        super().__post_init__()

    @classmethod
    def preset_knobs(cls, preset: str) -> dict:
        """The size, data and budget of a preset of train_gpt.py; the number of heads is by rule."""
        knobs = super().preset_knobs(preset)
        knobs.pop("num_heads", None)
        return knobs | ({"model_name": f"{cls.model_name}-{preset}"} if preset else {})

    def new_model(self, eot_id: int, dtype: torch.dtype, flex: dict | None = None) -> "GPT2":
        return GPT2(self, eot_id, dtype, flex)

    @property
    def optimizer_class(self) -> type["AdamW"]:
        return AdamW


class Layer(nn.Module):
    """One transformer layer: attention, then an MLP, each on layer-normed input and added to the stream."""

    def __init__(self, cfg: Config, flex: dict | None = None):
        super().__init__()
        width, hidden = cfg.model_dim, cfg.mlp_ratio * cfg.model_dim
        self.num_heads, self.head_dim, self.flex = cfg.num_heads, cfg.head_dim, flex
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for linear in (self.out, self.down):    # what is added to the stream, 2 L times
            linear.weight.data /= math.sqrt(2 * cfg.num_layers)

    def forward(self, x: Tensor, mask: DenseMask | BlockMask, past: LayerPast | None = None) -> Tensor:
        # EDIT: layer
        x = x + self.attention(normed(x, self.attention_norm), mask, past)                  # (B, T, D)
        hidden = F.gelu(affine(normed(x, self.mlp_norm), self.up), approximate="tanh")      # (B, T, F)
        return x + affine(hidden, self.down)                                                # (B, T, D)

    def attention(self, x: Tensor, mask: DenseMask | BlockMask, past: LayerPast | None) -> Tensor:
        B, T, D = x.shape
        qkv = affine(x, self.qkv).view(B, T, 3 * self.num_heads, self.head_dim)             # (B, T, 3H, K)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)                                       # (B, H, T, K)
        if past is not None:
            k, v = past.extended(k, v)      # (B, H, more than T, K)
        y = attend(q, k, v, mask, self.head_dim**-0.5, self.flex)                           # (B, H, T, K)
        return affine(y.transpose(1, 2).reshape(B, T, D), self.out)                         # (B, T, D)


def affine(x: Tensor, linear: nn.Linear) -> Tensor:
    """Weights are float32; products are made in the dtype of the activations."""
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


class GPT2(train_gpt.Model):
    """Token and position embedding -> layers -> LayerNorm -> the token embedding as head."""

    def __init__(self, cfg: Config, eot_id: int, dtype: torch.dtype = torch.float32,
                 flex: dict | None = None):
        super().__init__(cfg, eot_id, dtype, flex)
        self.embed = nn.Parameter(0.02 * torch.randn(cfg.padded_vocab_size, cfg.model_dim))
        self.positions = nn.Parameter(0.02 * torch.randn(cfg.seq_len, cfg.model_dim))
        self.layers = nn.ModuleList(Layer(cfg, flex) for _ in range(cfg.num_layers))
        self.norm = nn.LayerNorm(cfg.model_dim)

    @property
    def head(self) -> nn.Parameter:
        return self.embed

    def hidden(self, inputs: Tensor, stage: Stage | None = None, past: Past | None = None) -> Tensor:
        wanted = inputs.size(1)
        text = past.extended(inputs) if past else inputs
        if text.size(1) > self.cfg.seq_len:
            if not past:
                raise ValueError(f"this model has {self.cfg.seq_len} positions; the text has {text.size(1)}")
            # nothing is learned for later positions: what is nearest is read anew from the first one on
            inputs = text = text[:, -self.cfg.seq_len:]                                     # (B, T)
            past = None
        start = text.size(1) - inputs.size(1)
        place = torch.arange(text.size(1), device=text.device)                              # (T)
        begin = torch.where(text == self.eot_id, place, 0).cummax(1).values                 # (B, T)
        positions = F.embedding((place - begin)[:, start:], self.positions)                 # (B, T, D)
        x = (F.embedding(inputs, self.embed) + positions).to(self.dtype)                    # (B, T, D)
        masks = self.masks(text, 1.0)
        for number, layer in enumerate(self.layers):
            x = layer(x, masks[number], past.layers[number] if past else None)              # (B, T, D)
        return normed(x, self.norm)[:, -wanted:]                                            # (B, T, D)


class AdamW(train_gpt.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): Adam, and a decay that is not in its gradients.

    Parameters of the group `decayed` have it, those of `kept` have not.
    """

    betas, eps = (0.9, 0.95), 1e-8
    kinds = dict.fromkeys(("decayed", "kept"), ("mean", "square"))

    @staticmethod
    def group_of(name: str, parameter: Tensor) -> str:
        # EDIT: optimizer
        return "decayed" if parameter.ndim > 1 else "kept"

    @staticmethod
    def learning_rates(cfg: Config) -> dict[str, float]:
        """The published rate of 124M parameters, for others by the root of the width; a sweep on the demo is
        in benchmarks/README.md."""
        rate = cfg.learning_rate * math.sqrt(768 / cfg.model_dim)
        return {"decayed": rate, "kept": rate}

    @staticmethod
    def lr_scale(cfg: Config, step: int, progress: float) -> float:
        # EDIT: schedule
        if progress < cfg.warmup_frac:
            return min(1.0, (progress + 1 / cfg.num_steps) / cfg.warmup_frac)
        cosine = 0.5 + 0.5 * math.cos(math.pi * (progress - cfg.warmup_frac) / (1 - cfg.warmup_frac))
        return cfg.final_lr_frac + (1 - cfg.final_lr_frac) * cosine

    def adam_step(self, pieces: list[train_gpt.Piece], lr: float) -> None:
        for piece in pieces:
            if self.group_of(piece.name, piece.parameter) == "decayed":
                piece.weights.mul_(1 - lr * self.cfg.weight_decay)
        super().adam_step(pieces, lr)


def transformers_names(cfg: Config) -> dict[str, tuple[str, bool]]:
    """Our names of parameters -> those in transformers, and whether it keeps the matrix transposed."""
    modules = {"norm": "transformer.ln_f"}
    parts = {"attention_norm": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "mlp_norm": "ln_2",
             "up": "mlp.c_fc", "down": "mlp.c_proj"}
    modules |= {f"layers.{layer}.{ours}": f"transformer.h.{layer}.{theirs}"
                for layer in range(cfg.num_layers) for ours, theirs in parts.items()}
    names = {"embed": ("transformer.wte.weight", False), "positions": ("transformer.wpe.weight", False)}
    return names | {f"{ours}.{kind}": (f"{theirs}.{kind}", kind == "weight" and "norm" not in ours)
                    for ours, theirs in modules.items() for kind in ("weight", "bias")}


def transformers_config(cfg: Config) -> dict:
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": cfg.vocab_size,
            "n_positions": cfg.seq_len, "n_embd": cfg.model_dim, "n_layer": cfg.num_layers,
            "n_head": cfg.num_heads, "n_inner": cfg.mlp_ratio * cfg.model_dim,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def knobs_of_transformers(theirs: dict) -> dict:
    """The knobs that make the model that a config.json of transformers describes."""
    width = theirs["n_embd"]
    return {"vocab_size": theirs["vocab_size"], "seq_len": theirs["n_positions"], "model_dim": width,
            "num_layers": theirs["n_layer"], "num_heads": theirs["n_head"],
            "mlp_ratio": (theirs.get("n_inner") or 4 * width) // width}


score_saved = partial(train_gpt.score_saved, config=Config)
continue_prompts = partial(train_gpt.continue_prompts, config=Config)

if __name__ == "__main__":
    train_gpt.main(Config)
