"""Learn a byte-level BPE tokenizer from text, exactly.

    python train_tokenizer.py                                    # 50,256 tokens from Python's own library
    python train_tokenizer.py --vocabsize 8192 --source 'books/*.parquet' --name books
    python train_tokenizer.py --samples 100000 --vocabsize 1000 --name readmetokenizer --demo

The text is split into pieces (words with their space, numbers, runs of punctuation) and each piece into its
bytes. Then, until the vocabulary is full, the two neighbouring tokens that occur together most often become
a new token.

    >>> learn_merges({b"aaabdaaabac": 1}, 3, min_count=1)     # the example of Wikipedia's article on BPE
    [(97, 97, 4), (97, 98, 2), (256, 257, 2)]

Rules that make the result exact: every pair of neighbours counts, in 64 bits, times the occurrences of its
piece; of pairs with equal counts the one with the smaller left id wins, then the one with the smaller right
id; within a piece, pairs are merged from left to right and never overlap (`aaa` becomes `aa` `a`); no pair
crosses the border of a piece; learning ends early when no pair occurs twice. Held-out documents
(documents.py) are not looked at.

It leaves a folder tokenizers/NAME_vVOCABSIZE_nSAMPLES, whole or not at all:

    ranks.tiktoken       one token a line: base64 of its bytes, space, id
    meta.json            pattern, special tokens, sizes, what it was trained on, SHA-256 of the ranks
    tokenizer.json       the same tokenizer for Hugging Face tokenizers
    merges.txt           what was learned when, for people
    train_tokenizer.txt  this source
"""

import argparse
import base64
import contextlib
import hashlib
import heapq
import importlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

import documents
from documents import Document, Source, UserError, positive

Array = Any         # of numpy or torch

ROOT = Path(__file__).resolve().parent
TOKENIZERS = ROOT / "tokenizers"
FORMAT_VERSION = 1
END_OF_TEXT = "<|endoftext|>"
LONGEST_PIECE = 1024        # characters; a longer piece is counted in parts, so that no text stalls learning
ENCODE_CHARACTERS = 500_000     # a longer text is counted and encoded in parts of this length
SMALLEST_PART = 1000        # characters; where tiktoken panics even then, a text has no tokens
MIN_COUNT = 2               # a pair must occur this often to become a token
MOST_TOKENS = 2**24         # as many ids a tokenizer may have
MOST_SAMPLES = 2**30        # characters that are learned from unless told otherwise
BYTES_PER_PIECE, BYTES_PER_BYTE = 160, 38       # of memory, for a distinct piece and for a byte of one
FORECAST_CHARACTERS = 2_000_000     # of text whose pieces tell how much memory all will take
LEAST_HELD_OUT, MOST_HELD_OUT = 200_000, 4_000_000      # characters of held-out text to measure the result on
COUNT_CHARACTERS = 8_000_000        # of text that a worker counts at a time
SLOTS_AT_ONCE = 2**22       # of the array of all pieces, when its pairs are first counted
BORDER, MERGED = -1, -2     # in that array: between pieces, and where a token no longer begins
OTHER_WHITE = ("\0\t\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
               "\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000")    # white but for space and newline; and 0

PATTERNS = {
    "gpt4": (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
             r"|\s*[\r\n]|\s+(?!\S)|\s+"),
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}

DEMO_TEXT = (
    "In the beginning every letter stands alone; "
    "then the most frequent neighbours become one, again and again.\n"
    'for i in range(1024): print(f"{i:>4} costs ${i * 0.03:.2f}")   # 3.14159, 2.71828\n'
    "Unbelievably, antidisestablishmentarianism and Donaudampfschifffahrtsgesellschaft are words; "
    "naïve café 東京 🙂 too.\n"
)


# ------------------------------------------------------------------------------------------------
# Load
# ------------------------------------------------------------------------------------------------

