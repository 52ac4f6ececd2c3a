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
import hashlib
import heapq
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

import documents
from documents import Source, UserError, positive

ROOT = Path(__file__).resolve().parent
TOKENIZERS = ROOT / "tokenizers"
FORMAT_VERSION = 1
END_OF_TEXT = "<|endoftext|>"
LONGEST_PIECE = 1024        # characters; a longer piece is counted in parts, so that no text stalls learning
MIN_COUNT = 2               # a pair must occur this often to become a token

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
# Learn
# ------------------------------------------------------------------------------------------------

_pattern: regex.Pattern


def _set_pattern(pattern: str) -> None:
    global _pattern
    _pattern = regex.compile(pattern)


def count_pieces(texts: list[str]) -> tuple[Counter[str], int, int, int]:
    """Pieces with their counts, and the documents, characters and bytes they come from.

    Needs _set_pattern first.
    """
    pieces: Counter[str] = Counter()
    for text in texts:
        pieces.update(_pattern.findall(text))
    for piece in [piece for piece in pieces if len(piece) > LONGEST_PIECE]:
        count = pieces.pop(piece)
        for start in range(0, len(piece), LONGEST_PIECE):
            pieces[piece[start:start + LONGEST_PIECE]] += count
    return pieces, len(texts), sum(map(len, texts)), sum(len(text.encode()) for text in texts)


def count_source(source: Source, pattern: str, samples: int, num_workers: int,
                 ) -> tuple[Counter[str], dict[str, int]]:
    """Count the pieces of a source's first `samples` characters, held-out documents left aside."""
    pieces: Counter[str] = Counter()
    sizes = Counter(documents=0, characters=0, bytes=0)
    batches = documents.batched(first_characters(source, samples))
    for part, *counts in documents.in_parallel(count_pieces, batches, num_workers, _set_pattern, (pattern,)):
        pieces.update(part)
        sizes.update(dict(zip(sizes, counts, strict=True)))
    if not pieces:
        raise UserError(f"the source {source.label} is empty: no text to learn from")
    return pieces, dict(sizes) | {"unique_pieces": len(pieces), "invalid_utf8_replaced": source.replaced}


def first_characters(source: Source, samples: int):
    """Training documents up to `samples` characters; if all are held out (of a single file, say), those."""
    left, found = samples, False
    for take_held_out in (False, True):
        for name, text in source:
            if text and documents.is_held_out(text) == take_held_out:
                found = True
                yield name, text[:left]
                left -= len(text)
                if left <= 0:
                    return
        if found:
            return


