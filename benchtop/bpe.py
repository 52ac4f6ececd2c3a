"""Learn a byte-level BPE tokenizer from text, exactly.

The text is split into pieces (words with their leading space, numbers, runs of punctuation) and each piece
into its bytes. Then, until the vocabulary is full, the most frequent pair of neighbouring tokens becomes a
new token.

    >>> learn_merges({b"aaabdaaabac": 1}, 3, min_count=1)     # the example in Wikipedia's article on BPE
    [(97, 97, 4), (97, 98, 2), (256, 257, 2)]

Rules that make the result exact: every pair of neighbours counts as often as its piece occurs, in 64 bits;
ties go to the pair with the smaller left id, then to the one with the smaller right id; within a piece, pairs
are merged from left to right and never overlap (`aaa` becomes `aa` `a`); no pair crosses a piece boundary;
learning stops early when no pair occurs twice. Held-out documents (held_out.py) are not used.
"""

import heapq
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import regex

from benchtop import host
from benchtop.documents import Document, Source, batched
from benchtop.errors import UserError
from benchtop.held_out import Rule
from benchtop.processes import Processes
from benchtop.tokenizer import ENCODE_CHARACTERS, parts_of
from benchtop.workers import in_parallel

Array = Any         # numpy array or torch tensor

LONGEST_PIECE = 1024        # characters; longer pieces are counted in parts, so that no text stalls learning
MIN_COUNT = 2               # a pair must occur this often to become a token
MOST_TOKENS = 2**24         # largest vocabulary
MOST_SAMPLES = 2**30        # characters to learn from by default, if memory allows
BYTES_PER_PIECE, BYTES_PER_BYTE = 160, 38       # memory per distinct piece, and per byte of distinct pieces
FORECAST_CHARACTERS = 2_000_000     # of text from which the memory for all of it is estimated
LEAST_HELD_OUT, MOST_HELD_OUT = 200_000, 4_000_000      # characters of held-out text for the evaluation
COUNT_CHARACTERS = 8_000_000        # of text that a worker counts at a time
SLOTS_AT_ONCE = 2**22       # chunk of the array of all pieces, when its pairs are first counted
BORDER, MERGED = -1, -2     # in that array: between pieces; where the right token of a merge began
OTHER_WHITE = ("\0\t\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
               "\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000")    # whitespace except " " and "\n"; NUL


# ------------------------------------------------------------------------------------------------
# Count
# ------------------------------------------------------------------------------------------------

_pattern: regex.Pattern


def _set_pattern(pattern: str) -> None:
    global _pattern
    _pattern = regex.compile(pattern)


def segments(text: str) -> list[str]:
    """The text, cut before each space that follows a non-whitespace character.

    Every pattern begins a new piece there, in any context: no piece has a space after such a character, and
    no pattern looks behind. So equal segments have equal pieces, and need to be split only once.
    """
    if any([white in text for white in OTHER_WHITE]):
        return [text]
    marked = text.replace(" ", "\0 ").replace("\n\0 ", "\n ")
    for _ in range(2):      # in a run of spaces, one pass replaces every other match
        marked = marked.replace(" \0 ", "  ")
    return marked.split("\0")


def count_pieces(batch: list[Document]) -> tuple[Counter[bytes], int, int, int]:
    """Pieces with their counts, and the number of documents, characters and bytes in the batch.

    Call _set_pattern first.
    """
    texts = [text for _, text in batch]
    seen: Counter[str] = Counter()
    for text in texts:
        for part, _ in parts_of(text, ENCODE_CHARACTERS):
            seen.update(segments(part))
    found: dict[str, int] = {}
    for segment, count in seen.items():
        # most segments are a word with its space, which needs no pattern
        is_word = segment.isascii() and segment[:1] == " " and segment[1:].isalpha()
        for piece in (segment,) if is_word else _pattern.findall(segment):
            found[piece] = found.get(piece, 0) + count
    pieces: Counter[bytes] = Counter()
    for piece, count in found.items():
        for start in range(0, len(piece), LONGEST_PIECE):
            pieces[piece[start:start + LONGEST_PIECE].encode()] += count
    return pieces, len(texts), sum(map(len, texts)), sum(len(text.encode()) for text in texts)


class Sample:
    """The first `characters` characters of a source's training documents, and held-out texts for evaluation.

    Iterating yields (id, text) of the training documents and collects the held-out texts on the way.
    rule      how documents are held out; None: none are
    held_out  the held-out texts
    """

    def __init__(self, source: Source, rule: Rule | None, characters: int,
                 least_held_out: int = LEAST_HELD_OUT):
        self.source, self.rule, self.characters = source, rule, characters
        self.least_held_out = least_held_out if rule else 0
        self.held_out: list[str] = []

    def __iter__(self) -> Iterator[Document]:
        self.held_out = []
        left, seen = self.characters, 0
        for name, text in self.rule.documents(self.source) if self.rule else self.source:
            if self.rule and text and self.rule.holds_out(text, name):
                if seen < MOST_HELD_OUT:
                    self.held_out.append(text[:MOST_HELD_OUT])
                    seen += len(text)
            elif text and left > 0:
                yield name, text[:left]
                left -= len(text)
            if left <= 0 and seen >= self.least_held_out:
                return