def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer in tokenizers/NAME; `gpt2` is tiktoken's own GPT-2 encoding.

    returns  a tiktoken Encoding whose eot_token is the id of <|endoftext|>
    raises   UserError if there is no such tokenizer or its files do not fit together
    """
    name = clean_name(name)
    if name == "gpt2":
        return load_gpt2()
    folder = TOKENIZERS / name
    if not (folder / "meta.json").is_file():
        raise UserError(f"there is no tokenizer {name} in {TOKENIZERS}"
                        f"{', only ' + ', '.join(known_tokenizers()) if known_tokenizers() else ''}; "
                        "make one with: python train_tokenizer.py --name NAME --vocabsize N")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        ranks_file = (folder / "ranks.tiktoken").read_bytes()
        if hashlib.sha256(ranks_file).hexdigest() != meta["ranks_sha256"]:
            raise UserError(f"{folder}/ranks.tiktoken is not the file that meta.json describes "
                            "(its SHA-256 differs); train the tokenizer again")
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(f"{folder} has format {meta['format_version']}, "
                            f"this program reads {FORMAT_VERSION}")
        ranks = {base64.b64decode(token): int(rank)
                 for token, rank in map(bytes.split, ranks_file.splitlines())}
        if (meta["special_tokens"], meta["vocab_size"]) != ({END_OF_TEXT: len(ranks)}, len(ranks) + 1):
            raise ValueError(f"special_tokens and vocab_size do not fit {len(ranks)} ranks")
        return tiktoken.Encoding(name, pat_str=meta["pattern"], mergeable_ranks=ranks,
                                 special_tokens=meta["special_tokens"], explicit_n_vocab=meta["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"the tokenizer in {folder} is damaged ({type(error).__name__}: {error}); "
                        "train it again") from error


def load_gpt2() -> tiktoken.Encoding:
    import requests
    try:
        return tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError) as error:
        raise UserError("tiktoken could not fetch its gpt2 encoding; go online once, "
                        "or train a tokenizer with: python train_tokenizer.py") from error


def clean_name(name: str) -> str:
    """A tokenizer's name without the `.pkl` of older days; never a path."""
    if name.endswith(".pkl"):
        print(f"note: tokenizers are folders now; reading {name} as {name[:-4]}", file=sys.stderr)
        name = name[:-4]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise UserError("a tokenizer's name has only letters, digits, '.', '_' and '-', 200 at most; "
                        f"{name!r} does not")
    return name


def known_tokenizers() -> list[str]:
    return sorted(path.parent.name for path in TOKENIZERS.glob("[!.]*/meta.json"))


def token_bytes(tokenizer: tiktoken.Encoding) -> list[bytes]:
    """The bytes of each token id; none for special tokens."""
    table = [b""] * tokenizer.n_vocab
    for token, rank in tokenizer._mergeable_ranks.items():
        table[rank] = token
    return table


def ranks_file_of(tokens: list[bytes]) -> bytes:
    """The content of ranks.tiktoken for tokens in the order of their ids."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def tokenizer_sha256(tokenizer: tiktoken.Encoding) -> str:
    """What identifies a tokenizer: the SHA-256 of its ranks file and its pattern, one after the other."""
    tokens = sorted(tokenizer._mergeable_ranks, key=tokenizer._mergeable_ranks.get)
    return hashlib.sha256(ranks_file_of(tokens) + tokenizer._pat_str.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------
# Encode
# ------------------------------------------------------------------------------------------------

class CannotEncode(Exception):
    """tiktoken panics even at a small part of a text."""


def encode(tokenizer: tiktoken.Encoding, text: str) -> tuple[list[int], bool]:
    """The tokens of a text of any length, and whether it was cut where a token might have gone across.

    raises  CannotEncode
    """
    tokens, was_split = [], False
    for part, cut_blindly in parts_of(text, ENCODE_CHARACTERS):
        more, cut_again = _encode_part(tokenizer, part)
        tokens += more
        was_split |= cut_blindly or cut_again
    return tokens, was_split


def parts_of(text: str, longest: int) -> Iterator[tuple[str, bool]]:
    """The text in parts of at most `longest` characters, and whether the cut behind a part may change tokens.

    One before a space that follows a character which is not white changes none (segments).
    """
    start = 0
    while len(text) - start > longest:
        end = text.rfind(" ", start + 1, start + longest + 1)
        while end > 0 and text[end - 1].isspace():
            end = text.rfind(" ", start + 1, end)
        yield (text[start:end], False) if end > 0 else (text[start:start + longest], True)
        start = end if end > 0 else start + longest
    yield text[start:], False


def _encode_part(tokenizer: tiktoken.Encoding, text: str) -> tuple[list[int], bool]:
    """As encode; where tiktoken panics, by halves.

    tiktoken's panic is no Exception; very long runs of white characters cause it, in the pattern's matcher.
    raises  CannotEncode
    """
    try:
        return tokenizer.encode_ordinary(text), False
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        if len(text) < 2 * SMALLEST_PART:
            raise CannotEncode from error
    middle = len(text) // 2
    return _encode_part(tokenizer, text[:middle])[0] + _encode_part(tokenizer, text[middle:])[0], True


# ------------------------------------------------------------------------------------------------
# Count
# ------------------------------------------------------------------------------------------------

_pattern: regex.Pattern


def _set_pattern(pattern: str) -> None:
    global _pattern
    _pattern = regex.compile(pattern)


def segments(text: str) -> list[str]:
    """The text, cut before each space that follows a character which is not white.

    There both patterns begin a new piece, whatever stands around: no piece has a space behind such a
    character, and none looks back. So equal segments have equal pieces, and need be split only once.
    """
    if any([white in text for white in OTHER_WHITE]):
        return [text]
    marked = text.replace(" ", "\0 ").replace("\n\0 ", "\n ")
    for _ in range(2):      # a replacement takes every other one of a row of spaces
        marked = marked.replace(" \0 ", "  ")
    return marked.split("\0")


def count_pieces(batch: list[Document]) -> tuple[Counter[bytes], int, int, int]:
    """Pieces with their counts, and the documents, characters and bytes they come from.

    Needs _set_pattern first.
    """
    texts = [text for _, text in batch]
    seen: Counter[str] = Counter()
    for text in texts:
        for part, _ in parts_of(text, ENCODE_CHARACTERS):
            seen.update(segments(part))
    found: dict[str, int] = {}
    for segment, count in seen.items():
        # most are a word with its space, which needs no pattern
        is_word = segment.isascii() and segment[:1] == " " and segment[1:].isalpha()
        for piece in (segment,) if is_word else _pattern.findall(segment):
            found[piece] = found.get(piece, 0) + count
    pieces: Counter[bytes] = Counter()
    for piece, count in found.items():
        for start in range(0, len(piece), LONGEST_PIECE):
            pieces[piece[start:start + LONGEST_PIECE].encode()] += count
    return pieces, len(texts), sum(map(len, texts)), sum(len(text.encode()) for text in texts)


class World:
    """This process, or those that torchrun started; they have the same source and add their counts up."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self.size > 1:
            import torch.distributed
            self._group = torch.distributed
            with self._contact():
                self._group.init_process_group("gloo")

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UserError(f"process {self.rank} of {self.size} lost another one; see what it said, then "
                            f"start again ({documents.first_line(error)})") from error

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        if self.size > 1 and kind is None:      # after an error this could wait for the others
            with self._contact():
                self._group.barrier()
            self._group.destroy_process_group()

    def same(self, thing: object) -> object:
        """The first process's thing, on every process."""
        things = [thing]
        if self.size > 1:
            with self._contact():
                self._group.broadcast_object_list(things, src=0)
        return things[0]

    def add_up(self, counts: Counter) -> Counter:
        """The sum over all processes, on the first; on the others their own counts."""
        if self.size == 1:
            return counts
        all_counts = [None] * self.size if self.rank == 0 else None
        with self._contact():
            self._group.gather_object(counts, all_counts)
        for other in (all_counts or [])[1:]:
            counts.update(other)
        return counts


