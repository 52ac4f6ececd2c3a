"""From documents to finished token shards, against bare tiktoken.

    python benchmarks/tokenizing.py --source 'books/*.parquet' --tokenizer books_v32000_n1073741824

The two take turns. tiktoken has all texts in memory and gives lists of ids by encode_ordinary_batch, with
as many threads as Benchtop has workers. Benchtop runs as a command: it reads, holds out, shuffles, tokenizes,
and writes shards and manifest with their SHA-256; its time includes starting Python. MB are 10^6 bytes.
"""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import documents
import download_fineweb
import shards
import train_tokenizer

SCRATCH = "benchmark-of-tokenizing"     # a folder in data/


@documents.command
def main() -> None:
    parser = documents.Parser("Measure how fast documents become shards.")
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="stdlib, or files, folders and globs")
    parser.add_argument("--tokenizer", required=True, help="a folder in tokenizers/")
    parser.add_argument("--runs", type=int, default=5, help="trials of each")
    parser.add_argument("--num_workers", type=int, default=documents.available_cores(),
                        help="processes of Benchtop and threads of tiktoken")
    args = parser.parse_args()
    tokenizer = train_tokenizer.load_tokenizer(args.tokenizer)
    texts = [text for _, text in documents.open_source(args.source)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    script = Path(download_fineweb.__file__)
    command = [sys.executable, script.name, "--version", *args.source, "--tokenizer", args.tokenizer,
               "--name", SCRATCH, "--num_workers", str(args.num_workers)]
    bare, whole = [], []
    for _ in range(args.runs):
        began = time.perf_counter()
        count = sum(map(len, tokenizer.encode_ordinary_batch(texts, num_threads=args.num_workers)))
        bare.append(megabytes / (time.perf_counter() - began))
        shutil.rmtree(shards.DATA / SCRATCH, ignore_errors=True)
        began = time.perf_counter()
        subprocess.run(command, cwd=script.parent, check=True, stdout=subprocess.DEVNULL)
        whole.append(megabytes / (time.perf_counter() - began))
    manifest = shards.read_manifest(shards.DATA / SCRATCH / "manifest.json")
    found = sum(shard["tokens"] - shard["documents"] for shard in manifest["shards"])
    shutil.rmtree(shards.DATA / SCRATCH)
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
