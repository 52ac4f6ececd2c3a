"""Where text comes from: Python's own library, your files, or FineWeb.

    stdlib                       every module of this Python's library, outside its tests and site-packages
    10B  100B  350B  full        FineWeb on the Hugging Face Hub, with `edu` behind FineWeb-Edu (hub.py)
    notes.txt  book.md  code.py  one file is one document
    rows.jsonl  rows.parquet     one row is one document, in the column `text`
    corpus/  'corpus/*.jsonl'    a folder (searched to its depths) or a glob of such files

Files may be plain, .gz or .zst. A document is a pair (id, text):

    >>> next(iter(open_source("stdlib")))[0]
    'stdlib/__future__.py'

Look at a source before you train on it:  python documents.py stdlib
"""

import argparse
import contextlib
import difflib
import fcntl
import glob
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

Document = tuple[str, str]      # (id, text)

FILE_IS_DOCUMENT = (".txt", ".md", ".py")
ROW_IS_DOCUMENT = (".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")

HELD_OUT_ONE_IN = 64            # this share of all distinct documents is never trained on
SHUFFLE_CHARACTERS = 200_000_000    # how much text the shuffle may hold in memory
BATCH_CHARACTERS = 1_000_000    # text that travels to a worker process at a time


class UserError(Exception):
    """Something the person at the keyboard can mend; shown as one line, without a traceback."""


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a line of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        shown = " ".join(action.default) if isinstance(action.default, list) else action.default
        return f"{action.help} (default: {shown})" if action.default is not argparse.SUPPRESS else action.help


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, with the flag that was perhaps meant."""

    def __init__(self, description: str, **options):
        options.setdefault("formatter_class", Help)
        super().__init__(description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        leave_the_word_to_the_first()
        unknown = re.match(r"unrecognized arguments: (--?\w[\w-]*)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[1], flags, n=1)
            message = f"there is no flag {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: error: {message} (python {self.prog} --help lists all flags)\n")


def positive(text: str, least: int = 1) -> int:
    """The type of a flag that takes a whole number from `least` on."""
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, is {text!r}") from error
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, is {number}")
    return number


def leave_the_word_to_the_first() -> None:
    """For an error that all processes have: end, unless this is the first one that torchrun started here.

    It waits, since torchrun would otherwise kill the first before it has spoken; when that one has, this one.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
        sys.exit(1)


def end(complaint: str) -> None:
    """Leave with one line and exit code 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(complaint.splitlines())}")


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Make `main` a shell command: a UserError and Ctrl-C end in one line and a non-zero exit code."""

    @wraps(main)
    def run(*parts) -> None:
        try:
            main(*parts)
        except UserError as error:
            end(str(error))
        except BrokenProcessPool:
            end("a worker process was killed, perhaps for want of memory; try again with --num_workers 1")
        except OSError as error:
            if error.strerror is None:
                raise
            end(error.strerror + (f": {error.filename}" if error.filename else ""))
        except KeyboardInterrupt:
            print(f"\n{Path(sys.argv[0]).name}: interrupted; nothing unfinished was left under a final name",
                  file=sys.stderr)
            sys.exit(130)
    return run


# ------------------------------------------------------------------------------------------------
# Sources
# ------------------------------------------------------------------------------------------------

@dataclass
class Unit:
    """A part of a source that is read as a whole, in an order of its own.

    read     its documents that are not empty
    size     bytes to download; 0 if it is here
    documents  how many there are, once it is being read and if that is known then
    is_here  whether it need not be downloaded
    begin    start to fetch it, while others work
    remove   give its disk back
    """
    name: str
    read: Callable[[], Iterator[Document]]
    size: int = 0
    documents: int = 0
    is_here: Callable[[], bool] = lambda: True
    begin: Callable[[], None] = lambda: None
    remove: Callable[[], None] = lambda: None


