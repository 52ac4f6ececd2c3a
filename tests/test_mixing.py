"""Mixtures: shares by tokens, what is held out of each source, and what the manifest says of it.

Run: ./run.sh test tests/test_mixing.py
"""

import csv
import json
import math
import random
import shutil
from collections import Counter
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import ROOT
from test_download_fineweb import (
    change_a_byte,
    content,
    documents_by_shard,
    interrupt,
    names,
    texts,
    while_it_writes,
)
from tiny_runs import summary_of, train_here

from benchtop import hub, mixing, places, prepare
from benchtop.documents import Source, Unit, hash_of
from benchtop.errors import UserError
from benchtop.evaluation import bpb_by_source
from benchtop.held_out import TEST, VAL, Rule, rule_for
from benchtop.mixing import Lane
from benchtop.prepare import Encoded
from benchtop.shards import open_dataset
from benchtop.sources import Mixture, open_mixture, open_source

WORDS = "download_fineweb.py --tokenizer small --num_workers 1 --name set --shard_size 3000 --version"
MIX = f"{WORDS} words=0.7 numbers=0.3"


@pytest.fixture
def two(bench, command, write_rows) -> dict[str, list[str]]:
    """Two folders of text, and a tokenizer; documents begin with the name of their folder."""
    rng, made = random.Random(0), {}
    for name, count, things in (("words", 150, ["the", "cat", "sat", "on", "a", "mat"]),
                                ("numbers", 220, ["0", "12", "345", "6789"])):
        (bench / name).mkdir()
        made[name] = [f"{name} {number}: {' '.join(rng.choices(things, k=rng.randint(1, 80)))}"
                      for number in range(count)]
        write_rows(bench / name / "rows.jsonl", made[name])
    command("train_tokenizer.py --source words --num_workers 1 --vocabsize 280 --name small")
    return made


def manifest_of(bench: Path, name: str = "set") -> dict:
    return json.loads((bench / "data" / name / "manifest.json").read_text())


def by_source(found: list[str]) -> dict[str, list[str]]:
    return {name: [text for text in found if text.startswith(name)]
            for name in ("numbers", "words", "remote")}


# ------------------------------------------------------------------------------------------------
# Shares
# ------------------------------------------------------------------------------------------------

def test_any_beginning_of_a_mixture_has_its_shares(bench, command, two):
    command(MIX)
    lengths = [1 + len(ids) for shard in documents_by_shard(bench / "data/set", "train") for ids in shard]
    of_words = [length * text.startswith("words")
                for length, text in zip(lengths, texts(bench / "data/set", "train"), strict=True)]
    for words, total in zip(accumulate(of_words), accumulate(lengths), strict=True):
        assert abs(words - 0.7 * total) <= max(lengths) / 2 + 1e-6 * total
    assert len(names(bench / "data/set")) > 5, "over several shards"


@given(st.lists(st.lists(st.integers(0, 50), max_size=30), min_size=2, max_size=2), st.integers(1, 99))
@settings(max_examples=60)
def test_the_sources_take_turns_so_that_either_is_off_by_half_a_document(lengths, percent):
    """Documents that cannot be encoded have no tokens."""
    def encoded(stream, *_):
        return (Encoded("", range(length) if length else None, 1, False) for length in stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "tokenized", encoded)
        patch.setattr(Lane, "trainable", lambda lane, unit: unit.read())
        lanes = [Lane([Unit("", lambda own=own: iter(own))], [], share / 100, dict(mixing.NOTHING), "", 1)
                 for own, share in zip(lengths, (percent, 100 - percent), strict=True)]
        longest, used = max([0, *lengths[0], *lengths[1]]), 0
        while (lane := min(lanes, key=lambda lane: lane.due)).next:
            lane.take()
            first, second = (lane.far["tokens"] for lane in lanes)
            assert abs(first - percent / 100 * (first + second)) <= longest / 2 + 1e-6
            used += 1
    assert used == sum(lane.far["read"] for lane in lanes)
    assert any(lane.far["read"] == len(own) for lane, own in zip(lanes, lengths, strict=True))


