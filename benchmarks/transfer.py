"""Test whether one learning rate suits every width, depth or budget: sweep a factor on all rates.

    python benchmarks/transfer.py --data books --vary model_dim 128 256 512
    python benchmarks/transfer.py --data books --vary num_layers 3 6 12
    python benchmarks/transfer.py --data books --vary train_tokens 250_000 1_000_000 4_000_000

Unless other flags of train_gpt.py say otherwise, a run has 6 layers of width 256, rows of 512 tokens, 400,000
training tokens, and the batch size that train_gpt.py chooses for the budget. For each value, a parabola
fitted to the points around the lowest one estimates the best factor; if the rules hold, it is near 1 at every
value. Writes KNOB.csv and KNOB.png to experiments/transfer/.
"""

import csv
import io
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop import places
from benchtop.command_line import Parser, command
from benchtop.errors import UserError
from benchtop.files import sha256_of, write_text
from benchtop.identity import bench_hashes, bench_sha256
from benchtop.shards import open_dataset
from train_gpt import Config

RATES = ("muon_lr", "embed_lr", "head_lr", "scalar_lr")
# a knob -> what it is in the title, and a value in the legend
NAMES = {"model_dim": ("width", "width {:,}"), "num_layers": ("depth", "{:,} layers"),
         "train_tokens": ("budget", "{:,} tokens")}
KNOBS = {"num_layers": 6, "model_dim": 256, "num_heads": 0, "seq_len": 512, "train_tokens": 400_000,
         "val_tokens": 400_000, "val_every": 1_000_000, "hellaswag_rows": 1, "num_samples": 0,
         "log_every": 20}
COLUMNS = ("tokens", "step", "val_bpb", "train_seconds", "seed", "device", "data_sha256", "code_sha256",
           "bench_sha256")


def refuse(flags: list[str], names: set[str], why: str) -> None:
    """raises  UserError if the flags for train_gpt.py set one of these knobs"""
    if twice := names & {flag.removeprefix("--").partition("=")[0] for flag in flags}:
        raise UserError(f"--{min(twice)} is what {why}; leave it out")


