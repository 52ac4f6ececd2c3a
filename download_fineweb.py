"""Turn documents into token shards that train_gpt.py reads.

    python download_fineweb.py --version stdlib --tokenizer demo_v4096_n20000000
    python download_fineweb.py --version 'books/*.parquet' --tokenizer books_v8192_n134217728
    python download_fineweb.py --version notes.txt --tokenizer mine_v1000_n134217728 --num_shards 1 --shard_size 100000

It leaves a folder data/SOURCE_TOKENIZER, whole or not at all:

    train_000001.bin ...   documents in an order that --seed decides; a document is never split over two shards
    val_000000.bin         held-out documents, the same ones for every tokenizer, seed and number of shards
    manifest.json          what the shards hold: source, tokenizer, counts, SHA-256 of each file

A shard is llm.c's: 256 little-endian int32 (20240520, 1, number of tokens, zeros), then the tokens as uint16; each
document begins with <|endoftext|>. Vocabularies above 65,536 use llm.c's other variant (20240801, 7, uint32 tokens).
Python's library of 12 MB gives 3.5 million tokens of a 4,096-token vocabulary in about five seconds on two cores.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

import documents
from documents import Document, Source, UserError, positive
from train_tokenizer import load_tokenizer, tokenizer_sha256

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"
FORMAT_VERSION = 1
HEADER_INTS = 256
BYTES_PER_TOKEN = 4         # turns --val_tokens into an amount of text, so that no tokenizer changes what is held out
ENCODE_CHARACTERS = 500_000     # a longer document is encoded in parts of this length


def shard_format(vocab_size: int) -> tuple[int, int, np.dtype]:
    """llm.c's magic number, version and token type for a vocabulary."""
    return (20240520, 1, np.dtype("<u2")) if vocab_size <= 65536 else (20240801, 7, np.dtype("<u4"))


# ------------------------------------------------------------------------------------------------
# Held-out documents
# ------------------------------------------------------------------------------------------------

def choose_held_out(stream: Iterable[Document], budget: int) -> tuple[list[str], int, int]:
    """The texts to validate on: of all held-out texts those with the smallest hashes, each once, up to `budget` bytes.

    returns  (texts in the order of their hashes, characters of the whole stream, documents left to train on)
    """
    held: dict[bytes, str] = {}
    size = characters = trainable = 0
    for _, text in stream:
        characters += len(text)
        if not text:
            continue
        if not documents.is_held_out(text):
            trainable += 1
            continue
        digest = hashlib.sha256(text.encode()).digest()
        size += 0 if digest in held else len(text.encode())
        held[digest] = text
        if size > 4 * budget:
            held = dict(_up_to(held, budget))
            size = sum(len(text.encode()) for text in held.values())
    return [text for _, text in _up_to(held, budget)], characters, trainable


def _up_to(held: dict[bytes, str], budget: int) -> list[tuple[bytes, str]]:
    chosen, size = [], 0
    for digest in sorted(held):
        if chosen and size >= budget:
            break
        chosen.append((digest, held[digest]))
        size += len(held[digest].encode())
    return chosen


class Parts:
    """A source whose documents are cut at line ends into parts of about `characters` characters."""

    def __init__(self, source: Source, characters: int):
        self.source, self.characters = source, characters

    def __iter__(self) -> Iterator[Document]:
        for name, text in self.source:
            part, number = "", 1
            for line in text.splitlines(keepends=True):
                part += line
                while len(part) >= self.characters:     # a line may be longer than a part
                    cut = len(part) if len(part) < 2 * self.characters else self.characters
                    yield f"{name}#{number}", part[:cut]
                    part, number = part[cut:], number + 1
            if part:
                yield f"{name}#{number}", part


