"""Which recipe reaches the lower loss in the same time: variants of train_gpt.py against each other.

    python benchmarks/recipe.py --data books --seconds 60 --seeds 3 \\
        --variant base= --variant 'warm=--warmup_steps 20' --variant 'gelu=gelu.diff --muon_lr 0.04'
    python benchmarks/recipe.py --train train.jsonl --val val.jsonl --seconds 240 --seeds 3

A variant is a name and flags of train_gpt.py; a word that ends with .diff is a patch for the script. The
setting is width 256, 6 layers, rows of 512, 8,192 tokens a step. Variants take turns, seed by seed, each for
so many seconds of training (or so many --steps, where only the loss counts), on a copy of the scripts.
Differences are paired by seed, with 95 % intervals of Student's t. --train learns a tokenizer on its file
first and validates on all of --val.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop import places, shards, significance
from benchtop.command_line import Parser, command, positive
from benchtop.errors import UserError
from benchtop.files import write_json
from benchtop.prepare import tokenized
from benchtop.sources import open_source
from benchtop.tokenizer import load_tokenizer, tokenizer_sha256

SETTING = ["--num_layers", "6", "--model_dim", "256", "--num_heads", "2", "--seq_len", "512",
           "--batch_tokens", "8192", "--hellaswag_rows", "1",
           "--val_every", "0", "--num_samples", "0", "--save_every_minutes", "0", "--log_every", "20"]
MOST_SEEDS = 10


@dataclass(frozen=True)
class Variant:
    """A name, the folder with its scripts, and its flags."""
    name: str
    folder: Path
    flags: list[str]


class Diverged(UserError):
    """A run whose loss or gradient was no number any more."""


def make_variant(text: str, scratch: Path) -> Variant:
    """A copy of the scripts for `name=flags and patches`."""
    name, _, rest = text.partition("=")
    words = shlex.split(rest)
    folder = scratch / "variants" / name
    if folder.exists():
        raise UserError(f"two variants are called {name!r}")
    folder.mkdir(parents=True)
    copy_scripts(folder)
    for kind in ("data", "tokenizers"):
        (folder / kind).symlink_to((scratch if (scratch / kind).exists() else places.ROOT) / kind)
    for patch in (word for word in words if word.endswith(".diff")):
        done = subprocess.run(["patch", "-p1", "-i", str(Path(patch).resolve())], cwd=folder, text=True,
                              capture_output=True)
        if done.returncode:
            raise UserError(f"{patch} does not apply to the scripts: {done.stdout.splitlines()[-1]}")
    return Variant(name, folder, [word for word in words if not word.endswith(".diff")])


def copy_scripts(folder: Path) -> None:
    """The scripts and the bench, which then find data and write runs in this folder."""
    for script in places.ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(places.ROOT / "benchtop", folder / "benchtop",
                    ignore=shutil.ignore_patterns("__pycache__"))


def train(variant: Variant, seed: int, budget: list[str], data: str) -> dict:
    """The summary of a run.

    raises  Diverged, or another UserError with the run's last words
    """
    flags = [*SETTING, "--data", data, "--seed", str(seed), *budget, *variant.flags]
    done = subprocess.run([sys.executable, "train_gpt.py", *flags, "--model_name", f"{variant.name}_{seed}"],
                          cwd=variant.folder, capture_output=True, text=True)
    last_words = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    summaries = list(variant.folder.glob(f"experiments/*_{variant.name}_{seed}/summary.json"))
    if done.returncode:     # only a run that diverged leaves a summary then
        raise (Diverged if summaries else UserError)(f"{variant.name} failed: {last_words}")
    return json.loads(summaries[0].read_text())


def prepare(train_file: Path, val_file: Path, vocabsize: int, scratch: Path) -> str:
    """The name of a data set of these two files, with a tokenizer of its own."""
    (scratch / "data").mkdir()
    (scratch / "tokenizers").mkdir()
    copy_scripts(scratch)
    flags = ["--source", str(train_file.resolve()), "--vocabsize", str(vocabsize), "--name", "own"]
    done = subprocess.run([sys.executable, "train_tokenizer.py", *flags, "--samples", str(2**30)],
                          cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"no tokenizer could be learned: {done.stderr.strip().splitlines()[-1]}")
    places.TOKENIZERS = scratch / "tokenizers"
    tokenizer = load_tokenizer(next(places.TOKENIZERS.iterdir()).name)
    folder = scratch / "data" / "own"
    folder.mkdir()
    entries = []
    for split, file in (("train", train_file), ("val", val_file)):
        writer = shards.ShardWriter(folder, tokenizer.n_vocab, 2**40)
        for document in tokenized(open_source(str(file)), tokenizer.name, num_workers=1):
            writer.add(document.tokens, document.num_bytes)
        entries.append(writer.write(f"{split}_000000.bin", split))
    manifest = {"format_version": shards.FORMAT_VERSION, "source": train_file.name,
                "tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer_sha256(tokenizer),
                "vocab_size": tokenizer.n_vocab, "eot_id": tokenizer.eot_token, "shards": entries}
    write_json(folder / "manifest.json", manifest)
    return "own"


def difference(values: list[float], base: list[float]) -> str:
    """Mean of paired differences, with its 95 % interval."""
    if len(values) < 2:
        return f"{values[0] - base[0]:+.4f}"
    test = significance.paired(base, values)
    return f"{test.mean:+.4f} ± {test.high - test.mean:.4f}"


@command
def main() -> None:
    parser = Parser("Compare variants of the recipe at equal time or steps.")
    parser.add_argument("--variant", action="append", metavar="NAME=FLAGS",
                        help="a variant: flags of train_gpt.py, and patches *.diff")
    parser.add_argument("--data", default="", help="a folder in data/")
    parser.add_argument("--train", type=Path, metavar="FILE", help="text to train on, instead of --data")
    parser.add_argument("--val", type=Path, metavar="FILE", help="text to validate on, with --train")
    parser.add_argument("--vocabsize", type=positive, default=8192,
                        help="vocabulary of the tokenizer, with --train")
    parser.add_argument("--seconds", type=float, default=60, help="seconds of training per run")
    parser.add_argument("--steps", type=int, default=0, help="steps per run, instead of --seconds; 0 = off")
    parser.add_argument("--seeds", type=positive, default=3, help="number of runs per variant")
    args = parser.parse_args()
    if bool(args.train) != bool(args.val) or not (args.train or args.data):
        raise UserError("name either --data, or both --train and --val")
    if args.seconds <= 0:
        raise UserError(f"--seconds must be more than 0; it is {args.seconds:g}")
    if args.seeds > MOST_SEEDS:
        raise UserError(f"--seeds must be at most {MOST_SEEDS}")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        data = prepare(args.train, args.val, args.vocabsize, scratch) if args.train else args.data
        variants = [make_variant(text, scratch) for text in args.variant or ["train_gpt="]]
        budget = (["--num_steps", str(args.steps)] if args.steps else
                  ["--num_steps", "1000000", "--train_minutes", str(args.seconds / 60)])
        results: dict[str, list[dict]] = {variant.name: [] for variant in variants}
        for seed in range(args.seeds):
            # who goes first changes from seed to seed
            for variant in variants[::-1] if seed % 2 else variants:
                summary = train(variant, seed, budget, data)
                results[variant.name].append(summary)
                print(f"{variant.name} seed {seed}: val_bpb {summary['val_bpb']:.4f}, val_loss "
                      f"{summary['val_loss']:.4f}, {summary['step']} steps, {summary['tokens']:,} tokens, "
                      f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['train_seconds']:.1f} s",
                      flush=True)
    print("\n| variant | val_bpb | difference | val_loss | tokens/s |\n|---|---|---|---|---|")
    base = [summary["val_bpb"] for summary in results[variants[0].name]]
    for name, summaries in results.items():
        bpb, loss, speed = ([summary[what] for summary in summaries]
                            for what in ("val_bpb", "val_loss", "tokens_per_second"))
        print(f"| {name} | {np.mean(bpb):.4f} | {difference(bpb, base)} | {np.mean(loss):.4f} | "
              f"{np.median(speed):,.0f} |")
    print()
    for name, summaries in results.items():
        for summary in summaries:
            print(f"val_bpb {summary['val_bpb']:.4f}" + (f"  {name}" if len(results) > 1 else ""))


if __name__ == "__main__":
    main()
