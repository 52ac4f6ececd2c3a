"""Whether one learning rate serves every width: all rates times a factor, over several widths, as a picture.

    python benchmarks/transfer.py --data books --widths 128 256 512 --factors 0.25 0.5 1 2 4

Further flags are train_gpt.py's. Every run has 6 layers, rows of 512 and the same tokens. Writes
experiments/transfer.csv and transfer.png; where the rules for width hold, the curves have their lowest points
above one another.
"""

import csv
import math
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipe import Diverged, make_variant, train

from benchtop import places
from benchtop.command_line import Parser, command
from train_gpt import Config

RATES = ("muon_lr", "embed_lr", "head_lr", "scalar_lr")


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
    axes.set(xlabel="all learning rates times", ylabel="bits per byte of held-out text",
             title=f"One learning rate for every width? ({tokens / 1e6:.2g}M tokens)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


@command
def main() -> None:
    parser = Parser("Sweep the learning rate over widths.", epilog="Further flags are train_gpt.py's.")
    parser.add_argument("--data", required=True, help="a folder in data/")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512], help="widths of the model")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4],
                        help="factors for all learning rates")
    parser.add_argument("--steps", type=int, default=100, help="steps per run")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--val_tokens", type=int, default=65536, help="tokens to validate on")
    args, flags = parser.parse_known_args()
    results: dict[int, dict[float, float]] = {width: {} for width in args.widths}
    with tempfile.TemporaryDirectory() as scratch:
        for width in args.widths:
            for factor in args.factors:
                rates = " ".join(f"--{knob} {factor * getattr(Config(), knob):g}" for knob in RATES)
                variant = make_variant(f"w{width}_f{factor:g}={rates} --model_dim {width} --num_heads 0 "
                                       f"--val_tokens {args.val_tokens} {shlex.join(flags)}", Path(scratch))
                budget = ["--num_steps", str(args.steps), "--batch_tokens", str(args.batch_tokens)]
                try:
                    results[width][factor] = train(variant, 0, budget, args.data)["val_bpb"]
                except Diverged as error:       # a rate that is too high ends a run, not the sweep
                    print(error)
                    results[width][factor] = math.inf
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
