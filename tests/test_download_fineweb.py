"""Token shards and their manifest, written and read. Run: ./run.sh test tests/test_download_fineweb.py"""

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import ROOT

import benchtop.tokenizer
from benchtop import bpe, prepare, shards
from benchtop.errors import UserError
from benchtop.held_out import Parts, Rule, rule_for
from benchtop.shards import ShardWriter, open_dataset, read_shard
from benchtop.sources import open_source
from benchtop.tokenizer import load_tokenizer, parts_of
from benchtop.unfinished import take_up
from benchtop.xz import xz_bits_per_byte

TOKENIZER = "small"
TRAIN = "train_tokenizer.py --source pages.jsonl --num_workers 1"
SHARD = f"download_fineweb.py --version pages.jsonl --tokenizer {TOKENIZER} --num_workers 1 --name set"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """kept(folder, make) has that folder as make() leaves it; it is made once, and copied from then on."""
    made = tmp_path_factory.mktemp("kept")

    def keep(folder: Path, make: Callable[[], None]) -> None:
        if not (made / folder.name).exists():
            make()
            shutil.copytree(folder, made / folder.name)
        else:
            shutil.copytree(made / folder.name, folder)
    return keep


@pytest.fixture
def small(bench, command, pages, kept) -> str:
    """A tokenizer of 300 tokens, learned from pages.jsonl."""
    line = f"{TRAIN} --vocabsize 300 --samples 50000 --name small"
    kept(bench / "tokenizers/small", lambda: command(line))
    return TOKENIZER


def tokens_of(path: Path) -> list[int]:
    """A shard's tokens, read by the letter of llm.c's format; a wrong size is an error of struct."""
    raw = path.read_bytes()
    magic, version, count, *zeros = struct.unpack("<256i", raw[:1024])
    assert not any(zeros)
    letter = {(20240520, 1): "H", (20240801, 7): "I"}[magic, version]
    return list(struct.unpack(f"<{count}{letter}", raw[1024:]))


def documents_by_shard(folder: Path, split: str) -> list[list[list[int]]]:
    """The documents of each shard, as token ids without the <|endoftext|> that each must begin with."""
    eot = json.loads((folder / "manifest.json").read_text())["eot_id"]
    found = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        found.append([])
        tokens = tokens_of(path)
        assert tokens[0] == eot
        for token in tokens:
            found[-1].append([]) if token == eot else found[-1][-1].append(token)
    return found


def texts(folder: Path, split: str) -> list[str]:
    """The documents of a split, in order."""
    tokenizer = load_tokenizer(json.loads((folder / "manifest.json").read_text())["tokenizer"])
    return [tokenizer.decode(ids, errors="strict")
            for shard in documents_by_shard(folder, split) for ids in shard]


def all_texts(folder: Path) -> list[str]:
    return [text for split in ("train", "val", "test") for text in texts(folder, split)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ------------------------------------------------------------------------------------------------
# What is written
# ------------------------------------------------------------------------------------------------

def test_every_document_comes_back_once_on_its_own_side(bench, command, small, pages):
    command(f"{SHARD} --shard_size 2000")
    train, val = texts(bench / "data/set", "train"), texts(bench / "data/set", "val")
    rule = rule_for(open_source("pages.jsonl"))
    for split, found in (("", train), ("val", val), ("test", texts(bench / "data/set", "test"))):
        assert Counter(found) == Counter(text for text in pages if rule.split_of(text) == split) and found
    assert train != [text for text in pages if text in train], "the order is shuffled"
    assert names(bench / "data") == ["set"]


def test_the_manifest_is_true(bench, command, small, pages):
    command(f"{SHARD} --shard_size 2000 --seed 5")
    folder = bench / "data/set"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert names(folder) == sorted(["manifest.json", *(entry["file"] for entry in manifest["shards"])])
    assert names(folder)[1:4] == ["test_000000.bin", "train_000001.bin", "train_000002.bin"]
    assert names(folder)[-1] == "val_000000.bin"
    tokenizer = load_tokenizer(small)
    for split in ("train", "val", "test"):
        entries = [entry for entry in manifest["shards"] if entry["split"] == split]
        for entry, shard in zip(entries, documents_by_shard(folder, split), strict=True):
            assert entry["documents"] == len(shard)
            assert entry["tokens"] == len(tokens_of(folder / entry["file"]))
            assert entry["bytes"] == sum(len(tokenizer.decode_bytes(ids)) for ids in shard)
            assert entry["sha256"] == hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest()
    ranks = (bench / "tokenizers" / small / "ranks.tiktoken").read_bytes()
    identity = hashlib.sha256(ranks + tokenizer._pat_str.encode()).hexdigest()
    source = open_source("pages.jsonl")
    assert manifest == manifest | {
        "format_version": 1, "tokenizer": small, "tokenizer_sha256": identity,
        "vocab_size": 301, "eot_id": 300, "seed": 5, "shard_size": 2000, "num_shards": 0,
        "source": source.label, "source_fingerprint": source.fingerprint,
        "held_out": {**rule_for(source).facts(), "split": [], "skipped": [],
                     "documents": len(texts(folder, "val")),
                     "bytes": sum(len(text.encode()) for text in texts(folder, "val"))},
    }


@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 40))
def test_shards_are_full_and_never_split_a_document(tmp_path_factory, lengths, shard_size):
    folder = tmp_path_factory.mktemp("shards")
    writer, entries = ShardWriter(folder, 300, shard_size), []
    given_documents = [np.full(length, number) for number, length in enumerate(lengths)]
    for document in given_documents:
        if not writer.has_room_for(document):
            entries.append(writer.write(f"{len(entries)}.bin", "train"))
        writer.add(document, 3 * len(document))
    entries.append(writer.write(f"{len(entries)}.bin", "train"))

    written = [tokens_of(folder / entry["file"]) for entry in entries]
    assert list(chain(*written)) == list(chain(*given_documents))
    for shard, following in zip(written, [*written[1:], None], strict=True):
        assert len(shard) <= shard_size or len(set(shard)) == 1, "only a long document stands alone"
        assert not following or len(shard) + following.count(following[0]) > shard_size, "no room is wasted"
    for entry, shard in zip(entries, written, strict=True):
        counts = entry["tokens"], entry["documents"], entry["bytes"]
        assert counts == (len(shard), len(set(shard)), 3 * len(shard))


