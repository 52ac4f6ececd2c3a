"""Byte-pair encoding against outside oracles, and tokenizer folders.

Run: ./run.sh test tests/test_train_tokenizer.py
"""

import argparse
import contextlib
import errno
import hashlib
import inspect
import itertools
import json
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import regex
import requests
import tiktoken
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import run, torchrun
from tiktoken.load import read_file_cached
from tiktoken_ext import openai_public

import benchtop.tokenizer
import train_tokenizer
from benchtop import bpe, files, host, places
from benchtop.bpe import learn_merges, tokens_of
from benchtop.errors import UserError
from benchtop.held_out import Rule, rule_for
from benchtop.processes import Processes
from benchtop.sources import open_source
from benchtop.tokenizer import (
    DEMO_TEXT,
    PATTERNS,
    known_tokenizers,
    load_tokenizer,
    only_tokenizer,
    save_tokenizer,
    token_bytes,
    visible,
)

GPT2_IF_AT_HAND = benchtop.tokenizer.gpt2_if_at_hand        # which the fixture `bench` puts aside
LIBRARY = Path(argparse.__file__).read_text()


def textbook_bpe(pieces: dict[bytes, int], num_merges: int, min_count: int = 2) -> list[tuple[int, int, int]]:
    """Sennrich et al. 2016, word for word: count all pairs, merge the first of the best, and again."""
    words = [(list(piece), count) for piece, count in pieces.items()]
    merges = []
    for new in range(256, 256 + num_merges):
        counts = Counter()
        for word, count in words:
            for pair in itertools.pairwise(word):
                counts[pair] += count
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < min_count:
            break
        merges.append((*best, counts[best]))
        words = [(merged(word, best, new), count) for word, count in words]
    return merges


def merged(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """The word with every such pair, from left to right, made one token."""
    result = []
    for token in word:
        if result and (result[-1], token) == pair:
            result[-1] = new
        else:
            result.append(token)
    return result


def words(alphabet: bytes, longest: int = 24):
    return st.lists(st.sampled_from(alphabet), min_size=1, max_size=longest).map(bytes)


def corpora(*alphabets: bytes, counts: tuple[int, ...] = (1, 2, 3)):
    """Few letters, so that ties, runs and pairs of equal tokens abound."""
    return st.sampled_from(alphabets).flatmap(
        lambda letters: st.dictionaries(words(letters), st.sampled_from(counts), max_size=8))


# ------------------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------------------

@settings(max_examples=200)
@given(corpora(b"a", b"ab", b"abc", b"\x00\xff", bytes(range(256))), st.integers(0, 40), st.integers(1, 4))
def test_merges_are_those_of_the_textbook(pieces, num_merges, min_count):
    assert learn_merges(pieces, num_merges, min_count) == textbook_bpe(pieces, num_merges, min_count)


@given(corpora(b"a", b"ab", b"abc", bytes(range(256))), st.integers(1, 9))
def test_slots_at_once_do_not_change_the_merges(pieces, slots):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "SLOTS_AT_ONCE", slots)
        assert learn_merges(pieces, 40) == textbook_bpe(pieces, 40)


@settings(max_examples=60)
@given(corpora(b"a", b"ab", b"abc", b"\x00\xff", bytes(range(256))), st.integers(0, 40))
def test_torch_gives_the_same_merges(pieces, num_merges):
    assert learn_merges(pieces, num_merges, device="cpu") == textbook_bpe(pieces, num_merges)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_merges():
    pieces = Counter(piece.encode() for piece in regex.findall(PATTERNS["gpt4"], LIBRARY))
    assert learn_merges(pieces, 500, device="cuda") == learn_merges(pieces, 500)


@settings(max_examples=60)
@given(corpora(b"a", b"ab", b"abc", b"abcdef"))
def test_merges_are_those_of_huggingface_and_rustbpe(pieces):
    text = [" ".join([piece.decode()] * count) for piece, count in pieces.items()]
    learned = tokens_of(learn_merges(pieces, 1000))[256:]

    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2000, min_frequency=2, show_progress=False)
    other.train_from_iterator(text, trainer)
    merges = json.loads(other.to_str())["model"]["merges"]
    assert learned == [(left + right).encode() for left, right in merges]

    other = pytest.importorskip("rustbpe").Tokenizer()
    other.train_from_iterator(iter(text), 256 + len(learned), pattern=r"[^ ]+")
    assert learned == [bytes(token) for token, rank in other.get_mergeable_ranks()[256:]]


def test_real_text_gives_the_merges_of_rustbpe():
    text = LIBRARY + "Größe ёлка 東京 🙂 " * 9
    pieces = pieces_of(text, PATTERNS["gpt4"])
    other = pytest.importorskip("rustbpe").Tokenizer()
    other.train_from_iterator(iter([text]), 256 + 1000, pattern=PATTERNS["gpt4"])
    expected = [bytes(token) for token, rank in other.get_mergeable_ranks()]
    assert tokens_of(learn_merges(pieces, 1000)) == expected


@given(corpora(b"ab", b"abc", counts=(2**33, 2**33 + 1, 2**40)))
def test_counts_have_64_bits(pieces):
    assert learn_merges(pieces, 20) == textbook_bpe(pieces, 20)


@given(corpora(b"ab", b"abc"), st.randoms(use_true_random=False))
def test_the_order_of_pieces_does_not_matter(pieces, rng):
    shuffled = dict(rng.sample(list(pieces.items()), len(pieces)))
    assert learn_merges(shuffled, 20) == learn_merges(pieces, 20)


@given(corpora(b"ab", b"abc"))
def test_no_token_crosses_the_border_of_a_piece(pieces):
    for token in tokens_of(learn_merges(pieces, 100))[256:]:
        assert any(token in piece for piece in pieces)


@given(corpora(b"ab", b"abc"), st.integers(0, 20))
def test_each_merge_is_told_as_it_is_made(pieces, num_merges):
    told = []
    merges = learn_merges(pieces, num_merges, on_merge=lambda *merge: told.append(merge))
    assert told == merges


# ------------------------------------------------------------------------------------------------
# Splitting and counting
# ------------------------------------------------------------------------------------------------

def pieces_of(text: str, pattern: str) -> Counter[bytes]:
    bpe._set_pattern(pattern)
    return bpe.count_pieces([("", text)])[0]


