"""What shards are is told by their content, and what they cannot be is refused before anything is trained.

Run: ./run.sh test tests/test_shards.py
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import TINY, train_here

from benchtop import places
from benchtop.errors import UserError
from benchtop.machine import World
from benchtop.processes import Processes
from benchtop.run import open_data
from benchtop.shards import Dataset, open_dataset, split_of
from train_gpt import Config


@pytest.fixture
def tiny(lab, here, monkeypatch) -> Path:
    """A copy of the lab's dataset, data/tiny."""
    shutil.copytree(lab / "data" / "tiny", here / "data" / "tiny")
    monkeypatch.setattr(places, "DATA", here / "data")
    return here / "data" / "tiny"


@pytest.fixture
def bare(tiny) -> Path:
    """The same without its manifest."""
    (tiny / "manifest.json").unlink()
    return tiny


def verified(name: str = "tiny") -> Dataset:
    return open_dataset(name, "tiny")[0].verified(Processes())


def write_shard(path: Path, tokens: list[int] | np.ndarray, wide: bool = False) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = *((20240801, 7) if wide else (20240520, 1)), len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype="<u4" if wide else "<u2").tobytes())


def tokens_of(path: Path) -> np.ndarray:
    return np.fromfile(path, dtype="<u2", offset=1024)


def exchange(path: Path) -> None:
    """Another shard of as many tokens: two of them change places."""
    tokens = tokens_of(path)
    place = next(place for place in range(len(tokens) - 1) if len({*tokens[place:place + 2], tokens[0]}) == 3)
    tokens[place], tokens[place + 1] = tokens[place + 1], tokens[place]
    write_shard(path, tokens)