@pytest.mark.parametrize("vocab_size, magic, width", [
    (301, 20240520, 2), (65536, 20240520, 2), (65537, 20240801, 4),
])
def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path, vocab_size, magic, width):
    writer = ShardWriter(tmp_path, vocab_size, 100)
    writer.add(np.array([vocab_size - 1, 0, 7]), 2)
    writer.write("val_000000.bin", "val")
    path = tmp_path / "val_000000.bin"
    assert tokens_of(path) == read_shard(path, 3).tolist() == [vocab_size - 1, 0, 7]
    assert path.stat().st_size == 1024 + 3 * width and path.read_bytes()[:4] == struct.pack("<i", magic)


@pytest.mark.parametrize("num_shards", [1, 3, 0])
def test_num_shards_limits_what_is_trained_on(bench, command, small, num_shards):
    command(f"{SHARD} --shard_size 2000 --num_shards {num_shards}")
    found = documents_by_shard(bench / "data/set", "train")
    assert len(found) == num_shards or (num_shards == 0 and len(found) > 3)


def test_held_out_documents_are_the_same_for_everyone(bench, command, small, pages):
    command(f"{TRAIN} --vocabsize 256 --samples 99 --name bytes")
    command(f"{SHARD} --name one")
    command(f"{SHARD} --name two --seed 1")
    command(f"{SHARD} --name three --num_shards 1 --shard_size 2000")
    command(f"{SHARD} --name four --tokenizer bytes")
    held_out = [texts(bench / "data" / name, "val") for name in ("one", "two", "three", "four")]
    assert held_out[0] and held_out.count(held_out[0]) == 4


def test_the_seed_changes_the_order_of_training_alone(bench, command, small):
    for seed in (0, 0, 1):
        command(f"{SHARD} --seed {seed} --name set{seed}")
    one, other = content(bench / "data/set0"), content(bench / "data/set1")
    assert one["val_000000.bin"] == other["val_000000.bin"]
    assert one["train_000001.bin"] != other["train_000001.bin"]
    assert sorted(texts(bench / "data/set0", "train")) == sorted(texts(bench / "data/set1", "train"))


def test_a_duplicate_never_stands_on_both_sides(bench, command, small, pages, write_rows):
    write_rows(bench / "pages.jsonl", pages + pages[::-1] + pages)
    command(SHARD)
    train, val, test = (texts(bench / "data/set", split) for split in ("train", "val", "test"))
    for one, other in ((train, val), (train, test), (val, test)):
        assert not set(one) & set(other)
    assert len(set(val)) == len(val) and len(set(test)) == len(test)
    assert set(train) | set(val) | set(test) == set(pages)


def test_empty_documents_are_left_out(bench, command, small, pages, write_rows):
    write_rows(bench / "pages.jsonl", ["", *pages, "", ""])
    command(SHARD)
    found = all_texts(bench / "data/set")
    assert Counter(found) == Counter(pages)


def test_a_text_that_spells_end_of_text_begins_no_document(bench, command, small, pages, write_rows):
    write_rows(bench / "pages.jsonl", [f"{text}<|endoftext|>!" for text in pages])
    command(SHARD)
    found = all_texts(bench / "data/set")
    assert sorted(found) == sorted(f"{text}<|endoftext|>!" for text in pages)


def many_batches(bench) -> None:
    """Let the copy of the bench in this folder send little text to a worker at a time."""
    source = (bench / "benchtop/documents.py").read_text()
    small = source.replace("BATCH_CHARACTERS = 1_000_000", "BATCH_CHARACTERS = 2_000")
    assert small != source
    (bench / "benchtop/documents.py").write_text(small)


def test_any_number_of_workers_writes_the_same_bytes(bench, shell, command, small):
    many_batches(bench)
    line = f"{SHARD} --shard_size 2000 --num_shards 4"
    command(f"{line} --name set1")
    for num_workers in (2, 3):
        result = shell(f"{line} --name set{num_workers} --num_workers {num_workers}")
        assert result.returncode == 0 and not result.stderr, result.stderr
    assert content(bench / "data/set1") == content(bench / "data/set2") == content(bench / "data/set3")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_run_leaves_nothing_and_can_be_repeated(bench, shell, command, small, num_workers):
    many_batches(bench)
    line = f"{SHARD} --shard_size 200 --num_workers {num_workers}"
    process = shell(line, start=True)
    while not list(bench.glob("data/.set.partial/unit_000000/000002.bin")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=30)
    assert names(bench / "data") == [".set.partial"]
    made = next(bench.glob("data/.set.partial/unit_000000/000001.bin")).stat().st_mtime_ns
    assert shell(line).returncode == 0
    command(f"{SHARD} --shard_size 200 --name undisturbed")
    assert names(bench / "data") == ["set", "undisturbed"]
    assert content(bench / "data/set") == content(bench / "data/undisturbed")
    assert (bench / "data/set/train_000001.bin").stat().st_mtime_ns == made     # it is not made again


