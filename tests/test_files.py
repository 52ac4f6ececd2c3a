"""Locks between processes, and what a full disk leaves. Run: ./run.sh test tests/test_files.py"""

import errno
import fcntl
import os
import threading

import pytest

from benchtop import files
from benchtop.errors import UserError


@pytest.mark.parametrize("shared", [False, True])
def test_whoever_waited_for_a_removed_lock_holds_the_new_one(tmp_path, monkeypatch, shared):
    """While we wait, the holder removes the file and another makes a new one of that name."""
    path, real = tmp_path / "it.lock", fcntl.flock
    taken = []

    def flock(file, how):
        real(file, how)
        if not taken:       # what happens between the lock and the look at its name
            path.unlink()
            taken.append(open(path, "a"))       # noqa: SIM115
            real(taken[0], fcntl.LOCK_EX)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="another process"), files.locked(path, shared=shared):
        pytest.fail("two hold it")
    assert path.exists(), "nobody removes another's lock"
    taken[0].close()
    with files.locked(path):
        assert path.exists()
    assert not path.exists()


def test_threads_are_never_inside_a_lock_together(tmp_path):
    """Each flock is of its own open file, so threads exclude each other as processes do."""
    marker, entered, together = tmp_path / "inside", [], []

    def work():
        for _ in range(200):
            with files.locked(tmp_path / "folder" / "it.lock", wait=True):
                entered.append(1)
                try:
                    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    together.append(1)
                else:
                    os.unlink(marker)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 800 and not together and not list((tmp_path / "folder").iterdir())


def test_those_that_share_a_lock_keep_others_out_until_the_last_is_gone(tmp_path):
    path = tmp_path / "it.lock"
    with files.locked(path, shared=True):
        with files.locked(path, shared=True):
            pass
        with pytest.raises(UserError), files.locked(path):
            pytest.fail("it is shared")
    with files.locked(path), pytest.raises(UserError), files.locked(path, shared=True):
        pytest.fail("it is not shared")
    assert not path.exists()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", flock)
    with files.locked(tmp_path / "it.lock"):
        pass
    assert "warning: no locks on this file system (No locks available)" in capsys.readouterr().err


def test_an_error_without_a_name_gets_that_of_the_file(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        files.write_text(tmp_path / "it.txt", "text")
    assert error.value.filename == str(tmp_path / "it.txt") and not list(tmp_path.iterdir())