def split_by_tiktoken(text: str, pattern: str) -> list[str]:
    """With every substring a token, each piece is one token."""
    raw = text.encode()
    substrings = {raw[start:end] for start in range(len(raw)) for end in range(start + 2, len(raw) + 1)}
    ranks = {token: rank for rank, token in enumerate([*tokens_of([]), *sorted(substrings)])}
    encoding = tiktoken.Encoding("all", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_single_token_bytes(token).decode() for token in encoding.encode_ordinary(text)]


# characters that this Python knows; of newer ones the two libraries may know different ones
known_characters = st.characters(exclude_categories=["Cs", "Cn"])
tricky = st.sampled_from([*" \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000'’sSſdmDtTkK1٣²½.,$_-"
                          "éÉßİǅʰªमि", "'ll", "'VE", "e\u0301", "👩‍👩‍👧"])


@settings(max_examples=150)
@given(st.lists(tricky | known_characters, max_size=12).map("".join), st.sampled_from(sorted(PATTERNS)))
def test_regex_and_tiktoken_split_alike(text, pattern):
    assert regex.findall(PATTERNS[pattern], text) == split_by_tiktoken(text, PATTERNS[pattern])


# as OpenAI published them with GPT-2's encoder.py and with tiktoken's first cl100k_base
PUBLISHED = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "nanochat": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
}


@settings(max_examples=150)
@given(st.lists(tricky | known_characters, max_size=12).map("".join), st.sampled_from(sorted(PATTERNS)))
def test_text_is_split_as_gpt2_and_gpt4_split_it(text, pattern):
    assert regex.findall(PATTERNS[pattern], text) == regex.findall(PUBLISHED[pattern], text)


@pytest.mark.parametrize(("pattern", "pieces"), [
    ("gpt2", ["pi", " 31415", ",", " 7", " 12"]),
    ("gpt4", ["pi", " ", "314", "15", ",", " ", "7", " ", "12"]),
    ("nanochat", ["pi", " ", "31", "41", "5", ",", " ", "7", " ", "12"])])
def test_numbers_are_split_by_as_many_digits_as_the_pattern_says(pattern, pieces):
    """As a tokenizer without merges splits them, and as learning does."""
    text = "pi 31415, 7 12"
    assert split_by_tiktoken(text, PATTERNS[pattern]) == regex.findall(PATTERNS[pattern], text) == pieces
    assert pieces_of(text, PATTERNS[pattern]) == Counter(piece.encode() for piece in pieces)


@given(st.text() | st.text(" \n\r\ta1'."), st.sampled_from(sorted(PATTERNS)))
def test_no_character_is_lost_in_splitting(text, pattern):
    assert "".join(regex.findall(PATTERNS[pattern], text)) == text
    counted = pieces_of(text, PATTERNS[pattern])
    assert sum(len(piece) * count for piece, count in counted.items()) == len(text.encode())


def test_the_list_of_white_characters_is_whole():
    every = "".join(map(chr, range(0x110000)))
    white = {*filter(str.isspace, every), *regex.findall(r"\s", every)}
    assert set(bpe.OTHER_WHITE) | {" ", "\n"} == white | {"\0"}


spaced = st.lists(st.sampled_from(" \n\0") | tricky | known_characters, max_size=30).map("".join)


@settings(max_examples=1000)
@given(st.lists(spaced, max_size=3), st.sampled_from(sorted(PATTERNS)))
def test_equal_segments_are_split_once_and_right(texts, pattern):
    for text in texts:
        assert "".join(bpe.segments(text)) == text or "\0" in text
    bpe._set_pattern(PATTERNS[pattern])
    wanted = Counter(piece.encode() for text in texts for piece in regex.findall(PATTERNS[pattern], text))
    assert bpe.count_pieces([("", text) for text in texts])[0] == wanted
    for text in texts:
        assert wanted or not text


def test_text_is_really_cut_into_segments():
    assert bpe.segments("a bc  d\n e,\n f ") == ["a", " bc", "  d\n e,\n f", " "]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("character", ["a", " ", "\n", "^", "1", "é", "🙂", "\u0301"])
def test_a_million_equal_characters_are_quick(character, pattern):
    started = time.perf_counter()
    pieces = pieces_of(character * 1_000_000, PATTERNS[pattern])
    merges = learn_merges(pieces, 1000)
    assert time.perf_counter() - started < 5
    assert sum(len(piece) * count for piece, count in pieces.items()) == len(character.encode()) * 1_000_000
    assert merges and max(len(piece.decode()) for piece in pieces) <= bpe.LONGEST_PIECE


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2048, 2049])
def test_a_long_piece_is_counted_in_parts(length):
    pieces = pieces_of(("a" * length + " ") * 3, PATTERNS["gpt2"])
    assert sum(len(piece) * count for piece, count in pieces.items()) == 3 * (length + 1)
    assert max(map(len, pieces)) <= bpe.LONGEST_PIECE


class Share(Processes):
    """One of several processes, alone."""

    def __init__(self, rank: int = 0, size: int = 1):
        super().__init__()
        self.rank, self.size = rank, size

    def gather_on_main(self, thing: object) -> list:
        return [thing]

    def same(self, thing: object) -> object:
        return thing if self.rank == 0 else None


def facts_of(source, samples=10**9, num_workers=1, world=None) -> tuple[Counter, dict]:
    sample = bpe.Sample(source, rule_for(source), samples)
    return bpe.count_sample(sample, PATTERNS["gpt4"], num_workers, world or Share())


def test_workers_do_not_change_the_counts(pages, monkeypatch):
    source = open_source("pages.jsonl")
    alone = facts_of(source)
    monkeypatch.setattr(bpe, "COUNT_CHARACTERS", 3000)
    for num_workers in (2, 3):
        assert facts_of(source, num_workers=num_workers) == alone


@settings(max_examples=20)
@given(batch=st.integers(1, 20_000), samples=st.integers(1, 40_000), size=st.integers(1, 4))
def test_processes_and_batches_do_not_change_the_counts(pages, batch, samples, size):
    source = open_source("pages.jsonl")
    pieces, sizes = facts_of(source, samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "COUNT_CHARACTERS", batch)
        shares = [facts_of(source, samples, world=Share(rank, size)) for rank in range(size)]
    added = sum((share for share, _ in shares), Counter())
    assert added == pieces and learn_merges(dict(sorted(added.items())), 99) == learn_merges(pieces, 99)
    for fact in ("documents", "characters", "bytes"):
        assert sum(share[fact] for _, share in shares) == sizes[fact]


