"""Token shards and their manifest: written once, verified whenever they are read.

    data/NAME/
        train_000001.bin ...   training documents; none is split across shards
        val_000000.bin         validation documents
        test_000000.bin        documents that only trial.py --confirm uses
        manifest.json          what the shards contain: source, tokenizer, counts, SHA-256 of each file

Shards have llm.c's format: 256 little-endian int32 (20240520, 1, number of tokens, zeros), then the tokens as
uint16; each document begins with <|endoftext|>. Vocabularies above 65,536 use llm.c's other variant
(20240801, 7, uint32 tokens). Shards of llm.c or Modded-NanoGPT can be read without a manifest, too.
"""

import hashlib
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from benchtop import files, places
from benchtop.command_line import counted
from benchtop.errors import UserError, first_line
from benchtop.places import FOLDER_NAME
from benchtop.sources import is_text, word_for
from benchtop.tokenizer import (
    find_tokenizer,
    how_to_make,
    known_tokenizers,
    load_tokenizer,
    source_of,
    tokenizer_sha256,
)

FORMAT_VERSION = 1
HEADER_INTS = 256
FEW_DOCUMENTS, FEW_TOKENS = 16, 20_000      # with fewer for validation, there is a warning


def shard_format(vocab_size: int) -> tuple[int, int, np.dtype]:
    """llm.c's magic number, version and token type for a vocabulary."""
    return (20240520, 1, np.dtype("<u2")) if vocab_size <= 65536 else (20240801, 7, np.dtype("<u4"))


# ------------------------------------------------------------------------------------------------
# Write
# ------------------------------------------------------------------------------------------------

class ShardWriter:
    """Writes documents to shards of at most `shard_size` tokens; a longer document gets its own shard."""

    def __init__(self, folder: Path, vocab_size: int, shard_size: int):
        self.folder, self.vocab_size, self.shard_size = folder, vocab_size, shard_size
        self._clear()

    def _clear(self) -> None:
        self.pending: list[np.ndarray] = []
        self.tokens = self.bytes = 0

    def has_room_for(self, tokens: np.ndarray) -> bool:
        return not self.pending or self.tokens + len(tokens) <= self.shard_size

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        self.pending.append(tokens)
        self.tokens += len(tokens)
        self.bytes += num_bytes

    def write(self, name: str, split: str) -> dict:
        """Write the collected documents as a shard; returns its manifest entry."""
        magic, version, dtype = shard_format(self.vocab_size)
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = magic, version, self.tokens
        content = header.tobytes() + np.concatenate(self.pending).astype(dtype, copy=False).tobytes()
        with files.whole_file(self.folder / name) as file:
            file.write(content)
        entry = {"file": name, "split": split, "tokens": self.tokens, "documents": len(self.pending),
                 "bytes": self.bytes, "sha256": hashlib.sha256(content).hexdigest()}
        self._clear()
        return entry