class Source:
    """Documents in a fixed order, read one at a time.

    fingerprint  SHA-256 over the names and contents of the files; changes when the source changes
    label        `books-1f0c9a3e`, safe in a file name: a word for people, then the fingerprint's beginning
    replaced     invalid UTF-8 sequences that were replaced by U+FFFD so far
    """

    def __init__(self, word: str, files: list[tuple[str, Path]], stamp: list):
        self.files = files
        self.replaced = 0
        self.fingerprint = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
        self.label = f"{word}-{self.fingerprint[:8]}"

    def __iter__(self) -> Iterator[Document]:
        self.replaced = 0
        for name, path in self.files:
            try:
                yield from self._read(name, path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    def units(self, seed: int | None) -> list[Unit]:
        """All of it as one unit, in an order that the seed decides; without one, as it comes."""
        def read() -> Iterator[Document]:
            full = (document for document in self if document[1])
            return full if seed is None else shuffled(full, seed)
        return [Unit("", read)]

    def _read(self, name: str, path: Path) -> Iterator[Document]:
        kind = kind_of(path)
        if kind in FILE_IS_DOCUMENT:
            with open_bytes(path) as file:
                yield name, self._decode(file.read())
        elif kind == ".jsonl":
            with open_bytes(path) as file:
                for number, line in enumerate(file, 1):
                    text = self._field(line, f"{path} line {number}") if line.strip() else None
                    if text is not None:
                        yield f"{name}:{number}", text
        else:
            yield from self._read_parquet(name, path)

    def _field(self, line: bytes, where: str) -> str | None:
        """The text of a row; None where it is null, as in parquet."""
        try:
            row = json.loads(self._decode(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error})") from error
        if isinstance(row, dict) and row.get("text", "") is None:
            return None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            has = ("its columns are " + ", ".join(map(str, row)) if isinstance(row, dict)
                   else "it is no object")
            raise UserError(f"{where} has no text in a column named text; {has}")
        return self._valid(row["text"])

    def _read_parquet(self, name: str, path: Path) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet
        with open_bytes(path) as file:
            try:
                table = pyarrow.parquet.ParquetFile(file)
                columns = table.schema_arrow.names
                if "text" not in columns:
                    raise UserError(f"{path} has no column named text; its columns are {', '.join(columns)}")
                number = 0
                for batch in table.iter_batches(batch_size=256, columns=["text"]):
                    for text in batch.column(0).cast(pyarrow.binary()).to_pylist():
                        number += 1
                        if text is not None:
                            yield f"{name}:{number}", self._decode(text)
            except (pyarrow.ArrowException, UnicodeDecodeError) as error:      # the latter in a column's name
                raise UserError(f"{path} is no readable parquet file ({first_line(error)})") from error

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            text = raw.decode(errors="replace")
            self.replaced += text.count("\ufffd") - raw.count("\ufffd".encode())
            return text

    def _valid(self, text: str) -> str:
        """JSON can spell half a surrogate pair, which is no text."""
        try:
            text.encode()
            return text
        except UnicodeEncodeError:
            clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            self.replaced += clean.count("\ufffd") - text.count("\ufffd")
            return clean


def parquet_rows(path: Path) -> int:
    """How many rows a parquet file has; 0 if that cannot be read."""
    import pyarrow
    import pyarrow.parquet
    try:
        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    except (pyarrow.ArrowException, OSError):
        return 0


def open_source(spec: str | list[str]) -> Source:
    """A Source from a name or from paths and globs.

    raises  UserError if a name or path is unknown, a glob matches nothing or a file's kind is not known
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    if specs == ["stdlib"]:
        return python_library()
    if "stdlib" in specs:
        raise UserError("stdlib cannot be mixed with files; name one of them")
    import hub  # late, since it imports this module
    if len(specs) == 1 and specs[0] in hub.FINEWEB and not os.path.exists(specs[0]):
        return hub.FineWeb(specs[0])
    for name in specs:
        if name in (*hub.FINEWEB, *hub.READY_MADE) and not os.path.exists(name):
            raise UserError(f"{name} comes from the Hugging Face Hub and "
                            + ("cannot be mixed with other sources" if name in hub.FINEWEB else
                               "has tokens, no text; get it with: python download_fineweb.py --version "
                               f"{name}"))
    try:
        paths = list(dict.fromkeys(path for item in specs for path in find_files(item)))
        stamp = [[os.fsencode(path.name).hex(), sha256_of(path)] for path in paths]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    # a file's name need not be UTF-8, an id must be
    ids = [os.fsencode(path).decode(errors="backslashreplace") for path in paths]
    return Source(word_for(specs), list(zip(ids, paths, strict=True)), stamp)


def python_library() -> Source:
    """Every module of the running Python's library, sorted by path; the same for all with that Python."""
    top = Path(sysconfig.get_paths()["stdlib"])
    leave_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = sorted(path.relative_to(top).as_posix() for path in top.rglob("*.py")
                   if path.is_file() and not leave_out.intersection(path.relative_to(top).parts[:-1]))
    files = [(f"stdlib/{name}", top / name) for name in names]
    if not files:
        raise UserError(f"no modules in {top}; this Python was installed without its library's source")
    return Source("stdlib", files, [[name, sha256_of(path)] for name, path in files])


def find_files(item: str) -> list[Path]:
    path = Path(item)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and is_known(file))
        if not found:
            raise UserError(f"{item} holds no .txt, .md, .py, .jsonl or .parquet file")
        return found
    found = [path] if path.is_file() else sorted(map(Path, glob.glob(item, recursive=True)))
    found = [file for file in found if file.is_file()]
    if not found:
        raise UserError(f"no source named {item}: not stdlib, and no file, folder or glob of that name")
    for file in found:
        if not is_known(file):
            raise UserError(f"{file} is of no known kind; text files end in "
                            f"{' '.join(FILE_IS_DOCUMENT + ROW_IS_DOCUMENT)}, "
                            "plain or with .gz or .zst behind")
    return found


