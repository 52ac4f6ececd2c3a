"""Documents, the sources that they are read from, and the order in which they are read.

A document is a pair (id, text). A Source reads documents from files one at a time; sources.py finds the files
for a name or a path, hub.py those on the Hugging Face Hub.
"""

import contextlib
import gzip
import hashlib
import json
import random
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchtop import decoding
from benchtop.command_line import counted
from benchtop.errors import UserError, first_line

Document = tuple[str, str]      # (id, text)

FILE_IS_DOCUMENT = (".txt", ".md", ".py")
ROW_IS_DOCUMENT = (".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")

HELD_OUT_ONE_IN = 64            # of a large source, one distinct document in this many is held out per split
SHUFFLE_CHARACTERS = 200_000_000    # of text that the shuffle may hold in memory
BATCH_CHARACTERS = 1_000_000    # of text that a worker process gets at a time
BEGINNING = 1 << 20             # bytes of a .jsonl file from which its encoding is determined
NAMED_LINES = 20                # maximum number of bad lines that an error lists


# ------------------------------------------------------------------------------------------------
# Sources
# ------------------------------------------------------------------------------------------------

@dataclass
class Unit:
    """A part of a source that is read as a whole, in an order of its own.

    read       its non-empty documents
    size       bytes of the download; 0 for text that is not downloaded
    documents  their number; 0 until the unit is read, or if unknown
    is_here    whether the text is on this machine
    begin      start the download in the background
    remove     delete the downloaded text
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

    fingerprint    SHA-256 over the names and contents of the files; changes when the source changes
    label          `books-1f0c9a3e`, safe in a file name: a word for people, then the fingerprint's beginning
    replaced_in    invalid sequences of each file that were replaced by U+FFFD when it was last read
    odd_in         rows of each file that contain NULs or escapes of ISO-2022; they are kept as they are
    is_large       whether it is known to have thousands of documents, so that they need not be counted
    held_out_file  the only unit that is held out; empty: documents are held out by a hash of their text
    """
    is_large = False
    held_out_file = ""

    def __init__(self, word: str, files: list[tuple[str, Path]], stamp: list):
        self.files = files
        self.replaced_in: Counter[str] = Counter()
        self.odd_in: Counter[str] = Counter()
        self.fingerprint = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
        self.label = f"{word}-{self.fingerprint[:8]}"

    @property
    def replaced(self) -> int:
        return self.replaced_in.total()

    def replaced_in_words(self) -> str:
        """A line about replaced sequences and odd rows, for people; empty if there are none."""
        said = []
        if self.replaced:
            said.append(f"replaced {counted(self.replaced, 'invalid UTF-8 sequence')} by U+FFFD in "
                        f"{files_in_words(self.replaced_in)}")
        if odd := self.odd_in.total():
            said.append(f"kept {counted(odd, 'row')} with NULs or ISO-2022 escapes in "
                        f"{files_in_words(self.odd_in)}")
        return "; ".join(said)

    def __iter__(self) -> Iterator[Document]:
        for name, path in self.files:
            try:
                yield from self._read(name, path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from error

    def units(self, seed: int | None) -> list[Unit]:
        """The whole source as one unit, shuffled by the seed; without a seed, in the source's order."""
        def read() -> Iterator[Document]:
            full = (document for document in self if document[1])
            return full if seed is None else shuffled(full, seed)
        return [Unit("", read)]

    def _read(self, name: str, path: Path) -> Iterator[Document]:
        kind = kind_of(path)
        self._forget(name)
        if kind in FILE_IS_DOCUMENT:
            with open_bytes(path) as file:
                raw = file.read()
                yield name, self._decode(raw, name, decoding.encoding_of(raw, path, kind))
        else:
            rows = self._read_lines(name, path) if kind == ".jsonl" else self._read_parquet(name, path)
            yield from self._unless_most_is_wrong(rows, name, path)

    def _unless_most_is_wrong(self, rows: Iterator[Document], name: str, path: Path) -> Iterator[Document]:
        """The rows of a file.

        raises  UserError after the last row if most rows are odd, or the file has too many invalid sequences
                for its valid ones
        """
        total = size = explained = 0
        for row, text in rows:
            total += 1
            size += len(text)
            if not text.isascii():
                explained += len(text.encode()) - len(text)     # at least 1 per valid sequence
            yield row, text
        odd, invalid = self.odd_in[name], self.replaced_in[name]
        if 2 * odd > total:
            raise UserError(f"{path}: {odd:,} of {total:,} rows contain NULs or ISO-2022 escapes, so they "
                            "are not text or not UTF-8; convert the file to UTF-8")
        if decoding.too_many(invalid, size, explained - 2 * invalid):       # 2 per U+FFFD
            raise UserError(f"{path} is not UTF-8 throughout: {invalid:,} invalid sequences, more than "
                            "it has valid non-ASCII characters; convert it to UTF-8")

    def _read_lines(self, name: str, path: Path) -> Iterator[Document]:
        with open_bytes(path) as file:
            encoding = decoding.encoding_of(file.read(BEGINNING), path, ".jsonl")
            file.seek(0)
            lines = (self._decode(line, name) for line in file)
            if encoding != "utf-8":     # UTF-16 or UTF-32, where a line end has two or four bytes
                raw = file.read()
                decoding.encoding_of(raw, path, ".jsonl")
                lines = self._decode(raw, name, encoding).split("\n")
            numbered = enumerate(lines, 1)
            for number, line in numbered:
                try:
                    text = text_of_row(line)
                except ValueError as error:
                    more = without_bad_lines(path, number, numbered) if encoding == "utf-8" else ""
                    raise UserError(f"{path} line {number} {error}{more}") from error
                if text is not None:
                    yield f"{name}:{number}", self._counted(self._valid(text, name), name)

    def _read_parquet(self, name: str, path: Path) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet
        self._forget(name)
        with open_bytes(path) as file:
            try:
                table = pyarrow.parquet.ParquetFile(file)
                refuse_columns(table.schema_arrow, path)
                number = 0
                for batch in table.iter_batches(batch_size=256, columns=["text"]):
                    for text in batch.column(0).cast(pyarrow.binary()).to_pylist():
                        number += 1
                        if text is not None:
                            yield f"{name}:{number}", self._counted(self._decode(text, name), name)
            except (pyarrow.ArrowException, UnicodeDecodeError) as error:      # latter: in column names
                raise UserError(f"{path} is not a readable parquet file ({first_line(error)})") from error

    def _decode(self, raw: bytes, name: str, encoding: str = "utf-8") -> str:
        text, invalid = decoding.decode(raw, encoding)
        if invalid:
            self.replaced_in[name] += invalid
        return text

    def _forget(self, name: str) -> None:
        self.replaced_in.pop(name, None)
        self.odd_in.pop(name, None)

    def _counted(self, text: str, name: str) -> str:
        if decoding.is_odd(text):
            self.odd_in[name] += 1
        return text

    def _valid(self, text: str, name: str) -> str:
        """Replace lone surrogates, which JSON can spell but UTF-8 cannot encode."""
        try:
            text.encode()
            return text
        except UnicodeEncodeError:
            clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            self.replaced_in[name] += clean.count("\ufffd") - text.count("\ufffd")
            return clean


def files_in_words(counts: Counter[str]) -> str:
    """`2 files: a.txt (9), b.txt (1)`, the largest counts first."""
    worst = [f"{decoding.shown(name)} ({count:,})" for name, count in counts.most_common(4)]
    files = "" if len(counts) == 1 else f"{counted(len(counts), 'file')}: "
    return files + ", ".join(worst[:3]) + (" ..." if len(worst) > 3 else "")


def refuse_columns(schema, path: Path) -> None:
    """raises  UserError unless a parquet file has exactly one column named text, of strings or bytes"""
    import pyarrow
    number = schema.names.count("text")
    if not number:
        raise UserError(f"{path} has no column named text; its columns are {', '.join(schema.names)}")
    if number > 1:
        raise UserError(f"{path} has {number} columns named text; rename all but one")
    kind = schema.field("text").type
    try:
        pyarrow.array([], kind).cast(pyarrow.binary())
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} has {kind} in the column text, which must be string or binary") from error


