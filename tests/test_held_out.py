"""Which documents are held out, of large sources and of small ones.

Run: ./run.sh test tests/test_held_out.py
"""

import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchtop import held_out
from benchtop.briefing import describe_data
from benchtop.documents import Document, Source, hash_of
from benchtop.held_out import TEST, VAL, Parts, Rule, choose_held_out, documents_to_hold_out, rule_for
from benchtop.hub import HubText
from benchtop.sources import open_source


class Texts:
    """A source of these texts."""
    label, is_large, held_out_file = "texts", False, ""
    units = Source.units

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __iter__(self) -> Iterator[Document]:
        yield from ((str(number), text) for number, text in enumerate(self.texts))


def sides(source: Texts, rule: Rule, split: str = VAL) -> tuple[set[str], set[str]]:
    """The texts of a split and all others; the empty one is on no side."""
    texts = {text for _, text in rule.documents(source) if text}
    held_out = {text for text in texts if rule.split_of(text) == split}
    return held_out, texts - held_out


def num_bytes(texts: set[str]) -> int:
    return sum(len(text.encode()) for text in texts)


# ------------------------------------------------------------------------------------------------
# Large sources
# ------------------------------------------------------------------------------------------------

@given(st.text())
def test_of_a_large_source_the_text_alone_decides(text):
    digest = hashlib.sha256(text.encode()).hexdigest()
    number = int(digest[:16], 16)
    assert Rule().split_of(text) == {0: VAL, 1: TEST}.get(number % 64, "")
    assert Rule().holds_out(text) == (number % 64 < 2)
    assert Rule(test=None).split_of(text) == (VAL if number % 64 == 0 else "")


def test_one_document_in_64_is_held_out():
    number, share = 64_000, 1 / 64
    held_out = sum(Rule().split_of(f"document {index}") == VAL for index in range(number))
    assert abs(held_out - number * share) < 4 * math.sqrt(number * share * (1 - share))


def test_a_large_source_is_read_no_further_than_it_takes_to_know_that():
    read = 0

    class Endless(Texts):
        def __iter__(self):
            nonlocal read
            while True:
                read += 1
                yield "", f"document {read}"
    assert rule_for(Endless([])) == Rule()
    assert sum(Rule().split_of(f"document {number}") == VAL for number in range(1, read + 1)) == 64


def test_fineweb_is_large_without_a_look_at_it(monkeypatch):
    monkeypatch.setattr(HubText, "__init__", lambda source: None)
    assert rule_for(HubText()) == Rule()


def test_what_is_held_out_of_a_few_thousand_documents_goes_on_from_what_one_in_64_gives():
    texts = [f"document {number}" for number in range(20_000)]
    places = [place for place, text in enumerate(texts) if Rule().split_of(text) == VAL]
    assert rule_for(Texts(texts[:places[63] + 1])) == Rule()
    small = rule_for(Texts(texts[:places[63]]))
    kept_out, _ = sides(Texts(texts[:places[63]]), small)
    assert len(kept_out) == 64 and {texts[place] for place in places[:63]} < kept_out


# ------------------------------------------------------------------------------------------------
# Small sources
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("documents, held_out", [(3500, 64), (1280, 64), (400, 20), (60, 3), (20, 1)])
def test_a_small_source_holds_out_64_documents_or_5_percent(documents, held_out):
    source = Texts([f"document {number:9}" for number in range(documents)])
    assert len(sides(source, rule_for(source))[0]) == held_out


@settings(max_examples=150)
@given(st.lists(st.integers(0, 400) | st.integers(0, 4000), max_size=60), st.integers(0, 300),
       st.randoms(use_true_random=False))
def test_what_a_small_source_holds_out_is_enough_and_not_too_much(sizes, many, rng):
    texts = [f"{number} é" + random.Random(number).randbytes(size).hex()
             for number, size in enumerate([*sizes, *[30] * many])] + [""]
    source, rule = Texts(texts), rule_for(Texts(texts))
    if not rule:
        assert sum(map(len, texts)) < 2000
        return
    kept_out, trainable = sides(source, rule)
    total, size = num_bytes(kept_out | trainable), num_bytes(kept_out)
    assert kept_out and trainable and rule.one_in == 0
    assert len(kept_out) <= 64 and size <= total / 20
    assert len(kept_out) == 64 or size >= (0.045 if total >= 20_000 else 1 / 64) * total
    if len(kept_out) < 64 and size < 0.045 * total:
        assert all(size + num_bytes({text}) > total / 20 for text in trainable), "the others are too large"
    if not rule.part:
        again = rng.sample(texts, len(texts)) + rng.choices(texts, k=9)
        assert rule_for(Texts(again)) == rule, "neither order nor duplicates matter"