def kind_of(path: Path) -> str:
    """`.jsonl` for rows.jsonl and for rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_known(path: Path) -> bool:
    return kind_of(path) in FILE_IS_DOCUMENT + ROW_IS_DOCUMENT


def word_for(specs: list[str]) -> str:
    """What people would call these files: the file's name, or its folder's."""
    first = Path(specs[0])
    word = first.parent.name if glob.has_magic(first.name) or len(specs) > 1 else first.name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9-]+", "-", word).strip("-")[:30] or "files"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def open_bytes(path: Path):
    """The file's bytes, decompressed as its last suffix says; a parquet file needs to be sought in."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS:
        with open(path, "rb") as file:
            yield file
        return
    try:
        with tempfile.TemporaryFile() as plain:
            with open_compressed(path, suffix) as packed:
                shutil.copyfileobj(packed, plain, 1 << 20)
            plain.seek(0)
            yield plain
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is cut off or damaged: {error}") from error


def open_compressed(path: Path, suffix: str):
    if suffix == ".gz":
        return gzip.open(path, "rb")
    import pyarrow
    return pyarrow.input_stream(str(path), compression="zstd")


# ------------------------------------------------------------------------------------------------
# Order, held-out documents, and work for several processes
# ------------------------------------------------------------------------------------------------

