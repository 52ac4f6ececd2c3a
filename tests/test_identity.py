"""What made a result is kept beside it, and what changed since is named.

Run: ./run.sh test tests/test_identity.py
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch

import benchtop
from benchtop import identity, places
from benchtop.briefing import describe_git
from benchtop.errors import UserError
from benchtop.identity import Origin, bench_sha256, changes_since, identity_of

BENCH = Path(benchtop.__file__).parent
BYTES = tiktoken.Encoding("bytes", pat_str="(?s).", special_tokens={"<|endoftext|>": 256},
                          mergeable_ranks={bytes([byte]): byte for byte in range(256)})
WORLD = SimpleNamespace(dtype_reason="", is_main=True, device=SimpleNamespace(type="cpu"),
                        facts=lambda: {"device": "a CPU", "dtype": "float32", "processes": 1})
DATASET = SimpleNamespace(folder=Path("data/tiny"), sha256="of the data")


@dataclass(frozen=True)
class Knobs:
    model_name: str = "mine"
    preset: str = ""
    seed: int = 0
    lr: float = 0.1
    resume: str = ""
    resume_changed: bool = False
    timeout_seconds: float = 600


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A root with two scripts that this process runs, mine.py and helper.py, and one that it does not."""
    monkeypatch.setattr(places, "ROOT", tmp_path)
    monkeypatch.setattr(places, "TOKENIZERS", tmp_path / "tokenizers")
    (tmp_path / "idle.py").write_text("")
    for name in ("mine", "helper"):
        path = tmp_path / f"{name}.py"
        path.write_text(f"NAME = '{name}'\n")
        spec = importlib.util.spec_from_file_location(f"{name}_of_{tmp_path.name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, spec.name, module)
    return tmp_path


@pytest.fixture
def bench(root, monkeypatch) -> Path:
    """A bench of two files, to change."""
    folder = root / "benchtop"
    folder.mkdir()
    for name in ("batches.py", "run.py"):
        (folder / name).write_text(f"# {name}\n")
    monkeypatch.setattr(identity, "BENCH", folder)
    return folder


def facts(cfg: Knobs = Knobs()) -> dict:
    return identity_of(places.ROOT / "mine.py", cfg, WORLD, BYTES, DATASET)


def write(folder: Path, step: int, cfg: Knobs = Knobs()) -> None:
    folder.mkdir(exist_ok=True)
    Origin(cfg, facts(cfg), BYTES).write(folder, step)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------
# Hashes
# ------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_the_hash_of_the_bench_is_the_one_that_a_shell_gives(root):
    said = subprocess.run("sha256sum *.py | sha256sum", shell=True, cwd=BENCH, capture_output=True, text=True,
                          env=os.environ | {"LC_ALL": "C"}).stdout
    found = facts()
    assert said.split()[0] == found["bench_sha256"]
    assert set(found["bench"]) == {path.name for path in BENCH.glob("*.py")} >= {"__init__.py", "run.py"}


def test_every_name_and_every_content_of_the_bench_counts(bench):
    hashes = {facts()["bench_sha256"]}
    (bench / "run.py").write_text("# run.py, changed\n")
    hashes.add(facts()["bench_sha256"])
    (bench / "run.py").rename(bench / "walk.py")
    hashes.add(facts()["bench_sha256"])
    (bench / "more.py").write_text("")
    hashes.add(facts()["bench_sha256"])
    assert len(hashes) == 4
    some = bench_sha256({"a": "1", "b": "2"})
    assert some == bench_sha256({"b": "2", "a": "1"}) != bench_sha256({"a": "2", "b": "1"})


def test_sources_are_the_scripts_that_this_process_runs(root):
    found = facts()
    assert set(found["sources"]) == {"mine.py", "helper.py"}
    assert found["script"] == "mine.py" and found["code_sha256"] == found["sources"]["mine.py"]
    (root / "mine.py").write_text("NAME = 'other'\n")
    assert facts()["code_sha256"] != found["code_sha256"]
    assert facts()["bench_sha256"] == found["bench_sha256"]


def test_a_script_elsewhere_is_refused_in_one_line(root, tmp_path_factory):
    with pytest.raises(UserError, match=rf"far.py must lie in {root}, beside benchtop/"):
        identity_of(tmp_path_factory.mktemp("elsewhere") / "far.py", Knobs(), WORLD, BYTES, DATASET)


def about_git() -> tuple:
    found = facts()
    return found["git_commit"], found["git_dirty"], found["git_problem"]


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True,
                   capture_output=True)


