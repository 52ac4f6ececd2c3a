"""Learn an exact byte-level BPE tokenizer from text.

    python train_tokenizer.py                                   # 50,256 tokens from Python's standard library
    python train_tokenizer.py --vocabsize 8192 --source 'books/*.parquet' --name books
    python train_tokenizer.py --samples 1e5 --vocabsize 1000 --name readmetokenizer --demo

The text is split into pieces (words with their space, numbers, runs of punctuation), and each piece into its
bytes. Then the most frequent pair of adjacent tokens is merged into a new token, until the vocabulary is
full. benchtop/bpe.py has the rules that make the result exact. Held-out documents (benchtop/held_out.py) are
not used.

It writes the folder tokenizers/NAME, complete or not at all:

    ranks.tiktoken       one token a line: base64 of its bytes, space, id
    meta.json            pattern, special tokens, sizes, what it was trained on, SHA-256 of the ranks
    tokenizer.json       the same tokenizer for Hugging Face tokenizers
    merges.txt           the merges in the order they were learned, human-readable
    train_tokenizer.txt  the source that made it: this script and benchtop/bpe.py
"""

import argparse
import importlib
import json
import os
import shlex
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import tiktoken
from tqdm import tqdm

from benchtop import bpe, files, host, places, processes
from benchtop.bpe import MIN_COUNT, MOST_SAMPLES, MOST_TOKENS, Forecast, Sample
from benchtop.command_line import Parser, command, counted, positive
from benchtop.errors import UserError, exit_quietly_on_other_ranks
from benchtop.gpus import ACCELERATORS
from benchtop.held_out import rule_for
from benchtop.processes import Processes
from benchtop.sources import open_source
from benchtop.tokenizer import (
    DEMO_TEXT,
    END_OF_TEXT,
    PATTERNS,
    convert,
    encoding_of,
    load_tokenizer,
    name_for_new,
    save_tokenizer,
    statistics_of,
    visible,
)


def parse_arguments() -> argparse.Namespace:
    cores = processes.own_cores()
    parser = Parser("Learn a byte-level BPE tokenizer.")
    parser.add_argument("-n", "--samples", type=positive,
                        help=f"characters of text to learn from (default: {MOST_SAMPLES}, or the smaller "
                             "power of two that memory allows)")
    parser.add_argument("-v", "--vocabsize", type=positive, default=50256,
                        help="tokens, including the 256 bytes, without <|endoftext|>")
    parser.add_argument("-f", "--name",
                        help="folder in tokenizers/ (default: gpt4regex_v50256_n1073741824, with the numbers "
                             "of --vocabsize and --samples)")
    parser.add_argument("--regex", choices=PATTERNS, default="gpt4",
                        help="how text is split into pieces; nanochat: as gpt4, but two digits at a time")
    parser.add_argument("--source", nargs="+", default=["stdlib"],
                        help="stdlib, FineWeb (10B, 10Bedu, ...), climbmix, or files, folders and globs")
    parser.add_argument("--demo", action="store_true", help="show a text in coloured tokens while learning")
    parser.add_argument("--num_workers", type=positive, default=cores, help="processes that split and count")
    parser.add_argument("--device", choices=("auto", "cpu", *ACCELERATORS), default="cpu",
                        help="device for the merging; not yet measured on a GPU")
    parser.add_argument("--convert", metavar="FILE.pkl", type=Path,
                        help="convert a pickled gpt-lab tokenizer to a folder, and learn nothing")
    return parser.parse_args()


@command
def main() -> None:
    args = parse_arguments()
    try:
        if not args.convert:
            train(args)
        elif processes.is_first_process():
            folder = convert(args.convert, args.name)
            print(f"wrote {folder.relative_to(places.ROOT)}: {load_tokenizer(folder.name).n_vocab:,} tokens")
    except UserError:
        exit_quietly_on_other_ranks()
        raise


def train(args: argparse.Namespace) -> None:
    """Learn a tokenizer, alone or with the other processes of torchrun, and write its folder."""
    if not 256 <= args.vocabsize <= MOST_TOKENS:
        raise UserError("--vocabsize must be at least 256, since every byte is a token, and at most "
                        f"{MOST_TOKENS:,}; it is {args.vocabsize}")
    if args.device != "cpu":    # torch takes seconds to import and is not needed on a CPU
        args.device = importlib.import_module("benchtop.machine").choose_device(args, 0, 1).type
    world = Processes()
    world.connect(backend="gloo")
    train_together(args, world)
    world.barrier()         # not in a finally: after an error it could wait forever
    world.close()


