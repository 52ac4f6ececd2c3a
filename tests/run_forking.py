"""Do what `python SCRIPT FLAGS` does, with runs forked from the server of tests/launch.py.

Of the options of subprocess those have a name here that the scripts use; any other is a TypeError.
"""

import os
import runpy
import subprocess
import sys
from multiprocessing import spawn
from multiprocessing.forkserver import _forkserver
from types import SimpleNamespace

from launch import ROOT, run, start

import benchtop.turns

_forkserver.ensure_running = lambda: None       # this process came from it


def without_main(name, prepare=spawn.get_preparation_data):
    """A new process must not begin with the modules that this script imports."""
    return {word: value for word, value in prepare(name).items() if not word.startswith("init_main")}


spawn.get_preparation_data = without_main


class Popen:
    """What Turns needs of subprocess.Popen; TAMPER has lines of Python for tests/drive.py."""

    def __init__(self, words, *, stdout, stderr, stdin, env):
        assert words[0] == sys.executable and (stderr, stdin) == (subprocess.STDOUT, subprocess.DEVNULL)
        words, lines = words[1:], env.get("TAMPER", "").format(driver=os.getpid())
        if lines:
            words = [str(ROOT / "tests/drive.py"), os.getcwd(), lines, *words[1:]]
        self.process = start(os.getcwd(), *words, out=stdout.name, err=stdout.name, env=env)

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self):
        self.process.join()
        return self.process.exitcode


def run_forked(words, *, cwd=None, check=False, capture_output=False, text=False, errors="strict", stdin=None,
               stdout=None):
    """The run reads nothing, as this process does; and with any `errors`, what it says must be UTF-8."""
    assert stdin in (None, subprocess.DEVNULL) and stdout in (None, subprocess.DEVNULL)
    assert text == capture_output
    done = run(cwd or os.getcwd(), *words[1:], expect=None)
    done.args = words
    if not capture_output:
        sys.stdout.write("" if stdout else done.stdout)
        sys.stderr.write(done.stderr)
        done.stdout = done.stderr = None
    if check:
        done.check_returncode()
    return done


def run_or_fork(words, **how):
    return (run_forked if words[0] == sys.executable else plain)(words, **how)


plain, subprocess.run = subprocess.run, run_or_fork
benchtop.turns.subprocess = SimpleNamespace(Popen=Popen, STDOUT=subprocess.STDOUT, DEVNULL=subprocess.DEVNULL)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