def is_held_out(text: str, one_in: int = HELD_OUT_ONE_IN) -> bool:
    """Whether a document is kept for validation: a hash of its own text decides, and nothing else.

    So everybody holds out the same documents, with any tokenizer, seed or number of shards, and no text
    stands on both sides.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % one_in == 0


def shuffled(documents: Iterable[Document], seed: int, characters: int = SHUFFLE_CHARACTERS,
             ) -> Iterator[Document]:
    """The documents in an order that the seed (0 is one too) decides.

    A source of at most `characters` characters is shuffled as a whole. Of a larger one about that much is
    held in memory, and a document drawn at random from it leaves for each that arrives.
    """
    rng = random.Random(seed)
    held: list[Document] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document[1])
        while size > characters and len(held) > 1:
            last = _draw(held, rng)
            size -= len(last[1])
            yield last
    rng.shuffle(held)
    yield from held


def _draw(held: list[Document], rng: random.Random) -> Document:
    place = rng.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


def batched(documents: Iterable[Document], characters: int = BATCH_CHARACTERS) -> Iterator[list[Document]]:
    """Lists of documents of about `characters` characters together, in order."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def in_parallel(function: Callable, tasks: Iterable, num_workers: int, setup: Callable | None = None,
                arguments: tuple = ()) -> Iterator:
    """`map(function, tasks)` over worker processes: results in the tasks' order, few tasks under way at once.

    `setup(*arguments)` runs once in each worker. With one worker all happens in this process.
    """
    if num_workers <= 1:
        if setup:
            setup(*arguments)
        yield from map(function, tasks)
        return
    tasks = iter(tasks)
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context(_start_method()), _begin_worker,
                             (setup, arguments)) as pool:
        try:
            waiting = deque(pool.submit(function, task) for task in itertools.islice(tasks, 2 * num_workers))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, task) for task in itertools.islice(tasks, 1))
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_method() -> str | None:
    """The system's own way to start a process, but one that has threads, ours or torch's, must not fork."""
    distributed = sys.modules.get("torch.distributed")
    has_threads = threading.active_count() > 1 or (distributed and distributed.is_initialized())
    return "forkserver" if has_threads and sys.platform == "linux" else None


def _begin_worker(setup: Callable | None, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if setup:
        setup(*arguments)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for its next task for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a file against other processes, and remove it afterwards.

    raises  UserError if another one holds it and `wait` is off
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process makes the same in {path.parent}; wait for it, or choose "
                            "another --name") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_first_process() -> bool:
    """Whether this process does the work; under torchrun the others leave it to the first."""
    return os.environ.get("RANK", "0") == "0"


def free_memory_mib() -> float:
    """What this machine has left, or the container that this process is in."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    free = int(re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text())[1]) / 2**10
    for group, limit, used, cached in control_groups():
        with contextlib.suppress(OSError, ValueError, TypeError):       # no such control group, or no limit
            reclaimable = re.search(rf"^{cached} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            left = int((group / limit).read_text()) - int((group / used).read_text()) + int(reclaimable[1])
            free = min(free, left / 2**20)
    return free


def control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """What may limit this process's memory: its own group's folder and those around it, of both versions."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            own = Path(name.lstrip("/"))
            for group in (own, *own.parents):
                if not controllers:
                    yield Path("/sys/fs/cgroup") / group, "memory.max", "memory.current", "inactive_file"
                elif controllers == "memory":
                    yield (Path("/sys/fs/cgroup/memory") / group, "memory.limit_in_bytes",
                           "memory.usage_in_bytes", "total_inactive_file")


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------
# Looking at a source
# ------------------------------------------------------------------------------------------------

@command
def main() -> None:
    parser = Parser("Count the documents of a source and show the first.")
    parser.add_argument("source", nargs="+",
                        help="stdlib, FineWeb (10B, 10Bedu, ...), or files, folders and globs")
    source = open_source(parser.parse_args().source)
    documents = characters = held_out = 0
    for name, text in source:
        if not documents:
            print(f"{name}:\n{text[:500]}\n...")
        documents += 1
        characters += len(text)
        held_out += is_held_out(text)
    if not documents:
        raise UserError("the source is empty")
    print(f"{documents:,} documents, {characters:,} characters, {held_out:,} documents held out, "
          f"{source.replaced:,} invalid UTF-8 sequences replaced; label {source.label}")


if __name__ == "__main__":
    main()
