"""Several processes and machines: they do what one does, or end promptly with a clear line.

Run: ./run.sh test tests/test_processes.py
"""

import multiprocessing
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
import torch
from launch import start
from tiny_runs import CALM, DRIVE, drive, flags, newest, rows_of, run, summary_of, torchrun

from benchtop import launch
from benchtop.checkpoints import load_checkpoint, read_checkpoint
from benchtop.errors import UserError
from benchtop.folder import is_locked
from benchtop.processes import Processes

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


@pytest.mark.parametrize(("deed", "timeout", "patience"), [
    ("os.kill(os.getpid(), signal.SIGKILL)", 600, 0),
    ("signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(10_000)", 5, 0),
    ("time.sleep(10_000)", 5, TORCHRUNS_PATIENCE)], ids=["dead", "silent", "deaf"])
def test_a_dead_or_silent_process_ends_all_promptly_with_a_clear_line(lab, deed, timeout, patience):
    """A dead one is noticed long before the timeout, a silent one by it. One that hangs in training is deaf,
    too: its handler of SIGTERM waits for the end of the step, and torchrun has to kill it.

    How long that may take on top is told by how long the same processes took for three steps before.
    """
    begun = time.time()
    done = drive(lab, AT_STEP_3.format(deed=deed),
                 *flags(num_steps=10**6, model_name="lost", timeout_seconds=timeout), processes=2)
    ended, lost = time.time(), float((lab / "step_3_at").read_text())
    needed = patience + (timeout if "sleep" in deed else 0)
    assert done.returncode and ended - lost < needed + 5 * (lost - begun)
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


@pytest.fixture
def begin(lab, tmp_path):
    """begin(name, "train_gpt.py", ...) starts a script; it writes to NAME.out and NAME.err in tmp_path."""
    begun = []

    def begin(name: str, *command: str, **options) -> multiprocessing.Process:
        out, err = (str(tmp_path / f"{name}.{stream}") for stream in ("out", "err"))
        begun.append(start(lab, *command, out=out, err=err, **options))
        return begun[-1]
    yield begin
    for job in begun:
        if job.is_alive():
            os.killpg(job.pid, signal.SIGKILL)


# launch.py forks the processes of the first, torch starts those of the second anew
TORCHRUN = torchrun(2)[1:]
REAL_TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


@pytest.mark.parametrize(("number", "launcher"), [
    (signal.SIGTERM, REAL_TORCHRUN), (signal.SIGINT, TORCHRUN), (signal.SIGHUP, TORCHRUN)],
    ids=lambda given: given.name if isinstance(given, signal.Signals) else "")
def test_torchrun_told_to_stop_lets_all_processes_save(lab, begin, tmp_path, number, launcher):
    name = f"told{int(number)}"
    job = begin(name, *launcher, "train_gpt.py", *flags(num_steps=10**6, model_name=name, val_every=10**6))
    wait_for_rows(lab, name, job)
    os.kill(job.pid, number)
    job.join(timeout=300)
    out = (tmp_path / f"{name}.out").read_text()
    assert job.exitcode and out.count(f"stopped by {number.name}; the last good checkpoint is of step") == 1
    folder = newest(lab, name)
    step = load_checkpoint(folder / "checkpoint.pt")["step"]
    assert step in (len(rows_of(folder)), len(rows_of(folder)) + 1)


def test_processes_end_with_a_killed_torchrun_and_auto_waits_for_them(lab, begin):
    job = begin("orphans", *REAL_TORCHRUN, "train_gpt.py", *flags(num_steps=10**6, model_name="orphans",
                                                                  val_every=10**6, save_every_steps=1))
    wait_for_rows(lab, "orphans", job)
    job.kill()
    job.join()
    folder = newest(lab, "orphans")
    wait_until(lambda: not is_locked(folder))
    assert read_checkpoint(folder)["step"] >= len(rows_of(folder)) - 1


@pytest.mark.parametrize(("error", "seen"), [
    (torch.OutOfMemoryError("on this GPU"), torch.OutOfMemoryError), (RuntimeError("gone"), UserError)])
def test_a_process_without_memory_does_not_blame_another_one(error, seen):
    world = Processes()
    with pytest.raises(seen), world.contact():
        raise error
    assert world._lost      # so that it does not wait for the others when it ends


