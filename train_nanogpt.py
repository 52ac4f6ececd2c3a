"""GPT-2 as nanoGPT trains it, on the loop and the data of train_gpt.py: a well-known yardstick.

    python train_nanogpt.py --preset demo
    python trial.py train_nanogpt.py --minutes 4 -- --preset demo                    beside train_gpt.py
    python convert.py to_transformers experiments/RUN

This file has only what differs from train_gpt.py: learned positions, LayerNorm with bias, GELU, a tied head,
AdamW with weight decay on parameters of two or more dimensions, gradient clipping, and a warm-up with cosine
decay. Everything else is shared, so a difference between runs comes from one of these.

It deviates from nanoGPT in a few points. Rows are packed: documents in a row do not see each other, and
positions count from the beginning of a document (so packed benchmark rows score as they would alone). GELU is
the tanh approximation, as in GPT-2. Activations are bfloat16 throughout; nanoGPT keeps the residual stream in
float32. Biases are on, as in GPT-2. The warm-up is a fraction of the run (nanoGPT: 2,000 of 600,000 steps),
and the learning rate depends on the width.

Shapes:  B batch   T tokens in a row   D model width   H heads   K width of one head   V vocabulary
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from benchtop.initial import drawn, normal, normal_law
from benchtop.run import Experiment
from train_gpt import CommonConfig, Context


@dataclass(frozen=True)
class Config(CommonConfig):
    head_width: ClassVar[int] = 64
    # EDIT: config
    # the run
    model_name: str = "nanogpt"       # last part of the run folder's name
    # the model
    mlp_ratio: int = 4                # hidden width of the MLP, as a multiple of model_dim
    # the optimizer
    learning_rate: float = 6e-4       # peak rate at width 768; scaled by 1/sqrt(width) for other widths
    weight_decay: float = 0.1         # weight decay of all but vectors; multiplied by the learning rate
    warmup_frac: float = 0.02         # fraction of training in which the learning rate rises from 0; 0: none
    final_lr_frac: float = 0.1        # learning rate at the end of the cosine, as a fraction of its peak
    grad_clip: float = 1.0            # clip the global gradient norm to this; 0: no clipping

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "learning_rate", "weight_decay", "grad_clip")
        self.require("mlp_ratio", self.mlp_ratio > 0, "more than 0")
        self.require_fraction("final_lr_frac")
        self.require("warmup_frac", 0 <= self.warmup_frac < 1, "0 or more, and less than 1")

    @classmethod
    def preset_knobs(cls, preset: str) -> dict:
        """The size, data and budget of a preset of train_gpt.py; num_heads follows from head_width."""
        knobs = super().preset_knobs(preset)
        knobs.pop("num_heads", None)
        return knobs | ({"model_name": f"{cls.model_name}-{preset}"} if preset else {})


class Layer(nn.Module):
    """One transformer layer: attention, then an MLP, each on layer-normed input, added to the stream."""

    def __init__(self, cfg: Config):
        super().__init__()
        width, hidden = cfg.model_dim, cfg.mlp_ratio * cfg.model_dim
        self.num_heads, self.head_dim = cfg.num_heads, cfg.head_dim
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        deep = 0.02 / math.sqrt(2 * cfg.num_layers)     # of the 2 L matrices that add to the stream
        for linear, std in ((self.qkv, 0.02), (self.up, 0.02), (self.out, deep), (self.down, deep)):
            drawn(linear.weight, normal_law(std))
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        # EDIT: layer
        x = x + self.attention(normed(x, self.attention_norm), ctx)                         # (B, T, D)
        hidden = F.gelu(affine(normed(x, self.mlp_norm), self.up), approximate="tanh")      # (B, T, F)
        return x + affine(hidden, self.down)                                                # (B, T, D)

    def attention(self, x: Tensor, ctx: Context) -> Tensor:
        B, T, D = x.shape
        qkv = affine(x, self.qkv).view(B, T, 3 * self.num_heads, self.head_dim)             # (B, T, 3H, K)
        q, k, v = qkv.chunk(3, dim=2)                                                       # (B, T, H, K)
        y = ctx.attend(q, k, v, self.head_dim**-0.5)                                        # (B, T, H, K)
        return affine(y.reshape(B, T, D), self.out)                                         # (B, T, D)


def affine(x: Tensor, linear: nn.Linear) -> Tensor:
    """A linear layer with float32 weights, computed in the dtype of the activations."""
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


class GPT2(train_gpt.Model):
    """Token and position embedding -> layers -> LayerNorm -> head, which is the token embedding."""

    def __init__(self, cfg: Config, eot_id: int, dtype: torch.dtype = torch.float32,
                 flex: dict | None = None):
        super().__init__(cfg, eot_id, dtype, flex)
        self.embed = normal(cfg.padded_vocab_size, cfg.model_dim, std=0.02)
        self.positions = normal(cfg.seq_len, cfg.model_dim, std=0.02)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))
        self.norm = nn.LayerNorm(cfg.model_dim)
        self.longest = cfg.seq_len      # later positions are not learned

    @property
    def head(self) -> nn.Parameter:
        return self.embed

    def hidden(self, inputs: Tensor) -> Tensor:
        if inputs.size(1) > self.longest:
            raise ValueError(f"this model has {self.longest} positions; the text has {inputs.size(1)}")
        place = torch.arange(inputs.size(1), device=inputs.device)                          # (T)
        begin = torch.where(inputs == self.eot_id, place, 0).cummax(1).values               # (B, T)
        positions = F.embedding(place - begin, self.positions)                              # (B, T, D)
        x = (F.embedding(inputs, self.embed) + positions).to(self.dtype)                    # (B, T, D)
        for layer, ctx in zip(self.layers, self.contexts(inputs), strict=True):
            x = layer(x, ctx)                                                               # (B, T, D)
        return normed(x, self.norm)                                                         # (B, T, D)


class AdamW(train_gpt.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): Adam with decoupled weight decay.

    Weight decay applies to the group `decayed` and not to `kept`.
    """

    betas, eps = (0.9, 0.95), 1e-8
    rules = dict.fromkeys(("decayed", "kept"), "adam")

    @staticmethod
    def group_of(name: str, parameter: Tensor) -> str:
        # EDIT: optimizer
        return "decayed" if parameter.ndim > 1 else "kept"

    @staticmethod
    def learning_rates(cfg: Config) -> dict[str, float]:
        """The published rate of the 124M model, scaled with 1 / sqrt(width); benchmarks/README.md has a sweep
        on the demo."""
        rate = cfg.learning_rate * math.sqrt(768 / cfg.model_dim)
        return {"decayed": rate, "kept": rate}

    @staticmethod
    def lr_scale(cfg: Config, step: int, progress: float) -> float:
        # EDIT: schedule
        if progress < cfg.warmup_frac:
            return min(1.0, (progress + 1 / (cfg.num_steps or 1000)) / cfg.warmup_frac)
        cosine = 0.5 + 0.5 * math.cos(math.pi * (progress - cfg.warmup_frac) / (1 - cfg.warmup_frac))
        return cfg.final_lr_frac + (1 - cfg.final_lr_frac) * cosine

    def adam_step(self, pieces: list[train_gpt.Piece], lr: float) -> None:
        for piece in pieces:
            if self.group_of(piece.name, piece.parameter) == "decayed":
                piece.weights.mul_(1 - lr * self.cfg.weight_decay)
        super().adam_step(pieces, lr)


def transformers_names(cfg: Config) -> dict[str, tuple[str, bool]]:
    """Our parameter name -> the name in transformers, and whether the matrix is transposed there."""
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
    """The knobs of the model that a config.json of transformers describes."""
    width = theirs["n_embd"]
    return {"vocab_size": theirs["vocab_size"], "seq_len": theirs["n_positions"], "model_dim": width,
            "num_layers": theirs["n_layer"], "num_heads": theirs["n_head"],
            "mlp_ratio": (theirs.get("n_inner") or 4 * width) // width}


EXPERIMENT = Experiment(Config, GPT2, AdamW, train_gpt.train)
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
