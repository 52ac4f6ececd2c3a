"""Files that get their name only when they are complete, and locks between processes."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from benchtop.errors import UserError, first_line


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """A temporary path for a library that opens files itself; the finished file is renamed to `path`.

        with whole_path(folder / "model.safetensors") as partial:
            save_file(tensors, partial)

    The file is renamed when all of it is on disk; after an error, an existing file at `path` is unchanged.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.strerror and not error.filename:       # as when the disk is full
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)     # exists after an error, or if it was a hard link to `path`


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write, which is renamed to `path` when all of it is on disk (see whole_path).

        with whole_file(folder / "model.safetensors") as file:
            file.write(content)
    """
    with whole_path(path) as partial, \
            open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


def save_tensors(path: Path, tensors: dict, **options) -> str:
    """Write a safetensors file and return its SHA-256.

    raises  OSError that names the file, for instance if the disk is full; safetensors has its own error type
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    with whole_path(path) as partial:
        try:
            save_file(tensors, partial, **options)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            said = os.strerror(int(number[1])) if number else first_line(error)
            raise OSError(int(number[1]) if number else errno.EIO, said) from error
        return sha256_of(partial)


def write_text(path: Path, text: str) -> None:
    with whole_file(path, "w") as file:
        file.write(text)


def write_json(path: Path, content: dict | list) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def link(path: Path, name: Path) -> None:
    """Hard-link a file to `name`, or copy it if the file system has no links; an existing file is kept."""
    if name.exists():
        return
    try:
        os.link(path, name)
    except OSError:
        with open(path, "rb") as source, whole_file(name) as file:
            shutil.copyfileobj(source, file)


def sync(folder: Path) -> None:
    """Make renames in a folder survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Lock a file against other processes, and remove it afterwards.

    shared  take a shared lock; the file is then kept, since only the holder of an exclusive lock removes it
    raises  Busy if another process holds the lock and `wait` is off; UserError if a folder or file is in the
            way
    """
    file = _hold(path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    try:
        yield
    finally:
        if not shared and _is_at(path, file):
            path.unlink(missing_ok=True)
        file.close()


class Busy(UserError):
    """Another process holds a lock."""


def _hold(path: Path, how: int) -> IO:
    """The file, open and locked. A file removed while we waited excludes nobody, so a new one is made."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a", encoding="utf-8")    # noqa: SIM115
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            wrong = path if path.is_dir() else path.parent
            raise UserError(f"{wrong} is in the way ({error.strerror}); remove it with: "
                            f"rm -r {shlex.quote(str(wrong))}") from error
        except FileNotFoundError:       # the folder was removed after mkdir
            if path.is_symlink():       # into a missing folder: a retry would fail, too
                raise
            continue
        try:
            fcntl.flock(file, how)
        except BlockingIOError as error:
            file.close()
            raise Busy(f"another process is writing the same output in {path.parent}; wait for it, or choose "
                       "another --name") from error
        except OSError as error:
            print(f"warning: no locks on this file system ({error.strerror}); make sure that no other "
                  f"process writes to {path.parent}", file=sys.stderr)
            return file
        except BaseException:
            file.close()
            raise
        if _is_at(path, file):
            return file
        file.close()


def _is_at(path: Path, file: IO) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