@pytest.mark.parametrize("name", ["many.jsonl", "few.jsonl", "books", "book.txt"])
def test_held_out_documents_are_not_learned_from(bench, pages, write_rows, name):
    write_rows(bench / "many.jsonl", [f"{number} {text}" for number in range(20) for text in pages])
    write_rows(bench / "few.jsonl", pages)
    (bench / "books").mkdir()
    for number in range(5):
        (bench / f"books/{number}.txt").write_text("\n".join(f"{number} {text}" for text in pages))
    (bench / "book.txt").write_text("\n".join(pages))
    source = open_source(name)
    rule = rule_for(source)
    assert (rule.one_in > 0, rule.part > 0) == (name == "many.jsonl", name.startswith("book"))
    texts = [text for _, text in rule.documents(source)]
    kept = [text for text in texts if not rule.holds_out(text)]
    sample = bpe.Sample(source, rule, 10**9)
    assert [text for _, text in sample] == kept
    assert sample.held_out == [text for text in texts if rule.holds_out(text)] != []
    pieces, sizes = facts_of(source)
    assert sizes["documents"] == len(kept) and pieces == bpe.count_pieces([("", text) for text in kept])[0]


def test_a_source_too_small_to_hold_some_out_is_learned_from(bench):
    (bench / "one.txt").write_text("a few words")
    assert facts_of(open_source("one.txt"))[1]["documents"] == 1


@settings(max_examples=30)
@given(samples=st.integers(1, 20_000))
def test_samples_are_counted_in_characters(pages, samples):
    source = open_source("pages.jsonl")
    rule = rule_for(source)
    text = "".join(text for text in pages if not rule.holds_out(text))
    pieces, sizes = facts_of(source, samples)
    assert sizes["characters"] == samples
    assert sizes["bytes"] == sum(len(piece) * count for piece, count in pieces.items()) \
        == len(text[:samples].encode())


# ------------------------------------------------------------------------------------------------
# The tokenizer
# ------------------------------------------------------------------------------------------------

def save(name: str, merges: list, pattern: str = PATTERNS["gpt4"], facts: dict | None = None) -> Path:
    return save_tokenizer(name, merges, tokens_of(merges), pattern, facts or {}, "a script")


@pytest.fixture(scope="module", params=PATTERNS)
def trained(request, tmp_path_factory):
    """A tokenizer of 1,500 tokens from a part of Python's library, and its folder."""
    pattern = PATTERNS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "TOKENIZERS", tmp_path_factory.mktemp("tokenizers"))
        source = open_source("stdlib")
        sample = bpe.Sample(source, rule_for(source), 10**6)
        pieces, sizes = bpe.count_sample(sample, pattern, 1, Share())
        merges = train_tokenizer.learn(pieces, 1500 - 256, pattern, demo=False)
        folder = save("trained", merges, pattern, sizes | {"source": "stdlib"})
        return load_tokenizer("trained"), folder, merges


@settings(max_examples=70)
@given(st.text() | st.binary().map(lambda raw: raw.decode(errors="replace")) | st.lists(tricky).map("".join))
def test_any_text_comes_back(trained, text):
    tokenizer = trained[0]
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_any_character_comes_back(trained):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert trained[0].decode(trained[0].encode_ordinary(text)) == text


@settings(max_examples=80)
@given(corpora(b"ab", b"abc"), st.lists(st.sampled_from("abc")).map("".join))
def test_tokens_are_the_merges_applied_in_the_order_of_learning(pieces, text):
    merges = learn_merges(pieces, 50)
    ranks = {token: rank for rank, token in enumerate(tokens_of(merges))}
    encoding = tiktoken.Encoding("any", pat_str=PATTERNS["gpt4"], mergeable_ranks=ranks, special_tokens={})
    word = list(text.encode())
    for new, (left, right, _) in enumerate(merges, 256):
        word = merged(word, (left, right), new)
    assert encoding.encode_ordinary(text) == word


def test_huggingface_reads_the_same_tokenizer(trained):
    tokenizer, folder, _ = trained
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = random.Random(0)
    every = map(chr, range(0x110000))
    known = [character for character in every if unicodedata.category(character) not in ("Cs", "Cn", "Co")]
    texts = [LIBRARY, LIBRARY.upper(), LIBRARY.replace(" ", "   "), "".join(known),
             *("".join(rng.choices(" \n\t\r 0123456789abcé'.東🙂", k=50)) for _ in range(2000)),
             *("".join(rng.choices(known, k=50)) for _ in range(2000)),
             " " * 1000 + "x" + "\n" * 1000, "9" * 1000,
             "don't DON'T '' 'll'Re 👩‍👩‍👧‍👦 e\u0301 नमस्ते مرحبا ไทย"]
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    for text, encoded in zip(texts, other.encode_batch(texts), strict=True):
        assert encoded.ids == tokenizer.encode_ordinary(text)
        assert other.decode(encoded.ids) == text
    assert other.token_to_id("<|endoftext|>") == tokenizer.eot_token == other.get_vocab_size() - 1
    assert other.encode("a<|endoftext|>b").ids == tokenizer.encode("a<|endoftext|>b", allowed_special="all")


def test_every_id_has_its_bytes(trained):
    tokenizer, _, merges = trained
    table = token_bytes(tokenizer)
    assert table[:-1] == tokens_of(merges) and table[-1] == b"" and len(table) == tokenizer.n_vocab == 1501
    assert tokenizer.eot_token == 1500


# ------------------------------------------------------------------------------------------------
# The folder
# ------------------------------------------------------------------------------------------------

