"""Knobs: the fields of a dataclass as flags, however they are written.

Run: ./run.sh test tests/test_knobs.py
"""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import ROOT

import train_gpt
import train_llama3
import train_nanogpt
from benchtop.command_line import Parser
from benchtop.errors import UserError
from benchtop.knobs import FIRST, RunConfig, comments_of, parse_config
from train_gpt import PRESETS, Config

SOURCE = '''
from dataclasses import dataclass, field
from typing import ClassVar

import train_gpt


@dataclass(frozen=True)
class Config(train_gpt.Config):
    """What is new.

    silent: int is no knob, since it stands in words
    """
    told_apart: ClassVar[int] = 3       # no knob either
    # EDIT: config
    bare: int = 5
    close: int=6 # one space before the sign
    # 100 % of a comment above
    under: float = -0.5
    far: float = 1              # help of the last one
    many: int = 1_000_000           # how many
    bias: bool = True           # whether to add it
    norm: bool = False          # whether to divide by it
    word: str = "a # b"         # what comes # after
    made: float = field(
        default=2.5)            # behind a parenthesis
    # of the run
    seed: int = 7               # another seed

    @property
    def late(self) -> int:
        later: int = 3          # no knob: a variable
        return later

    last: int = 8               # behind a method
'''


@pytest.fixture
def edited(tmp_path, monkeypatch) -> type[RunConfig]:
    """The Config of an experiment that somebody has edited."""
    return config_of(SOURCE, tmp_path, monkeypatch)