def train_together(args: argparse.Namespace, world: Processes) -> None:
    """Count pieces on all processes; learn, save and print on the first one only."""
    pattern, source = PATTERNS[args.regex], open_source(args.source)
    rule = rule_for(source)
    growth = bpe.forecast(source, rule, pattern)
    samples = world.same(args.samples or bpe.samples_that_fit(growth, args.num_workers, world.size))
    name = name_for_new(args.name or f"{args.regex}regex_v{args.vocabsize}_n{samples}")
    settings = {"regex": args.regex, "vocabsize": args.vocabsize, "samples": samples,
                "min_count": MIN_COUNT, "source": source.label}
    if world.same(settings) != settings:
        raise UserError("the machines have different sources or flags; make them the same on all")
    if world.same(os.path.lexists(places.TOKENIZERS / name)):
        if world.is_main:
            report_existing(name, settings, args)
        return
    sample = Sample(source, rule, samples)
    if not world.is_main:
        bpe.count_sample(sample, pattern, args.num_workers, world)
        return
    say_what_it_takes(growth, samples, args, world)
    with files.locked(places.TOKENIZERS / f".{name}.lock"):
        pieces, sizes = bpe.count_sample(sample, pattern, args.num_workers, world)
        if words := source.replaced_in_words():
            print(words)
        if not rule:
            print("note: too little text to hold some out; the tokenizer learns from all of it")
        facts = settings | {"source_fingerprint": source.fingerprint} | sizes
        facts["held_out"] = rule.facts() if rule else None
        learn_and_save(name, pieces, pattern, facts, sample.held_out, args)


def say_what_it_takes(growth: Forecast, samples: int, args: argparse.Namespace, world: Processes) -> None:
    needs = growth.memory_mib(samples, args.num_workers, world.size)
    free = host.free_memory_mib()
    print(f"learning from at most {samples:,} characters will take about {needs:,.0f} MiB of memory, if the "
          f"rest of the text is like its beginning; {free:,.0f} MiB are free", flush=True)
    if needs > free:
        print("note: that is more than is free; lower --samples or --num_workers")
    elif not args.samples and samples < MOST_SAMPLES:
        print(f"note: too little memory is free for {MOST_SAMPLES:,} characters, so --samples is {samples:,}")


def learn_and_save(name: str, pieces: Counter[bytes], pattern: str, facts: dict, held_out: list[str],
                   args: argparse.Namespace) -> None:
    """Learn merges from the counted pieces, check and measure the tokenizer, and write its folder."""
    print(f"counted {facts['unique_pieces']:,} distinct pieces in {counted(facts['documents'], 'document')}, "
          f"{facts['characters']:,} characters")
    some_pieces = list(islice(pieces, 20_000))
    merges = learn(pieces, args.vocabsize - 256, pattern, args.demo, args.device)
    if len(merges) < args.vocabsize - 256:
        print(f"note: no other pair of tokens occurs {MIN_COUNT} times or more; the vocabulary ends at "
              f"{256 + len(merges):,} tokens instead of {args.vocabsize:,}")
    tokens = bpe.tokens_of(merges)
    encoding = encoding_of(name, pattern, tokens)
    for piece in some_pieces:
        if encoding.decode_bytes(encoding.encode_ordinary(piece.decode())) != piece:
            raise RuntimeError(f"the tokenizer does not restore {piece!r}")
    statistics = statistics_of(tokens, pattern, held_out)
    folder = save_tokenizer(name, merges, tokens, pattern, facts | {"statistics": statistics},
                            own_source())
    print(f"wrote {folder.relative_to(places.ROOT)}: {len(tokens) + 1:,} tokens "
          f"with {END_OF_TEXT} as {len(tokens)}{in_words(statistics)}")