class Sample:
    """The first characters of a source to learn from, and of its held-out documents to look at the result.

    texts  iterates over (id, text) of training documents, `characters` in all; if all documents are held out
           (of a single file, say), over those
    held_out  the held-out texts met on the way
    """

    def __init__(self, source: Source, characters: int, least_held_out: int = LEAST_HELD_OUT):
        self.source, self.characters, self.least_held_out = source, characters, least_held_out
        self.held_out: list[str] = []

    def __iter__(self) -> Iterator[Document]:
        left, seen = self.characters, 0
        for take_held_out in (False, True):
            self.held_out = []
            for name, text in self.source:
                if text and documents.is_held_out(text) == take_held_out:
                    if left > 0:
                        yield name, text[:left]
                        left -= len(text)
                elif text and seen < MOST_HELD_OUT and not take_held_out:
                    self.held_out.append(text[:MOST_HELD_OUT])
                    seen += len(text)
                if left <= 0 and (seen >= self.least_held_out or take_held_out):
                    return
            if left < self.characters:
                return


def count_sample(sample: Sample, pattern: str, num_workers: int, world: World) -> tuple[Counter, dict]:
    """Count the pieces of a sample; of several processes each counts its share of the documents.

    returns  pieces with their counts, and facts; on processes other than the first, only their share
    """
    pieces: Counter[bytes] = Counter()
    sizes = Counter(documents=0, characters=0, bytes=0)
    mine = islice(sample, world.rank, None, world.size)
    batches = documents.batched(mine, COUNT_CHARACTERS)
    for part, *counts in documents.in_parallel(count_pieces, batches, num_workers, _set_pattern, (pattern,)):
        pieces.update(part)
        sizes.update(dict(zip(sizes, counts, strict=True)))
    pieces, sizes = world.add_up(pieces), world.add_up(sizes)
    if world.same(not pieces):
        raise UserError(f"the source {sample.source.label} is empty: no text to learn from")
    return pieces, dict(sizes) | {"unique_pieces": len(pieces),
                                  "invalid_utf8_replaced": sample.source.replaced}


@dataclass(frozen=True)
class Forecast:
    """How the distinct pieces of a text grow, from its beginning: as a power of its length (Heaps' law).

    pieces, size  distinct pieces in the first `characters` characters, and their bytes
    power         of growth: twice the text has 2**power times the pieces
    """
    characters: int
    pieces: int
    size: int
    power: float

    def memory_mib(self, characters: int, num_workers: int, num_processes: int) -> float:
        """What counting and merging take, over all processes; the constants were measured."""
        times = max(1.0, characters / max(1, self.characters)) ** self.power
        content = times * (BYTES_PER_PIECE * self.pieces + BYTES_PER_BYTE * self.size) / 2**20
        workers = num_processes * (num_workers if num_workers > 1 else 0)
        torch = 250 * num_processes if num_processes > 1 else 0
        return 150 + 110 * workers + torch + content * (2 if num_processes > 1 else 1)


