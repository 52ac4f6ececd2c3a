"""Executes the runs of a trial, in parallel on the devices of this machine or one after the other.

Each run is a command that resumes by itself, so after an interruption the same commands continue the trial.
The output of a run goes into a file; if the run fails, its error is shown.
"""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchtop import places
from benchtop.errors import UserError
from benchtop.files import Busy, locked
from benchtop.gpus import nvidia_gpus
from benchtop.signals import heard_by


@dataclass(frozen=True)
class Job:
    """A run: its --model_name, and the words of the training command after `python`."""
    name: str
    words: list[str]


@dataclass
class Turns:
    """Runs jobs, one at a time in each slot: a value of CUDA_VISIBLE_DEVICES, or "" for a CPU.

    processes  number of processes per run; torchrun starts them if there are several
    """
    slots: list[str]
    processes: int = 1
    stopped_by: int = 0
    alive: set[subprocess.Popen] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def on_this_machine(cls, processes: int, device: str) -> "Turns":
        """One slot for each `processes` GPUs; one slot on a CPU.

        raises  UserError if a run needs more GPUs than there are
        """
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [str(number) for number in range(len(nvidia_gpus()))]
        if listed is not None:
            gpus = [name for name in listed.split(",") if name] if gpus else []
        if device not in ("auto", "cuda") or not gpus:
            return cls([""], processes)
        if processes > len(gpus):
            raise UserError(f"--processes {processes} needs {processes} GPUs; there are {len(gpus)}")
        slots = [",".join(gpus[first:first + processes])
                 for first in range(0, len(gpus) - processes + 1, processes)]
        return cls(slots, processes)

    def run(self, jobs: list[Job], outputs: Path, tell: Callable[[Job, int, float], None],
            wanted: Callable[[Job], bool] = lambda job: True) -> None:
        """Run all jobs that are still `wanted` when their turn comes, in order as slots become free.

        outputs  folder for the output of each job, as NAME.txt
        tell     called when a job ends, with its exit code and seconds, before its slot is used again; never
                 called by two threads at once
        raises   SystemExit with 128 + signal number once a signal has stopped the jobs
        """
        outputs.mkdir(parents=True, exist_ok=True)
        free: queue.Queue[str] = queue.Queue()
        for slot in self.slots:
            free.put(slot)
        telling = threading.Lock()

        def work(job: Job) -> None:
            if self.stopped_by or not wanted(job):
                return
            slot = free.get()
            try:
                code, seconds = self._run_one(job, slot, outputs / f"{job.name}.txt")
                with telling:
                    if not self.stopped_by:
                        tell(job, code, seconds)
            finally:
                free.put(slot)
        # when this process receives a stop signal, all runs save and stop
        with heard_by(self.stop), ThreadPoolExecutor(len(self.slots)) as workers:
            try:
                for future in [workers.submit(work, job) for job in jobs]:
                    future.result()
            except BaseException:
                self.stop(signal.SIGTERM)       # the others save, and the same command resumes them
                raise
        if self.stopped_by:
            name = signal.Signals(self.stopped_by).name
            print(f"stopped by {name}; run the same command again to resume", file=sys.stderr)
            sys.exit(128 + self.stopped_by)

    def _run_one(self, job: Job, slot: str, output: Path) -> tuple[int, float]:
        """The exit code of a run, and how long it took in seconds."""
        start = [sys.executable]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": slot} if slot else {})
        if self.processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        with open(output, "wb") as file, contextlib.ExitStack() as devices:
            for device in sorted(slot.split(",")):
                self._lock(device, devices)
            begun = time.perf_counter()
            with self.lock:
                if self.stopped_by:
                    return 128 + self.stopped_by, 0.0
                process = subprocess.Popen([*start, *job.words], stdout=file, stderr=subprocess.STDOUT,
                                           stdin=subprocess.DEVNULL, env=environment)
                self.alive.add(process)
            if self.stopped_by:     # the signal came while this run started
                self.stop(self.stopped_by)
            code = process.wait()
            with self.lock:
                self.alive.discard(process)
        return code, time.perf_counter() - begun

    def _lock(self, device: str, devices: contextlib.ExitStack) -> None:
        """Keep other trials from a device; while one trains there, wait, unless a signal stops this one.

        The first lock is of who is next, so that a trial which waits goes before another run of the same one.
        """
        is_told, name = False, f"device_{device or 'cpu'}"
        with contextlib.ExitStack() as queue:
            for lock, kept_by in ((f"{name}_next.lock", queue), (f"{name}.lock", devices)):
                while not self.stopped_by:
                    try:
                        kept_by.enter_context(locked(places.EXPERIMENTS / lock))
                        break
                    except Busy:
                        if not is_told:
                            print(f"another trial is training on {f'GPU {device}' if device else 'the CPU'}; "
                                  "waiting until its run has finished", file=sys.stderr, flush=True)
                        is_told = True
                        time.sleep(0.2)

    def stop(self, number: int, _frame: object = None) -> None:
        """Start no more runs, and let those in progress save and stop."""
        self.stopped_by = number
        for process in list(self.alive):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)


def last_words(output: Path) -> str:
    """A run's own error message, which torchrun's output may follow; else the last line of its output."""
    with contextlib.suppress(OSError):
        lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        complaint = next((line for line in reversed(lines) if re.match(r"[\w./-]+\.py: error: ", line)), "")
        return complaint or (lines[-1].strip() if lines else "")
    return ""