def change_manifest(folder: Path, **entry) -> None:
    """Change the entries of all shards."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"] = [shard | entry for shard in manifest["shards"]]
    path.write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------
# What they are
# ------------------------------------------------------------------------------------------------

def test_the_same_shards_are_the_same_data_with_or_without_a_manifest(tiny):
    whole = verified().sha256
    assert open_dataset("tiny", "")[0].sha256 == whole
    shutil.copytree(tiny, tiny.parent / "copy")
    change_manifest(tiny.parent / "copy", sha256="")
    assert verified("copy").sha256 == whole
    (tiny.parent / "copy" / "manifest.json").unlink()
    assert verified("copy").sha256 == whole
    (tiny.parent / "link").symlink_to(tiny.parent / "copy")
    assert verified("link").sha256 == whole


@pytest.mark.parametrize("name", ["train_000001.bin", "val_000000.bin"])
@pytest.mark.parametrize("kind", ["bare", "without hashes"])
def test_other_shards_of_equal_size_are_other_data(tiny, name, kind):
    change_manifest(tiny, sha256="")
    if kind == "bare":
        (tiny / "manifest.json").unlink()
    before = verified().sha256
    exchange(tiny / name)
    assert verified().sha256 != before


def test_an_edited_hash_is_noticed(tiny):
    change_manifest(tiny, sha256="0" * 64)
    with pytest.raises(UserError, match=r"val_000000.bin has changed since it was written \(its SHA-256 "):
        verified()


def test_processes_share_out_what_their_machine_has(tiny):
    """Two machines of two processes each, whose disks hold other bytes."""
    write_shard(tiny / "train_000002.bin", tokens_of(tiny / "train_000001.bin"))
    (tiny / "manifest.json").unlink()
    there = tiny.parent / "there"
    shutil.copytree(tiny, there)
    exchange(there / "train_000001.bin")
    found = [open_dataset(name, "tiny")[0].verify(rank, 2) for name in ("tiny", "there") for rank in range(2)]
    assert [sorted(hashes) for hashes in found[:2]] == [["train_000002.bin", "val_000000.bin"],
                                                        ["train_000001.bin"]]

    class OneOf(Processes):
        def gather(self, thing):
            return found if isinstance(thing, dict) else [thing]
    for rank, name in enumerate(("tiny", "tiny", "there", "there")):
        world = OneOf()
        world.rank, world.size, world.local_rank, world.local_size = rank, 4, rank % 2, 2
        assert open_dataset(name, "tiny")[0].verified(world).sha256 == verified(name).sha256
    assert verified("tiny").sha256 != verified("there").sha256


def test_a_run_knows_its_bare_shards_and_refuses_others_of_equal_size(bare, here, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    knobs = {"data": "tiny", "tokenizer": "tiny", "num_steps": 6}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("benchtop.run.finish", interrupt)
        train_here(here, **knobs, save_every_steps=1)
    folder, = here.glob("experiments/*")
    exchange(bare / "train_000001.bin")
    with pytest.raises(UserError, match=r"cannot be resumed as is: the data changed\. Undo that"):
        train_here(here, **knobs, resume=str(folder))
    exchange(bare / "train_000001.bin")
    train_here(here, **knobs, resume=str(folder))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["data_sha256"] == verified().sha256


# ------------------------------------------------------------------------------------------------
# What they cannot be
# ------------------------------------------------------------------------------------------------

def complaint(here: Path) -> str:
    """What a run says of its data; it must not begin to train."""
    cfg = Config(**TINY | {"data": "tiny", "tokenizer": "tiny"})
    with pytest.raises(UserError) as error:
        open_data(cfg, World(cfg))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("tokens", [[], [300] * 10, [300]], ids=str)
def test_a_val_shard_without_text_is_refused_before_training(bare, here, tokens):
    write_shard(bare / "val_000000.bin", tokens)
    assert f"the {len(tokens)} tokens of the val shards have no text to validate on" in complaint(here)


def test_shards_of_a_test_split_are_looked_at_by_nobody(bare):
    before = verified()
    for name in ("x_test_000000.bin", "test.bin"):
        write_shard(bare / name, [300, 1, 2])
    assert verified().manifest == before.manifest and verified().sha256 == before.sha256
    assert sum(map(len, before.tokens("val"))) == len(tokens_of(bare / "val_000000.bin"))


@pytest.mark.parametrize(("name", "split"), [
    ("fineweb_train_000001.bin", "train"), ("val_000000.bin", "val"), ("edu-VALIDATION.bin", "val"),
    ("TinyStories_val.bin", "val"), ("train2.bin", "train"), ("medieval_train_1.bin", "train"),
    ("x_test_1.bin", "test"), ("train_of_latest.bin", "train"), ("of_train_test.bin", "test")])
def test_the_name_of_a_bare_shard_says_what_it_is_for(name, split):
    assert split_of(Path(name)) == split


def test_a_shard_that_is_for_nothing_is_refused(bare, here):
    write_shard(bare / "pretraining_1.bin", [300, 1, 2])
    assert "pretraining_1.bin has neither train, val nor test in its name" in complaint(here)


@pytest.mark.parametrize("put", [shutil.copyfile, lambda path, twin: twin.symlink_to(path)])
@pytest.mark.parametrize(("name", "twin"), [("more_val_1.bin", "train_000001.bin"),
                                            ("train_000002.bin", "val_000000.bin")])
def test_nobody_is_validated_on_what_is_trained_on(bare, here, put, name, twin):
    put(bare / twin, bare / name)
    said = complaint(here)
    assert name in said and twin in said and "has the same content as" in said and "move one of them" in said


@pytest.mark.parametrize("twin", ["train_000001.bin", "val_000000.bin"])
def test_a_text_that_counts_twice_is_told(bare, capsys, twin):
    verified()
    assert not capsys.readouterr().err
    (bare / f"z_{twin}").symlink_to(bare / twin)
    verified()
    said = capsys.readouterr().err
    assert said == f"warning: {bare}/z_{twin} has the same content as {twin}, so that text is used twice\n"


def test_hidden_files_are_no_shards(bare):
    before = verified()
    shutil.copyfile(bare / "train_000001.bin", bare / "._train_000002.bin")
    (bare / "._val_000001.bin").write_bytes(b"as macOS leaves beside a file")
    assert verified().manifest == before.manifest


@pytest.mark.parametrize("put", [Path.mkdir, lambda path: path.symlink_to("nothing")])
@pytest.mark.parametrize(("name", "says"), [
    ("manifest.json", "manifest.json is damaged"), ("x_train_2.bin", "x_train_2.bin is not a file")])
def test_what_cannot_be_read_is_not_taken_for_nothing(bare, here, put, name, says):
    put(bare / name)
    assert says in complaint(here)


@pytest.mark.parametrize(("tokens", "says"), [
    ([300, 1, 301, 2], "train_000002.bin has token 301, but tiny has only 301; name the tokenizer it was"),
    ([1, 2, 3] * 99, "train_000002.bin has no <|endoftext|> (token 300 of tiny); name the tokenizer")])
@pytest.mark.parametrize("wide", [False, True])
def test_shards_of_another_tokenizer_are_refused(bare, here, tokens, says, wide):
    write_shard(bare / "train_000002.bin", tokens, wide)
    assert says in complaint(here)


def test_shards_of_four_bytes_a_token_are_read_as_those_of_two(bare):
    before = [tokens.tolist() for tokens in verified().tokens("train")]
    write_shard(bare / "train_000001.bin", tokens_of(bare / "train_000001.bin"), wide=True)
    assert [tokens.tolist() for tokens in verified().tokens("train")] == before


def test_a_shard_that_cannot_be_read_is_one_line(tiny, here, monkeypatch):
    real = np.fromfile

    def fromfile(path, **how):
        if "train" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, **how)
    monkeypatch.setattr(np, "fromfile", fromfile)
    assert complaint(here) == f"cannot read {tiny}/train_000001.bin: Permission denied"


def test_a_manifest_that_lists_a_file_twice_is_refused(tiny, here):
    change_manifest(tiny, file="val_000000.bin")
    assert "manifest.json is damaged (ValueError: val_000000.bin is listed more than once)" in complaint(here)
