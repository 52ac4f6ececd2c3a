"""The model, its masks and its loss, against plain formulas. Run: ./run.sh test tests/test_model.py"""

import ast
import dataclasses
import inspect
import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

import train_gpt
from train_gpt import (
    GPT,
    ChunkedLoss,
    Config,
    DenseMask,
    Stage,
    attend,
    block_mask,
    chunk_loss_and_gradient,
)

EOT = 100


def small_config(**knobs) -> Config:
    return Config(**{"vocab_size": 101, "num_layers": 4, "num_heads": 2, "model_dim": 16, "seq_len": 32,
                     "batch_tokens": 64, "value_embeddings": 1, **knobs})


def awake_model(cfg: Config, eot_id: int = EOT, **options) -> GPT:
    """A model whose zero-initialised weights are random, so that every path matters."""
    torch.manual_seed(1)
    model = GPT(cfg, eot_id, **options)
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


def test_no_token_sees_the_future():
    model, tokens = awake_model(small_config()), some_tokens(1, 20, documents=False)
    before = model.logits(tokens)
    for place in range(1, 20):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % EOT
        after = model.logits(changed)
        assert torch.equal(before[0, :place], after[0, :place])
        assert not torch.equal(before[0, place:], after[0, place:])


def test_no_token_sees_another_document():
    model, tokens = awake_model(small_config()), some_tokens(1, 30, documents=False)
    tokens[0, 10] = tokens[0, 20] = EOT
    before = model.logits(tokens)
    changed = tokens.clone()
    changed[0, 10:20] = (changed[0, 10:20] + 1) % EOT
    changed[0, 10] = EOT
    after = model.logits(changed)
    assert torch.equal(before[0, 20:], after[0, 20:])
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.equal(before[0, 11:20], after[0, 11:20])


def test_still_dimensions_of_a_key_are_those_of_the_token_before():
    k = torch.randn(2, 3, 6, 8)
    begins = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    turned = train_gpt.rotate(k, *train_gpt.rotary_table(6, 8, torch.device("cpu")))
    turning, still = [0, 1, 4, 5], [2, 3, 6, 7]
    assert torch.equal(turned[..., still], k[..., still]) and (turned != k)[:, :, 1:, turning].all()
    made = train_gpt.offset_keys(turned, begins)
    assert torch.equal(made[..., turning], turned[..., turning])
    for text, place in itertools.product(range(2), range(6)):
        is_first = place == 0 or begins[text, place]
        before = torch.zeros(3, 4) if is_first else k[text, :, place - 1, still]
        assert torch.equal(made[text, :, place, still], before)


def test_windows_end_where_they_say():
    """With one layer a token depends on exactly the tokens in its window, and on the one before those, which
    the first one's key carries."""
    cfg = small_config(num_layers=1, value_embeddings=0, long_window=5)
    model, tokens = awake_model(cfg), some_tokens(1, 24, documents=False)
    model.smear.data.zero_()        # it would carry each token one place further
    before = model.logits(tokens)
    changed = tokens.clone()
    changed[0, 8] += 1
    moved = (before != model.logits(changed)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [8, 9, 10, 11, 12, 13]


def test_layers_that_are_not_awake_are_left_out_and_named():
    tokens = some_tokens(2, 32)
    for depth in (1, 3, 5):
        model = awake_model(small_config(num_layers=5, value_embeddings=2))
        asleep = model.asleep(Stage(depth))
        model(tokens, tokens, Stage(depth)).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (name in asleep), (depth, name)
        assert bool(asleep) == (depth < 5)
    fresh = GPT(small_config(num_layers=5), EOT)
    assert torch.equal(fresh.hidden(tokens, Stage(1)), fresh.hidden(tokens))    # they begin as identities


def test_windows_grow_over_training():
    cfg = small_config(seq_len=512, batch_tokens=512, long_window=400, short_window=200)
    model = GPT(cfg, EOT)
    tokens = some_tokens(1, 512, documents=False)

    def reach(window_frac: float) -> list[int]:
        return [int(mask.window) for mask in model.masks(tokens, window_frac)]
    assert reach(0) == [128] * 4
    assert reach(0.5) == [128, 128, 128, 200]
    assert reach(1) == [200, 200, 200, 400]


@pytest.mark.parametrize("window", [1, 7, 64])
def test_mask_is_causal_and_document_and_window(window):
    docs = (some_tokens(3, 33) == EOT).cumsum(1)
    # equal keys share the weight, and a value for each place tells who had a share
    same, places = torch.zeros(3, 1, 33, 33), torch.eye(33).expand(3, 1, 33, 33)
    weights = attend(same, same, places, DenseMask(docs, torch.tensor(window)), 1.0)
    for batch in range(3):
        for query in range(33):
            for key in range(33):
                seen = key <= query and query - key < window and docs[batch, key] == docs[batch, query]
                assert bool(weights[batch, 0, query, key]) == bool(seen)


@pytest.mark.parametrize("queries_at_once", [512, 16])
def test_dense_attention_is_that_of_torch_with_its_gradients(queries_at_once, monkeypatch):
    monkeypatch.setattr(train_gpt, "QUERIES_AT_ONCE", queries_at_once)
    torch.manual_seed(0)
    docs = (some_tokens(2, 40) == EOT).cumsum(1)
    place = torch.arange(40)
    seen = train_gpt.sees(place[:, None], place, docs[:, :, None], docs[:, None], torch.tensor(9))[:, None]
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(2, 3, 40, 8, dtype=torch.float64)
    ours = attend(q, k, v, DenseMask(docs, torch.tensor(9)), 0.7)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.7)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), (q, k, v)),
                               torch.autograd.grad((theirs * weight).sum(), (q, k, v)))


