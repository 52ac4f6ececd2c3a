"""The benchmarks run, on tiny inputs. Run: ./run.sh test tests/test_benchmarks.py"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measure(lab):
    """Runs a benchmark of the lab's copy and gives what it says."""
    shutil.copytree(ROOT / "benchmarks", lab / "benchmarks")

    def measure(name: str, *arguments: str) -> str:
        done = subprocess.run([sys.executable, f"benchmarks/{name}", *arguments], cwd=lab, text=True,
                              capture_output=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    return measure


def test_the_tokenizer_benchmark_compares_the_same_merges(measure):
    said = measure("tokenizer.py", "--source", "text.jsonl", "--vocabsize", "300", "--runs", "1",
                     "--num_workers", "1")
    assert "| 300 | benchtop |" in said


def test_the_tokenizing_benchmark_compares_the_same_tokens(measure, lab: Path):
    said = measure("tokenizing.py", "--source", "text.jsonl", "--tokenizer", "tiny_v300_n1073741824",
                     "--runs", "1", "--num_workers", "1")
    assert "times tiktoken's speed" in said and not list(lab.glob("data/benchmark*"))


def test_the_hellaswag_benchmark_compares_the_same_choices(measure, lab: Path):
    row = {"ctx": "the cat saw", "endings": ["a dog", "the big tree", "and", "sat"], "label": 0}
    (lab / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    said = measure("hellaswag.py", "--rows", "rows.jsonl", "--tokenizer", "tiny_v300_n1073741824",
                     "--rounds", "1")
    assert "times as fast" in said and "acc: the same choice in 3 of 3 rows" in said
