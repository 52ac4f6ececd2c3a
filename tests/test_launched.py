"""What every script makes of torchrun's variables. Run: ./run.sh test tests/test_launched.py"""

import ast
import importlib
import sys
from itertools import combinations

import pytest
from launch import ROOT

from benchtop.errors import UserError
from benchtop.processes import TORCHRUNS, places_by_torchrun

WHOLE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0",
         "MASTER_PORT": "29500"}
PARTS = [names for count in range(1, len(WHOLE)) for names in combinations(WHOLE, count)]
SCRIPTS = [*sorted(path.stem for path in ROOT.glob("*.py")), "benchtop.sources"]
TRAINERS = ("train_gpt", "train_llama3", "train_nanogpt")


@pytest.fixture
def variables(monkeypatch):
    """Sets these variables of torchrun, and no others."""
    def only(values: dict[str, str]) -> None:
        for name in TORCHRUNS:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
    return only


def test_all_or_none_of_torchruns_variables_are_places(variables):
    variables({})
    assert places_by_torchrun() == (0, 1, 0, 1)
    variables(WHOLE)
    assert places_by_torchrun() == (3, 4, 1, 2)


def test_some_of_torchruns_variables_are_one_line(variables):
    for names in PARTS:
        variables({name: WHOLE[name] for name in names})
        with pytest.raises(UserError) as error:
            places_by_torchrun()
        said = str(error.value)
        assert said.endswith(f"start with torchrun, or unset them: unset {' '.join(names)}")
        assert f" without {', '.join(name for name in WHOLE if name not in names)}, which" in said


@pytest.mark.parametrize("change", [
    {"RANK": "x"}, {"RANK": ""}, {"RANK": "-1"}, {"RANK": "4"}, {"RANK": "1_0"}, {"RANK": "0"},
    {"RANK": "3.0"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "2"}, {"LOCAL_RANK": "first"},
    {"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_WORLD_SIZE": "5"}, {"MASTER_ADDR": ""}, {"MASTER_PORT": "http"},
    {"MASTER_PORT": "65536"}], ids=str)
def test_nonsense_in_torchruns_variables_is_one_line(variables, change):
    variables(WHOLE | change)
    (name, value), = change.items()
    with pytest.raises(UserError, match=rf"\b{name}={value}[ ,].*which never happens under torchrun; start"):
        places_by_torchrun()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_half_of_torchruns_variables(bench, variables, monkeypatch, script):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    main = module.main if script not in TRAINERS else module.EXPERIMENT.main
    for some in ({"RANK": "1"}, {"LOCAL_RANK": "x"}, {"WORLD_SIZE": "2"}, {"RANK": "5", "WORLD_SIZE": "2"}):
        variables(some)
        with pytest.raises(SystemExit) as end:
            main()
        said = end.value.code
        assert said.startswith(f"{script}.py: error: the environment has {next(iter(some))}=")
        assert "\n" not in said
    assert not list(bench.iterdir())


def test_nobody_else_reads_torchruns_variables():
    """But for LOCAL_RANK, which tells who speaks, and LOCAL_WORLD_SIZE, by which cores are shared."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchtop/*.py")]:
        texts = {node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Constant)}
        found = texts & set(TORCHRUNS)
        assert path.name == "processes.py" or found <= {"LOCAL_RANK", "LOCAL_WORLD_SIZE"}, (path.name, found)
