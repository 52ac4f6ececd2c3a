"""Knobs: a frozen dataclass read as command-line flags, and the knobs that every run has.

A field is a flag, the comment behind it is its help, a comment on a line of its own is a heading:

    @dataclass(frozen=True)
    class Config(RunConfig):
        # the model
        num_layers: int = 6           # transformer layers
        bias: bool = True             # --no_bias switches it off

RunConfig has the knobs of the run, the data and the machine. An experiment's Config inherits from it and adds
the knobs of its model, its optimizer and its budget (seq_len, batch_tokens, num_steps, ...).
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import io
import math
import re
import textwrap
import tokenize
import typing
from dataclasses import dataclass
from pathlib import Path

from benchtop.command_line import Parser, whole_number
from benchtop.errors import UserError
from benchtop.folder import find_run, require_script, saved_knobs
from benchtop.gpus import ACCELERATORS
from benchtop.held_out import TEST, VAL

if typing.TYPE_CHECKING:
    import torch


# what --help shows; --help all shows every knob
FIRST = ("preset", "data", "model_name", "seed", "num_layers", "model_dim", "train_tokens", "train_minutes",
         "batch_tokens", "save_model", "resume", "check", "smoke", "sample")


@dataclass(frozen=True)
class RunConfig:
    """The knobs that the bench reads; the comment behind a field is its help."""
    # the run
    model_name: str = "gpt"           # last part of the run folder's name
    preset: str = ""                  # a named set of knobs; explicit flags override it
    seed: int = 0                     # seed of the weights, the order of the data and the samples
    check: bool = False               # only print what the run would do and whether it can start
    smoke: bool = False               # only check this script for about 20 seconds, on tiny random data
    sample: str = ""                  # folder of a run with --save_model: only generate text from its weights
    prompt: str = ""                  # prompt for --sample; without one, prompts are read from the terminal
    # the data
    data: str = ""                    # folder in data/; empty: the only one (that uses --tokenizer)
    tokenizer: str = ""               # folder in tokenizers/; empty: the one the data was made with
    vocab_size: int = 0               # 0: the tokenizer's; any other number must equal it
    # stopping and resuming
    resume: str = ""                  # folder of a run to resume; auto: newest unfinished one of --model_name
    resume_changed: bool = False      # resume although code, data or knobs have changed since the run began
    save_every_steps: int = 0         # steps between checkpoints; 0: only by time, validation and stop signal
    save_every_minutes: float = 10    # minutes between checkpoints; 0: none by time
    # watching the run
    log_every: int = 10               # steps between rows of metrics.csv
    val_every: int = 0                # steps between validations; 0: ten per run
    val_tokens: int = 0               # held-out tokens to validate on; 0: all
    held_out: str = "val"             # split to validate on; test is for trial.py --confirm alone
    benchmarks: str = "hellaswag"     # to score if downloaded: hellaswag, arc_easy, piqa, lambada; or all
    hellaswag_rows: int = 0           # rows of HellaSwag to score, a fixed subset; 0: all 10,042
    num_samples: int = 4              # texts to sample at the end
    sample_tokens: int = 64           # length of each sample in tokens
    temperature: float = 0.8          # sampling temperature; 0 takes the likeliest token
    top_k: int = 50                   # sample from this many of the likeliest tokens; 0: from all
    save_model: bool = False          # keep the weights as model.safetensors
    compare_to: str = ""              # folder or glob of runs; report the distance in standard deviations
    wandb: str = ""                   # project of Weights & Biases to log to; WANDB_MODE=offline works
    trackio: str = ""                 # project of Trackio to log to, on this machine
    tensorboard: bool = False         # write event files for TensorBoard into the run folder
    gpu_cost_per_hour: float = 0      # price of all GPUs (or the box) per hour, for the cost in summary.json
    # the machine
    device: str = "auto"              # cpu, cuda, mps, xpu, or auto: a GPU that torch can use, else the cpu
    dtype: str = "auto"               # bfloat16, float16, float32, or auto: what the hardware does natively
    compile: str = "auto"             # on, off, or auto: on where torch.compile works
    micro_batch_tokens: int = 0       # most tokens per process and forward pass; 0: as many as memory allows
    peak_tflops: float = 0            # peak of one device, for the MFU; 0: from a table (no MFU if unlisted)
    by_speed: bool = False            # derive size, batch and val_tokens, where 0, from measured_tflops
    measured_tflops: float = 0        # total speed in large matrix products, for --by_speed; 0: measure it
    deterministic: bool = False       # only bit-reproducible kernels, as on CPUs; slower on a GPU
    timeout_seconds: float = 600      # exit if another process is silent for this long

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            kind, value = kinds[field.name], getattr(self, field.name)
            fits = isinstance(value, (int, float) if kind is float else kind)
            self.require(field.name, fits and not (kind is not bool and isinstance(value, bool)),
                         f"of type {kind.__name__}")
            self.require(field.name, isinstance(value, str) or abs(value) < 2**53, "less than 2**53")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.model_name):
            raise UserError("--model_name must be 1 to 100 letters, digits, '.', '_' and '-', the first a "
                            f"letter or digit, since it names a folder; it is {self.model_name!r}")
        for knob, allowed in (("device", ("auto", "cpu", *ACCELERATORS)), ("compile", ("auto", "on", "off")),
                              ("dtype", ("auto", "bfloat16", "float16", "float32")),
                              ("held_out", (VAL, TEST)),
                              ("preset", ("", *self.presets()))):
            self.require(knob, getattr(self, knob) in allowed, f"one of {', '.join(filter(None, allowed))}")
        self.require_at_least(0, "seed", "save_every_steps", "save_every_minutes", "val_every", "val_tokens",
                              "vocab_size", "hellaswag_rows", "num_samples", "sample_tokens", "temperature",
                              "top_k", "gpu_cost_per_hour", "micro_batch_tokens", "peak_tflops",
                              "measured_tflops")
        self.require_at_least(1, "log_every")
        self.require("timeout_seconds", 0 < self.timeout_seconds <= 10**7, "above 0 and at most 10,000,000")
        self.require("sample_tokens", self.sample_tokens > 0 or not self.num_samples, "above 0 for samples")

    def require(self, knob: str, holds: bool, rule: str) -> None:
        """raises  UserError that names the knob, the rule and the value, unless the rule holds"""
        if not holds:
            raise UserError(f"--{knob} must be {rule}; it is {getattr(self, knob)!r}")

    def require_at_least(self, least: float, *knobs: str) -> None:
        for knob in knobs:
            self.require(knob, getattr(self, knob) >= least, f"{least} or more")

    def require_fraction(self, *knobs: str) -> None:
        for knob in knobs:
            self.require(knob, 0 <= getattr(self, knob) <= 1, "between 0 and 1")

    def fill(self, **values) -> None:
        """Set those of these knobs that are 0 to the given values; only while the Config is being made."""
        for knob, value in values.items():
            if not getattr(self, knob):
                object.__setattr__(self, knob, value)

    @classmethod
    def presets(cls) -> dict[str, dict]:
        """The knobs that each --preset sets; an experiment overrides this."""
        return {}

    @classmethod
    def names(cls) -> set[str]:
        return {field.name for field in dataclasses.fields(cls)}

    @classmethod
    def preset_knobs(cls, preset: str) -> dict:
        """The knobs that a preset sets, as far as this Config has them."""
        return {knob: value for knob, value in cls.presets().get(preset, {}).items() if knob in cls.names()}

    def with_size(self) -> "RunConfig":
        """The Config with the size that --by_speed derives from measured_tflops; an experiment's own rule."""
        return self

    def with_budget(self, epoch_tokens: int) -> "RunConfig":
        """The Config with the budget for epochs of this many tokens; an experiment's own rule."""
        return self

    def require_vocabulary(self, tokenizer: str, size: int) -> None:
        """raises  UserError if the preset or --vocab_size asks for a size other than the tokenizer's"""
        if self.vocab_size in (0, size):
            return
        if self.preset and self.preset_knobs(self.preset).get("vocab_size") == self.vocab_size:
            raise UserError(f"--preset {self.preset} is for a tokenizer of {self.vocab_size:,} tokens, and "
                            f"{tokenizer} has {size:,}; make its data and tokenizer with: "
                            f"./run.sh {self.preset}")
        raise UserError(f"--vocab_size must be {size}, the size of tokenizer {tokenizer} with <|endoftext|>; "
                        f"it is {self.vocab_size}")

    def require_machine(self, device: "torch.device", dtype: "torch.dtype") -> None:
        """raises  UserError if this machine cannot train with these knobs; an experiment's own check"""

    def remarks(self) -> list[str]:
        """Lines for the log about the knobs."""
        return []

    @property
    def padded_vocab_size(self) -> int:
        """Columns of the head: a multiple of 64, for faster products; extra columns are never predicted."""
        return 64 * math.ceil(self.vocab_size / 64)

    @property
    def rows_per_step(self) -> int:
        return self.batch_tokens // self.seq_len


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