def test_the_scarcer_source_is_used_up_and_what_is_left_of_the_other_is_said(bench, command, two, capsys):
    command(MIX)
    train, sources = by_source(texts(bench / "data/set", "train")), manifest_of(bench)["sources"]
    said = capsys.readouterr().out
    for source, text in zip(sources, train.values(), strict=False):
        rule = Rule.of_facts(source["held_out"])
        trainable = [text for text in two[source["name"]] if not rule.holds_out(text)]
        left = Counter(trainable) - Counter(text)
        assert not Counter(text) - Counter(trainable)
        assert (source["documents"], source["documents_left"]) == (len(text), left.total())
        assert source["bytes"] == sum(map(len, text)) and source["bytes_left"] == sum(map(len, left))
    assert [source["name"] for source in sources if not source["documents_left"]] == ["words"]
    share = sources[1]["tokens"] / sum(source["tokens"] for source in sources)
    assert f"{share:.1%} words, {sources[1]['tokens']:,} tokens of {len(train['words'])} documents, " in said
    assert f"of {len(train['numbers'])} documents, {sources[0]['documents_left']} unused (" in said


def test_num_shards_limits_a_mixture_and_more_come_later(bench, command, two, capsys):
    command(f"{MIX} --name whole")
    command(f"{MIX} --num_shards 1")
    first = content(bench / "data/set")
    assert manifest_of(bench)["sources"][0]["documents_left"] > manifest_of(bench, "whole")["sources"][0][
        "documents_left"]
    command(f"{MIX} --num_shards 2")
    command(MIX)
    assert content(bench / "data/set") == content(bench / "data/whole")
    del first["manifest.json"]
    assert first.items() <= content(bench / "data/set").items()
    capsys.readouterr()
    command(MIX)
    assert capsys.readouterr().out.startswith("reusing data/set")


def test_three_sources_mix(bench, command, two, write_rows):
    write_rows(bench / "third.jsonl", [f"third {'x' * number}" for number in range(90)])
    command(f"{WORDS} words=0.25 numbers=0.5 third.jsonl=0.25")
    sources = manifest_of(bench)["sources"]
    tokens = [source["tokens"] for source in sources]
    assert [source["share"] for source in sources] == [0.5, 0.25, 0.25]
    assert [each / sum(tokens) for each in tokens] == pytest.approx([0.5, 0.25, 0.25], abs=0.02)


@pytest.mark.parametrize("tokens, note", [([700, 300], ""), ([704, 296], ""), (
    [690, 310], "note: the documents are too long to match 70.0% a, 30.0% b more closely; use more ")])
def test_a_share_that_whole_documents_miss_is_said(tokens, note):
    sources = [{"name": name, "share": share, "tokens": each, "documents": 1, "bytes": 9, "documents_left": 1,
                "bytes_left": 1} for name, share, each in zip("ab", (0.7, 0.3), tokens, strict=True)]
    first, *others = mixing.mixed_in_words({"sources": sources})
    assert first.startswith(f"mixed {tokens[0] / 10:.1f}% a, {tokens[0]} tokens of 1 document, 1 unused (")
    assert len(others) == bool(note) and all(other.startswith(note) for other in others)


# ------------------------------------------------------------------------------------------------
# Held out
# ------------------------------------------------------------------------------------------------

def test_each_source_holds_out_what_it_holds_out_alone(bench, command, two):
    command(MIX)
    for split in (VAL, TEST):
        alone = []
        for source in manifest_of(bench)["sources"]:
            command(f"{WORDS} {source['name']} --name {source['name']}")
            found = texts(bench / "data" / source["name"], split)
            assert source[f"{split}_documents"] == len(found) > 0
            alone += found
        assert texts(bench / "data/set", split) == alone, "one source behind the other"