def test_an_edited_tree_is_dirty_and_one_without_git_is_not_known(root, monkeypatch):
    assert facts()["git_commit"] is None and facts()["git_dirty"] is None     # no repository
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "all")
    assert len(facts()["git_commit"]) == 40 and facts()["git_dirty"] is False
    (root / "mine.py").write_text("NAME = 'edited'\n")
    assert facts()["git_dirty"] is True
    write(root / "run", 0)
    assert "+NAME = 'edited'" in (root / "run/git.diff").read_text()
    monkeypatch.setenv("PATH", "")
    assert facts()["git_commit"] is None and facts()["git_dirty"] is None     # no git
    assert Origin(Knobs(), facts(), BYTES).texts["git.diff"] == ""


@pytest.mark.parametrize(("way", "reason"), [
    ("no repository", "not a git repository"), ("dubious ownership", "dubious ownership"),
    ("no commit", "Needed a single revision"),
    ("another repository", "git does not track helper.py or mine.py"),
    ("no git", "git cannot be started: No such file or directory")])
def test_where_git_knows_nothing_the_reason_is_kept_and_said(root, monkeypatch, way, reason):
    monkeypatch.setenv("LC_ALL", "C")
    if way == "another repository":     # such as that of a home folder, which ignores all this
        (root / ".gitignore").write_text("*\n!.gitignore\n")
    if way != "no repository":
        git(root, "init")
        git(root, "add", ".")
    if way not in ("no repository", "no commit"):
        git(root, "commit", "-m", "all")
    if way == "dubious ownership":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    if way == "no git":
        monkeypatch.setenv("PATH", "")
    commit, dirty, problem = about_git()
    assert commit is None and dirty is (True if way == "no commit" else None)
    assert reason in problem and problem in " ".join(describe_git(facts()))
    assert Origin(Knobs(), facts(), BYTES).texts["git.diff"] == ""


def test_variables_of_another_repository_change_nothing(root, monkeypatch, tmp_path):
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "all")
    wanted, diff = about_git(), Origin(Knobs(), facts(), BYTES).texts["git.diff"]
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    assert about_git() == wanted and wanted[:2] != (None, None)
    assert Origin(Knobs(), facts(), BYTES).texts["git.diff"] == diff


def test_a_script_that_git_ignores_is_no_clean_one(root):
    (root / ".gitignore").write_text("mine.py\n")
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "all")
    commit, dirty, problem = about_git()
    assert len(commit) == 40 and dirty is True and problem is None and describe_git(facts()) == []


def test_a_summary_has_the_gpus_driver_and_clocks_where_the_run_is_on_them(root, monkeypatch):
    here = [{"name": "NVIDIA A10", "driver": "535.183.01"}]
    monkeypatch.setattr(identity, "nvidia_gpus", lambda: here)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for device, is_main, wanted in (("cpu", True, []), ("cuda", True, here), ("cuda", False, [])):
        monkeypatch.setattr(WORLD, "device", SimpleNamespace(type=device))
        monkeypatch.setattr(WORLD, "is_main", is_main)      # one of a machine's processes asks
        assert (facts()["gpus"], facts()["cuda"]) == (wanted, "12.8")