def text_of_row(line: str) -> str | None:
    """The text of a line of JSON; None if the text is null, as in parquet, or the line is empty.

    raises  ValueError whose message continues "FILE line NUMBER"
    """
    line = line.lstrip(decoding.MARK)       # also in later lines, of files that were joined
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    text = row.get("text", "") if isinstance(row, dict) else ""
    if not isinstance(row, dict) or "text" not in row or not isinstance(text, str | None):
        has = "its columns are " + ", ".join(map(str, row)) if isinstance(row, dict) else "not an object"
        raise ValueError(f"has no text in a column named text; {has}")
    return text and text.lstrip(decoding.MARK)


def without_bad_lines(path: Path, first: int, others: Iterable[tuple[int, str]]) -> str:
    """How to drop the bad lines of a file; `first` is the first of them, `others` are all lines after it."""
    bad, good = [first], first - 1
    for number, line in others:
        try:
            text_of_row(line)
            good += 1
        except ValueError:
            bad.append(number)
        if len(bad) > NAMED_LINES:
            return f"; {NAMED_LINES} or more other lines are bad, too"
    sed = "sed '" + ";".join(f"{number}d" for number in bad) + "'"
    lines = "it" if len(bad) == 1 else f"all {len(bad)} bad lines"
    return f"; to drop {lines}, {decoding.rewriting(path, sed, 'good')}" if good else ""


def parquet_rows(path: Path) -> int:
    """The number of rows of a parquet file; 0 if it cannot be read."""
    import pyarrow
    import pyarrow.parquet
    try:
        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    except (pyarrow.ArrowException, OSError):
        return 0


def kind_of(path: Path) -> str:
    """The suffix of the plain file: `.jsonl` for rows.jsonl and for rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def open_bytes(path: Path):
    """The file, decompressed according to its last suffix, and seekable, as parquet requires."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS:
        with open(path, "rb") as file:
            yield file
        return
    try:
        if not path.stat().st_size:     # even empty data have some bytes when compressed
            raise EOFError("it is empty")
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
# Hashes, order and batches
# ------------------------------------------------------------------------------------------------

def hash_of(text: str) -> int:
    """The first 64 bits of a text's SHA-256, which decide whether it is held out (held_out.py)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def shuffled(documents: Iterable[Document], seed: int, characters: int = SHUFFLE_CHARACTERS,
             ) -> Iterator[Document]:
    """The documents in an order that the seed decides (0 is a seed, too).

    A source of at most `characters` characters is shuffled as a whole. For a larger one, a buffer of about
    that size is kept in memory; when it overflows, documents drawn from it at random are yielded.
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
    """Lists of consecutive documents, with about `characters` characters in each list."""
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
