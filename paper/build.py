"""Generate a paper's tables, figures and constants from runs and code, and build paper/paper.pdf.

    ./run.sh paper                       the paper of the committed experiments
    python paper/build.py --no_pdf       only paper/made/: tables, figures, constants

paper.tex is yours to write. TABLES and FIGURES below name the runs that it shows. Constants in the text are
written \\fact{...} and read from the code: the build stops if one is not found, so the appendix cannot
describe what the code does not do. It also stops if a different version of train_gpt.py made the runs, so
that method and results belong to the same program; changes to comments and docstrings do not count.
"""

import ast
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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from benchtop import documents, held_out, places
from benchtop.budget import MOST_EPOCHS
from benchtop.command_line import Parser, command
from benchtop.conclusions import compare, p_in_words
from benchtop.curves import as_bytes
from benchtop.errors import UserError
from benchtop.files import sha256_of
from benchtop.groups import PERSONAL_KNOBS, Group, SavedRun, check_comparable, open_groups
from benchtop.tables import as_latex, groups_table, in_latex
from train_gpt import PRESETS, Config

HERE = Path(__file__).resolve().parent
MADE = HERE / "made"
SCRIPT = "train_gpt.py"     # the appendix describes this script
REMEDY = "run it again, or take it out of TABLES in paper/build.py"

# tables of the paper: name -> (groups as compare.py takes them, conditions for --although)
TABLES = {"example": (["squared ReLU=relu2", "GELU=gelu"], [])}
# figures: name of a table -> the x axis of its curves
FIGURES = {"example": "tokens"}
ALL_THE_TEXT = 2**53        # tokens of data, so many that no budget reaches an epoch


def tables() -> dict[str, str]:
    """File name -> LaTeX. For each table: means, spreads and intervals of the groups; differences of other
    groups from the first; and the knobs that the runs set.

    raises  NotComparable if compare.py would refuse; UserError if the appendix describes another program
    """
    made = {}
    for name, (specs, although) in TABLES.items():
        groups = open_groups(specs)
        for run in (run for group in groups for run in group.finished):
            if run.summary.get("script") == SCRIPT:
                require_described(run)
        check_comparable(groups, "val_bpb", although)
        made[f"{name}_knobs.tex"] = as_latex(knobs_table(groups)) + "\n"
        made[f"{name}.tex"] = as_latex(groups_table(groups)) + "\n"
        lines = [["against " + groups[0].name, "difference", "95 % interval", "test", "p"]]
        for group in groups[1:]:
            compared = compare(groups[0], group, "val_bpb")
            if test := compared.test:
                kind = "paired" if compared.paired else "Welch"
                lines.append([group.name, f"{test.mean:+.4f}", f"{test.low:+.4f} to {test.high:+.4f}", kind,
                              p_in_words(test.p).removeprefix("p ").removeprefix("= ")])
        made[f"{name}_differences.tex"] = as_latex(lines) + "\n"
    return made


def require_described(run: SavedRun) -> None:
    """raises  UserError unless the script that made the run is today's, comments and docstrings aside"""
    today, sha256 = places.ROOT / SCRIPT, run.summary.get("code_sha256")
    if sha256 == sha256_of(today):
        return
    candidates = [folder / Path(SCRIPT).with_suffix(".txt") for folder in (run.folder, run.folder.parent)]
    copies = [path for path in candidates if path.is_file() and sha256_of(path) == sha256]
    if not copies:
        raise UserError(f"{run.name} was made by a different version of {SCRIPT}, and there is no copy of "
                        f"that version at {' or '.join(map(str, candidates))}; {REMEDY}")
    if program_of(copies[0]) != program_of(today):
        raise UserError(f"{run.name} was made by a different version of {SCRIPT} than the appendix describes "
                        f"(diff {copies[0]} {SCRIPT}); {REMEDY}")