def test_other_gpus_and_drivers_are_no_change_for_a_run_that_goes_on(root):
    then = facts() | {"gpus": [{"name": "NVIDIA A10", "driver": "535.183.01"}], "cuda": "12.4"}
    assert changes_since({"config": asdict(Knobs()), "identity": then}, Knobs(), facts()) == []
    del then["gpus"], then["cuda"]      # as an earlier version left it
    assert changes_since({"config": asdict(Knobs()), "identity": then}, Knobs(), facts()) == []


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def test_a_run_keeps_the_code_that_ran_as_python_and_the_script_as_text(root):
    write(root / "run", 0)
    kept = contents(root / "run/code")
    wanted = {f"benchtop/{path.name}": path.read_text() for path in BENCH.glob("*.py")}
    assert kept == wanted | {name: (root / name).read_text() for name in ("mine.py", "helper.py")}
    names = {path.name for path in (root / "run").iterdir()}
    assert names == {"code", "mine.txt", "config.json", "git.diff", "requirements.txt", "meta.json"}
    assert (root / "run/mine.txt").read_text() == (root / "mine.py").read_text()
    assert json.loads((root / "run/meta.json").read_text())["name"] == "bytes"


def test_the_code_is_that_of_the_session_s_beginning(bench, root):
    origin = Origin(Knobs(), facts(), BYTES)
    (bench / "run.py").write_text("# edited while it trains\n")
    (root / "run").mkdir()
    origin.write(root / "run", 0)
    assert (root / "run/code/benchtop/run.py").read_text() == "# run.py\n"


def test_a_resumed_run_keeps_the_earlier_code_beside(bench, root):
    write(root / "run", 0)
    before = contents(root / "run")
    write(root / "run", 3)
    assert contents(root / "run") == before
    (bench / "run.py").write_text("# changed\n")
    (bench / "batches.py").unlink()
    write(root / "run", 6, Knobs(lr=0.2))
    now = contents(root / "run")
    assert now["code/benchtop/run.py"] == "# changed\n" and "code/benchtop/batches.py" not in now
    assert now["code_until_step_6/benchtop/run.py"] == "# run.py\n"
    assert now["code_until_step_6/benchtop/batches.py"] == "# batches.py\n"
    assert json.loads(now["config.json"])["lr"] == 0.2
    assert now["config_until_step_6.json"] == before["config.json"]
    assert "mine_until_step_6.txt" not in now and "requirements_until_step_6.txt" not in now
    (root / "mine.py").write_text("NAME = 'other'\n")
    write(root / "run", 9, Knobs(lr=0.2))
    now = contents(root / "run")
    assert now["mine_until_step_9.txt"] == now["code_until_step_9/mine.py"] == before["mine.txt"]
    assert now["mine.txt"] == now["code/mine.py"] == "NAME = 'other'\n"
    assert now["code_until_step_6/benchtop/run.py"] == "# run.py\n"     # neither is overwritten


def test_what_a_session_before_ran_stays_when_two_go_on_from_one_step(bench, root):
    write(root / "run", 0)
    for content in ("# second\n", "# third\n"):
        (bench / "run.py").write_text(content)
        write(root / "run", 6)
    now = contents(root / "run")
    assert now["code_until_step_6/benchtop/run.py"] == "# run.py\n"
    assert now["code/benchtop/run.py"] == "# third\n"


def test_a_session_that_was_killed_while_it_wrote_its_code_leaves_whole_folders(bench, root, monkeypatch):
    write(root / "run", 0)
    (bench / "run.py").write_text("# changed\n")
    real_replace = os.replace
    for calls in (0, 1):        # before the earlier folder is moved, and between the two moves
        made = []

        def replace(source, target, made=made, calls=calls):
            if Path(source).is_dir():
                if len(made) == calls:
                    raise KeyboardInterrupt
                made.append(target)
            real_replace(source, target)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", replace)
            write(root / "run", 6)
        kept = "code_until_step_6" if calls else "code"
        assert (root / "run" / kept / "benchtop/run.py").read_text() == "# run.py\n"
        assert not (root / "run/code").exists() or not calls
    (bench / "batches.py").unlink()     # what was left unfinished has it still
    write(root / "run", 6)
    now = contents(root / "run")
    assert now["code_until_step_6/benchtop/run.py"] == "# run.py\n"
    assert now["code/benchtop/run.py"] == "# changed\n" and "code/benchtop/batches.py" not in now
    assert not (root / "run/code.partial").exists()