# ------------------------------------------------------------------------------------------------
# Read
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Dataset:
    """A folder of shards and its manifest, read and checked."""
    folder: Path
    manifest: dict

    @property
    def sha256(self) -> str:
        """The identity of the data, wherever they were made: the shards in order and their tokenizer.

        The test split does not count, since runs neither train nor validate on it. If the manifest lacks
        SHA-256 values, or there is no manifest, only the result of `verified` has this identity.
        """
        shards = [[shard["split"], shard["tokens"], shard["sha256"]] for shard in self.manifest["shards"]
                  if shard["split"] != "test"]
        return hashlib.sha256(json.dumps([self.manifest["tokenizer_sha256"], shards]).encode()).hexdigest()

    def verify(self, part: int = 0, num_parts: int = 1) -> dict[str, str]:
        """Read every num_parts-th shard from `part` on; raises UserError if one differs from the manifest.

        returns  the SHA-256 of each file that was read
        """
        found = {}
        for shard in self.manifest["shards"][part::num_parts]:
            path = self.folder / shard["file"]
            try:
                found[path.name] = self._verify_shard(path, shard)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from error
        return found

    def _verify_shard(self, path: Path, shard: dict) -> str:
        tokens, manifest = read_shard(path, shard["tokens"]), self.manifest
        sha256 = files.sha256_of(path)
        if shard["sha256"] not in ("", sha256):
            raise UserError(f"{path} has changed since it was written (its SHA-256 differs from the "
                            "manifest's); make the data again with download_fineweb.py")
        if len(tokens) and int(tokens.max()) >= manifest["vocab_size"]:
            raise UserError(f"{path} has token {int(tokens.max())}, but {manifest['tokenizer']} has only "
                            f"{manifest['vocab_size']}; name the tokenizer it was made with")
        if len(tokens) and not (tokens == manifest["eot_id"]).any():
            raise UserError(f"{path} has no <|endoftext|> (token {manifest['eot_id']} of "
                            f"{manifest['tokenizer']}); name the tokenizer it was made with")
        return sha256

    def verified(self, world) -> "Dataset":
        """This dataset with the SHA-256 of each shard, after all were verified against the manifest.

        Each machine has its own disk, so the processes of a machine divide its shards among them.
        raises  UserError on all processes at once
        """
        mine = world.raise_on_all_ranks(lambda: self.verify(world.local_rank, world.local_size))
        found = world.gather(mine)
        of_machine = found[world.rank - world.local_rank:][:world.local_size]
        sha256 = {name: value for hashes in (*found, *of_machine) for name, value in hashes.items()}
        twins = world.raise_on_all_ranks(lambda: self._twins(sha256))
        if twins and world.is_main:
            print(f"warning: {'; '.join(twins)}, so that text is used twice", file=sys.stderr)
        shards = [shard | {"sha256": sha256[shard["file"]]} for shard in self.manifest["shards"]]
        return Dataset(self.folder, self.manifest | {"shards": shards})

    def _twins(self, sha256: dict[str, str]) -> list[str]:
        """Among shards without a SHA-256 in the manifest, those that are copies of another or links to it.

        raises  UserError if one of them is for validation and the other for training
        """
        first, twins = {}, []
        for shard in self.manifest["shards"]:
            if shard["sha256"] or not shard["tokens"]:
                continue
            one = first.setdefault(sha256[shard["file"]], shard)
            if one is not shard:
                twins.append(f"{self.folder / shard['file']} has the same content as {one['file']}")
            if one["split"] != shard["split"]:
                raise UserError(f"{twins[-1]}, so the model would train on its validation "
                                "text; move one of them elsewhere")
        return twins

    def documents_by_source(self, split: str) -> dict[str, int]:
        """For a mixture, the number of documents of each source in "val" or "test", in stored order."""
        return {source["name"]: source[f"{split}_documents"] for source in self.manifest.get("sources", ())}

    def tokens(self, split: str) -> list[np.ndarray]:
        """The memory-mapped tokens of each shard of "train", "val" or "test"."""
        entries = [entry for entry in self.manifest["shards"] if entry["split"] == split]
        if not entries:
            raise UserError(f"{self.folder} has no {split} shard, a .bin with {split} in its name; make it "
                            "again with download_fineweb.py")
        return [read_shard(self.folder / entry["file"], entry["tokens"]) for entry in entries]


def few_held_out(manifest: dict) -> str:
    """A warning if too little is held out to tell models apart; empty if it is enough."""
    val = [shard for shard in manifest["shards"] if shard["split"] == "val"]
    return too_few(*(sum(shard[what] for shard in val) for what in ("documents", "tokens")))


def too_few(documents: int, tokens: int) -> str:
    """As few_held_out, from the numbers of documents and tokens for validation."""
    if (documents >= FEW_DOCUMENTS or not documents) and tokens >= FEW_TOKENS:    # 0: not counted
        return ""
    those = f"{counted(documents, 'document')} with " if documents else ""
    return (f"only {those}{tokens:,} tokens are held out; on fewer than {FEW_DOCUMENTS} documents or "
            f"{FEW_TOKENS:,} tokens, similar models cannot be told apart")


