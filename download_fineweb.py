"""Turn documents into token shards that train_gpt.py reads.

    python download_fineweb.py --source 10B --num_shards 10 --tokenizer mine
    python download_fineweb.py --source 10B-gpt2 --num_shards 10           # ready-made, GPT-2's tokenizer
    python download_fineweb.py --source 'books/*.parquet' --tokenizer books
    python download_fineweb.py --source notes.txt --tokenizer mine -ns 1 -ss 1e5
    python download_fineweb.py --source books/=0.7 stdlib=0.3 --tokenizer mine

It writes the folder data/SOURCE_TOKENIZER (contents: benchtop/shards.py), complete or not at all. --seed
sets the order of the documents, over all files of a corpus. About one document in 64 is held out for
validation, and as many for the test split, by a hash of the text: the same ones for every tokenizer, seed and
number of shards. Small sources hold out more, up to 64 documents or 5 % of the text per split; climbmix holds
out its last file and nothing else (benchtop/held_out.py). Sources with shares are mixed by tokens
(benchtop/mixing.py). The last line reports the bits per byte of xz -9e on the held-out text, compressed after
training text; a model should beat it. The next file downloads while workers tokenize the current one.

If interrupted, run the same command again: it resumes after the last complete shard and produces identical
files, with any number of workers. A larger --num_shards adds shards and keeps the old ones. Python's library
(12 MB) becomes 3.5 million tokens (vocabulary 4,096) in about 5 seconds on two cores; xz takes about 15.
"""

import argparse
import os
import re
import shutil
import time
from pathlib import Path

import tiktoken

from benchtop import hub, places
from benchtop.command_line import Parser, command, counted, positive
from benchtop.documents import Source
from benchtop.errors import UserError
from benchtop.held_out import BYTES_PER_TOKEN, Rule
from benchtop.mixing import Mixing, mixed_in_words
from benchtop.prepare import (
    Preparation,
    data_folder,
    describe,
    grows,
    prepare_part,
    rule_or_complaint,
    wait_for_parts,
)
from benchtop.processes import is_first_process, own_cores, places_by_torchrun
from benchtop.ready_made import fetch_ready_made
from benchtop.shards import few_held_out, shard_format
from benchtop.sources import Mixture, open_mixture
from benchtop.tokenizer import load_tokenizer, may_have_seen, only_tokenizer, tokenizer_sha256

TOKENS_PER_PARQUET_BYTE = 0.34      # in FineWeb with GPT-2's tokenizer; only for the estimate of --dry_run


SHARD_SIZE, VAL_TOKENS = 10**8, 10_485_760      # defaults