def test_running_the_kept_code_does_not_make_it_other_code(root):
    write(root / "run", 0)
    cache = root / "run/code/benchtop/__pycache__"
    cache.mkdir()
    (cache / "run.cpython-311.pyc").write_bytes(b"\xff\x00")
    write(root / "run", 6)
    assert not (root / "run/code_until_step_6").exists() and cache.exists()


def test_secrets_reach_no_file(bench, root, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "supersecretvalue")
    (bench / "run.py").write_text("KEY = 'supersecretvalue'\n")
    (root / "mine.py").write_text("KEY = 'supersecretvalue'\n")
    write(root / "run", 0, Knobs(model_name="supersecretvalue"))
    found = contents(root / "run")
    assert not [name for name, text in found.items() if "supersecretvalue" in text]
    assert all("[MY_API_KEY]" in found[name]
               for name in ("code/benchtop/run.py", "code/mine.py", "mine.txt", "config.json"))
    write(root / "run", 6, Knobs(model_name="supersecretvalue"))
    assert not list((root / "run").glob("*until*"))


# ------------------------------------------------------------------------------------------------
# Changes
# ------------------------------------------------------------------------------------------------

def saved(cfg: Knobs = Knobs()) -> dict:
    return {"config": vars(cfg), "identity": facts(cfg)}


def test_nothing_changed_is_nothing_said(bench):
    assert changes_since(saved(), Knobs(), facts()) == []
    assert changes_since(saved(), Knobs(timeout_seconds=1, resume="run"), facts()) == []


def test_a_changed_bench_is_one_line_that_names_its_files(bench):
    then = saved()
    (bench / "run.py").write_text("# changed\n")
    assert changes_since(then, Knobs(), facts()) == ["the bench changed (run.py)"]
    (bench / "batches.py").unlink()
    (bench / "z.py").write_text("")
    assert changes_since(then, Knobs(), facts()) == ["the bench changed (batches.py, run.py, z.py)"]
    for name in "abcd":
        (bench / f"{name}.py").write_text("")
    assert changes_since(then, Knobs(), facts()) == [
        "the bench changed (a.py, b.py, batches.py, c.py, d.py and 2 more)"]


def test_knobs_scripts_data_and_dtype_are_named(bench, root):
    then = saved()
    (root / "mine.py").write_text("NAME = 'other'\n")
    now = facts() | {"data_sha256": "other", "dtype": "bfloat16"}
    now["sources"] = {"mine.py": now["sources"]["mine.py"], "new.py": "1"}
    assert changes_since(then, Knobs(lr=0.3), now) == [
        "--lr is 0.3, was 0.1", "the dtype is bfloat16, was float32", "the data changed",
        "helper.py is missing", "mine.py changed", "new.py is new"]


def test_a_checkpoint_of_an_earlier_version_has_another_bench(bench):
    then = saved()
    del then["identity"]["bench"], then["identity"]["bench_sha256"]
    assert changes_since(then, Knobs(), facts()) == ["the bench changed (batches.py, run.py)"]


def test_copies_that_git_does_not_know_have_the_commit_of_the_bench(root):
    """As every experiment has it: a copy of train_gpt.py, not committed yet."""
    (root / ".gitignore").write_text("mine.py\nhelper.py\n")
    (root / "benchtop").mkdir()
    (root / "benchtop/identity.py").write_text("")
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "all")
    commit, dirty, problem = about_git()
    assert len(commit) == 40 and dirty is True and problem is None
