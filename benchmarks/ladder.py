"""Train a ladder of sizes, fit a scaling law to it, and predict what larger budgets would reach.

    python benchmarks/ladder.py --data books --seeds 2

Each rung trains once per seed, smallest first, for a fixed number of tokens per weight; all else follows the
rules of train_gpt.py. Weights are those that multiply every token: the matrices of the layers, and the head.
The law is val_bpb = E + A / C^a, where C is the FLOPs of a run; it is fitted by least squares with E >= 0.

Intervals: 2,000 times, noise is added to the fitted values, and the law is fitted again. The noise is normal;
its standard deviation is that of the residuals, itself drawn each time from its distribution for as many runs
(chi-squared with 3 degrees of freedom fewer than there are runs). They allow for noise, not for a law of the
wrong form, so doubt a prediction the more, the further it is from the runs. It holds for text, vocabulary and
rows of the ladder: what a preset reaches on its own data is another figure.

Runs that experiments/ladder/runs.csv already has of the same script and data are used, too, and not repeated.
Writes README.md and loss.png beside it.
"""

import csv
import dataclasses
import itertools
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from transfer import train

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop import places
from benchtop.briefing import operations_of
from benchtop.command_line import Parser, command, positive
from benchtop.errors import UserError
from benchtop.files import sha256_of, write_text
from benchtop.knobs import parse_config
from benchtop.shards import open_dataset
from benchtop.tables import as_markdown, mean_and_spread, short
from train_gpt import GPT, Config

FOLDER = places.EXPERIMENTS / "ladder"
KNOBS = {"num_heads": 0, "seq_len": 512, "val_tokens": 400_000, "val_every": 1_000_000, "hellaswag_rows": 1,
         "num_samples": 0, "log_every": 20}
COLUMNS = ("tokens", "step", "flops", "val_bpb", "train_seconds", "device", "data_sha256", "code_sha256",
           "bench_sha256")
EXPONENTS = np.arange(0.0005, 1.0001, 0.0005)     # that a fit tries
DRAWS = 2000                                    # behind an interval


@dataclass(frozen=True)
class Rung:
    layers: int
    width: int

    @classmethod
    def of(cls, word: str) -> "Rung":
        """From "4x128"; raises  UserError if that is no size."""
        layers, _, width = word.partition("x")
        if not (layers.isdecimal() and width.isdecimal() and int(layers) and int(width)):
            raise UserError(f"a size is layers x width, as in 4x128, not {word}")
        return cls(int(layers), int(width))

    def __str__(self) -> str:
        return f"{self.layers}x{self.width}"

    def weights(self, vocab_size: int) -> int:
        """Weights that multiply every token."""
        cfg = Config(num_layers=self.layers, model_dim=self.width, vocab_size=vocab_size)
        model = on_paper(cfg)
        return model.head.numel() + sum(p.numel() for p in model.layers.parameters() if p.ndim > 1)


def on_paper(cfg: Config) -> GPT:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return GPT(cfg, cfg.vocab_size - 1)


# ------------------------------------------------------------------------------------------------
# The law
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Law:
    """bpb = floor + gain * (flops / unit)^-exponent; unit is the geometric mean of the runs' FLOPs.

    floor, gain, exponent   (N), one for each of N fits
    """
    floor: np.ndarray
    gain: np.ndarray
    exponent: np.ndarray
    unit: float

    def at(self, flops: np.ndarray) -> np.ndarray:
        """(K) FLOPs -> (N, K) bits per byte."""
        return self.floor[:, None] + self.gain[:, None] * (flops / self.unit) ** -self.exponent[:, None]


