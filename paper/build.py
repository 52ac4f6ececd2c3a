"""Write a paper's tables, figures and constants from runs and code, and make paper/paper.pdf of them.

    ./run.sh paper                       what the committed experiments show
    python paper/build.py --no_pdf       only paper/made/: tables, figures, constants

paper.tex is yours to write. TABLES and FIGURES below say which runs it shows; compare.py makes them.
Constants in the text are \\fact{...}, read from train_gpt.py when this runs: one that is not found stops the
build, so the appendix cannot say what the code does not do.
"""

import dataclasses
import inspect
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import documents
import train_gpt
from compare import as_latex, check_comparable, compare, groups_table, open_groups, p_in_words
from curves import as_bytes
from documents import Parser, UserError, command
from train_gpt import PRESETS, Config

HERE = Path(__file__).resolve().parent
MADE = HERE / "made"

# what stands in the paper: a name, the groups as compare.py takes them, and what is allowed to differ
TABLES = {"yardsticks": (["train_gpt=yardstick_gpt", "train_nanogpt=yardstick_nanogpt",
                          "train_llama3=yardstick_llama3"], ["tokens"]),
          "example": (["squared ReLU=relu2", "GELU=gelu"], [])}
# and by what the curves of a table's groups are drawn
FIGURES = {"yardsticks": "time", "example": "tokens"}


def tables() -> dict[str, str]:
    """For each table its mean, spread and interval; and what the groups beside the first one differ by.

    raises  NotComparable where compare.py would refuse
    """
    made = {}
    for name, (specs, although) in TABLES.items():
        groups = open_groups(specs)
        check_comparable(groups, "val_bpb", although)
        made[f"{name}.tex"] = as_latex(groups_table(groups)) + "\n"
        lines = [["against " + groups[0].name, "difference", "95 % interval", "test", "p"]]
        for group in groups[1:]:
            compared = compare(groups[0], group, "val_bpb")
            if test := compared.test:
                kind = "paired" if compared.paired else "Welch"
                lines.append([group.name, f"{test.mean:+.4f}", f"{test.low:+.4f} to {test.high:+.4f}", kind,
                              p_in_words(test.p).removeprefix("p ")])
        made[f"{name}_differences.tex"] = as_latex(lines) + "\n"
    return made


def number(value: float) -> str:
    """A number as it stands in a text: 524,288, 0.05, 10^{-10}; words, too."""
    if isinstance(value, str | bool):
        return str(value).replace("_", r"\_")
    if isinstance(value, int):
        return f"{value:,}"
    digits, _, power = f"{value:g}".partition("e")
    times = "" if digits == "1" else rf"{digits} \cdot "
    return f"{times}10^{{{int(power)}}}" if power else digits


def constants(function: Callable, pattern: str) -> list[str]:
    """What stands in the code of a function where a pattern has its groups.

    raises  UserError if the code does not look like that, in exactly one place
    """
    found = re.findall(pattern, inspect.getsource(function))
    if len(found) != 1:
        raise UserError(f"paper/build.py looks for {pattern} in {function.__qualname__} and finds it "
                        f"{len(found)} times; the appendix describes code that has changed")
    return [found[0]] if isinstance(found[0], str) else list(found[0])


def exponent(value: Callable[[Config], float], knob: str, base: Config) -> str:
    """The power of a knob that a rule goes with, found by asking the rule twice."""
    doubled = dataclasses.replace(base, **{knob: 2 * getattr(base, knob)})
    power = math.log2(value(doubled) / value(base))
    near = Fraction(power).limit_denominator(20)
    return str(near) if abs(near - power) < 1e-6 else f"{power:.3f}"


def facts() -> dict[str, str]:
    """Name of a fact -> how it reads; all from the code as it is."""
    cfg = dataclasses.replace(Config(), vocab_size=256)
    made = {f"knob.{field.name}": number(getattr(cfg, field.name)) for field in dataclasses.fields(Config)}
    made |= {f"demo.{knob}": number(value) for knob, value in PRESETS["demo"].items()}
    return made | facts_of_model(cfg) | facts_of_optimizer() | facts_of_rules(cfg)


