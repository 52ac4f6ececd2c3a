"""Turn documents into token shards that train_gpt.py reads.

    python download_fineweb.py --version 10B --num_shards 10 --tokenizer mine_v32000_n1073741824
    python download_fineweb.py --version 10B-gpt2 --num_shards 10           # ready-made, of GPT-2's tokenizer
    python download_fineweb.py --version 'books/*.parquet' --tokenizer books_v8192_n1073741824
    python download_fineweb.py --version notes.txt --tokenizer mine_v1000_n1073741824 -ns 1 -ss 100000

It leaves a folder data/SOURCE_TOKENIZER (shards.py says what is in it), whole or not at all. The documents
come in an order that --seed decides, over all files of FineWeb; about one in 64 is held out to validate on,
chosen by a hash of its own text, the same ones for every tokenizer, seed and number of shards. FineWeb's
next file downloads while workers tokenize this one. Killed at any time and started again, the script goes on
behind the last finished shard and ends with the same bytes, with any number of workers. A larger
--num_shards adds shards and leaves the old ones. Python's library of 12 MB gives 3.5 million tokens of a
4,096-token vocabulary in about five seconds on two cores.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

import documents
import hub
import shards
from documents import Document, Source, Unit, UserError, positive
from shards import (
    FOLDER_NAME,
    FORMAT_VERSION,
    Dataset,
    ShardWriter,
    read_manifest,
    read_shard,
    shard_format,
    write_json,
)
from train_tokenizer import CannotEncode, encode, load_tokenizer, token_bytes, tokenizer_sha256

BYTES_PER_TOKEN = 4         # turns --val_tokens into an amount of text, the same one for every tokenizer
TOKENS_PER_PARQUET_BYTE = 0.34      # of FineWeb, with GPT-2's tokenizer; only --dry_run guesses with it
NAMED_TROUBLES = 100            # documents that were split or skipped and that the manifest names


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

    units = Source.units


def enough_of(stream: Source | Parts, budget: int, share: int) -> Iterator[Document]:
    """The documents of as many units, in their fixed order, as hold `budget` bytes of held-out text."""
    size = 0
    for unit in stream.units(seed=None):
        for document in unit.read():
            size += len(document[1].encode()) if documents.is_held_out(document[1], share) else 0
            yield document
        if size >= budget:
            return


def one_in(part: int) -> int:
    """Of how many documents one is held out; parts of documents are few and small, and more are needed."""
    return 16 if part else documents.HELD_OUT_ONE_IN


def split_source(source: Source, val_tokens: int) -> tuple[Source | Parts, list[Document], int]:
    """The documents to shard, and those to validate on; of FineWeb, from the first files of a fixed order.

    A source of very few documents may fall on one side entirely; its documents are then cut into parts.
    returns  (documents, held-out documents, length of a part or 0 when the documents are whole)
    """
    stream, part = source, 0
    budget = BYTES_PER_TOKEN * val_tokens
    while True:
        held_out, characters, trainable = choose_held_out(enough_of(stream, budget, one_in(part)), budget,
                                                          one_in(part))
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
        try:
            ids, was_split = encode(_tokenizer, text)
            tokens = np.array([_tokenizer.eot_token, *ids], dtype=dtype)
        except CannotEncode:
            tokens, was_split = None, False
        encoded.append(Encoded(name, tokens, len(text.encode()), was_split))
    return encoded


def tokenized(stream: Iterable[Document], tokenizer: str, num_workers: int) -> Iterator[Encoded]:
    batches = documents.batched(stream)
    for batch in documents.in_parallel(tokenize, batches, num_workers, _set_tokenizer, (tokenizer,)):
        yield from batch


# ------------------------------------------------------------------------------------------------
# Units to shards, so that a kill loses one shard at most
# ------------------------------------------------------------------------------------------------

@dataclass
class Progress:
    """What of a unit is in shards; kept in its folder, so that a later start goes on behind the last one.

    done      whether all of it is in shards
    entries   what the manifest will say of its shards; `read` is how many of its documents they end behind
    split, skipped  number and name of each document that made trouble
    """
    name: str
    done: bool = False
    entries: list[dict] = field(default_factory=list)
    split: list[list] = field(default_factory=list)
    skipped: list[list] = field(default_factory=list)

    @property
    def documents(self) -> int:
        return self.entries[-1]["read"] if self.entries else 0

    @property
    def tokens(self) -> int:
        return sum(entry["tokens"] for entry in self.entries)

    def cut_back(self, shards: int) -> "Progress":
        """As it was when it had no more shards than that."""
        if shards >= len(self.entries):
            return self
        cut = replace(self, entries=self.entries[:shards], done=False)
        return replace(cut, split=[item for item in self.split if item[0] < cut.documents],
                       skipped=[item for item in self.skipped if item[0] < cut.documents])


class Preparation:
    """A dataset while it is made, in the folder .NAME.partial, where a later start goes on.

    units  all parts of the text
    facts  what decides the content of all shards; with others the work begins anew
    goal   shards to train on; 0 takes all text
    """

    def __init__(self, folder: Path, units: list[Unit], tokenizer: tiktoken.Encoding, facts: dict,
                 args: argparse.Namespace):
        self.folder, self.units, self.tokenizer, self.facts = folder, units, tokenizer, facts
        self.args = args
        self.goal = args.num_shards
        self.partial = folder.with_name(f".{folder.name}.partial")
        self.bar = tqdm(unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty(), leave=False,
                        total=self.goal * args.shard_size or None)
        self.begun, self.tokens_now = time.perf_counter(), 0

    def begin(self) -> None:
        """Take up what an earlier start left, or clear away what another command left."""
        shards.DATA.mkdir(exist_ok=True)
        with documents.locked(self.partial.with_suffix(".lock"), wait=True):
            made_by = self.partial / "made_by.json"
            if made_by.is_file() and read_json(made_by) == self.facts:
                return
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
            # text that was here before stays
            write_json(self.partial / "was_here.json", [unit.name for unit in self.units if unit.is_here()])
            write_json(made_by, self.facts)
            if self.folder.exists():
                self._take_over(read_manifest(self.folder / "manifest.json"))

    def _take_over(self, manifest: dict) -> None:
        """Begin with the shards of a finished dataset, which is to grow."""
        val, *train = manifest["shards"]
        link(self.folder / val["file"], self.partial / val["file"])
        write_json(self.partial / "val.json", manifest["held_out"] | {"entry": val})
        for number, unit in enumerate(manifest["units"]):
            progress = Progress(**{key: unit[key] for key in ("name", "done", "split", "skipped")})
            while train and len(progress.entries) < unit["shards"]:
                entry = train.pop(0)
                progress.entries.append(entry | {"file": f"{len(progress.entries) + 1:06d}.bin"})
                self._unit_folder(number).mkdir(parents=True, exist_ok=True)
                link(self.folder / entry["file"], self._unit_folder(number) / progress.entries[-1]["file"])
            self._save(number, progress)

    def held_out(self, source: Source) -> dict:
        """Write the shard to validate on, unless it is there; how documents are held out."""
        path = self.partial / "val.json"
        if path.is_file():
            return read_json(path)
        try:
            _, chosen, part = split_source(source, self.args.val_tokens)
        except UserError:
            self.clear()
            raise
        if part:
            print(f"note: {source.label} has too few documents to hold some out; it is cut into parts "
                  f"of about {part:,} characters, and some of those are held out")
        writer, trouble = self._writer(self.partial), Progress("")
        for number, document in enumerate(self._tokenized(chosen)):
            self._take(document, number, writer, trouble)
        write_json(path, {"one_in": one_in(part), "cut_characters": part, "split": trouble.split,
                          "skipped": trouble.skipped, "entry": writer.write("val_000000.bin", "val")})
        return read_json(path)

    def write_units(self, numbers: Iterable[int], share: int, goal: int) -> list[Progress]:
        """Write the shards of these units, in their order, until there are `goal` of them (0: all).

        share    one document in so many is held out
        returns  the progress of the units that were needed
        """
        all_progress, numbers = [], list(numbers)
        for place, number in enumerate(numbers):
            left = goal - sum(len(progress.entries) for progress in all_progress) if goal else sys.maxsize
            if left <= 0:
                break
            progress = self._progress_of(number)
            self.bar.update(progress.tokens)
            all_progress.append(progress)
            if not progress.done and len(progress.entries) < left:
                self._write_unit(number, progress, share, left, numbers[place + 1:][:1])
            self.give_back([number])
        self.bar.close()
        return all_progress

    def _write_unit(self, number: int, progress: Progress, share: int, limit: int,
                    following: list[int]) -> None:
        """Write the unit's further shards, up to `limit` in all; meanwhile the following unit's text comes.
        """
        unit = self.units[number]
        trainable = (document for document in unit.read() if not documents.is_held_out(document[1], share))
        self._unit_folder(number).mkdir(exist_ok=True)
        writer, seen = self._writer(self._unit_folder(number)), progress.documents
        progress.split, progress.skipped = ([item for item in items if item[0] < seen]
                                            for items in (progress.split, progress.skipped))
        for document in self._tokenized(islice(trainable, seen, None)):
            if document.tokens is not None and not writer.has_room_for(document.tokens):
                self._close_shard(number, progress, writer, seen)
                if len(progress.entries) == limit:
                    return
            self._take(document, seen, writer, progress)
            seen += 1
            if following and self._needs_more(unit, seen, progress.tokens + writer.tokens, limit):
                self.units[following.pop()].begin()
        progress.done = True
        if writer.pending:
            self._close_shard(number, progress, writer, seen)
        self._save(number, progress)

    def _needs_more(self, unit: Unit, seen: int, tokens: int, limit: int) -> bool:
        """Whether this unit seems too small for all shards, to judge by a twentieth of its documents."""
        if limit == sys.maxsize or not unit.documents:
            return limit == sys.maxsize
        return seen >= unit.documents / 20 and tokens / seen * unit.documents < limit * self.args.shard_size

    def _take(self, document: Encoded, number: int, writer: ShardWriter, progress: Progress) -> None:
        if document.was_split:
            progress.split.append([number, document.name])
        if document.tokens is None:
            progress.skipped.append([number, document.name])
        else:
            writer.add(document.tokens, document.num_bytes)
            self.bar.update(len(document.tokens))

    def _close_shard(self, number: int, progress: Progress, writer: ShardWriter, seen: int) -> None:
        entry = writer.write(f"{len(progress.entries) + 1:06d}.bin", "train")
        progress.entries.append(entry | {"unit": progress.name, "read": seen})
        self._save(number, progress)
        self.tokens_now += entry["tokens"]
        if self.bar.disable and entry["tokens"] >= 10**7:
            rate = self.tokens_now / (time.perf_counter() - self.begun)
            print(f"a shard of {entry['tokens']:,} tokens; {rate:,.0f} tokens/s so far", flush=True)

    def give_back(self, numbers: Iterable[int]) -> None:
        """Remove the text of these units, unless it was here before or is to be kept."""
        was_here = set(read_json(self.partial / "was_here.json"))
        for number in numbers:
            unit = self.units[number]
            if not self.args.keep_text and unit.name not in was_here and unit.is_here():
                unit.remove()

    def _tokenized(self, stream: Iterable[Document]) -> Iterator[Encoded]:
        return tokenized(stream, self.tokenizer.name, self.args.num_workers)

    def _writer(self, folder: Path) -> ShardWriter:
        return ShardWriter(folder, self.tokenizer.n_vocab, self.args.shard_size)

    def _unit_folder(self, number: int) -> Path:
        return self.partial / f"unit_{number:06d}"

    def _progress_of(self, number: int) -> Progress:
        path = self._unit_folder(number) / "progress.json"
        return Progress(**read_json(path)) if path.is_file() else Progress(self.units[number].name)

    def _save(self, number: int, progress: Progress) -> None:
        self._unit_folder(number).mkdir(exist_ok=True)
        write_json(self._unit_folder(number) / "progress.json", asdict(progress))

    def finish(self, all_progress: list[Progress], held_out: dict) -> dict:
        """Give all shards their final names, write the manifest last, and return it."""
        whole = self.folder.with_name(f".{self.folder.name}.whole.partial")
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        link(self.partial / "val_000000.bin", whole / "val_000000.bin")
        left, entries, units = self.goal or sys.maxsize, [held_out["entry"]], []
        for number, progress in enumerate(all_progress):
            progress = progress.cut_back(left)
            left -= len(progress.entries)
            for entry in progress.entries:
                name = f"train_{len(entries):06d}.bin"
                link(self._unit_folder(number) / entry["file"], whole / name)
                entries.append(entry | {"file": name})
            units.append(asdict(progress) | {"shards": len(progress.entries)})
            del units[-1]["entries"]
        trouble = {kind: [name for part in [held_out, *units] for _, name in part[kind]]
                   for kind in ("split", "skipped")}
        del held_out["entry"]
        manifest = {"format_version": FORMAT_VERSION, **self.facts, "num_shards": self.goal,
                    "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
                    "vocab_size": self.tokenizer.n_vocab, "eot_id": self.tokenizer.eot_token,
                    **{kind: {"count": len(names), "first": names[:NAMED_TROUBLES]}
                       for kind, names in trouble.items()},
                    "held_out": held_out, "units": units, "shards": entries}
        self.give_back(range(len(self.units)))
        publish(whole, self.folder, manifest)
        self.clear()
        return manifest

    def clear(self) -> None:
        """Remove what only an unfinished dataset needs."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.with_suffix(".lock").unlink(missing_ok=True)