def config_of(source: str, folder: Path, monkeypatch) -> type[RunConfig]:
    (folder / "edited.py").write_text(source)
    spec = importlib.util.spec_from_file_location("edited", folder / "edited.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "edited", module)
    spec.loader.exec_module(module)
    return module.Config


def help_of(config: type[RunConfig], capsys) -> str:
    with pytest.raises(SystemExit):
        parse_config(["--help", "all"], config)
    return capsys.readouterr().out


def test_help_shows_what_people_use_and_says_where_the_rest_is(edited, capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(["--help"], edited)
    short = capsys.readouterr().out
    assert end.value.code == 0
    flags = re.findall(r"^  (--\w+)", short, re.MULTILINE)
    assert sorted(flags) == sorted(f"--{name}" for name in FIRST)
    hidden = int(re.search(r"--help all also shows the other (\d+) flags", short)[1])
    whole = help_of(edited, capsys)
    assert len(re.findall(r"^  (--\w+)", whole, re.MULTILINE)) == len(flags) + hidden == len(edited.names())
    with pytest.raises(SystemExit) as end:
        parse_config(["--help", "alll"], edited)
    assert end.value.code == 2 and "--help takes no value, or the word all" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# However they are written
# ------------------------------------------------------------------------------------------------

NEW = dict(bare=5, close=6, under=-0.5, far=1, many=10**6, bias=True, norm=False, word="a # b", made=2.5,
           last=8)


def test_every_field_is_a_flag_whatever_stands_beside_it(edited):
    assert {knob: getattr(parse_config([], edited), knob) for knob in NEW} == NEW
    for knob, value in NEW.items():
        if not isinstance(value, bool):
            given = "x y" if isinstance(value, str) else "3"
            for words in ([f"--{knob}", given], [f"--{knob}={given}"]):
                assert getattr(parse_config(words, edited), knob) == type(value)(given)


def test_the_comment_behind_a_field_is_its_help_and_one_alone_is_a_heading(edited, capsys):
    headings, helps = comments_of(edited)
    assert {knob: helps.get(knob) for knob in NEW} == dict(
        bare=None, close="one space before the sign", under=None, far="help of the last one", many="how many",
        bias="whether to add it", norm="whether to divide by it", word="what comes # after",
        made="behind a parenthesis", last=None)
    assert headings["bare"] == headings["close"] == "other knobs"
    assert headings["under"] == headings["far"] == headings["word"] == "100 % of a comment above"
    said = help_of(edited, capsys)
    for line in ("--bare INT  [5]", "--close INT one space before the sign [6]", "100 % of a comment above:",
                 "--under FLOAT [-0.5]", "--bias, --no_bias, --no-bias whether to add it [True]",
                 "--norm whether to divide by it", "--last INT [8]"):
        assert " ".join(line.split()) in " ".join(said.split())
    assert "no_norm" not in said and "no-norm" not in said
    assert "--told_apart" not in said and "--silent" not in said and "--later" not in said


def test_a_knob_that_is_there_already_has_its_new_default_help_and_place(edited, capsys):
    said = help_of(edited, capsys)
    assert said.count("--seed") == 1
    assert re.search(r"of the run:\n  --seed INT +another seed \[7\]", said)
    assert parse_config([], edited).seed == 7


def test_fields_are_knobs_where_there_is_no_source(capsys):
    """As of a Config that was typed in, or whose file is gone."""
    made = dataclasses.make_dataclass("Config", [("typed", int, 3)], bases=(Config,), frozen=True)
    assert parse_config(["--typed", "4"], made).typed == 4
    assert "--typed INT" in help_of(made, capsys)


@pytest.mark.parametrize(("words", "wanted"), [
    (["--under", "-2"], -2.0), (["--under", "-.5"], -0.5), (["--under", "-1e-3"], -0.001),
    (["--under", "-1E+3"], -1000.0), (["--under=-1e-3"], -0.001), (["--under", "1e-3"], 0.001),
    (["--bare", "-4"], -4), (["--bare", "-1e3"], -1000), (["--bare=-4"], -4),
    (["--bare", "1e6"], 10**6), (["--bare", "4_000_000"], 4_000_000), (["--bare", "-1_000"], -1000),
    (["--bare", "2.0"], 2)])
def test_numbers_are_taken_as_people_write_them(edited, words, wanted):
    value = getattr(parse_config(words, edited), words[0].split("=")[0].strip("-"))
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize("words", [["--vocabsize", "301"], ["--vocab_size", "301"], ["--vocabsize=301"],
                                   ["--vocab_size=301"]])
def test_a_flag_that_scripts_call_differently_is_taken_by_either_name(words, capsys):
    assert parse_config(words, Config).vocab_size == 301
    assert "--vocabsize" not in help_of(Config, capsys)
    parser = Parser("Learn.")
    parser.add_argument("--vocabsize", type=int)
    assert parser.parse_args(words).vocabsize == 301
    both = Parser("Cut.")
    both.add_argument("--source", nargs="+")
    for name in ("--source", "--version", "-v"):
        assert both.parse_args([name, "a", "b"]).source == ["a", "b"]
        assert both.parse_args([name, "a=--version"]).source == ["a=--version"]


@pytest.mark.parametrize("knob", ["bias", "norm"])
def test_a_switch_goes_on_and_off_and_the_last_word_counts(edited, knob):
    for off in (f"--no_{knob}", f"--no-{knob}"):
        for words, wanted in (([f"--{knob}"], True), ([off], False), ([f"--{knob}", off], False),
                              ([off, f"--{knob}"], True)):
            assert getattr(parse_config(words, edited), knob) is wanted
    assert "save_model" in PRESETS["demo"] and not parse_config(["--preset", "demo", "--no_save_model"],
                                                                Config).save_model


@pytest.mark.parametrize(("words", "message"), [
    (["--bare", "1.5"], "argument --bare: must be a whole number, not '1.5'"),
    (["--bare", "1e400"], "argument --bare: must be a whole number, not '1e400'"),
    (["--bare", "nan"], "argument --bare: must be a whole number, not 'nan'"),
    (["--bare"], "argument --bare: expected one argument"),
    (["--bare", "--norm"], "argument --bare: expected one argument"),
    (["--far", "fast"], "argument --far: invalid float value: 'fast'"),
    (["--bias", "False"], "unrecognized arguments: False"),
    (["--bas"], "there is no flag --bas; did you mean --bias?"),
    (["-1"], "there is no flag -1")])
def test_what_is_no_value_is_said_in_one_line(edited, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        parse_config(words, edited)
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(("line", "kind"), [
    ("plenty: list = ()", "<class 'list'>"), ("maybe: int | None = 3", "int | None"),
    ("pair: tuple[int, int] = (1, 2)", "tuple[int, int]")])
def test_a_field_of_another_type_is_refused_by_its_name(tmp_path, monkeypatch, line, kind):
    config = config_of(SOURCE.replace("bare: int = 5", line), tmp_path, monkeypatch)
    name = line.split(":")[0]
    with pytest.raises(UserError) as error:
        parse_config([], config)
    assert str(error.value) == f"the knob {name} is of type {kind}; it must be int, float, str or bool"


def test_a_default_of_another_type_than_its_field_is_refused_by_its_name(tmp_path, monkeypatch):
    config = config_of(SOURCE.replace("bare: int = 5", "bare: int = 5.5"), tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"--bare must be of type int; it is 5\.5"):
        parse_config([], config)
    assert parse_config(["--bare", "5"], config).bare == 5


@pytest.mark.parametrize("changes", [{"seed": True}, {"compile": 1}, {"save_model": 1}, {"seed": None},
                                     {"seed": "1"}])
def test_knobs_from_a_file_have_their_types(changes):
    (knob, _), = changes.items()
    with pytest.raises(UserError, match=f"--{knob} must be of type"):
        Config(**changes)


# ------------------------------------------------------------------------------------------------
# Those of the scripts
# ------------------------------------------------------------------------------------------------

SCRIPTS = (train_gpt, train_nanogpt, train_llama3)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_knob_is_a_flag_with_help(script, capsys):
    said = " ".join(help_of(script.Config, capsys).split())
    headings, helps = comments_of(script.Config)
    for field in dataclasses.fields(script.Config):
        assert f"--{field.name} " in said and " ".join(helps[field.name].split()) in said
        assert headings[field.name] != "other knobs"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_shows_the_knobs_of_the_experiment_first(script, capsys):
    shown = re.findall(r"^  --(\w+)", help_of(script.Config, capsys), re.MULTILINE)
    assert sorted(shown) == sorted(script.Config.names())
    of_the_run = [knob in RunConfig.names() for knob in shown]
    assert of_the_run == sorted(of_the_run) and 20 < sum(of_the_run) < len(shown)


def test_the_help_names_the_presets(capsys):
    said = " ".join(help_of(Config, capsys).split())
    assert f"--preset STR {', '.join(PRESETS)}: a named set of knobs" in said
    with pytest.raises(UserError, match=f"--preset must be one of {', '.join(PRESETS)}; it is 'xxl'"):
        parse_config(["--preset", "xxl"], Config)


def test_flags_win_over_a_preset_and_a_preset_over_defaults():
    cfg = parse_config(["--num_layers", "9", "--preset", "xs", "--save_model"], Config)
    assert (cfg.num_layers, cfg.seq_len, cfg.save_model) == (9, 1024, True)


@pytest.mark.parametrize("preset", [[], ["--preset", "xs"]])
def test_two_budgets_are_refused_by_their_names(preset):
    with pytest.raises(UserError, match="--train_tokens 1000000 and --num_steps 2 are two budgets; give one"):
        parse_config([*preset, "--train_tokens", "1e6", "--num_steps", "2"], Config)
    assert parse_config(["--train_tokens", "0", "--num_steps", "2"], Config).num_steps == 2


def test_a_run_goes_on_with_its_own_knobs_and_flags_win_over_them(tmp_path):
    folder = tmp_path / "20260101_000000_gpt"
    folder.mkdir()
    mine = dataclasses.asdict(Config(num_layers=3, muon_lr=0.125, save_model=True)) | {"of_old": 1}
    (folder / "config.json").write_text(json.dumps(mine))
    cfg = parse_config(["--resume", str(folder), "--muon_lr", "0.25"], Config)
    assert (cfg.num_layers, cfg.muon_lr, cfg.save_model) == (3, 0.25, True) and cfg.resume == str(folder)


def test_a_copy_of_the_script_has_its_own_knobs(tmp_path):
    """It stands beside the bench, and its help is read from its own text."""
    source = (ROOT / "train_gpt.py").read_text()
    copy = source.replace("class Config(CommonConfig):\n", "class Config(CommonConfig):\n    # mine\n"
                          "    slope: float = -1     # steepness, 50% or more\n    gate: bool = True\n")
    assert copy != source
    (tmp_path / "my_experiment.py").write_text(copy)
    (tmp_path / "benchtop").symlink_to(ROOT / "benchtop")
    done = subprocess.run([sys.executable, "my_experiment.py", "--help", "all"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"mine:\n  --slope FLOAT +steepness, 50% or more \[-1\]\n"
                     r"  --gate, --no_gate, --no-gate\n +\[True\]\n", done.stdout)
    assert done.stdout.index("mine:") < done.stdout.index("the run:")


@pytest.mark.parametrize(("flags", "complaint"), [
    (["--preset", "five-minutes"], "--preset five-minutes is for a tokenizer of 8,192 tokens, and demo has "
                                   "4,097; make its data and tokenizer with: ./run.sh five-minutes"),
    (["--preset", "five-minutes", "--vocab_size", "100"], "--vocab_size must be 4097, .*; it is 100"),
    (["--vocab_size", "8192"], "--vocab_size must be 4097, the size of tokenizer demo")])
def test_a_preset_whose_data_are_not_here_is_named_and_not_its_knob(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_config(flags, Config).require_vocabulary("demo", 4097)
    parse_config(["--preset", "five-minutes"], Config).require_vocabulary("climbmix", 8192)