@pytest.mark.parametrize("step", [1, 3])
def test_an_interruption_leaves_nothing(bench, command, small, monkeypatch, capsys, step):
    write = ShardWriter.write

    def interrupted(writer, name, split):
        if name == f"{step:06d}.bin":
            raise KeyboardInterrupt
        return write(writer, name, split)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", interrupted)
        with pytest.raises(SystemExit) as end:
            command(f"{SHARD} --shard_size 2000")
    assert end.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert names(bench / "data") == [".set.partial"]        # what is finished; the next start goes on with it
    command(f"{SHARD} --shard_size 2000")
    command(f"{SHARD} --shard_size 2000 --name undisturbed")
    assert content(bench / "data/set") == content(bench / "data/undisturbed")


# ------------------------------------------------------------------------------------------------
# Two commands of one name
# ------------------------------------------------------------------------------------------------

def while_it_writes(monkeypatch, name: str, deed: Callable[[], None]) -> None:
    """Do something once, right before a shard of this name is written."""
    write, deeds = ShardWriter.write, [deed]

    def writes(writer, its_name, split):
        if its_name == name and deeds:
            deeds.pop()()
        return write(writer, its_name, split)
    monkeypatch.setattr(ShardWriter, "write", writes)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_two_at_once_do_not_disturb_each_other(bench, command, refusal, small, monkeypatch):
    line, said = f"{SHARD} --shard_size 2000", []
    command(f"{line} --name undisturbed")

    def others():
        monkeypatch.setattr(sys, "argv", ["download_fineweb.py"])
        for more in ("", "--shard_size 500", "--val_tokens 7", "--part 1/2"):
            said.append(refusal(f"{line} {more}"))
    while_it_writes(monkeypatch, "000002.bin", others)
    command(line)
    assert len(said) == 4 and all("another process is writing the same output in " in words for words in said)
    assert content(bench / "data/set") == content(bench / "data/undisturbed")
    assert names(bench / "data") == ["set", "undisturbed"]


def test_unfinished_shards_of_another_command_stay(bench, command, refusal, small, monkeypatch):
    line = f"{SHARD} --shard_size 2000"
    command(f"{line} --name undisturbed")
    with monkeypatch.context() as patch:
        while_it_writes(patch, "000003.bin", interrupt)
        with pytest.raises(SystemExit):
            command(line)
    before = {path: path.stat().st_mtime_ns for path in bench.glob("data/.set.partial/**/*.*")}
    said = refusal(f"{line} --val_tokens 7 --seed 3")
    assert "data/.set.partial has 4 finished shards of an interrupted command with a different " in said
    assert "different seed, val_tokens; run that one again, choose another --name, or delete" in said
    assert said.endswith(f"rm -r {bench}/data/.set.partial")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    command(line)
    assert content(bench / "data/set") == content(bench / "data/undisturbed")


@pytest.fixture
def unfinished(bench, command, small, monkeypatch, kept) -> Path:
    """What an interruption leaves of a set that has two shards; whole, it is data/undisturbed."""
    def begin() -> None:
        with monkeypatch.context() as patch:
            while_it_writes(patch, "000003.bin", interrupt)
            with pytest.raises(SystemExit):
                command(f"{SHARD} --shard_size 2000")
    kept(bench / "data/undisturbed", lambda: command(f"{SHARD} --shard_size 2000 --name undisturbed"))
    kept(bench / "data/.set.partial", begin)
    return bench / "data/.set.partial"


def change_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name, damage, says", [
    ("000001.bin", change_a_byte, "000001.bin has changed since it was written; it will be made again"),
    ("000002.bin", lambda path: os.truncate(path, 5), "000002.bin has changed since it was written; it"),
    ("000002.bin", Path.unlink, "000002.bin cannot be read (No such file or directory); it"),
    ("progress.json", lambda path: path.write_text("{}"), "progress.json is damaged ("),
    ("../was_here.json", lambda path: path.write_text("x"), "was_here.json is damaged; text that")])
def test_a_finished_shard_that_is_not_what_it_was_is_made_again(bench, command, unfinished, capsys, name,
                                                                damage, says):
    damage(unfinished / "unit_000000" / name)
    capsys.readouterr()
    command(f"{SHARD} --shard_size 2000")
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith("note: data/.set.partial/") and says in said
    assert content(bench / "data/set") == content(bench / "data/undisturbed")


@pytest.mark.parametrize("name, damage", [
    ("val_000000.bin", change_a_byte), ("test_000000.bin", Path.unlink),
    ("val.json", lambda path: path.write_text(path.read_text().replace('"chosen": [', '"chosen": ["a", '))),
    ("made_by.json", lambda path: path.write_text("[]"))])
def test_what_cannot_be_made_again_names_how_to_throw_it_away(unfinished, refusal, name, damage):
    damage(unfinished / name)
    said = refusal(f"{SHARD} --shard_size 2000")
    assert f"data/.set.partial/{name} " in said and said.endswith(f"with: rm -r {unfinished}")


def test_what_is_in_the_way_of_a_lock_is_named(bench, refusal, small):
    (bench / "data/.set.partial/whole.lock").mkdir(parents=True)
    assert refusal(SHARD).endswith(f"remove it with: rm -r {bench}/data/.set.partial/whole.lock")
    shutil.rmtree(bench / "data/.set.partial")
    (bench / "data/.set.partial").touch()
    assert refusal(SHARD).endswith(f"remove it with: rm -r {bench}/data/.set.partial")


def test_a_command_that_left_no_shard_leaves_its_name(bench, command, small, monkeypatch):
    with monkeypatch.context() as patch:
        while_it_writes(patch, "val_000000.bin", interrupt)
        with pytest.raises(SystemExit):
            command(SHARD)
    command(f"{SHARD} --val_tokens 7 --seed 3")
    assert names(bench / "data") == ["set"]


