"""A transformer in the style of Llama 3, on the loop and the data of train_gpt.py: a well-known yardstick.

    python train_llama3.py --preset demo
    python trial.py train_llama3.py --minutes 4 -- --preset demo                     beside train_gpt.py
    python convert.py to_transformers experiments/RUN

This file has only what differs: RMSNorm with weights, rotary positions with base 500,000, SwiGLU, grouped
queries and an untied head. The optimizer and schedule are those of train_nanogpt.py, with Llama's values.

    published (arXiv:2407.21783)                        not published, chosen here
    AdamW, weight decay 0.1, linear warm-up, cosine     betas 0.9 and 0.95, clipping at 1 (as in Llama 2)
    cosine to 1 % (0.8e-6 of 80e-6, 405B)               warm-up of 2 % of the run (in Llama 3 under 1 %)
    learning rate 3e-4 at 8B, width 4,096               6e-4 at width 768, which is 2.6e-4 at 4,096
    base 500,000, 8 key/value heads for 32 query heads  one key/value head for 2 or 3 query heads
    hidden width 3.5 model widths (8B, 70B)             rounded up to a multiple of 64
    documents of a row do not see each other            initial std 0.02, output matrices / sqrt(2 L)

Shapes:  B batch   T tokens in a row   D model width   H query heads   G key/value heads   K width of one head
         F MLP hidden   V vocabulary
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
import train_nanogpt
from benchtop.initial import normal
from benchtop.run import Experiment
from train_gpt import Context, linear


@dataclass(frozen=True)
class Config(train_nanogpt.Config):
    head_width: ClassVar[int] = 128
    # EDIT: config
    # the run
    model_name: str = "llama3"        # last part of the run folder's name
    # the model
    num_kv_heads: int = 0             # key/value heads; 0: about one per four query heads
    mlp_ratio: float = 3.5            # MLP hidden width / model_dim; rounded up to a multiple of 64 units
    # the optimizer
    final_lr_frac: float = 0.01       # learning rate at the end of the cosine, as a fraction of its peak

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "num_kv_heads")
        if not self.num_heads:      # --by_speed sets the size later and then runs this again
            return
        fitting = (number for number in range(max(1, self.num_heads // 4), 0, -1)
                   if self.num_heads % number == 0)
        self.fill(num_kv_heads=next(fitting))
        self.require("num_kv_heads", self.num_heads % self.num_kv_heads == 0,
                     f"a divisor of --num_heads, {self.num_heads}")

    @property
    def hidden_dim(self) -> int:
        return 64 * math.ceil(self.mlp_ratio * self.model_dim / 64)


class Layer(nn.Module):
    """One transformer layer: attention, then a gated MLP, each on normed input, added to the stream."""

    def __init__(self, cfg: Config):
        super().__init__()
        width, hidden, keys = cfg.model_dim, cfg.hidden_dim, cfg.num_kv_heads * cfg.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        deep = 1 / math.sqrt(2 * cfg.num_layers)    # for the 2 L matrices that add to the stream
        self.attention_norm, self.mlp_norm = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.q, self.k, self.v = weights(width, width), weights(keys, width), weights(keys, width)
        self.out = weights(width, width, deep)
        self.gate, self.up, self.down = weights(hidden, width), weights(hidden, width), weights(width, hidden,
                                                                                                 deep)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        # EDIT: layer
        x = x + self.attention(normed(x, self.attention_norm), ctx)                         # (B, T, D)
        inner = normed(x, self.mlp_norm)                                                    # (B, T, D)
        hidden = F.silu(linear(inner, self.gate)) * linear(inner, self.up)                  # (B, T, F)
        return x + linear(hidden, self.down)                                                # (B, T, D)

    def attention(self, x: Tensor, ctx: Context) -> Tensor:
        B, T, D = x.shape
        q = linear(x, self.q).view(B, T, self.num_heads, self.head_dim)                     # (B, T, H, K)
        k = linear(x, self.k).view(B, T, self.num_kv_heads, self.head_dim)                  # (B, T, G, K)
        v = linear(x, self.v).view(B, T, self.num_kv_heads, self.head_dim)                  # (B, T, G, K)
        q = ctx.rotate(q)                                                                   # (B, T, H, K)
        k = ctx.rotate(k)                                                                   # (B, T, G, K)
        # each key/value head serves num_heads / num_kv_heads query heads in a row
        k, v = (part.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2) for part in (k, v))
        y = ctx.attend(q, k, v, self.head_dim**-0.5)                                        # (B, T, H, K)
        return linear(y.reshape(B, T, D), self.out)                                         # (B, T, D)


def weights(rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
    return normal(rows, columns, std=0.02 * scale)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps=1e-5)


class Llama3(train_gpt.Model):
    """Token embedding -> layers -> norm -> head."""

    def __init__(self, cfg: Config, eot_id: int, dtype: torch.dtype = torch.float32,
                 flex: dict | None = None):
        super().__init__(cfg, eot_id, dtype, flex)
        self.embed = weights(cfg.vocab_size, cfg.model_dim)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))
        self.norm = nn.Parameter(torch.ones(cfg.model_dim))
        self.head = weights(cfg.padded_vocab_size, cfg.model_dim)

    def frequencies(self, device: torch.device) -> Tensor:
        """All pairs of dimensions rotate, with base 500,000; negative, as Llama rotates the other way."""
        K = self.cfg.head_dim
        return -(500_000.0 ** -(torch.arange(0, K, 2, device=device) / K))                  # (K/2)

    def hidden(self, inputs: Tensor) -> Tensor:
        x = F.embedding(inputs, self.embed).to(self.dtype)                                  # (B, T, D)
        for layer, ctx in zip(self.layers, self.contexts(inputs), strict=True):
            x = layer(x, ctx)                                                               # (B, T, D)
        return normed(x, self.norm)                                                         # (B, T, D)


def transformers_names(cfg: Config) -> dict[str, tuple[str, bool]]:
    """Our parameter name -> the name in transformers, and whether the matrix is transposed there."""
    names = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    parts = {"attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
             "v": "self_attn.v_proj", "out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
             "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    names |= {f"layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}.weight"
              for layer in range(cfg.num_layers) for ours, theirs in parts.items()}
    return {ours: (theirs, False) for ours, theirs in names.items()}


def transformers_config(cfg: Config) -> dict:
    rope = {"rope_theta": 500_000.0, "rope_type": "default"}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": cfg.vocab_size,
            "max_position_embeddings": cfg.seq_len, "hidden_size": cfg.model_dim,
            "intermediate_size": cfg.hidden_dim, "num_hidden_layers": cfg.num_layers,
            "num_attention_heads": cfg.num_heads, "num_key_value_heads": cfg.num_kv_heads,
            "head_dim": cfg.head_dim, "hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False,
            "mlp_bias": False, "tie_word_embeddings": False, "rope_theta": 500_000.0, "rope_parameters": rope}


EXPERIMENT = Experiment(Config, Llama3, train_nanogpt.AdamW, train_gpt.train)
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
