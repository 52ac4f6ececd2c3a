"""Turn documents into token shards; an interrupted run can be resumed.

A dataset is made in the folder .NAME.partial, unit by unit of its source and shard by shard. If a run is
killed, the next one resumes after the last finished shard and produces identical files. The folder data/NAME
appears when the dataset is complete.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from benchtop import files, places
from benchtop.command_line import counted
from benchtop.documents import Document, Source, Unit, batched
from benchtop.errors import UserError
from benchtop.held_out import TEST, VAL, Rule, documents_to_hold_out, rule_for
from benchtop.shards import FORMAT_VERSION, Dataset, ShardWriter, read_manifest, shard_format
from benchtop.tokenizer import CannotEncode, encode, load_tokenizer, token_bytes, tokenizer_sha256
from benchtop.unfinished import (
    Progress,
    damage_in,
    differing_facts,
    empty,
    hold,
    partial_of,
    read_held_out,
    read_progress,
    read_was_here,
    take_up,
    write_signed,
)
from benchtop.workers import in_parallel
from benchtop.xz import TRAINING_BYTES, bar_in_words, xz_bar

NAMED_TROUBLES = 100            # maximum number of split or skipped documents that the manifest names


# ------------------------------------------------------------------------------------------------
# Tokenize
# ------------------------------------------------------------------------------------------------

_tokenizer: tiktoken.Encoding


def _set_tokenizer(name: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(name)


class Encoded(NamedTuple):
    """A tokenized document."""
    name: str
    tokens: np.ndarray | None   # <|endoftext|> first; None if tiktoken cannot encode the document
    num_bytes: int              # length in UTF-8
    was_split: bool             # cut where a token might have spanned the cut


def tokenize(batch: list[Document]) -> list[Encoded]:
    """The tokens of each document. Call _set_tokenizer first."""
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
    batches = batched(stream)
    for batch in in_parallel(tokenize, batches, num_workers, _set_tokenizer, (tokenizer,)):
        yield from batch


# ------------------------------------------------------------------------------------------------
# From units to shards; a kill loses at most one shard
# ------------------------------------------------------------------------------------------------

class Preparation:
    """A dataset that is being made in the folder .NAME.partial, where a later run can resume.

    units  all parts of the text
    facts  settings that determine the content of all shards; a run with other ones cannot resume
    goal   number of training shards; 0: all of the text
    """

    def __init__(self, folder: Path, units: list[Unit], tokenizer: tiktoken.Encoding, facts: dict,
                 args: argparse.Namespace):
        self.folder, self.units, self.tokenizer, self.facts = folder, units, tokenizer, facts
        self.args = args
        self.goal = args.num_shards
        self.partial = partial_of(folder)
        self.manifest_before = manifest_text(folder)
        self.bar = tqdm(unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty(), leave=False,
                        total=self.goal * args.shard_size or None)
        self.begun, self.tokens_now = time.perf_counter(), 0

    @contextlib.contextmanager
    def held(self, wait: bool = False, shared: bool = False) -> Iterator[None]:
        """Lock the dataset's name against other commands, and resume what an interrupted run left.

        shared  allow processes that make other parts of the dataset at the same time
        raises  UserError if another command has the lock, finished the dataset meanwhile, or left shards
        """
        with hold(self.partial, wait, shared):
            if manifest_text(self.folder) != self.manifest_before:
                raise UserError(f"another process finished {self.folder.relative_to(places.ROOT)} meanwhile; "
                                "run the same command again")
            with files.locked(self.partial / "begin.lock", wait=True):
                take_up(self.partial, self.facts)
                self._begin()
            yield

    def _begin(self) -> None:
        was_here = self.partial / "was_here.json"
        if was_here.exists():
            with damage_in(was_here):
                if read_was_here(was_here) is not None:
                    return
        elif self.manifest_before:
            self._take_over(read_manifest(self.folder / "manifest.json"))
        # text that was here before is not deleted
        files.write_json(was_here, [unit.name for unit in self.units if unit.is_here()])

    def _take_over(self, manifest: dict) -> None:
        """Start from the shards of a finished dataset that is to grow."""
        held_out, train = ([entry for entry in manifest["shards"] if (entry["split"] == "train") == wanted]
                           for wanted in (False, True))
        for entry in held_out:
            files.link(self.folder / entry["file"], self.partial / entry["file"])
        mixed = {"sources": manifest["sources"]} if "sources" in manifest else {}
        write_signed(self.partial / "val.json", manifest["held_out"] | mixed | {"entries": held_out})
        for number, unit in enumerate(manifest["units"]):
            progress = Progress(**{key: unit[key] for key in ("name", "done", "split", "skipped")})
            while train and len(progress.entries) < unit["shards"]:
                entry = train.pop(0)
                name = f"{len(progress.entries) + 1:06d}.bin"
                progress.entries.append(entry | {"file": name})
                self._unit_folder(number).mkdir(parents=True, exist_ok=True)
                files.link(self.folder / entry["file"], self._unit_folder(number) / name)
            self._save(number, progress)

    def held_out(self, source: Source) -> dict:
        """Write the validation and test shards, unless they exist.

        returns  what the manifest says about held-out documents
        raises   UserError if the source has too little text
        """
        path = self.partial / "val.json"
        if path.exists():
            return read_held_out(path)
        try:
            rule, chosen = self.choose_held_out(source)
        except UserError:
            self.clear()
            raise
        entries, trouble, _ = self.write_held_out([chosen], source.label)
        self.save_held_out(rule.facts(), entries, trouble)
        return read_held_out(path)

    def choose_held_out(self, source: Source) -> tuple[Rule, dict[str, list[Document]]]:
        """How documents of a source are held out, and the documents for VAL and for TEST.

        raises  UserError if the source has too little text
        """
        rule = rule_or_complaint(source)
        chosen = documents_to_hold_out(source, rule, self.args.val_tokens)
        if rule.part:
            print(f"note: the documents of {source.label} are too large to hold out whole; they are cut into "
                  f"parts of about {rule.part:,} characters, and some of the parts are held out")
        return rule, chosen

    def write_held_out(self, chosen: list[dict[str, list[Document]]], label: str,
                       ) -> tuple[list[dict], Progress, list[dict[str, int]]]:
        """Write the validation and test shards, with the documents of one source after those of another.

        chosen   documents for VAL and for TEST, of each source
        returns  the shards' manifest entries; split and skipped documents; number of documents per source
        """
        entries, trouble, counts = [], Progress(""), [{} for _ in chosen]
        for split in (VAL, TEST):
            writer, number = self._writer(self.partial), 0
            for documents, count in zip(chosen, counts, strict=True):
                before = len(writer.pending)
                for document in self._tokenized(documents[split]):
                    self._take(document, number, writer, trouble)
                    number += 1
                count[split] = len(writer.pending) - before
                if split == VAL and not count[split]:
                    raise UserError(f"tiktoken can encode none of the held-out documents of {label}")
            if writer.pending:
                entries.append(writer.write(f"{split}_000000.bin", split))
        return entries, trouble, counts

    def save_held_out(self, facts: dict, entries: list[dict], trouble: Progress) -> None:
        val = entries[0]
        write_signed(self.partial / "val.json", {
            "documents": val["documents"], "bytes": val["bytes"], **facts, "split": trouble.split,
            "skipped": trouble.skipped, "entries": entries})

    def write_units(self, numbers: Iterable[int], rule: Rule, goal: int) -> list[Progress]:
        """Write the shards of these units, in this order, until there are `goal` shards (0: all).

        rule     how documents are held out
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
                self._write_unit(number, progress, rule, left, numbers[place + 1:][:1])
            self.give_back([number])
        self.bar.close()
        return all_progress

    def _write_unit(self, number: int, progress: Progress, rule: Rule, limit: int,
                    following: list[int]) -> None:
        """Write the unit's remaining shards, up to `limit` in total; download the next unit meanwhile."""
        unit = self.units[number]
        trainable = (document for document in unit.read() if not rule.holds_out(document[1], document[0]))
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
        """Whether a unit after this one is needed, as estimated from a twentieth of this one's documents."""
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

    def _close_shard(self, number: int, progress: Progress, writer: ShardWriter, seen: int,
                     facts: dict | None = None) -> None:
        entry = writer.write(f"{len(progress.entries) + 1:06d}.bin", "train")
        progress.entries.append(entry | {"unit": progress.name, "read": seen} | (facts or {}))
        self._save(number, progress)
        self.tokens_now += entry["tokens"]
        if self.bar.disable and entry["tokens"] >= 10**7:
            rate = self.tokens_now / (time.perf_counter() - self.begun)
            print(f"a shard of {entry['tokens']:,} tokens; {rate:,.0f} tokens/s so far", flush=True)

    def give_back(self, numbers: Iterable[int]) -> None:
        """Delete the text of these units, unless it was here before or --keep_text is set."""
        was_here = read_was_here(self.partial / "was_here.json")
        if self.args.keep_text or was_here is None:
            return
        for number in numbers:
            unit = self.units[number]
            if unit.name not in was_here and unit.is_here():
                unit.remove()

    def _tokenized(self, stream: Iterable[Document]) -> Iterator[Encoded]:
        return tokenized(stream, self.tokenizer.name, self.args.num_workers)

    def _writer(self, folder: Path) -> ShardWriter:
        return ShardWriter(folder, self.tokenizer.n_vocab, self.args.shard_size)

    def _unit_folder(self, number: int) -> Path:
        return self.partial / f"unit_{number:06d}"

    def _progress_of(self, number: int) -> Progress:
        return read_progress(self._unit_folder(number) / "progress.json", self.units[number].name)

    def _save(self, number: int, progress: Progress) -> None:
        self._unit_folder(number).mkdir(exist_ok=True)
        write_signed(self._unit_folder(number) / "progress.json", asdict(progress))

    def finish(self, all_progress: list[Progress], held_out: dict, facts: dict | None = None) -> dict:
        """Give all shards their final names, write the manifest last, and return it.

        facts  additional content of the manifest
        """
        whole = new_whole(self.folder)
        val, *others = held_out.pop("entries")
        for entry in (val, *others):
            files.link(self.partial / entry["file"], whole / entry["file"])
        left, entries, units = self.goal or sys.maxsize, [val], []
        for number, progress in enumerate(all_progress):
            progress = progress.cut_back(left)
            left -= len(progress.entries)
            for entry in progress.entries:
                name = f"train_{len(entries):06d}.bin"
                files.link(self._unit_folder(number) / entry["file"], whole / name)
                entries.append(entry | {"file": name})
            units.append(asdict(progress) | {"shards": len(progress.entries)})
            del units[-1]["entries"]
        trouble = {kind: [name for part in [held_out, *units] for _, name in part[kind]]
                   for kind in ("split", "skipped")}
        manifest = {"format_version": FORMAT_VERSION, **self.facts, "num_shards": self.goal,
                    "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
                    "vocab_size": self.tokenizer.n_vocab, "eot_id": self.tokenizer.eot_token,
                    **{kind: {"count": len(names), "first": names[:NAMED_TROUBLES]}
                       for kind, names in trouble.items()},
                    "held_out": held_out, **(facts or {}), "units": units, "shards": [*entries, *others]}
        manifest |= self._xz_bar(Dataset(whole, manifest))
        self.give_back(range(len(self.units)))
        publish(whole, self.folder, manifest)
        self.clear()
        return manifest

    def _xz_bar(self, dataset: Dataset) -> dict:
        if all(shard["split"] != "train" for shard in dataset.manifest["shards"]):
            return {}       # tiktoken could not encode any training document
        train, val = dataset.tokens("train"), dataset.tokens("val")
        if sum(map(len, train)) >= TRAINING_BYTES / 8:
            print("compressing the text with xz -9e as a baseline; this takes a few seconds", flush=True)
        return xz_bar(train, val, token_bytes(self.tokenizer))

    def clear(self) -> None:
        """Delete what only an unfinished dataset needs."""
        empty(self.partial)