@pytest.mark.parametrize("flags", ["", "--num_shards 3"])
def test_what_another_finished_is_not_made_again(bench, command, refusal, small, monkeypatch, flags):
    """It was not there, or had fewer shards, when this command looked."""
    line = f"{SHARD} --shard_size 2000"
    if flags:
        command(f"{line} --num_shards 1")
    real = prepare.Preparation.held

    def held(preparation, **how):
        monkeypatch.setattr(prepare.Preparation, "held", real)
        command(line)
        return real(preparation, **how)
    monkeypatch.setattr(prepare.Preparation, "held", held)
    assert refusal(f"{line} {flags}").endswith(
        "another process finished data/set meanwhile; run the same command again")
    assert names(bench / "data") == ["set"]


def test_a_link_to_nowhere_is_no_place_for_data(bench, command, refusal, small):
    (bench / "data").mkdir()
    (bench / "data/set").symlink_to(bench / "elsewhere")
    assert f"data/set is a link to {bench}/elsewhere, which does not exist; create it" in refusal(SHARD)


def test_a_dataset_may_move_and_be_a_link(bench, command, small):
    line = f"{SHARD} --shard_size 2000"
    command(f"{line} --name undisturbed")
    command(f"{line} --name other --num_shards 1")
    (bench / "data/other").rename(bench / "elsewhere")
    (bench / "data/set").symlink_to(bench / "elsewhere")
    before = open_dataset("set", "")[0].tokens("train")[0]
    command(line)
    assert content(bench / "data/set") == content(bench / "data/undisturbed") == content(bench / "elsewhere")
    assert (bench / "data/set").is_symlink() and not (bench / "data/other").exists()
    assert before.tolist() == open_dataset("set", "")[0].tokens("train")[0].tolist(), "whoever trains goes on"


def test_a_full_disk_names_the_file_and_loses_no_shard(bench, command, refusal, small, monkeypatch):
    line = f"{SHARD} --shard_size 2000"
    command(f"{line} --name undisturbed")

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real = os.fsync
    with monkeypatch.context() as patch:
        while_it_writes(patch, "000003.bin", lambda: patch.setattr(os, "fsync", lambda file: full()))
        assert re.search(r"No space left on device: .*/000003\.bin$", refusal(line))
    assert os.fsync is real
    command(line)
    assert content(bench / "data/set") == content(bench / "data/undisturbed")


# ------------------------------------------------------------------------------------------------
# Held-out documents and parts
# ------------------------------------------------------------------------------------------------

def test_val_tokens_limits_what_is_validated_on(bench, command, small, pages):
    command(f"{SHARD} --val_tokens 1 --name one")
    command(f"{SHARD} --name all")
    one, every = texts(bench / "data/one", "val"), texts(bench / "data/all", "val")
    assert len(one) == 1 and one == every[:1] and len(every) > 1
    assert texts(bench / "data/one", "train") == texts(bench / "data/all", "train")


def test_a_single_file_is_cut_into_parts_with_a_note(bench, command, small, pages, capsys):
    (bench / "book.txt").write_text("\n".join(pages))
    command(f"{SHARD} --version book.txt")
    assert "are cut into parts of about" in capsys.readouterr().out
    cut = json.loads((bench / "data/set/manifest.json").read_text())["held_out"]["cut_characters"]
    parts = [text for _, text in Parts(open_source("book.txt"), cut)]
    train, val = texts(bench / "data/set", "train"), texts(bench / "data/set", "val")
    assert train and val and sorted(all_texts(bench / "data/set")) == sorted(parts)


@given(text=st.text(), part=st.integers(1, 5))
def test_a_long_document_is_encoded_in_parts(small, monkeypatch, text, part):
    monkeypatch.setattr(benchtop.tokenizer, "ENCODE_CHARACTERS", part)
    prepare._set_tokenizer(small)
    encoded, = prepare.tokenize([("its name", text)])
    assert encoded.tokens[0] == 300 and load_tokenizer(small).decode(encoded.tokens[1:].tolist()) == text
    assert (encoded.name, encoded.num_bytes) == ("its name", len(text.encode()))
    parts = list(parts_of(text, part))
    assert "".join(piece for piece, _ in parts) == text and all(len(piece) <= part for piece, _ in parts)
    if not encoded.was_split:
        assert encoded.tokens[1:].tolist() == load_tokenizer(small).encode_ordinary(text)


def test_a_long_document_of_words_has_the_tokens_of_the_whole(small, pages, monkeypatch):
    text = " ".join(pages)
    monkeypatch.setattr(benchtop.tokenizer, "ENCODE_CHARACTERS", 1000)
    prepare._set_tokenizer(small)
    encoded, = prepare.tokenize([("", text)])
    assert len(list(parts_of(text, 1000))) > 10 and not encoded.was_split
    assert encoded.tokens[1:].tolist() == load_tokenizer(small).encode_ordinary(text)


def test_what_tiktoken_panics_at_is_split(small):
    spaces = " " * 1_100_000
    with pytest.raises(BaseException, match="StackOverflow") as panic:
        load_tokenizer(small).encode_ordinary(spaces)
    assert not isinstance(panic.value, Exception)
    prepare._set_tokenizer(small)
    for text in (spaces, "\n" * 1_100_000, "a" * 600_000):
        encoded, = prepare.tokenize([("", text)])
        assert encoded.was_split and load_tokenizer(small).decode(encoded.tokens[1:].tolist()) == text


