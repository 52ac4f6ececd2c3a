"""The benchmarks run, on tiny inputs. Run: ./run.sh test tests/test_benchmarks.py"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import ROOT, flags, newest, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measure(lab):
    """Runs a benchmark of the lab's copy and gives what it says."""
    shutil.copytree(ROOT / "benchmarks", lab / "benchmarks")

    def measure(name: str, *arguments: str) -> str:
        done = subprocess.run([sys.executable, f"benchmarks/{name}", *arguments], cwd=lab, text=True,
                              capture_output=True, timeout=300)
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


TINY_MODEL = ("--model_dim 16 --num_layers 2 --num_heads 1 --seq_len 64 --compile off --batch_tokens 256 "
              "--device cpu")


def test_the_recipe_benchmark_pairs_variants_by_seed_on_any_text(measure, lab: Path):
    lines = (lab / "text.jsonl").read_text().splitlines(keepends=True)
    (lab / "for_training.jsonl").write_text("".join(lines[:200]))
    (lab / "for_validation.jsonl").write_text("".join(lines[200:]))
    first_line = (lab / "train_gpt.py").read_text().splitlines()[0]
    (lab / "other.diff").write_text(f"--- a/train_gpt.py\n+++ b/train_gpt.py\n@@ -1 +1 @@\n"
                                    f"-{first_line}\n+{first_line} Really.\n")
    said = measure("recipe.py", "--train", "for_training.jsonl", "--val", "for_validation.jsonl",
                   "--steps", "3", "--seeds", "2", "--vocabsize", "300", "--variant", f"plain={TINY_MODEL}",
                   "--variant", f"other=other.diff {TINY_MODEL} --muon_lr 0.2")
    rows = re.findall(r"^(plain|other) seed (\d): val_bpb ([\d.]+), .* 3 steps, 768 tokens", said,
                      re.MULTILINE)
    assert [row[:2] for row in rows] == [("plain", "0"), ("other", "0"), ("other", "1"), ("plain", "1")]
    bpb = {row[:2]: float(row[2]) for row in rows}
    differences = [bpb["other", seed] - bpb["plain", seed] for seed in "01"]
    half = 12.706 * abs(differences[0] - differences[1]) / 2
    row = re.search(r"^\| other \| [\d.]+ \| (\S+) ± (\S+) \|", said, re.MULTILINE)
    mean, interval = map(float, row.groups())
    assert mean == pytest.approx(sum(differences) / 2, abs=2e-4) and interval == pytest.approx(half, abs=3e-3)
    assert said.splitlines()[-4:] == [f"val_bpb {bpb[name, seed]:.4f}  {name}"
                                      for name in ("plain", "other") for seed in "01"]


def test_the_benchmark_of_the_step_names_floor_and_share(measure):
    said = measure("step.py", "demo", "--times", "1", *TINY_MODEL.split())
    assert re.search(r"^\| demo \| 256 \| [\d,]+ \| \d\.\d\d \| - \| [\d,]+ \| \d+ of \d+ ms, [\d.]+% \|",
                     said, re.MULTILINE)


def test_the_sweep_over_widths_leaves_a_table_and_a_picture(measure, lab: Path):
    said = measure("transfer.py", "--data", "tiny", "--widths", "16", "32", "--factors", "1", "2",
                   "--steps", "2", "--batch_tokens", "256", "--val_tokens", "256", "--seq_len", "64",
                   "--compile", "off")
    assert said.count("val_bpb") == 4
    assert len((lab / "experiments/transfer.csv").read_text().splitlines()) == 5
    assert (lab / "experiments/transfer.png").read_bytes().startswith(b"\x89PNG")


def test_the_hellaswag_benchmark_compares_the_same_choices(measure, lab: Path):
    row = {"ctx": "the cat saw", "endings": ["a dog", "the big tree", "and", "sat"], "label": 0}
    (lab / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    said = measure("hellaswag.py", "--rows", "rows.jsonl", "--tokenizer", "tiny_v300_n1073741824",
                     "--rounds", "1")
    assert "times as fast" in said and "acc: the same choice in 3 of 3 rows" in said


def test_the_yardsticks_take_turns_and_are_read_off_in_time(measure, lab: Path):
    words = ["yardstick.py", "--minutes", "0.02", "--seeds", "1", "--keep", "--data", "tiny",
             "--val_every", "1", "--num_samples", "0", *TINY_MODEL.split()]
    said = measure(*words)
    order = re.findall(r"^(train_\w+) seed (\d): val_bpb", said, re.MULTILINE)
    scripts = ["train_gpt", "train_nanogpt", "train_llama3"]
    assert order == [(script, "0") for script in scripts]
    report = (lab / "experiments/YARDSTICK.md").read_text()
    rows = re.findall(r"^\| (train_\w+)\.py \|(?: [\d.,]+M? \|){3} (\S+) \| (\S+) \| (\S+)", report,
                      re.MULTILINE)
    assert [row[0] for row in rows] == scripts
    kept = json.loads((lab / "experiments/yardstick_gpt/seed0/summary.json").read_text())
    assert rows[0][3] == f"{kept['val_bpb']:.4f}" and all(0 < float(bpb) < 10 for bpb in rows[0][1:])
    assert (lab / "experiments/yardstick_time.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((lab / "experiments/yardstick_nanogpt").glob("seed?"))) == 1
    before = set((lab / "experiments").glob("2*"))
    measure(*words)     # what is there is not repeated
    assert set((lab / "experiments").glob("2*")) == before


def test_the_benchmark_of_decoding_compares_the_same_tokens(measure, lab: Path):
    run(lab, "train_gpt.py", *flags(model_name="decoded"), "--save_model")
    said = measure("decode.py", str(newest(lab, "decoded")), "--tokens", "40")
    assert re.search(r"^cached is [\d.]+ times as fast; 40 of 40 tokens are the same$", said, re.MULTILINE)