def part_of(text: str) -> tuple[int, int]:
    """argparse type of --part: 2/3, the second of three parts, becomes (1, 3)."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be like 1/3, 2/3 or 3/3, not {text!r}")
    return int(match[1]) - 1, int(match[2])


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Turn documents into token shards.")
    parser.add_argument("--source", nargs="+", default=["stdlib"],
                        help="stdlib; FineWeb: 10B 100B 350B full, and with `edu` appended; climbmix; "
                             "ready-made GPT-2 shards: 10B-gpt2 100B-gpt2 10Bedu-gpt2; or files, folders and "
                             "globs (.txt .md .py .jsonl .parquet, plain, .gz or .zst); with shares, as "
                             "in a/=0.7 b/=0.3, a mixture by tokens")
    parser.add_argument("-ss", "--shard_size", type=positive, default=SHARD_SIZE,
                        help="tokens in a shard, at most")
    parser.add_argument("-ns", "--num_shards", type=lambda text: positive(text, least=0), default=0,
                        help="training shards to make; 0: all text; a larger number extends the dataset")
    parser.add_argument("-t", "--tokenizer",
                        help="a folder in tokenizers/, or gpt2 (default: the only one, if there is just one)")
    parser.add_argument("--val_tokens", type=positive, default=VAL_TOKENS,
                        help=f"most text in each held-out split, in tokens of {BYTES_PER_TOKEN} bytes")
    parser.add_argument("--seed", type=int, default=0, help="decides the order of the documents")
    parser.add_argument("--name", help="folder in data/ (default: SOURCE_TOKENIZER)")
    parser.add_argument("--num_workers", type=positive, default=own_cores(),
                        help="processes that tokenize")
    parser.add_argument("--part", type=part_of, metavar="I/N",
                        help="prepare only the I-th of N parts of a corpus's files, for many machines")
    parser.add_argument("--keep_text", action="store_true", help="keep downloaded parquet files")
    parser.add_argument("--dry_run", action="store_true",
                        help="only print the files, download size, disk space and time that it takes")
    return parser.parse_args()


def refuse_for_ready_made(args: argparse.Namespace) -> None:
    """raises  UserError if a flag says how to make the shards, which are downloaded as they are"""
    flags = {"a further --source": len(args.source) > 1, "--part": args.part, "--seed": args.seed != 0,
             "--tokenizer": args.tokenizer not in (None, "gpt2"),
             "--shard_size": args.shard_size != SHARD_SIZE, "--val_tokens": args.val_tokens != VAL_TOKENS}
    wrong = ", ".join(flag for flag, is_set in flags.items() if is_set)
    if wrong:
        raise UserError(f"{args.source[0]} has shards of GPT-2's tokens already; leave out {wrong}")


@command
def main() -> None:
    args = parse_arguments()
    if args.shard_size >= 2**31:
        raise UserError("--shard_size must be below 2^31, since a shard's header counts its tokens in int32; "
                        f"it is {args.shard_size}")
    if args.source[0] in hub.READY_MADE and not os.path.exists(args.source[0]):
        refuse_for_ready_made(args)
        if is_first_process():
            fetch_ready_made(args.source[0], args)
        return
    part, parts = args.part or places_by_torchrun()[:2]
    source = open_mixture(args.source)
    tokenizer = load_tokenizer(args.tokenizer or only_tokenizer())
    folder = data_folder(args.name or f"{source.label}_{tokenizer.name}")
    if args.dry_run:
        say_what_it_takes(source, tokenizer, args)
        return
    facts = {"source": source.label, "revision": getattr(source, "revision", ""),
             "source_fingerprint": source.fingerprint, "tokenizer": tokenizer.name,
             "tokenizer_sha256": tokenizer_sha256(tokenizer), "seed": args.seed,
             "shard_size": args.shard_size, "val_tokens": args.val_tokens}
    units = [] if isinstance(source, Mixture) else source.units(args.seed)
    most_parts = max(1, len(units))     # a mixture has one
    if args.part and part >= most_parts:
        print(f"nothing to do for part {part + 1} of {parts}: {source.label} has "
              f"{counted(most_parts, 'part')}")
        return
    if isinstance(source, Mixture):
        if part == 0:
            mix(folder, source, tokenizer, facts, args)
        return
    preparation = Preparation(folder, units, tokenizer, facts, args)
    is_there = folder.exists()
    if is_there and args.part:
        print(f"data/{folder.name} already exists; to add shards to it, leave out --part")
        return
    # only the first process prepares a single unit, or adds shards to a dataset
    parts = 1 if is_there else min(parts, len(units))
    if part >= parts or (is_there and not grows(folder, facts, args.num_shards)):
        return
    if parts > 1:
        prepare_part(preparation, rule_or_complaint(source), part, parts)
        if args.part or part:
            return
        wait_for_parts(preparation, parts)
    with preparation.held(wait=parts > 1):
        held_out = preparation.held_out(source)
        rule = Rule.of_facts(held_out)
        preparation.units = rule.documents(source).units(args.seed) if rule.part else units
        all_progress = preparation.write_units(range(len(units)), rule, args.num_shards)
        manifest = preparation.finish(all_progress, held_out)
    say_what_came_out(folder, source, manifest)


def mix(folder: Path, source: Mixture, tokenizer: tiktoken.Encoding, facts: dict, args: argparse.Namespace,
        ) -> None:
    """Make or extend the dataset of a mixture, in one process."""
    if folder.exists() and not grows(folder, facts, args.num_shards):
        return
    mixing = Mixing(folder, source, tokenizer, facts, args)
    with mixing.held():
        manifest = mixing.make()
    say_what_came_out(folder, source, manifest)


def say_what_came_out(folder: Path, source: Source | Mixture, manifest: dict) -> None:
    """Print notes about a finished dataset and, last, its folder and contents."""
    if words := source.replaced_in_words():
        print(words)
    for trouble, why in (("split", "too long or odd to encode whole"),
                         ("skipped", "that tiktoken cannot encode")):
        count, first = manifest[trouble]["count"], manifest[trouble]["first"]
        if count:
            print(f"{trouble} {counted(count, 'document')} {why}: {', '.join(first[:5])}"
                  + (" ..." if count > 5 else ""))
    if isinstance(source, Mixture):
        print("\n".join(mixed_in_words(manifest)))
    for note in filter(None, (few_held_out(manifest), may_have_seen(manifest))):
        print(f"note: {note}")
    print(f"wrote {describe(folder, manifest)}")


def say_what_it_takes(source: Source, tokenizer: tiktoken.Encoding, args: argparse.Namespace) -> None:
    """Print what the work needs: exact where the Hub reports it, otherwise marked as an estimate."""
    began, text = time.perf_counter(), "The quick brown fox jumps over the lazy dog, 1234 times. " * 20_000
    tokens_of_text = len(tokenizer.encode_ordinary(text))
    rate = tokens_of_text / (time.perf_counter() - began) * args.num_workers
    units = [] if isinstance(source, Mixture) else [
        unit for unit in source.units(args.seed) if unit.size]
    if not units:
        raise UserError("--dry_run is for one source on the Hub; local text needs no download: leave it out")
    size = sum(unit.size for unit in units)
    per_byte = source.corpus.tokens / size or TOKENS_PER_PARQUET_BYTE
    tokens = size * per_byte
    if args.num_shards:
        tokens = min(tokens, args.num_shards * args.shard_size)
    needed, expected = [], 0.0
    for unit in units:
        if expected < tokens:
            needed.append(unit)
            expected += unit.size * per_byte
    for unit in needed:
        print(f"{unit.name:<60} {unit.size / 1e6:>10,.1f} MB")
    download = sum(unit.size for unit in needed)
    largest = sorted((unit.size for unit in needed), reverse=True)[:2]
    text = download if args.keep_text else sum(largest)
    disk = tokens * shard_format(tokenizer.n_vocab)[2].itemsize + text
    print(f"files       {len(needed):,} of {len(units):,} of {source.label}, plus the one with held-out "
          "documents if it is not among them")
    print(f"download    {download / 1e6:,.1f} MB")
    print(f"tokens      about {tokens / 1e6:,.1f} million, at {per_byte:.2g} per byte of parquet")
    free = shutil.disk_usage(places.ROOT).free
    print(f"disk        about {disk / 1e6:,.1f} MB; {free / 1e6:,.0f} MB are free")
    print(f"time        about {tokens / rate / 60:,.1f} minutes to tokenize, at {rate:,.0f} tokens/s as just "
          f"measured on plain words with {args.num_workers} workers; meanwhile, the download takes "
          f"{download / 50e6 / 60:,.1f} minutes at 50 MB/s")


if __name__ == "__main__":
    main()
