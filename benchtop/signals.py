"""Stop signals: a run that is told to stop saves first."""

import contextlib
import signal
from collections.abc import Callable, Iterator

# of people and terminals, of schedulers before a job's end, of limits, timers and a failing power supply,
# where a system has them; SIGQUIT ends all at once
STOPS = tuple(getattr(signal, name) for name in
              ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGPWR")
              if hasattr(signal, name))


def heard_signals() -> list[signal.Signals]:
    """Those of STOPS that are heard: what is ignored, as SIGHUP under nohup, stays so."""
    return [number for number in STOPS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextlib.contextmanager
def heard_by(handler: Callable) -> Iterator[None]:
    """Let a function hear them, and afterwards whoever did before."""
    before = {number: signal.signal(number, handler) for number in heard_signals()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopSignals:
    """STOPS let a run save and stop after its step; a second Ctrl-C ends it at once.

    at_once  raise Stopped wherever the run is, as when all is saved
    """

    def __init__(self, at_once: bool = False):
        self.at_once, self.received = at_once, 0

    def __enter__(self) -> "StopSignals":
        self.hearing = heard_by(self._receive)
        self.hearing.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hearing.__exit__(None, None, None)

    def _receive(self, number: int, _frame) -> None:
        if self.at_once:
            raise Stopped(number)
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class Stopped(Exception):
    """The run was told to stop by the signal of this number, and is saved."""