def test_documents_that_make_trouble_are_named(bench, command, write_rows, pages, small, monkeypatch, capsys):
    class PanicException(BaseException):
        pass

    class Panics:
        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            return getattr(self.real, name)

        def encode_ordinary(self, text):
            if "§" in text or len(text) > 5000:
                raise PanicException
            return self.real.encode_ordinary(text)

    real = prepare.load_tokenizer
    monkeypatch.setattr(prepare, "load_tokenizer", lambda name: Panics(real(name)))
    bad, long = [f"never § {number}" for number in range(7)], "long and " * 2000
    write_rows(bench / "pages.jsonl", [*pages[:100], *bad, long])
    command(f"{SHARD} --seed 3")
    manifest = json.loads((bench / "data" / "set" / "manifest.json").read_text())
    lines = {f"pages.jsonl:{number}" for number in range(101, 108)}
    assert manifest["skipped"]["count"] == 7 and set(manifest["skipped"]["first"]) == lines
    assert manifest["split"] == {"count": 1, "first": ["pages.jsonl:108"]}
    said = capsys.readouterr().out
    assert re.search(r"skipped 7 documents that tiktoken cannot encode: (\S+jsonl:10\d,? ){5}\.\.\.\n", said)
    assert "split 1 document too long or odd to encode whole: pages.jsonl:108\n" in said
    assert Counter(all_texts(bench / "data/set")) == Counter([*pages[:100], long])


@pytest.mark.parametrize("name", ["pages.jsonl", "book.txt"])
def test_the_tokenizer_has_not_seen_what_is_held_out(bench, command, pages, monkeypatch, name):
    (bench / "book.txt").write_text("\n".join(pages))
    learned, count = [], bpe.count_pieces
    monkeypatch.setattr(bpe, "count_pieces", lambda batch: learned.extend(batch) or count(batch))
    command(f"train_tokenizer.py --source {name} --vocabsize 300 --name mine --num_workers 1")
    command(f"{SHARD} --version {name} --tokenizer mine")
    learned = [text for _, text in learned]
    train, val = texts(bench / "data/set", "train"), texts(bench / "data/set", "val")
    assert len(val) > 10 and not any(text in seen for text in val for seen in learned)
    assert set(learned) >= set(train)


def test_a_dataset_of_an_earlier_version_grows_by_the_rule_of_then(bench, command, small, pages, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "rule_for", lambda source: Rule(16, test=None))
        command(f"{SHARD} --shard_size 2000 --num_shards 1")
    path = bench / "data/set/manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("rule", "chosen", "documents", "bytes"):
        del manifest["held_out"][key]
    for key in ("xz_bpb", "xz_training_bytes", "xz_held_out_bytes"):
        del manifest[key]
    path.write_text(json.dumps(manifest))
    assert "xz_bpb" not in open_dataset("set", "")[0].manifest
    command(f"{SHARD} --shard_size 2000")
    train, val = texts(bench / "data/set", "train"), texts(bench / "data/set", "val")
    assert Counter(train) == Counter(text for text in pages if not Rule(16, test=None).holds_out(text))
    assert Counter(val) == Counter(text for text in pages if Rule(16, test=None).holds_out(text))
    assert not texts(bench / "data/set", "test")
    assert open_dataset("set", "")[0].manifest["xz_bpb"] > 0


# ------------------------------------------------------------------------------------------------
# What is said of the text that is held out
# ------------------------------------------------------------------------------------------------

def test_the_bar_is_that_of_xz_on_the_texts(bench, command, small, capsys):
    capsys.readouterr()
    command(f"{SHARD} --shard_size 2e3")
    train, val = ("".join(texts(bench / "data/set", split)).encode() for split in ("train", "val"))
    dataset, _ = open_dataset("set", "")
    bar = dataset.manifest["xz_bpb"]
    assert bar == xz_bits_per_byte(val, after=train) > 0
    assert dataset.manifest["xz_training_bytes"] == len(train)
    assert dataset.manifest["xz_held_out_bytes"] == len(val) == dataset.manifest["held_out"]["bytes"]
    entry = dataset.manifest["shards"][0]
    last = capsys.readouterr().out.splitlines()[-1]
    test = next(shard for shard in dataset.manifest["shards"] if shard["split"] == "test")
    amounts = [f"{part['tokens']:,} in {part['documents']:,}" for part in (entry, test)]
    assert last.endswith(f"{amounts[0]} for validation, {amounts[1]} for the test split; xz -9e after "
                         f"the training text: {bar:.3f} bits per byte of the held-out text")


def test_more_shards_have_another_bar(command, small):
    command(f"{SHARD} --shard_size 2000 --num_shards 1")
    before = open_dataset("set", "")[0].manifest["xz_bpb"]
    command(f"{SHARD} --shard_size 2000")
    assert open_dataset("set", "")[0].manifest["xz_bpb"] < before


def test_too_little_to_validate_on_is_said(bench, command, small, pages, write_rows, monkeypatch, capsys):
    assert (shards.FEW_DOCUMENTS, shards.FEW_TOKENS) == (16, 20_000)
    monkeypatch.setattr(shards, "FEW_TOKENS", 3000)
    write_rows(bench / "more.jsonl", [f"{number} {text}" for number in range(3) for text in pages])
    for flags, too_little in [("--name few", True), ("--version more.jsonl --name enough", False),
                              ("--version more.jsonl --val_tokens 500 --name one", True)]:
        command(f"{SHARD} {flags}")
        said = capsys.readouterr().out
        entry = open_dataset(flags.split()[-1], "")[0].manifest["shards"][0]
        assert (entry["documents"] < 16 or entry["tokens"] < 3000) == too_little
        note = (f"note: only {entry['documents']} documents with {entry['tokens']:,} tokens are held out; "
                "on fewer than 16 documents or 3,000 tokens, ")
        assert said.count("note: ") == said.count(note) == too_little


@pytest.mark.parametrize("documents, tokens, says", [
    (16, 20_000, ""), (15, 10**6, "only 15 documents with 1,000,000 tokens are held out; "),
    (10**6, 19_999, "only 1,000,000 documents with 19,999 tokens are held out; "),
    (0, 20_000, ""), (0, 19_999, "only 19,999 tokens are held out; "),      # 0 in shards of other projects
])
def test_few_documents_or_few_tokens_are_too_little(documents, tokens, says):
    shard = {"split": "val", "documents": documents, "tokens": tokens}
    said = shards.few_held_out({"shards": [shard, {"split": "train", "documents": 99, "tokens": 10**6}]})
    assert said.startswith(says) and bool(said) == bool(says)