def test_nothing_is_trained_or_tested_on_that_another_source_holds_out(bench, command, two, write_rows):
    write_rows(bench / "numbers/more.jsonl", two["words"])
    command(MIX)
    train, val, test = (set(texts(bench / "data/set", split)) for split in ("train", "val", "test"))
    assert train and val and test and not train & val and not train & test and not val & test
    rules = [rule_for(open_source(name)) for name in ("words", "numbers")]
    assert any(rules[0].holds_out(text) != rules[1].holds_out(text) for text in two["words"])


def test_what_one_source_validates_on_is_in_no_test_split(bench, command, two, write_rows, monkeypatch):
    write_rows(bench / "numbers/more.jsonl", two["words"][:3])
    first, second, third = (frozenset([f"{hash_of(text):016x}"]) for text in two["words"][:3])
    rules = {"words": Rule(0, first, test=second), "numbers": Rule(0, third, test=first | second)}
    monkeypatch.setattr(prepare, "rule_for", lambda source: rules[source.label.split("-")[0]])
    command(MIX)
    assert texts(bench / "data/set", "val") == [two["words"][2], two["words"][0]]
    assert texts(bench / "data/set", "test") == [two["words"][1]] * 2
    assert [source["test_documents"] for source in manifest_of(bench)["sources"]] == [1, 1]


def test_books_are_cut_into_parts_in_a_mixture_too(bench, command, two, capsys):
    (bench / "book.txt").write_text("\n".join(f"{number} lines" for number in range(3000)))
    command(f"{WORDS} words=0.5 book.txt=0.5")
    assert "they are cut into parts" in capsys.readouterr().out
    book, words = manifest_of(bench)["sources"]
    assert book["val_documents"] > 5 and book["documents"] > 20 and words["documents_left"] == 0


# ------------------------------------------------------------------------------------------------
# The same bytes
# ------------------------------------------------------------------------------------------------

def test_a_changed_shard_of_an_unfinished_mixture_is_made_again(bench, command, two, monkeypatch, capsys):
    command(f"{MIX} --name undisturbed")
    with monkeypatch.context() as patch:
        while_it_writes(patch, "000003.bin", interrupt)
        with pytest.raises(SystemExit):
            command(MIX)
    change_a_byte(bench / "data/.set.partial/unit_000000/000002.bin")
    command(MIX)
    assert "000002.bin has changed since it was written; it will be made again" in capsys.readouterr().err
    assert content(bench / "data/set") == content(bench / "data/undisturbed")


@pytest.mark.parametrize("name", ["val_000000.bin", "000001.bin", "000003.bin"])
def test_an_interrupted_mixture_ends_with_the_same_bytes(bench, command, two, monkeypatch, name):
    command(f"{MIX} --name undisturbed")
    with monkeypatch.context() as patch:
        while_it_writes(patch, name, interrupt)
        with pytest.raises(SystemExit):
            command(MIX)
    assert not (bench / "data/set").exists()
    command(f"{MIX} --num_shards 1 --name one")
    made = {path: path.stat().st_mtime_ns for path in bench.glob("data/.set.partial/unit_000000/*.bin")}
    inodes = {path.stat().st_ino for path in made}
    command(MIX)
    assert content(bench / "data/set") == content(bench / "data/undisturbed")
    assert inodes <= {path.stat().st_ino for path in (bench / "data/set").iterdir()}, "they are made again"
    assert not list(bench.glob("data/.*"))


def test_typed_otherwise_it_is_the_same_mixture(bench, command, two):
    command(MIX)
    for typed in ("numbers/=0.3 words/=0.7", "words=70 numbers=30", "words/*.jsonl=7e-1 numbers=.3"):
        command(f"{WORDS} {typed} --name other")
        kept = {name: raw for name, raw in content(bench / "data/set").items() if name.endswith(".bin")}
        assert kept.items() <= content(bench / "data/other").items()
        shutil.rmtree(bench / "data/other")


def test_any_number_of_workers_makes_the_same_mixture(bench, shell, command, two):
    command(f"{MIX} --name one")
    done = shell(f"{MIX} --num_workers 3")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert content(bench / "data/set") == content(bench / "data/one")