def open_dataset(data: str, tokenizer_name: str) -> tuple[Dataset, tiktoken.Encoding]:
    """The dataset and tokenizer with these names; an empty name means the only one that fits.

    raises  UserError with the command that makes what is missing, or if the two do not match
    """
    if tokenizer_name:
        tokenizer_name = find_tokenizer(tokenizer_name)
    folder = find_dataset(data, tokenizer_name)
    if os.path.lexists(folder / "manifest.json"):      # a broken link is not a missing manifest
        manifest = read_manifest(folder / "manifest.json")
        tokenizer = load_tokenizer(tokenizer_name or manifest["tokenizer"])
    elif tokenizer_name:
        tokenizer = load_tokenizer(tokenizer_name)
        manifest = manifest_of_bare_shards(folder, tokenizer)
    else:
        raise UserError(f"{folder} has no manifest and so no known tokenizer; name it with --tokenizer")
    made_for = manifest["tokenizer_sha256"], manifest["vocab_size"], manifest["eot_id"]
    if made_for != (tokenizer_sha256(tokenizer), tokenizer.n_vocab, tokenizer.eot_token):
        other = manifest["tokenizer"]
        advice = f"use --tokenizer {other}, or " * (other != tokenizer.name)
        raise UserError(f"data/{folder.name} was made with tokenizer {other}; the present {tokenizer.name} "
                        f"differs from it; {advice}make the shards again: {how_to_make_data(tokenizer.name)}")
    return Dataset(folder, manifest), tokenizer


def find_dataset(typed: str, tokenizer: str) -> Path:
    """The folder of a dataset typed as `mine` or data/mine/; if typed is empty, the tokenizer's only one."""
    if typed:
        name = places.name_in(places.DATA, typed)
        is_name = re.fullmatch(FOLDER_NAME, name)
        if is_name and (places.DATA / name).is_dir():
            return places.DATA / name
        if is_text(typed):
            new = name if is_name else word_for([typed])
            raise UserError(f"{typed} is text, not a folder in {places.DATA}; to make data from it: "
                            f"{how_to_make_data(tokenizer, typed)} --name {new}")
        if not is_name:
            raise UserError(f"--data must be the name of a folder in {places.DATA}; it is {typed!r}")
        there = {path.name: path.name for path in sorted(places.DATA.glob("[!.]*")) if path.is_dir()}
        raise UserError(f"there is no {name} in {places.DATA}{places.did_you_mean(name, there)} make "
                        f"{name}: {how_to_make_data(tokenizer)} --name {name}")
    made_with = {path.parent: read_manifest(path)["tokenizer"]
                 for path in sorted(places.DATA.glob("[!.]*/manifest.json"))}
    fitting = [folder for folder, name in made_with.items() if tokenizer in ("", name)]
    if len(fitting) > 1:
        raise UserError("several datasets fit; choose one with --data: "
                        f"{', '.join(path.name for path in fitting)}")
    if not fitting:
        raise UserError(f"no data{' of tokenizer ' + tokenizer if tokenizer else ''} in {places.DATA}; "
                        f"make some with: {how_to_make_data(tokenizer)}")
    return fitting[0]


def how_to_make_data(tokenizer: str, text: str = "") -> str:
    """The command that makes data from a text, or from the tokenizer's own; without a tokenizer, it uses an
    existing one or makes one first."""
    known = known_tokenizers()
    name = tokenizer or (known[0] if known else "mine")
    first = "" if tokenizer or known else f"{how_to_make(name, text)} && "
    source = shlex.quote(text) if text else source_of(name)
    return f"{first}python download_fineweb.py --source {source} --tokenizer {name}"


def read_manifest(path: Path) -> dict:
    """raises  UserError if the file is not a manifest of this format"""
    def expect(entry: dict, kinds: dict[str, type]) -> None:
        for key, kind in kinds.items():
            if not isinstance(entry[key], kind):
                raise ValueError(f"{key} is {entry[key]!r}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        expect(manifest, {"format_version": int, "tokenizer": str, "tokenizer_sha256": str, "vocab_size": int,
                          "eot_id": int, "shards": list})
        expect({"xz_bpb": 0.0, "xz_training_bytes": 0} | manifest,
               {"xz_bpb": float, "xz_training_bytes": int})
        if manifest["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {manifest['format_version']}, "
                             f"this program reads {FORMAT_VERSION}")
        for shard in manifest["shards"]:
            expect(shard, {"file": str, "split": str, "tokens": int, "documents": int, "bytes": int,
                           "sha256": str})
            if not re.fullmatch(FOLDER_NAME, shard["file"]):
                raise ValueError(f"file is {shard['file']!r}, which is not a plain file name")
        if "sources" in manifest:
            check_sources(manifest, expect)
        names = Counter(shard["file"] for shard in manifest["shards"])
        if twice := [name for name, times in names.items() if times > 1]:
            raise ValueError(f"{twice[0]} is listed more than once")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); "
                        "make the data again") from error