def test_a_command_without_a_tokenizer_takes_the_only_one(bench, command, refusal, small):
    line = SHARD.replace(f"--tokenizer {TOKENIZER} ", "")
    command(line)
    assert json.loads((bench / "data/set/manifest.json").read_text())["tokenizer"] == TOKENIZER
    command(f"{TRAIN} --vocabsize 256 --name bytes")
    assert "choose a tokenizer with --tokenizer: bytes, small" in refusal(line)
    shutil.rmtree(bench / "tokenizers")
    assert "make one with: python train_tokenizer.py --vocabsize 4096 --name mine" in refusal(line)


# ------------------------------------------------------------------------------------------------
# The folder
# ------------------------------------------------------------------------------------------------

def test_another_source_or_tokenizer_gets_another_folder(bench, command, small, pages, write_rows):
    command(f"{TRAIN} --vocabsize 256 --samples 99 --name bytes")
    write_rows(bench / "other.jsonl", pages)
    for source in ("pages.jsonl", "other.jsonl"):
        for tokenizer in (small, "bytes.pkl"):
            command(f"download_fineweb.py --version {source} --tokenizer {tokenizer} --num_workers 1")
    labels = [open_source(source).label for source in ("other.jsonl", "pages.jsonl")]
    assert names(bench / "data") == [f"{label}_{tokenizer}" for label in labels
                                     for tokenizer in ("bytes", small)]


def test_a_second_run_reuses_the_data_and_touches_nothing(bench, command, small, capsys):
    command(SHARD)
    times = {path: path.stat().st_mtime_ns for path in bench.rglob("*")}
    told = capsys.readouterr().out.splitlines()[-1]
    command(SHARD)
    assert capsys.readouterr().out.splitlines() == [told.replace("wrote", "reusing")]
    assert {path: path.stat().st_mtime_ns for path in bench.rglob("*")} == times


def test_other_settings_under_the_same_name_are_refused(bench, command, refusal, small, pages, write_rows):
    command(SHARD)
    before = content(bench / "data/set")
    for flag in ("seed", "shard_size", "num_shards", "val_tokens"):
        assert f"a different {flag};" in refusal(f"{SHARD} --{flag} 7")
    write_rows(bench / "pages.jsonl", [*pages, "one more"])
    assert "a different source;" in refusal(SHARD)
    assert content(bench / "data/set") == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', "[" * 100_000])
def test_a_folder_with_a_damaged_manifest_is_refused(bench, refusal, small, text):
    (bench / "data/set").mkdir(parents=True)
    (bench / "data/set/manifest.json").write_text(text)
    assert f"rm -r {bench}/data/set" in refusal(SHARD)
    (bench / "data/set/manifest.json").unlink()
    assert f"rm -r {bench}/data/set" in refusal(SHARD)


@pytest.mark.parametrize("flags, hint", [
    ("--tokenizer nosuch", "to make nosuch: python train_tokenizer.py"),
    ("--tokenizer ../small", "'../small'"),
    ("--version nowhere", "nowhere"),
    ("--version 10B pages.jsonl", "cannot be mixed"),
    ("--version empty.jsonl", "is empty"),
    ("--version tiny.txt", "too few to train"),
    ("--version blank.txt", "is nothing but white space (300,002 characters)"),
    ("--version ''", "the name of a source is empty"),
    ("--name ../set", "'../set'"),
    ("--name " + "x" * 300, "letters"),
    ("--num_shards -1", "at least 0"),
    ("--shard_size 0", "at least 1"),
    ("--shard_size 3000000000", "below 2^31"),
    ("--seed x", "invalid int"),
    ("--num_shard 1", "did you mean --num_shards?"),
])
def test_a_wrong_flag_ends_in_one_line(bench, refusal, small, flags, hint):
    (bench / "empty.jsonl").write_text('{"text": ""}\n')
    (bench / "tiny.txt").write_text("hello world\n" * 9)
    (bench / "blank.txt").write_text(" " * 300_000 + "\t\n")
    assert hint in refusal(f"{SHARD} {flags}")
    assert not (bench / "data").exists() or not names(bench / "data")


def test_replaced_bytes_are_told(bench, command, capsys, small):
    (bench / "odd.txt").write_bytes("Größe ".encode() * 5000 + b"\xff\n" * 9000)
    (bench / "other.txt").write_text("".join(f"{number}\n" for number in range(9000)))
    command(f"{SHARD} --version odd.txt other.txt")
    assert "replaced 9,000 invalid UTF-8 sequences by U+FFFD in odd.txt (9,000)" in capsys.readouterr().out


def test_another_encoding_is_one_line_that_names_its_file_and_leaves_nothing(bench, refusal, small, pages):
    (bench / "latin.txt").write_bytes("Größe\n".encode("latin-1") * 5000)
    said = refusal(f"{SHARD} --version pages.jsonl latin.txt")
    assert "latin.txt is not UTF-8 (10,000 invalid" in said and "iconv -f CP1252" in said
    assert not names(bench / "data")


def test_git_keeps_of_data_and_tokenizers_only_what_says_what_they_are():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    asked = [f"{folder}/{name}" for folder in ("data", "tokenizers")
             for name in ("README.md", "mine/README.md", "mine", ".mine.partial")]
    ignored = subprocess.run(["git", "check-ignore", *asked], cwd=ROOT, text=True, capture_output=True)
    assert ignored.stdout.split() == [path for path in asked if path.count("/") > 1 or "README" not in path]
    assert all((ROOT / folder / "README.md").is_file() for folder in ("data", "tokenizers"))


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def made(bench, command, small, kept) -> Path:
    """A dataset of several shards, data/set."""
    kept(bench / "data/set", lambda: command(f"{SHARD} --shard_size 8000"))
    return bench / "data/set"