def rule_or_complaint(source: Source) -> Rule:
    """How documents of the source are held out.

    raises  UserError if it has too little text for that
    """
    rule = rule_for(source)
    if rule:
        return rule
    characters = sum(len(text) for _, text in source)
    if not characters:
        raise UserError(f"the source {source.label} is empty: no text to tokenize")
    if all(not text or text.isspace() for _, text in source):
        raise UserError(f"the source {source.label} is nothing but white space ({characters:,} characters)")
    raise UserError(f"the source {source.label} has only {characters:,} characters, too few to train on one "
                    "part and validate on another; give it more text")


def manifest_text(folder: Path) -> str:
    """The text of the current manifest; empty without one."""
    path = folder / "manifest.json"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def new_whole(folder: Path) -> Path:
    """A new, empty folder for all files of a dataset."""
    whole = folder.with_name(f".{folder.name}.whole.partial")
    if whole.is_symlink() or whole.is_file():
        whole.unlink()
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    return whole


def publish(whole: Path, folder: Path, manifest: dict) -> None:
    """Give a finished folder its name; an existing dataset grows: its files stay, the manifest comes last."""
    if not folder.exists():
        files.write_json(whole / "manifest.json", manifest)
        os.replace(whole, folder)
        return
    for entry in manifest["shards"]:
        files.link(whole / entry["file"], folder / entry["file"])
    files.write_json(folder / "manifest.json", manifest)
    shutil.rmtree(whole)