def program_of(script: Path) -> str:
    """What a script computes: its syntax tree without docstrings."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


def knobs_table(groups: list[Group]) -> list[list[str]]:
    """Rows of the knobs that any group sets, except those that do not affect a result (PERSONAL_KNOBS)."""
    defaults = dataclasses.asdict(Config())
    sets = [defaults, *(group.finished[0].knobs for group in groups)]
    knobs = [knob for knob in dict.fromkeys(knob for values in sets for knob in values)
             if knob not in PERSONAL_KNOBS and any(values.get(knob) != sets[0].get(knob) for values in sets)]
    return [["knob", "default", *(group.name for group in groups)],
            *([knob, *(in_table(values.get(knob)) for values in sets)] for knob in knobs)]


def in_table(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "none" if value in ("", None) else str(value)


def number(value: float) -> str:
    """A value in LaTeX: 524,288, 0.05, 10^{-10}; strings are escaped."""
    if isinstance(value, str | bool):
        return in_latex(value)
    if isinstance(value, int):
        return f"{value:,}"
    digits, _, power = f"{value:g}".partition("e")
    times = "" if digits == "1" else rf"{digits} \cdot "
    return f"{times}10^{{{int(power)}}}" if power else digits


def constants(function: Callable, pattern: str) -> list[str]:
    """What the groups of a pattern match in the source code of a function.

    raises  UserError unless the pattern matches exactly once
    """
    found = re.findall(pattern, inspect.getsource(function))
    if len(found) != 1:
        raise UserError(f"paper/build.py looks for {pattern} in {function.__qualname__} and finds it "
                        f"{len(found)} times; the appendix describes code that has changed")
    return [found[0]] if isinstance(found[0], str) else list(found[0])


def exponent(value: Callable[[Config], float], knob: str, base: Config) -> str:
    """The exponent of a knob in a scaling rule, from the rule's values at this knob and at twice it."""
    doubled = dataclasses.replace(base, **{knob: 2 * getattr(base, knob)})
    power = math.log2(value(doubled) / value(base))
    near = Fraction(power).limit_denominator(20)
    return str(near) if abs(near - power) < 1e-6 else f"{power:.3f}"


def facts() -> dict[str, str]:
    """Name of a fact -> its text, read from the code and from the runs of the tables."""
    cfg = dataclasses.replace(Config(), vocab_size=256)
    made = {f"knob.{field.name}": number(getattr(cfg, field.name)) for field in dataclasses.fields(Config)}
    made |= {f"demo.{knob}": number(value) for knob, value in PRESETS["demo"].items()}
    made |= facts_of_model(cfg) | facts_of_optimizer() | facts_of_rules(cfg) | facts_of_data(cfg)
    return made | facts_of_runs()


def facts_of_runs() -> dict[str, str]:
    """How many held-out documents and tokens the runs of each table were validated on."""
    summaries = {name: open_groups(specs)[0].finished[0].summary for name, (specs, _) in TABLES.items()}
    return {f"{name}.{fact}": number(summary.get(f"held_out_{fact}", "an unknown number of"))
            for name, summary in summaries.items() for fact in ("documents", "tokens")}


def facts_of_model(cfg: Config) -> dict[str, str]:
    model = train_gpt.GPT(cfg, cfg.vocab_size - 1)
    layer = model.requires_grad_(False).layers[0]
    frequencies = model.frequencies(torch.device("cpu"))
    rotating = frequencies[frequencies > 0]
    stream, embedding = layer.stream_mix.tolist()
    own, table = layer.value_mix.tolist()
    largest = max(float(part.abs().max()) for part in (layer.out, layer.down, model.head, model.smear))
    return {"norm.eps": number(float(constants(train_gpt.rms_norm, r"eps=(\S+)\)")[0])),
            "rotary.slowest": number(round(1 / float(rotating.min()))),
            "rotary.fastest": number(round(float(rotating.max()), 4)),
            "rotary.rotating": number(len(rotating)), "rotary.pairs": number(len(frequencies)),
            "model.head_dim": number(cfg.head_dim),
            "model.head_multiple": number(dataclasses.replace(cfg, vocab_size=1).padded_vocab_size),
            "init.stream": number(stream), "init.embedding": number(embedding),
            "init.own_values": number(own), "init.table_values": number(table), "init.added": number(largest),
            "init.matrices": number(round(float(layer.up.std()) * math.sqrt(cfg.model_dim), 2)),
            "init.embed": number(round(float(model.embed.std()), 1))}