@pytest.fixture
def good(made) -> dict:
    return json.loads((made / "manifest.json").read_text())


def read_all(data: str = "set", tokenizer: str = "") -> dict[str, list[list[int]]]:
    dataset, _ = open_dataset(data, tokenizer)
    return {split: [tokens.tolist() for tokens in dataset.tokens(split)] for split in ("train", "val")}


def test_a_dataset_reads_as_it_was_written(made):
    expected = {split: [tokens_of(path) for path in sorted(made.glob(f"{split}_*.bin"))]
                for split in ("train", "val")}
    assert len(expected["train"]) > 1
    for data in ("set", ""):
        for tokenizer in (TOKENIZER, TOKENIZER + ".pkl", ""):
            assert read_all(data, tokenizer) == expected


def test_the_hash_of_a_dataset_changes_with_its_content(made, good):
    before = open_dataset("set", "")[0].sha256
    assert open_dataset("set", "")[0].sha256 == before
    good["shards"][1]["sha256"] = "0" * 64
    (made / "manifest.json").write_text(json.dumps(good))
    assert open_dataset("set", "")[0].sha256 != before


def test_bare_shards_load_when_the_tokenizer_is_named(made):
    expected = read_all()
    (made / "manifest.json").unlink()
    assert read_all("set", TOKENIZER) == expected
    with pytest.raises(UserError, match="name it with --tokenizer"):
        read_all("set", "")
    for path in made.glob("val*.bin"):
        path.unlink()
    with pytest.raises(UserError, match="no val shard"):
        read_all("set", TOKENIZER)
    for path in made.glob("*.bin"):
        path.unlink()
    with pytest.raises(UserError, match="neither a manifest nor"):
        read_all("set", TOKENIZER)


def test_no_data_or_too_much_is_told(bench, command, made):
    with pytest.raises(UserError, match="there is no tokenizer other, only small"):
        open_dataset("", "other")
    command(f"{TRAIN} --vocabsize 256 --samples 99 --name bytes")
    with pytest.raises(UserError, match=r"no data of tokenizer bytes.* --tokenizer bytes$"):
        open_dataset("", "bytes")
    with pytest.raises(UserError, match=r"there is no other in .* --tokenizer small --name other$"):
        open_dataset("other", TOKENIZER)
    with pytest.raises(UserError, match=r"there is no sett in .*; did you mean set\? To make sett: python "):
        open_dataset("sett", TOKENIZER)
    with pytest.raises(UserError, match=r"there is no nosuch in .*, only set; to make nosuch: python "):
        open_dataset("nosuch", TOKENIZER)
    command(f"{SHARD} --name second")
    with pytest.raises(UserError, match=r"there is no se in .*; did you mean second or set\? To make se: "):
        open_dataset("se", TOKENIZER)
    with pytest.raises(UserError, match=r"there is no set-py3.11.7 in .*; did you mean set\? To make "):
        open_dataset("set-py3.11.7", TOKENIZER)
    with pytest.raises(UserError, match="choose one with --data: second, set"):
        open_dataset("", TOKENIZER)
    shutil.rmtree(bench / "data")
    with pytest.raises(UserError, match=r"with: python download_fineweb.py .* --tokenizer bytes$"):
        open_dataset("", "")
    shutil.rmtree(bench / "tokenizers")
    with pytest.raises(UserError, match=r"python train_tokenizer.py .* --name mine && "
                                        r"python download_fineweb.py .* --tokenizer mine$"):
        open_dataset("", "")


@pytest.mark.parametrize("typed", ["my_texts", "my texts/", "one.txt"])
def test_text_that_is_named_as_data_is_answered_with_the_command_for_it(bench, command, made, typed):
    for path in ("my_texts/a.txt", "my texts/b.txt", "one.txt"):
        (bench / path).parent.mkdir(exist_ok=True)
        (bench / path).write_text("".join(f"line {number} of {path}\n" for number in range(2000)))
    with pytest.raises(UserError, match=r"is text, not a folder in .* make data from it: python") as refused:
        open_dataset(typed, TOKENIZER)
    command(str(refused.value).split(": python ")[1] + " --num_workers 1")
    assert open_dataset(typed.strip("/").replace(" ", "-"), TOKENIZER)[0].manifest["shards"]


def test_advice_names_the_text_that_the_tokenizer_was_made_of(bench, command, made):
    path = bench / "tokenizers" / TOKENIZER / "meta.json"
    for source, version in (("stdlib", "stdlib"), ("10Bedu", "10Bedu"), ("pages", "YOUR_TEXTS")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source}))
        with pytest.raises(UserError, match=f"make other: .* --source {version} --tokenizer small --name o"):
            open_dataset("other", TOKENIZER)


@pytest.mark.parametrize("data", ["../set", "/tmp", ".", "..", "set\n", "a b", "x" * 300, "\0", "/",
                                  "tokenizers/set", "data/..", "data/set/manifest.json"])
def test_data_is_a_name_and_never_another_path(made, data):
    with pytest.raises(UserError):
        open_dataset(data, TOKENIZER)


def test_a_path_as_the_shell_completes_it_is_a_name(bench, command, made, monkeypatch):
    for typed in ("set/", "data/set", "data/set/", "./data/set", str(made), f"{made}/"):
        assert open_dataset(typed, f"tokenizers/{TOKENIZER}/")[0].folder == made
    command(f"{SHARD} --tokenizer tokenizers/{TOKENIZER}/ --name data/other/")
    assert names(bench / "data") == ["other", "set"]
    (bench / "elsewhere").mkdir()
    monkeypatch.chdir(bench / "elsewhere")
    assert open_dataset("data/set", f"../tokenizers/{TOKENIZER}")[0].folder == made