def learn_merges(pieces: Mapping[bytes, int], num_merges: int, min_count: int = MIN_COUNT,
                 on_merge: Callable[[int, int, int], None] = lambda left, right, count: None,
                 ) -> list[tuple[int, int, int]]:
    """Exact byte-pair encoding over distinct pieces with their counts.

    pieces    bytes of each distinct piece -> how often it occurs
    on_merge  called with each merge as it is made
    returns   (left id, right id, count) per merge; merge i makes token 256 + i; fewer than num_merges when no
              pair occurs min_count times any more
    source    Sennrich et al. 2016, arXiv:1508.07909

    All pieces lie behind one another in flat arrays, and tokens form a linked list in them. `places` knows
    where each pair may stand. A pair's count can only fall after the step that made its newer token, since
    every later step creates pairs with a still newer token and no others; so the counts in the heap are
    upper bounds, and looking again at the pair on top, until its count is true, finds the best pair without
    ever updating the others.
    """
    tokens, weight, following, preceding = _flatten(pieces)
    places: dict[int, np.ndarray] = {}
    heap: list[tuple[int, int]] = []

    def add_pairs(where: np.ndarray) -> None:
        """Index the pairs that begin at these places (ascending for equal pairs)."""
        keys = (tokens[where] << 32) | tokens[following[where]]
        order = np.argsort(keys, kind="stable")
        keys, where = keys[order], where[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        counts = np.add.reduceat(weight[where], starts).tolist()
        ends = [*starts[1:].tolist(), len(where)]
        for key, start, end, count in zip(keys[starts].tolist(), starts.tolist(), ends, counts, strict=True):
            if count >= min_count:
                places[key] = where[start:end]
                heapq.heappush(heap, (-count, key))

    whole = np.flatnonzero(following >= 0)
    if len(whole):
        add_pairs(whole)
    merges: list[tuple[int, int, int]] = []
    while heap and len(merges) < num_merges:
        bound, key = heapq.heappop(heap)
        left, right = key >> 32, key & 0xFFFFFFFF
        first = places.pop(key)
        first = first[(tokens[first] == left)]
        first = first[following[first] >= 0]
        first = first[tokens[following[first]] == right]
        count = int(weight[first].sum())
        if count != -bound:                                 # merges since then took some of its places
            if count >= min_count:
                places[key] = first
                heapq.heappush(heap, (-count, key))
            continue
        if left == right:
            first = _without_overlaps(first, following)
        new = 256 + len(merges)
        merges.append((left, right, count))
        on_merge(left, right, count)
        second = following[first]
        after = following[second]
        tokens[first] = new
        tokens[second] = -1
        following[first] = after
        goes_on = after >= 0
        preceding[after[goes_on]] = first[goes_on]
        before = preceding[first]
        behind = first[goes_on]
        behind = behind[tokens[following[behind]] != new]   # two new in a row: the left one's pair is enough
        where = np.concatenate([before[before >= 0], behind])
        if len(where):
            add_pairs(where)
    return merges


def _flatten(pieces: Mapping[bytes, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Token, weight, place of the next and of the previous token (-1: none) for all bytes of all pieces."""
    words = [piece for piece in pieces if len(piece) > 1]
    tokens = np.frombuffer(b"".join(words), dtype=np.uint8).astype(np.int64)
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    weight = np.repeat(np.array([pieces[word] for word in words], dtype=np.int64), lengths)
    following = np.arange(1, len(tokens) + 1)
    preceding = np.arange(-1, len(tokens) - 1)
    ends = np.cumsum(lengths)
    following[ends - 1] = -1
    preceding[ends - lengths] = -1
    return tokens, weight, following, preceding


def _without_overlaps(first: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Of the places of a pair of equal tokens, those that a pass from left to right would merge."""
    starts_run = np.ones(len(first), dtype=bool)
    starts_run[1:] = following[first[:-1]] != first[1:]
    run_start = np.maximum.accumulate(np.where(starts_run, np.arange(len(first)), 0))
    return first[(np.arange(len(first)) - run_start) % 2 == 0]


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

def save_tokenizer(name: str, merges: list[tuple[int, int, int]], pattern: str, facts: dict) -> Path:
    """Write the folder tokenizers/NAME; it appears under that name when it is complete."""
    tokens = tokens_of(merges)
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
        (partial / "merges.txt").write_text(merges_table(merges, tokens), encoding="utf-8")
        source = Path(__file__).read_text(encoding="utf-8")
        (partial / "train_tokenizer.txt").write_text(source, encoding="utf-8")
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, TOKENIZERS / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TOKENIZERS / name


def merges_table(merges: list[tuple[int, int, int]], tokens: list[bytes]) -> str:
    lines = [f"{'id':>6}  {'left':<20} {'right':<20} {'result':<28} {'count':>12}"]
    for rank, (left, right, count) in enumerate(merges, 256):
        lines.append(f"{rank:>6}  {visible(tokens[left]):<20} {visible(tokens[right]):<20} "
                     f"{visible(tokens[rank]):<28} {count:>12,}")
    return "\n".join(lines) + "\n"


def visible(token: bytes) -> str:
    """A token as people read it: spaces as ␣, whatever cannot be printed as an escape."""
    text = token.decode(errors="backslashreplace")
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
    parser = documents.Parser("Learn a byte-level BPE tokenizer.")
    parser.add_argument("-n", "--samples", type=positive, default=2**27,
                        help="characters of text to learn from")
    parser.add_argument("-v", "--vocabsize", type=positive, default=50256,
                        help="tokens, the 256 bytes included and <|endoftext|> not")
    parser.add_argument("-f", "--name",
                        help="first part of the folder's name (default: gpt4regex or gpt2regex)")
    parser.add_argument("--regex", choices=PATTERNS, default="gpt4", help="how text is split into pieces")
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="stdlib, or files, folders and globs")
    parser.add_argument("--demo", action="store_true", help="show a text in coloured tokens while learning")
    parser.add_argument("--num_workers", type=positive, default=documents.available_cores(),
                        help="processes that split and count")
    return parser.parse_args()


@documents.command
def main() -> None:
    args = parse_arguments()
    if not documents.is_first_process():
        return
    if args.vocabsize < 256:
        raise UserError("--vocabsize must be at least 256, since every byte is a token; "
                        f"it is {args.vocabsize}")
    name = clean_name(f"{args.name or args.regex + 'regex'}_v{args.vocabsize}_n{args.samples}")
    pattern = PATTERNS[args.regex]
    source = documents.open_source(args.source)
    settings = {"regex": args.regex, "vocabsize": args.vocabsize, "samples": args.samples,
                "min_count": MIN_COUNT, "source": source.label}
    if (TOKENIZERS / name).exists():
        report_existing(name, settings, args.demo)
        return
    pieces, sizes = count_source(source, pattern, args.samples, args.num_workers)
    print(f"counted {sizes['unique_pieces']:,} distinct pieces in {sizes['documents']:,} documents, "
          f"{sizes['characters']:,} characters")
    if source.replaced:
        print(f"replaced {source.replaced:,} invalid UTF-8 sequences by U+FFFD")
    merges = learn(pieces, args.vocabsize - 256, pattern, args.demo)
    if len(merges) < args.vocabsize - 256:
        print(f"note: the text has no more pairs that occur {MIN_COUNT} times; the vocabulary ends at "
              f"{256 + len(merges):,} tokens instead of {args.vocabsize:,}")
    facts = settings | {"source_fingerprint": source.fingerprint} | sizes
    folder = save_tokenizer(name, merges, pattern, facts)
    tokenizer = load_tokenizer(name)
    text = DEMO_TEXT + "".join(piece for piece in islice(pieces, 100_000))
    if tokenizer.decode(tokenizer.encode_ordinary(text)) != text:
        raise RuntimeError(f"{folder} does not give back the text it encoded")
    print(f"wrote {folder.relative_to(ROOT)}: {tokenizer.n_vocab:,} tokens "
          f"with {END_OF_TEXT} as {tokenizer.eot_token}")


def learn(pieces: Counter[str], num_merges: int, pattern: str, demo: bool) -> list[tuple[int, int, int]]:
    as_bytes = {piece.encode(): count for piece, count in sorted(pieces.items())}
    if demo:
        display = Demo(pattern)
        merges = learn_merges(as_bytes, num_merges, on_merge=display.on_merge)
        display.show(f"After all {len(merges):,} merges")
        return merges
    with tqdm(total=num_merges, unit=" merges", disable=not sys.stderr.isatty(), leave=False) as bar:
        return learn_merges(as_bytes, num_merges, on_merge=lambda left, right, count: bar.update())


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
