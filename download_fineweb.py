"""Turn documents into token shards that train_gpt.py reads.

    python download_fineweb.py --version stdlib --tokenizer demo_v4096_n20000000
    python download_fineweb.py --version 'books/*.parquet' --tokenizer books_v8192_n1073741824
    python download_fineweb.py --version notes.txt --tokenizer mine_v1000_n1073741824 -ns 1 -ss 100000

It leaves a folder data/SOURCE_TOKENIZER, whole or not at all:

    train_000001.bin ...   documents in an order that --seed decides; none is split over two shards
    val_000000.bin         held-out documents, the same ones for every tokenizer, seed and number of shards
    manifest.json          what the shards hold: source, tokenizer, counts, SHA-256 of each file

A shard is llm.c's: 256 little-endian int32 (20240520, 1, number of tokens, zeros), then the tokens as uint16;
each document begins with <|endoftext|>. Vocabularies above 65,536 use llm.c's other variant (20240801, 7,
uint32 tokens). Python's library of 12 MB gives 3.5 million tokens of a 4,096-token vocabulary in about five
seconds on two cores.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
BYTES_PER_TOKEN = 4         # turns --val_tokens into an amount of text, the same one for every tokenizer
FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,239}"      # a file name ends at 255 bytes, .partial included
ENCODE_CHARACTERS = 500_000     # a longer document is encoded in parts of this length, or tiktoken panics
SMALLEST_PART = 1000            # characters; where tiktoken panics even then, the document is skipped
NAMED_TROUBLES = 100            # documents that were split or skipped and that the manifest names


def shard_format(vocab_size: int) -> tuple[int, int, np.dtype]:
    """llm.c's magic number, version and token type for a vocabulary."""
    return (20240520, 1, np.dtype("<u2")) if vocab_size <= 65536 else (20240801, 7, np.dtype("<u4"))


# ------------------------------------------------------------------------------------------------
# Held-out documents
# ------------------------------------------------------------------------------------------------

def choose_held_out(stream: Iterable[Document], budget: int, share: int) -> tuple[list[Document], int, int]:
    """The documents to validate on: of all held-out texts those with the smallest hashes, each once.

    budget   UTF-8 bytes after which to stop
    share    one document in so many is held out
    returns  (documents in the order of their hashes, characters of the whole stream, how many are left to
             train on)
    """
    held: dict[bytes, Document] = {}
    size = characters = trainable = 0
    for name, text in stream:
        characters += len(text)
        if not text:
            continue
        if not documents.is_held_out(text, share):
            trainable += 1
            continue
        digest = hashlib.sha256(text.encode()).digest()
        size += 0 if digest in held else len(text.encode())
        held[digest] = name, text
        if size > 4 * budget:
            held = dict(_up_to(held, budget))
            size = sum(len(text.encode()) for _, text in held.values())
    return [document for _, document in _up_to(held, budget)], characters, trainable


def _up_to(held: dict[bytes, Document], budget: int) -> list[tuple[bytes, Document]]:
    chosen, size = [], 0
    for digest in sorted(held):
        if chosen and size >= budget:
            break
        chosen.append((digest, held[digest]))
        size += len(held[digest][1].encode())
    return chosen


class Parts:
    """A source whose documents are cut at line ends into parts of about `characters` characters."""

    def __init__(self, source: Source, characters: int):
        self.source, self.characters = source, characters

    def __iter__(self) -> Iterator[Document]:
        for name, text in self.source:
            part, number = "", 1
            for line in text.splitlines(keepends=True):
                for start in range(0, len(line), self.characters):      # a line may be longer than a part
                    part += line[start:start + self.characters]
                    if len(part) >= self.characters:
                        yield f"{name}#{number}", part
                        part, number = "", number + 1
            if part:
                yield f"{name}#{number}", part


def one_in(part: int) -> int:
    """Of how many documents one is held out; parts of documents are few and small, and more are needed."""
    return 16 if part else documents.HELD_OUT_ONE_IN