def forecast(source: Source, pattern: str) -> Forecast:
    """Count the pieces of the source's beginning, and of the half of that."""
    _set_pattern(pattern)
    text = "\n".join(text for _, text in Sample(source, FORECAST_CHARACTERS, least_held_out=0))
    half = len(text) // 2
    first, second = (count_pieces([("", part)])[0] for part in (text[:half], text[half:]))
    both = first | second
    power = math.log2(len(both) / len(first)) if first and both else 1.0
    return Forecast(len(text), len(both), sum(map(len, both)), max(0.3, power))


def samples_that_fit(growth: Forecast, num_workers: int, num_processes: int) -> int:
    """The largest power of two of characters that half of the free memory suffices for; at least 2^20."""
    samples = MOST_SAMPLES
    limit = documents.free_memory_mib() / 2
    while growth.memory_mib(samples, num_workers, num_processes) > limit and samples > 2**20:
        samples //= 2
    return samples


# ------------------------------------------------------------------------------------------------
# Learn
# ------------------------------------------------------------------------------------------------

def learn_merges(pieces: Mapping[bytes, int], num_merges: int, min_count: int = MIN_COUNT,
                 on_merge: Callable[[int, int, int], None] = lambda left, right, count: None,
                 device: str | None = None) -> list[tuple[int, int, int]]:
    """Exact byte-pair encoding over distinct pieces with their counts.

    pieces    bytes of each distinct piece -> how often it occurs
    on_merge  called with each merge as it is made
    device    where torch does the array work ("cuda"); without one, numpy does it
    returns   (left id, right id, count) per merge; merge i makes token 256 + i; fewer than num_merges when no
              pair occurs min_count times any more
    source    Sennrich et al. 2016, arXiv:1508.07909

    All pieces lie behind one another in one array, with a BORDER between them. A token writes its id where
    it begins and where it ends, so its neighbours are found from there with the lengths of tokens. `places`
    knows where each pair may begin. A pair's count can only fall after the step that made its newer token,
    since every later step creates pairs with a still newer token and no others; so the counts in the heap
    are upper bounds, and looking again at the pair on top, until its count is true, finds the best pair
    without ever updating the others. A place that was merged away holds no older token ever again.
    """
    xp = np if device is None else importlib.import_module("torch")     # what is used, both call the same
    device = device or "cpu"
    tokens, piece_of, weight = (xp.asarray(array, device=device) for array in _flatten(pieces))
    length = xp.ones(256 + num_merges + 1, dtype=xp.int64, device=device)       # BORDER, -1, is 1 long, too
    zero = xp.zeros(1, dtype=xp.int64, device=device)
    index = xp.int64 if len(tokens) < SLOTS_AT_ONCE else xp.int32       # faster, or smaller
    places: dict[int, Array] = {}
    heap: list[tuple[int, int]] = []

    def indices(mask: Array) -> Array:
        return xp.where(mask)[0]

    def pairs_at(where: Array) -> Iterator[tuple[int, Array, int]]:
        """Each pair that begins at these places, with its places in their order, and its count."""
        keys = (xp.asarray(tokens[where], dtype=xp.int64) << 32) | tokens[where + length[tokens[where]]]
        order = xp.argsort(keys, stable=True)
        keys, where = keys[order], where[order]
        ends = xp.concatenate([indices(keys[1:] != keys[:-1]) + 1, zero + len(where)])
        sums = xp.concatenate([zero, xp.cumsum(weight[piece_of[where]], 0)[ends - 1]])
        where = xp.asarray(where, dtype=index)
        start = 0
        for key, end, count in zip(keys[ends - 1].tolist(), ends.tolist(), (sums[1:] - sums[:-1]).tolist(),
                                   strict=True):
            yield key, where[start:end], count
            start = end

    def keep(key: int, where: Array, count: int) -> None:
        if count >= min_count:
            places[key] = where
            heapq.heappush(heap, (-count, key))

    found: dict[int, list[Array]] = {}
    counts: Counter[int] = Counter()
    for start in range(0, len(tokens) - 1, SLOTS_AT_ONCE):
        part = tokens[start:start + SLOTS_AT_ONCE + 1]
        where = indices((part[:-1] >= 0) & (part[1:] >= 0)) + start
        for key, some, count in pairs_at(where) if len(where) else ():
            found.setdefault(key, []).append(some)
            counts[key] += count
    while found:
        key, parts = found.popitem()
        keep(key, xp.concatenate(parts), counts[key])

    merges: list[tuple[int, int, int]] = []
    while heap and len(merges) < num_merges:
        bound, key = heapq.heappop(heap)
        left, right = key >> 32, key & 0xFFFFFFFF
        first = places.pop(key)
        first = first[tokens[first] == left]
        first = first[tokens[first + length[left]] == right]
        count = int(weight[piece_of[first]].sum())
        if count != -bound:                                 # merges since then took some of its places
            keep(key, first, count)
            continue
        if left == right:       # of a run of equal tokens, a pass from left to right takes every other place
            begins_run = xp.concatenate([zero == 0, first[1:] != first[:-1] + length[left]])
            run_begin = indices(begins_run)[xp.cumsum(begins_run, 0) - 1]
            first = first[(xp.arange(len(first), device=device) - run_begin) % 2 == 0]
        new = 256 + len(merges)
        merges.append((left, right, count))
        on_merge(left, right, count)
        second = first + length[left]
        after = second + length[right]
        length[new] = length[left] + length[right]
        tokens[second] = MERGED
        tokens[first] = new
        tokens[after - 1] = new
        before = tokens[first - 1]
        has_before = before >= 0
        before = first[has_before] - length[before[has_before]]
        follower = tokens[after]
        behind = first[(follower >= 0) & (follower != new)]     # two new in a row: one pair, at the left
        where = xp.concatenate([before, behind])
        for pair in pairs_at(where) if len(where) else ():
            keep(*pair)
    return merges