def test_other_shares_are_other_data_validated_on_the_same_text(bench, command, two, refusal):
    command(MIX)
    command(f"{WORDS} words=0.3 numbers=0.7 --name other")
    first, other = (open_dataset(name, "")[0] for name in ("set", "other"))
    assert first.sha256 != other.sha256 and first.manifest["source"] != other.manifest["source"]
    assert content(first.folder)["val_000000.bin"] == content(other.folder)["val_000000.bin"]
    assert "made with a different source;" in refusal(f"{WORDS} words=0.3 numbers=0.7")
    nearly = [open_mixture([f"words={share}", "numbers=0.3"]).label for share in (0.7, 0.70001)]
    assert nearly[0][:-8] == nearly[1][:-8] and nearly[0] != nearly[1]


def test_one_source_with_a_share_is_that_source(bench, command, two, capsys):
    for name, typed in (("alone", "words"), ("all", "words=1"), ("half", "words=0.5")):
        capsys.readouterr()
        command(f"{WORDS} {typed} --name {name}")
        assert ("the shares sum to 0.5 instead of 1" in capsys.readouterr().out) == (name == "half")
        assert content(bench / "data" / name) == content(bench / "data/alone")
    assert "sources" not in manifest_of(bench, "all")


def test_a_part_of_what_has_no_parts_says_so(bench, command, two, capsys):
    command(f"{MIX} --part 2/3")
    command(f"{WORDS} words --part 2/3")
    said = capsys.readouterr().out
    assert said.count("nothing to do for part 2 of 3: ") == 2 and not names(bench / "data")


