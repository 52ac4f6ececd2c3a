"""Sampling: what a model writes is what its plain forward pass says.

Run: ./run.sh test tests/test_sampling.py
"""

import dataclasses
import io
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import TINY, train_here

from benchtop import sampling
from benchtop.errors import UserError
from benchtop.sampling import choose, generate
from train_gpt import EXPERIMENT, GPT, Config

pytestmark = pytest.mark.usefixtures("no_picture")


def talkative(**knobs) -> tuple[GPT, Config]:
    """A model that says something: all that begins at zero is drawn at random; <|endoftext|> is unlikely."""
    cfg = Config(**{**TINY, "vocab_size": 301, "num_layers": 4, "temperature": 0, **knobs})
    torch.manual_seed(0)
    model = GPT(cfg, 300)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.head)
    model.head.data[300] = 0
    return model.eval(), cfg


@torch.no_grad()
def one_by_one(model: GPT, prompt: list[int], cfg: Config, seed: int) -> list[int]:
    """The plain loop: a forward pass over the text for each token, of this text alone."""
    text, generator = list(prompt), torch.Generator().manual_seed(seed)
    for _ in range(cfg.sample_tokens):
        read = text[-model.longest:] if model.longest else text
        logits = model.logits(model.hidden(torch.tensor([read]))[0, -1:])[0, :cfg.vocab_size]
        if cfg.temperature == 0:
            token = int(logits.argmax())
        else:
            kept = logits.sort(descending=True).indices[:cfg.top_k or len(logits)]
            among = torch.full_like(logits, -torch.inf)
            among[kept] = logits[kept]
            token = int(torch.multinomial((among / cfg.temperature).softmax(0), 1, generator=generator))
        if token == 300:
            break
        text.append(token)
    return text[len(prompt):]


def ending(model: GPT) -> Callable:
    """The model's logits, but with <|endoftext|> about once in twenty tokens."""
    def logits(x: torch.Tensor, real=model.logits) -> torch.Tensor:
        z = real(x)
        z[:, 300] = z[:, :300].logsumexp(-1) - 3
        return z
    return logits


PROMPTS = [[300, 5, 6], [300, *range(40)], [300], [300, 7, 8, 9, 300, 10], [300, *range(100, 133)]]


@pytest.mark.parametrize("knobs", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 3},
                                   {"temperature": 1.5, "top_k": 0}], ids=str)
def test_texts_that_are_decoded_together_are_what_each_is_alone(knobs):
    """Of different lengths, across windows and the rows of training; some end before others."""
    model, cfg = talkative(sample_tokens=20, short_window=9, long_window=20, **knobs)
    model.logits = ending(model)
    seeds = [3, 1, 4, 1, 5]
    wanted = [one_by_one(model, prompt, cfg, seed) for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert generate(model, PROMPTS, cfg, seeds) == wanted
    assert [generate(model, [prompt], cfg, [seed])[0]
            for prompt, seed in zip(PROMPTS, seeds, strict=True)] == wanted
    assert generate(model, PROMPTS[::-1], cfg, seeds[::-1]) == wanted[::-1]
    if cfg.temperature and cfg.top_k == 0:      # with others, the end may never be among the likeliest
        assert len({len(text) for text in wanted}) > 1


def test_more_texts_than_fit_at_once_are_decoded_in_turn(monkeypatch):
    model, cfg = talkative(sample_tokens=6, temperature=1.0)
    wanted = generate(model, PROMPTS, cfg)
    for fitting in (1, 100):        # tokens: not even one text, two texts
        monkeypatch.setattr(sampling, "TOKENS_AT_ONCE", fitting)
        assert generate(model, PROMPTS, cfg) == wanted


@pytest.mark.parametrize("longest", [1, 8, 33])
def test_a_model_that_cannot_read_all_of_a_text_reads_its_end(longest):
    model, cfg = talkative(sample_tokens=12, temperature=1.0)
    model.longest = longest
    lengths, real = [], model.hidden

    def hidden(inputs):
        lengths.append(inputs.size(1))
        return real(inputs)
    model.hidden = hidden
    made = generate(model, PROMPTS, cfg)
    assert max(lengths) == longest
    assert made == [one_by_one(model, prompt, cfg, seed) for seed, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("length", [34, 35, 300])
def test_of_a_long_text_no_more_is_read_than_the_last_token_sees(length):
    """One layer sees 34 tokens of a text, and more would take time and memory that grow with its square."""
    model, cfg = talkative(num_layers=1, sample_tokens=5)
    prompt = torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    wanted, lengths, real = one_by_one(model, prompt, cfg, 0), [], model.hidden

    def hidden(inputs):
        lengths.append(inputs.size(1))
        return real(inputs)
    model.hidden = hidden
    assert generate(model, [prompt], cfg) == [wanted] and max(lengths) == 34


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100, 127, 128, 129])
def test_generation_crosses_any_length(length):
    model, cfg = talkative(sample_tokens=3, temperature=1.0)
    made = generate(model, [[300, *range(length - 1)]] * 2, cfg)
    assert [len(text) for text in made] == [3, 3] and made[0] != made[1]
    assert all(0 <= token < 301 for text in made for token in text)