def _flatten(pieces: Mapping[bytes, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All bytes of all pieces, BORDERs before, between and behind them; the piece of each; their counts."""
    words = [piece for piece in pieces if len(piece) > 1]
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    tokens = np.frombuffer(b"\0" + b"".join(word + b"\0" for word in words), dtype=np.uint8).astype(np.int32)
    if len(tokens) > np.iinfo(np.int32).max:
        raise UserError("the text has 2 GiB of distinct pieces; lower --samples")
    tokens[np.concatenate([[0], np.cumsum(lengths + 1)])] = BORDER
    piece_of = np.concatenate([[0], np.repeat(np.arange(len(words)), lengths + 1)]).astype(np.int32)
    counts = np.fromiter((pieces[word] for word in words), dtype=np.int64, count=len(words))
    return tokens, piece_of, counts


def tokens_of(merges: list[tuple[int, int, int]]) -> list[bytes]:
    """The bytes of every token, the 256 single bytes first."""
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right, _ in merges:
        tokens.append(tokens[left] + tokens[right])
    assert len(set(tokens)) == len(tokens), "two tokens have the same bytes"
    return tokens


# ------------------------------------------------------------------------------------------------
# Save
# ------------------------------------------------------------------------------------------------

def save_tokenizer(name: str, merges: list[tuple[int, int, int | None]], tokens: list[bytes], pattern: str,
                   facts: dict, source: str) -> Path:
    """Write the folder tokenizers/NAME; it appears under that name when it is complete.

    merges  (left id, right id, count if it is known) of the tokens from 256 on
    source  text of the script that made it
    """
    ranks_file = ranks_file_of(tokens)
    meta = {"format_version": FORMAT_VERSION, "name": name, "pattern": pattern,
            "special_tokens": {END_OF_TEXT: len(tokens)}, "vocab_size": len(tokens) + 1,
            "eot_id": len(tokens), "ranks_sha256": hashlib.sha256(ranks_file).hexdigest(), **facts}
    partial = TOKENIZERS / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / "ranks.tiktoken").write_bytes(ranks_file)
        for_huggingface = json.dumps(huggingface_json(tokens, pattern), ensure_ascii=False)
        (partial / "tokenizer.json").write_text(for_huggingface, encoding="utf-8")
        (partial / "merges.txt").write_text(merges_table(merges, tokens, meta), encoding="utf-8")
        (partial / "train_tokenizer.txt").write_text(source, encoding="utf-8")
        as_json = json.dumps(meta, indent=2, ensure_ascii=False)
        (partial / "meta.json").write_text(as_json + "\n", encoding="utf-8")
        os.replace(partial, TOKENIZERS / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TOKENIZERS / name


def merges_table(merges: list[tuple[int, int, int | None]], tokens: list[bytes], facts: dict) -> str:
    """The merges in the order of learning, with a head that says what they come from and what they give."""
    lines = [f"{len(tokens):,} tokens: the 256 bytes, and {len(merges):,} merges of two tokens that stood "
             "side by side, the most frequent first.", "␣ is a space."]
    if facts.get("documents"):
        lines.append(f"Learned from {facts['characters']:,} characters in {facts['documents']:,} documents "
                     f"of {facts['source']}.")
    statistics = facts.get("statistics", {})
    if "bytes_per_token" in statistics:
        gpt2 = statistics["gpt2_bytes_per_token"]
        lines.append(f"On {statistics['held_out_bytes']:,} bytes of held-out text: "
                     f"{statistics['bytes_per_token']:.3f} bytes a token"
                     + (f" (GPT-2's tokenizer: {gpt2:.3f})" if gpt2 else "")
                     + f", {statistics['share_of_tokens_used']:.1%} of the tokens used.")
    if "longest_tokens" in statistics:
        lines.append(f"The longest tokens: {'  '.join(statistics['longest_tokens'])}")
    lines += ["", f"{'id':>6}  {'left':<20} {'right':<20} {'result':<28} {'count':>12}"]
    for rank, (left, right, count) in enumerate(merges, 256):
        times = "" if count is None else f"{count:,}"
        lines.append(f"{rank:>6}  {visible(tokens[left]):<20} {visible(tokens[right]):<20} "
                     f"{visible(tokens[rank]):<28} {times:>12}".rstrip())
    return "\n".join(lines) + "\n"


def statistics_of(tokens: list[bytes], pattern: str, held_out: list[str]) -> dict:
    """What people ask of a tokenizer; on held-out text, where there is some, beside GPT-2's."""
    of_several_bytes = [token for token in tokens if len(set(token)) > 1]       # rows of spaces tell nothing
    longest = sorted(of_several_bytes, key=lambda token: (-len(token), token))[:10]
    statistics = {"longest_tokens": [visible(token) for token in longest]}
    if held_out:
        ids = encoded_together(encoding_of("new", pattern, tokens), held_out)
        num_bytes = sum(len(text.encode()) for text in held_out)
        statistics |= {"held_out_bytes": num_bytes, "bytes_per_token": num_bytes / len(ids),
                       "share_of_tokens_used": len(set(ids)) / len(tokens), "gpt2_bytes_per_token": None}
        gpt2 = gpt2_if_at_hand()
        if gpt2:
            statistics["gpt2_bytes_per_token"] = num_bytes / len(encoded_together(gpt2, held_out))
    return statistics


def encoded_together(tokenizer: tiktoken.Encoding, texts: list[str]) -> list[int]:
    """The tokens of all texts that tiktoken can encode."""
    tokens = []
    for text in texts:
        with contextlib.suppress(CannotEncode):
            tokens += encode(tokenizer, text)[0]
    return tokens


def encoding_of(name: str, pattern: str, tokens: list[bytes]) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=pattern, special_tokens={END_OF_TEXT: len(tokens)},
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)})