def facts_of_model(cfg: Config) -> dict[str, str]:
    model = train_gpt.GPT(cfg, 255)
    layer = model.requires_grad_(False).layers[0]
    _, sin = train_gpt.rotary_table(2, cfg.head_dim, "cpu")
    angles = sin[1].double().asin()     # of the second place, each its frequency
    turning = angles[angles > 0]
    stream, embedding = layer.stream_mix.tolist()
    own, table = layer.value_mix.tolist()
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)
    largest = max(float(part.abs().max()) for part in (layer.out, layer.down, model.head, model.smear))
    return {"norm.eps": number(float(constants(train_gpt.rms_norm, r"eps=(\S+)\)")[0])),
            "rotary.slowest": number(round(1 / float(turning.min()))),
            "rotary.fastest": number(round(float(turning.max()), 4)),
            "rotary.turning": number(len(turning)), "rotary.pairs": number(len(angles)),
            "model.head_dim": number(cfg.head_dim),
            "stage.first_depth": number(train_gpt.stage_at(cfg, 0, 0).depth),
            "stage.tokens_per_weight": number(train_gpt.most_early_tokens(cfg) / weights),
            "data.one_in": number(documents.HELD_OUT_ONE_IN), "data.row_limit": number(cfg.max_doc_len),
            "init.stream": number(stream), "init.embedding": number(embedding),
            "init.own_values": number(own), "init.table_values": number(table), "init.added": number(largest),
            "init.matrices": number(round(float(layer.up.std()) * math.sqrt(cfg.model_dim), 2)),
            "init.embed": number(round(float(model.embed.std()), 1))}


def facts_of_optimizer() -> dict[str, str]:
    optimizer, iterations = train_gpt.Optimizer, train_gpt.newton_schulz
    a, b, c = constants(iterations, r"a, b, c = ([-\d.]+), ([-\d.]+), ([-\d.]+)\n")
    first, climb, steps = constants(
        optimizer.step, r"momentum = ([\d.]+) \+ ([\d.]+) \* min\(1, self.steps_done / (\d+)\)")
    beta1, beta2 = optimizer.betas
    return {"muon.a": a, "muon.b": b, "muon.c": c,
            "muon.steps": number(inspect.signature(iterations).parameters["steps"].default),
            "muon.momentum_first": first, "muon.momentum_last": number(float(first) + float(climb)),
            "muon.momentum_steps": steps, "adam.beta1": number(beta1), "adam.beta2": number(beta2),
            "adam.eps": number(optimizer.eps)}


def facts_of_rules(cfg: Config) -> dict[str, str]:
    made = {"rates.batch": number(int(constants(train_gpt.learning_rates, r"cfg.batch_tokens / (\d+)")[0])),
            "rates.width": constants(train_gpt.learning_rates, r"sqrt\((\d+) / cfg.model_dim\)")[0]}
    for group in ("matrices", "head"):
        def rate(cfg: Config, group: str = group) -> float:
            return train_gpt.learning_rates(cfg)[group]
        made[f"rates.{group}.batch"] = exponent(rate, "batch_tokens", cfg)
        made[f"rates.{group}.width"] = exponent(rate, "model_dim", cfg)
    batches = {millions: Config(train_tokens=millions * 10**6).batch_tokens for millions in
               (1, 10, 100, 1000, 10_000)}
    made["batch.by_budget"] = ", ".join(f"{number(batch)} for {number(millions)} million"
                                        for millions, batch in batches.items())
    return made


def as_macros(texts: dict[str, str]) -> str:
    r"""\fact{NAME} in LaTeX; a name that is not there is an error."""
    lines = [rf"\expandafter\def\csname fact-{name}\endcsname{{{text}}}" for name, text in texts.items()]
    lines.append(r"\newcommand{\fact}[1]{\ifcsname fact-#1\endcsname\csname fact-#1\endcsname"
                 r"\else\errmessage{there is no fact #1 in the code}\fi}")
    return "\n".join(lines) + "\n"


@command
def main() -> None:
    parser = Parser("Write a paper's tables, figures and constants, and make its PDF.")
    parser.add_argument("--no_pdf", action="store_true", help="leave LaTeX alone")
    args = parser.parse_args()
    MADE.mkdir(exist_ok=True)
    for name, text in {**tables(), "facts.tex": as_macros(facts())}.items():
        (MADE / name).write_text(text, encoding="utf-8")
    for name, axis in FIGURES.items():
        (MADE / f"{name}.pdf").write_bytes(as_bytes(open_groups(TABLES[name][0]), axis, "val_bpb", "pdf"))
    print("wrote tables, figures and constants to paper/made", flush=True)
    if args.no_pdf:
        return
    if not shutil.which("latexmk"):
        raise UserError("there is no latexmk to make the PDF; on Debian or Ubuntu: "
                        "sudo apt install latexmk texlive-latex-recommended lmodern")
    done = subprocess.run(["latexmk", "-pdf", "-halt-on-error", "-interaction=nonstopmode", "-outdir=made",
                           "paper.tex"], cwd=HERE, capture_output=True, text=True, errors="replace")
    if done.returncode:
        wrong = [line for line in done.stdout.splitlines() if line.startswith("!")]
        raise UserError(f"LaTeX stopped: {wrong[0] if wrong else 'no message'}; see paper/made/paper.log")
    shutil.copyfile(MADE / "paper.pdf", HERE / "paper.pdf")
    print("wrote paper/paper.pdf")


if __name__ == "__main__":
    main()
