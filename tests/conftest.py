"""What tests share: an empty Benchtop with its scripts, and one with a tokenizer and a data set."""

import json
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from launch import copy_scripts, run

import download_fineweb
import train_tokenizer
from benchtop import machine, places, sources, tokenizer

SCRIPTS = {"benchtop/sources.py": sources, "train_tokenizer.py": train_tokenizer,
           "download_fineweb.py": download_fineweb}

# a shell that starts the tests in the background, or nohup, has stop signals ignored, and they would stay so
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

machine.keep_kernels_by_cpu()       # also for tests that compile parts of a model by themselves

# The same examples in every run: what is red stays red. Fixtures may live through many examples, since each
# example writes its files anew.
settings.register_profile("benchtop", deadline=None, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("benchtop")


FIRST = ("test_each_command_of_the_pages_runs", "test_kills_at_any_moment_lose_nothing",
         "test_the_cells_run_one_after_the_other")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest, so that no process is busy with one of them when all else is done."""
    items.sort(key=lambda item: item.name not in FIRST)


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Path:
    """An empty Benchtop: the scripts write below this folder, and relative paths start there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "ROOT", tmp_path)
    monkeypatch.setattr(places, "TOKENIZERS", tmp_path / "tokenizers")
    monkeypatch.setattr(places, "DATA", tmp_path / "data")
    monkeypatch.setattr(places, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.setattr(tokenizer, "gpt2_if_at_hand", lambda: None)     # it comes from the internet
    return tmp_path


@pytest.fixture
def command(bench, monkeypatch):
    """Runs a script in this process: command("train_tokenizer.py --name mine")."""
    def run(line: str) -> None:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        SCRIPTS[sys.argv[0]].main()
    return run


@pytest.fixture
def refusal(command, capsys):
    """Runs a script that must refuse, and gives the one line that it says."""
    def run(line: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command(line)
        said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.strip()
        script = Path(line.split()[0]).name
        assert end.value.code and said.startswith(f"{script}: error: ") and "\n" not in said, said
        return said
    return run


@pytest.fixture
def shell(bench):
    """Runs a copy of a script in a process of its own, or only starts it: shell("train_tokenizer.py")."""
    copy_scripts(bench)

    def run(line: str, start: bool = False, **options):
        how = {"cwd": bench, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        arguments = [sys.executable, *shlex.split(line)]
        return subprocess.Popen(arguments, **how) if start else subprocess.run(arguments, timeout=60, **how)
    return run


@pytest.fixture
def pages(bench) -> list[str]:
    """400 short texts in several scripts, which also lie in pages.jsonl."""
    rng = random.Random(0)
    words = ["the", "bench", "Größe", "ёлка", "東京", "🙂", "42", "1000000", "don't", "\n\n", "   ", "--"]
    texts = [f"Page {number}: " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for number in range(400)]
    write_rows(bench / "pages.jsonl", texts)
    return texts


def write_rows(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(name="write_rows")
def _write_rows():
    """write_rows(path, texts) makes a .jsonl file of one row a text."""
    return write_rows


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Path:
    """A copy of the scripts with a tokenizer and a data set of 300 short documents."""
    folder = tmp_path_factory.mktemp("lab")
    copy_scripts(folder)
    rng = random.Random(0)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under",
             "mat", "tree", "and", "then", "saw", "big", "small"]
    rows = [{"text": " ".join(rng.choices(words, k=rng.randint(5, 120))) + "."} for _ in range(300)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(folder, "train_tokenizer.py", "--source", "text.jsonl", "--vocabsize", "300", "--name", "tiny",
        "--num_workers", "1")
    run(folder, "download_fineweb.py", "--version", "text.jsonl", "--tokenizer", "tiny", "--num_workers", "1",
        "--name", "tiny")
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """A module's tests in this process use one thread; more are slower on tiny tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_picture(monkeypatch) -> None:
    """Runs in this process draw no loss.png, which takes a quarter of a tiny run."""
    monkeypatch.setattr("benchtop.log.draw_loss", lambda *_: None)


@pytest.fixture
def here(lab, tmp_path, monkeypatch) -> Path:
    """The lab's data for code that runs in this process; run folders land in a folder of the test's own."""
    monkeypatch.setattr(places, "DATA", lab / "data")
    monkeypatch.setattr(places, "TOKENIZERS", lab / "tokenizers")
    monkeypatch.setattr(places, "EXPERIMENTS", tmp_path / "experiments")
    return tmp_path