def gpt2_if_at_hand() -> tiktoken.Encoding | None:
    """GPT-2's encoding, unless it is neither in tiktoken's cache nor fetched within five seconds."""
    found = []

    def fetch() -> None:
        with contextlib.suppress(UserError):
            found.append(load_gpt2())
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(5)
    return found[0] if found else None


def visible(token: bytes) -> str:
    """A token as people read it: spaces as ␣; a backslash and whatever cannot be printed as an escape."""
    text = token.replace(b"\\", b"\\\\").decode(errors="backslashreplace").replace("␣", "\\u2423")
    return "".join("␣" if char == " " else char if char.isprintable()
                   else char.encode("unicode_escape").decode() for char in text)


def huggingface_json(tokens: list[bytes], pattern: str) -> dict:
    """The tokenizer in the format of Hugging Face tokenizers.

    tiktoken joins two tokens whenever their bytes make a token, however that token was learned; so every way
    to put a token together from two others is listed as a merge, ordered by the id of the result.
    """
    letters = byte_letters()
    written = ["".join(letters[byte] for byte in token) for token in tokens]
    ids = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:
        ways = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = sorted((ids[left], ids[right]) for left, right in ways if left in ids and right in ids)
        merges += [[written[left], written[right]] for left, right in known]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"id": len(tokens), "content": END_OF_TEXT, "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
             "vocab": {word: rank for rank, word in enumerate(written)}, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special],
            "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level, "model": model}


def byte_letters() -> list[str]:
    """A printable character for each byte, as GPT-2 wrote its vocabulary; printable bytes are themselves."""
    themselves = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                  *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in themselves else chr(next(others)) for byte in range(256)]


# ------------------------------------------------------------------------------------------------
# Convert
# ------------------------------------------------------------------------------------------------

