"""run.sh and the README, as a newcomer types them. Run: ./run.sh test tests/test_run_sh.py"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train_gpt import PRESETS, Config

ROOT = Path(__file__).resolve().parent.parent


def run_sh(folder: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "./run.sh", *arguments], cwd=folder, capture_output=True, text=True,
                          timeout=300, env={"PATH": path, "HOME": str(folder)})


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The project's files with an environment that is ready: this very Python."""
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "benchtop", tmp_path / "benchtop", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    ready = subprocess.run(["cksum", "requirements.txt", "requirements-dev.txt"], cwd=tmp_path,
                           capture_output=True, text=True, check=True)
    (tmp_path / ".venv" / "ready").write_text(ready.stdout)
    return tmp_path


def stub_python(folder: Path, body: str) -> str:
    """A PATH whose python3 is a script; the rest of the system stays."""
    binaries = folder / "stub"
    binaries.mkdir()
    for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13", "python3.14"):
        (binaries / name).write_text(f"#!/bin/sh\n{body}\n")
        (binaries / name).chmod(0o755)
    return f"{binaries}:/usr/bin:/bin"


def test_what_is_ready_is_not_set_up_again(checkout):
    done = run_sh(checkout, "setup")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unknown_word_is_answered_in_one_line(checkout):
    done = run_sh(checkout, "tset")
    assert done.returncode == 1 and "there is no 'tset'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_help_names_both_commands(checkout):
    done = run_sh(checkout, "--help")
    assert done.returncode == 0 and "./run.sh test" in done.stdout


def test_an_old_python_is_answered_with_what_to_install(checkout, tmp_path):
    shutil.rmtree(tmp_path / ".venv")
    done = run_sh(checkout, "setup", path=stub_python(tmp_path, "exit 1"))
    assert done.returncode == 1 and "apt install python3" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_python_without_venv_is_answered_with_what_to_install(checkout, tmp_path):
    shutil.rmtree(tmp_path / ".venv")
    body = f'[ "$2" = venv ] && exit 1\nexec {sys.executable} "$@"'
    done = run_sh(checkout, "setup", path=stub_python(tmp_path, body))
    assert done.returncode == 1 and "apt install python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(("installed", "skipped"), [
    ("", set()), ("2.13.0+cpu", {"torch"}), ("2.11.0+cu128", {"torch", "triton"})])
def test_a_torch_that_is_there_keeps_its_version_and_its_triton(checkout, installed, skipped):
    """A Python that has such a torch, and a pip that installs nothing."""
    (checkout / ".venv/ready").unlink()
    (checkout / ".venv/bin/python").write_text(f"""#!/bin/sh
case "$*" in
*"import pip"*) exit;;
*pytest*|*"pip install"*) exit;;
*find_spec*) [ -z "{installed}" ] || echo /there; exit;;
*'version("torch")'*) v={installed}; echo "${{v%%+*}}"; exit;;
esac
exit 9""")
    done = run_sh(checkout, "test")
    assert done.returncode == 0, done.stderr
    wanted = [line for name in ("requirements.txt", "requirements-dev.txt")
              for line in (ROOT / name).read_text().splitlines() if line.split("==")[0] not in skipped]
    assert (checkout / ".venv/to_install.txt").read_text().splitlines() == wanted


def test_a_preset_says_first_what_it_needs_and_costs(checkout):
    done = run_sh(checkout, "gpt2-small", "--dry_run", "--compile", "off", "--peak_tflops", "989",
                  "--gpu_cost_per_hour", "20")
    assert done.returncode == 0, done.stderr
    assert "10 shards of FineWeb (3 GB" in done.stderr
    assert "leave out --dry_run" in done.stderr
    assert re.search(r"^model +27\d,\d{3},\d{3} parameters", done.stdout, re.MULTILINE)
    assert re.search(r"^memory .*MiB.*^time +about .* of training.*^cost +about [\d,]+\.\d\d", done.stdout,
                     re.MULTILINE | re.DOTALL)
    assert not list((checkout / "data").glob("*")) and not (checkout / "experiments").exists()
    python, says_none = checkout / ".venv/bin/python", 'case "$*" in *device_count*) echo 0; exit;; esac'
    python.write_text(python.read_text().replace("exec", f"{says_none}\nexec"))
    done = run_sh(checkout, "gpt2-small", "--dry_run", "--seqlen", "5")
    assert done.returncode == 1 and "did you mean --seq_len?" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("gpus", [0, 4])
def test_a_preset_gets_its_data_and_trains_on_all_gpus(checkout, gpus):
    """A Python that only writes down what it is asked for."""
    (checkout / ".venv/bin/python").write_text(f"""#!/bin/sh
case "$*" in *device_count*) echo {gpus}; exit;; *--check*) echo "memory  1"; exit;; esac
echo "$*" >> asked.txt""")
    launch = "-m benchtop.launch --standalone --nproc_per_node=4 " if gpus else ""
    for preset, data in (("s", "fineweb_s"), ("gpt2-small", "fineweb_gpt2-small")):
        done = run_sh(checkout, preset, "--seed", "7")
        assert done.returncode == 0 and ("no GPU" in done.stderr) == (not gpus)
        *before, training = (checkout / "asked.txt").read_text().splitlines()
        assert training == f"{launch}train_gpt.py --preset {preset} --data {data} --seed 7"
        if preset == "s":
            assert before[0].startswith("train_tokenizer.py --source 10B ")
        assert before[-1].startswith("download_fineweb.py --source 10B") and f"--name {data}" in before[-1]
        (checkout / "asked.txt").unlink()