TRAIN = "train_tokenizer.py --source pages.jsonl --vocabsize 300 --samples 50000 --num_workers 1 --name"
FILES = {"ranks.tiktoken", "meta.json", "tokenizer.json", "merges.txt", "train_tokenizer.txt"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_complete_and_says_what_made_it(bench, command, pages):
    command(f"{TRAIN} pages")
    folder = bench / "tokenizers" / "pages"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name] and set(content(folder)) == FILES
    for module in (train_tokenizer, benchtop.tokenizer):
        assert all(f"    {name} " in module.__doc__ for name in FILES)

    meta = json.loads((folder / "meta.json").read_text())
    assert meta["ranks_sha256"] == hashlib.sha256((folder / "ranks.tiktoken").read_bytes()).hexdigest()
    assert meta["pattern"] == PATTERNS["gpt4"] and meta["special_tokens"] == {"<|endoftext|>": 300}
    assert (meta["format_version"], meta["name"]) == (1, folder.name)
    assert (meta["vocab_size"], meta["eot_id"]) == (301, 300)
    assert meta["vocabsize"] == 300 and meta["samples"] == 50000 and meta["source"].startswith("pages-")

    source = (folder / "train_tokenizer.txt").read_text()
    for name, module in (("train_tokenizer.py", train_tokenizer), ("benchtop/bpe.py", bpe)):
        assert f"# ---- {name}\n{Path(module.__file__).read_text()}" in source
    head, table = (folder / "merges.txt").read_text().split("\n\n")
    assert "300 tokens: the 256 bytes, and 44 merges" in head and f"documents of {meta['source']}." in head
    rows = table.splitlines()[1:]
    assert [int(row.split()[0]) for row in rows] == list(range(256, 300))
    for _, left, right, result, _ in map(str.split, rows):
        assert left + right == result or "\\x" in left + right     # half a character is written as its bytes


@pytest.mark.parametrize("flags, name", [
    ("", "gpt4regex_v300_n50000"), ("--regex gpt2 -v 280", "gpt2regex_v280_n50000"), ("-f mine", "mine"),
    ("-f mine_v9_n9 -v 280 -n 9e2", "mine_v9_n9"), ("--name tokenizers/mine/", "mine"),
    ("--name mine/", "mine"), ("--name ../{here}/tokenizers/mine", "mine"),
])
def test_the_folder_is_called_what_the_user_calls_it(bench, command, pages, flags, name):
    flags = flags.format(here=bench.name)
    command(f"{TRAIN.removesuffix(' --name')} {flags}")
    assert [path.name for path in (bench / "tokenizers").iterdir()] == [name]


def test_the_same_command_makes_the_same_bytes(bench, shell, pages):
    folder = bench / "tokenizers" / "pages"
    made = []
    for num_workers in (1, 2):
        result = shell(f"{TRAIN} pages --num_workers {num_workers}")
        assert result.returncode == 0 and not result.stderr
        made.append(content(folder))
        shutil.rmtree(folder)
    assert made[0] == made[1]


@pytest.mark.parametrize(("processes", "workers"), [(3, 1), (2, 2)])
def test_torchrun_makes_the_same_tokenizer(lab, processes, workers):
    """Without workers, and with them."""
    arguments = ["train_tokenizer.py", "--source", "text.jsonl", "--vocabsize", "400", "--samples", "30000",
                 "--num_workers", str(workers), "--name"]
    run(lab, *arguments, "alone")
    line = [*torchrun(processes), *arguments, "ranks"]
    # with workers from scratch: started from a fork, each process would import all libraries for them
    done = run(lab, *line[1:]) if workers == 1 else subprocess.run(
        line, cwd=lab, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote tokenizers/ranks") == 1
    alone, ranks = (content(lab / "tokenizers" / name) for name in ("alone", "ranks"))
    assert json.loads(alone.pop("meta.json")) | {"name": "ranks"} \
        == json.loads(ranks.pop("meta.json"))
    assert alone == ranks
    shutil.rmtree(lab / "tokenizers" / "ranks")
    shutil.rmtree(lab / "tokenizers" / "alone")


def test_a_wrong_flag_under_torchrun_is_said_once(lab):
    done = run(lab, *torchrun(2)[1:], "train_tokenizer.py", "--vocabsize", "7", expect=None)
    assert done.returncode and done.stderr.count("error: --vocabsize must be at least") == 1


def test_the_statistics_are_those_of_held_out_text(bench, command, pages, monkeypatch, capsys):
    command(f"{TRAIN} small --vocabsize 256")      # stands in for GPT-2: a token a byte
    monkeypatch.setattr(benchtop.tokenizer, "gpt2_if_at_hand", lambda: load_tokenizer("small"))
    command(f"{TRAIN} pages")
    statistics = json.loads((bench / "tokenizers/pages/meta.json").read_text())["statistics"]
    tokenizer = load_tokenizer("pages")
    rule = rule_for(open_source("pages.jsonl"))
    held_out = [text for text in pages if rule.holds_out(text)]
    ids = [token for text in held_out for token in tokenizer.encode_ordinary(text)]
    num_bytes = sum(len(text.encode()) for text in held_out)
    assert held_out and statistics["held_out_bytes"] == num_bytes
    assert statistics["bytes_per_token"] == num_bytes / len(ids) > 1
    assert statistics["share_of_tokens_used"] == len(set(ids)) / 300
    assert statistics["gpt2_bytes_per_token"] == 1
    longest = max((token for token in token_bytes(tokenizer) if len(set(token)) > 1), key=lambda token:
                  (len(token), [-byte for byte in token]))
    assert statistics["longest_tokens"][0] == visible(longest)
    assert f"{num_bytes / len(ids):.3f} bytes per token (GPT-2's: 1.000)" in capsys.readouterr().out


def test_a_tokenizer_without_held_out_text_says_so_and_has_no_made_up_numbers(bench, command, capsys):
    (bench / "one.txt").write_text("some text and some more text\n" * 9)
    command("train_tokenizer.py --source one.txt --vocabsize 260 --samples 99 --name one --num_workers 1")
    meta = json.loads((bench / "tokenizers/one/meta.json").read_text())
    assert set(meta["statistics"]) == {"longest_tokens"} and meta["held_out"] is None
    assert "note: too little text to hold some out; the tokenizer learns from all" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "TMPDIR"])