def test_copies_of_a_document_do_not_make_a_source_large():
    texts = [f"document {number}" for number in range(400)]
    again = next(text for text in texts if Rule().split_of(text) == VAL)
    assert rule_for(Texts([*texts, *[again] * 99])) == rule_for(Texts(texts))


def test_a_document_too_large_to_hold_out_is_passed_over():
    texts = [f"document {number}" for number in range(400)]
    first = min(texts, key=lambda text: (Rule().split_of(text) != VAL, hash_of(text)))
    large = next(text for text in ("x" * 400 + str(number) for number in range(10**6))
                 if Rule().split_of(text) == VAL and hash_of(text) < hash_of(first))
    source = Texts([*texts, large])
    kept_out, _ = sides(source, rule_for(source))
    assert first in kept_out and large not in kept_out and len(kept_out) > 15


@pytest.mark.parametrize("books, notes", [(1, 0), (10, 1), (19, 0)])
def test_a_few_books_are_cut_into_parts(books, notes):
    rng = random.Random(0)
    texts = ["\n".join(str(rng.random()) for _ in range(9000)) for _ in range(books)]
    source = Texts(texts + ["a note"] * notes)
    rule = rule_for(source)
    kept_out, trainable = sides(source, rule)
    assert rule.part and 16 < len(kept_out) <= 64
    assert num_bytes(kept_out) / num_bytes(kept_out | trainable) == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("sizes", [[100_000] * 9 + [18_000], [30_000] * 39, [9_000] * 25])
