"""Sample text from a model, token by token.

Every token takes a plain forward pass over the whole text, for many texts at a time. There is no KV cache, so
a new layer needs no decoding code and computes exactly what it computes in training.
"""

import itertools
import math

import numpy as np
import torch
from tiktoken import Encoding
from torch import Tensor, nn

from benchtop.errors import NonFinite
from benchtop.evaluation import HeldOut

TOKENS_AT_ONCE = 2**14      # at most, in all texts that are decoded together


@torch.no_grad()
def generate(model: nn.Module, prompts: list[list[int]], cfg, seeds: list[int] | None = None,
             ) -> list[list[int]]:
    """Continue each prompt by at most sample_tokens tokens, whatever the other prompts are.

    prompts  token ids, at least one per prompt; lengths may differ
    seeds    one per prompt; None: cfg.seed, cfg.seed + 1, ...
    returns  the new tokens of each prompt, without the <|endoftext|> that ends a text
    """
    seeds = seeds or [cfg.seed + number for number in range(len(prompts))]
    longest = max(map(len, prompts), default=1) + cfg.sample_tokens
    together = max(1, TOKENS_AT_ONCE // longest)
    made = []
    for start in range(0, len(prompts), together):
        made += _continue(model, prompts[start:start + together], cfg, seeds[start:start + together])
    return made


def _continue(model: nn.Module, prompts: list[list[int]], cfg, seeds: list[int]) -> list[list[int]]:
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts = [list(prompt) for prompt in prompts]
    open_texts = list(range(len(texts)))        # numbers of the unfinished ones
    # only the end of a long text is read: the most that the model can read, or that its layers can see, since
    # each looks back over a training row at most, and one or two tokens more
    most = model.longest or len(model.layers) * (model.cfg.seq_len + 2)
    for _ in range(cfg.sample_tokens):
        read = [texts[number][-most:] for number in open_texts]
        lengths = list(map(len, read))
        # padding behind a text is not seen by the tokens before it
        inputs = torch.full((len(read), max(lengths)), model.eot_id)                        # (B, T)
        for row, text in enumerate(read):
            inputs[row, :lengths[row]] = torch.tensor(text)
        x = model.hidden(inputs.to(device))                                                 # (B, T, D)
        last = x[torch.arange(len(open_texts)), torch.tensor(lengths) - 1]                  # (B, D)
        logits = model.logits(last)[:, :model.cfg.vocab_size].cpu()                         # (B, V)
        if not logits.isfinite().all():
            raise NonFinite("the model gives logits that are not finite")
        for row, number in enumerate(open_texts):
            texts[number].append(choose(logits[row], cfg, generators[number]))
        open_texts = [number for number in open_texts if texts[number][-1] != model.eot_id]
        if not open_texts:
            break
    return [list(itertools.takewhile(lambda token: token != model.eot_id, text[len(prompt):]))
            for text, prompt in zip(texts, prompts, strict=True)]


def choose(logits: Tensor, cfg, generator: torch.Generator) -> int:
    """Choose a token from (V) logits."""
    if cfg.temperature == 0:
        return int(logits.argmax())
    if cfg.top_k:
        kth = logits.topk(min(cfg.top_k, len(logits))).values[-1]                           # ()
        logits = logits.masked_fill(logits < kth, -math.inf)                                # (V)
    # shifted to 0 at most and in float64, so that no temperature gives infinity minus infinity or 0 / 0
    z = (logits - logits.max()).double() / cfg.temperature                                  # (V)
    probabilities = torch.softmax(z.float(), dim=-1)                                        # (V)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def sample_held_out(model: nn.Module, tokenizer: Encoding, held_out: HeldOut, cfg) -> list[dict]:
    """Continue the first 16 tokens of held-out documents, which the model has never seen."""
    begins = np.flatnonzero(held_out.tokens == held_out.eot_id)
    ends = np.minimum(begins + 17, np.append(begins[1:], len(held_out.tokens)))     # or of the document
    chosen = np.linspace(0, len(begins) - 1, min(cfg.num_samples, len(begins))).astype(int)
    prompts = [held_out.tokens[begins[place]:ends[place]].tolist() for place in chosen]
    if not prompts:
        return []
    texts = generate(model, prompts, cfg, [cfg.seed] * len(prompts))
    return [{"prompt": tokenizer.decode(prompt[1:]), "text": tokenizer.decode(text),
             "temperature": cfg.temperature, "top_k": cfg.top_k, "seed": cfg.seed}
            for prompt, text in zip(prompts, texts, strict=True)]
