"""Which documents of a source are held out: models and tokenizers do not see them and are evaluated on them.

There are two held-out splits. Every run is validated on VAL, so selecting the best of many runs also selects
luck; TEST is therefore used by `trial.py --confirm` only. Of a large source, about one document in 64 is held
out for each split, chosen by a hash of its text: the same ones for everybody, with any tokenizer, seed or
number of shards. If that gives fewer than 64 documents, those with the next hashes are added until there are
64 or 5 % of the text, whichever is less. If documents are too large for that (books, or a single file), all
of them are first cut into parts, and parts are held out in the same way. If a corpus names a file to validate
on (hub.py), that file is held out as a whole, and nothing else.

These decisions depend only on the texts of the source.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchtop.documents import HELD_OUT_ONE_IN, Document, Source, hash_of
from benchtop.errors import UserError

ENOUGH_DOCUMENTS = 64       # documents per split that are held out of a small source,
MOST_OF_TEXT = 0.05         # but not more than this fraction of its bytes
NEARLY_MOST = 0.045         # below this fraction, documents that would exceed MOST_OF_TEXT are skipped;
                            # if fewer than 64 documents do not reach it, the source is cut into parts
LEAST_OF_TEXT = 1 / HELD_OUT_ONE_IN     # smallest fraction to accept, since parts have a minimum length
PARTS = 512                 # number of parts that a source is first cut into, so that 5 % are about 25
LONGEST_PART, SHORTEST_PART, SHORTEST_AT_FIRST = 20_000, 50, 200     # limits of a part, in characters
VAL, TEST = "val", "test"   # the held-out splits; in a large source, where hash % 64 is 0 or 1
BYTES_PER_TOKEN = 4         # converts --val_tokens to an amount of text, the same for every tokenizer


@dataclass(frozen=True)
class Rule:
    """How documents are held out.

    one_in   one document in this many is held out per split, by a hash of its text; 0: only chosen ones
    chosen   hashes of texts that are held out for VAL
    part     minimum length of the parts that documents are cut into, in characters; 0: they stay whole
    file     the only file whose documents are held out
    test     hashes of texts that are held out for TEST, besides one in `one_in`; None: no such split, as in
             data made by earlier versions
    """
    one_in: int = HELD_OUT_ONE_IN
    chosen: frozenset[str] = frozenset()
    part: int = 0
    file: str = ""
    test: frozenset[str] | None = frozenset()

    @classmethod
    def of_facts(cls, facts: dict) -> "Rule":
        """The rule in a manifest; manifests of earlier versions list no documents."""
        test = facts.get("chosen_for_test")
        return cls(facts["one_in"], frozenset(facts.get("chosen", ())), facts["cut_characters"],
                   facts.get("file", ""), None if test is None else frozenset(test))

    def facts(self) -> dict:
        """The rule for a manifest, with a description for people."""
        test = {} if self.test is None else {"chosen_for_test": sorted(self.test)}
        if self.file:
            return {"rule": f"the documents of {self.file}", "one_in": 0, "cut_characters": 0, "chosen": [],
                    "file": self.file} | test
        what = "parts" if self.part else "documents"
        words = (f"one in {self.one_in} {what}, by a hash of its text" if self.one_in else
                 f"the {what} with the smallest hashes, up to {ENOUGH_DOCUMENTS} or {MOST_OF_TEXT:.0%} "
                 "of the text")
        return {"rule": words + (", and as much again for the test split" if test else ""),
                "one_in": self.one_in, "cut_characters": self.part, "chosen": sorted(self.chosen)} | test

    def split_of(self, text: str, name: str = "") -> str:
        """VAL or TEST if a document is held out, else empty; with a held-out file, only its documents are."""
        if self.file and not name.startswith(f"{self.file}:"):
            return ""
        number = hash_of(text)
        if self.file:
            return TEST if self.test is not None and number % HELD_OUT_ONE_IN == 1 else VAL
        if (self.one_in and number % self.one_in == 0) or _name(number) in self.chosen:
            return VAL
        if self.test is None:
            return ""
        return TEST if (self.one_in and number % self.one_in == 1) or _name(number) in self.test else ""

    def holds_out(self, text: str, name: str = "") -> bool:
        """Whether a document is held out for either split."""
        return bool(self.split_of(text, name))

    def covers(self, other: "Rule") -> bool:
        """Whether this rule holds out everything that the other rule holds out."""
        if self.file or other.file or self.part != other.part or other.one_in not in (0, self.one_in):
            return self == other
        if other.one_in and other.test is not None and self.test is None:
            return False
        own = self.chosen | (self.test or frozenset())
        residues = (0,) if self.test is None else (0, 1)
        return all(name in own or (self.one_in and int(name, 16) % self.one_in in residues)
                   for name in other.chosen | (other.test or frozenset()))

    def documents(self, source: Source) -> "Source | Parts":
        """The documents to hold out or to train on: the source's own, or their parts."""
        return Parts(source, self.part) if self.part else source


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


# ------------------------------------------------------------------------------------------------
# Decide
# ------------------------------------------------------------------------------------------------