def test_documents_too_large_to_hold_out_5_percent_are_cut_into_parts(sizes):
    rng = random.Random(0)
    texts = ["\n".join(str(rng.random()) for _ in range(size // 20)) for size in sizes]
    kept_out, trainable = sides(Texts(texts), rule_for(Texts(texts)))
    assert 16 < len(kept_out) <= 64
    assert num_bytes(kept_out) / num_bytes(kept_out | trainable) == pytest.approx(0.05, abs=0.005)


def test_a_book_of_many_parts_holds_out_one_in_64(monkeypatch):
    monkeypatch.setattr(held_out, "LONGEST_PART", 200)
    rng = random.Random(0)
    source = Texts(["\n".join(str(rng.random()) for _ in range(10**5))])
    assert rule_for(source) == Rule(part=200)


@pytest.mark.parametrize("texts", [[], [""], ["a few words"], ["the same line\n" * 999], ["two", "words"]])
def test_a_source_without_enough_text_has_no_rule(texts):
    assert rule_for(Texts(texts)) is None


def test_the_library_holds_out_enough_to_measure_on():
    source = open_source("stdlib")
    kept_out, trainable = sides(source, rule_for(source))
    assert 16 < len(kept_out) <= 64
    assert len(kept_out) == 64 or 0.045 <= num_bytes(kept_out) / num_bytes(kept_out | trainable) <= 0.05


@pytest.mark.parametrize("texts", [[f"document {number}" for number in range(400)],
                                   [f"document {number}" for number in range(9000)],
                                   ["\n".join(map(str, range(9000)))]])
def test_as_much_is_held_out_for_the_test_split_and_all_of_it_is_other_text(texts):
    source, rule = Texts(texts), rule_for(Texts(texts))
    val, _ = sides(source, rule)
    test, _ = sides(source, rule, TEST)
    assert not val & test and num_bytes(test) == pytest.approx(num_bytes(val), rel=0.2)
    assert all(rule.holds_out(text) for text in val | test)


def test_of_a_file_that_is_held_out_one_document_in_64_is_for_the_test_split():
    rule, texts = Rule(0, file="last"), [f"document {number}" for number in range(6400)]
    splits = [rule.split_of(text, f"last:{number}") for number, text in enumerate(texts)]
    assert {*splits} == {VAL, TEST} and splits.count(TEST) == pytest.approx(100, abs=35)
    assert not any(rule.split_of(text, "first:1") for text in texts[:100])
    assert {Rule(0, file="last", test=None).split_of(text, "last:1") for text in texts} == {VAL}


@pytest.mark.parametrize("texts", [[f"document {number}" for number in range(400)],
                                   [f"document {number}" for number in range(9000)],
                                   ["\n".join(map(str, range(9000)))]])
def test_a_manifest_tells_the_rule(texts):
    rule = rule_for(Texts(texts))
    assert Rule.of_facts(json.loads(json.dumps(rule.facts()))) == rule


def test_the_rules_of_earlier_manifests_still_hold():
    earlier = Rule.of_facts({"one_in": 16, "cut_characters": 200, "split": []})
    assert earlier == Rule(16, frozenset(), 200, test=None)
    texts = [f"document {number}" for number in range(999)]
    assert [text for text in texts if earlier.holds_out(text)] == [
        text for text in texts if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 16 == 0]


@given(st.lists(st.integers(0, 300), max_size=20), st.booleans(), st.booleans(), st.sampled_from([0, 200]),
       st.tuples(st.booleans(), st.booleans()))
def test_a_rule_covers_another_if_it_holds_out_all_that_the_other_does(numbers, here, there, part, tests):
    texts = [f"document {number}" for number in range(300)]
    names = [f"{hash_of(texts[number % 300]):016x}" for number in numbers]
    mine = Rule(64 * here, frozenset(names), part, test=frozenset(names[::3]) if tests[0] else None)
    other = Rule(64 * there, frozenset(names[:len(names) // 2]), part,
                 test=frozenset(names[1::4]) if tests[1] else None)
    for first, second in ((mine, other), (other, mine)):
        covered = all(first.holds_out(text) for text in texts if second.holds_out(text))
        assert first.covers(second) == (covered and first.one_in >= second.one_in)
    assert not Rule(64).covers(Rule(64, part=50)) and not Rule(0, file="a").covers(Rule(0, file="b"))
    assert Rule(0, file="a").covers(Rule(0, file="a"))


# ------------------------------------------------------------------------------------------------
# Documents to validate on, and parts
# ------------------------------------------------------------------------------------------------

@given(st.lists(st.text(max_size=3), max_size=40), st.integers(1, 20))
def test_the_held_out_documents_of_smallest_hash_are_chosen(given_texts, budget):
    rule = Rule(2)
    held_out = sorted({text for text in given_texts if text and rule.split_of(text) == VAL},
                      key=lambda text: hashlib.sha256(text.encode()).digest())
    expected = []
    while held_out and num_bytes(expected) < budget:
        expected.append(held_out.pop(0))
    chosen = choose_held_out([(text, text) for text in given_texts], budget, rule)[VAL]
    assert chosen == [(text, text) for text in expected]


def test_all_that_a_small_source_holds_out_is_validated_on():
    source = Texts([f"document {number}" for number in range(400)])
    rule = rule_for(source)
    for split, documents in documents_to_hold_out(source, rule, 10**6).items():
        chosen = [text for _, text in documents]
        assert set(chosen) == sides(source, rule, split)[0] and chosen == sorted(chosen, key=hash_of)


@given(st.lists(st.text("ab\n\r\u2028", max_size=30)), st.integers(1, 12))
def test_parts_are_cut_at_line_ends_and_lose_nothing(given_texts, characters):
    source = [(str(number), text) for number, text in enumerate(given_texts)]
    parts = list(Parts(source, characters))
    for number, text in enumerate(given_texts):
        mine = [part for name, part in parts if name.split("#")[0] == str(number)]
        assert "".join(mine) == text
        assert all(characters <= len(part) < 2 * characters for part in mine[:-1])
        lines = text.splitlines(keepends=True)
        if all(len(line) <= characters for line in lines):
            ends = {sum(map(len, lines[:count])) for count in range(len(lines) + 1)}
            assert all(sum(map(len, mine[:count])) in ends for count in range(len(mine)))
    assert len({name for name, _ in parts}) == len(parts)


def test_a_line_as_long_as_a_book_is_cut_quickly():
    started = time.perf_counter()
    parts = sum(1 for _ in Parts([("", "word " * 4_000_000)], 20_000))
    assert parts == 1000 and time.perf_counter() - started < 0.5


@pytest.mark.parametrize("documents, tokens, is_whole, note", [
    (44, 20_000, True, ""),
    (3, 900, True, "note        only 3 documents with 900 tokens are held out; on fewer than 16 documents or "
                   "20,000 tokens, similar models cannot be told apart"),
    (16, 19_999, False, "; --val_tokens 0 uses all")])
def test_a_run_begins_with_a_warning_of_too_little_to_validate_on(documents, tokens, is_whole, note):
    held = SimpleNamespace(tokens=range(tokens), num_documents=documents, is_whole=is_whole)
    said = describe_data(SimpleNamespace(num_steps=0, seq_len=8),
                         SimpleNamespace(folder=SimpleNamespace(name="mine")),
                         SimpleNamespace(num_rows=10, num_tokens=80, bases=[0, 80]), held)
    assert said[1].startswith(f"held out    {tokens:,} tokens of {documents}")
    assert len(said) == 2 + bool(note) and said[-1].endswith(note)