def publish(whole: Path, folder: Path, manifest: dict) -> None:
    """Give a finished folder its name; a dataset that has it grows: its files stay, the manifest is last."""
    if not folder.exists():
        write_json(whole / "manifest.json", manifest)
        os.replace(whole, folder)
        return
    for entry in manifest["shards"]:
        link(whole / entry["file"], folder / entry["file"])
    write_json(folder / "manifest.json", manifest)
    shutil.rmtree(whole)


def data_folder(name: str) -> Path:
    if not re.fullmatch(FOLDER_NAME, name):
        raise UserError("--name must have only letters, digits, '.', '_' and '-', since it becomes a folder; "
                        f"it is {name!r}")
    return shards.DATA / name


def link(path: Path, name: Path) -> None:
    """Let a file have a further name, or a copy where there are no links; one that is there stays."""
    if name.exists():
        return
    try:
        os.link(path, name)
    except OSError:
        partial = name.with_name(f"{name.name}.partial")
        shutil.copyfile(path, partial)
        os.replace(partial, name)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------

def part_of(text: str) -> tuple[int, int]:
    """The type of --part: 2/3 is the second of three, (1, 3)."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be like 1/3, 2/3 or 3/3, is {text!r}")
    return int(match[1]) - 1, int(match[2])


def parse_arguments() -> argparse.Namespace:
    parser = documents.Parser("Turn documents into token shards.")
    parser.add_argument("-v", "--version", "--source", nargs="+", default=["stdlib"],
                        help="stdlib; FineWeb: 10B 100B 350B full, and with `edu` behind; ready-made GPT-2 "
                             "shards: 10B-gpt2 100B-gpt2 10Bedu-gpt2; or files, folders and globs "
                             "(.txt .md .py .jsonl .parquet, plain, .gz or .zst)")
    parser.add_argument("-ss", "--shard_size", type=positive, default=10**8,
                        help="tokens in a shard, at most")
    parser.add_argument("-ns", "--num_shards", type=lambda text: positive(text, least=0), default=0,
                        help="shards to train on; 0 takes all text; more than last time adds some")
    parser.add_argument("-t", "--tokenizer", default="gpt4regex_v50256_n1073741824",
                        help="a folder in tokenizers/")
    parser.add_argument("--val_tokens", type=positive, default=10_485_760,
                        help=f"validate on about this many tokens of {BYTES_PER_TOKEN} bytes")
    parser.add_argument("--seed", type=int, default=0, help="decides the order of the documents")
    parser.add_argument("--name", help="folder in data/ (default: SOURCE_TOKENIZER)")
    parser.add_argument("--num_workers", type=positive, default=documents.available_cores(),
                        help="processes that tokenize")
    parser.add_argument("--part", type=part_of, metavar="I/N",
                        help="prepare only the I-th of N parts of FineWeb's files, for many machines")
    parser.add_argument("--keep_text", action="store_true", help="keep downloaded parquet files")
    parser.add_argument("--dry_run", action="store_true",
                        help="only say which files, how many bytes, how much disk and time it takes")
    return parser.parse_args()


@documents.command
def main() -> None:
    args = parse_arguments()
    if args.shard_size >= 2**31:
        raise UserError("--shard_size must be below 2^31, since a shard's header counts its tokens in int32; "
                        f"it is {args.shard_size}")
    if args.version[0] in hub.READY_MADE and not os.path.exists(args.version[0]):
        if documents.is_first_process():
            fetch_ready_made(args.version[0], args)
        return
    part, parts = args.part or (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    source = documents.open_source(args.version)
    tokenizer = load_tokenizer(args.tokenizer)
    folder = data_folder(args.name or f"{source.label}_{tokenizer.name}")
    if args.dry_run:
        say_what_it_takes(source, tokenizer, args)
        return
    facts = {"source": source.label, "revision": getattr(source, "revision", ""),
             "source_fingerprint": source.fingerprint, "tokenizer": tokenizer.name,
             "tokenizer_sha256": tokenizer_sha256(tokenizer), "seed": args.seed,
             "shard_size": args.shard_size, "val_tokens": args.val_tokens}
    units = source.units(args.seed)
    preparation = Preparation(folder, units, tokenizer, facts, args)
    if folder.exists() and (part or not grows(folder, facts, args.num_shards)):
        return
    parts = min(parts, len(units))      # text that is one unit is prepared by the first process
    if part >= parts:
        return
    preparation.begin()
    if parts > 1:
        prepare_part(preparation, part, parts)
        if args.part or part:
            return
        wait_for_parts(preparation, parts)
    with documents.locked(preparation.partial / "whole.lock", wait=False):
        held_out = preparation.held_out(source)
        if held_out["cut_characters"]:
            preparation.units = Parts(source, held_out["cut_characters"]).units(args.seed)
        all_progress = preparation.write_units(range(len(units)), held_out["one_in"], args.num_shards)
        manifest = preparation.finish(all_progress, held_out)
    if source.replaced:
        print(f"replaced {source.replaced:,} invalid UTF-8 sequences by U+FFFD")
    for trouble, why in (("split", "too long or odd to encode whole"),
                         ("skipped", "that tiktoken cannot encode")):
        count, first = manifest[trouble]["count"], manifest[trouble]["first"]
        if count:
            print(f"{trouble} {count:,} documents {why}: {', '.join(first[:5])}{' ...' if count > 5 else ''}")
    print(f"wrote {describe(folder, manifest)}")


def grows(folder: Path, facts: dict, num_shards: int) -> bool:
    """Whether more shards are wanted than the dataset has; if it is there as wanted, that is said.

    raises  UserError if it was made from something else
    """
    remove = f"rm -r {shlex.quote(str(folder))}"
    try:
        manifest = read_manifest(folder / "manifest.json")
        Dataset(folder, manifest).verify()
    except UserError as error:
        raise UserError(f"{error}; first remove the old with: {remove}") from error
    wanted = num_shards or sys.maxsize
    ended = all(unit["done"] for unit in manifest.get("units", ()))
    had = manifest.get("num_shards") or sys.maxsize
    differing = [key for key, value in facts.items() if manifest.get(key) != value]
    if wanted < had or ("units" not in manifest and wanted != had):
        differing.append("num_shards")
    if "source" in differing:
        differing = [key for key in differing if key not in ("source_fingerprint", "revision")]
    if differing:
        raise UserError(f"{folder.relative_to(shards.ROOT)} exists and was made with another "
                        f"{', '.join(differing)}; choose another --name or remove it with: {remove}")
    if wanted > had and not (ended and "units" in manifest and not manifest["num_shards"]):
        return True
    print(f"reusing {describe(folder, manifest)}")
    return False


def prepare_part(preparation: Preparation, part: int, parts: int) -> None:
    """Write the shards of every parts-th unit; too many or too few are mended when all are put together."""
    name = f"part_{part + 1}_of_{parts}"
    with documents.locked(preparation.partial / f"{name}.lock", wait=False):
        goal = -(-preparation.goal // parts)
        found = preparation.write_units(range(part, len(preparation.units), parts), one_in(0), goal)
        (preparation.partial / f"{name}.done").touch()
    print(f"part {part + 1} of {parts}: {sum(len(progress.entries) for progress in found):,} shards in "
          f"{preparation.partial.relative_to(shards.ROOT)}; when all parts are there, put them together with "
          "the same command without --part (machines that share no disk: copy these folders into one first)",
          flush=True)


def wait_for_parts(preparation: Preparation, parts: int) -> None:
    """Under torchrun the first process puts together what all made; torchrun ends it if another one fails."""
    while missing := [part for part in range(1, parts + 1)
                      if not (preparation.partial / f"part_{part}_of_{parts}.done").exists()]:
        time.sleep(min(1.0, 0.1 * len(missing)))


def describe(folder: Path, manifest: dict) -> str:
    def total(split: str, what: str) -> str:
        return f"{sum(shard[what] for shard in manifest['shards'] if shard['split'] == split):,}"
    return (f"{folder.relative_to(shards.ROOT)}: "
            f"{total('train', 'tokens')} tokens of {total('train', 'documents')} documents to train on, "
            f"{total('val', 'tokens')} of {total('val', 'documents')} to validate on")


def say_what_it_takes(source: Source, tokenizer: tiktoken.Encoding, args: argparse.Namespace) -> None:
    """What the work would need: exact where the Hub tells it, and else an estimate that says so."""
    began, text = time.perf_counter(), "The quick brown fox jumps over the lazy dog, 1234 times. " * 20_000
    tokens_of_text = len(tokenizer.encode_ordinary(text))
    rate = tokens_of_text / (time.perf_counter() - began) * args.num_workers
    units = [unit for unit in source.units(args.seed) if unit.size]
    if not units:
        raise UserError("--dry_run is for FineWeb; local text needs no download, so just start")
    tokens = sum(unit.size for unit in units) * TOKENS_PER_PARQUET_BYTE
    if args.num_shards:
        tokens = min(tokens, args.num_shards * args.shard_size)
    needed, expected = [], 0.0
    for unit in units:
        if expected < tokens:
            needed.append(unit)
            expected += unit.size * TOKENS_PER_PARQUET_BYTE
    for unit in needed:
        print(f"{unit.name:<60} {unit.size / 1e6:>10,.1f} MB")
    download = sum(unit.size for unit in needed)
    largest = sorted((unit.size for unit in needed), reverse=True)[:2]
    text = download if args.keep_text else sum(largest)
    disk = tokens * shard_format(tokenizer.n_vocab)[2].itemsize + text
    print(f"files       {len(needed):,} of {len(units):,} of {source.label}, and one for held-out documents "
          "if it is not among them")
    print(f"download    {download / 1e6:,.1f} MB")
    print(f"tokens      about {tokens / 1e6:,.1f} million, if a byte of parquet is {TOKENS_PER_PARQUET_BYTE}")
    free = shutil.disk_usage(shards.ROOT).free
    print(f"disk        about {disk / 1e6:,.1f} MB; {free / 1e6:,.0f} MB are free")
    print(f"time        about {tokens / rate / 60:,.1f} minutes of tokenizing at {rate:,.0f} tokens/s, "
          f"measured now on plain words, with {args.num_workers} workers; the download at 50 MB/s would take "
          f"{download / 50e6 / 60:,.1f} minutes beside it")


# ------------------------------------------------------------------------------------------------
# Ready-made shards
# ------------------------------------------------------------------------------------------------

def fetch_ready_made(version: str, args: argparse.Namespace) -> None:
    """Bring token shards of GPT-2's vocabulary from the Hub, and write the manifest that they lack."""
    tokenizer = load_tokenizer("gpt2")
    folder = data_folder(args.name or version)
    files = hub.list_files(hub.READY_MADE[version], "", ".bin")
    val = [file for file in files if "_val_" in file.path][:1]
    train = [file for file in files if "_train_" in file.path]
    train = train[:args.num_shards or len(train)]
    if not val or not train:
        raise UserError(f"{hub.READY_MADE[version]} has no shards to train or to validate on")
    if args.dry_run:
        size = sum(file.size for file in val + train)
        print(f"{len(val + train)} files, {size / 1e6:,.1f} MB to download and on disk, about "
              f"{(size - 1024 * len(val + train)) / 2e6:,.1f} million tokens")
        return
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, file in enumerate(tqdm(val + train, unit=" shards", disable=not sys.stderr.isatty(),
                                       leave=False)):
        name = f"{'train' if number else 'val'}_{number:06d}.bin"
        finished = next((path for path in (folder / name, partial / name)
                         if path.is_file() and not hub.problem_of(path, file)), None)
        if finished:
            link(finished, partial / name)
        else:
            bring(file, partial / name, args.keep_text)
        entries.append(entry_of(partial / name, "train" if number else "val", tokenizer))
    manifest = {"format_version": FORMAT_VERSION, "source": hub.READY_MADE[version],
                "revision": val[0].revision, "tokenizer": tokenizer.name,
                "tokenizer_sha256": tokenizer_sha256(tokenizer), "vocab_size": tokenizer.n_vocab,
                "eot_id": tokenizer.eot_token, "shards": entries}
    publish(partial, folder, manifest)
    print(f"wrote {describe(folder, manifest)}")


def bring(file: hub.HubFile, path: Path, keep: bool) -> None:
    """Copy a file of the Hub to `path`; what was not in the cache before is not there afterwards."""
    keep = keep or hub.in_cache(file)
    copy = hub.fetch(file)
    partial = path.with_name(f"{path.name}.partial")
    shutil.copyfile(copy, partial)
    os.replace(partial, path)
    if not keep:
        hub.forget(copy)


def entry_of(path: Path, split: str, tokenizer: tiktoken.Encoding) -> dict:
    """What a manifest says of a shard that somebody else made."""
    tokens = read_shard(path, None)
    lengths = np.array([len(token) for token in token_bytes(tokenizer)])
    if len(tokens) and int(tokens.max()) >= tokenizer.n_vocab:
        raise UserError(f"{path.name} is not of tokenizer {tokenizer.name}: it has token {int(tokens.max())}")
    counts = np.bincount(tokens, minlength=tokenizer.n_vocab)
    return {"file": path.name, "split": split, "tokens": len(tokens),
            "documents": int(counts[tokenizer.eot_token]), "bytes": int(counts @ lengths),
            "sha256": documents.sha256_of(path)}


if __name__ == "__main__":
    main()