def data_folder(typed: str) -> Path:
    name = places.name_in(places.DATA, typed)
    if not re.fullmatch(places.FOLDER_NAME, name):
        raise UserError("--name may have only letters, digits, '.', '_' and '-', since it names a folder; "
                        f"it is {typed!r}")
    folder = places.DATA / name
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder} is a link to {os.readlink(folder)}, which does not exist; create it, "
                        "or choose another --name")
    return folder


# ------------------------------------------------------------------------------------------------
# Existing datasets, and parts of one
# ------------------------------------------------------------------------------------------------

def grows(folder: Path, facts: dict, num_shards: int) -> bool:
    """Whether more shards are wanted than the dataset has; if not, prints that it is reused.

    raises  UserError if it was made with other settings
    """
    manifest = manifest_of_whole(folder)
    wanted = num_shards or sys.maxsize
    ended = all(unit["done"] for unit in manifest.get("units", ()))
    had = manifest.get("num_shards") or sys.maxsize
    differing = differing_facts(manifest, facts)
    if wanted < had or ("units" not in manifest and wanted != had):
        differing.append("num_shards")
    if differing:
        refuse_differing(folder, differing)
    if wanted > had and not (ended and "units" in manifest and not manifest["num_shards"]):
        return True
    print(f"reusing {describe(folder, manifest)}")
    return False