def facts_of_optimizer() -> dict[str, str]:
    optimizer, iterations = train_gpt.Optimizer, train_gpt.newton_schulz
    a, b, c = constants(iterations, r"a, b, c = ([-\d.]+), ([-\d.]+), ([-\d.]+)\n")
    first, climb, steps = constants(
        optimizer.muon_step, r"momentum = ([\d.]+) \+ ([\d.]+) \* min\(1, \(self.steps_done - 1\) / (\d+)\)")
    beta1, beta2 = optimizer.betas
    return {"muon.a": a, "muon.b": b, "muon.c": c,
            "muon.steps": number(inspect.signature(iterations).parameters["steps"].default),
            "muon.momentum_first": first, "muon.momentum_last": number(float(first) + float(climb)),
            "muon.momentum_steps": steps, "adam.beta1": number(beta1), "adam.beta2": number(beta2),
            "adam.eps": number(optimizer.eps)}


def facts_of_rules(cfg: Config) -> dict[str, str]:
    cfg = cfg.with_budget(ALL_THE_TEXT)
    made = {"rates.batch": number(int(constants(train_gpt.learning_rates, r"cfg.batch_tokens / (\d+)")[0])),
            "rates.width": constants(train_gpt.learning_rates, r"sqrt\((\d+) / cfg.model_dim\)")[0]}
    for group in ("matrices", "head"):
        def rate(cfg: Config, group: str = group) -> float:
            return train_gpt.learning_rates(cfg)[group]
        made[f"rates.{group}.batch"] = exponent(rate, "batch_tokens", cfg)
        made[f"rates.{group}.width"] = exponent(rate, "model_dim", cfg)
    batches = {millions: Config(train_tokens=millions * 10**6).with_budget(ALL_THE_TEXT).batch_tokens
               for millions in (1, 10, 100, 1000, 10_000)}
    made["batch.by_budget"] = ", ".join(f"{number(batch)} for {number(millions)} million"
                                        for millions, batch in batches.items())
    most, = constants(Config.with_budget, r"min\(([\d_]+), MOST_EPOCHS \* epoch_tokens\)")
    return made | {"budget.tokens": number(int(most)), "budget.epochs": number(MOST_EPOCHS)}


def facts_of_data(cfg: Config) -> dict[str, str]:
    return {"data.one_in": number(documents.HELD_OUT_ONE_IN), "data.row_limit": number(cfg.max_doc_len),
            "data.enough": number(held_out.ENOUGH_DOCUMENTS),
            "data.most_percent": number(100 * held_out.MOST_OF_TEXT)}


def as_macros(texts: dict[str, str]) -> str:
    r"""LaTeX that defines \fact{NAME}, which raises an error for an unknown name."""
    lines = [rf"\expandafter\def\csname fact-{name}\endcsname{{{text}}}" for name, text in texts.items()]
    lines.append(r"\newcommand{\fact}[1]{\ifcsname fact-#1\endcsname\csname fact-#1\endcsname"
                 r"\else\errmessage{there is no fact #1 in the code}\fi}")
    return "\n".join(lines) + "\n"


@command
def main() -> None:
    parser = Parser("Write a paper's tables, figures and constants, and make its PDF.")
    parser.add_argument("--no_pdf", action="store_true", help="do not run LaTeX")
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
        raise UserError("latexmk is needed to make the PDF; on Debian or Ubuntu: "
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
