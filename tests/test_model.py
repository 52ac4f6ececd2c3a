"""The model, its masks and its loss, against plain formulas. Run: ./run.sh test tests/test_model.py"""

import dataclasses
import functools
import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from shapes import comments_of, wrong_shapes
from tiktoken import Encoding
from tiny_runs import EAGER, TINY, summary_of, train_here
from torch.nn.attention.flex_attention import create_block_mask

import train_gpt
from benchtop import evaluation, memory, sampling
from benchtop.batches import Batch
from benchtop.briefing import num_parameters
from benchtop.errors import UserError
from benchtop.evaluation import HeldOut, TokenLosses
from benchtop.machine import World
from benchtop.run import Experiment
from benchtop.saved import continue_prompts
from train_gpt import GPT, Config, Context, Optimizer, block_mask, evaluated_blocks, seen_blocks

pytestmark = pytest.mark.usefixtures("no_picture")

EOT = 100


def small_config(**knobs) -> Config:
    return Config(**{"vocab_size": 101, "num_layers": 4, "num_heads": 2, "model_dim": 16, "seq_len": 32,
                     "batch_tokens": 64, "value_embeddings": 1, **knobs})


def awake_model(cfg: Config, eot_id: int = EOT, kind: type[GPT] = GPT, **options) -> GPT:
    """A model whose zero-initialised weights are random, so that every path matters."""
    torch.manual_seed(1)
    model = kind(cfg, eot_id, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def some_tokens(rows: int, length: int, documents: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, EOT, (rows, length), generator=generator)
    tokens[:, 0] = EOT
    if documents:
        tokens[:, length // 3] = EOT
        tokens[0, length // 2] = EOT
    return tokens


@torch.no_grad()
def logits_of(model: train_gpt.Model, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, V) for token ids (B, T), only columns of real tokens."""
    return model.logits(model.hidden(tokens))[..., :model.cfg.vocab_size]


def test_no_token_sees_the_future():
    model, tokens = awake_model(small_config()), some_tokens(1, 20, documents=False)
    before = logits_of(model, tokens)
    for place, other in itertools.product(range(1, 20), ("token", "beginning")):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % EOT if other == "token" else EOT
        after = logits_of(model, changed)
        assert torch.equal(before[0, :place], after[0, :place])
        assert not torch.equal(before[0, place:], after[0, place:])


def test_no_token_sees_another_document():
    model, tokens = awake_model(small_config()), some_tokens(1, 30, documents=False)
    tokens[0, 10] = tokens[0, 20] = EOT
    before = logits_of(model, tokens)
    changed = tokens.clone()
    changed[0, 10:20] = (changed[0, 10:20] + 1) % EOT
    changed[0, 10] = EOT
    after = logits_of(model, changed)
    assert torch.equal(before[0, 20:], after[0, 20:])
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.equal(before[0, 11:20], after[0, 11:20])


# ------------------------------------------------------------------------------------------------
# What all layers receive alike
# ------------------------------------------------------------------------------------------------

def documents_of(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens == EOT).cumsum(1)


def test_previous_is_what_stands_at_the_token_before_in_the_same_document():
    tokens = some_tokens(2, 30)
    ctx, docs = GPT(small_config(), EOT).contexts(tokens)[0], documents_of(tokens)
    for x in (torch.randn(2, 30, 6), torch.randn(2, 30, 3, 8)):
        made = ctx.previous(x)
        assert made.shape == x.shape
        for text, place in itertools.product(range(2), range(30)):
            is_first = place == 0 or docs[text, place - 1] != docs[text, place]
            before = torch.zeros_like(x[text, 0]) if is_first else x[text, place - 1]
            assert torch.equal(made[text, place], before)


@torch.no_grad()
@pytest.mark.parametrize("flex", [None, {}], ids=["dense", "flex"])
def test_what_layers_share_leaks_nothing_from_the_future_or_another_document(flex):
    """A change at a place moves just what may see it: the next token by `previous`, a window by `attend`."""
    window, length = 6, 30
    tokens = some_tokens(2, length)
    model = GPT(small_config(num_layers=1, value_embeddings=0, long_window=window), EOT, flex=flex)
    ctx, docs = model.contexts(tokens)[0], documents_of(tokens)
    torch.manual_seed(0)
    x, (q, k, v) = torch.randn(2, length, 6), torch.randn(3, 2, length, 2, 16)
    before = ctx.previous(x), ctx.previous(k), ctx.attend(q, k, v, 1.0)
    for place in range(length):
        other_x, other_k, other_v = x.clone(), k.clone(), v.clone()
        for changed in (other_x, other_k, other_v):
            changed[:, place] += 1 + torch.rand(changed[:, place].shape)
        after = ctx.previous(other_x), ctx.previous(other_k), ctx.attend(q, other_k, other_v, 1.0)
        moved = [(one != other).flatten(2).any(-1).tolist() for one, other in zip(before, after, strict=True)]
        for text, at in itertools.product(range(2), range(length)):
            is_own = docs[text, at] == docs[text, place]
            assert moved[0][text][at] == moved[1][text][at] == (at == place + 1 and is_own)
            assert moved[2][text][at] == (place <= at < place + window and is_own)


@pytest.mark.parametrize("flex", [None, {}], ids=["dense", "flex"])
def test_what_layers_share_depends_on_documents_alone(flex):
    """Other tokens of the same documents, and what comes after a place, change nothing before it."""
    model = GPT(small_config(), EOT, flex=flex)
    tokens, (q, k, v) = some_tokens(2, 30), torch.randn(3, 2, 30, 2, 8)

    def shared(tokens: torch.Tensor) -> list[torch.Tensor]:
        ctx = model.contexts(tokens)[0]
        with torch.no_grad():
            return [ctx.previous(k), ctx.rotate(k), ctx.attend(q, k, v, 1.0)]
    before = shared(tokens)
    others = torch.where(tokens == EOT, EOT, (tokens + 1) % EOT)
    assert all(map(torch.equal, before, shared(others)))
    later = tokens.clone()
    later[:, 20] = EOT          # a document begins here now
    for one, other in zip(before, shared(later), strict=True):
        assert torch.equal(one[:, :20], other[:, :20])
    assert not torch.equal(before[2], shared(later)[2])


class FullRotary(GPT):
    """Every pair of dimensions rotates."""

    def frequencies(self, device: torch.device) -> torch.Tensor:
        return 1024.0 ** -torch.linspace(0, 1, self.cfg.head_dim // 2, device=device)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "still"), [(GPT, [2, 3, 6, 7]), (FullRotary, [])])
def test_the_dimensions_of_a_key_that_do_not_rotate_are_those_of_the_token_before(kind, still, monkeypatch):
    """As a layer attends with them; where all rotate, a key is wholly its token's own."""
    rotated, attended, plain = [], [], []

    def rotate(self, x: torch.Tensor, really=Context.rotate) -> torch.Tensor:
        plain.append(x)
        rotated.append(really(self, x))
        return rotated[-1]

    def attend(self, q, k, *others, really=Context.attend) -> torch.Tensor:
        attended.append((q, k))
        return really(self, q, k, *others)
    monkeypatch.setattr(Context, "rotate", rotate)
    monkeypatch.setattr(Context, "attend", attend)
    tokens = some_tokens(2, 32)
    awake_model(small_config(num_layers=1, value_embeddings=0), kind=kind).hidden(tokens)
    assert len(rotated) == 2 and len(attended) == 1
    (q, k), turning = attended[0], sorted({*range(8)} - {*still})
    for x, turned in zip(plain, rotated, strict=True):
        assert torch.equal(turned[..., still], x[..., still])
        assert torch.equal(turned[:, 0], x[:, 0])
        # the slowest pair turns by a thousandth of a radian, of numbers near 1
        assert (turned != x)[:, 1:, :, turning].all()
    assert torch.equal(q, rotated[0]) and torch.equal(k[..., turning], rotated[1][..., turning])
    docs = documents_of(tokens)
    for text, place in itertools.product(range(2), range(32)):
        is_first = place == 0 or docs[text, place - 1] != docs[text, place]
        before = torch.zeros(2, len(still)) if is_first else plain[1][text, place - 1, :, still]
        assert torch.equal(k[text, place, :, still], before)


def test_rotary_positions_are_rotations_by_the_distance():
    """Products of queries and keys depend on how far apart they are, and lengths stay."""
    ctx = FullRotary(small_config(seq_len=64), EOT).contexts(some_tokens(1, 64))[0]
    q, k = torch.randn(2, 8, dtype=torch.float64).view(2, 1, 1, 1, 8).expand(2, 1, 64, 1, 8)
    q, k = ctx.rotate(q), ctx.rotate(k)
    products = q[0, :, 0] @ k[0, :, 0].mT
    for apart in range(-60, 60):
        along = products.diagonal(apart)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-5)
    assert len({round(float(products.diagonal(apart)[0]), 6) for apart in range(-60, 60)}) > 100
    torch.testing.assert_close(k.norm(dim=-1), k.norm(dim=-1)[:, :1].expand(1, 64, 1), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# Masks and their kernels
# ------------------------------------------------------------------------------------------------

def test_windows_end_where_they_say():
    """With one layer a token depends on exactly the tokens in its window, and on the one before those, which
    the first one's key carries."""
    cfg = small_config(num_layers=1, value_embeddings=0, long_window=5)
    model, tokens = awake_model(cfg), some_tokens(1, 24, documents=False)
    model.smear.data.zero_()        # it would carry each token one place further
    before = logits_of(model, tokens)
    changed = tokens.clone()
    changed[0, 8] += 1
    moved = (before != logits_of(model, changed)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [8, 9, 10, 11, 12, 13]


def test_windows_grow_over_training():
    tokens = some_tokens(1, 512, documents=False)

    def reach(progress: float, warmup: float) -> list[int]:
        model = GPT(small_config(seq_len=512, batch_tokens=512, long_window=400, short_window=200,
                                 window_warmup_frac=warmup), EOT)
        assert [int(ctx.window) for ctx in model.contexts(tokens)] == [200, 200, 200, 400]      # trained
        model.progress = progress
        windows = [int(ctx.window) for ctx in model.contexts(tokens)]
        assert windows == model.windows(512)
        return windows
    assert reach(0, 1) == [128] * 4
    assert reach(0.5, 1) == reach(0.25, 0.5) == [128, 128, 128, 200]
    assert reach(1, 1) == reach(0.5, 0.5) == reach(0, 0) == [200, 200, 200, 400]


def test_layers_with_equal_windows_share_one_mask():
    model = GPT(small_config(seq_len=512, batch_tokens=512, long_window=400, short_window=200), EOT)
    first, second, third, last = model.contexts(some_tokens(1, 512))
    assert first is second is third and last is not first


def context_of(docs: torch.Tensor, window: int, flex: bool = False, blocks=seen_blocks) -> Context:
    """All that attention needs of a Context."""
    window = torch.tensor(window, device=docs.device)
    mask = block_mask(docs, window, blocks) if flex else None
    return Context(docs, None, window, None, None, None, mask)


@pytest.mark.parametrize("window", [1, 7, 64])
def test_mask_is_causal_and_document_and_window(window):
    docs = documents_of(some_tokens(3, 33))
    # equal keys share the weight, and a value for each place tells who had a share
    same, places = torch.zeros(3, 33, 1, 33), torch.eye(33)[:, None].expand(3, 33, 1, 33)
    ctx = context_of(docs, window)
    weights = ctx.attend(same, same, places, 1.0).transpose(1, 2)
    assert torch.equal(ctx.mask(), weights > 0)
    for batch in range(3):
        for query in range(33):
            for key in range(33):
                seen = key <= query and query - key < window and docs[batch, key] == docs[batch, query]
                assert bool(weights[batch, 0, query, key]) == bool(seen)


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: Context,
                    scale: float) -> torch.Tensor:
    """What ctx.attend(q, k, v, scale) should be, by torch's attention, where heads stand before places."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, ctx.mask(), scale=scale).transpose(1, 2)


@pytest.mark.parametrize("queries_at_once", [512, 16])
def test_dense_attention_is_that_of_torch_with_its_gradients(queries_at_once, monkeypatch):
    monkeypatch.setattr(train_gpt, "QUERIES_AT_ONCE", queries_at_once)
    torch.manual_seed(0)
    docs = documents_of(some_tokens(2, 40))
    ctx = context_of(docs, 9)
    q, k, v = (torch.randn(2, 40, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(2, 40, 3, 8, dtype=torch.float64)
    ours = ctx.attend(q, k, v, 0.7)
    theirs = torch_attention(q, k, v, ctx, 0.7)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), (q, k, v)),
                               torch.autograd.grad((theirs * weight).sum(), (q, k, v)))


@pytest.mark.parametrize("length", [128, 512, 700])
@pytest.mark.parametrize("window", [1, 100, 128, 300, 10**6])
@pytest.mark.parametrize("documents", [1, 4, 60])
@pytest.mark.parametrize("blocks", [seen_blocks, evaluated_blocks])
def test_block_masks_are_those_of_the_whole_mask(length, window, documents, blocks):
    """Every block that torch finds by evaluating T x T is there, and the full ones are exactly torch's."""
    begins = torch.zeros(2, length, dtype=torch.int32)
    begins[:, :: max(1, length // documents)] = 1
    begins[1] = begins[1].roll(37)
    docs, window = begins.cumsum(1, dtype=torch.int32), torch.tensor(window)
    mask = block_mask(docs, window, blocks)

    def mask_mod(batch, head, query, key):
        return train_gpt.sees(query, key, docs[batch, query], docs[batch, key], window)
    oracle = create_block_mask(mask_mod, 2, None, length, length, device="cpu")

    def dense(counts: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        blocks = torch.zeros(order.shape, dtype=torch.bool)
        for place in itertools.product(*map(range, counts.shape)):
            blocks[place][order[place][:counts[place]].long()] = True
        return blocks
    ours, theirs = (dense(one.kv_num_blocks, one.kv_indices) for one in (mask, oracle))
    our_full, their_full = (dense(one.full_kv_num_blocks, one.full_kv_indices) for one in (mask, oracle))
    assert not (ours & our_full).any()
    inside = slice(None, length // 128)     # torch counts a last block that is not whole as partial
    assert torch.equal(our_full[:, :, inside, inside], their_full[:, :, inside, inside])
    assert not ((theirs | their_full) & ~(ours | our_full)).any()
    assert (ours | our_full).sum() <= 1.5 * (theirs | their_full).sum() + 2


def test_flex_attention_equals_dense_attention():
    torch.manual_seed(0)
    docs = documents_of(some_tokens(2, 256))
    q, k, v = torch.randn(3, 2, 256, 2, 16)
    with torch.no_grad():
        dense, flex = (context_of(docs, 50, flex).attend(q, k, v, 0.7) for flex in (False, True))
    torch.testing.assert_close(dense, flex)


EDITED_MASKS = {
    "dilated": lambda query, key, query_doc, key_doc, window:
        (key <= query) & ((query - key) % 3 == 0) & (query_doc == key_doc),
    "documents may see those before": lambda query, key, query_doc, key_doc, window:
        (key <= query) & (query - key < window),
    "a first token that all see": lambda query, key, query_doc, key_doc, window:
        (key <= query) & ((query - key < window) & (query_doc == key_doc) | (key == 0)),
    "the future": lambda query, key, query_doc, key_doc, window:
        (key - query < window) & (query_doc == key_doc)}


@pytest.mark.parametrize("mask", EDITED_MASKS)
def test_an_edited_mask_is_that_of_every_kernel(mask, monkeypatch):
    """Blocks that follow from documents are not used when sees() says something else."""
    assert train_gpt.choose_blocks() is seen_blocks
    monkeypatch.setattr(train_gpt, "sees", EDITED_MASKS[mask])
    docs = documents_of(some_tokens(2, 400))
    models = [GPT(small_config(seq_len=400, batch_tokens=400, long_window=250), EOT, flex=flex)
              for flex in (None, {})]
    assert [len(model.remarks()) for model in models] == [0, 1] and "mask" in models[1].remarks()[0]
    assert {model.blocks for model in models} == {evaluated_blocks}
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 400, 2, 16)
    with torch.no_grad():
        dense, flex = (model.contexts(some_tokens(2, 400))[0].attend(q, k, v, 0.7) for model in models)
    torch.testing.assert_close(dense, flex)
    ctx = context_of(docs, 250)
    torch.testing.assert_close(dense, torch_attention(q, k, v, ctx, 0.7))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_has_the_gradients_of_dense_attention():
    torch.manual_seed(0)
    docs = documents_of(some_tokens(2, 256)).cuda()
    q, k, v = torch.randn(3, 2, 256, 2, 64, device="cuda").unbind()
    gradients = []
    for flex in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        torch.compile(context_of(docs, 50, flex).attend)(*leaves, 0.7).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("flex", [None, {}])
def test_compiled_layers_serve_all_windows_and_documents(flex):
    """One graph for every layer, step and window, and one before and behind them, equal to the eager model;
    for FlexAttention, which is for GPUs, also one of the look-up. Forward only."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cfg = small_config(model_dim=64, seq_len=256, batch_tokens=512, long_window=200, short_window=130,
                       value_embeddings=0, window_warmup_frac=1)
    compiled, eager = awake_model(cfg, flex=flex), awake_model(cfg)
    compiled.compile_parts()
    with torch.no_grad():
        for seed, progress in enumerate((0, 0.7, 0.9, 1)):
            tokens = torch.randint(0, 101, (2, 256), generator=torch.Generator().manual_seed(seed))
            compiled.progress = eager.progress = progress
            torch.testing.assert_close(compiled.hidden(tokens), eager.hidden(tokens), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (3 if flex is None else 4)


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------

class HeadAlone(train_gpt.Model):
    """Nothing but a head, over hidden states that it is given."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, vocab_size: int, cap: float, fp8: bool = False):
        super().__init__(small_config(vocab_size=vocab_size, logit_cap=cap, fp8=fp8), EOT, x.dtype)
        self.x = x
        self.head = torch.nn.Parameter(weight.clone())

    def hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.x

    def loss(self, targets: torch.Tensor) -> torch.Tensor:
        return self(targets, targets)


# sums of 128 products of slopes up to 2.5 and weights up to 12, in another order: 128 x 2.5 x 12 x 2^-24
SUMS = dict(rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("cap", [15, 0])
@pytest.mark.parametrize("rows", [1, 5, 16, 37])
def test_chunked_loss_is_the_plain_loss_with_its_gradients(rows, cap, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(1, rows, 12, requires_grad=True)
    model = HeadAlone(x, 3 * torch.randn(128, 12), 101, cap)
    targets = torch.randint(0, 101, (1, rows))
    targets[:, ::4] = -1
    logits = train_gpt.soft_cap(x[0] @ model.head[:101].T, cap)
    plain = F.cross_entropy(logits, targets[0], ignore_index=-1, reduction="sum")
    wanted = torch.autograd.grad(2.5 * plain, (x, model.head))
    monkeypatch.setattr(train_gpt, "chunk_rows", lambda x, columns: 8)
    chunked = model.loss(targets)
    got = torch.autograd.grad(2.5 * chunked, (x, model.head))
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(got, wanted, **SUMS)


def test_a_loss_is_the_sum_of_its_rows():
    """So that micro-batches and processes do not change it."""
    model, inputs = awake_model(small_config()), some_tokens(4, 32)
    targets = inputs.roll(-1, 1)
    rows = [model(inputs[row:row + 1], targets[row:row + 1]) for row in range(4)]
    torch.testing.assert_close(torch.stack(rows).sum(), model(inputs, targets))


def edited(monkeypatch) -> None:
    """Add what somebody may add where "EDIT: loss" stands: a z-loss."""
    def token_losses(z, targets, cfg, plain=train_gpt.token_losses):
        return plain(z, targets, cfg) + 0.1 * z.logsumexp(-1).square() * (targets >= 0)
    monkeypatch.setattr(train_gpt, "token_losses", token_losses)


@pytest.mark.parametrize("cap", [15, 0])
def test_a_term_added_to_the_loss_has_its_gradient(cap, monkeypatch):
    edited(monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(1, 37, 12, requires_grad=True)
    model = HeadAlone(x, 3 * torch.randn(128, 12), 101, cap)
    targets = torch.randint(0, 101, (1, 37))
    targets[:, ::4] = -1
    logits = train_gpt.soft_cap(x[0] @ model.head[:101].T, cap)
    plain = F.cross_entropy(logits, targets[0], ignore_index=-1, reduction="sum")
    plain = plain + 0.1 * (logits.logsumexp(-1).square() * (targets[0] >= 0)).sum()
    monkeypatch.setattr(train_gpt, "chunk_rows", lambda x, columns: 8)
    loss = model.loss(targets)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, model.head)),
                               torch.autograd.grad(plain, (x, model.head)), **SUMS)
    assert len(model.remarks()) == 1 and "edited" in model.remarks()[0]


@pytest.mark.parametrize("cap", [15, 0])
def test_the_fast_loss_is_the_plain_one_and_serves_where_it_is(cap):
    torch.manual_seed(0)
    logits, targets = 20 * torch.randn(40, 128), torch.randint(0, 101, (40,))
    targets[::4] = -1
    cfg = small_config(logit_cap=cap)
    torch.testing.assert_close(train_gpt.fast_losses_and_gradient(logits, targets, cfg),
                               train_gpt.losses_and_gradient(logits, targets, cfg))
    model = GPT(cfg, EOT)
    assert model.loss_kernel is train_gpt.fast_losses_and_gradient and model.remarks() == []


def z_loss(z, targets, share):
    return share * z.logsumexp(-1).square() * (targets >= 0)


EDITED_LOSSES = {
    "a small z-loss": lambda z, targets, plain: plain + z_loss(z, targets, 1e-6),
    "one token weighs less": lambda z, targets, plain: torch.where(targets == 77, 0.5, 1) * plain,
    "weights of torch's": lambda z, targets, plain: F.cross_entropy(
        z, targets, torch.linspace(0.5, 1.5, z.size(1)), ignore_index=-1, reduction="none"),
    "label smoothing": lambda z, targets, plain: F.cross_entropy(
        z, targets, ignore_index=-1, reduction="none", label_smoothing=0.1)}


@pytest.mark.parametrize("edit", EDITED_LOSSES)
def test_an_edited_loss_is_not_overlooked_and_is_finite(edit, monkeypatch):
    def token_losses(z, targets, cfg, plain=train_gpt.token_losses):
        return EDITED_LOSSES[edit](z, targets, plain(z, targets, cfg))
    monkeypatch.setattr(train_gpt, "token_losses", token_losses)
    model = GPT(small_config(), EOT)
    assert model.loss_kernel is train_gpt.losses_and_gradient and "edited" in model.remarks()[0]
    tokens = some_tokens(2, 32)
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_a_gradient_that_is_not_that_of_its_losses_is_refused(monkeypatch):
    """As when somebody edits the fast losses and not their slope."""
    def half_edited(logits, targets, cfg, plain=train_gpt.fast_losses_and_gradient):
        losses, gradient = plain(logits, targets, cfg)
        return losses + 0.1 * logits.logsumexp(-1).square(), gradient
    monkeypatch.setattr(train_gpt, "fast_losses_and_gradient", half_edited)
    with pytest.raises(UserError, match="edit token_losses alone"):
        GPT(small_config(), EOT)


def plain_fp8_product(a: tuple, b: tuple, fast: bool = False) -> torch.Tensor:
    """What fp8_product makes, on any machine."""
    return (a[0].float() @ b[0].float().T * (a[1] * b[1])).bfloat16()


HAS_FP8 = not train_gpt.fp8_problem(torch.device("cpu"), torch.bfloat16)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="this CPU has no FP8 products")


@needs_fp8
@pytest.mark.parametrize(("dtype", "error"), [(train_gpt.E4M3, 0.04), (train_gpt.E5M2, 0.08)])
@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_fp8_products_are_products_of_any_scale(dtype, error, scale):
    torch.manual_seed(0)
    a, b = (scale * torch.randn(rows, 64, dtype=torch.bfloat16) for rows in (32, 48))
    plain = a.double() @ b.double().T

    def product(a: torch.Tensor) -> torch.Tensor:
        return train_gpt.fp8_product(train_gpt.to_fp8(a, dtype), train_gpt.to_fp8(b, train_gpt.E4M3))
    assert 0 < (product(a).double() - plain).norm() < error * plain.norm()
    assert product(torch.zeros_like(a)).abs().max() == 0
    narrow = train_gpt.to_fp8(a, dtype), train_gpt.to_fp8(b, train_gpt.E4M3)
    torch.testing.assert_close(train_gpt.fp8_product(*narrow), plain_fp8_product(*narrow), rtol=2**-7, atol=0)


@pytest.mark.parametrize("cap", [15, 0])
@pytest.mark.parametrize("products", ["plain", pytest.param("own", marks=needs_fp8)])
def test_the_loss_in_fp8_is_near_that_in_bfloat16(monkeypatch, products, cap):
    if products == "plain":
        monkeypatch.setattr(train_gpt, "fp8_product", plain_fp8_product)
    torch.manual_seed(0)
    x = torch.randn(2, 48, 32, dtype=torch.bfloat16).requires_grad_()
    weight, targets = 0.5 * torch.randn(128, 32), torch.randint(0, 128, (2, 48))
    monkeypatch.setattr(train_gpt, "chunk_rows", lambda x, columns: 64)
    losses, gradients = [], []
    for fp8 in (False, True):
        model = HeadAlone(x, weight, 128, cap, fp8)
        losses.append(model.loss(targets))
        gradients.append([gradient.float() for gradient in torch.autograd.grad(losses[-1], (x, model.head))])
    assert losses[0] != losses[1]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    for plain, fp8 in zip(*gradients, strict=True):
        assert (fp8 - plain).norm() < 0.1 * plain.norm()


def test_fp8_says_what_it_needs(monkeypatch):
    assert "needs --dtype bfloat16" in train_gpt.fp8_problem(torch.device("cpu"), torch.float32)
    for capability, works in (("AVX2", False), ("AVX512", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda has=capability: has)
        assert bool(train_gpt.fp8_problem(torch.device("cpu"), torch.bfloat16)) != works
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for capability, works in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, has=capability: has)
        assert bool(train_gpt.fp8_problem(torch.device("cuda"), torch.bfloat16)) != works
    with pytest.raises(UserError, match="--seq_len must be a multiple of 16 for --fp8"):
        small_config(fp8=True, seq_len=24, batch_tokens=48)


def test_chunks_are_small():
    for rows, columns in ((8192, 8256), (100, 50304), (7, 64), (3, 2**24)):
        chunk = memory.chunk_rows(torch.zeros(rows, 1), columns)
        assert 1 <= chunk <= rows and chunk * columns * 4 <= max(2**27, 4 * columns)


@pytest.mark.parametrize("rows", [3, 8, 64])
def test_token_losses_are_the_cross_entropy_of_the_logits(rows, monkeypatch):
    for module in (train_gpt, evaluation):
        monkeypatch.setattr(module, "chunk_rows", lambda x, columns: rows)
    model, tokens = awake_model(small_config()), some_tokens(2, 32)
    targets = tokens.roll(-1, 1)
    targets[1, 5:9] = -1
    wanted = F.cross_entropy(logits_of(model, tokens).flatten(0, 1), targets.flatten(), ignore_index=-1,
                             reduction="none")
    losses = TokenLosses(model, World(model.cfg))(tokens, targets)
    assert losses.shape == (2, 32) and not losses.requires_grad
    torch.testing.assert_close(losses.flatten(), wanted)
    torch.testing.assert_close(model(tokens, targets), wanted.sum())


@pytest.mark.parametrize(("how", "rows"), [
    ("eager", 3), ("eager", 8), ("eager", 64),
    pytest.param("compiled", 3, marks=pytest.mark.slow)])       # 21 chunks of three, and one of one
def test_likeliest_tokens_are_those_of_the_logits(rows, how, monkeypatch):
    monkeypatch.setattr(evaluation, "chunk_rows", lambda x, columns: rows)
    model, tokens = awake_model(small_config()), some_tokens(2, 32)
    with torch.no_grad():
        # padding columns would win, if they took part; tokens 7 and 9 tie wherever they do
        model.head[101:] = 100 * torch.sign(model.hidden(tokens)[0, 0])
        model.head[7] = model.head[9] = 3 * model.head[9]
    losses_of = TokenLosses(model, World(model.cfg), compiled=how == "compiled")
    best = logits_of(model, tokens).argmax(-1)
    assert (best == 7).any() and not (best == 9).any()      # the first of equal ones
    targets = torch.where(torch.arange(64).view(2, 32) % 3 == 0, (best + 1) % 101, best)
    targets[best == 7] = 9
    targets[0, 3], targets[1, 5:9] = 7, -1
    losses, likeliest = losses_of(tokens, targets, likeliest=True)
    assert torch.equal(likeliest, (targets == best).float())
    assert 0 < likeliest.sum() < 60
    torch.testing.assert_close(losses, losses_of(tokens, targets))


def test_padding_columns_are_never_predicted():
    model, tokens = awake_model(small_config()), some_tokens(2, 32)
    with torch.no_grad():
        # they would win, if they took part
        model.head[101:] = 100 * torch.sign(model.hidden(tokens)[0, 0])
    assert model.cfg.padded_vocab_size == 128
    logits = model.logits(model.hidden(tokens))
    assert logits.shape == (2, 32, 128)
    assert logits[..., :101].isfinite().all() and (logits[..., 101:] == -math.inf).all()
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    # a token's loss is bounded by twice the cap; a padding column would cost that much
    assert loss < 2 * 32 * 31
    assert torch.equal(model.head.grad[101:], torch.zeros(27, 16))


# ------------------------------------------------------------------------------------------------
# The model as a whole, and another one
# ------------------------------------------------------------------------------------------------

def test_an_untrained_model_knows_nothing():
    model, tokens = GPT(small_config(), EOT), some_tokens(2, 32)
    loss = model(tokens, tokens.roll(-1, 1)) / tokens.numel()
    assert loss.item() == pytest.approx(math.log(101), abs=1e-5)


@pytest.mark.parametrize("knobs", [
    dict(num_layers=1, num_heads=1, model_dim=4, value_embeddings=0),
    dict(num_layers=3, value_embeddings=1),
    dict(num_layers=5, num_heads=3, model_dim=36, value_embeddings=2, mlp_ratio=1),
    dict(seq_len=2, batch_tokens=2)])
def test_any_size_makes_a_model_whose_every_parameter_learns(knobs):
    cfg = small_config(**knobs)
    model, tokens = awake_model(cfg), some_tokens(2, cfg.seq_len, documents=cfg.seq_len > 2)
    model(tokens, tokens.roll(-1, 1)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_bfloat16_is_near_float32():
    cfg = small_config(model_dim=64)
    tokens = some_tokens(2, 32)
    exact, rough = (awake_model(cfg, dtype=dtype)(tokens, tokens.roll(-1, 1))
                    for dtype in (torch.float32, torch.bfloat16))
    assert rough.item() == pytest.approx(exact.item(), rel=0.03)


def test_flops_are_six_per_weight_of_a_matrix_and_attention():
    cfg = small_config()
    matrices = 4 * (4 * 16 * 16 + 2 * 16 * 64) + 128 * 16
    assert GPT(cfg, EOT).flops_per_token() == 6 * matrices + 12 * 16 * 4 * 32 / 2
    keys = sum(min(place + 1, 8) for place in range(32)) / 32       # that a token sees through a window of 8
    windowed = GPT(small_config(long_window=8), EOT).flops_per_token()
    assert windowed == pytest.approx(6 * matrices + 12 * 16 * 4 * keys, rel=0.03)


def test_layers_begin_as_identities():
    """What they add is zero at first."""
    model, tokens = GPT(small_config(), EOT), some_tokens(2, 32)
    whole = model.hidden(tokens)
    model.layers = model.layers[:1]
    assert torch.equal(model.hidden(tokens), whole)


class SwiGLULayer(train_gpt.Layer):
    """A layer as somebody would write one in a copy of the script; it knows of nothing but tensors."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.gate = torch.nn.Parameter(torch.randn(self.up.shape) / math.sqrt(cfg.model_dim))

    def forward(self, x, x0, value_embedding, ctx):
        stream, embedding = self.stream_mix.to(x.dtype)
        x = stream * x + embedding * x0
        x = x + self.attention(train_gpt.rms_norm(x), value_embedding, ctx)
        inner = train_gpt.rms_norm(x)
        gate, up = train_gpt.linear(inner, self.gate), train_gpt.linear(inner, self.up)
        return x + train_gpt.linear(F.silu(gate) * up, self.down)


class SwiGLU(GPT):
    def __init__(self, cfg: Config, *others):
        super().__init__(cfg, *others)
        self.layers = torch.nn.ModuleList(SwiGLULayer(cfg) for _ in range(cfg.num_layers))


OTHERS = pytest.mark.parametrize("kind", [GPT, FullRotary, SwiGLU])


@OTHERS
def test_a_text_is_continued_by_what_the_plain_model_finds_likeliest(kind):
    model = awake_model(small_config(temperature=0, sample_tokens=20), kind=kind)
    prompts = [[EOT, 5, 6], [EOT], [EOT, *range(40)]]
    made = sampling.generate(model, prompts, model.cfg)
    for prompt, text in zip(prompts, made, strict=True):
        assert text == sampling.generate(model, [prompt], model.cfg)[0]     # whichever others are beside it
        for count in range(20):
            likeliest = int(logits_of(model, torch.tensor([prompt + text[:count]]))[0, -1].argmax())
            assert likeliest == (text[count] if count < len(text) else EOT)
            if likeliest == EOT:
                break
    assert sum(map(len, made)) > 30


@pytest.mark.parametrize("kind", [FullRotary, SwiGLU])
def test_another_layer_trains_samples_and_is_counted_with_nothing_else_touched(kind, here):
    """From data to a folder with weights that can be loaded and continued, by the bench as it is."""
    experiment = Experiment(Config, kind, Optimizer, train_gpt.train, train_gpt.EXPERIMENT.script)
    folder = train_here(here, experiment, save_model=True)
    summary = summary_of(folder)
    assert summary["status"] == "finished" and summary["val_loss"] < math.log(301)
    samples = (folder / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 2
    texts = list(continue_prompts(experiment, folder, ["the cat"], sample_tokens=5))
    assert len(texts) == 1 and isinstance(texts[0], str)

    cfg = Config(**{**TINY, "vocab_size": 301})
    model, plain = kind(cfg, 300), GPT(cfg, 300)
    more = num_parameters(model) - num_parameters(plain)
    assert more == (2 * 16 * 64 if kind is SwiGLU else 0) and summary["parameters"] == num_parameters(model)
    assert model.flops_per_token() - plain.flops_per_token() == 6 * more
    for kernels in (EAGER, dataclasses.replace(EAGER, compiled=True)):
        (ours, _), (plain, _) = (memory.kept_mib(each, cfg, torch.float32, kernels) for each in (kind, GPT))
        assert (ours > plain) == (kind is SwiGLU)


# ------------------------------------------------------------------------------------------------
# Shape comments
# ------------------------------------------------------------------------------------------------

SIZES = {"B": 2, "T": 10, "D": 36, "H": 3, "K": 12, "F": 180, "V": 192, "Q": 5, "J": 1, "N": 20}
OWN = {
    # also for rows that are padded to whole blocks, and for all queries
    "dense_mask": lambda here: {"T": here["docs"].size(1),
                                "Q": len(range(here["docs"].size(1))[here["queries"]])},
    "_continue": lambda here: {"B": len(here["read"]), "T": max(map(len, here["read"]))}}


def test_shape_comments_are_true(monkeypatch):
    """Train, evaluate and sample with pairwise different sizes, and compare each tensor with the comment on
    its line: all that are in the script, and those of the bench that a model meets."""
    monkeypatch.setattr(train_gpt, "QUERIES_AT_ONCE", SIZES["Q"])
    for module in (train_gpt, evaluation):      # all tokens in one chunk
        monkeypatch.setattr(module, "chunk_rows", lambda x, columns: SIZES["N"])
    monkeypatch.setattr(train_gpt, "fp8_product", plain_fp8_product)
    cfg = Config(vocab_size=192, num_layers=4, num_heads=3, model_dim=36, mlp_ratio=5, seq_len=10,
                 num_steps=1, batch_tokens=20, value_embeddings=1, num_samples=2, sample_tokens=2, top_k=3,
                 grad_clip=1)
    tokens = torch.randint(0, 191, (2, 10))
    letters = Encoding("letters", pat_str=".", mergeable_ranks={bytes([byte]): byte for byte in range(191)},
                       special_tokens={"<|endoftext|>": 191})

    models = [awake_model(cfg, eot_id=191), awake_model(dataclasses.replace(cfg, logit_cap=0), eot_id=191),
              awake_model(dataclasses.replace(cfg), eot_id=191, dtype=torch.bfloat16)]
    object.__setattr__(models[2].cfg, "fp8", True)      # sizes that FP8 cannot have, which do not matter here
    models[2].loss_kernel = functools.partial(train_gpt.fp8_losses_and_gradients,
                                              train_gpt.losses_and_gradient)
    flex = GPT(cfg, 191, flex={})

    def work() -> None:
        for model in models:
            held_out = HeldOut([tokens.flatten().numpy()], cfg, letters)
            losses_of = TokenLosses(model, World(cfg))
            held_out.evaluate(losses_of, 2, World(cfg))
            losses_of(tokens, tokens, likeliest=True)
            train_gpt.train(one_step(model, tokens))
        for flex.blocks in (seen_blocks, evaluated_blocks):
            context = flex.contexts(tokens)[0]
            context.mask()
        with torch.no_grad():
            context.attend(*torch.randn(3, 2, 10, 3, 12), 1.0)
    sizes = {**SIZES, "P": len(list(GPT(cfg, 191).parameters()))}
    assert len({*sizes.values()}) == len(sizes)
    assert wrong_shapes([train_gpt, evaluation], sizes, work, OWN) == []
    texts = [[191, 5], [191]]       # their lengths grow, so that no other file is looked at
    assert wrong_shapes([sampling], sizes, lambda: sampling.generate(models[0], texts, cfg), OWN) == []
    assert len(comments_of(inspect.getsource(train_gpt))) > 90


def one_step(model: GPT, tokens: torch.Tensor) -> SimpleNamespace:
    """What the training loop asks of a Run, for one step of these tokens."""
    world = World(model.cfg)
    return SimpleNamespace(
        cfg=model.cfg, model=model, optimizer=Optimizer(model, model.cfg, world), world=world, step=0,
        progress=0.0, batches=lambda: [Batch(tokens.numel(), [(tokens, tokens)])],
        backward=torch.Tensor.backward, accepts_step=lambda loss, norms, scale: True)