def rule_for(source: Source) -> Rule | None:
    """How documents of a source are held out; None if it has too little text to hold some out.

    Reads until it has found 64 documents that are held out by hash: a few thousand, or all of a small source.
    """
    if source.held_out_file:
        return Rule(one_in=0, file=source.held_out_file)
    if source.is_large:
        return Rule()
    part, best, best_share = 0, None, LEAST_OF_TEXT
    while True:
        rule, share, characters = _rule_for_whole(Parts(source, part) if part else source, part)
        if share >= best_share:
            best, best_share = rule, share
        part = part // 2 or min(LONGEST_PART, max(SHORTEST_AT_FIRST, characters // PARTS))
        if best_share >= NEARLY_MOST or part < SHORTEST_PART or not characters:
            return best


def _rule_for_whole(stream: Iterable[Document], part: int) -> tuple[Rule, float, int]:
    """The rule for documents that are not cut further, its score, and the number of characters read.

    The score is the fraction of the text that is held out for VAL, or 1 if that is enough documents.
    """
    sizes: dict[int, int] = {}      # hash -> bytes of each distinct text
    characters = held_out = 0
    for _, text in stream:
        characters += len(text)
        number = hash_of(text)
        if text and number not in sizes:
            sizes[number] = len(text.encode())
            held_out += number % HELD_OUT_ONE_IN == 0
            if held_out >= ENOUGH_DOCUMENTS and len(sizes) > held_out:
                return Rule(part=part), 1.0, characters
    total = sum(sizes.values())
    chosen, size = _chosen(sizes, 0, total)
    share = 1.0 if len(chosen) == ENOUGH_DOCUMENTS else size / max(1, total)
    test, _ = _chosen({number: sizes[number] for number in sizes.keys() - chosen}, 1, total)
    return Rule(0, frozenset(map(_name, chosen)), part, test=frozenset(map(_name, test))), share, characters


def _chosen(sizes: dict[int, int], residue: int, total: int) -> tuple[set[int], int]:
    """The hashes of the texts of a small source that are held out for a split, and the bytes of these texts.

    sizes    hash -> bytes of the texts to choose from
    residue  hash % 64 of the texts that would be held out of a large source; they are chosen first
    total    bytes of the source
    """
    chosen, size = set(), 0
    for number in sorted(sizes, key=lambda number: (number % HELD_OUT_ONE_IN != residue, number)):
        if size + sizes[number] <= MOST_OF_TEXT * total:
            chosen.add(number)
            size += sizes[number]
        elif size >= NEARLY_MOST * total:
            break
        if len(chosen) == ENOUGH_DOCUMENTS:
            break
    return chosen, size


def _name(number: int) -> str:
    """A hash as written in a manifest."""
    return f"{number:016x}"


# ------------------------------------------------------------------------------------------------
# Choose
# ------------------------------------------------------------------------------------------------

def documents_to_hold_out(source: Source, rule: Rule, tokens: int) -> dict[str, list[Document]]:
    """Documents of about `tokens` tokens for VAL and for TEST; of a large source, from its first files.

    raises  UserError if there are none for VAL
    """
    budget = BYTES_PER_TOKEN * tokens
    chosen = choose_held_out(_enough_of(rule.documents(source), budget, rule), budget, rule)
    if not chosen[VAL]:
        raise UserError(f"the source {source.label} has no document to hold out; give it more text")
    return chosen


def choose_held_out(stream: Iterable[Document], budget: int, rule: Rule) -> dict[str, list[Document]]:
    """For VAL and for TEST, the held-out texts with the smallest hashes, each once, sorted by hash.

    budget   UTF-8 bytes per split after which to stop
    """
    held: dict[str, dict[int, Document]] = {VAL: {}, TEST: {}}
    sizes = {VAL: 0, TEST: 0}
    for name, text in stream:
        split = rule.split_of(text, name)
        if not text or not split:
            continue
        number = hash_of(text)
        sizes[split] += 0 if number in held[split] else len(text.encode())
        held[split][number] = name, text
        if sizes[split] > 4 * budget:
            held[split] = dict(_up_to(held[split], budget))
            sizes[split] = sum(len(text.encode()) for _, text in held[split].values())
    return {split: [document for _, document in _up_to(documents, budget)]
            for split, documents in held.items()}


def _up_to(held: dict[int, Document], budget: int) -> list[tuple[int, Document]]:
    chosen, size = [], 0
    for number in sorted(held):
        if chosen and size >= budget:
            break
        chosen.append((number, held[number]))
        size += len(held[number][1].encode())
    return chosen


def _enough_of(stream: Source | Parts, budget: int, rule: Rule) -> Iterator[Document]:
    """The documents of the first units, in fixed order, that contain `budget` bytes of text for VAL."""
    size = 0
    for unit in stream.units(seed=None):
        for name, text in unit.read():
            size += len(text.encode()) if rule.split_of(text, name) == VAL else 0
            yield name, text
        if size >= budget or rule.file:     # no other file has held-out text
            return