def learn(pieces: Counter[bytes], num_merges: int, pattern: str, demo: bool, device: str = "cpu",
          ) -> list[tuple[int, int, int]]:
    """Learn merges, with a progress bar or the demo; pieces are sorted, so their order has no influence."""
    as_sorted = dict(sorted(pieces.items()))
    pieces.clear()      # the merging needs the memory
    where = None if device == "cpu" else device
    if demo:
        display = Demo(pattern)
        merges = bpe.learn_merges(as_sorted, num_merges, on_merge=display.on_merge, device=where)
        display.show(f"After all {len(merges):,} merges")
        return merges
    with tqdm(total=num_merges, unit=" merges", disable=not sys.stderr.isatty(), leave=False) as bar:
        return bpe.learn_merges(as_sorted, num_merges, on_merge=lambda left, right, count: bar.update(),
                            device=where)


def own_source() -> str:
    """The source that makes a tokenizer, for its folder: this script and benchtop/bpe.py."""
    made_by = {"train_tokenizer.py": Path(__file__), "benchtop/bpe.py": Path(bpe.__file__)}
    return "\n\n".join(f"# ---- {name}\n{path.read_text(encoding='utf-8')}" for name, path in made_by.items())


def in_words(statistics: dict) -> str:
    if "bytes_per_token" not in statistics:
        return ""
    gpt2 = statistics["gpt2_bytes_per_token"]
    return (f"; on held-out text {statistics['bytes_per_token']:.3f} bytes per token"
            + (f" (GPT-2's: {gpt2:.3f})" if gpt2 else "")
            + f", {statistics['share_of_tokens_used']:.0%} of the tokens used")


def report_existing(name: str, settings: dict, args: argparse.Namespace) -> None:
    """Print that an existing tokenizer is reused; raises UserError if it was made from something else."""
    remove = f"choose another --name or remove it with: rm -r {shlex.quote(str(places.TOKENIZERS / name))}"
    if not (places.TOKENIZERS / name / "meta.json").is_file():
        raise UserError(f"tokenizers/{name} exists but is not a tokenizer; {remove}")
    tokenizer = load_tokenizer(name)
    meta = json.loads((places.TOKENIZERS / name / "meta.json").read_text(encoding="utf-8"))
    differing = [key for key, value in settings.items() if meta.get(key) != value]
    if not args.samples and "samples" in differing:
        differing.remove("samples")     # the default depends on free memory at that time
    if differing:
        raise UserError(f"tokenizers/{name} exists and was made with a different {', '.join(differing)}; "
                        f"{remove}")
    print(f"reusing tokenizers/{name}, which was made from the same source with the same settings")
    if args.demo:
        print(coloured(tokenizer, tokenizer.encode_ordinary(DEMO_TEXT)))


# ------------------------------------------------------------------------------------------------
# The demo
# ------------------------------------------------------------------------------------------------

class Demo:
    """Shows a text in coloured tokens after 0, 1, 10, 100 and every 1,000 merges."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.show("Before any merge, every byte is a token")

    def on_merge(self, left: int, right: int, count: int) -> None:
        self.tokens.append(self.tokens[left] + self.tokens[right])
        made = len(self.tokens) - 256
        if made in (1, 10, 100) or made % 1000 == 0:
            self.show(f"Merge {made:,}: {visible(self.tokens[left])} + {visible(self.tokens[right])} "
                      f"occurred {count:,} times and became token {len(self.tokens) - 1:,}")

    def show(self, title: str) -> None:
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        encoding = tiktoken.Encoding("demo", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})
        ids = encoding.encode_ordinary(DEMO_TEXT)
        print(f"\n{title}. {len(DEMO_TEXT.encode())} bytes in {len(ids)} tokens:\n{coloured(encoding, ids)}")


def coloured(encoding: tiktoken.Encoding, ids: list[int]) -> str:
    """The text with a background colour per token; one that ends inside a character joins the next."""
    pieces, pending = [], b""
    for place, rank in enumerate(ids):
        pending += encoding.decode_single_token_bytes(rank)
        try:
            text = pending.decode()
        except UnicodeDecodeError:
            continue
        pending = b""
        background = f"\033[{41 + place % 6};30m"
        pieces.append(background + text.replace("\n", f"\033[0m\n{background}") + "\033[0m")
    return "".join(pieces)


if __name__ == "__main__":
    main()
