"""Standard streams in any state: closed, gone, or of an encoding that lacks a letter.

Run: ./run.sh test tests/test_streams.py
"""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import ROOT, summary_of, train_here

from benchtop.budget import Clock
from benchtop.checkpoints import read_checkpoint
from benchtop.command_line import command
from benchtop.run import Run
from benchtop.signals import Stopped, StopSignals


@pytest.fixture
def nobody(monkeypatch):
    """Makes a stream a pipe that nobody reads, or a terminal that is gone: nobody("stdout", "pipe")."""
    opened = []

    def be(name: str, kind: str) -> None:
        reader, writer = os.pipe() if kind == "pipe" else os.openpty()
        os.close(reader)
        opened.append(open(writer, "w"))    # noqa: SIM115
        monkeypatch.setattr(sys, name, opened[-1])
    yield be
    for stream in opened:
        stream.close()


def the_run(here: Path) -> Path:
    folder, = here.glob("experiments/*")
    return folder


def send_after(monkeypatch, number: int, step: int) -> None:
    """Let a run get a signal after a step."""
    real = Run.between_steps

    def between_steps(run):
        real(run)
        if run.step == step:
            os.kill(os.getpid(), number)
    monkeypatch.setattr(Run, "between_steps", between_steps)


# ------------------------------------------------------------------------------------------------
# Stop signals
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_every_stop_signal_is_noted_or_ends_what_is_saved_at_once(name):
    number = signal.Signals[name]
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        assert signals.received == number
    with pytest.raises(Stopped) as stop, StopSignals(at_once=True):
        os.kill(os.getpid(), number)
    assert stop.value.args == (number,)


def test_a_run_that_gets_a_signal_saves_and_ends_with_its_number(here, monkeypatch, capsys):
    send_after(monkeypatch, signal.SIGUSR1, step=1)
    with pytest.raises(SystemExit) as end:
        train_here(here, num_steps=20, val_every=20)
    assert end.value.code == 128 + signal.SIGUSR1 and read_checkpoint(the_run(here))["step"] == 2
    assert "stopped by SIGUSR1; the last good checkpoint is of step 2" in capsys.readouterr().out


def test_a_signal_that_was_ignored_stays_ignored():
    """As SIGHUP is by nohup, and SIGINT in the background of a shell script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------------
# Pipes and terminals that are gone
# ------------------------------------------------------------------------------------------------

def test_a_pipe_that_nobody_reads_stops_a_run_that_saves_and_says_so_elsewhere(here, nobody, capsys):
    nobody("stdout", "pipe")
    with pytest.raises(SystemExit) as end:
        train_here(here, num_steps=20, val_every=20)
    assert end.value.code == 128 + signal.SIGPIPE and read_checkpoint(the_run(here))["step"] == 1
    assert "stopped by SIGPIPE; the last good checkpoint is of step 1" in capsys.readouterr().err


def test_a_run_saves_also_if_nobody_reads_either_stream(here, nobody):
    nobody("stdout", "pipe")
    nobody("stderr", "pipe")
    with pytest.raises(SystemExit) as end:
        train_here(here, num_steps=20, val_every=20)
    assert end.value.code == 128 + signal.SIGPIPE and read_checkpoint(the_run(here))["step"] == 1


def test_a_closed_terminal_saves_if_it_says_so_and_else_the_run_goes_on(here, nobody, monkeypatch):
    """A shell that lets a job go (disown) sends it no SIGHUP."""
    nobody("stdout", "terminal")
    nobody("stderr", "terminal")
    assert summary_of(train_here(here))["status"] == "finished"
    send_after(monkeypatch, signal.SIGHUP, step=1)
    with pytest.raises(SystemExit) as end:
        train_here(here, num_steps=20, val_every=20, model_name="told")
    folder, = here.glob("experiments/*_told")
    assert end.value.code == 128 + signal.SIGHUP and read_checkpoint(folder)["step"] == 2


@pytest.mark.parametrize("size", [1, 10**6])
def test_a_command_whose_pipe_nobody_reads_ends_without_a_word(nobody, capsys, size):
    """What is short is written only at the end."""
    nobody("stdout", "pipe")
    with pytest.raises(SystemExit) as end:
        command(lambda: print("x" * size))()
    assert end.value.code == 128 + signal.SIGPIPE and capsys.readouterr().err == ""
    print("nor does more that is printed do harm", flush=True)


# ------------------------------------------------------------------------------------------------
# Encodings and closed streams
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(monkeypatch, encoding):
    text = "⟨⟩ é 東京 \udcff"       # the last as an argument that is no UTF-8 has it
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    command(lambda: print(text, file=sys.stderr) or print(text))()
    sys.stderr.flush()
    wanted = text.encode(encoding, "backslashreplace") + b"\n"
    assert [stream.buffer.getvalue() for stream in (sys.stdout, sys.stderr)] == [wanted, wanted]


def test_a_run_is_logged_as_utf_8_and_finishes_on_a_terminal_that_knows_ascii_only(here, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--prompt", "\udcff"])
    monkeypatch.setattr(Clock, "share", lambda *_: 0.0)
    command(train_here)(here)
    log = (the_run(here) / "training_log.txt").read_text(encoding="utf-8")
    assert "⟨⟩" in log and b"\\u27e8\\u27e9" in sys.stdout.buffer.getvalue()


CLOSED = """
import os, sys
sys.path.insert(0, {root!r})
from benchtop.command_line import command

@command
def main():
    print("unheard")
    print("unheard", file=sys.stderr)
    sys.stderr.isatty(), sys.stdin.isatty(), sys.stdin.read()
    with open("file", "w") as file:
        file.write(str(file.fileno()))
main()
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_was_closed_is_there_and_its_number_is_no_files(tmp_path, closed):
    (tmp_path / "script.py").write_text(CLOSED.format(root=str(ROOT)))
    done = subprocess.run(f"exec {sys.executable} script.py {closed}", shell=True, cwd=tmp_path,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert int((tmp_path / "file").read_text()) > 2
