"""Train a ladder of sizes, fit a scaling law to it, and predict what larger budgets would reach.

    python benchmarks/ladder.py --data books

Each size trains once per seed, in the order given, for a fixed number of tokens per weight; all else follows
the rules of train_gpt.py. Weights are those that multiply every token: the matrices of the layers, and the
head. The law is val_bpb = E + B (C / C0)^-a, where C is the FLOPs of a run and C0 their geometric mean; it is
fitted by least squares with E >= 0.

Intervals: 2,000 times, noise is added to the fitted values, and the law is fitted again. The noise is normal;
its standard deviation is that of the residuals, itself drawn each time from its distribution for as many runs
(chi-squared with 3 degrees of freedom fewer than there are runs). In simulations, 95 % intervals of ten runs
hold the truth in 96 % of cases, but of five runs only in 80 to 86 %. They allow for noise, not for a law of
the wrong form, so doubt a prediction the more, the further it is from the runs. It holds for text, vocabulary
and rows of the ladder, and for text that need not be repeated: what a preset reaches on its own data is
another figure.

experiments/ladder/runs.csv keeps every run. Those of the same script, data, ratio and flags count, and are
not repeated. Writes README.md and loss.png beside it.
"""

import argparse
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
from transfer import KNOBS, read_rows, refuse, train, write_rows

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
SET_HERE = {"num_layers", "model_dim", "train_tokens", "num_steps", "train_minutes", "target_loss", "seed",
            "preset", "data", "model_name"}
COLUMNS = ("tokens", "step", "flops", "val_bpb", "train_seconds", "device", "data_sha256", "code_sha256",
           "bench_sha256")
HEADER = ("size", "seed", "weights", "tokens_per_weight", "flags", *COLUMNS)
EXPONENTS = np.arange(0.0005, 1.0001, 0.0005)       # that a fit tries
DRAWS = 2000                                        # behind an interval


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
    if cfg.by_speed:
        raise UserError(f"--predict {preset}: its size depends on the machine; name another preset")
    cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size or 50257).with_budget(2**53)
    return operations_of(cfg, on_paper(cfg))


def report(rows: list[dict], presets: dict[str, float], line: str) -> None:
    """README.md and loss.png of the runs; presets: name -> FLOPs."""
    flops, bpb = (np.array([float(row[key]) for row in rows]) for key in ("flops", "val_bpb"))
    law = fit(flops, bpb[None])
    draws = draws_of(law, flops, bpb)
    error = float(np.sqrt(np.mean((law.at(flops)[0] - bpb) ** 2)))
    write_text(FOLDER / "README.md", f"""# The ladder

Written by `{line}` on {", ".join(sorted({row["device"] for row in rows}))}.

Weights are those of matrices and head. Each of the {len(rows)} runs is a row of
[runs.csv](runs.csv){of_benches(rows)}.

{as_markdown(table_of_sizes(rows, law))}

![loss](loss.png)

## The law

val_bpb = E + B x (C / {law.unit:.2e})^-a, where C is a run's FLOPs, with 95 % intervals:

- E = {law.floor[0]:.3f} ({interval(draws.floor)})
- B = {law.gain[0]:.3f} ({interval(draws.gain)})
- a = {law.exponent[0]:.3f} ({interval(draws.exponent)})

It misses the runs by {error:.4f} (root mean square).{at_a_bound(law)}

## What it predicts

The FLOPs are those of a preset, spent at the ladder's ratio of tokens to weights, on more text of this kind,
with the same vocabulary and rows. The intervals allow for noise, not for a law of the wrong form.

{as_markdown(table_of_predictions(presets, law, draws, flops.max()))}
""")
    draw(flops, bpb, law, draws, presets)


def of_benches(rows: list[dict[str, str]]) -> str:
    benches = len({row["bench_sha256"] for row in rows})
    return f"; they are of {benches} versions of benchtop/" if benches > 1 else ""


def at_a_bound(law: Law) -> str:
    """A warning if the fit is at the edge of what is tried."""
    if law.exponent[0] in (EXPONENTS[0], EXPONENTS[-1]) or law.floor[0] == 0 or law.gain[0] < 0:
        return " The best fit is at the edge of what is tried, so these runs do not determine the law."
    return ""


def table_of_sizes(rows: list[dict], law: Law) -> list[list[str]]:
    table = [["layers x width", "weights", "tokens", "FLOPs", "seconds", "val_bpb", "fitted"]]
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
        table.append([preset, f"{flops:.1e}", f"{flops / largest:,.3g}", f"{law.at(there)[0, 0]:.3f}",
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

@command
def main() -> None:
    parser = Parser("Train a ladder of sizes and fit a scaling law to it.",
                    epilog="Further flags go to train_gpt.py.")
    parser.add_argument("--data", required=True, help="a folder in data/; use a small vocabulary")
    parser.add_argument("--sizes", nargs="+", default=["2x64", "4x64", "3x96", "3x128", "4x128"],
                        metavar="LAYERSxWIDTH", help="four or more")
    parser.add_argument("--tokens_per_weight", type=positive, default=20,
                        help="training tokens of each size, per weight of its matrices and head")
    parser.add_argument("--seeds", type=positive, default=2, help="with one, the intervals are too narrow")
    parser.add_argument("--predict", nargs="*", default=["xs", "s"], metavar="PRESET",
                        help="presets whose FLOPs the law is extended to")
    args, flags = parser.parse_known_args()
    rungs = [Rung.of(word) for word in args.sizes]
    if len(set(rungs)) < 4:
        raise UserError("a law with three constants needs four sizes or more")
    refuse(flags, SET_HERE, "the ladder sets")
    dataset, tokenizer = open_dataset(args.data, "")
    presets = {preset: flops_of_preset(preset) for preset in args.predict}
    path = FOLDER / "runs.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path, HEADER)
    same = {"code_sha256": sha256_of(places.ROOT / "train_gpt.py"), "data_sha256": dataset.sha256,
            "flags": shlex.join(flags) or "none", "tokens_per_weight": str(args.tokens_per_weight)}
    mine = []
    for seed, rung in itertools.product(map(str, range(args.seeds)), rungs):
        wanted = same | {"size": str(rung), "seed": seed}
        row = next((row for row in rows if row.items() >= wanted.items()), None)
        if not row:
            row = wanted | train_rung(rung, seed, args, tokenizer.n_vocab, flags)
            rows.append(row)
            write_rows(path, HEADER, rows)
        mine.append(row)
        print(f"{rung}, {int(row['weights']):,} weights, seed {seed}: val_bpb {float(row['val_bpb']):.4f}",
              flush=True)
    report(mine, presets, shlex.join(["python", "benchmarks/ladder.py", *sys.argv[1:]]))


def train_rung(rung: Rung, seed: str, args: argparse.Namespace, vocab_size: int,
               flags: list[str]) -> dict[str, str]:
    """Train a size; its row of the table."""
    weights = rung.weights(vocab_size)
    knobs = {**KNOBS, "data": args.data, "num_layers": rung.layers, "model_dim": rung.width,
             "train_tokens": weights * args.tokens_per_weight, "seed": seed}
    facts = train("train_gpt.py", f"ladder_{rung}_seed{seed}", knobs, flags)
    if math.isinf(facts["val_bpb"]):
        raise UserError(f"{rung} diverged, and would again; leave it out with --sizes, or lower the rates")
    return {"weights": str(weights), **{column: str(facts[column]) for column in COLUMNS}}


if __name__ == "__main__":
    main()
