"""Mixtures: one dataset of several sources, each with its share of the training tokens.

The next document comes from the source with the smallest (tokens so far + half of that document) / share, so
any prefix of the data has about these shares: with two sources, each is off by at most half of the longest
document. The mixture ends when the source whose turn it is runs out. Each source is shuffled and split into
training and held-out documents as if it were used alone; what any source holds out is never trained on.
The val and test shards hold the documents of one source after those of another, so runs on any mixture of
the same sources are validated on the same text. The manifest lists the sources in that order:

    "sources": [{"name": "books", "source": "books-1f0c9a3e", "fingerprint": "1f0c9a3e...", "share": 0.7,
                 "documents": 812, "tokens": 700123, "bytes": 2712345, "documents_left": 0, "bytes_left": 0,
                 "val_documents": 44, "test_documents": 43, "held_out": {"rule": ...}}, ...]

documents_left and bytes_left are counted only for text on this machine.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path

import tiktoken

from benchtop.command_line import counted
from benchtop.documents import Document, Unit
from benchtop.errors import UserError
from benchtop.held_out import TEST, VAL, Rule
from benchtop.prepare import Encoded, Preparation, tokenized
from benchtop.shards import ShardWriter
from benchtop.sources import Mixture
from benchtop.unfinished import Progress, assert_kinds, damage_in, read_held_out

NOTHING = {"unit": 0, "read": 0, "documents": 0, "tokens": 0, "bytes": 0}
FAR_OFF = 0.005         # mixed_in_words adds a note if an actual share is off by more than this


class Lane:
    """One source of a mixture, read document by document.

    far   what is used: all units before `unit` and `read` documents of `unit`; total documents, tokens, bytes
    next  the next document as (unit, number in the unit, document); None after the last one
    """

    def __init__(self, units: list[Unit], rules: list[Rule], share: float, far: dict, tokenizer: str,
                 num_workers: int):
        self.units, self.rules, self.share, self.far = units, rules, share, far
        self.tokenizer = tokenizer
        # two or more where allowed: a single worker is this process, which would wait for each document
        self.num_workers = max(min(2, num_workers), math.ceil(share * num_workers))
        self.stream = self._read()
        self.next = next(self.stream, None)

    def trainable(self, unit: Unit) -> Iterator[Document]:
        return (document for document in unit.read()
                if not any(rule.holds_out(document[1], document[0]) for rule in self.rules))

    def _read(self) -> Iterator[tuple[int, int, Encoded]]:
        read = self.far["read"]
        for number in range(self.far["unit"], len(self.units)):
            stream = islice(self.trainable(self.units[number]), read, None)
            for document in tokenized(stream, self.tokenizer, self.num_workers):
                yield number, read, document
                read += 1
            read = 0

    @property
    def due(self) -> float:
        """The lane with the smallest value goes next. Counting half of the next document rounds shares to the
        nearest document (as the Webster/Sainte-Lague method does for seats in elections)."""
        tokens = self.next[2].tokens if self.next else None
        return (self.far["tokens"] + (0 if tokens is None else len(tokens) / 2)) / self.share

    def take(self) -> None:
        """Count the next document as used and read the one after it."""
        unit, read, document = self.next
        used = 0 if document.tokens is None else 1
        self.far = {"unit": unit, "read": read + 1, "documents": self.far["documents"] + used,
                    "tokens": self.far["tokens"] + (len(document.tokens) if used else 0),
                    "bytes": self.far["bytes"] + used * document.num_bytes}
        self.next = next(self.stream, None)


class Mixing(Preparation):
    """A mixture in preparation. All shards belong to one unit; `sources` in a shard's entry records how much
    of each source is used up to the end of that shard, so that an interrupted command can resume there."""

    def __init__(self, folder: Path, mixture: Mixture, tokenizer: tiktoken.Encoding, facts: dict,
                 args: argparse.Namespace):
        self.mixture = mixture
        self.units_of = [source.units(args.seed) for source, _ in mixture.parts]
        units = [replace(unit, name=f"{name}/{unit.name}")
                 for name, units in zip(mixture.names, self.units_of, strict=True) for unit in units]
        super().__init__(folder, units, tokenizer, facts, args)

    def make(self) -> dict:
        """Make the dataset; returns its manifest."""
        held_out = self.held_out(self.mixture)
        rules = [Rule.of_facts(source["held_out"]) for source in held_out["sources"]]
        progress = self.write_mixed(rules)
        sources = held_out.pop("sources")
        far = self.far_of(progress.cut_back(self.goal or len(progress.entries)))
        for number, (source, rule) in enumerate(zip(sources, rules, strict=True)):
            used = {key: far[number][key] for key in ("documents", "tokens", "bytes")}
            source |= used | self.left_of(number, rule, rules, used)
        return self.finish([progress], held_out, {"sources": sources})

    def held_out(self, mixture: Mixture) -> dict:
        """Like Preparation.held_out; `sources` has the rule and the document counts of each source.

        raises  UserError if a source has too little text
        """
        path = self.partial / "val.json"
        if path.exists():
            facts = read_held_out(path)
            with damage_in(path):
                assert_kinds({"name": str, "held_out": dict}, *facts["sources"])
            return facts
        try:
            rules, chosen = zip(*(self.choose_held_out(source) for source, _ in mixture.parts), strict=True)
        except UserError:
            self.clear()
            raise
        validated = {text for documents in chosen for _, text in documents[VAL]}
        for documents in chosen:
            documents[TEST] = [document for document in documents[TEST] if document[1] not in validated]
        entries, trouble, counts = self.write_held_out(chosen, mixture.label)
        sources = [{"name": name, "source": source.label, "fingerprint": source.fingerprint,
                    "share": float(share), "val_documents": count[VAL], "test_documents": count[TEST],
                    "held_out": rule.facts()}
                   for name, (source, share), rule, count
                   in zip(mixture.names, mixture.parts, rules, counts, strict=True)]
        self.save_held_out({"rule": "of each source by its own rule", "sources": sources}, entries, trouble)
        return read_held_out(path)

    def far_of(self, progress: Progress) -> list[dict]:
        """How much of each source is used up to the end of the last shard, as Lane.far."""
        return progress.entries[-1]["sources"] if progress.entries else [NOTHING] * len(self.units_of)

    def write_mixed(self, rules: list[Rule]) -> Progress:
        """Write shards until there are as many as wanted, or the source whose turn it is runs out."""
        progress = replace(self._progress_of(0), name="mixture")
        self.bar.update(progress.tokens)
        if progress.done or 0 < self.goal <= len(progress.entries):
            return progress
        lanes = [Lane(rule.documents(source).units(self.args.seed), rules, float(share), far,
                      self.tokenizer.name, self.args.num_workers)
                 for (source, share), rule, far
                 in zip(self.mixture.parts, rules, self.far_of(progress), strict=True)]
        self._unit_folder(0).mkdir(exist_ok=True)
        try:
            self._mix(lanes, progress)
        finally:
            for lane in lanes:
                lane.stream.close()
            self.bar.close()
        return progress

    def _mix(self, lanes: list[Lane], progress: Progress) -> None:
        writer, seen = self._writer(self._unit_folder(0)), progress.documents
        progress.split, progress.skipped = ([item for item in items if item[0] < seen]
                                            for items in (progress.split, progress.skipped))
        while (lane := min(lanes, key=lambda lane: lane.due)).next:
            document = lane.next[2]
            if document.tokens is not None and not writer.has_room_for(document.tokens):
                self._close_mixed(lanes, progress, writer, seen)
                if len(progress.entries) == self.goal:
                    return
            self._take(document, seen, writer, progress)
            lane.take()
            seen += 1
        progress.done = True
        if writer.pending:
            self._close_mixed(lanes, progress, writer, seen)
        self._save(0, progress)

    def _close_mixed(self, lanes: list[Lane], progress: Progress, writer: ShardWriter, seen: int) -> None:
        self._close_shard(0, progress, writer, seen, {"sources": [lane.far for lane in lanes]})
        for first, lane in zip(self._firsts(), lanes, strict=True):
            self.give_back(range(first, first + lane.far["unit"]))

    def _firsts(self) -> list[int]:
        """Index of each source's first unit in the list of all units."""
        return list(accumulate(map(len, self.units_of), initial=0))[:-1]

    def left_of(self, number: int, rule: Rule, rules: list[Rule], used: dict) -> dict:
        """A source's trainable documents and bytes that are not used; {} for text on the Hub, not counted."""
        source, _ = self.mixture.parts[number]
        if source.is_large:
            return {}
        sizes = [len(text.encode()) for name, text in rule.documents(source)
                 if text and not any(each.holds_out(text, name) for each in rules)]
        return {"documents_left": len(sizes) - used["documents"], "bytes_left": sum(sizes) - used["bytes"]}


def mixed_in_words(manifest: dict) -> list[str]:
    """Each source's actual share and what is left of it, and a note if a share is off by over FAR_OFF."""
    sources = manifest["sources"]
    total = max(1, sum(source["tokens"] for source in sources))
    lines = ["mixed " + "; ".join(
        f"{source['tokens'] / total:.1%} {source['name']}, {source['tokens']:,} tokens of "
        f"{counted(source['documents'], 'document')}, {left_in_words(source)}" for source in sources)]
    if any(abs(source["tokens"] / total - source["share"]) > FAR_OFF for source in sources):
        wanted = ", ".join(f"{source['share']:.1%} {source['name']}" for source in sources)
        lines.append(f"note: the documents are too long to match {wanted} more closely; use more text or "
                     "shorter documents")
    return lines


def left_in_words(source: dict) -> str:
    left = source.get("documents_left")
    if left is None:
        return "the rest unused"
    if not left:
        return "all used"
    return f"{left:,} unused ({source['bytes_left'] / (source['bytes'] + source['bytes_left']):.0%} of it)"