def manifest_of_whole(folder: Path) -> dict:
    """raises  UserError if the existing dataset is damaged"""
    try:
        manifest = read_manifest(folder / "manifest.json")
        Dataset(folder, manifest).verify()
        return manifest
    except UserError as error:
        raise UserError(f"{error}; first remove it with: rm -r {shlex.quote(str(folder))}") from error


def refuse_differing(folder: Path, differing: list[str]) -> None:
    """raises  UserError that names the settings that differ from those of an existing dataset"""
    raise UserError(f"{folder.relative_to(places.ROOT)} exists and was made with a different "
                    f"{', '.join(differing)}; choose another --name or remove it with: "
                    f"rm -r {shlex.quote(str(folder))}")


def prepare_part(preparation: Preparation, rule: Rule, part: int, parts: int) -> None:
    """Write the shards of every parts-th unit; too many or too few are corrected when parts are merged."""
    done = done_by(preparation, part, parts)
    if not done.exists():
        with preparation.held(shared=True), files.locked(done.with_suffix(".lock")):
            goal = -(-preparation.goal // parts)
            preparation.write_units(range(part, len(preparation.units), parts), rule, goal)
            done.touch()
    shards = len([*preparation.partial.glob("unit_*/*.bin")])
    print(f"part {part + 1} of {parts} is done: {counted(shards, 'shard')} in "
          f"{preparation.partial.relative_to(places.ROOT)}; when all are done, merge them by running the "
          "same command without --part (if the machines share no disk, first copy these folders into one)",
          flush=True)


def done_by(preparation: Preparation, part: int, parts: int) -> Path:
    """The file that exists once a part of a dataset with this number of shards is finished."""
    return preparation.partial / f"part_{part + 1}_of_{parts}_for_{preparation.goal}.done"


def wait_for_parts(preparation: Preparation, parts: int) -> None:
    """Wait for all parts: under torchrun, rank 0 merges them, and torchrun kills it if another rank fails."""
    while missing := [part for part in range(parts) if not done_by(preparation, part, parts).exists()]:
        time.sleep(min(1.0, 0.1 * len(missing)))


def describe(folder: Path, manifest: dict) -> str:
    def total(split: str, what: str) -> int:
        return sum(shard[what] for shard in manifest["shards"] if shard["split"] == split)
    bar = manifest.get("xz_bpb")
    xz = f"; {bar_in_words(manifest)}: {bar:.3f} bits per byte of the held-out text" if bar else ""
    documents = counted(total("train", "documents"), "document")
    tested = total("test", "documents")
    test = f", {total('test', 'tokens'):,} in {tested:,} for the test split" if tested else ""
    return (f"{folder.relative_to(places.ROOT)}: "
            f"{total('train', 'tokens'):,} tokens in {documents} for training, "
            f"{total('val', 'tokens'):,} in {total('val', 'documents'):,} for validation{test}{xz}")
