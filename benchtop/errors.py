"""Errors that the person at the keyboard can mend, each said in one line."""

import os
import sys
import time


class UserError(Exception):
    """Something the person at the keyboard can mend; shown as one line, without a traceback."""


class SharedError(UserError):
    """A UserError that all processes raise at once, so that only the first one of each machine prints it."""


class NonFinite(SharedError):
    """A loss, gradient, weight or score that is not a number; the run cannot go on."""


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a line of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def exit_quietly_on_other_ranks() -> None:
    """For an error that all processes have: end, unless this is the first one that torchrun started here.

    It waits, since torchrun would otherwise kill the first before it has spoken; when that one has, this one.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
        sys.exit(1)
