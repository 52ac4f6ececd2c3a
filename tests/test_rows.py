"""Training batches: a pure function of (manifest, seed, step). Run: ./run.sh test tests/test_rows.py"""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from documents import UserError
from train_gpt import GPT, Candidates, Config, Rows, micro_batch_shape, softmax_groups

EOT = 60000


def shards_of(*shards: list[int]) -> list[np.ndarray]:
    """Shards of documents of these lengths; every token but <|endoftext|> exists once in all of them."""
    token, made = 0, []
    for lengths in shards:
        tokens = []
        for length in lengths:
            tokens += [EOT, *range(token, token + length - 1)]
            token += length - 1
        made.append(np.array(tokens, dtype=np.uint16))
    return made


def rows_of(shards: list[np.ndarray], seq_len: int = 8, max_doc_len: int = 100, seed: int = 0) -> Rows:
    cfg = config(seq_len=seq_len, batch_tokens=seq_len, max_doc_len=max_doc_len, seed=seed)
    return Rows(shards, cfg, EOT)


def config(**knobs) -> Config:
    return Config(**{"seq_len": 8, "batch_tokens": 32, "vocab_size": EOT + 1, **knobs})


lengths = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(2, 12), st.integers(2, 30), st.integers(0, 3))
def test_an_epoch_has_each_token_at_most_once_in_rows_that_start_like_documents(
        shards, seq_len, max_doc_len, seed):
    try:
        rows = rows_of(shards_of(*shards), seq_len, max_doc_len, seed)
    except UserError:
        assert sum(map(sum, shards)) < 4 * seq_len + max_doc_len * 4    # only tiny data make no row
        return
    seen: Counter[int] = Counter()
    for number in range(rows.num_rows):
        inputs, targets = rows.row(number)
        assert inputs[0] == EOT and len(inputs) == len(targets) == seq_len
        read = [*inputs.tolist(), *targets[-1:][targets[-1:] >= 0].tolist()]
        seen.update(token for token in read if token != EOT)
        # between two <|endoftext|> stand consecutive tokens of one document
        for here, there in pairwise(read):
            assert there == here + 1 or EOT in (here, there)
    assert max(seen.values(), default=1) == 1


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(2, 12), st.integers(2, 30))
def test_every_target_is_the_true_successor(shards, seq_len, max_doc_len):
    """Within a document the next token, at its end <|endoftext|>; nothing where one was cut for length."""
    made = shards_of(*shards)
    last_of_document = {int(shard[end - 1]) for shard in made
                        for end in [*np.flatnonzero(shard == EOT)[1:], len(shard)]}
    try:
        rows = rows_of(made, seq_len, max_doc_len)
    except UserError:
        return
    for number in range(rows.num_rows):
        inputs, targets = (part.tolist() for part in rows.row(number))
        assert rows.num_targets[number] == sum(target >= 0 for target in targets)
        for place, (token, target) in enumerate(zip(inputs, targets, strict=True)):
            if token == EOT or target == token + 1:
                continue
            if target == EOT:
                assert token in last_of_document
            else:
                assert target == -1 and token not in last_of_document
                assert inputs[place + 1:place + 2] in ([], [EOT])


def test_documents_are_cut_at_max_doc_len():
    rows = rows_of(shards_of([31, 17, 25]), seq_len=20, max_doc_len=6)
    for number in range(rows.num_rows):
        inputs, _ = rows.row(number)
        starts = [*np.flatnonzero(inputs == EOT), len(inputs)]
        assert max(np.diff(starts)) <= 6


def test_little_is_dropped():
    rng = np.random.default_rng(0)
    shards = shards_of(rng.integers(2, 400, 200).tolist())
    rows = rows_of(shards, seq_len=64)
    assert rows.num_rows * 64 > 0.85 * len(shards[0])