def split_source(source: Source, val_tokens: int) -> tuple[Source | Parts, list[Document], int]:
    """The documents to shard, and those to validate on.

    A source of very few documents may fall on one side entirely; its documents are then cut into parts.
    returns  (documents, held-out documents, length of a part or 0 when the documents are whole)
    """
    stream, part = source, 0
    while True:
        budget = BYTES_PER_TOKEN * val_tokens
        held_out, characters, trainable = choose_held_out(stream, budget, one_in(part))
        if not characters:
            raise UserError(f"the source {source.label} is empty: no text to tokenize")
        if held_out and trainable:
            return stream, held_out, part
        part = part // 2 or min(20_000, max(200, characters // 256))
        if part < 50:
            raise UserError(f"the source {source.label} has only {characters:,} characters, too few to train "
                            "on one part and validate on another; give it more text")
        stream = Parts(source, part)


# ------------------------------------------------------------------------------------------------
# Tokenize
# ------------------------------------------------------------------------------------------------

_tokenizer: tiktoken.Encoding


def _set_tokenizer(name: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(name)


class Encoded(NamedTuple):
    """A document in tokens."""
    name: str
    tokens: np.ndarray | None   # <|endoftext|> first; none if tiktoken cannot encode the document
    num_bytes: int              # of its UTF-8
    was_split: bool             # cut where a token might have gone across


def tokenize(batch: list[Document]) -> list[Encoded]:
    """The tokens of each document. Needs _set_tokenizer first."""
    dtype = shard_format(_tokenizer.n_vocab)[2]
    encoded = []
    for name, text in batch:
        ids, was_split = [_tokenizer.eot_token], False
        try:
            for part, cut_blindly in parts_of(text, ENCODE_CHARACTERS):
                more, cut_again = encode(part)
                ids += more
                was_split |= cut_blindly or cut_again
            tokens = np.array(ids, dtype=dtype)
        except CannotEncode:
            tokens = None
        encoded.append(Encoded(name, tokens, len(text.encode()), was_split))
    return encoded


def parts_of(text: str, longest: int) -> Iterator[tuple[str, bool]]:
    """The text in parts of at most `longest` characters, and whether the cut behind a part may change tokens.

    One before a space that follows a character which is not white changes none (train_tokenizer.segments).
    """
    start = 0
    while len(text) - start > longest:
        end = text.rfind(" ", start + 1, start + longest + 1)
        while end > 0 and text[end - 1].isspace():
            end = text.rfind(" ", start + 1, end)
        yield (text[start:end], False) if end > 0 else (text[start:start + longest], True)
        start = end if end > 0 else start + longest
    yield text[start:], False


class CannotEncode(Exception):
    """tiktoken panics even at a small part of a document."""


def encode(text: str) -> tuple[list[int], bool]:
    """The tokens of a text, and whether it had to be cut.

    tiktoken's panic is no Exception; very long runs of white characters cause it, in the pattern's matcher.
    raises  CannotEncode
    """
    try:
        return _tokenizer.encode_ordinary(text), False
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        if len(text) < 2 * SMALLEST_PART:
            raise CannotEncode from error
    middle = len(text) // 2
    return encode(text[:middle])[0] + encode(text[middle:])[0], True


def tokenized(stream: Iterable[Document], tokenizer: str, num_workers: int) -> Iterator[Encoded]:
    batches = documents.batched(stream)
    for batch in documents.in_parallel(tokenize, batches, num_workers, _set_tokenizer, (tokenizer,)):
        yield from batch


# ------------------------------------------------------------------------------------------------
# Shards and manifest
# ------------------------------------------------------------------------------------------------

class ShardWriter:
    """Collects documents and writes them as shards of at most `shard_size` tokens; a longer one stands alone.

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
        self.entries.append({"file": name, "split": self.split, "tokens": self.tokens,
                             "documents": len(self.pending), "bytes": self.bytes,
                             "sha256": hashlib.sha256(content).hexdigest()})
        self._clear()


def write_dataset(folder: Path, stream: Iterable[Document], held_out: list[Document], tokenizer_name: str,
                  args: argparse.Namespace, facts: dict) -> dict:
    """Write all shards and the manifest into `folder`, and return the manifest."""
    tokenizer = load_tokenizer(tokenizer_name)
    split, skipped = {"count": 0, "first": []}, {"count": 0, "first": []}

    def fine(encoded: Iterable[Encoded]) -> Iterator[Encoded]:
        """Those with tokens; those that made trouble are counted, and the first of them named."""
        for document in encoded:
            for trouble, has_it in ((skipped, document.tokens is None), (split, document.was_split)):
                if has_it:
                    trouble["count"] += 1
                    trouble["first"] += [document.name][:NAMED_TROUBLES - len(trouble["first"])]
            if document.tokens is not None:
                yield document

    val = ShardWriter(folder, "val", tokenizer.n_vocab, shard_size=2**62)
    for document in fine(tokenized(held_out, tokenizer_name, args.num_workers)):
        val.add(document.tokens, document.num_bytes)
    val.flush()

    train = ShardWriter(folder, "train", tokenizer.n_vocab, args.shard_size, args.num_shards)
    order = documents.shuffled((document for document in stream if document[1]), args.seed)
    trainable = (document for document in order
                 if not documents.is_held_out(document[1], facts["held_out_one_in"]))
    with tqdm(unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        for document in fine(tokenized(trainable, tokenizer_name, args.num_workers)):
            if not train.add(document.tokens, document.num_bytes):
                break
            bar.update(len(document.tokens))
    train.flush()

    manifest = {"format_version": FORMAT_VERSION, **facts, "tokenizer_sha256": tokenizer_sha256(tokenizer),
                "vocab_size": tokenizer.n_vocab, "eot_id": tokenizer.eot_token,
                "split": split, "skipped": skipped, "shards": val.entries + train.entries}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def report_existing(folder: Path, settings: dict) -> None:
    """Say that the dataset is there already, or refuse if it was made from something else."""
    remove = f"rm -r {shlex.quote(str(folder))}"
    try:
        manifest = read_manifest(folder / "manifest.json")
        Dataset(folder, manifest).verify()
    except UserError as error:
        raise UserError(f"{error}; first remove the old with: {remove}") from error
    differing = [key for key, value in settings.items() if manifest.get(key) != value]
    if differing:
        raise UserError(f"{folder.relative_to(ROOT)} exists and was made with another "
                        f"{', '.join(differing)}; choose another --name or remove it with: {remove}")
    print(f"reusing {describe(folder, manifest)}")


def describe(folder: Path, manifest: dict) -> str:
    def total(split: str, what: str) -> str:
        return f"{sum(shard[what] for shard in manifest['shards'] if shard['split'] == split):,}"
    return (f"{folder.relative_to(ROOT)}: "
            f"{total('train', 'tokens')} tokens of {total('train', 'documents')} documents to train on, "
            f"{total('val', 'tokens')} of {total('val', 'documents')} to validate on")


# ------------------------------------------------------------------------------------------------
# Read a dataset
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Dataset:
    """A folder of shards and its manifest, read and checked."""
    folder: Path
    manifest: dict

    @property
    def sha256(self) -> str:
        """What identifies the data, wherever they were made: the shards in order and their tokenizer."""
        shards = [[shard["split"], shard["tokens"], shard["sha256"]] for shard in self.manifest["shards"]]
        return hashlib.sha256(json.dumps([self.manifest["tokenizer_sha256"], shards]).encode()).hexdigest()

    def verify(self, part: int = 0, num_parts: int = 1) -> None:
        """Read every num_parts-th shard, and raise UserError if one is not what the manifest says."""
        for shard in self.manifest["shards"][part::num_parts]:
            path = self.folder / shard["file"]
            tokens = read_shard(path, shard["tokens"])
            if shard["sha256"] and documents.sha256_of(path) != shard["sha256"]:
                raise UserError(f"{path} has changed since it was written (its SHA-256 is not that of the "
                                "manifest); make the data again with download_fineweb.py")
            if len(tokens) and int(tokens.max()) >= self.manifest["vocab_size"]:
                raise UserError(f"{path} has token {int(tokens.max())}, but {self.manifest['tokenizer']} has "
                                f"{self.manifest['vocab_size']}; name the tokenizer it was made with")

    def tokens(self, split: str) -> list[np.ndarray]:
        """The memory-mapped tokens of each shard of "train" or "val"."""
        entries = [entry for entry in self.manifest["shards"] if entry["split"] == split]
        if not entries:
            raise UserError(f"{self.folder} has no {split} shard; make it again with download_fineweb.py")
        return [read_shard(self.folder / entry["file"], entry["tokens"]) for entry in entries]


def open_dataset(data: str, tokenizer_name: str) -> tuple[Dataset, tiktoken.Encoding]:
    """The dataset and tokenizer of these names; an empty name stands for the only one that fits.

    raises  UserError with the command that makes what is missing, or if the two do not belong together
    """
    folder = find_dataset(data, tokenizer_name)
    if (folder / "manifest.json").is_file():
        manifest = read_manifest(folder / "manifest.json")
        tokenizer = load_tokenizer(tokenizer_name or manifest["tokenizer"])
    elif tokenizer_name:
        tokenizer = load_tokenizer(tokenizer_name)
        manifest = manifest_of_bare_shards(folder, tokenizer)
    else:
        raise UserError(f"{folder} has no manifest that tells its tokenizer; name it with --tokenizer")
    made_for = manifest["tokenizer_sha256"], manifest["vocab_size"], manifest["eot_id"]
    if made_for != (tokenizer_sha256(tokenizer), tokenizer.n_vocab, tokenizer.eot_token):
        raise UserError(f"data/{folder.name} was made with tokenizer {manifest['tokenizer']} as it was then, "
                        f"and {tokenizer.name} is another; use --tokenizer {manifest['tokenizer']}, or make "
                        f"the shards again: python download_fineweb.py --tokenizer {tokenizer.name}")
    return Dataset(folder, manifest), tokenizer


def find_dataset(data: str, tokenizer: str) -> Path:
    tokenizer = tokenizer.removesuffix(".pkl")
    if data and not re.fullmatch(FOLDER_NAME, data):
        raise UserError(f"--data must be the name of a folder in {DATA}; it is {data!r}")
    if data and not (DATA / data).is_dir():
        raise UserError(f"there is no {data} in {DATA}; make it with: python download_fineweb.py "
                        f"--version stdlib --tokenizer {tokenizer or 'NAME'} --name {data}")
    if data:
        return DATA / data
    made_with = {path.parent: read_manifest(path)["tokenizer"]
                 for path in sorted(DATA.glob("[!.]*/manifest.json"))}
    fitting = [folder for folder, name in made_with.items() if tokenizer in ("", name)]
    if len(fitting) > 1:
        raise UserError("several datasets fit; choose one with --data: "
                        f"{', '.join(path.name for path in fitting)}")
    if not fitting:
        make_tokenizer = "" if tokenizer else "python train_tokenizer.py --vocabsize 4096 --name mine && "
        raise UserError(f"no data{' of tokenizer ' + tokenizer if tokenizer else ''} in {DATA}; "
                        f"make some with: {make_tokenizer}python download_fineweb.py --version stdlib "
                        f"--tokenizer {tokenizer or 'mine_v4096_n1073741824'}")
    return fitting[0]


def read_manifest(path: Path) -> dict:
    """raises UserError if the file is not a manifest of this format"""
    def expect(entry: dict, kinds: dict[str, type]) -> None:
        for key, kind in kinds.items():
            if not isinstance(entry[key], kind):
                raise ValueError(f"{key} is {entry[key]!r}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        expect(manifest, {"format_version": int, "tokenizer": str, "tokenizer_sha256": str, "vocab_size": int,
                          "eot_id": int, "shards": list})
        if manifest["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {manifest['format_version']}, "
                             f"this program reads {FORMAT_VERSION}")
        for shard in manifest["shards"]:
            expect(shard, {"file": str, "split": str, "tokens": int, "documents": int, "bytes": int,
                           "sha256": str})
            if not re.fullmatch(FOLDER_NAME, shard["file"]):
                raise ValueError(f"file is {shard['file']!r}, which is no file beside it")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); "
                        "make the data again") from error


def manifest_of_bare_shards(folder: Path, tokenizer: tiktoken.Encoding) -> dict:
    """A manifest for llm.c or Modded-NanoGPT shards, *train*.bin and *val*.bin; nothing else is known."""
    shards = [{"file": path.name, "split": "train" if "train" in path.name else "val",
               "tokens": len(read_shard(path, None)), "documents": 0, "bytes": 0, "sha256": ""}
              for path in sorted(folder.glob("*.bin"))]
    if not shards:
        raise UserError(f"{folder} holds neither a manifest nor .bin shards; "
                        "make it again with download_fineweb.py")
    return {"format_version": FORMAT_VERSION, "source": folder.name, "tokenizer": tokenizer.name,
            "tokenizer_sha256": tokenizer_sha256(tokenizer), "vocab_size": tokenizer.n_vocab,
            "eot_id": tokenizer.eot_token, "shards": shards}


def read_shard(path: Path, expected_tokens: int | None) -> np.ndarray:
    """Tokens of a shard, memory-mapped; its header, its size and the manifest must agree."""
    if not path.is_file():
        raise UserError(f"{path} is missing; make the data again with download_fineweb.py")
    header = np.fromfile(path, dtype="<i4", count=3).tolist()
    known = {tuple(shard[:2]): shard[2] for shard in (shard_format(0), shard_format(2**17))}
    dtype = known.get(tuple(header[:2]))
    if len(header) < 3 or dtype is None:
        raise UserError(f"{path} does not begin like a token shard; "
                        "make the data again with download_fineweb.py")
    tokens, size = header[2], path.stat().st_size
    if (tokens < 0 or size != 4 * HEADER_INTS + tokens * dtype.itemsize
            or expected_tokens not in (None, tokens)):
        raise UserError(f"{path} is cut off or changed: it has {size:,} bytes and announces {tokens:,} "
                        f"tokens, the manifest {expected_tokens}; "
                        "make the data again with download_fineweb.py")
    return np.memmap(path, dtype=dtype, mode="r", offset=4 * HEADER_INTS, shape=(tokens,))


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------

def parse_arguments() -> argparse.Namespace:
    parser = documents.Parser("Turn documents into token shards.")
    parser.add_argument("-v", "--version", "--source", nargs="+", default=["stdlib"],
                        help="stdlib, or files, folders and globs "
                             "(.txt .md .py .jsonl .parquet, plain, .gz or .zst)")
    parser.add_argument("-ss", "--shard_size", type=positive, default=10**8,
                        help="tokens in a shard, at most")
    parser.add_argument("-ns", "--num_shards", type=lambda text: positive(text, least=0), default=0,
                        help="shards to train on; 0 takes all text")
    parser.add_argument("-t", "--tokenizer", default="gpt4regex_v50256_n1073741824",
                        help="a folder in tokenizers/")
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
    if not documents.is_first_process():
        return
    if args.shard_size >= 2**31:
        raise UserError("--shard_size must be below 2^31, since a shard's header counts its tokens in int32; "
                        f"it is {args.shard_size}")
    source = documents.open_source(args.version)
    tokenizer = load_tokenizer(args.tokenizer)
    name = args.name or f"{source.label}_{tokenizer.name}"
    if not re.fullmatch(FOLDER_NAME, name):
        raise UserError("--name must have only letters, digits, '.', '_' and '-', since it becomes a folder; "
                        f"it is {name!r}")
    settings = {"source": source.label, "tokenizer": tokenizer.name,
                "tokenizer_sha256": tokenizer_sha256(tokenizer), "seed": args.seed,
                "shard_size": args.shard_size, "num_shards": args.num_shards, "val_tokens": args.val_tokens}
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
        facts = settings | {"source_fingerprint": source.fingerprint, "held_out_one_in": one_in(part),
                            "cut_characters": part}
        manifest = write_dataset(partial, stream, held_out, tokenizer.name, args, facts)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if source.replaced:
        print(f"replaced {source.replaced:,} invalid UTF-8 sequences by U+FFFD")
    for trouble, why in (("split", "too long or odd to encode whole"),
                         ("skipped", "that tiktoken cannot encode")):
        count, first = manifest[trouble]["count"], manifest[trouble]["first"]
        if count:
            print(f"{trouble} {count:,} documents {why}: {', '.join(first[:5])}{' ...' if count > 5 else ''}")
    print(f"wrote {describe(folder, manifest)}")


if __name__ == "__main__":
    main()
