"""The folder .NAME.partial of a dataset that is being made: its lock, and what an interrupted run left.

    made_by.json          the settings that determine the content of all shards
    was_here.json         the units whose text was on this machine before
    val.json              how documents are held out, and the shards of held-out documents
    unit_000000/          progress.json and the shards of a unit

Nothing in it is trusted: a shard that differs from its entry is made again, with all later ones of its unit.
If something damaged cannot be made again, an error gives the command that deletes the folder.
"""

import contextlib
import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchtop import files, places
from benchtop.command_line import counted
from benchtop.errors import UserError, first_line

ENTRY = {"file": str, "split": str, "tokens": int, "documents": int, "bytes": int, "sha256": str}
# what reading a damaged file raises
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass
class Progress:
    """How much of a unit is in shards; stored in its folder, so that a later run resumes after the last one.

    done      whether all of the unit is in shards
    entries   the manifest entries of its shards; `read` counts the documents up to the end of the shard
    split, skipped  number and name of each document that was split or skipped
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
        """This progress as it was when it had at most `shards` shards."""
        if shards >= len(self.entries):
            return self
        cut = replace(self, entries=self.entries[:shards], done=False)
        return replace(cut, split=[item for item in self.split if item[0] < cut.documents],
                       skipped=[item for item in self.skipped if item[0] < cut.documents])


# ------------------------------------------------------------------------------------------------
# Lock and resume
# ------------------------------------------------------------------------------------------------

def partial_of(folder: Path) -> Path:
    """The folder in which a dataset is made."""
    return folder.with_name(f".{folder.name}.partial")


@contextlib.contextmanager
def hold(partial: Path, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Lock the folder of an unfinished dataset; afterwards it is removed if it is empty."""
    try:
        with files.locked(partial / "whole.lock", wait, shared):
            yield
    finally:
        with contextlib.suppress(OSError):
            partial.rmdir()


def empty(partial: Path) -> None:
    """Delete everything in the folder of an unfinished dataset except its locks."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.suffix != ".lock":
            path.unlink()


def take_up(partial: Path, facts: dict) -> None:
    """Resume an unfinished dataset in its folder, or begin one there.

    raises  UserError if another command, or an unknown one, left finished shards in it
    """
    shards = len([*partial.rglob("*.bin")])
    before = {}
    try:
        with damage_in(partial / "made_by.json") as made_by:
            before = dict(read_json(made_by).items()) if made_by.exists() else {}
    except UserError:
        if shards:
            raise
    if before == facts:     # also without a shard: another process may be writing the first one
        return
    if shards:
        raise UserError(f"{shown(partial)} has {counted(shards, 'finished shard')} of an interrupted command "
                        f"with a different {', '.join(differing_facts(before, facts))}; run that one again, "
                        f"choose another --name, or delete them with: {how_to_remove(partial)}")
    empty(partial)
    files.write_json(partial / "made_by.json", facts)


def differing_facts(before: dict, facts: dict) -> list[str]:
    """The settings that differ; if `source` differs, without those that follow from it."""
    differing = [key for key, value in facts.items() if before.get(key) != value]
    if "source" in differing:
        differing = [key for key in differing if key not in ("source_fingerprint", "revision")]
    return differing


# ------------------------------------------------------------------------------------------------
# What an interrupted run left
# ------------------------------------------------------------------------------------------------

def read_json(path: Path) -> dict | list:
    return json.loads(path.read_text(encoding="utf-8"))


def write_signed(path: Path, content: dict) -> None:
    """As files.write_json, with a SHA-256 of the content."""
    files.write_json(path, content | {"sha256": sha256_of(content)})


def read_signed(path: Path) -> dict:
    """What write_signed wrote; files of earlier versions have no SHA-256.

    raises  one of DAMAGE if it is not an object, or has changed
    """
    content = dict(read_json(path).items())
    if content.pop("sha256", sha := sha256_of(content)) != sha:
        raise ValueError("its SHA-256 does not match its content")
    return content


def sha256_of(content: dict) -> str:
    content = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_progress(path: Path, name: str) -> Progress:
    """The progress of the unit with this name, up to the first damaged shard, which a note reports."""
    if not path.exists():
        return Progress(name)
    try:
        progress = Progress(**read_signed(path))
        assert_kinds(ENTRY | {"read": int}, *progress.entries)
    except (OSError, *DAMAGE) as error:
        say(f"{shown(path)} is damaged ({first_line(error)}); the shards of this unit will be made again")
        return Progress(name)
    for number, entry in enumerate(progress.entries):
        if problem := problem_of(path.parent / entry["file"], entry):
            say(f"{shown(path.parent / entry['file'])} {problem}; it will be made again, with all later "
                "shards of its unit")
            return progress.cut_back(number)
    return progress


def read_held_out(path: Path) -> dict:
    """The content of val.json, also of an earlier version's, which has no test split.

    raises  UserError if val.json or one of its shards is damaged
    """
    with damage_in(path):
        facts = read_signed(path)
        if "entries" not in facts:
            facts["entries"] = [facts.pop("entry")]
        assert_kinds({"split": list, "skipped": list}, facts)
        assert_kinds(ENTRY, *facts["entries"])
        if [entry["split"] for entry in facts["entries"]] not in (["val"], ["val", "test"]):
            raise ValueError("it has no validation shard")
    for entry in facts["entries"]:
        if problem := problem_of(path.with_name(entry["file"]), entry):
            raise UserError(f"{shown(path.with_name(entry['file']))} {problem}; {advice(path.parent)}")
    return facts


def read_was_here(path: Path) -> set[str] | None:
    """The names in was_here.json; None, and a note is printed, if it is damaged."""
    with contextlib.suppress(*DAMAGE):
        names = read_json(path)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return set(names)
    say(f"{shown(path)} is damaged; text that is on this machine now will be kept")
    return None


def problem_of(path: Path, entry: dict) -> str:
    """What is wrong with a finished shard; empty if it is what was written."""
    try:
        return "" if files.sha256_of(path) == entry["sha256"] else "has changed since it was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def assert_kinds(kinds: dict[str, type], *objects: dict) -> None:
    """raises  one of DAMAGE if an object lacks a value or has one of another type"""
    for each in objects:
        for key, kind in kinds.items():
            if not isinstance(each[key], kind):
                raise ValueError(f"{key} is {each[key]!r}")


@contextlib.contextmanager
def damage_in(path: Path) -> Iterator[Path]:
    """raises  UserError if what is read from this file within the context is damaged"""
    try:
        yield path
    except (OSError, *DAMAGE) as error:
        raise UserError(f"{shown(path)} is damaged ({type(error).__name__}: {first_line(error)}); "
                        f"{advice(path.parent)}") from error


def advice(partial: Path) -> str:
    return f"delete the unfinished data with: {how_to_remove(partial)}"


def how_to_remove(path: Path) -> str:
    return f"rm -r {shlex.quote(str(path))}"


def shown(path: Path) -> Path:
    return path.relative_to(places.ROOT)


def say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)