def parse_config(argv: list[str], config: type[RunConfig], script: Path | None = None) -> RunConfig:
    """The Config from defaults, overridden by the preset, overridden by the flags.

    With --sample or --resume, the knobs of that run replace the defaults.

    script  that is running, which must be the one that trained the run to sample from; None: any
    """
    flags = vars(parser_of(config).parse_args(argv))
    if flags.get("train_tokens") and flags.get("num_steps"):
        raise UserError(f"--train_tokens {flags['train_tokens']} and --num_steps {flags['num_steps']} "
                        "are two budgets; give one of them")
    # --train_tokens overrides num_steps and batch_tokens of a preset or of the resumed run, but not as flags
    dropped = {"num_steps", "batch_tokens"} - {*flags} if "train_tokens" in flags else set()
    preset = config.preset_knobs(flags.get("preset", ""))
    knobs = {knob: value for knob, value in preset.items() if knob not in dropped} | flags
    if "sample" in knobs:
        # the run's own values of these knobs are not needed for its weights; CPUs decode fastest in float32
        folder = Path(knobs["sample"])
        if script:
            require_script(folder, script.name)
        own = known_knobs(folder, config)
        here = {"device": "auto", "dtype": "float32", "compile": "off", "resume": "",
                "num_samples": 1, "sample_tokens": 256, "seed": 0}
        return config(**own | here | knobs)
    if "resume" not in knobs:
        return config(**knobs)
    folder = find_run(knobs["resume"], knobs.get("model_name", config.model_name))
    saved = known_knobs(folder, config) if folder else {}
    saved = {knob: value for knob, value in saved.items() if knob not in dropped}
    return config(**{**saved, **knobs, "resume": str(folder or "")})


