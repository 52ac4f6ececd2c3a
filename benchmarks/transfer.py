"""Test whether one learning rate suits every width: sweep a factor on all rates at several widths.

    python benchmarks/transfer.py --data books --widths 128 256 512 --factors 0.25 0.5 1 2 4

Other flags are train_gpt.py's. Every run has 6 layers, rows of 512 tokens and the same training tokens. It
writes experiments/transfer.csv and transfer.png. If the rules for width hold, the minima of all curves are at
the same factor.
"""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop import places
from benchtop.command_line import Parser, command
from benchtop.errors import UserError
from train_gpt import Config

RATES = ("muon_lr", "embed_lr", "head_lr", "scalar_lr")


def train(script: str, name: str, flags: list[str]) -> float:
    """Train a run; returns its val_bpb, or infinity if it diverged, as it may with a high learning rate.

    raises  UserError with the last line of the run's stderr if it failed otherwise
    """
    before = {*places.EXPERIMENTS.glob(f"*_{name}")}
    done = subprocess.run([sys.executable, script, *flags, "--model_name", name], cwd=places.ROOT,
                          capture_output=True, text=True)
    folder = max({*places.EXPERIMENTS.glob(f"*_{name}")} - before, default=None)
    summary = folder and folder / "summary.json"
    if done.returncode and not (summary and summary.is_file()):     # a failed run with a summary diverged
        raise UserError(f"{name} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    facts = json.loads(summary.read_text(encoding="utf-8"))
    if done.returncode:
        print(f"{name}: {facts['status']}")
    return facts["val_bpb"] if not done.returncode else math.inf


def draw(results: dict[int, dict[float, float]], tokens: int, path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for width, curve in results.items():
        line, = axes.plot(curve.keys(), curve.values(), marker="o", label=f"width {width}")
        best = min(curve, key=curve.get)
        axes.plot(best, curve[best], marker="o", markersize=12, fillstyle="none", color=line.get_color())
    factors = sorted({factor for curve in results.values() for factor in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes.set(xlabel="factor on all learning rates", ylabel="bits per byte of held-out text",
             title=f"One learning rate for every width? ({tokens / 1e6:.2g}M tokens)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


@command
def main() -> None:
    parser = Parser("Sweep the learning rate over widths.", epilog="Further flags go to train_gpt.py.")
    parser.add_argument("--data", required=True, help="a folder in data/")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512], help="widths of the model")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4],
                        help="factors for all learning rates")
    parser.add_argument("--script", default="train_gpt.py", help="a changed copy of train_gpt.py")
    parser.add_argument("--steps", type=int, default=100, help="steps per run")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--val_tokens", type=int, default=65536, help="tokens to validate on")
    args, flags = parser.parse_known_args()
    results: dict[int, dict[float, float]] = {width: {} for width in args.widths}
    shared = ["--data", args.data, "--num_layers", "6", "--num_heads", "0", "--seq_len", "512", "--num_steps",
              str(args.steps), "--batch_tokens", str(args.batch_tokens), "--val_tokens", str(args.val_tokens),
              "--hellaswag_rows", "1", "--val_every", "0", "--num_samples", "0", "--log_every", "20", *flags]
    for width in args.widths:
        for factor in args.factors:
            rates = [f"--{knob}={factor * getattr(Config(), knob):g}" for knob in RATES]
            results[width][factor] = train(args.script, f"transfer_w{width}_f{factor:g}",
                                           [*rates, "--model_dim", str(width), *shared])
            print(f"width {width}, all rates times {factor:g}: val_bpb {results[width][factor]:.4f}",
                  flush=True)
    folder = places.EXPERIMENTS
    folder.mkdir(exist_ok=True)
    with open(folder / "transfer.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["width", "factor", "val_bpb"])
        writer.writerows((width, factor, f"{bpb:.4f}") for width, curve in results.items()
                         for factor, bpb in curve.items())
    draw(results, args.steps * args.batch_tokens, folder / "transfer.png")


if __name__ == "__main__":
    main()
