"""The benchmarks run, on tiny inputs. Run: ./run.sh test tests/test_benchmarks.py"""

import csv
import difflib
import itertools
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


VARIANTS = sorted((ROOT / "benchmarks/variants").glob("*.diff"))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.stem)
def test_a_kept_variant_fits_the_script_and_says_what_it_is(variant, tmp_path):
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    subprocess.run(["patch", "-p1", "-i", variant], cwd=tmp_path, check=True, capture_output=True)
    compile((tmp_path / "train_gpt.py").read_text(), variant.stem, "exec")
    assert re.match(r"[A-Z].{10,}\.\n--- a/train_gpt.py\n", variant.read_text())
    assert f"| {variant.stem} |" in (ROOT / "experiments/RECIPE.md").read_text()


def test_the_benchmark_of_the_step_names_floor_and_share(measure):
    said = measure("step.py", "demo", "--times", "1", *TINY_MODEL.split())
    rows = re.findall(r"^\| (demo.*?) \| 256 \| [\d,]+ \| \d\.\d\d \| - \| [\d,]+ \| \d+ of \d+ ms, "
                      r"[\d.]+% \|", said, re.MULTILINE)
    assert rows == ["demo, 1 of 2 layers, softmax over 576", "demo"]


def test_the_sweep_over_widths_leaves_a_table_and_a_picture(measure, lab: Path):
    said = measure("transfer.py", "--data", "tiny", "--widths", "16", "32", "--factors", "1", "2",
                   "--steps", "2", "--batch_tokens", "256", "--val_tokens", "256", "--seq_len", "64",
                   "--compile", "off")
    with open(lab / "experiments/transfer.csv", newline="") as file:
        points = {(row["width"], row["factor"]): row["val_bpb"] for row in csv.DictReader(file)}
    assert list(points) == [("16", "1.0"), ("16", "2.0"), ("32", "1.0"), ("32", "2.0")]
    assert re.findall(r"val_bpb (\S+)", said) == list(points.values())
    assert len(set(points.values())) == 4 and all(0 < float(bpb) < 20 for bpb in points.values())
    assert (lab / "experiments/transfer.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_survives_a_rate_that_is_too_high_and_nothing_else(measure, lab: Path):
    source = (lab / "train_gpt.py").read_text()
    line = "loss += part.detach()"
    wild = source.replace(line, f"{line} * (math.nan if cfg.muon_lr > 0.07 else 1)")
    patch = list(difflib.unified_diff(source.splitlines(True), wild.splitlines(True), "a/train_gpt.py",
                                      "b/train_gpt.py"))
    assert patch
    (lab / "wild.diff").write_text("".join(patch))

    def sweep(data: str) -> subprocess.CompletedProcess:
        words = ("benchmarks/transfer.py --widths 16 --factors 2 1 --steps 3 --batch_tokens 256 "
                 f"--val_tokens 256 --seq_len 64 --compile off --data {data} wild.diff")
        return subprocess.run([sys.executable, *words.split()], cwd=lab, capture_output=True, text=True)
    done = sweep("tiny")
    assert done.returncode == 0 and "failed: " in done.stdout and "is nan" in done.stdout, done.stderr
    values = re.findall(r"val_bpb (\S+)", done.stdout)
    assert values[0] == "inf" and 0 < float(values[1]) < 20
    written = (lab / "experiments/transfer.csv").read_text()
    done = sweep("absent")
    assert done.returncode != 0 and "no absent in" in done.stderr and "val_bpb" not in done.stdout
    assert (lab / "experiments/transfer.csv").read_text() == written


def test_the_hellaswag_benchmark_compares_the_same_choices(measure, lab: Path):
    row = {"ctx": "the cat saw", "endings": ["a dog", "the big tree", "and", "sat"], "label": 0}
    (lab / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    said = measure("hellaswag.py", "--rows", "rows.jsonl", "--tokenizer", "tiny_v300_n1073741824",
                     "--rounds", "1")
    assert "times as fast" in said and "acc: the same choice in 3 of 3 rows" in said


def between(points: list[tuple[float, float]], x: float) -> float:
    """Height at x of the line from each point to the next."""
    if x <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return points[-1][1]


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
    for script, *read_off in rows:
        run = lab / f"experiments/yardstick_{script.removeprefix('train_')}/seed0"
        with open(run / "metrics.csv", newline="") as file:
            validated = [(float(row["train_seconds"]), float(row["val_bpb"]))
                         for row in csv.DictReader(file) if row["val_bpb"]]
        # 1.2 seconds of training are read off at a quarter, at half and at the end
        wanted = [between(validated, 0.3), between(validated, 0.6), validated[-1][1]]
        assert [float(bpb) for bpb in read_off] == pytest.approx(wanted, abs=1e-4)
        assert validated[0][1] > max(wanted) and min(wanted) > 0
    assert (lab / "experiments/yardstick_time.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((lab / "experiments/yardstick_nanogpt").glob("seed?"))) == 1
    before = set((lab / "experiments").glob("2*"))
    measure(*words)     # what is there is not repeated
    assert set((lab / "experiments").glob("2*")) == before


def test_the_benchmark_of_decoding_compares_the_same_tokens(measure, lab: Path):
    run(lab, "train_gpt.py", *flags(model_name="decoded"), "--save_model")
    said = measure("decode.py", str(newest(lab, "decoded")), "--tokens", "40")
    assert re.search(r"^cached is [\d.]+ times as fast; 40 of 40 tokens are the same$", said, re.MULTILINE)
