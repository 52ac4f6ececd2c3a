"""Each kind of file that Benchtop reads, damaged in each way that disks, editors and people know: what is
read then is right, or it is said in one line what is not. Never a traceback, never a silent change.

Run: ./run.sh test tests/test_every_damage.py -s       (-s counts the cases and how they ended)
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_resume import resume_here, stop_here, tensors_of
from tiny_runs import TINY, redirect, rows_of, summary_of, train_here

import compare
import download_fineweb
from benchtop import places
from benchtop.errors import UserError
from benchtop.groups import open_groups
from benchtop.identity import NEUTRAL_KNOBS
from benchtop.knobs import parse_config
from benchtop.machine import World
from benchtop.run import Run, start
from benchtop.shards import ShardWriter, open_dataset
from benchtop.sources import open_source
from benchtop.tasks import open_task
from benchtop.tokenizer import load_tokenizer
from train_gpt import EXPERIMENT, Config

TEXT = "The bench stands in the hall. Größe, ёлка, 東京.\n"


# ------------------------------------------------------------------------------------------------
# What happens to files
# ------------------------------------------------------------------------------------------------

def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:int(share * len(raw))]


def flipped(share: float) -> Callable[[bytes], bytes]:
    def flip(raw: bytes) -> bytes:
        place = int(share * (len(raw) - 1))
        return raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1:]
    return flip


def encoded(encoding: str) -> Callable[[bytes], bytes]:
    """As an editor saves a text in another encoding; what is no text stays."""
    def change(raw: bytes) -> bytes:
        try:
            return raw.decode().encode(encoding)
        except UnicodeError:
            return raw
    return change


# the same text in other bytes: it is read as before, or refused
WRITTEN_OTHERWISE = {
    "UTF-8 with its mark": lambda raw: b"\xef\xbb\xbf" + raw, "UTF-16": encoded("utf-16"),
    "UTF-16, big end first": lambda raw: b"\xfe\xff" + encoded("utf-16-be")(raw), "UTF-32": encoded("utf-32"),
    "UTF-16 without a mark": encoded("utf-16-le"), "UTF-32 without a mark": encoded("utf-32-be")}
DAMAGE = {
    "empty": lambda raw: b"", "its first byte": lambda raw: raw[:1], "a quarter": cut(0.25), "half": cut(0.5),
    "all but a byte": lambda raw: raw[:-1], "a bit at its beginning": flipped(0), "a bit in it": flipped(0.3),
    "another bit in it": flipped(0.6), "a bit at its end": flipped(1),
    "noise behind": lambda raw: raw + b"\xff\0x", "noise": lambda raw: random.Random(0).randbytes(len(raw)),
    "twice": lambda raw: raw + raw, "CRLF": lambda raw: raw.replace(b"\n", b"\r\n"),
    "NULs": lambda raw: bytes(len(raw)), "spaces": lambda raw: b" " * len(raw),
    "HTML of a proxy": lambda raw: b"<!doctype html><title>Sign in</title>", "null": lambda raw: b"null",
    "a list": lambda raw: b"[]", "an object": lambda raw: b"{}", "a number": lambda raw: b"1e999",
    "a string": lambda raw: b'"x"', "many brackets": lambda raw: b"[" * 100_000}


def gone(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def unreadable(path: Path) -> None:
    path.chmod(0)


PLACES = [gone, a_folder, a_link_to_nothing, a_link_to_itself,
          *([unreadable] if hasattr(os, "geteuid") and os.geteuid() else [])]


# ------------------------------------------------------------------------------------------------
# What reads them
# ------------------------------------------------------------------------------------------------

@dataclass
class Scene:
    """Files, and what a person gets of them.

    files    that are damaged, one at a time
    read     the answer for the folder; it may refuse by UserError
    content  whether other bytes may be another, whole content, as of text; then the answer is a pair, whose
             second part, a hash, must change with the first
    unsigned  files in which nothing tells that a bit is another one
    optional  files that may be missing
    go_on    the answer after all that follows, where `read` breaks off what takes long; asked for only in the
             first TO_THE_END cases of each file that are read right
    """
    files: list[str]
    read: Callable[[Path], object]
    content: bool = False
    unsigned: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    go_on: Callable[[Path], object] | None = None


TO_THE_END = 2


def text_scene(folder: Path) -> Scene:
    text = folder / "text"
    text.mkdir()
    for name in ("a.txt", "b.md", "c.py"):
        (text / name).write_text(f"# {name}\n" + TEXT * 5)
    rows = "".join(json.dumps({"text": f"{number} {TEXT}"}, ensure_ascii=False) + "\n" for number in range(5))
    (text / "d.jsonl").write_text(rows)
    (text / "e.jsonl.gz").write_bytes(gzip.compress(rows.replace("bench", "gate").encode(), mtime=0))
    with pyarrow.CompressedOutputStream(str(text / "f.txt.zst"), "zstd") as file:
        file.write(("zst " + TEXT * 5).encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"parquet {number} {TEXT}" for number in range(5)]}),
                                text / "g.parquet")

    def read(folder: Path) -> object:
        source = open_source(str(folder / "text"))
        texts = [each for _, each in source]
        assert not any("\0" in each for each in texts), "NULs are trained on"
        assert source.replaced or not any("\ufffd" in each for each in texts), "replaced, and not counted"
        return texts, source.fingerprint
    return Scene([f"text/{path.name}" for path in sorted(text.iterdir())], read, content=True)


def bare_scene(folder: Path) -> Scene:
    (folder / "data/tiny/manifest.json").unlink()
    return data_scene(folder, content=True)


def data_scene(folder: Path, content: bool = False) -> Scene:
    def read(folder: Path) -> object:
        dataset, _ = open_dataset("tiny", "tiny")
        dataset = dataset.verified(World(Config(**TINY)))
        tokens = [np.concatenate(dataset.tokens(split)) for split in ("train", "val")]
        return [hashlib.sha256(part.tobytes()).hexdigest() for part in tokens], dataset.sha256
    files = sorted(path.name for path in (folder / "data/tiny").iterdir())
    return Scene([f"data/tiny/{name}" for name in files], read, content)


def unfinished_scene(folder: Path) -> Scene:
    """A dataset whose making was interrupted; the same command then ends with the same bytes, or refuses."""
    rows = [json.dumps({"text": f"{number} the cat sat {number * 'and ran '}"}) for number in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    line = ["download_fineweb.py", "--version", str(folder / "rows.jsonl"), "--tokenizer", "tiny",
            "--name", "set", "--num_workers", "1", "--shard_size", "300"]
    write = ShardWriter.write

    def interrupted(writer: ShardWriter, name: str, split: str) -> dict:
        if name == "000003.bin":
            raise KeyboardInterrupt
        return write(writer, name, split)

    def read(folder: Path) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(places, "ROOT", folder)
            patch.setattr(sys, "argv", line)
            download_fineweb.main()
        return {path.name: path.read_bytes() for path in (folder / "data/set").iterdir()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ShardWriter, "write", interrupted)
        read(folder)
    names = ("made_by.json", "was_here.json", "val.json", "val_000000.bin", "unit_000000/progress.json",
             "unit_000000/000001.bin")
    return Scene([f"data/.set.partial/{name}" for name in names], read)


def tokenizer_scene(folder: Path) -> Scene:
    def read(folder: Path) -> object:
        return load_tokenizer("tiny").encode_ordinary("the cat sat on the mat")
    return Scene(["tokenizers/tiny/ranks.tiktoken", "tokenizers/tiny/meta.json"], read)


def resumed_scene(folder: Path) -> Scene:
    run = stop_here(folder)
    for old in ("checkpoint_previous.pt", "checkpoint_best.pt"):
        (run / old).unlink(missing_ok=True)
    shutil.rmtree(run / "code")     # many files, which nobody reads here
    name = f"experiments/{run.name}"

    class Seen(Exception):
        """The end of a run that has been looked at."""

    def read(folder: Path) -> object:
        """All that the training loop gets."""
        found = []

        def look(run: Run) -> None:
            run.validate_and_log()      # what a loop does first
            state = tensors_of({"model": run.model.state_dict(), "optimizer": run.optimizer.state()})
            found.extend([run.step, run.best_step, [(row["step"], row["train_loss"], row["val_loss"])
                                                    for row in rows_of(run.log.folder)]])
            found.append({knob: value for knob, value in dataclasses.asdict(run.cfg).items()
                          if knob not in NEUTRAL_KNOBS})
            found.extend((name, hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
                         for name, tensor in state.items())
            raise Seen
        with contextlib.suppress(Seen):
            cfg = parse_config(["--resume", str(folder / name), "--micro_batch_tokens", "128"], Config)
            start(dataclasses.replace(EXPERIMENT, train=look), cfg, World(cfg))
        return found

    def go_on(folder: Path) -> object:
        """What the run leaves at its end."""
        resume_here("--resume", str(folder / name))
        run = folder / name
        rows, summary = rows_of(run), summary_of(run)
        assert len(rows) == 6 and summary["status"] == "finished"
        return ([(row["step"], row["train_loss"], row["val_loss"]) for row in rows], summary["best_val_bpb"],
                *((run / file).read_bytes() for file in ("samples.jsonl", "held_out.csv", "loss.png")))
    return Scene([f"{name}/{file}" for file in ("config.json", "checkpoint.pt", "metrics.csv")], read,
                 go_on=go_on)


def compared_scene(folder: Path) -> Scene:
    runs = [train_here(folder, seed=seed, model_name=f"r{seed}") for seed in range(2)]
    for run in runs:
        shutil.rmtree(run / "code")     # many files, which nobody reads here

    def read(folder: Path) -> object:
        group = f"all={folder}/experiments/2*"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["compare.py", group])
            compare.main()
        runs = open_groups([group])[0].runs
        assert all(run.samples is not None for run in runs)     # texts, which no number is made of
        return [(run.name, run.summary, run.rows, run.documents) for run in runs]
    kinds = ("config.json", "summary.json", "metrics.csv", "held_out.csv", "samples.jsonl")
    return Scene([f"experiments/{runs[0].name}/{file}" for file in kinds], read, unsigned=kinds,
                 optional=("metrics.csv", "held_out.csv", "samples.jsonl"))


def task_scene(folder: Path) -> Scene:
    endings = ["a dog", "the tree", "and", "sat"]
    rows = [{"ctx": f"{number} the cat saw", "endings": endings, "label": number % 4} for number in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(folder: Path) -> object:
        task = open_task(folder / "rows.jsonl", "rows", 0)
        return task.questions, task.facts()
    return Scene(["rows.jsonl"], read, content=True)


# ------------------------------------------------------------------------------------------------
# The walk
# ------------------------------------------------------------------------------------------------

def outcome(read: Callable[[Path], object], folder: Path, capsys) -> tuple[str, object, str]:
    """"read" or "refused", what was read, and what was said of it."""
    capsys.readouterr()
    try:
        found = read(folder)
    except UserError as error:
        found = str(error)
    except OSError as error:        # as benchtop.command_line.command says it
        found = f"{error.strerror}: {error.filename}"
        assert error.strerror, error
    except SystemExit as end:
        found = end.code
        assert end.code not in (0, None)
    else:
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return "read", found, out + err
    assert isinstance(found, str) and len(found.splitlines()) == 1 and "Traceback" not in found, found
    return "refused", found, ""


def walk(make: Callable[[Path], Scene], folder: Path, capsys, monkeypatch) -> Counter:
    """Damage each file of a scene in each way; how often it ended in which way."""
    ends, wrong = Counter(), []
    whole = folder / "whole"
    whole.mkdir()
    redirect(monkeypatch, whole, whole)
    scene = make(whole)
    pristine = folder / "pristine"
    shutil.copytree(whole, pristine, symlinks=True)

    def reading(read: Callable[[Path], object], file: str = "", damage: Callable[[Path], None] | None = None,
                ) -> tuple[str, object, str]:
        """The outcome for what is whole but for this damage; at the same path, since answers name it."""
        shutil.rmtree(whole)
        shutil.copytree(pristine, whole, symlinks=True)
        if damage:
            damage(whole / file)
        return outcome(read, whole, capsys)
    kind, wanted, usual = reading(scene.read)
    assert kind == "read", wanted
    wanted_at_the_end = scene.go_on and reading(scene.go_on)[:2]
    for file in scene.files:
        raw = (pristine / file).read_bytes()
        changes = {name: change(raw) for name, change in (WRITTEN_OTHERWISE | DAMAGE).items()}
        cases = [(name, lambda path, raw=changed: path.write_bytes(raw))
                 for name, changed in changes.items() if changed != raw]
        cases += [(place.__name__, place) for place in PLACES]
        gone_on = 0
        for name, damage in cases:
            case = f"{file}: {name}"
            try:
                kind, found, said = reading(scene.read, file, damage)
                if scene.go_on and found == wanted and gone_on < TO_THE_END:
                    gone_on += 1
                    at_the_end = reading(scene.go_on, file, damage)[:2]
                    assert at_the_end == wanted_at_the_end, f"not {wanted_at_the_end}, but {at_the_end}"
            except Exception as error:
                wrong.append(f"{case}: {type(error).__name__}: {error}")
                continue
            if kind == "refused":
                ends["refused"] += 1
            elif found == wanted or (scene.content and name in WRITTEN_OTHERWISE and found[0] == wanted[0]):
                ends["right"] += 1
            elif any(Path(file).parent.name in line or file in line
                     for line in set(said.splitlines()) - set(usual.splitlines())):
                ends["said"] += 1
            elif scene.content and name not in WRITTEN_OTHERWISE and found[1] != wanted[1]:
                ends["other content, of another hash"] += 1
            elif (Path(file).name in scene.unsigned and "bit" in name) or (
                    Path(file).name in scene.optional and damage in PLACES):
                ends["not to be told"] += 1
            else:
                wrong.append(f"{case}: changed, and nothing was said: {str(found)[:300]}")
    assert not wrong, "\n".join(wrong)
    return ends


SCENES = {"text": (text_scene, 150), "shards with a manifest": (data_scene, 60),
          "bare shards": (bare_scene, 40), "an unfinished dataset": (unfinished_scene, 100),
          "a tokenizer": (tokenizer_scene, 40), "a task": (task_scene, 20),
          "a run that resumes": (resumed_scene, 60), "runs that are compared": (compared_scene, 80)}


@pytest.mark.parametrize("name", SCENES)
def test_what_is_damaged_is_read_right_or_refused(name, lab, tmp_path, capsys, monkeypatch):
    make, fewest = SCENES[name]

    def furnished(folder: Path) -> Scene:
        for kind in ("data", "tokenizers"):
            shutil.copytree(lab / kind, folder / kind)
        return make(folder)
    ends = walk(furnished, tmp_path, capsys, monkeypatch)
    print(f"{name}: {ends.total()} cases, {dict(ends)}")
    assert ends.total() >= fewest and ends["refused"]