def split_source(source: Source, val_tokens: int) -> tuple[Source | Parts, list[str], int]:
    """The documents to shard, and the texts to validate on.

    A source of very few documents may fall on one side entirely; its documents are then cut into parts.
    returns  (documents, held-out texts, length of a part or 0 when the documents are whole)
    """
    stream, part = source, 0
    while True:
        held_out, characters, trainable = choose_held_out(stream, BYTES_PER_TOKEN * val_tokens)
        if not characters:
            raise UserError(f"the source {source.label} is empty: no text to tokenize")
        if held_out and trainable:
            return stream, held_out, part
        part = (part or min(characters, 20_000 * 256) // 128) // 2
        if part < 50:
            raise UserError(f"the source {source.label} has only {characters:,} characters, too few to train on one "
                            "part and validate on another; give it more text")
        stream = Parts(source, part)


# ------------------------------------------------------------------------------------------------
# Tokenize
# ------------------------------------------------------------------------------------------------

_tokenizer: tiktoken.Encoding


def _set_tokenizer(name: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(name)


def tokenize(texts: list[str]) -> list[tuple[np.ndarray, int]]:
    """The tokens of each document, <|endoftext|> first, and its UTF-8 bytes. Needs _set_tokenizer first."""
    dtype = shard_format(_tokenizer.n_vocab)[2]
    encoded = []
    for text in texts:
        ids = [_tokenizer.eot_token]
        for start in range(0, len(text), ENCODE_CHARACTERS):
            ids += _tokenizer.encode_ordinary(text[start:start + ENCODE_CHARACTERS])
        encoded.append((np.array(ids, dtype=dtype), len(text.encode())))
    return encoded


def tokenized(stream: Iterable[Document], tokenizer: str, num_workers: int) -> Iterator[tuple[np.ndarray, int]]:
    batches = documents.batched(stream)
    for batch in documents.in_parallel(tokenize, batches, num_workers, _set_tokenizer, (tokenizer,)):
        yield from batch


# ------------------------------------------------------------------------------------------------
# Shards and manifest
# ------------------------------------------------------------------------------------------------

class ShardWriter:
    """Collects documents and writes them as shards of at most `shard_size` tokens (a longer document stands alone).

    folder      where files are written
    split       "train" or "val"; files are numbered from 1 or 0
    max_shards  no more shards than this; 0 means any number
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_size: int, max_shards: int = 0):
        self.folder, self.split, self.vocab_size = folder, split, vocab_size
        self.shard_size, self.max_shards = shard_size, max_shards
        self.entries: list[dict] = []
        self._clear()

    def _clear(self) -> None:
        self.pending: list[np.ndarray] = []
        self.tokens = self.bytes = 0

    def add(self, tokens: np.ndarray, num_bytes: int) -> bool:
        """Take a document; False once all shards are full, and then the document is not taken."""
        if self.pending and self.tokens + len(tokens) > self.shard_size:
            self.flush()
        if self.max_shards and len(self.entries) == self.max_shards:
            return False
        self.pending.append(tokens)
        self.tokens += len(tokens)
        self.bytes += num_bytes
        return True

    def flush(self) -> None:
        """Write what is pending as the next shard."""
        if not self.pending:
            return
        magic, version, dtype = shard_format(self.vocab_size)
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = magic, version, self.tokens
        content = header.tobytes() + np.concatenate(self.pending).astype(dtype, copy=False).tobytes()
        name = f"{self.split}_{len(self.entries) + (self.split == 'train'):06d}.bin"
        with open(self.folder / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.entries.append({"file": name, "split": self.split, "tokens": self.tokens, "documents": len(self.pending),
                             "bytes": self.bytes, "sha256": hashlib.sha256(content).hexdigest()})
        self._clear()


def write_dataset(folder: Path, stream: Iterable[Document], held_out: list[str], tokenizer_name: str,
                  args: argparse.Namespace, facts: dict) -> dict:
    """Write all shards and the manifest into `folder`, and return the manifest."""
    tokenizer = load_tokenizer(tokenizer_name)
    val = ShardWriter(folder, "val", tokenizer.n_vocab, shard_size=2**62)
    for tokens, num_bytes in tokenized((("", text) for text in held_out), tokenizer_name, args.num_workers):
        val.add(tokens, num_bytes)
    val.flush()

    train = ShardWriter(folder, "train", tokenizer.n_vocab, args.shard_size, args.num_shards)
    order = documents.shuffled((document for document in stream if document[1]), args.seed)
    trainable = (document for document in order if not documents.is_held_out(document[1]))
    with tqdm(unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        for tokens, num_bytes in tokenized(trainable, tokenizer_name, args.num_workers):
            if not train.add(tokens, num_bytes):
                break
            bar.update(len(tokens))
    train.flush()

    manifest = {"format_version": FORMAT_VERSION, **facts, "tokenizer_sha256": tokenizer_sha256(tokenizer),
                "vocab_size": tokenizer.n_vocab, "eot_id": tokenizer.eot_token, "shards": val.entries + train.entries}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def report_existing(folder: Path, settings: dict) -> None:
    """Say that the dataset is there already, or refuse if it was made from something else."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} exists, but its manifest cannot be read ({error}); "
                        f"remove it with: rm -r {folder}") from error
    differing = [key for key, value in settings.items() if manifest.get(key) != value]
    if differing:
        raise UserError(f"{folder.relative_to(ROOT)} exists and was made with another {', '.join(differing)}; "
                        f"choose another --name or remove it with: rm -r {folder}")
    print(f"reusing {describe(folder, manifest)}")


def describe(folder: Path, manifest: dict) -> str:
    def total(split: str, what: str) -> str:
        return f"{sum(shard[what] for shard in manifest['shards'] if shard['split'] == split):,}"
    return (f"{folder.relative_to(ROOT)}: {total('train', 'tokens')} tokens of {total('train', 'documents')} documents "
            f"to train on, {total('val', 'tokens')} of {total('val', 'documents')} to validate on")


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------

def parse_arguments() -> argparse.Namespace:
    parser = documents.Parser("Turn documents into token shards.")
    parser.add_argument("-v", "--version", "--source", nargs="+", default=["stdlib"],
                        help="stdlib, or files, folders and globs (.txt .md .py .jsonl .parquet, plain, .gz or .zst)")
    parser.add_argument("-ss", "--shard_size", type=positive, default=10**8, help="tokens in a shard, at most")
    parser.add_argument("-ns", "--num_shards", type=positive, default=0, help="shards to train on; 0 takes all text")
    parser.add_argument("-t", "--tokenizer", default="gpt4regex_v50256_n134217728", help="a folder in tokenizers/")
    parser.add_argument("--val_tokens", type=positive, default=10_485_760,
                        help=f"validate on about this many tokens of {BYTES_PER_TOKEN} bytes")
    parser.add_argument("--seed", type=int, default=0, help="decides the order of the documents")
    parser.add_argument("--name", help="folder in data/ (default: SOURCE_TOKENIZER)")
    parser.add_argument("--num_workers", type=positive, default=documents.available_cores(),
                        help="processes that tokenize")
    return parser.parse_args()


@documents.command
def main() -> None:
    args = parse_arguments()
    source = documents.open_source(args.version)
    tokenizer = load_tokenizer(args.tokenizer)
    name = args.name or f"{source.label}_{tokenizer.name}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--name must have only letters, digits, '.', '_' and '-', since it is a folder; it is {name!r}")
    settings = {"source": source.label, "source_fingerprint": source.fingerprint, "tokenizer": tokenizer.name,
                "tokenizer_sha256": tokenizer_sha256(tokenizer), "seed": args.seed, "shard_size": args.shard_size,
                "num_shards": args.num_shards, "val_tokens": args.val_tokens}
    folder = DATA / name
    if folder.exists():
        report_existing(folder, settings)
        return
    stream, held_out, part = split_source(source, args.val_tokens)
    if part:
        print(f"note: {source.label} has too few documents to hold some out; it is cut into parts of about "
              f"{part:,} characters, and some of those are held out")
    partial = DATA / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        facts = settings | {"held_out_one_in": documents.HELD_OUT_ONE_IN, "cut_characters": part}
        manifest = write_dataset(partial, stream, held_out, tokenizer.name, args, facts)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if source.replaced:
        print(f"replaced {source.replaced:,} invalid UTF-8 sequences by U+FFFD")
    print(f"wrote {describe(folder, manifest)}")


if __name__ == "__main__":
    main()