@pytest.mark.parametrize("places", [{"WORLD_SIZE": "2"}, {"RANK": "first", "WORLD_SIZE": "2"}])
def test_half_of_torchruns_variables_are_one_line(lab, places):
    done = run(lab, "train_gpt.py", *flags(num_steps=1), env=os.environ | places, expect=1)
    assert "Traceback" not in done.stderr
    assert "start with torchrun, or unset them" in done.stderr


def wait_for_rows(lab: Path, name: str, job: multiprocessing.Process) -> None:
    def has_rows() -> bool:
        assert job.is_alive()
        return any(len(rows_of(path.parent)) > 2 for path in lab.glob(f"experiments/*_{name}/metrics.csv"))
    wait_until(has_rows)


def wait_until(event: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.time() + seconds
    while not event():
        assert time.time() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("words", "said"), [
    (flags(num_layers=-1), "--num_layers must be 1 or more"),
    ([*flags(), "--dta=x"], "there is no flag --dta; did you mean --data?"),
    ([*flags(), "--fp8"], "--fp8 needs --dtype bfloat16; it is float32")],
    ids=["value", "flag", "two knobs"])
def test_a_mistake_is_said_once_by_all_processes(lab, words, said):
    done = run(lab, *torchrun(3)[1:], "train_gpt.py", *words, expect=None)
    assert done.returncode and done.stderr.count(said) == 1


@pytest.mark.parametrize(("script", "words", "said", "code"), [
    ("train_gpt.py", ["--data", "nothere"], r"train_gpt.py: error: there is no nothere in .*", 1),
    ("dies.py", [], r"dies.py: error: SIGKILL ended process 1; the machine may have run out of memory", 137)],
    ids=["error", "signal"])
def test_the_launcher_adds_no_page_to_the_line_that_says_why(lab, script, words, said, code):
    (lab / "dies.py").write_text("import os, time\n"
                                 "os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)\ntime.sleep(60)\n")
    done = run(lab, "-m", "benchtop.launch", "--standalone", "--nproc_per_node=2", script, *words,
               expect=code)
    assert re.fullmatch(said, done.stderr.strip())


def test_the_launcher_names_the_signal_before_what_follows_from_it():
    assert sorted([1, -signal.SIGTERM, -signal.SIGKILL], key=launch.cause_first) == [-9, 1, -15]


def test_a_shard_that_one_process_finds_damaged_stops_all(lab, tmp_path):
    there = tmp_path / "there"
    shutil.copytree(lab, there, ignore=shutil.ignore_patterns("experiments"))
    shard = next(there.glob("data/tiny/train_*.bin"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = run(there, *TORCHRUN, "train_gpt.py", *flags(), expect=None)
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


def test_two_jobs_share_a_machine(lab, begin, tmp_path):
    names = ("joba", "jobb")
    jobs = [begin(name, *TORCHRUN, "train_gpt.py", *flags(num_steps=10, model_name=name)) for name in names]
    for name, job in zip(names, jobs, strict=True):
        job.join(timeout=300)
        assert job.exitcode == 0, (tmp_path / f"{name}.err").read_text()
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


# what torchrun does on each of the hosts, but it forks its process
HOST = """
import ctypes, os, sys
from launch import be_script
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
host, number, *words = sys.argv[1:]
assert ctypes.CDLL(None).setns(os.open(f"/run/netns/{host}", os.O_RDONLY), 0) == 0
elastic_launch(LaunchConfig(2, 2, 1, run_id="tests", rdzv_backend="c10d", rdzv_endpoint="10.77.0.1:29500",
                            rdzv_configs={"is_host": number == "1"}, local_addr=f"10.77.0.{number}",
                            start_method="fork", max_restarts=0), be_script)(*words)
"""


def test_a_host_that_dies_ends_the_other(hosts, lab, begin, tmp_path):
    (lab / "host.py").write_text(HOST)
    dies = AT_STEP_3.format(deed="os.kill(os.getppid(), 9); os.kill(os.getpid(), 9)")
    words = [DRIVE, str(lab), dies, *flags(num_steps=10**6, model_name="losthost", timeout_seconds=10)]
    jobs = [begin(host, "host.py", host, str(number), *words,
                  env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0"})
            for number, host in enumerate(hosts, start=1)]
    for job in jobs:
        job.join(timeout=300)
        assert job.exitcode
    said = "".join((tmp_path / f"{host}.err").read_text() for host in hosts)
    assert re.search(r"process \d of 2 lost another process, which died or was silent for 10 s", said)