def test_under_torchrun_one_process_makes_the_mixture(bench, command, two, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    for rank in ("1", "0"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        command(MIX)
    assert capsys.readouterr().out.count("wrote data/set") == 1


class Remote(Source):
    """A source of two files that is large, as if on the Hub: `here` are those fetched, in `asked` all that
    were read."""
    is_large = True

    def __init__(self):
        self.here, self.asked = set(), []
        super().__init__("remote", [], ["remote"])

    def __iter__(self):
        for unit in self.units(None):
            yield from unit.read()

    def units(self, seed: int | None) -> list[Unit]:
        def read(file: str):
            self.here.add(file)
            self.asked.append(file)
            yield from ((f"{file}:{number}", f"remote {file} {number} " + "word " * (number % 40))
                        for number in range(200))
        return [Unit(file, lambda file=file: read(file), 1, is_here=lambda file=file: file in self.here,
                     remove=lambda file=file: self.here.remove(file)) for file in ("one", "two")]


def test_the_next_file_is_fetched_while_this_one_is_tokenized(bench, command, two, monkeypatch):
    remote, shards_at_begin = Remote(), {}

    def shards() -> int:
        return len(list(bench.glob("data/.set.partial/unit_*/*.bin")))
    units = remote.units

    def watched(seed: int | None) -> list[Unit]:
        made = units(seed)
        for unit in made:
            unit.begin = lambda unit=unit: shards_at_begin.__setitem__(unit.name, shards())
        return made
    monkeypatch.setattr(remote, "units", watched)
    monkeypatch.setitem(hub.CORPORA, "remote", hub.Corpus("remote", "a/b", ""))
    monkeypatch.setattr(hub, "HubText", lambda name: remote)
    command(f"{WORDS.removesuffix(' --version')} --source remote")
    first, second = (unit["name"] for unit in manifest_of(bench)["units"])
    made = [entry for entry in manifest_of(bench)["shards"] if entry.get("unit") == first]
    assert len(made) > 1 and shards_at_begin == {second: 0}, "it begins before the first file has a shard"


def test_a_corpus_of_many_files_is_mixed_file_by_file(bench, command, two, monkeypatch, capsys):
    remote = Remote()
    monkeypatch.setitem(hub.CORPORA, "remote", hub.Corpus("remote", "a/b", ""))
    monkeypatch.setattr(hub, "HubText", lambda name: remote)
    command(f"{WORDS} remote=0.9 words=0.1 --name undisturbed")
    source = manifest_of(bench, "undisturbed")["sources"][0]
    train = by_source(texts(bench / "data/undisturbed", "train"))["remote"]
    assert "documents_left" not in source and "the rest unused" in capsys.readouterr().out
    files = [text.split()[1] for text in train]
    assert files == sorted(files) and {*files} == {"one", "two"}
    assert not any(Rule().holds_out(text) for text in train) and not remote.here
    last = len(list((bench / "data/undisturbed").glob("train*")))
    with monkeypatch.context() as patch:
        while_it_writes(patch, f"{last:06d}.bin", interrupt)
        with pytest.raises(SystemExit):
            command(f"{WORDS} remote=0.9 words=0.1")
    assert remote.here == {"two"}
    remote.asked.clear()
    command(f"{WORDS} remote=0.9 words=0.1")
    assert content(bench / "data/set") == content(bench / "data/undisturbed")
    assert remote.asked == ["two"] and not remote.here, "what is used up is not fetched again"


# ------------------------------------------------------------------------------------------------
# What is typed
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("typed, says", [
    ("words=0.7 numbers", "numbers has no share"),
    ("words=0.5 words/=0.5", "words and words/ are the same text"),
    ("words=0.5 words/rows.jsonl=0.5", "are the same text"),
    ("words=0.5 */rows.jsonl=0.5", "words/rows.jsonl is part of words and of */rows.jsonl"),
    ("words=0 numbers=1", "the share of words must be a positive number, as in words=0.5; it is '0'"),
    ("words=-1 numbers=1", "it is '-1'"), ("words=nan numbers=1", "it is 'nan'"),
    ("words=inf numbers=1", "it is 'inf'"), ("words=1e-999 numbers=1", "it is '1e-999'"),
    ("words=70% numbers=30%", "it is '70%'"), ("words= numbers=1", "it is ''"),
    ("nowhere=0.5 words=0.5", "no source named nowhere:"), ("nowhere=x words=0.5", "nowhere=x has no share"),
    ("10B-gpt2=0.5 words=0.5", "10B-gpt2 comes from the Hugging Face Hub and has tokens, not text"),
    ("stdlib words", "stdlib cannot be mixed with files without shares"),
    ("words=0.5 few.txt=0.5", "few-"), ("words=0.5 numbers=0.5 --dry_run", "--dry_run is for one source")])
def test_a_wrong_share_is_one_line(bench, refusal, two, typed, says):
    (bench / "few.txt").write_text("few words")
    assert says in refusal(f"{WORDS} {typed}")
    assert not names(bench / "data")


@pytest.mark.parametrize("script", ["train_tokenizer.py --source", "benchtop/sources.py"])
def test_shares_are_for_tokens_alone(bench, refusal, two, script):
    said = refusal(f"{script} words=0.7 numbers=0.3")
    assert "only download_fineweb.py takes shares of the tokens; instead of words=0.7, type words" in said


def test_a_path_with_an_equals_sign_is_a_path(bench, two):
    shutil.copytree(bench / "words", bench / "lang=1")
    assert not isinstance(open_mixture(["lang=1", "numbers"]), Mixture)
    for path in ("lang=1", "lang=1/rows.jsonl", "lang=?/*"):
        assert open_mixture([path]).fingerprint == open_source("words").fingerprint
    mixture = open_mixture(["lang=1=2", "numbers=2"])
    assert mixture.label.startswith("lang-150-numbers50-")


def test_the_library_mixes_with_files_and_equal_words_are_told_apart(bench, write_rows):
    for number, folder in enumerate(("x/data", "y/data")):
        (bench / folder).mkdir(parents=True)
        write_rows(bench / folder / "rows.jsonl", [f"{number}"])
    mixture = open_mixture(["stdlib=0.2", "x/data=0.4", "y/data=0.4"])
    labels = [open_source(spec).label for spec in ("x/data", "y/data")]
    assert mixture.names == [*sorted(labels), "stdlib"]
    assert prepare.data_folder(f"{mixture.label}_small").name.startswith("data-")


def test_a_tokenizer_that_saw_held_out_text_of_a_source_is_said(bench, command, two, write_rows, capsys):
    command(MIX)
    assert "was trained on another version" not in capsys.readouterr().out
    write_rows(bench / "words/rows.jsonl", [*two["words"], *map(str, range(99))])
    command(f"{MIX} --name newer")
    assert "the tokenizer small was trained on another version of this text (words-" in (
        capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------
# What runs say of the sources
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", [VAL, TEST])
def test_a_run_says_the_bits_per_byte_of_each_source(bench, command, two, capsys, monkeypatch, split):
    command(MIX)
    monkeypatch.setattr(places, "ROOT", ROOT)       # which runs name the code of
    run = train_here(bench, data="set", held_out=split)
    summary, said = summary_of(run), capsys.readouterr().out
    by_name = summary["val_bpb_by_source"]
    sizes = {source["name"]: len("".join(by_source(texts(bench / "data/set", split))[source["name"]]))
             for source in manifest_of(bench)["sources"]}
    with open(run / "held_out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("numbers", "words"):       # in this order
        own = [rows.pop(0) for _ in range(len(by_source(texts(bench / "data/set", split))[name]))]
        assert sum(int(row["bytes"]) for row in own) == sizes[name]
        nats = sum(float(row["text_nats"]) for row in own)
        assert by_name[name] == pytest.approx(nats / math.log(2) / sizes[name], rel=1e-5)
        assert f"{by_name[name]:.4f} on the held-out documents of {name}\n" in said
    together = sum(by_name[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert not rows and together == pytest.approx(summary["val_bpb"], rel=1e-9)
    line = next(line for line in said.splitlines() if line.startswith("val_bpb_by_source: "))
    assert json.loads(line.partition(": ")[2]) == pytest.approx(by_name, abs=1e-6)


def test_of_a_source_that_is_not_validated_on_no_number_is_made_up(bench, command, two, monkeypatch):
    command(MIX)
    command(f"{WORDS} words --name alone")
    monkeypatch.setattr(places, "ROOT", ROOT)
    assert bpb_by_source([(0, 9, 8, 9.0, 8 * math.log(2))], {"a": 1, "b": 5}) == {"a": pytest.approx(1)}
    assert [*summary_of(train_here(bench, data="set", val_tokens=200))["val_bpb_by_source"]] == ["numbers"]
    assert "val_bpb_by_source" not in summary_of(train_here(bench, data="alone"))


@pytest.mark.parametrize("damage", [
    lambda sources: "x", lambda sources: [7], lambda sources: sources[:1], lambda sources: [],
    lambda sources: [sources[0] | {"val_documents": -1},
                     sources[1] | {"val_documents": sum(each["val_documents"] for each in sources) + 1}],
    lambda sources: [{**sources[0], "name": 5}, sources[1]],
    lambda sources: [{**sources[0], "test_documents": 99}, sources[1]]])
def test_sources_that_do_not_fit_are_noticed(bench, command, two, damage):
    command(MIX)
    manifest = manifest_of(bench)
    manifest["sources"] = damage(manifest["sources"])
    (bench / "data/set/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_dataset("set", "")


@pytest.mark.parametrize("known, removed", [(["a"], {"b"}), ("damaged", set())])
def test_text_is_deleted_only_if_it_is_known_not_to_have_been_here_before(bench, known, removed):
    gone = set()
    units = [SimpleNamespace(name=name, is_here=lambda: True, remove=lambda name=name: gone.add(name))
             for name in "ab"]
    (bench / "was_here.json").write_text(json.dumps(known))
    preparation = SimpleNamespace(partial=bench, units=units, args=SimpleNamespace(keep_text=False))
    prepare.Preparation.give_back(preparation, [0, 1])
    assert gone == removed