def test_gpt2_comes_from_tiktokens_cache_and_never_from_the_network(tmp_path, monkeypatch, variable):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")
    monkeypatch.setattr(requests, "get", refuse)
    for other in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)      # so that TMPDIR is read again
    # files that stand in for GPT-2's, where tiktoken itself looks for them
    contents = {url: url.encode() for url in benchtop.tokenizer.GPT2_FILES}
    hashes = {url: hashlib.sha256(content).hexdigest() for url, content in contents.items()}
    monkeypatch.setattr(benchtop.tokenizer, "GPT2_FILES", hashes)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: [
        read_file_cached(url, sha256) for url, sha256 in hashes.items()])
    assert benchtop.tokenizer.gpt2_if_at_hand() is None
    monkeypatch.setattr(requests, "get", lambda url: SimpleNamespace(
        content=contents[url], raise_for_status=lambda: None))
    tiktoken.get_encoding("gpt2")       # fills the cache
    monkeypatch.setattr(requests, "get", refuse)
    assert benchtop.tokenizer.gpt2_if_at_hand() == list(contents.values())
    damaged = next(path for path in tmp_path.rglob("*") if path.is_file())
    damaged.write_bytes(b"cut")
    assert benchtop.tokenizer.gpt2_if_at_hand() is None


@pytest.mark.parametrize("more, warns", [([], False), (["a word"], True)])
def test_a_tokenizer_of_other_text_of_the_same_name_is_warned_of(bench, command, pages, write_rows, capsys,
                                                                 more, warns):
    command(f"{TRAIN} pages --vocabsize 256")
    small = "\n".join(pages[:200])
    for name in ("one", "two"):     # both called `texts`
        (bench / name / "texts").mkdir(parents=True)
    (bench / "one/texts/book.txt").write_text(small)
    (bench / "two/texts/book.txt").write_text(small)
    if more:
        write_rows(bench / "two/texts/pages.jsonl", pages)      # now documents are held out, not parts
    command("train_tokenizer.py --source one/texts --name texts --vocabsize 256 --num_workers 1")
    command("download_fineweb.py --version two/texts --tokenizer texts --name texts --num_workers 1")
    note = "note: the tokenizer texts was trained on another version of this text (texts-"
    assert (note in capsys.readouterr().out) == warns


def test_a_tokenizer_that_held_nothing_out_has_seen_what_its_data_hold_out(bench):
    rule = Rule(16, test=None).facts()
    path = bench / "tokenizers/mine/meta.json"
    path.parent.mkdir(parents=True)
    for held_out, seen in [(None, True), (rule, False), *((damage, False) for damage in ({}, "", 0, [], 7))]:
        path.write_text(json.dumps({"source": "texts-1", "held_out": held_out}))
        manifest = {"tokenizer": "mine", "source": "texts-1", "held_out": rule}
        warning = benchtop.tokenizer.may_have_seen(manifest)
        assert ("so it has seen documents that are held out now" in warning) == seen


def test_text_is_made_ready_without_the_network(bench, command, pages, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(benchtop.tokenizer, "gpt2_if_at_hand", GPT2_IF_AT_HAND)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(bench / "empty"))
    command(f"{TRAIN} pages")
    command("benchtop/sources.py pages.jsonl")
    command("download_fineweb.py --version pages.jsonl --tokenizer pages --name pages --num_workers 1")
    assert "wrote data/pages" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="the network was asked"):
        tiktoken.get_encoding("gpt2")       # so the watch sees it


def test_gpt2s_files_are_those_that_tiktoken_wants():
    source = inspect.getsource(openai_public.gpt2)
    assert all(url in source and sha256 in source for url, sha256 in benchtop.tokenizer.GPT2_FILES.items())


def test_samples_are_what_memory_allows(bench, command, pages, monkeypatch, capsys):
    line = TRAIN.replace(" --samples 50000", "")
    source = open_source("pages.jsonl")
    growth = bpe.forecast(source, rule_for(source), PATTERNS["gpt4"])
    most = bpe.MOST_SAMPLES
    needs = {samples: growth.memory_mib(samples, 1, 1) for samples in (2**20, 2**27, most)}
    for samples, free in ((most, 10**6), (2**27, 2 * needs[2**27] + 1), (2**20, 1)):
        monkeypatch.setattr(host, "free_memory_mib", lambda free=free: free)
        command(f"{line} fits_{samples}")
        meta = json.loads((bench / "tokenizers" / f"fits_{samples}" / "meta.json").read_text())
        assert meta["samples"] == samples
        said = capsys.readouterr().out
        assert f"from at most {samples:,} characters will take about {needs[samples]:,.0f} MiB" in said
        assert (f"so --samples is {samples:,}" in said) == (samples == 2**27)
        assert ("more than is free" in said) == (samples == 2**20)


@pytest.mark.parametrize("letters, power", [("abc", 0.3), (None, 1)])
def test_the_forecast_of_memory_follows_the_text(bench, write_rows, letters, power):
    rng = random.Random(0)
    length = 4 if letters else 9
    letters = letters or list(map(chr, range(0x4e00, 0x5000)))      # nearly every clause is new
    write_rows(bench / "text.jsonl", ["".join(rng.choices(letters, k=length)) + "," for _ in range(40_000)])
    growth = bpe.forecast(open_source("text.jsonl"), Rule(), PATTERNS["gpt4"])
    assert growth.power == pytest.approx(power, abs=0.1)
    pieces = pieces_of("\n".join(text for _, text in open_source("text.jsonl")), PATTERNS["gpt4"])
    assert growth.pieces == pytest.approx(len(pieces), rel=0.1)
    more = growth.memory_mib(10**9, 1, 1) - growth.memory_mib(growth.characters, 1, 1)
    assert more > 10_000 if power == 1 else more < 100


def test_documents_that_tiktoken_panics_at_do_not_lose_a_tokenizer(bench, command, write_rows, pages):
    held_out = next(text for text in (" " * (10**6 + extra) for extra in range(10**3))
                    if Rule().holds_out(text))
    rng = random.Random(0)
    white = ["".join(rng.choices(" \t", k=900)) for _ in range(1200)]
    many = [str(number) for number in range(5000)]      # so many that one in 64 is held out
    write_rows(bench / "pages.jsonl", [held_out, *white, *pages, *many])
    assert rule_for(open_source("pages.jsonl")) == Rule()
    command(f"{TRAIN.replace('50000', '5000000')} odd")
    assert set(content(bench / "tokenizers" / "odd")) == FILES


def test_one_large_document_is_counted_in_parts(monkeypatch):
    text = " ".join(LIBRARY.split()) * 3
    pieces = pieces_of(text, PATTERNS["gpt4"])
    longest = []
    real = bpe.segments
    monkeypatch.setattr(bpe, "segments", lambda part: longest.append(len(part)) or real(part))
    monkeypatch.setattr(bpe, "ENCODE_CHARACTERS", 10_000)
    assert pieces_of(text, PATTERNS["gpt4"]) == pieces and len(longest) > 5 and max(longest) <= 10_000