def count_sample(sample: Sample, pattern: str, num_workers: int, world: Processes) -> tuple[Counter, dict]:
    """Count the pieces of a sample; with several processes, each counts its share of the documents.

    returns  pieces with their counts, and facts; on ranks other than 0, only of their own share
    """
    pieces: Counter[bytes] = Counter()
    sizes = Counter(documents=0, characters=0, bytes=0)
    mine = islice(sample, world.rank, None, world.size)
    batches = batched(mine, COUNT_CHARACTERS)
    for part, *counts in in_parallel(count_pieces, batches, num_workers, _set_pattern, (pattern,)):
        pieces.update(part)
        sizes.update(dict(zip(sizes, counts, strict=True)))
    pieces, sizes = add_up(pieces, world), add_up(sizes, world)
    if world.same(all(piece.isspace() for piece in pieces)):
        raise UserError(f"the source {sample.source.label} is {'only white space' if pieces else 'empty'}: "
                        "no text to learn from")
    return pieces, dict(sizes) | {"unique_pieces": len(pieces),
                                  "invalid_utf8_replaced": sample.source.replaced}


def add_up(counts: Counter, world: Processes) -> Counter:
    """On rank 0, the sum over all processes; on other ranks, their own counts."""
    for other in world.gather_on_main(counts)[1:]:
        counts.update(other)
    return counts


@dataclass(frozen=True)
class Forecast:
    """How the number of distinct pieces grows: as a power of the length of the text (Heaps' law).

    pieces, size  number of distinct pieces in the first `characters` characters, and of their bytes
    power         exponent of the growth: twice the text has 2**power times the pieces
    """
    characters: int
    pieces: int
    size: int
    power: float

    def memory_mib(self, characters: int, num_workers: int, num_processes: int) -> float:
        """Memory for counting and merging, over all processes; the constants are measured."""
        times = max(1.0, characters / max(1, self.characters)) ** self.power
        content = times * (BYTES_PER_PIECE * self.pieces + BYTES_PER_BYTE * self.size) / 2**20
        workers = num_processes * (num_workers if num_workers > 1 else 0)
        torch = 250 * num_processes if num_processes > 1 else 0
        return 150 + 110 * workers + torch + content * (2 if num_processes > 1 else 1)


def forecast(source: Source, rule: Rule | None, pattern: str) -> Forecast:
    """Estimate the growth from the pieces of the source's beginning and of the first half of that."""
    _set_pattern(pattern)
    text = "\n".join(text for _, text in Sample(source, rule, FORECAST_CHARACTERS, least_held_out=0))
    half = len(text) // 2
    first, second = (count_pieces([("", part)])[0] for part in (text[:half], text[half:]))
    both = first | second
    power = math.log2(len(both) / len(first)) if first and both else 1.0
    return Forecast(len(text), len(both), sum(map(len, both)), max(0.3, power))


def samples_that_fit(growth: Forecast, num_workers: int, num_processes: int) -> int:
    """The largest power of two of characters that fits in half of the free memory; 2^20 to MOST_SAMPLES."""
    samples = MOST_SAMPLES
    limit = host.free_memory_mib() / 2
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
    device    torch device for the array work, such as "cuda"; None: numpy does it
    returns   (left id, right id, count) per merge; merge i makes token 256 + i; fewer than num_merges if no
              pair occurs min_count times any more
    source    Sennrich et al. 2016, arXiv:1508.07909

    All pieces are concatenated in one array, separated by BORDER. A token's id is written at its first and at
    its last position, so its neighbours are found there with the lengths of tokens. `places` lists where each
    pair may begin. The count of a pair can only fall after the step that made the newer of its tokens, since
    later steps create only pairs with even newer tokens. So the counts in the heap are upper bounds: the best
    pair is found by recounting the pair on top until its count is exact, and the others need no update. A
    position that was merged away never again holds an older token.
    """
    xp = np if device is None else importlib.import_module("torch")     # both have what is used here
    device = device or "cpu"
    tokens, piece_of, weight = (xp.asarray(array, device=device) for array in _flatten(pieces))
    length = xp.ones(256 + num_merges + 1, dtype=xp.int64, device=device)       # BORDER, -1, has length 1
    zero = xp.zeros(1, dtype=xp.int64, device=device)
    index = xp.int64 if len(tokens) < SLOTS_AT_ONCE else xp.int32       # int64 is faster, int32 is smaller
    places: dict[int, Array] = {}
    heap: list[tuple[int, int]] = []

    def indices(mask: Array) -> Array:
        return xp.where(mask)[0]

    def pairs_at(where: Array) -> Iterator[tuple[int, Array, int]]:
        """Each pair that begins at these places, with its places in order, and its count."""
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
        if count != -bound:                                 # later merges took some of its places
            keep(key, first, count)
            continue
        if left == right:       # in a run of equal tokens, every other place is merged, from the left
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
        behind = first[(follower >= 0) & (follower != new)]     # a pair of two new tokens is in `before`
        where = xp.concatenate([before, behind])
        for pair in pairs_at(where) if len(where) else ():
            keep(*pair)
    return merges


def _flatten(pieces: Mapping[bytes, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of all pieces longer than 1, with BORDER around each; the piece of each byte; the counts."""
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