class PlainUnpickler(pickle.Unpickler):
    """Reads bytes, strings, whole numbers and dicts; whatever would import or call something is refused."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it would load {module}.{name}")


def convert(path: Path, name: str | None = None) -> None:
    """Make a folder of a tokenizer that was pickled as pat_str, mergeable_ranks and script_content.

    raises  UserError if the file holds anything else; nothing in it is ever run
    """
    name = clean_name(name or path.stem)
    if (TOKENIZERS / name).exists():
        raise UserError(f"tokenizers/{name} exists; choose another --name")
    try:
        with open(path, "rb") as file:
            content = PlainUnpickler(file).load()
        pattern, ranks = content["pat_str"], content["mergeable_ranks"]
        script = content.get("script_content", "")
        tokens = sorted(ranks, key=ranks.get)
        if not (isinstance(pattern, str) and isinstance(script, str) and set(map(type, tokens)) == {bytes}
                and set(map(type, ranks.values())) == {int}
                and [ranks[token] for token in tokens] == list(range(len(tokens)))
                and sorted(tokens[:256]) == [bytes([byte]) for byte in range(256)]):
            raise ValueError("it is not a pattern with the ranks of all bytes and of tokens made of them")
        merges = [(*halves_of(token, ranks), None) for token in tokens[256:]]
        script.encode()
        encoding = encoding_of(name, pattern, tokens)
        if encoding.decode(encode(encoding, DEMO_TEXT)[0]) != DEMO_TEXT:
            raise ValueError("it does not give back what it encodes")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:      # a pickle that is not one can raise anything
        reason = f"{type(error).__name__}: {error}"[:150]
        raise UserError(f"{path} is no tokenizer of older days ({reason})") from error
    facts = {"converted_from": path.name, "converted_from_sha256": documents.sha256_of(path),
             "statistics": statistics_of(tokens, pattern, [])}
    folder = save_tokenizer(name, merges, tokens, pattern, facts, script)
    print(f"wrote {folder.relative_to(ROOT)}: {load_tokenizer(name).n_vocab:,} tokens")


def halves_of(token: bytes, ranks: dict[bytes, int]) -> tuple[int, int]:
    """The ids of the two tokens that this one is made of, when older pairs are joined first.

    raises  ValueError if it is not made of two older tokens
    """
    parts = [token[place:place + 1] for place in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        place = min(range(len(joined)), key=joined.__getitem__)
        if joined[place] >= ranks[token]:
            break
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    if len(parts) != 2:
        raise ValueError(f"{visible(token[:40])} is not made of two older tokens")
    return ranks[parts[0]], ranks[parts[1]]


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------

class Demo:
    """Shows a text in coloured tokens after 0, 1, 10, 100, ... merges."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.show("Before any merge, every byte is a token")

    def on_merge(self, left: int, right: int, count: int) -> None:
        self.tokens.append(self.tokens[left] + self.tokens[right])
        made = len(self.tokens) - 256
        if made in (1, 10, 100) or made % 1000 == 0:
            self.show(f"Merge {made:,}: {visible(self.tokens[left])} + {visible(self.tokens[right])} "
                      f"stood together {count:,} times and is token {len(self.tokens) - 1:,}")

    def show(self, title: str) -> None:
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        encoding = tiktoken.Encoding("demo", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})
        ids = encoding.encode_ordinary(DEMO_TEXT)
        print(f"\n{title}. {len(DEMO_TEXT.encode())} bytes in {len(ids)} tokens:\n{coloured(encoding, ids)}")


def coloured(encoding: tiktoken.Encoding, ids: list[int]) -> str:
    """The text with a background colour per token; one that ends inside a character shows where that ends."""
    pieces, pending = [], b""
    for place, rank in enumerate(ids):
        pending += encoding.decode_single_token_bytes(rank)
        try:
            text = pending.decode()
        except UnicodeDecodeError:
            continue
        pending = b""
        background = f"\033[{41 + place % 6};30m"
        pieces.append(background + text.replace("\n", f"\033[0m\n{background}") + "\033[0m")
    return "".join(pieces)


def parse_arguments() -> argparse.Namespace:
    cores = max(1, documents.available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    parser = documents.Parser("Learn a byte-level BPE tokenizer.")
    parser.add_argument("-n", "--samples", type=positive,
                        help=f"characters of text to learn from (default: {MOST_SAMPLES}, or the smaller "
                             "power of two that memory allows)")
    parser.add_argument("-v", "--vocabsize", type=positive, default=50256,
                        help="tokens, the 256 bytes included and <|endoftext|> not")
    parser.add_argument("-f", "--name",
                        help="first part of the folder's name (default: gpt4regex or gpt2regex)")
    parser.add_argument("--regex", choices=PATTERNS, default="gpt4", help="how text is split into pieces")
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="stdlib, or files, folders and globs")
    parser.add_argument("--demo", action="store_true", help="show a text in coloured tokens while learning")
    parser.add_argument("--num_workers", type=positive, default=cores, help="processes that split and count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where the merging runs; no GPU has been measured yet")
    parser.add_argument("--convert", metavar="FILE.pkl", type=Path,
                        help="make a folder of a pickled tokenizer of older days, and learn nothing")
    return parser.parse_args()


@documents.command
def main() -> None:
    args = parse_arguments()
    try:
        if not args.convert:
            train(args)
        elif documents.is_first_process():
            convert(args.convert, args.name)
    except UserError:
        documents.leave_the_word_to_the_first()
        raise


def train(args: argparse.Namespace) -> None:
    """Learn a tokenizer, alone or with the processes that torchrun started, and leave its folder."""
    if not 256 <= args.vocabsize <= MOST_TOKENS:
        raise UserError("--vocabsize must be at least 256, since every byte is a token, and at most "
                        f"{MOST_TOKENS:,}; it is {args.vocabsize}")
    if args.device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        raise UserError("--device cuda needs a GPU, and torch finds none; leave it away")
    pattern = PATTERNS[args.regex]
    with World() as world:
        source = documents.open_source(args.source)
        growth = forecast(source, pattern)
        samples = world.same(args.samples or samples_that_fit(growth, args.num_workers, world.size))
        name = clean_name(f"{args.name or args.regex + 'regex'}_v{args.vocabsize}_n{samples}")
        settings = {"regex": args.regex, "vocabsize": args.vocabsize, "samples": samples,
                    "min_count": MIN_COUNT, "source": source.label}
        if world.same(settings) != settings:
            raise UserError("the machines have different sources or flags; give all the same")
        if world.same((TOKENIZERS / name).exists()):
            if world.rank == 0:
                report_existing(name, settings, args.demo)
            return
        if world.rank:
            count_sample(Sample(source, samples), pattern, args.num_workers, world)
            return
        say_what_it_takes(growth, samples, args, world)
        with documents.locked(TOKENIZERS / f".{name}.lock"):
            sample = Sample(source, samples)
            pieces, sizes = count_sample(sample, pattern, args.num_workers, world)
            facts = settings | {"source_fingerprint": source.fingerprint} | sizes
            learn_and_save(name, pieces, pattern, facts, sample.held_out, args)