def fit(flops: np.ndarray, bpb: np.ndarray) -> Law:
    """Least squares for each row: flops (K), bpb (N, K).

    For each exponent the best floor and gain solve a linear problem; a floor below 0 becomes 0.
    """
    unit = np.exp(np.log(flops).mean())
    fits = []
    for exponent in EXPONENTS:
        shape = (flops / unit) ** -exponent                                                 # (K)
        bend = shape - shape.mean()                                                         # (K)
        gain = bpb @ bend / (bend @ bend)                                                   # (N)
        floor = bpb.mean(1) - gain * shape.mean()                                           # (N)
        gain = np.where(floor < 0, bpb @ shape / (shape @ shape), gain)
        floor = np.maximum(floor, 0)
        error = ((floor[:, None] + gain[:, None] * shape - bpb) ** 2).sum(1)                # (N)
        fits.append((error, floor, gain, np.full(len(bpb), exponent)))
    errors, floors, gains, exponents = map(np.array, zip(*fits, strict=True))               # (exponents, N)
    best = errors.argmin(0), np.arange(len(bpb))
    return Law(floors[best], gains[best], exponents[best], unit)


def draws_of(law: Law, flops: np.ndarray, bpb: np.ndarray) -> Law:
    """Fits to what other runs might have given: flops (K), bpb (K) of these runs -> DRAWS fits."""
    random = np.random.default_rng(0)
    fitted = law.at(flops)[0]
    free = len(flops) - 3
    spread = np.sqrt(((bpb - fitted) ** 2).sum() / random.chisquare(free, DRAWS))           # (DRAWS)
    return fit(flops, fitted + spread[:, None] * random.standard_normal((DRAWS, len(flops))))


def interval(values: np.ndarray) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"{low:.3f} to {high:.3f}"


# ------------------------------------------------------------------------------------------------
# What is written
# ------------------------------------------------------------------------------------------------

def flops_of_preset(preset: str) -> float:
    """FLOPs of its budget, with GPT-2's number of tokens unless it has another."""
    cfg = parse_config(["--preset", preset], Config)
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 50257).with_budget(2**53)
    return operations_of(cfg, on_paper(cfg))


def report(rows: list[dict], presets: dict[str, float], line: str) -> None:
    """README.md and loss.png of the runs; presets: name -> FLOPs."""
    flops, bpb = (np.array([float(row[key]) for row in rows]) for key in ("flops", "val_bpb"))
    law = fit(flops, bpb[None])
    draws = draws_of(law, flops, bpb)
    error = float(np.sqrt(np.mean((law.at(flops)[0] - bpb) ** 2)))
    write_text(FOLDER / "README.md", f"""# The ladder

Written by `{line}` on {rows[0]["device"]}.

Weights are those of matrices and head. Each run is a row of [runs.csv](runs.csv).

{as_markdown(table_of_sizes(rows, law))}

![loss](loss.png)

## The law

val_bpb = E + B x (C / {law.unit:.2e})^-a, where C is a run's FLOPs, with 95 % intervals:

- E = {law.floor[0]:.3f} ({interval(draws.floor)})
- B = {law.gain[0]:.3f} ({interval(draws.gain)})
- a = {law.exponent[0]:.3f} ({interval(draws.exponent)})

It misses the runs by {error:.4f} (root mean square).

## What it predicts

For this text, vocabulary and rows, and for the FLOPs of a preset, spent at the ladder's ratio of tokens to
weights. The intervals allow for noise, not for a law of the wrong form.

{as_markdown(table_of_predictions(presets, law, draws, flops.max()))}
""")
    draw(flops, bpb, law, draws, presets)


def table_of_sizes(rows: list[dict], law: Law) -> list[list[str]]:
    table = [["layers x width", "weights", "tokens", "FLOPs", "seconds", "val_bpb", "law"]]
    for size in dict.fromkeys(row["size"] for row in rows):
        same = [row for row in rows if row["size"] == size]
        flops = np.array([float(same[0]["flops"])])
        table.append([size.replace("x", " x "), short(int(same[0]["weights"])), short(int(same[0]["tokens"])),
                      f"{flops[0]:.1e}", f"{fmean(float(row['train_seconds']) for row in same):,.0f}",
                      mean_and_spread([float(row["val_bpb"]) for row in same]), f"{law.at(flops)[0, 0]:.4f}"])
    return table