def known_knobs(folder: Path, config: type[RunConfig]) -> dict:
    """The saved knobs of a run, as far as this Config still has them."""
    return {knob: value for knob, value in saved_knobs(folder).items() if knob in config.names()}


def parser_of(config: type[RunConfig]) -> argparse.ArgumentParser:
    """A parser with a flag for each field, under the headings of the source; the experiment's come first."""
    def layout(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=31, width=110)
    parser = Parser("Train a model. Each flag is a field of Config in the script, or of RunConfig in "
                    "benchtop/knobs.py, with its default in [].",
                    usage="%(prog)s [--KNOB VALUE ...]", formatter_class=layout)
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d)[\d._]*([eE][-+]?\d+)?$")     # -1e-3 is no flag
    kinds = typing.get_type_hints(config)
    headings, helps = comments_of(config)
    groups = {}
    for field in sorted(dataclasses.fields(config), key=lambda field: (field.name in RunConfig.names())):
        heading = headings.get(field.name, "other knobs")
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        default = f" [{field.default}]" if field.default not in ("", False) else ""
        values = f"{', '.join(config.presets())}: " if field.name == "preset" and config.presets() else ""
        text = (values + helps.get(field.name, "") + default).strip().replace("%", "%%")
        action = add_flag(groups[heading], field, kinds[field.name], text)
        if field.name not in FIRST:
            parser.seldom.append(action)
    return parser


class Switch(argparse.Action):
    """A flag without a value: --x is True, --no_x and --no-x are False."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


def add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field, kind: type, text: str,
             ) -> argparse.Action:
    """Add the flag of a field; --help shows --no_X only for switches that are on by default.

    raises  UserError if the field is not int, float, str or bool
    """
    name, common = f"--{field.name}", {"dest": field.name, "default": argparse.SUPPRESS}
    if kind is bool:
        off = [f"--no_{field.name}", f"--no-{field.name}"]
        shown, hidden = ([name, *off], []) if field.default else ([name], off)
        action = group.add_argument(*shown, action=Switch, nargs=0, help=text, **common)
        if hidden:
            group.add_argument(*hidden, action=Switch, nargs=0, help=argparse.SUPPRESS, **common)
    elif kind in (int, float, str):
        action = group.add_argument(name, type=whole_number if kind is int else kind,
                                    metavar=kind.__name__.upper(), help=text, **common)
    else:
        raise UserError(f"the knob {field.name} is of type {kind}; it must be int, float, str or bool")
    return action


@functools.cache
def comments_of(config: type[RunConfig]) -> tuple[dict[str, str], dict[str, str]]:
    """The heading above each field in the source of its class, and the comment behind it, if any."""
    headings, helps = {}, {}
    for part in reversed(config.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        source = ""
        with contextlib.suppress(OSError, TypeError):       # no source file: flags without help
            source = textwrap.dedent(inspect.getsource(part))
        heading, field = "", ""
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            alone = token.line.lstrip().startswith("#")
            if token.type == tokenize.COMMENT and alone:
                heading = heading if token.string.startswith("# EDIT") else token.string.lstrip("# ")
            elif token.type == tokenize.COMMENT and field:
                helps[field] = token.string.lstrip("# ")
            elif token.type == tokenize.NAME and (name := re.match(r" {4}(\w+):", token.line)):
                if field != name[1]:
                    field = name[1]
                    headings[field] = heading or headings.get(field, "other knobs")
                    helps.pop(field, None)
            elif token.type == tokenize.NAME and re.match(r" {4}(def|@|class)\b", token.line):
                break
    return headings, helps