@torch.no_grad()
def test_nothing_is_seen_further_back_than_in_training():
    model, cfg = talkative(num_layers=1)
    tokens = torch.randint(0, 300, (1, 80), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, :80 - cfg.seq_len - 2] = 7   # the oldest key in sight carries a token that carries another
    assert model.hidden(tokens)[0, -1].equal(model.hidden(changed)[0, -1])
    changed[0, 80 - cfg.seq_len - 2] = 7
    assert not model.hidden(tokens)[0, -1].equal(model.hidden(changed)[0, -1])


def test_a_text_ends_where_the_model_ends_it():
    model, cfg = talkative(sample_tokens=40, temperature=1.0, top_k=0)
    model.head.data[:] = 0      # then all other tokens are equally likely
    model.logits = ending(model)
    prompts = [[300, 5, 6]] * 6
    made = generate(model, prompts, cfg)
    assert len({len(text) for text in made}) > 1 and not any(300 in text for text in made)
    assert made == generate(model, prompts, cfg)
    assert made != generate(model, prompts, dataclasses.replace(cfg, seed=1))
    del model.logits
    model.head.data[300] = 5 * model.hidden(torch.tensor([[300]]))[0, 0].detach()
    assert generate(model, [[300]], dataclasses.replace(cfg, temperature=0)) == [[]]


def test_a_prompt_ends_with_its_document():
    model, cfg = talkative(num_samples=2, sample_tokens=2)
    held_out = SimpleNamespace(tokens=np.array([300, 5, 6, 300, *range(7, 47)]), eot_id=300)
    tokenizer = SimpleNamespace(decode=list)
    found = sampling.sample_held_out(model, tokenizer, held_out, cfg)
    assert [sample["prompt"] for sample in found] == [[5, 6], [*range(7, 23)]]


def test_seeds_are_those_that_follow_the_first():
    model, cfg = talkative(sample_tokens=8, temperature=1.0, seed=5)
    assert generate(model, PROMPTS[:3], cfg) == generate(model, PROMPTS[:3], cfg, [5, 6, 7])


def test_sampling_keeps_to_the_top_k():
    cfg = Config(**{**TINY, "vocab_size": 301, "top_k": 3, "temperature": 2.0})
    logits = torch.randn(301)
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, cfg, generator) for _ in range(200)}
    assert drawn == set(logits.topk(3).indices.tolist())


@pytest.mark.parametrize("top_k", [0, 1, 301, 10**6])
@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-30, 2.0**52])
def test_any_temperature_and_top_k_give_a_token(temperature, top_k):
    cfg = Config(**{**TINY, "vocab_size": 301, "top_k": top_k, "temperature": temperature})
    logits = torch.randn(301, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, cfg, generator) for _ in range(30)}
    if temperature < 1 or top_k == 1:
        assert drawn == {int(logits.argmax())}
    else:
        assert len(drawn) > 20 and drawn <= {*range(301)}


@pytest.mark.parametrize(("flag", "value"), [("temperature", -1), ("temperature", float("nan")),
                                             ("temperature", float("inf")), ("top_k", -1),
                                             ("sample_tokens", 0), ("num_samples", -1)])
def test_knobs_of_sampling_that_mean_nothing_are_refused_by_their_name(flag, value):
    with pytest.raises(UserError, match=f"--{flag} must be .*; it is {value}"):
        Config(**{**TINY, flag: value})


def test_any_prompt_is_continued(here, monkeypatch, capsys):
    """Also one that is empty but for a space, or that names the special token, or is no valid UTF-8."""
    run = train_here(here, save_model=True, num_steps=1, val_every=1)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    for prompt in (" ", "<|endoftext|>", "a" * 10_000, "\0", "\udcff\ud800", "東京 🙂"):
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", f"--sample={run}", f"--prompt={prompt}",
                                          "--sample_tokens=2", "--device=cpu"])
        EXPERIMENT.main()
        said = sys.stdout.buffer.getvalue()
        assert said.startswith(prompt.encode(errors="backslashreplace"))
        sys.stdout.buffer.seek(0)
        sys.stdout.buffer.truncate()


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """4,000 draws of five tokens: chi-square of 4 degrees of freedom is below 18.5 in 99.9 % of all seeds."""
    cfg = Config(**{**TINY, "vocab_size": 301, "top_k": 0, "temperature": 0.5})
    logits = torch.tensor([0.0, 0.3, -0.5, 0.1, -1.0])
    wanted = 4000 * (logits / 0.5).softmax(0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.bincount(torch.tensor([choose(logits, cfg, generator) for _ in range(4000)]), minlength=5)
    assert float(((drawn - wanted).square() / wanted).sum()) < 18.5


def test_columns_that_are_no_tokens_are_never_drawn():
    """The head has 320 columns for 301 tokens."""
    model, cfg = talkative(sample_tokens=50, temperature=50.0, top_k=0)
    assert model.head.size(0) == 320
    made = generate(model, PROMPTS, cfg)
    assert max(token for text in made for token in text) < 301
