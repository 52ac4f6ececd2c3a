"""Stop signals: a run that receives one saves a checkpoint and stops."""

import contextlib
import signal
from collections.abc import Callable, Iterator

# sent by people and terminals, by schedulers before a job ends, by resource limits, timers and failing power
# supplies, as far as the system has them; SIGQUIT is left out, so that it ends a run at once
STOPS = tuple(getattr(signal, name) for name in
              ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGPWR")
              if hasattr(signal, name))


def heard_signals() -> list[signal.Signals]:
    """The STOPS to handle; a signal that is ignored, such as SIGHUP under nohup, stays ignored."""
    return [number for number in STOPS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextlib.contextmanager
def heard_by(handler: Callable) -> Iterator[None]:
    """Handle stop signals with `handler`, then restore the previous handlers."""
    before = {number: signal.signal(number, handler) for number in heard_signals()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopSignals:
    """Note a stop signal, so that the run saves and stops after its step; a second Ctrl-C ends it at once.

    at_once  raise Stopped wherever the run is, for when everything is saved
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
    """The run was stopped by the signal with this number, and everything is saved."""