@pytest.mark.parametrize("length", [128, 512, 700])
@pytest.mark.parametrize("window", [1, 100, 128, 300, 10**6])
@pytest.mark.parametrize("documents", [1, 4, 60])
def test_block_masks_from_documents_are_those_of_the_whole_mask(length, window, documents):
    """Every block that torch finds by evaluating T x T is there, and the full ones are exactly torch's."""
    begins = torch.zeros(2, length, dtype=torch.int32)
    begins[:, :: max(1, length // documents)] = 1
    begins[1] = begins[1].roll(37)
    docs, window = begins.cumsum(1, dtype=torch.int32), torch.tensor(window)
    mask = block_mask(docs, window)

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
    docs = (some_tokens(2, 256) == EOT).cumsum(1)
    q, k, v = torch.randn(3, 2, 2, 256, 16)
    with torch.no_grad():
        dense = attend(q, k, v, DenseMask(docs, torch.tensor(50)), 0.7)
        flex = attend(q, k, v, block_mask(docs, torch.tensor(50)), 0.7)
    torch.testing.assert_close(dense, flex)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_has_the_gradients_of_dense_attention():
    torch.manual_seed(0)
    docs = (some_tokens(2, 256) == EOT).cumsum(1).cuda()
    q, k, v = torch.randn(3, 2, 2, 256, 64, device="cuda").unbind()
    gradients = []
    for make in (lambda: DenseMask(docs, torch.tensor(50).cuda()),
                 lambda: block_mask(docs, torch.tensor(50).cuda())):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        torch.compile(attend)(*leaves, make(), 0.7).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("flex", [None, {}])
def test_compiled_layers_serve_all_windows_and_documents(flex):
    """One graph for every layer, step and window, and one before and behind them, equal to the eager model.
    Forward only."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cfg = small_config(model_dim=64, seq_len=256, batch_tokens=512, long_window=200, short_window=130,
                       value_embeddings=0)
    compiled, eager = awake_model(cfg, flex=flex), awake_model(cfg)
    compiled.compile_parts()
    with torch.no_grad():
        for seed, frac in enumerate((0, 0.7, 0.9, 1)):
            tokens = torch.randint(0, 101, (2, 256), generator=torch.Generator().manual_seed(seed))
            stage = Stage(4, frac)
            torch.testing.assert_close(compiled.hidden(tokens, stage), eager.hidden(tokens, stage),
                                       rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("rows", [1, 5, 16, 37])
def test_chunked_loss_is_the_plain_loss_with_its_gradients(rows, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(rows, 12, requires_grad=True)
    weight = (3 * torch.randn(128, 12)).requires_grad_()
    padding = torch.where(torch.arange(128) < 101, 0.0, -math.inf)
    targets = torch.randint(0, 101, (rows,))
    targets[::4] = -1
    logits = train_gpt.soft_cap(x @ weight[:101].T, 15)
    plain = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    wanted = torch.autograd.grad(2.5 * plain, (x, weight))
    monkeypatch.setattr(train_gpt, "chunk_rows", lambda x, columns: 8)
    chunked = ChunkedLoss.apply(x, weight, targets, padding, 15, chunk_loss_and_gradient)
    got = torch.autograd.grad(2.5 * chunked, (x, weight))
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(got, wanted)


def sample_of(targets: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample for each of two groups: its targets and others, which count as more than themselves."""
    tokens, counts = [], []
    generator = torch.Generator().manual_seed(3)
    for group in (targets[:, ::2], targets[:, 1::2]):
        wanted = torch.zeros(101, dtype=torch.bool)
        wanted[group[group >= 0]] = True
        order = (torch.rand(101, generator=generator) + wanted).argsort(descending=True)
        tokens.append(order[:size].sort().values)
        counts.append(1 + 5 * torch.rand(size, generator=generator))
    return torch.stack(tokens), torch.stack(counts).log()


@pytest.mark.parametrize("cap", [15, 0])
def test_a_sampled_softmax_has_its_targets_and_the_counts_of_the_others(cap):
    """Against a plain loop over targets: all but the target itself count as many times as they say."""
    model = awake_model(small_config(logit_cap=cap))
    inputs = some_tokens(2, 32)
    targets = inputs.roll(-1, 1)
    targets[:, 7] = -1
    tokens, log_counts = sample_of(targets, 70)
    x = model.hidden(inputs)
    plain = []
    for row, place in itertools.product(range(2), range(32)):
        target, group = targets[row, place], place % 2
        if target >= 0:
            z = train_gpt.soft_cap(model.head @ x[row, place], cap)
            others = tokens[group] != target
            counted = log_counts[group][others].exp() * z[tokens[group][others]].exp()
            plain.append((z[target].exp() + counted.sum()).log() - z[target])
    plain = torch.stack(plain).sum()
    wanted = torch.autograd.grad(plain, list(model.parameters()))
    sampled = model(inputs, targets, sample=(tokens, log_counts))
    torch.testing.assert_close(sampled, plain)
    torch.testing.assert_close(torch.autograd.grad(sampled, list(model.parameters())), wanted,
                               rtol=1e-4, atol=1e-5)


def test_a_sample_of_all_tokens_is_the_full_softmax():
    model = awake_model(small_config())
    inputs = some_tokens(2, 32)
    targets = inputs.roll(-1, 1)
    everything = torch.arange(101).expand(2, -1), torch.zeros(2, 101)
    torch.testing.assert_close(model(inputs, targets, sample=everything), model(inputs, targets))


def test_a_sampled_loss_is_the_sum_of_its_rows():
    """So that micro-batches and processes do not change it."""
    model = awake_model(small_config())
    inputs = some_tokens(4, 32)
    targets = inputs.roll(-1, 1)
    sample = sample_of(targets, 90)
    rows = [model(inputs[row:row + 1], targets[row:row + 1], sample=sample) for row in range(4)]
    torch.testing.assert_close(torch.stack(rows).sum(), model(inputs, targets, sample=sample))


@pytest.fixture
def fp8_product(monkeypatch):
    """FP8 products, where this CPU has them: without AVX-512, oneDNN refuses some."""
    real = train_gpt.fp8_product

    def product(*factors):
        try:
            return real(*factors)
        except RuntimeError as error:
            if "could not create a primitive" not in str(error):
                raise
            pytest.skip("this CPU has no FP8 products")
    monkeypatch.setattr(train_gpt, "fp8_product", product)


@pytest.mark.usefixtures("fp8_product")
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


@pytest.mark.usefixtures("fp8_product")
@pytest.mark.parametrize("counts", [0.0, 1.5])
def test_the_loss_in_fp8_is_near_that_in_bfloat16(monkeypatch, counts):
    torch.manual_seed(0)
    x = torch.randn(96, 32, dtype=torch.bfloat16).requires_grad_()
    weight = (0.5 * torch.randn(128, 32)).requires_grad_()
    log_counts, targets = counts * torch.rand(128), torch.randint(0, 128, (96,))
    monkeypatch.setattr(train_gpt, "chunk_rows", lambda x, columns: 64)
    losses, gradients = [], []
    for fp8 in (False, True):
        losses.append(ChunkedLoss.apply(x, weight, targets, log_counts, 15, chunk_loss_and_gradient, fp8))
        gradients.append([gradient.float() for gradient in torch.autograd.grad(losses[-1], (x, weight))])
    assert losses[0] != losses[1]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    for plain, fp8 in zip(*gradients, strict=True):
        assert (fp8 - plain).norm() < 0.1 * plain.norm()


def test_fp8_says_what_it_needs(monkeypatch):
    assert "needs --dtype bfloat16" in train_gpt.fp8_problem(torch.device("cpu"), torch.float32)
    def no_product(*_):
        raise RuntimeError("could not create a primitive")
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "fp8_product", no_product)
        assert "does not work on this CPU" in train_gpt.fp8_problem(torch.device("cpu"), torch.bfloat16)
        patch.setattr(train_gpt, "fp8_product", lambda *_: None)
        assert not train_gpt.fp8_problem(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for capability, works in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, has=capability: has)
        assert bool(train_gpt.fp8_problem(torch.device("cuda"), torch.bfloat16)) != works
    with pytest.raises(train_gpt.UserError, match="--seq_len must be a multiple of 16 for --fp8"):
        small_config(fp8=True, seq_len=24, batch_tokens=48)


def test_chunks_are_small():
    for rows, columns in ((8192, 8256), (100, 50304), (7, 64), (3, 2**24)):
        chunk = train_gpt.chunk_rows(torch.zeros(rows, 1), columns)
        assert 1 <= chunk <= rows and chunk * columns * 4 <= max(2**27, 4 * columns)


@pytest.mark.parametrize("rows", [3, 8, 64])
def test_token_losses_are_the_cross_entropy_of_the_logits(rows, monkeypatch):
    monkeypatch.setattr(train_gpt, "chunk_rows", lambda x, columns: rows)
    model, tokens = awake_model(small_config()), some_tokens(2, 32)
    targets = tokens.roll(-1, 1)
    targets[1, 5:9] = -1
    wanted = F.cross_entropy(model.logits(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1,
                             reduction="none")
    losses = model.token_losses(tokens, targets)
    torch.testing.assert_close(losses.flatten(), wanted)
    torch.testing.assert_close(model(tokens, targets), wanted.sum())


@pytest.mark.parametrize("rows", [3, 8, 64])
@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_likeliest_tokens_are_those_of_the_logits(rows, how, monkeypatch):
    monkeypatch.setattr(train_gpt, "chunk_rows", lambda x, columns: rows)
    model, tokens = awake_model(small_config()), some_tokens(2, 32)
    with torch.no_grad():
        # padding columns would win, if they took part; tokens 7 and 9 tie wherever they do
        model.head[101:] = 100 * torch.sign(model.hidden(tokens)[0, 0])
        model.head[7] = model.head[9] = 3 * model.head[9]
    if how == "compiled":
        model.losses_kernel = torch.compile(train_gpt.chunk_losses, dynamic=False)
    best = model.logits(tokens).argmax(-1)
    assert (best == 7).any() and not (best == 9).any()      # the first of equal ones
    targets = torch.where(torch.arange(64).view(2, 32) % 3 == 0, (best + 1) % 101, best)
    targets[best == 7] = 9
    targets[0, 3], targets[1, 5:9] = 7, -1
    losses, likeliest = model.token_losses(tokens, targets, likeliest=True)
    assert torch.equal(likeliest, (targets == best).float())
    assert 0 < likeliest.sum() < 60
    torch.testing.assert_close(losses, model.token_losses(tokens, targets))


def test_padding_columns_are_never_predicted():
    model, tokens = awake_model(small_config()), some_tokens(2, 32)
    with torch.no_grad():
        # they would win, if they took part
        model.head[101:] = 100 * torch.sign(model.hidden(tokens)[0, 0])
    assert model.cfg.padded_vocab_size == 128
    assert model.logits(tokens).shape[-1] == 101
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    # a token's loss is bounded by twice the cap; a padding column would cost that much
    assert loss < 2 * 32 * 31
    assert torch.equal(model.head.grad[101:], torch.zeros(27, 16))


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
    sampled = GPT(cfg, EOT).flops_per_token(Stage(4, softmax_sample=40))
    assert sampled == GPT(cfg, EOT).flops_per_token() - 6 * (128 - 40) * 16
    windowed = GPT(small_config(long_window=8), EOT).flops_per_token()
    assert windowed == pytest.approx(6 * matrices + 12 * 16 * 4 * keys, rel=0.03)


# ------------------------------------------------------------------------------------------------
# Shape comments
# ------------------------------------------------------------------------------------------------

SIZES = {"B": 2, "T": 10, "D": 36, "H": 3, "K": 12, "F": 180, "V": 192, "L": 4, "Q": 5, "J": 1,
         "G": 2, "S": 40}


def size_of(word: str, sizes: dict[str, int]) -> int:
    """`3H` is 3 times H, `BT` B times T, `K/2` half of K."""
    top, _, bottom = word.partition("/")
    top, bottom = (math.prod(int(part) if part.isdigit() else sizes[part]
                             for part in re.findall(r"\d+|[A-Z]", product)) for product in (top, bottom))
    return top // bottom


def test_shape_comments_are_true(monkeypatch):
    """Run the model with pairwise different sizes, and compare each tensor with the comment on its line."""
    monkeypatch.setattr(train_gpt, "QUERIES_AT_ONCE", SIZES["Q"])
    source = Path(train_gpt.__file__).read_text(encoding="utf-8").splitlines()
    model_lines = range(inspect.getsourcelines(DenseMask)[1],
                        inspect.getsourcelines(ChunkedLoss)[1])
    said = {number: re.findall(r"\(((?:[\w/]+(?:, )?)*)\)", comment[1])
            for number, line in enumerate(source, 1) if number in model_lines
            and (comment := re.search(r" # (\((?:[\w/]+(?:, )?)*\)(?:, \((?:[\w/]+(?:, )?)*\))*)$", line))}
    statements = {node.end_lineno: node for node in ast.walk(ast.parse("\n".join(source)))
                  if isinstance(node, ast.Assign | ast.Return) and node.end_lineno in said}
    checked = set()

    def compare(number: int, tensors: list, sizes: dict[str, int]) -> None:
        shapes = said[number] * (len(tensors) if len(said[number]) == 1 else 1)
        for shape, tensor in zip(shapes, tensors, strict=True):
            if isinstance(tensor, torch.Tensor):
                wanted = tuple(size_of(word, sizes) for word in filter(None, shape.split(", ")))
                assert tuple(tensor.shape) == wanted, f"line {number}: {source[number - 1].strip()}"
                checked.add(number)

    def named(frame, node: ast.Assign) -> list:
        targets = [item for target in node.targets
                   for item in (target.elts if isinstance(target, ast.Tuple) else [target])]
        return [frame.f_locals.get(target.id) for target in targets if isinstance(target, ast.Name)]

    def trace(frame, event, value):
        if frame.f_code.co_filename != train_gpt.__file__:
            return None
        sizes = dict(SIZES)
        if frame.f_code.co_name == "chunk_loss_and_gradient":
            sizes["N"], sizes["V"] = frame.f_locals["logits"].shape
        elif frame.f_code.co_name == "chunk_losses":
            sizes["N"] = len(frame.f_locals["x"])
        waiting = []

        def inside(frame, event, value):
            while waiting:
                node = waiting.pop()
                compare(node.end_lineno, named(frame, node), sizes)
            if event == "return":
                number = next((line for line, node in statements.items() if isinstance(node, ast.Return)
                               and node.lineno <= frame.f_lineno <= line), None)
                if number:
                    compare(number, list(value) if isinstance(value, tuple) else [value], sizes)
            for node in statements.values():
                if isinstance(node, ast.Assign) and node.lineno <= frame.f_lineno <= node.end_lineno:
                    waiting.append(node)
            return inside
        return inside

    cfg = Config(vocab_size=192, num_layers=4, num_heads=3, model_dim=36, mlp_ratio=5, seq_len=10,
                 batch_tokens=20, value_embeddings=1, num_samples=2, sample_tokens=1)
    model = awake_model(cfg, eot_id=191)
    tokens = torch.randint(0, 191, (2, 10))
    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        model(tokens, tokens).backward()
        sample = torch.tensor([sorted(list(dict.fromkeys([*group.flatten().tolist(), *range(191)]))[:40])
                               for group in (tokens[:, ::2], tokens[:, 1::2])])
        model(tokens, tokens, sample=(sample, torch.zeros(2, 40))).backward()
        awake_model(dataclasses.replace(cfg, logit_cap=0), eot_id=191)(tokens, tokens).backward()
        model.token_losses(tokens, tokens)
        model.token_losses(tokens, tokens, likeliest=True)
        model.logits(tokens)
        GPT(cfg, 191, flex={}).masks(tokens, 1.0)
    finally:
        sys.settrace(previous)
    unchecked = set(statements) - checked
    assert len(checked) > 30
    assert not unchecked, [source[line - 1].strip() for line in sorted(unchecked)]
