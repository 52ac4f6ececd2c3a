"""Several processes and machines: they do what one does, or end promptly with a clear line.

Run: ./run.sh test tests/test_processes.py
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import CALM, DRIVE, drive, flags, newest, rows_of, run, summary_of, torchrun

from benchtop import launch
from benchtop.checkpoints import load_checkpoint, read_checkpoint
from benchtop.folder import is_locked

pytestmark = pytest.mark.slow

AT_STEP_3 = """
import os, pathlib, signal, time
real_between_steps = benchtop.run.Run.between_steps
def between_steps(run):
    real_between_steps(run)
    if run.step == 3 and run.world.rank == 1:
        pathlib.Path("step_3_at").write_text(str(time.time()))
        {deed}
benchtop.run.Run.between_steps = between_steps
"""
TORCHRUNS_PATIENCE = 30     # seconds between its SIGTERM and its SIGKILL for a process that does not end


def plain(error: str) -> str:
    """What processes say, without what torchrun adds."""
    return "\n".join(line for line in error.splitlines() if line.startswith("train_gpt.py: error"))


@pytest.mark.parametrize(("deed", "timeout"),
                         [("os.kill(os.getpid(), signal.SIGKILL)", 600), ("time.sleep(10_000)", 5)])
def test_a_dead_or_silent_process_ends_all_promptly_with_a_clear_line(lab, deed, timeout):
    """A dead one is noticed long before the timeout, a silent one by it.

    How long that may take on top is told by how long the same processes took for three steps before.
    """
    begun = time.time()
    done = drive(lab, AT_STEP_3.format(deed=deed),
                 *flags(num_steps=10**6, model_name="lost", timeout_seconds=timeout), processes=2)
    ended, lost = time.time(), float((lab / "step_3_at").read_text())
    needed = TORCHRUNS_PATIENCE + (timeout if "sleep" in deed else 0)
    assert done.returncode and ended - lost < needed + 2 * (lost - begun)
    said = f"process 0 of 2 lost another process, which died or was silent for {timeout} s"
    assert said in plain(done.stderr), done.stderr
    assert "start again with --resume auto" in plain(done.stderr)
    assert not (newest(lab, "lost") / "summary.json").exists()


def test_a_gradient_that_is_not_finite_on_one_process_stops_all_at_that_step(lab):
    poison = """
real = train_gpt.GPT.forward
def forward(model, inputs, targets):
    loss = real(model, inputs, targets)
    if inputs.device.type != "meta" and (targets >= 0).any():       # neither counts memory nor warms up
        calls.append(1)
    if len(calls) == 3 and int(os.environ["RANK"]) == 1:
        return loss * math.nan
    return loss
import os, math
calls = []
train_gpt.GPT.forward = forward
"""
    done = drive(lab, poison, *flags(num_steps=10, model_name="poisoned"), processes=2)
    assert done.returncode
    assert len(re.findall("error: .* of step 3 ", plain(done.stderr))) == 1
    folder = newest(lab, "poisoned")
    assert summary_of(folder)["status"].startswith("failed: the loss of step 3 is nan")
    assert len(rows_of(folder)) == 2


def test_a_gradient_gone_wrong_is_named_on_all(lab):
    poison = """
import math
real = train_gpt.Optimizer.sum_gradients
def sum_gradients(optimizer):
    if optimizer.steps_done == 2 and optimizer.world.rank == 1:
        optimizer.world.wait()
        for piece in optimizer.pieces:
            if piece.name == "embed" and piece.owner == 1:
                piece.grad[0] = math.nan
    return real(optimizer)