def table_of_predictions(presets: dict[str, float], law: Law, draws: Law, largest: float) -> list[list[str]]:
    table = [["FLOPs of", "FLOPs", "times the largest run", "val_bpb", "95 % interval"]]
    for preset, flops in presets.items():
        there = np.array([flops])
        table.append([preset, f"{flops:.1e}", f"{flops / largest:,.0f}", f"{law.at(there)[0, 0]:.3f}",
                      interval(draws.at(there)[:, 0])])
    return table


def draw(flops: np.ndarray, bpb: np.ndarray, law: Law, draws: Law, presets: dict[str, float]) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    grid = np.geomspace(flops.min(), max([flops.max(), *presets.values()]), 100)
    low, high = np.quantile(draws.at(grid), [0.025, 0.975], axis=0)
    axes.fill_between(grid, low, high, alpha=0.2, label="95 % interval")
    axes.plot(grid, law.at(grid)[0], label="law")
    axes.plot(flops, bpb, "o", label="runs")
    for preset, budget in presets.items():
        axes.axvline(budget, color="gray", linestyle=":")
        axes.annotate(f" {preset}", (budget, law.at(flops[:1])[0, 0]))
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="bits per byte of held-out text",
             title="Loss by compute")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "loss.png", dpi=150)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def finished(path: Path, code: str, data: str, ratio: int) -> dict[tuple[str, str], dict]:
    """(size, seed) -> row, of the runs in the table of this script, data and ratio of tokens to weights."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {(row["size"], row["seed"]): row for row in csv.DictReader(file)
                if (row["code_sha256"], row["data_sha256"]) == (code, data)
                and int(row["planned_tokens"]) == ratio * int(row["weights"])}


@command
def main() -> None:
    parser = Parser("Train a ladder of sizes and fit a scaling law to it.",
                    epilog="Further flags go to train_gpt.py.")
    parser.add_argument("--data", required=True, help="a folder in data/; use a small vocabulary")
    parser.add_argument("--sizes", nargs="+", default=["2x64", "4x64", "3x96", "3x128", "4x128"],
                        metavar="LAYERSxWIDTH", help="four or more")
    parser.add_argument("--tokens_per_weight", type=positive, default=20)
    parser.add_argument("--seeds", type=positive, default=1)
    parser.add_argument("--predict", nargs="*", default=["xs", "s"], metavar="PRESET")
    args, flags = parser.parse_known_args()
    rungs = [Rung.of(word) for word in args.sizes]
    dataset, tokenizer = open_dataset(args.data, "")
    presets = {preset: flops_of_preset(preset) for preset in args.predict}
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "runs.csv"
    rows = finished(path, sha256_of(places.ROOT / "train_gpt.py"), dataset.sha256, args.tokens_per_weight)
    if len({size for size, _ in rows} | {str(rung) for rung in rungs}) < 4:
        raise UserError("a law with three constants needs four sizes or more")
    for seed, rung in itertools.product(map(str, range(args.seeds)), rungs):
        if (str(rung), seed) in rows:
            continue
        weights = rung.weights(tokenizer.n_vocab)
        tokens = weights * args.tokens_per_weight
        knobs = {**KNOBS, "data": args.data, "num_layers": rung.layers, "model_dim": rung.width,
                 "train_tokens": tokens, "seed": seed}
        facts = train("train_gpt.py", f"ladder_{rung}_seed{seed}",
                      [*(f"--{name}={value}" for name, value in knobs.items()), *flags])
        if math.isinf(facts["val_bpb"]):
            raise UserError(f"{rung} diverged; its run says why. The runs before it are kept")
        row = {"size": str(rung), "seed": seed, "weights": weights, "planned_tokens": tokens,
               **{column: facts.get(column) for column in COLUMNS}}
        rows[str(rung), seed] = row
        with open(path, "w", newline="", encoding="utf-8") as file:     # after each run, lest all be lost
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(rows.values())
        print(f"{rung}, {weights:,} weights, seed {seed}: val_bpb {facts['val_bpb']:.4f}", flush=True)
    report([*rows.values()], presets, shlex.join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
