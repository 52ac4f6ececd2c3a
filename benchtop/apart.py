"""Isolated checks: each part of a check-up may fail, crash or hang without stopping the others.

The parts run one after the other in a child process, which sends each finding to its parent as a JSON line.
When the child crashes or is silent for too long, its parent records that and starts another child for the
remaining parts. One illegal memory access in a kernel makes the GPU unusable for its whole process.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchtop.errors import first_line

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "FAILED", "skipped"
WIDTH = 88      # of a finding's text, on screen


@dataclass(frozen=True)
class Finding:
    """What a check found: a line for people, and values for programs."""
    check: str
    says: str
    status: str = OK
    values: dict = field(default_factory=dict)

    def __str__(self) -> str:
        """The check, its text and its status in a line; a long text is wrapped, with the status after it."""
        *lines, last = textwrap.wrap(self.says, WIDTH) or [""]
        lines.append(f"{last:<{WIDTH}} {self.status}")
        return "\n".join(f"{'' if number else self.check:<12}{line}" for number, line in enumerate(lines))


Part = Callable[[], Iterable[Finding]]


# ------------------------------------------------------------------------------------------------
# In the child
# ------------------------------------------------------------------------------------------------

def run_parts(parts: dict[str, Part], tell: Callable[[dict], None], still_works: Callable[[], None]) -> None:
    """Run the parts in order; an exception becomes a finding, and its traceback goes to stderr.

    still_works  raises an error if the device is no longer usable by this process, which then ends
    """
    for name, part in parts.items():
        tell({"begins": name})
        try:
            for finding in part():
                tell(asdict(finding))
        except Exception as error:
            traceback.print_exc()
            cause = f"{type(error).__name__}: {first_line(error)}"
            tell(asdict(Finding(name, cause, FAILED)))
            tell({"ends": name})
            still_works()
        else:
            tell({"ends": name})


def teller(handle: int) -> Callable[[dict], None]:
    """A function that sends messages to the parent through a pipe; `handle` is its file descriptor."""
    file = os.fdopen(handle, "w", encoding="utf-8")

    def tell(message: dict) -> None:
        file.write(json.dumps(message) + "\n")
        file.flush()
    return tell


# ------------------------------------------------------------------------------------------------
# In the parent
# ------------------------------------------------------------------------------------------------

def findings_of(command: list[str], names: list[str], said: Path, silence: float, seconds: float,
                ) -> Iterator[Finding]:
    """Run these parts in child processes; yields their findings.

    command  starts a child; --parts NAME,NAME --tell HANDLE is appended
    said     file for the children's output
    silence  seconds without a message after which a part counts as hanging
    seconds  for all parts together; parts that have not begun by then are skipped
    """
    left, ends = list(names), time.monotonic() + seconds
    while left:
        current = None
        with Child([*command, "--parts", ",".join(left)], said) as child:
            for message in child.messages(silence, ends):
                if "begins" in message:
                    current = message["begins"]
                elif "ends" in message:
                    left.remove(message["ends"])
                else:
                    yield Finding(**message)
            cause = child.cause()
        if time.monotonic() > ends:
            yield from (Finding(name, "no time left for it", SKIPPED) for name in left if name != current)
            left = [name for name in left if name == current]
        if current is None and left:
            yield Finding("proof", f"could not start: {cause}", FAILED)
            return
        if current in left:
            yield Finding(current, cause, FAILED)
            left.remove(current)


class Child:
    """A child process, its own children, and the messages that it sends."""

    def __init__(self, command: list[str], said: Path):
        self.said, self.problem = said, ""
        self.end, other = os.pipe()
        with open(said, "ab") as out:
            self.process = subprocess.Popen([*command, "--tell", str(other)], stdin=subprocess.DEVNULL,
                                            stdout=out, stderr=out, pass_fds=[other], start_new_session=True)
        os.close(other)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        os.close(self.end)

    def kill(self) -> None:
        """Kill the child and its own children at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def messages(self, silence: float, ends: float) -> Iterator[dict]:
        """The child's messages, until it ends, is silent for too long, or time is up."""
        os.set_blocking(self.end, False)
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.end, selectors.EVENT_READ)
            while True:
                limit = max(0.0, min(silence, ends - time.monotonic()))
                if not selector.select(limit):
                    self.problem = (f"hangs: no message from it for {silence:.0f} s" if limit == silence
                                    else "did not finish within the time for all parts (--seconds)")
                    return
                more = os.read(self.end, 1 << 16)
                if not more:
                    return
                *lines, rest = (rest + more).split(b"\n")
                yield from map(json.loads, lines)

    def cause(self) -> str:
        """Why the messages stopped."""
        if self.problem:
            return self.problem
        code = self.process.wait()
        lines = self.said.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "(no output)")
        if code < 0:
            return f"crashed with {signal.Signals(-code).name}; its last line: {last}"
        return f"ended with exit code {code}; its last line: {last}"


def exit_code(findings: list[Finding]) -> int:
    """1 if a check failed, or all were skipped, or there are none; otherwise 0, even with warnings only."""
    statuses = {finding.status for finding in findings}
    return int(FAILED in statuses or statuses <= {SKIPPED})
