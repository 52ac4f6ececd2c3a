"""Errors that the user can fix, each reported in one line."""

import os
import sys
import time


class UserError(Exception):
    """An error that the user can fix; shown as one line, without a traceback."""


class SharedError(UserError):
    """A UserError raised on all processes at once; only the first process of each machine prints it."""


class NonFinite(SharedError):
    """A loss, gradient, weight or score that is NaN or infinite; the run cannot continue."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type; at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def exit_quietly_on_other_ranks() -> None:
    """Exit silently, except on local rank 0, which reports an error that occurs on all ranks.

    The exit is delayed: torchrun kills all ranks as soon as one exits, and rank 0 must print the error first.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
        sys.exit(1)
