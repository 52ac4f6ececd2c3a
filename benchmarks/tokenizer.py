"""Time the learning of a tokenizer against rustbpe and Hugging Face tokenizers, and measure its memory.

    python benchmarks/tokenizer.py --source 'books/*.parquet'             # seconds and ratios
    python benchmarks/tokenizer.py --source 'books/*.parquet' --memory    # MiB by the amount of text

Each trial runs in its own process. The three learners take turns, on the same documents from the same reader.
A time runs from reading the documents to the last merge, without imports and saving. Memory is the peak of
the summed proportional set sizes (PSS) of the process and its workers, sampled every 200 milliseconds.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_tokenizer
from benchtop import bpe, host
from benchtop.command_line import Parser, command
from benchtop.documents import Document, Source
from benchtop.held_out import Rule, rule_for
from benchtop.processes import Processes
from benchtop.sources import open_source
from benchtop.tokenizer import PATTERNS

PATTERN = PATTERNS["gpt4"]
LEARNERS = ("benchtop", "rustbpe", "tokenizers")


class Noisy:
    """A source repeated up to a number of characters; repetitions have the letters of some words shuffled."""

    def __init__(self, source: Source, characters: int, one_in: int):
        self.source, self.characters, self.one_in = source, characters, one_in
        self.label, self.replaced = source.label, 0

    def __iter__(self) -> Iterator[Document]:
        rng = random.Random(0)
        left, first_time = self.characters, True
        while left > 0:
            for name, text in self.source:
                if not first_time:
                    words = text.split(" ")
                    for place in range(rng.randrange(self.one_in), len(words), self.one_in):
                        words[place] = "".join(rng.sample(words[place], len(words[place])))
                    text = " ".join(words)
                yield name, text
                left -= len(text)
                if left <= 0:
                    return
            first_time = False


def trial(args: argparse.Namespace) -> dict:
    """Learn once, in this process; returns seconds in total and, for Benchtop, of the merging alone."""
    vocabsize = args.vocabsize[0]
    if args.trial == "rustbpe":
        import rustbpe
    if args.trial == "tokenizers":
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401
    source = open_source(args.source)
    rule = rule_for(source)
    if args.characters:
        source, rule = Noisy(source, args.characters, args.one_in), Rule()
    sample = bpe.Sample(source, rule, args.characters or 10**12)
    began = time.perf_counter()
    if args.trial == "benchtop":
        alone = Processes()
        pieces, facts = bpe.count_sample(sample, PATTERN, args.num_workers, alone)
        counted = time.perf_counter()
        merges = train_tokenizer.learn(pieces, vocabsize - 256, PATTERN, demo=False)
        ended = time.perf_counter()
        growth = bpe.forecast(source, rule, PATTERN)
        return {"seconds": ended - began, "merging": ended - counted, "merges": len(merges),
                "unique_pieces": facts["unique_pieces"],
                "forecast": growth.memory_mib(facts["characters"], args.num_workers, 1)}
    texts = (text for _, text in sample)
    if args.trial == "rustbpe":
        learner = rustbpe.Tokenizer()
        learner.train_from_iterator(texts, vocabsize, pattern=PATTERN)
        count = len(learner.get_mergeable_ranks()) - 256
    else:
        learner = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        learner.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        learner.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocabsize, show_progress=False, min_frequency=bpe.MIN_COUNT,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        count = learner.get_vocab_size() - 256
    return {"seconds": time.perf_counter() - began, "merges": count}


def measured(args: argparse.Namespace, learner: str, vocabsize: int, characters: int = 0) -> dict:
    """Run a trial in its own process, and measure the peak memory of that process and its workers."""
    program = [sys.executable, __file__, "--trial", learner, "--vocabsize", str(vocabsize),
               "--source", *args.source, "--num_workers", str(args.num_workers),
               "--characters", str(characters), "--one_in", str(args.one_in)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    peak = [0.0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], sum(map(pss_mib, family(process.pid))))
            time.sleep(0.2)
    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(f"{learner} failed")
    return json.loads(said.splitlines()[-1]) | {"peak_mib": peak[0]}


def family(process: int) -> list[int]:
    """A process and all its descendants."""
    found = [process]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:     # the process has just ended
                continue
    return found


def pss_mib(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    except (OSError, StopIteration):        # the process has just ended
        return 0.0


def compare(args: argparse.Namespace) -> None:
    print("| vocabulary | learner | median s | all s | ratio of medians | merging alone s | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for vocabsize in args.vocabsize:
        results = {learner: [] for learner in LEARNERS}
        for _ in range(args.runs):
            for learner, found in results.items():
                found.append(measured(args, learner, vocabsize))
        median = {learner: statistics.median(result["seconds"] for result in found)
                  for learner, found in results.items()}
        for learner, found in results.items():
            merging = [result["merging"] for result in found if "merging" in result]
            print(f"| {vocabsize:,} | {learner} | {median[learner]:.2f} "
                  f"| {' '.join(format(result['seconds'], '.2f') for result in found)} "
                  + ("| 1 " if learner == "benchtop" else
                     f"| Benchtop takes {median['benchtop'] / median[learner]:.2f} times as long ")
                  + f"| {format(statistics.median(merging), '.2f') if merging else ''} "
                  f"| {max(result['peak_mib'] for result in found):,.0f} |", flush=True)


def memory(args: argparse.Namespace) -> None:
    print(f"the text repeated, with the letters of one word in {args.one_in} shuffled; "
          f"{args.vocabsize[-1]:,} tokens, {args.num_workers} workers")
    print("| million characters | distinct pieces | s | merging s | forecast MiB | peak MiB "
          "| bytes per added character |")
    print("|---|---|---|---|---|---|---|")
    before = None
    for millions in args.millions:
        found = measured(args, "benchtop", args.vocabsize[-1], millions * 10**6)
        slope = (f"{(found['peak_mib'] - before[1]) * 2**20 / (millions - before[0]) / 10**6:.3f}"
                 if before else "")
        before = millions, found["peak_mib"]
        print(f"| {millions:,} | {found['unique_pieces']:,} | {found['seconds']:.1f} "
              f"| {found['merging']:.1f} | {found['forecast']:,.0f} | {found['peak_mib']:,.0f} | {slope} |",
              flush=True)


@command
def main() -> None:
    parser = Parser("Measure the learning of tokenizers.")
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="stdlib, or files, folders and globs")
    parser.add_argument("--vocabsize", type=int, nargs="+", default=[8192, 32000, 50256],
                        help="tokens, <|endoftext|> not included")
    parser.add_argument("--runs", type=int, default=5, help="trials per learner")
    parser.add_argument("--num_workers", type=int, default=host.available_cores(),
                        help="workers of Benchtop; the others use all cores")
    parser.add_argument("--memory", action="store_true", help="measure memory for growing amounts of text")
    parser.add_argument("--millions", type=int, nargs="+", default=[100, 500, 1000, 2000],
                        help="amounts of text for --memory, in millions of characters")
    parser.add_argument("--one_in", type=int, default=100, help="for --memory: shuffle one word in this many")
    parser.add_argument("--trial", choices=LEARNERS, help=argparse.SUPPRESS)
    parser.add_argument("--characters", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        print(json.dumps(trial(args)))
    elif args.memory:
        memory(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
