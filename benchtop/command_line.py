"""What all scripts share as shell commands: flags, one-line errors, the command that starts them again."""

import argparse
import contextlib
import difflib
import errno
import io
import math
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import wraps
from pathlib import Path
from typing import TextIO

from benchtop import places
from benchtop.errors import UserError, exit_quietly_on_other_ranks
from benchtop.processes import places_by_torchrun


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that shows the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, ""):
            return action.help
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{action.help} (default: {shown})" if action.default is not argparse.SUPPRESS else action.help


# flags with another name in another script, or in an earlier version: accepted, but not shown in the help
OTHER_NAMES = {"--vocabsize": "--vocab_size", "--vocab_size": "--vocabsize",
               "--version": "--source", "-v": "--source"}


class ShowHelp(argparse.Action):
    """--help, and --help all for a parser that hides rarely used flags."""

    def __call__(self, parser: "Parser", namespace, values: str | None, option_string=None) -> None:
        if values not in (None, "all"):
            parser.error(f"--help takes no value, or the word all; not {values!r}")
        print(parser.help_text(shows_all=values == "all"), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, which suggest the closest flag.

    seldom  actions that only --help all shows
    """

    def __init__(self, description: str, **options):
        options.setdefault("formatter_class", Help)
        super().__init__(description=description, allow_abbrev=False, add_help=False, **options)
        self.seldom: list[argparse.Action] = []
        self.add_argument("-h", "--help", action=ShowHelp, nargs="?", metavar="all", dest=argparse.SUPPRESS,
                          default=argparse.SUPPRESS, help="show this help")

    def help_text(self, shows_all: bool) -> str:
        hidden = [] if shows_all else [(action, action.help) for action in self.seldom]
        for action, _ in hidden:
            action.help = argparse.SUPPRESS
        try:
            text = self.format_help()
        finally:
            for action, words in hidden:
                action.help = words
        more = f"\n{self.prog} --help all also shows the other {len(hidden)} flags\n" if hidden else ""
        return text + more

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        return super().parse_known_args(list(map(self._own_name, sys.argv[1:] if args is None else args)),
                                        namespace)

    def _own_name(self, word: str) -> str:
        """The word, with a flag's other name replaced by the one that this parser knows."""
        flag, *value = word.split("=", 1)
        known, other = self._option_string_actions, OTHER_NAMES.get(flag)
        return "=".join([other if other in known and flag not in known else flag, *value])

    def error(self, message: str) -> None:
        exit_quietly_on_other_ranks()
        unknown = re.match(r"unrecognized arguments: (--?\w[\w-]*)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[1], flags, n=1)
            message = f"there is no flag {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")
        script = Path(sys.argv[0])
        start = f"-m benchtop.{script.stem}" if script.parent.name == "benchtop" else self.prog
        everything = " all" if self.seldom else ""
        self.exit(2, f"{self.prog}: error: {message} (python {start} --help{everything} lists all flags)\n")


def whole_number(text: str) -> int:
    """Argument type: a whole number, typed as 1000000, 1_000_000 or 1e6."""
    try:
        return int(text)
    except ValueError as error:
        with contextlib.suppress(ValueError, OverflowError):
            if float(text) == int(float(text)):
                return int(float(text))
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from error


def positive(text: str, least: int = 1) -> int:
    """Argument type: a whole number of at least `least`."""
    number = whole_number(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {number}")
    return number


def open_streams() -> None:
    """Make it safe to print to the standard streams.

    Characters that the encoding lacks are escaped. A closed stream is replaced by /dev/null: the next file to
    be opened would otherwise get its descriptor, and receive the messages of libraries.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))      # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def tell(line: str, stream: TextIO) -> bool:
    """Print a line; False if it goes to a pipe that nobody reads any more.

    True for a closed terminal, which has already sent SIGHUP. Later output to either of them is discarded.
    """
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        let_go()
        return error.errno != errno.EPIPE
    return True


def let_go() -> None:
    """Redirect stdout and stderr to /dev/null if their pipe or terminal is gone, so that writes succeed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(io.UnsupportedOperation):      # not a file
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if poll.poll(0):        # POLLERR or POLLHUP, which are always reported
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())


def amount(text: str, or_zero: bool = True) -> float:
    """Argument type: a finite number, 0 or more; without `or_zero`, above 0."""
    value = float(text)
    if not 0 <= value < math.inf or not (value or or_zero):
        raise argparse.ArgumentTypeError(f"must be {'0 or more' if or_zero else 'above 0'}, not {text}")
    return value


def in_one_line(error: UserError | OSError) -> str:
    """The message of an error in one line; for an OSError, its reason and file."""
    words = str(error)
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(words.splitlines())


def end(error: UserError | OSError) -> None:
    """Exit with a one-line error and exit code 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {in_one_line(error)}")


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Make `main` a shell command: a UserError or Ctrl-C ends it with one line and a non-zero exit code.

    If nobody reads its output any more, as with `| head`, it exits silently, as other programs do.
    """

    @wraps(main)
    def run(*parts) -> None:
        open_streams()
        try:
            places_by_torchrun()        # checks torchrun's variables for every script
            main(*parts)
            sys.stdout.flush()
        except UserError as error:
            end(error)
        except BrokenProcessPool:
            end(UserError("a worker process was killed, probably because memory ran out; try again "
                          "with --num_workers 1"))
        except BrokenPipeError:
            let_go()
            sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            if error.strerror is None:
                raise
            end(error)
        except KeyboardInterrupt:
            tell(f"\n{Path(sys.argv[0]).name}: interrupted; no incomplete file has its final name",
                 sys.stderr)
            sys.exit(130)
    return run


def program() -> list[str]:
    """The words of a command that starts this script again, with as many processes on one machine as now."""
    bin_folder = ".venv/bin/" if Path(sys.prefix).resolve() == places.ROOT / ".venv" else ""
    script = os.path.relpath(sys.argv[0])
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return [f"{bin_folder}python", script]
    processes = f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
    return [f"{bin_folder}python", "-m", "torch.distributed.run", "--standalone", processes, script]


def minutes(seconds: float) -> str:
    """A duration in minutes and seconds: 247.3 is 4:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def counted(number: float, thing: str) -> str:
    """A number with its noun: 1 run, 2,000 runs, 0.5 minutes."""
    return f"{number:,.12g} {thing}{'' if number == 1 else 's'}"


def figure(number: float) -> str:
    """A measured number with three significant digits, or whole from 100 on: 0.163, 22.2, 1,303."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
