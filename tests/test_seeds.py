"""seeds.py: repeat a run, skip what is done, go on after a kill. Run: ./run.sh test tests/test_seeds.py"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import flags, summary_of

from benchtop import places
from benchtop.files import sha256_of
from benchtop.groups import SavedRun
from benchtop.identity import bench_files
from benchtop.repeats import changed_code, run_seed

TRAIN = ["--", sys.executable, "train_gpt.py", *flags(num_samples=0, data="tiny")]


def seeds(folder: Path, *arguments: str, words: list[str] = TRAIN) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "seeds.py", *arguments, *words], cwd=folder, capture_output=True,
                          text=True, timeout=180)


def folders(lab: Path, name: str) -> list[Path]:
    return sorted(lab.glob(f"experiments/*_{name}_seed*"))


def test_finished_seeds_are_skipped_and_the_group_is_summed_up(lab):
    done = seeds(lab, "2", "--name", "twice", "--keep", "kept")
    assert done.returncode == 0, done.stdout + done.stderr
    first = folders(lab, "twice")
    assert [summary_of(folder)["seed"] for folder in first] == [0, 1]
    bpbs = [summary_of(folder)["val_bpb"] for folder in first]
    assert bpbs[0] != bpbs[1]
    assert f"twice: mean val_bpb {sum(bpbs) / 2:.4f} of 2 runs" in done.stdout
    assert f"standard deviation {abs(bpbs[0] - bpbs[1]) / 2**0.5:.4f}" in done.stdout
    assert json.loads((lab / "experiments/kept/seed1/summary.json").read_text())["val_bpb"] == bpbs[1]
    assert not (lab / "experiments/kept/seed1/training_log.txt").exists()

    done = seeds(lab, "3", "--name", "twice")
    assert done.returncode == 0 and "3 runs" in done.stdout
    assert folders(lab, "twice")[:2] == first and len(folders(lab, "twice")) == 3
    assert "seed 2: " + sys.executable in done.stdout and "seed 1: " + sys.executable not in done.stdout


def test_a_killed_driver_goes_on_where_it_was(lab):
    train = ["--", sys.executable, "train_gpt.py",
             *flags(num_steps=300, save_every_steps=5, val_every=0, num_samples=0, data="tiny")]
    driver = subprocess.Popen([sys.executable, "seeds.py", "1", "--name", "cut", *train], cwd=lab,
                              start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    saved = "experiments/*_cut_seed0/checkpoint_previous.pt"
    while not list(lab.glob(saved)) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    folder, = folders(lab, "cut")
    assert not (folder / "summary.json").exists()
    done = seeds(lab, "1", "--name", "cut", words=train)
    assert done.returncode == 0, done.stdout + done.stderr
    assert folders(lab, "cut") == [folder]
    sessions = summary_of(folder)["sessions"]
    assert len(sessions) == 2 and sessions[1]["from_step"] > 0


def test_sigterm_is_passed_on_so_that_the_run_saves(lab):
    train = ["--", sys.executable, "train_gpt.py", *flags(num_steps=100_000, val_every=0, data="tiny")]
    driver = subprocess.Popen([sys.executable, "seeds.py", "1", "--name", "told", *train], cwd=lab,
                              text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = folders(lab, "told")
        if found and len((found[0] / "training_log.txt").read_text().splitlines()) > 20:
            break
        time.sleep(0.05)
    driver.terminate()
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 1 and said.count("seeds.py: error") == 1 and "exit code 143" in said
    assert (folders(lab, "told")[0] / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["HUP", "TERM", "USR1", "USR2", "XCPU"])
def test_every_stop_signal_is_passed_on(name):
    """The run tells its driver to stop, hears of it from there, and ends with a number of its own."""
    script = f'trap "exit 7" {name}; while :; do kill -{name} $PPID; sleep 0.01; done'
    assert run_seed(["sh", "-c", script]) == 7


def test_a_run_that_diverged_is_counted(lab):
    source = (lab / "train_gpt.py").read_text()
    assert source.count("loss += part.detach()") == 1
    (lab / "wild.py").write_text(source.replace("loss += part.detach()", "loss += part.detach() * math.nan"))
    train = ["--", sys.executable, "wild.py", *flags(num_samples=0, data="tiny")]
    done = seeds(lab, "2", "--name", "wild", words=train)
    assert done.stdout.count("failed: the ") == 2, done.stdout + done.stderr
    assert done.returncode and "none of 2 runs finished" in done.stderr.splitlines()[-1]
    assert len(folders(lab, "wild")) == 2
    assert "none of 2 runs finished" in seeds(lab, "2", "--name", "wild", words=train).stderr
    assert len(folders(lab, "wild")) == 2


@pytest.mark.parametrize(("words", "message"), [
    ([], "must run a script"), (["--", "echo", "hello"], "must run a script"),
    ([*TRAIN, "--seed", "3"], "leave --seed out"), ([*TRAIN, "--model_name=x"], "leave --model_name=x out"),
    (["--", sys.executable, "train_gpt.py", "--no_such_flag"], "ended with exit code 2")])
def test_commands_that_cannot_work_are_refused_in_a_line(lab, words, message):
    done = seeds(lab, "2", "--name", "none", words=words)
    assert done.returncode and message in done.stderr.splitlines()[-1]


def test_seeds_of_other_flags_or_code_do_not_mix(lab):
    assert seeds(lab, "1", "--name", "mixed").returncode == 0
    done = seeds(lab, "2", "--name", "mixed", words=[*TRAIN, "--muon_lr", "0.1"])
    assert done.returncode and "was made by another command, train_gpt.py" in done.stderr
    for name in ("train_gpt.py", "benchtop/batches.py"):
        source = (lab / name).read_text()
        try:
            (lab / name).write_text(source + "\n")
            done = seeds(lab, "2", "--name", "mixed")
        finally:
            (lab / name).write_text(source)
        assert done.returncode and f"error: {name} changed since" in done.stderr
    assert len(folders(lab, "mixed")) == 1


def made_by(folder: Path, **facts) -> SavedRun:
    return SavedRun(folder, {}, facts)


def test_code_that_changed_is_found_in_scripts_and_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ROOT", tmp_path)
    (tmp_path / "mine.py").write_text("1")
    mine = {"mine.py": sha256_of(tmp_path / "mine.py")}
    bench = {path.name: sha256_of(path) for path in bench_files()}
    assert changed_code(made_by(tmp_path, sources=mine, bench=bench)) == []
    bench |= {"page.py": "another", "gone.py": "1"}
    del bench["batches.py"]
    assert changed_code(made_by(tmp_path, sources=mine | {"mine2.py": "1"}, bench=bench)) == [
        "mine2.py", "benchtop/batches.py", "benchtop/gone.py", "benchtop/page.py"]
    # runs made before the bench was hashed have it among their sources
    assert changed_code(made_by(tmp_path, sources=mine)) == []
    assert changed_code(made_by(tmp_path, sources=mine | {"shards.py": "1"})) == ["shards.py"]


def test_a_name_to_keep_that_is_taken_is_refused_before_any_run(lab):
    assert seeds(lab, "1", "--name", "early", "--keep", "taken").returncode == 0
    done = seeds(lab, "2", "--name", "late", "--keep", "taken")
    assert done.returncode and "take another name for --keep" in done.stderr.splitlines()[-1]
    assert not folders(lab, "late")
    # what the same seeds kept before is no stranger
    assert seeds(lab, "1", "--name", "late", "--keep", "mine").returncode == 0
    assert seeds(lab, "2", "--name", "late", "--keep", "mine").returncode == 0
    assert len(list((lab / "experiments/mine").glob("seed?"))) == len(folders(lab, "late")) == 2