def test_a_step_is_a_pure_function_of_the_seed():
    shards = shards_of([30, 20, 50, 9, 80], [40, 33])
    cfg = config()
    first, again, other = rows_of(shards), rows_of(shards), rows_of(shards, seed=1)
    for step in (9, 0, 5):
        assert first.numbers(step, 4).tolist() == again.numbers(step, 4).tolist()
    batches = [torch.cat([inputs for inputs, _ in rows.micro_batches(3, cfg)])
               for rows in (first, again, other)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_every_epoch_has_all_rows_in_another_order():
    rows = rows_of(shards_of([200]))
    numbers = np.concatenate([rows.numbers(step, 5) for step in range(rows.num_rows)])
    epochs = numbers.reshape(5, rows.num_rows)
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows.num_rows))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5


@pytest.mark.parametrize("micro_batch_tokens", [8, 16, 24, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_a_step_is_the_same_for_any_number_of_ranks_and_micro_batches(world_size, micro_batch_tokens):
    rows = rows_of(shards_of([300, 200, 11, 47, 5]))
    cfg = config(batch_tokens=48, micro_batch_tokens=micro_batch_tokens)
    whole = [rows.row(number) for number in rows.numbers(2, 6)]
    wanted = sorted((inputs.tolist(), targets.tolist()) for inputs, targets in whole)
    got, shapes = [], set()
    for rank in range(world_size):
        batches = list(rows.micro_batches(2, cfg, rank, world_size))
        assert len(batches) == micro_batch_shape(cfg, world_size)[0]
        for inputs, targets in batches:
            shapes.add(inputs.shape)
            got += [(row, target) for row, target in zip(inputs.tolist(), targets.tolist(), strict=True)
                    if max(target) >= 0]
    assert sorted(got) == wanted
    assert len(shapes) == 1     # kernels are compiled for one shape
    assert rows.targets_in_step(2, 6) == sum(target >= 0 for _, targets in wanted for target in targets)


def test_data_too_small_for_a_row_are_refused():
    with pytest.raises(UserError, match="--seq_len 512"):
        rows_of(shards_of([20, 30]), seq_len=512)


def test_a_plan_of_ten_million_tokens_takes_seconds(record_property):
    import time
    rng = np.random.default_rng(0)
    shard = rng.integers(0, EOT, 10_000_000).astype(np.uint16)
    shard[0] = shard[rng.integers(0, len(shard), 20_000)] = EOT
    begun = time.perf_counter()
    rows = rows_of([shard], seq_len=1024, max_doc_len=2048)
    rows.numbers(10**6, 4)
    assert time.perf_counter() - begun < 5


# ------------------------------------------------------------------------------------------------
# The sample of a sampled softmax
# ------------------------------------------------------------------------------------------------

VOCABULARY = 3000


def natural_rows(cfg: Config, num_tokens: int = 200_000) -> Rows:
    """Rows of tokens that are as unevenly frequent as words."""
    random = np.random.default_rng(5)
    frequency = 1 / np.arange(10, VOCABULARY + 9)
    tokens = random.choice(VOCABULARY - 1, num_tokens, p=frequency / frequency.sum())
    tokens[::40] = VOCABULARY - 1
    return Rows([tokens.astype(np.uint16)], cfg, VOCABULARY - 1)


def sampling(**knobs) -> Config:
    return Config(**{"vocab_size": VOCABULARY, "seq_len": 64, "batch_tokens": 8192, **knobs})


def targets_of(rows: Rows, cfg: Config, step: int, group: int) -> np.ndarray:
    targets = np.stack([rows.row(number)[1] for number in rows.numbers(step, cfg.rows_per_step)])
    chosen = targets[:, group::softmax_groups(cfg)]
    return chosen[chosen >= 0]


def test_a_sample_has_all_targets_once_and_rises():
    cfg = sampling()
    rows = natural_rows(cfg)
    candidates = Candidates(rows, cfg)
    assert candidates.num_groups == 4
    for step in (0, 3, 60):
        tokens, log_counts = candidates.of(step)
        assert tokens.shape == log_counts.shape == (4, candidates.size)
        for group in range(4):
            assert (tokens[group].diff() > 0).all() and tokens[group].max() < VOCABULARY
            assert set(targets_of(rows, cfg, step, group)) <= set(tokens[group].tolist())
        assert (log_counts >= 0).all()


def test_a_sample_is_a_pure_function_of_data_seed_and_step():
    cfg = sampling()
    rows = natural_rows(cfg)
    first, again = Candidates(rows, cfg), Candidates(rows, cfg)
    again.of(7)
    assert torch.equal(first.of(2)[0], again.of(2)[0]) and torch.equal(first.of(2)[1], again.of(2)[1])
    assert not torch.equal(first.of(2)[0], first.of(3)[0])
    other = Candidates(rows, sampling(seed=1))
    assert not torch.equal(first.of(2)[0], other.of(2)[0])


def test_the_counts_of_a_sample_add_up_to_all_tokens():
    """Summed over samples with their counts, values come to their sum over the vocabulary, on average."""
    cfg = sampling()
    candidates = Candidates(natural_rows(cfg, 2_000_000), cfg)
    values = np.random.default_rng(6).lognormal(size=(VOCABULARY, 3))
    values[:, 1] /= np.arange(10, VOCABULARY + 10)              # large for frequent tokens
    values[:, 2] *= np.arange(10, VOCABULARY + 10)              # for rare ones
    sums, steps = np.zeros(3), 150
    for step in range(100, 100 + steps):        # not those that the frequencies are from
        for tokens, log_counts in zip(*candidates.of(step), strict=True):
            sums += np.exp(log_counts.numpy()) @ values[tokens.numpy()]
    np.testing.assert_allclose(sums / (4 * steps) / values.sum(0), 1, atol=0.02)


def test_the_size_of_a_sample_is_by_rule_or_given():
    cfg = sampling()
    rows = natural_rows(cfg)
    most = max(len(set(targets_of(rows, cfg, step, group))) for step in range(25) for group in range(4))
    size = Candidates(rows, cfg).size
    assert size % 64 == 0 and 1.1 * most <= size <= 1.2 * most + 64
    assert Candidates(rows, sampling(softmax_sample=most)).size == most
    assert Candidates(rows, sampling(softmax_sample=VOCABULARY)).of(0)[1].abs().max() == 0
    for wrong in (most - 1, VOCABULARY + 1):
        with pytest.raises(UserError, match=f"--softmax_sample must be between {most}, .* and 3000"):
            Candidates(rows, sampling(softmax_sample=wrong))


def test_a_step_with_too_many_targets_has_no_sample():
    cfg = sampling()
    candidates = Candidates(natural_rows(cfg), cfg)
    candidates.size = 100
    assert candidates.of(0) is None


def test_the_model_finds_each_target_in_the_sample_of_its_group():
    cfg = sampling(num_layers=2, model_dim=16, num_heads=2)
    rows = natural_rows(cfg)
    model = GPT(cfg, VOCABULARY - 1)
    torch.nn.init.normal_(model.head)
    inputs, targets = next(rows.micro_batches(3, cfg))

    def own_logits(x, head, places, _log_counts):
        return (x * head[places]).sum(-1)[places >= 0].sum()
    model.loss = own_logits
    x = model.hidden(inputs)
    wanted = (x * model.head[targets]).sum(-1)[targets >= 0].sum()
    torch.testing.assert_close(model(inputs, targets, sample=Candidates(rows, cfg).of(3)), wanted)


def test_no_softmax_is_sampled_where_a_step_has_half_of_the_vocabulary():
    cfg = sampling(seq_len=63, batch_tokens=63 * 128)
    assert softmax_groups(cfg) == 1
    assert Candidates(natural_rows(cfg), cfg).size == 0


@pytest.mark.parametrize(("seq_len", "batch", "groups"), [
    (512, 8192, 4), (512, 524288, 32), (1024, 524288, 64), (512, 512, 1), (48, 8160, 1), (63, 8064, 1),
    (2048, 393216, 128), (8, 8192, 1)])
def test_targets_are_dealt_to_groups_that_divide_the_row(seq_len, batch, groups):
    assert softmax_groups(sampling(seq_len=seq_len, batch_tokens=batch)) == groups