def check_sources(manifest: dict, expect: Callable[[dict, dict[str, type]], None]) -> None:
    """raises  ValueError if what a mixture's manifest says about its sources is inconsistent"""
    expect(manifest, {"sources": list})
    for split in ("val", "test"):
        key = f"{split}_documents"
        for source in manifest["sources"]:
            expect(source, {"name": str, key: int})
        counts = [source[key] for source in manifest["sources"]]
        there = sum(shard["documents"] for shard in manifest["shards"] if shard["split"] == split)
        if sum(counts) != there or min(counts, default=0) < 0:
            raise ValueError(f"{key} of the sources are {counts}, and the shards have {there}")


def manifest_of_bare_shards(folder: Path, tokenizer: tiktoken.Encoding) -> dict:
    """A manifest for llm.c or Modded-NanoGPT shards, *train*.bin and *val*.bin; nothing else is known.

    Shards are in the order of our own manifests, so that the same shards have the same identity with and
    without one. Files for test are left out, and so are hidden files, which some systems put beside others.
    """
    splits = {path: split_of(path) for path in sorted(folder.glob("[!.]*.bin"))}
    paths = sorted((path for path in splits if splits[path] != "test"),
                   key=lambda path: splits[path] == "train")
    shards = [{"file": path.name, "split": splits[path], "tokens": len(read_shard(path, None)),
               "documents": 0, "bytes": 0, "sha256": ""} for path in paths]
    if not shards:
        raise UserError(f"{folder} holds neither a manifest nor .bin shards; "
                        "make it again with download_fineweb.py")
    return {"format_version": FORMAT_VERSION, "source": folder.name, "tokenizer": tokenizer.name,
            "tokenizer_sha256": tokenizer_sha256(tokenizer), "vocab_size": tokenizer.n_vocab,
            "eot_id": tokenizer.eot_token, "shards": shards}


def split_of(path: Path) -> str:
    """What a shard without a manifest is for: train, val or test, whichever is last in its name.

    raises  UserError if its name has none of them
    """
    words = re.findall(r"(?<![a-z])(train|val|test)", path.stem.lower())
    if not words:
        raise UserError(f"{path} has neither train, val nor test in its name, and no manifest says what it "
                        "is for; rename it, or move it elsewhere")
    return words[-1]


def read_shard(path: Path, expected_tokens: int | None) -> np.ndarray:
    """The memory-mapped tokens of a shard; its header, its size and the manifest must agree."""
    if not path.is_file():
        what = "is not a file" if os.path.lexists(path) else "is missing"
        raise UserError(f"{path} {what}; make the data again with download_fineweb.py")
    header = np.fromfile(path, dtype="<i4", count=3).tolist()
    known = {tuple(shard[:2]): shard[2] for shard in (shard_format(0), shard_format(2**17))}
    dtype = known.get(tuple(header[:2]))
    if len(header) < 3 or dtype is None:
        raise UserError(f"{path} does not have the header of a token shard; "
                        "make the data again with download_fineweb.py")
    tokens, size = header[2], path.stat().st_size
    if (tokens < 0 or size != 4 * HEADER_INTS + tokens * dtype.itemsize
            or expected_tokens not in (None, tokens)):
        raise UserError(f"{path} is cut off or changed: it has {size:,} bytes, its header says {tokens:,} "
                        f"tokens and the manifest {expected_tokens}; "
                        "make the data again with download_fineweb.py")
    return np.memmap(path, dtype=dtype, mode="r", offset=4 * HEADER_INTS, shape=(tokens,))
