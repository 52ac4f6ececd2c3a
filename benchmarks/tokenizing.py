"""Time the way from documents to finished token shards against tiktoken alone.

    python benchmarks/tokenizing.py --source 'books/*.parquet' --tokenizer books

The two take turns. tiktoken encodes texts that are already in memory into lists of ids, by
encode_ordinary_batch with as many threads as Benchtop has workers. Benchtop runs as a command: it starts
Python, reads, holds out, shuffles, tokenizes, and writes shards and manifest with SHA-256. MB are 10^6 bytes.
"""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchtop import host, places, shards
from benchtop.command_line import Parser, command
from benchtop.sources import open_source
from benchtop.tokenizer import load_tokenizer

SCRATCH = "benchmark-of-tokenizing"     # a folder in data/


@command
def main() -> None:
    parser = Parser("Measure how fast documents become shards.")
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="stdlib, or files, folders and globs")
    parser.add_argument("--tokenizer", required=True, help="a folder in tokenizers/")
    parser.add_argument("--runs", type=int, default=5, help="trials of each")
    parser.add_argument("--num_workers", type=int, default=host.available_cores(),
                        help="processes of Benchtop and threads of tiktoken")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    texts = [text for _, text in open_source(args.source)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    program = [sys.executable, "download_fineweb.py", "--source", *args.source, "--name", SCRATCH,
               "--tokenizer", args.tokenizer, "--num_workers", str(args.num_workers)]
    bare, whole = [], []
    for _ in range(args.runs):
        began = time.perf_counter()
        count = sum(map(len, tokenizer.encode_ordinary_batch(texts, num_threads=args.num_workers)))
        bare.append(megabytes / (time.perf_counter() - began))
        shutil.rmtree(places.DATA / SCRATCH, ignore_errors=True)
        began = time.perf_counter()
        subprocess.run(program, cwd=places.ROOT, check=True, stdout=subprocess.DEVNULL)
        whole.append(megabytes / (time.perf_counter() - began))
    manifest = shards.read_manifest(places.DATA / SCRATCH / "manifest.json")
    found = sum(shard["tokens"] - shard["documents"] for shard in manifest["shards"])
    shutil.rmtree(places.DATA / SCRATCH)
    print(f"{megabytes:.1f} MB, {args.num_workers} workers; "
          f"{found:,} tokens in shards, {count:,} by tiktoken\n")
    print("| | median MB/s | all MB/s |")
    print("|---|---|---|")
    for name, speeds in (("tiktoken, encode_ordinary_batch", bare),
                         ("Benchtop, source to shards", whole)):
        print(f"| {name} | {statistics.median(speeds):.1f} | {' '.join(format(x, '.1f') for x in speeds)} |")
    ratio = statistics.median(whole) / statistics.median(bare)
    print(f"\nBenchtop runs at {ratio:.2f} times tiktoken's speed.")


if __name__ == "__main__":
    main()
