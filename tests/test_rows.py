"""Training batches: a pure function of (manifest, seed, step). Run: ./run.sh test tests/test_rows.py"""

import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchtop import batches
from benchtop.batches import Rows, batch_of, micro_batch_shape
from benchtop.errors import UserError
from train_gpt import Config

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
    # besides, an epoch has the <|endoftext|> of documents, and not those that parts get
    assert seen.total() <= rows.num_tokens <= min(seen.total() + sum(map(len, shards)), rows.bases[-1])


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


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(2, 12), st.integers(2, 30), st.integers(0, 3))
def test_rows_hold_as_many_tokens_as_they_say(shards, seq_len, max_doc_len, seed):
    """Counted one by one; an <|endoftext|> that was added stands before the middle of a document."""
    try:
        rows = rows_of(shards_of(*shards), seq_len, max_doc_len, seed)
    except UserError:
        return
    first_of_document = {int(shard[begin + 1]) for shard in rows.shards
                         for begin in np.flatnonzero(shard[:-1] == EOT) if shard[begin + 1] != EOT}
    held = added = 0
    for number in range(rows.num_rows):
        inputs, targets = (part.tolist() for part in rows.row(number))
        read = [*inputs, targets[-1] if targets[-1] >= 0 else None]
        held += len(read)
        added += sum(here == EOT and there not in (EOT, None) and there not in first_of_document
                     for here, there in pairwise(read))
    last = [[int(part[-1]) for part in rows.row(number)] for number in range(rows.num_rows)]
    ends = sum(token == EOT or target in (EOT, -1) for token, target in last)       # not seen what follows
    assert held - added - ends <= rows.num_tokens <= min(held - added, rows.bases[-1])


@pytest.mark.parametrize(("documents", "seq_len", "max_doc_len", "held"), [
    ([9] * 4, 8, 100, 36), ([9, 9, 9, 5], 8, 100, 27), ([25], 8, 100, 25), ([17], 8, 5, 15), ([9], 3, 2, 9)])
def test_the_tokens_of_rows_are_those_of_the_data(documents, seq_len, max_doc_len, held):
    """[17] is 5 and thrice 4 with an <|endoftext|> each: in two rows of 9, three are not of the data."""
    assert rows_of(shards_of(documents), seq_len, max_doc_len).num_tokens == held


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
    predicted = sum(target >= 0 for _, targets in wanted for target in targets)
    assert rows.targets_in_step(2, 6) == predicted
    for rank in range(world_size):
        batch = batch_of(rows, cfg, 2, rank, world_size)
        assert batch.num_targets == predicted       # of all processes
        theirs = list(rows.micro_batches(2, cfg, rank, world_size))
        for (inputs, targets), (their_inputs, their_targets) in zip(batch.micro_batches, theirs, strict=True):
            assert torch.equal(inputs, their_inputs) and torch.equal(targets, their_targets)


def test_data_too_small_for_a_row_are_refused():
    with pytest.raises(UserError, match="--seq_len 512"):
        rows_of(shards_of([20, 30]), seq_len=512)


def test_a_plan_of_ten_million_tokens_is_made_without_a_loop_over_them():
    """Python walks over rows only, of which there is one for some 1,200 tokens; so it takes a second."""
    rng = np.random.default_rng(0)
    shard = rng.integers(0, EOT, 10_000_000).astype(np.uint16)
    shard[0] = shard[rng.integers(0, len(shard), 20_000)] = EOT
    lines = Counter[str]()

    def trace(frame, event, _):
        if frame.f_code.co_filename != batches.__file__:
            return None
        lines[event] += 1
        return trace
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        rows = rows_of([shard], seq_len=1024, max_doc_len=2048)
        planned = lines["line"]
        rows.numbers(10**6, 4)
    finally:
        sys.settrace(before)
    assert rows.num_rows > 8000 and planned < 10 * rows.num_rows
    assert lines["line"] - planned < 100        # any step is looked up