def train(script: str, name: str, knobs: dict, flags: list[str]) -> dict:
    """Train a run; returns its summary, with a val_bpb of infinity if it diverged, as with high rates.

    flags    of train_gpt.py; they win over the knobs

    raises  UserError with the last line of the run's stderr if it failed otherwise
    """
    before = {*places.EXPERIMENTS.glob(f"*_{name}")}
    words = [f"--{knob}={setting}" for knob, setting in knobs.items()]
    done = subprocess.run([sys.executable, script, *words, *flags, "--model_name", name], cwd=places.ROOT,
                          capture_output=True, text=True)
    folder = max({*places.EXPERIMENTS.glob(f"*_{name}")} - before, default=None)
    summary = folder and folder / "summary.json"
    if done.returncode and not (summary and summary.is_file()):     # a failed run with a summary diverged
        raise UserError(f"{name} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    facts = json.loads(summary.read_text(encoding="utf-8"))
    if done.returncode:
        print(f"{name}: {facts['status']}")
    return facts | ({"val_bpb": math.inf} if done.returncode else {})


def read_rows(path: Path, header: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of runs that need not be trained again; raises  UserError if the table is damaged"""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if any(set(row) != set(header) or not all(row.values()) for row in rows):
        raise UserError(f"{path} is damaged, or of an earlier version; move it away")
    return rows


def write_rows(path: Path, header: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    """Write the table whole, after each run, so that a sweep that is stopped loses nothing."""
    text = io.StringIO()
    table = csv.DictWriter(text, header, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def best_factor(curve: dict[float, float]) -> float | None:
    """Where a parabola in log(factor) is lowest, fitted to the lowest point and up to two on each side.

    curve    factor -> val_bpb
    returns  None if the curve has no minimum between its ends
    """
    points = [(math.log(factor), bpb) for factor, bpb in sorted(curve.items()) if math.isfinite(bpb)]
    lowest = min(range(len(points)), key=lambda place: points[place][1], default=0)
    near = points[max(0, lowest - 2):lowest + 3]
    if len(near) < 3:
        return None
    bend, slope, _ = np.polyfit(*zip(*near, strict=True), 2)
    bottom = -slope / (2 * bend) if bend > 0 else math.inf
    return math.exp(bottom) if points[0][0] <= bottom <= points[-1][0] else None


def in_words(factor: float | None) -> str:
    return f"{factor:.2f}" if factor else "outside the range"


def values_of(words: list[str]) -> tuple[str, list[int]]:
    """The knob and the values of --vary; raises UserError unless all are whole numbers of a knob."""
    knob, *values = words
    if type(getattr(Config(), knob, None)) is int and values:
        try:
            return knob, [int(value) for value in values]
        except ValueError:
            pass
    raise UserError("--vary needs a knob with whole numbers and its values, as in --vary model_dim 128 256, "
                    f"not {' '.join(words)}")


def draw(knob: str, curves: dict[int, dict[float, float]], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    what, each = NAMES.get(knob, (knob, knob + " {:,}"))
    for value, curve in curves.items():
        finite = {factor: bpb for factor, bpb in curve.items() if math.isfinite(bpb)}
        lowest = min(finite.values(), default=0)
        axes.plot(finite.keys(), [bpb - lowest for bpb in finite.values()], marker="o",
                  label=f"{each.format(value)}, best factor {in_words(best_factor(curve))}")
    factors = sorted({factor for curve in curves.values() for factor in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes.set(xlabel="factor on all learning rates", ylabel="val_bpb above the lowest of the curve",
             title=f"One learning rate for every {what}?")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


@command
def main() -> None:
    parser = Parser("Sweep the learning rate over widths, depths or budgets.",
                    epilog="Further flags go to train_gpt.py.")
    parser.add_argument("--data", required=True, help="a folder in data/")
    parser.add_argument("--vary", nargs="+", required=True, metavar=("KNOB", "VALUE"),
                        help="a knob with whole numbers and its values, as in: model_dim 128 256 512")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 0.71, 1, 1.41, 2],
                        help="factors for all learning rates")
    parser.add_argument("--script", default="train_gpt.py", help="a changed copy of train_gpt.py")
    args, flags = parser.parse_known_args()
    knob, values = values_of(args.vary)
    refuse(flags, {knob, *RATES}, "this sweep varies")
    curves, path = {value: {} for value in values}, places.EXPERIMENTS / "transfer" / f"{knob}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = (knob, "factor", *COLUMNS, "flags")
    rows = read_rows(path, header)
    same = {"code_sha256": sha256_of(places.ROOT / args.script), "bench_sha256": bench_sha256(bench_hashes()),
            "data_sha256": open_dataset(args.data, "")[0].sha256, "flags": shlex.join(flags) or "none"}
    for value, curve in curves.items():
        knobs = {**KNOBS, "data": args.data, knob: value}
        if knob == "num_steps":     # instead of the tokens
            del knobs["train_tokens"]
        for factor in args.factors:
            rates = {name: f"{factor * getattr(Config(), name):g}" for name in RATES}
            wanted = same | {knob: str(value), "factor": f"{factor:g}"}
            row = next((row for row in rows if row.items() >= wanted.items()), None)
            if not row:
                facts = train(args.script, f"transfer_{knob}{value}_f{factor:g}", knobs | rates, flags)
                row = wanted | {column: str(facts.get(column, "none")) for column in COLUMNS}
                rows.append(row)
                write_rows(path, header, rows)
            curve[factor] = float(row["val_bpb"])
            print(f"{knob} {value}, all rates times {factor:g}: val_bpb {curve[factor]:.4f}", flush=True)
        print(f"{knob} {value}: best factor {in_words(best_factor(curve))}", flush=True)
    draw(knob, curves, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
