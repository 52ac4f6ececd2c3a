"""Download GPT-2 token shards that others have published on the Hugging Face Hub; they are kept unchanged."""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from benchtop import files, hub
from benchtop.command_line import counted
from benchtop.errors import UserError
from benchtop.prepare import (
    data_folder,
    describe,
    manifest_of_whole,
    new_whole,
    publish,
    refuse_differing,
)
from benchtop.shards import FORMAT_VERSION, read_shard
from benchtop.tokenizer import load_tokenizer, token_bytes, tokenizer_sha256
from benchtop.unfinished import differing_facts, empty, hold, partial_of, take_up


def fetch_ready_made(version: str, args: argparse.Namespace) -> None:
    """Download GPT-2 token shards from the Hub, and write the manifest that they lack."""
    tokenizer = load_tokenizer("gpt2")
    folder = data_folder(args.name or version)
    shards = hub.list_files(hub.READY_MADE[version], "", ".bin")
    val = [file for file in shards if "_val_" in file.path][:1]
    train = [file for file in shards if "_train_" in file.path]
    train = train[:args.num_shards or len(train)]
    if not val or not train:
        raise UserError(f"{hub.READY_MADE[version]} has no training shards or no validation shards")
    if args.dry_run:
        size = sum(file.size for file in val + train)
        print(f"{counted(len(val + train), 'file')}, {size / 1e6:,.1f} MB to download and on disk, about "
              f"{(size - 1024 * len(val + train)) / 2e6:,.1f} million tokens")
        return
    facts = {"source": hub.READY_MADE[version], "revision": val[0].revision, "tokenizer": tokenizer.name}
    partial = partial_of(folder)
    with hold(partial):
        refuse_another(folder, facts, len(train))
        take_up(partial, facts)
        entries = []
        for number, file in enumerate(tqdm(val + train, unit=" shards", disable=not sys.stderr.isatty(),
                                           leave=False)):
            name = f"{'train' if number else 'val'}_{number:06d}.bin"
            finished = next((path for path in (folder / name, partial / name)
                             if path.is_file() and not hub.problem_of(path, file)), None)
            if finished:
                files.link(finished, partial / name)
            else:
                bring(file, partial / name, args.keep_text)
            entries.append(entry_of(partial / name, "train" if number else "val", tokenizer))
        whole = new_whole(folder)
        for entry in entries:
            files.link(partial / entry["file"], whole / entry["file"])
        manifest = {"format_version": FORMAT_VERSION, **facts,
                    "tokenizer_sha256": tokenizer_sha256(tokenizer), "vocab_size": tokenizer.n_vocab,
                    "eot_id": tokenizer.eot_token, "shards": entries}
        publish(whole, folder, manifest)
        empty(partial)
    print(f"wrote {describe(folder, manifest)}")


def refuse_another(folder: Path, facts: dict, num_train: int) -> None:
    """raises  UserError if the folder exists and its shards are different, damaged or more than num_train"""
    if not folder.exists():
        return
    manifest = manifest_of_whole(folder)
    differing = differing_facts(manifest, facts)
    if num_train < sum(shard["split"] == "train" for shard in manifest["shards"]):
        differing.append("num_shards")
    if differing:
        refuse_differing(folder, differing)


def bring(file: hub.HubFile, path: Path, keep: bool) -> None:
    """Copy a file from the Hub to `path`; unless `keep`, leave it cached only if it was before."""
    keep = keep or hub.in_cache(file)
    copy = hub.fetch(file)
    with open(copy, "rb") as source, files.whole_file(path) as shard:
        shutil.copyfileobj(source, shard)
    if not keep:
        hub.forget(copy)


def entry_of(path: Path, split: str, tokenizer: tiktoken.Encoding) -> dict:
    """The manifest entry of a shard; raises UserError if it has tokens that are not in the vocabulary."""
    tokens = read_shard(path, None)
    lengths = np.array([len(token) for token in token_bytes(tokenizer)])
    if len(tokens) and int(tokens.max()) >= tokenizer.n_vocab:
        raise UserError(f"{path.name} has token {int(tokens.max())}, which tokenizer {tokenizer.name} lacks")
    counts = np.bincount(tokens, minlength=tokenizer.n_vocab)
    return {"file": path.name, "split": split, "tokens": len(tokens),
            "documents": int(counts[tokenizer.eot_token]), "bytes": int(counts @ lengths),
            "sha256": files.sha256_of(path)}