def test_the_merging_runs_on_the_device_that_is_named(bench, command, refusal, pages, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    said = refusal(f"{TRAIN} pages --device xpu")
    assert "--device xpu needs an Intel GPU" in said and said.endswith("use --device cpu")
    command(f"{TRAIN} pages --device auto")
    assert set(content(bench / "tokenizers" / "pages")) == FILES


def test_two_of_the_same_do_not_mix(bench, refusal, pages):
    with files.locked(bench / "tokenizers" / ".pages.lock"):
        assert "another process is writing the same" in refusal(f"{TRAIN} pages")


def test_two_conversions_of_one_name_do_not_mix(bench, monkeypatch):
    def convert_old(*_):
        return benchtop.tokenizer.convert(bench / "old.pkl", "mine")
    ranks = {bytes([byte]): byte for byte in range(256)}
    (bench / "old.pkl").write_bytes(pickle.dumps({"pat_str": PATTERNS["gpt4"], "mergeable_ranks": ranks}))
    monkeypatch.setattr(benchtop.tokenizer, "huggingface_json", convert_old)      # while the first is saved
    with pytest.raises(UserError, match="another process is writing the same"):
        convert_old()
    assert not list((bench / "tokenizers").iterdir())


def test_a_full_disk_is_one_line(bench, refusal, pages, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    said = refusal(f"{TRAIN} pages")
    assert re.fullmatch("train_tokenizer.py: error: No space left on device: .*/ranks.tiktoken", said)
    assert not list((bench / "tokenizers").iterdir())


@pytest.mark.parametrize("module, step", [
    (bpe, "count_pieces"), (bpe, "learn_merges"),
    (benchtop.tokenizer, "huggingface_json"), (benchtop.tokenizer, "merges_table"),
])
def test_an_interruption_leaves_nothing(bench, command, pages, monkeypatch, capsys, module, step):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupt)
        with pytest.raises(SystemExit) as end:
            command(f"{TRAIN} pages")
    assert end.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert not (bench / "tokenizers").exists() or not list((bench / "tokenizers").iterdir())
    command(f"{TRAIN} pages")
    assert set(content(bench / "tokenizers" / "pages")) == FILES


def test_what_a_killed_run_left_is_no_hindrance(bench, command, pages):
    rubbish = bench / "tokenizers" / ".pages.partial"
    rubbish.mkdir(parents=True)
    (rubbish / "rubbish").write_text("half a file")
    assert known_tokenizers() == []
    command(f"{TRAIN} pages")
    assert set(content(bench / "tokenizers" / "pages")) == FILES and not rubbish.exists()


def test_a_second_run_reuses_the_tokenizer(bench, command, pages, capsys):
    command(f"{TRAIN} pages")
    times = {path: path.stat().st_mtime_ns for path in bench.rglob("*")}
    capsys.readouterr()
    command(f"{TRAIN} pages")
    assert capsys.readouterr().out.startswith("reusing tokenizers/pages")
    assert {path: path.stat().st_mtime_ns for path in bench.rglob("*")} == times


@pytest.mark.parametrize("put", [Path.touch, lambda path: path.symlink_to("nothing")])
@pytest.mark.parametrize("flags", ["", "--convert old.pkl"])
def test_a_name_that_is_taken_is_refused_before_the_work(bench, refusal, pages, monkeypatch, put, flags):
    (bench / "tokenizers").mkdir()
    put(bench / "tokenizers/pages")
    for work in ("count_sample", "tokens_of"):
        monkeypatch.setattr(bpe, work, lambda *_, **__: pytest.fail("it works in vain"))
    said = refusal(f"train_tokenizer.py {flags} --name pages" if flags else f"{TRAIN} pages")
    assert "tokenizers/pages exists" in said and "choose another --name" in said


@pytest.mark.parametrize("name", ["ranks.tiktoken", "meta.json"])
def test_a_damaged_tokenizer_is_refused_with_the_way_to_another(bench, command, refusal, pages, name):
    command(f"{TRAIN} pages")
    (bench / "tokenizers/pages" / name).write_bytes(b"[]")
    said = refusal(f"{TRAIN} pages")
    assert said.endswith(f"rm -r {bench}/tokenizers/pages")
    shutil.rmtree(bench / "tokenizers/pages")       # as it says
    command(f"{TRAIN} pages")


def test_other_settings_under_the_same_name_are_refused(bench, command, refusal, pages, write_rows):
    command(f"{TRAIN} pages")
    assert "a different regex;" in refusal(f"{TRAIN} pages --regex gpt2")
    write_rows(bench / "pages.jsonl", [*pages, "one more"])
    assert "a different source;" in refusal(f"{TRAIN} pages")
    write_rows(bench / "other.jsonl", pages)
    assert "a different source;" in refusal(f"{TRAIN} pages --source other.jsonl")
    write_rows(bench / "pages.jsonl", pages)
    assert "a different vocabsize, samples;" in refusal(f"{TRAIN} pages --vocabsize 301 --samples 50001")
    (bench / "tokenizers/else").mkdir()
    assert "tokenizers/else exists but is not a tokenizer" in refusal(f"{TRAIN} else")


def test_the_same_command_reuses_a_tokenizer_when_less_memory_is_free(command, pages, monkeypatch, capsys):
    line = f"{TRAIN.replace(' --samples 50000', '')} pages"
    command(line)
    monkeypatch.setattr(host, "free_memory_mib", lambda: 1)
    command(line)
    assert "reusing tokenizers/pages" in capsys.readouterr().out


@pytest.mark.parametrize("flags, hint", [
    ("--vocabsize 255", "at least 256"),
    ("--vocabsize 10000000000", "at most 16,777,216"),
    ("--vocabsize 0", "at least 1"),
    ("--vocabsize many", "whole number"),
    ("--samples 0", "at least 1"),
    ("--num_workers 0", "at least 1"),
    ("--regex gpt5", "invalid choice"),
    ("--name ../pages", "'../pages'"),
    ("--name gpt2", "is the name of GPT-2's own"),
    ("--name " + "x" * 300, "at most 200"),
    ("--source empty.jsonl", "no text to learn from"),
    ("--source nowhere", "nowhere"),
    ("--source 10B pages.jsonl", "cannot be mixed"),
    ("--source 10B-gpt2", "has tokens, not text"),
])
def test_a_wrong_flag_ends_in_one_line(bench, refusal, pages, flags, hint):
    (bench / "empty.jsonl").write_text('{"text": ""}\n')
    assert hint in refusal(f"{TRAIN} pages {flags}")
    assert not (bench / "tokenizers").exists() or not list((bench / "tokenizers").iterdir())


def test_too_little_text_makes_a_smaller_vocabulary_and_a_note(bench, command, capsys):
    (bench / "tiny.txt").write_text("aaaa bbbb aaaa")
    command("train_tokenizer.py --source tiny.txt --vocabsize 9999 --samples 99 --name tiny --num_workers 1")
    tokenizer = load_tokenizer("tiny")
    said = capsys.readouterr().out
    assert f"the vocabulary ends at {tokenizer.n_vocab - 1:,} tokens instead of 9,999" in said
    assert 256 < tokenizer.n_vocab < 270


def test_the_smallest_vocabulary_is_the_bytes(bench, command, pages):
    command(f"{TRAIN} bytes --vocabsize 256")
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode_ordinary("é") == list("é".encode()) and tokenizer.eot_token == 256


def test_replaced_bytes_are_told(bench, command, capsys):
    (bench / "cut.txt").write_bytes("Größe und Maß ".encode() * 9 + b"Gr\xc3")
    command("train_tokenizer.py --source cut.txt --vocabsize 260 --name cut --num_workers 1")
    assert "replaced 1 invalid UTF-8 sequence by U+FFFD in cut.txt (1)" in capsys.readouterr().out


def test_the_demo_shows_the_text_in_coloured_tokens(command, capsys, pages):
    command(f"{TRAIN} shown --demo")
    said = capsys.readouterr().out
    plain = re.sub("\033\\[[0-9;]*m", "", said)
    assert plain.count(DEMO_TEXT) == 4 and said.count(DEMO_TEXT) == 0
    assert "Merge 1: " in plain and "Merge 10: " in plain and "After all 44 merges" in plain


# ------------------------------------------------------------------------------------------------
# Tokenizers made by gpt-lab
# ------------------------------------------------------------------------------------------------

def pickled(path: Path, **changes) -> Path:
    """A tokenizer as gpt-lab pickled it."""
    merges = learn_merges({b"hello": 5, b"help": 3, b"hell": 2}, 10)
    ranks = {token: rank for rank, token in enumerate(tokens_of(merges))}
    path.write_bytes(pickle.dumps({"pat_str": PATTERNS["gpt4"], "mergeable_ranks": ranks,
                                   "script_content": "print('made it')"} | changes))
    return path


def test_an_old_tokenizer_becomes_a_folder(bench, command):
    pickled(bench / "old_v260_n99.pkl")
    command("train_tokenizer.py --convert old_v260_n99.pkl")
    folder = bench / "tokenizers" / "old_v260_n99"
    assert set(content(folder)) == FILES
    assert (folder / "train_tokenizer.txt").read_text() == "print('made it')"
    tokenizer = load_tokenizer("old_v260_n99")
    merges = learn_merges({b"hello": 5, b"help": 3, b"hell": 2}, 10)
    assert token_bytes(tokenizer)[:-1] == tokens_of(merges) and tokenizer.eot_token == 256 + len(merges)
    rows = [row.split() for row in (folder / "merges.txt").read_text().split("\n\n")[1].splitlines()[1:]]
    assert [row[3] for row in rows] == [token.decode() for token in tokens_of(merges)[256:]]
    assert all(row[1] + row[2] == row[3] for row in rows)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("changes", [
    {"pat_str": Evil()}, {"script_content": Evil()}, {"mergeable_ranks": {b"a": Evil()}}, {"more": print},
    {"mergeable_ranks": {b"a": 0}}, {"mergeable_ranks": {bytes([byte]): byte for byte in range(255)}},
    {"mergeable_ranks": {**{bytes([byte]): byte for byte in range(256)}, b"abc": 256}},
    {"mergeable_ranks": {**{bytes([byte]): byte for byte in range(256)}, b"ab": 300}},
    {"mergeable_ranks": {**{bytes([byte]): byte for byte in range(256)}, "ab": 256}},
    {"pat_str": "("}, {"pat_str": 5}, {"script_content": 5}, {"script_content": "\ud800"}, {"pat_str": "x*"},
    {"mergeable_ranks": {bytes([byte]): float(byte) for byte in range(256)}},
], ids=itertools.count())
def test_a_pickle_that_is_something_else_is_one_line(bench, refusal, changes):
    pickled(bench / "old.pkl", **changes)
    said = refusal("train_tokenizer.py --convert old.pkl --name x")
    assert "old.pkl is not a tokenizer made by gpt-lab" in said
    assert not (bench / "executed").exists() and not (bench / "tokenizers").exists()


@settings(max_examples=150)
@given(st.binary() | st.builds(lambda cut, flips: (cut, flips), st.integers(0, 10**6), st.integers(0, 10**6)))
def test_no_damaged_pickle_raises_another_exception(bench, raw):
    whole = pickled(bench / "old.pkl").read_bytes()
    if isinstance(raw, tuple):
        cut, flip = raw
        damaged = bytearray(whole)
        damaged[flip % len(whole)] ^= 1 << cut % 8
        raw = bytes(damaged) if cut % 2 else whole[:cut % len(whole)]
    (bench / "old.pkl").write_bytes(raw)
    with contextlib.suppress(UserError):
        benchtop.tokenizer.convert(bench / "old.pkl", "old")
    shutil.rmtree(bench / "tokenizers", ignore_errors=True)


def test_what_people_read_is_not_ambiguous():
    texts = ["\\n", "\n", " ", "␣", "\\", "\t", "\\xe2", "é"]
    shown = [visible(text.encode()) for text in texts]
    assert shown == ["\\\\n", "\\n", "␣", "\\u2423", "\\\\", "\\t", "\\\\xe2", "é"]
    assert visible("é".encode()[:1]) == "\\xc3"


def test_a_conversion_overwrites_nothing(bench, saved, refusal):
    pickled(bench / "small.pkl")
    assert "tokenizers/small exists" in refusal("train_tokenizer.py --convert small.pkl")


# ------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(bench) -> Path:
    """A small tokenizer's folder, tokenizers/small."""
    merges = learn_merges({b"hello": 5, b"help": 3}, 10)
    return save("small", merges)


@pytest.fixture
def good_meta(saved) -> dict:
    return json.loads((saved / "meta.json").read_text())


@pytest.mark.parametrize("name", [
    "../small", "/etc/passwd", "", ".", "..", ".small", "small\n", "a b", "small.pkl.pkl", "nosuch", "/",
    "data/small", "tokenizers/..", "tokenizers/small/ranks.tiktoken", "x" * 300, "\0", "a/\0",
])
def test_only_a_known_name_loads(saved, name):
    with pytest.raises(UserError):
        load_tokenizer(name)


@pytest.mark.parametrize("typed", ["small", "small/", "tokenizers/small", "./tokenizers/small//",
                                   "{here}/tokenizers/small", "tokenizers/small.pkl"])
def test_a_path_as_the_shell_completes_it_is_a_name(saved, bench, typed):
    assert load_tokenizer(typed.format(here=bench)).name == "small"


def test_a_name_stands_for_the_only_folder_that_earlier_versions_made_of_it(bench):
    merges = learn_merges({b"hello": 5, b"help": 3}, 10)
    save("mine_v300_n50000", merges)
    save("mine_too", merges)
    assert load_tokenizer("mine").name == load_tokenizer("mine_v300_n50000").name == "mine_v300_n50000"
    save("mine_v299_n50000", merges)
    with pytest.raises(UserError, match="name of one: mine_v299_n50000, mine_v300_n50000"):
        load_tokenizer("mine")
    save("mine", merges)
    assert load_tokenizer("mine").name == "mine"


def test_a_name_with_sizes_stands_for_the_folder_that_has_them(command, pages):
    command(f"{TRAIN} mine")
    assert load_tokenizer("mine_v300_n50000.pkl").name == "mine"
    with pytest.raises(UserError, match="did you mean mine"):
        load_tokenizer("mine_v301_n50000")


@pytest.mark.parametrize("typed, says", [
    ("smal", "there is no tokenizer smal; did you mean small? To make smal: python train_tokenizer.py "),
    ("odl", "there is no tokenizer odl; did you mean old_v30_n50? To make odl: python train_tokenizer.py "),
    ("nosuch", "no tokenizer nosuch, only old_v30_n50, small; to make nosuch: python train_tokenizer.py "),
])
def test_a_wrong_name_is_answered_with_the_nearest_and_a_command(saved, monkeypatch, typed, says):
    save("old_v30_n50", [])
    with pytest.raises(UserError) as refused:
        load_tokenizer(typed)
    assert says in str(refused.value)
    advice = str(refused.value).split(": python ")[1]
    monkeypatch.setattr(sys, "argv", advice.split())
    assert train_tokenizer.parse_arguments().name == typed


def test_text_that_is_named_as_a_tokenizer_is_answered_with_the_command_for_it(saved, bench):
    (bench / "notes.txt").write_text("some text")
    with pytest.raises(UserError, match=r"there is no tokenizer notes.txt.* make notes.txt: python train_"
                                        r"tokenizer.py .* --name notes.txt --source notes.txt$"):
        load_tokenizer("notes.txt")


def test_the_only_tokenizer_needs_no_name(saved):
    assert only_tokenizer() == "small"
    save("other", [])
    with pytest.raises(UserError, match="choose a tokenizer with --tokenizer: other, small"):
        only_tokenizer()
    shutil.rmtree(places.TOKENIZERS)
    with pytest.raises(UserError, match=r"python train_tokenizer\.py --vocabsize 4096 --name mine, or use"):
        only_tokenizer()


def test_a_pkl_suffix_is_left_away_with_a_notice(saved, capsys):
    assert load_tokenizer("small.pkl").name == "small"
    said = capsys.readouterr()
    assert "reading small.pkl as small" in said.err and not said.out


def test_gpt2_needs_the_network_once(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="go online once"):
        load_tokenizer("gpt2")


@settings(max_examples=50)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_ranks_is_noticed(saved, place, bit):
    whole = (saved / "ranks.tiktoken").read_bytes()
    damaged = bytearray(whole)
    damaged[place % len(whole)] ^= 1 << bit
    (saved / "ranks.tiktoken").write_bytes(damaged)
    with pytest.raises(UserError, match="SHA-256"):
        load_tokenizer("small")
    (saved / "ranks.tiktoken").write_bytes(whole)


@pytest.mark.parametrize("name", ["ranks.tiktoken", "meta.json"])
def test_a_missing_file_is_noticed(saved, name):
    (saved / name).unlink()
    with pytest.raises(UserError):
        load_tokenizer("small")


@pytest.mark.parametrize("damage", [
    {"special_tokens": {}}, {"special_tokens": {"<|x|>": 266}}, {"special_tokens": {"<|endoftext|>": 10**12}},
    {"special_tokens": {"<|endoftext|>": 0}, "vocab_size": None}, {"special_tokens": {}, "vocab_size": 266},
    {"vocab_size": 300}, {"pattern": "("}, {"pattern": 7}, {"pattern": "\ud800"}, {"format_version": 2},
])
def test_a_meta_that_does_not_fit_is_noticed(saved, good_meta, damage):
    (saved / "meta.json").write_text(json.dumps(good_meta | damage))
    with pytest.raises(UserError):
        load_tokenizer("small")


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"7", b"null", b"{}", b"[" * 100_000, b"1" * 5000, b"\xff",
])
def test_a_meta_that_is_no_json_object_is_noticed(saved, raw):
    (saved / "meta.json").write_bytes(raw)
    with pytest.raises(UserError):
        load_tokenizer("small")


json_keys = st.just("<|endoftext|>") | st.text(max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_keys, inner, max_size=3), max_leaves=5)


@settings(max_examples=150)
@given(data=st.data())
def test_no_meta_raises_another_exception(saved, good_meta, data):
    meta = dict(good_meta)
    key = data.draw(st.sampled_from(sorted(meta)))
    if data.draw(st.booleans()):
        meta[key] = data.draw(json_values)
    else:
        del meta[key]
    (saved / "meta.json").write_text(json.dumps(meta))
    try:
        assert load_tokenizer("small").eot_token == good_meta["eot_id"]
    except UserError:
        assert meta.get(key) != good_meta[key]