train_gpt.Optimizer.sum_gradients = sum_gradients
"""
    done = drive(lab, poison, *flags(num_steps=10, model_name="poisoned2"), processes=2)
    assert done.returncode
    assert plain(done.stderr).count("the gradient of embed is not finite in step 3") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_torchrun_told_to_stop_lets_all_processes_save(lab, number):
    name = f"told{int(number)}"
    job = subprocess.Popen([*torchrun(2), "train_gpt.py",
                            *flags(num_steps=10**6, model_name=name, val_every=10**6)],
                           cwd=lab, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_rows(lab, name, job)
    job.send_signal(number)
    out, _ = job.communicate(timeout=300)
    assert job.returncode and out.count(f"stopped by {number.name}; the last good checkpoint is of step") == 1
    folder = newest(lab, name)
    step = load_checkpoint(folder / "checkpoint.pt")["step"]
    assert step in (len(rows_of(folder)), len(rows_of(folder)) + 1)


def test_processes_end_with_a_killed_torchrun_and_auto_waits_for_them(lab):
    arguments = flags(num_steps=10**6, model_name="orphans", val_every=10**6, save_every_steps=1)
    job = subprocess.Popen([*torchrun(2), "train_gpt.py", *arguments], cwd=lab,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_rows(lab, "orphans", job)
    job.kill()
    job.wait()
    folder = newest(lab, "orphans")
    wait_until(lambda: not is_locked(folder))
    assert read_checkpoint(folder)["step"] >= len(rows_of(folder)) - 1


@pytest.mark.parametrize("places", [{"WORLD_SIZE": "2"}, {"RANK": "first", "WORLD_SIZE": "2"}])
def test_half_of_torchruns_variables_are_one_line(lab, places):
    done = subprocess.run([sys.executable, "train_gpt.py", *flags(num_steps=1)], cwd=lab, text=True,
                          env=os.environ | places, capture_output=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "start with torchrun, or unset them" in done.stderr


def wait_for_rows(lab: Path, name: str, job: subprocess.Popen) -> None:
    def has_rows() -> bool:
        assert job.poll() is None
        return any(len(rows_of(path.parent)) > 2 for path in lab.glob(f"experiments/*_{name}/metrics.csv"))
    wait_until(has_rows)


def wait_until(event: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.time() + seconds
    while not event():
        assert time.time() < deadline
        time.sleep(0.1)


def test_a_mistake_is_said_once_by_all_processes(lab):
    done = subprocess.run([*torchrun(3), "train_gpt.py", *flags(num_layers=-1)], cwd=lab, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode and done.stderr.count("--num_layers must be 1 or more") == 1
    done = subprocess.run([*torchrun(3), "train_gpt.py", *flags(), "--dta=x"], cwd=lab, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode and done.stderr.count("there is no flag --dta; did you mean --data?") == 1
    done = subprocess.run([*torchrun(3), "train_gpt.py", *flags(), "--fp8"], cwd=lab, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode and done.stderr.count("--fp8 needs --dtype bfloat16; it is float32") == 1


@pytest.mark.parametrize(("script", "words", "said", "code"), [
    ("train_gpt.py", ["--data", "nothere"], r"train_gpt.py: error: there is no nothere in .*", 1),
    ("dies.py", [], r"dies.py: error: SIGKILL ended process 1; the machine may have run out of memory", 137)])
def test_the_launcher_adds_no_page_to_the_line_that_says_why(lab, script, words, said, code):
    (lab / "dies.py").write_text("import os, time\n"
                                 "os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)\ntime.sleep(60)\n")
    done = subprocess.run([sys.executable, "-m", "benchtop.launch", "--standalone", "--nproc_per_node=2",
                           script, *words], cwd=lab, capture_output=True, text=True, timeout=100)
    assert re.fullmatch(said, done.stderr.strip()) and done.returncode == code


def test_the_launcher_names_the_signal_before_what_follows_from_it():
    assert sorted([1, -signal.SIGTERM, -signal.SIGKILL], key=launch.cause_first) == [-9, 1, -15]


def test_a_shard_that_one_process_finds_damaged_stops_all(lab, tmp_path):
    there = tmp_path / "there"
    shutil.copytree(lab, there, ignore=shutil.ignore_patterns("experiments"))
    shard = next(there.glob("data/tiny/train_*.bin"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = subprocess.run([*torchrun(2), "train_gpt.py", *flags()], cwd=there, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode and plain(done.stderr).count("error") == 1
    assert f"{shard.name} has changed since it was written" in plain(done.stderr)
    assert not (there / "experiments").exists()


def test_a_baseline_and_a_tracker_are_the_first_processs_business(lab):
    """They load code on one process only, which must not look like machines that differ."""
    assert drive(lab, "", *flags(model_name="basis", num_samples=0)).returncode == 0
    done = drive(lab, "", *flags(model_name="beside", num_samples=0, compare_to="basis=experiments/*_basis"),
                 "--tensorboard", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compare     val_bpb is ") == 1
    assert len(list((newest(lab, "beside") / "tensorboard").iterdir())) == 1


def test_two_jobs_share_a_machine(lab):
    jobs = [subprocess.Popen([*torchrun(2), "train_gpt.py", *flags(num_steps=20, model_name=name)], cwd=lab,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for name in ("joba", "jobb")]
    for job in jobs:
        _, error = job.communicate(timeout=300)
        assert job.returncode == 0, error
    assert rows_of(newest(lab, "joba"))[-1]["val_loss"] == rows_of(newest(lab, "jobb"))[-1]["val_loss"]


# ------------------------------------------------------------------------------------------------
# Two machines
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hosts():
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    names = [f"bench{os.getpid()}a", f"bench{os.getpid()}b"]
    made = []

    def ip(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *words], capture_output=True, text=True)
    try:
        for name in names:
            done = ip("netns", "add", name)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
            made.append(name)
        ends = [f"bv{os.getpid()}a"[-15:], f"bv{os.getpid()}b"[-15:]]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            for words in (("link", "set", end, "netns", name),):
                done = ip(*words)
                if done.returncode:
                    pytest.skip(f"no veth pairs here: {done.stderr.strip()}")
            inside = ("netns", "exec", name, "ip")
            ip(*inside, "link", "set", "lo", "up")
            ip(*inside, "link", "set", end, "name", "eth0")
            ip(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def on_both(hosts, lab: Path, *command: str) -> list[subprocess.Popen]:
    """The command of docs/several-machines.md; since these share a name, each is told if it is the first."""
    return [subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
         "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29500", "--rdzv_id=tests",
         f"--local_addr=10.77.0.{number}", f"--rdzv_conf=is_host={int(number == 1)}", *command],
        cwd=lab, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0"}) for number, host in enumerate(hosts, start=1)]


def test_two_hosts_end_where_one_does(hosts, lab):
    run(lab, "train_gpt.py", *flags(num_steps=8, model_name="onehost", **CALM))
    jobs = on_both(hosts, lab, "train_gpt.py", *flags(num_steps=8, model_name="twohosts", **CALM))
    for job in jobs:
        _, error = job.communicate(timeout=300)
        assert job.returncode == 0, error
    ours, theirs = rows_of(newest(lab, "twohosts")), rows_of(newest(lab, "onehost"))
    assert summary_of(newest(lab, "twohosts"))["processes"] == 2
    for row, wanted in zip(ours, theirs, strict=True):
        for column in ("train_loss", "grad_norm", "val_loss"):
            assert float(row[column] or 0) == pytest.approx(float(wanted[column] or 0), rel=1e-4)


def test_a_host_that_dies_ends_the_other(hosts, lab):
    dies = AT_STEP_3.format(deed="os.kill(os.getppid(), 9); os.kill(os.getpid(), 9)")
    jobs = on_both(hosts, lab, DRIVE, str(lab), dies,
                   *flags(num_steps=10**6, model_name="losthost", timeout_seconds=10))
    try:
        outputs = [job.communicate(timeout=300) for job in jobs]
    finally:
        for job in jobs:
            job.send_signal(signal.SIGKILL)
    assert all(job.returncode for job in jobs)
    said = "".join(error for _, error in outputs)
    assert re.search(r"process \d of 2 lost another process, which died or was silent for 10 s", said)