def say_what_it_takes(growth: Forecast, samples: int, args: argparse.Namespace, world: World) -> None:
    needs = growth.memory_mib(samples, args.num_workers, world.size)
    free = documents.free_memory_mib()
    print(f"learning from at most {samples:,} characters will take about {needs:,.0f} MiB of memory, if the "
          f"text goes on as it begins; {free:,.0f} MiB are free", flush=True)
    if needs > free:
        print("note: that is more than is free; a smaller --samples or fewer --num_workers need less")
    elif not args.samples and samples < MOST_SAMPLES:
        print(f"note: memory for {MOST_SAMPLES:,} characters is not free, so --samples is {samples:,}")


def learn_and_save(name: str, pieces: Counter[bytes], pattern: str, facts: dict, held_out: list[str],
                   args: argparse.Namespace) -> None:
    """From the counts to the folder."""
    print(f"counted {facts['unique_pieces']:,} distinct pieces in {facts['documents']:,} documents, "
          f"{facts['characters']:,} characters")
    if facts["invalid_utf8_replaced"]:
        print(f"replaced {facts['invalid_utf8_replaced']:,} invalid UTF-8 sequences by U+FFFD")
    some_pieces = list(islice(pieces, 20_000))
    merges = learn(pieces, args.vocabsize - 256, pattern, args.demo, args.device)
    if len(merges) < args.vocabsize - 256:
        print(f"note: the text has no more pairs that occur {MIN_COUNT} times; the vocabulary ends at "
              f"{256 + len(merges):,} tokens instead of {args.vocabsize:,}")
    tokens = tokens_of(merges)
    encoding = encoding_of(name, pattern, tokens)
    for piece in some_pieces:
        if encoding.decode_bytes(encoding.encode_ordinary(piece.decode())) != piece:
            raise RuntimeError(f"the tokenizer does not give back {piece!r}")
    statistics = statistics_of(tokens, pattern, held_out)
    folder = save_tokenizer(name, merges, tokens, pattern, facts | {"statistics": statistics},
                            Path(__file__).read_text(encoding="utf-8"))
    print(f"wrote {folder.relative_to(ROOT)}: {len(tokens) + 1:,} tokens "
          f"with {END_OF_TEXT} as {len(tokens)}{in_words(statistics)}")


def learn(pieces: Counter[bytes], num_merges: int, pattern: str, demo: bool, device: str = "cpu",
          ) -> list[tuple[int, int, int]]:
    """Learn with a bar or the demo; sorted pieces make the result independent of their order."""
    as_sorted = dict(sorted(pieces.items()))
    pieces.clear()      # the merging needs the memory
    where = None if device == "cpu" else device
    if demo:
        display = Demo(pattern)
        merges = learn_merges(as_sorted, num_merges, on_merge=display.on_merge, device=where)
        display.show(f"After all {len(merges):,} merges")
        return merges
    with tqdm(total=num_merges, unit=" merges", disable=not sys.stderr.isatty(), leave=False) as bar:
        return learn_merges(as_sorted, num_merges, on_merge=lambda left, right, count: bar.update(),
                            device=where)


def in_words(statistics: dict) -> str:
    if "bytes_per_token" not in statistics:
        return ""
    gpt2 = statistics["gpt2_bytes_per_token"]
    return (f"; on held-out text {statistics['bytes_per_token']:.3f} bytes a token"
            + (f" (GPT-2's: {gpt2:.3f})" if gpt2 else "")
            + f", {statistics['share_of_tokens_used']:.0%} of the tokens used")


def report_existing(name: str, settings: dict, demo: bool) -> None:
    """Say that the tokenizer is there already, or refuse if it was made from something else."""
    tokenizer = load_tokenizer(name)
    meta = json.loads((TOKENIZERS / name / "meta.json").read_text(encoding="utf-8"))
    differing = [key for key, value in settings.items() if meta.get(key) != value]
    if differing:
        raise UserError(f"tokenizers/{name} exists and was made with another {', '.join(differing)}; choose "
                        f"another --name or remove it with: rm -r {shlex.quote(str(TOKENIZERS / name))}")
    print(f"reusing tokenizers/{name}, which was made from the same source with the same settings")
    if demo:
        print(coloured(tokenizer, tokenizer.encode_ordinary(DEMO_TEXT)))


if __name__ == "__main__":
    main()