def test_data_of_another_tokenizer_is_refused(command, made):
    command(f"{TRAIN} --vocabsize 299 --samples 50000 --name other")
    with pytest.raises(UserError, match="was made with tokenizer small"):
        open_dataset("set", "other")
    shutil.rmtree(made.parent.parent / "tokenizers" / TOKENIZER)
    with pytest.raises(UserError, match="there is no tokenizer small"):
        open_dataset("set", "")


@pytest.mark.parametrize("name", ["train_000002.bin", "val_000000.bin"])
@pytest.mark.parametrize("damage", [
    lambda raw: None, lambda raw: b"", lambda raw: raw[:8], lambda raw: raw[:1024], lambda raw: raw[:-1],
    lambda raw: raw[:-2], lambda raw: raw + b"\0\0", lambda raw: b"\0\0\0\0" + raw[4:],
    lambda raw: raw[:4] + b"\7" + raw[5:], lambda raw: raw[:8] + struct.pack("<i", 5) + raw[12:],
    lambda raw: raw[:8] + struct.pack("<i", 5) + raw[12:1024 + 10],
    lambda raw: raw[:8] + struct.pack("<i", -1) + raw[12:1022],
], ids=["missing", "empty", "header_cut", "no_tokens", "odd", "cut", "longer", "magic", "version", "count",
        "shorter", "negative"])
@pytest.mark.parametrize("bare", [False, True], ids=["manifest", "bare"])
def test_a_damaged_shard_is_noticed(made, name, damage, bare, request):
    raw = damage((made / name).read_bytes())
    (made / name).unlink() if raw is None else (made / name).write_bytes(raw)
    if bare:
        (made / "manifest.json").unlink()
        if request.node.callspec.id.split("-")[1] in ("missing", "shorter"):
            return      # nothing tells that they were there
    with pytest.raises(UserError):
        read_all("set", TOKENIZER)


words = st.text(max_size=5) | st.sampled_from(
    ["../../x", "/etc/passwd", "manifest.json", "val_000000.bin", "x" * 300, "train", "val"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=5)


@settings(max_examples=200)
@given(data=st.data())
def test_no_manifest_raises_another_exception(made, good, data):
    manifest = json.loads(json.dumps(good))
    where = data.draw(st.sampled_from([manifest, *manifest["shards"]]))
    key = data.draw(st.sampled_from(sorted(where)))
    if data.draw(st.booleans()):
        where[key] = data.draw(json_values)
    else:
        del where[key]
    (made / "manifest.json").write_text(json.dumps(manifest))
    try:
        read_all()
    except UserError:
        assert manifest != good


@pytest.mark.parametrize("change", [
    {"format_version": 2}, {"tokenizer": "../x"}, {"tokenizer_sha256": "0" * 64}, {"vocab_size": 300},
    {"eot_id": 10}, {"shards": {}}, {"shards": [7]}, {"shards": []},
])
def test_a_manifest_that_does_not_fit_is_noticed(made, good, change):
    (made / "manifest.json").write_text(json.dumps(good | change))
    with pytest.raises(UserError):
        read_all()


@pytest.mark.parametrize("change", [
    {"file": "../set/train_000001.bin"}, {"file": "../../x"}, {"file": "/etc/passwd"}, {"file": ""},
    {"file": "."}, {"file": "x\n"}, {"file": "x" * 300}, {"file": "manifest.json"}, {"tokens": -1},
    {"tokens": 10**30}, {"tokens": "5"}, {"split": 7},
])
def test_a_shard_entry_that_does_not_fit_is_noticed(made, good, change):
    good["shards"][1] |= change
    (made / "manifest.json").write_text(json.dumps(good))
    with pytest.raises(UserError):
        read_all()


def test_torchrun_gives_the_same_dataset(bench, small, pages, command, monkeypatch, capsys):
    """Each process of torchrun runs the script; the first does the work."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    for rank in ("1", "0", "2"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        command(f"download_fineweb.py --version pages.jsonl --tokenizer {small} --name by_ranks "
                "--num_workers 1")
        assert (bench / "data" / "by_ranks").exists() == (rank != "1")
    assert capsys.readouterr().out.count("wrote data/by_ranks") == 1


def test_a_reused_dataset_has_all_its_shards(bench, small, pages, command, refusal):
    line = f"download_fineweb.py --version pages.jsonl --tokenizer {small} --name mine --num_workers 1"
    command(line)
    (bench / "data" / "mine" / "train_000001.bin").unlink()
    assert "train_000001.bin is missing" in refusal(line)


def test_a_changed_byte_is_found(bench, small, pages, command, refusal):
    line = f"download_fineweb.py --version pages.jsonl --tokenizer {small} --name mine --num_workers 1"
    command(line)
    shard = bench / "data" / "mine" / "train_000001.bin"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    assert "train_000001.bin has changed" in refusal(line)


def test_a_further_process_leaves_what_another_has_begun(bench):
    """Also before that one has finished a shard."""
    partial = bench / "data/.set.partial"
    begun = partial / "unit_000002/000001.bin.partial"
    partial.mkdir(parents=True)
    take_up(partial, {"seed": 1})
    begun.parent.mkdir()
    begun.touch()
    take_up(partial, {"seed": 1})
    assert begun.exists()
    take_up(partial, {"seed": 2})
    assert not begun.exists(), "another command begins anew"


@pytest.mark.parametrize(("typed", "named"), [
    ("notes.txt", "a further --source"), ("--part 1/2", "--part"), ("--tokenizer mine", "--tokenizer"),
    ("--seed 1 --val_tokens 9", "--seed, --val_tokens")])
def test_flags_that_ready_made_shards_cannot_follow_are_refused(refusal, typed, named):
    said = refusal(f"download_fineweb.py --source 10B-gpt2 {typed}")
    assert said.endswith(f"10B-gpt2 has shards of GPT-2's tokens already; leave out {named}")