def test_a_preset_of_run_sh_gets_enough_tokens():
    script = (ROOT / "run.sh").read_text()
    shards = dict(re.findall(r"^ +([a-z0-9-]+)\) shards=(\d+) ;;$", script, re.MULTILINE))
    assert {"demo", *shards} == set(PRESETS)
    for preset, number in shards.items():
        cfg = Config(**PRESETS[preset]).with_size().with_budget(10**12)
        tokens = cfg.batch_tokens * cfg.num_steps
        # rows are packed, which drops some; the largest takes all that there is
        assert tokens <= (0.98 if preset == "gpt2-xl" else 0.75) * int(number) * 10**8


def test_five_minutes_gets_as_much_climbmix_as_the_device_has_time_for(checkout):
    """With a Python that only writes down what it is asked for, and a --check that finds a speed."""
    speed = f"echo '{Config(by_speed=True, train_minutes=5, measured_tflops=650).remarks()[0]}'"
    (checkout / ".venv/bin/python").write_text(f"""#!/bin/sh
case "$*" in *device_count*) echo 0; exit;; *--check*) {speed}; exit;; esac
echo "$*" >> asked.txt""")
    tokens = int(re.search(r"enough for ([\d,]+)\.\d million", speed)[1].replace(",", ""))
    for there in (0, 3000):
        (checkout / "data/climbmix").mkdir(parents=True, exist_ok=True)
        for number in range(1, there + 1):
            (checkout / f"data/climbmix/train_{number:06d}.bin").touch()
        done = run_sh(checkout, "five-minutes", "--seed", "7")
        assert done.returncode == 0 and "days" not in done.stderr, done.stderr
        learning, preparing, training = (checkout / "asked.txt").read_text().splitlines()
        assert learning == ("train_tokenizer.py --source climbmix --samples 1000000000 --vocabsize 8191 "
                            "--regex nanochat --name climbmix")
        shards = int(re.fullmatch(r"download_fineweb.py --source climbmix --num_shards (\d+) --val_tokens "
                                  r"25000000 --tokenizer climbmix --name climbmix", preparing)[1])
        assert shards == (there or shards) and 0.75 * 60 * shards >= tokens
        assert training == "train_gpt.py --preset five-minutes --data climbmix --seed 7"
        (checkout / "asked.txt").unlink()
    assert PRESETS["five-minutes"]["vocab_size"] == 8191 + 1     # with <|endoftext|>
    refused = run_sh(checkout, "seeds", "five-minutes", "3")
    assert refused.returncode == 1 and "add --measured_tflops" in refused.stderr
    done = run_sh(checkout, "seeds", "five-minutes", "3", "--measured_tflops", "65")
    assert done.returncode == 0 and "trial.py --seeds 3 --" in (checkout / "asked.txt").read_text()


@pytest.mark.slow
def test_an_installed_torch_is_reused(checkout, tmp_path):
    """The torch of this environment is found from a new .venv, and not installed again."""
    shutil.rmtree(tmp_path / ".venv")
    (tmp_path / "requirements.txt").write_text("torch==99.0\n")
    done = run_sh(checkout, "setup", path=stub_python(tmp_path, f'exec {sys.executable} "$@"'))
    assert done.returncode == 0, done.stderr
    assert "using the torch in" in done.stderr
    assert subprocess.run([tmp_path / ".venv/bin/python", "-c", "import torch"], cwd="/").returncode == 0
    assert run_sh(checkout, "setup", path="/usr/bin:/bin").stderr == ""


def test_help_names_every_preset(checkout):
    told = run_sh(checkout, "--help").stdout
    assert all(re.search(rf"\b{preset}\b", told) for preset in PRESETS)


def test_seeds_of_a_preset_say_what_is_missing(checkout):
    for words, message in ((["seeds"], "how many seeds"), (["seeds", "demo", "many"], "how many seeds"),
                           (["seeds", "huge", "3"], "there is no preset 'huge'")):
        done = run_sh(checkout, *words)
        assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_seeds_of_the_demo_run_it_with_each_seed(checkout):
    """With a trial.py that only says what it was asked for."""
    for script in ("train_tokenizer.py", "download_fineweb.py"):
        (checkout / script).write_text("")
    (checkout / "trial.py").write_text("import sys; print(*sys.argv[1:])")
    done = run_sh(checkout, "seeds", "demo", "8", "--muon_lr", "0.1")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"--seeds 8 --processes 1 --name demo -- --preset demo "
                        r"--tokenizer demo-py\S+ --data demo-py\S+ --muon_lr 0\.1\n", done.stdout)
