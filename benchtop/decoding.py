"""Decode files to text: as UTF-8 or in the encoding that the file declares, never in a guessed one.

A byte order mark selects UTF-8, UTF-16 or UTF-32 and is not part of the text: with and without it, a document
is the same. Line ends are part of the text and stay unchanged. A Python source may declare its encoding in
its first two lines (PEP 263). Everything else is UTF-8. A few invalid sequences, for instance where a file
was cut within a character, become U+FFFD and are counted. A file that has more of them than valid non-ASCII
characters, contains NULs or mixes two encodings is refused, whatever it declares. If the repair is clear, the
error ends with a command that writes a repaired copy and leaves the file unchanged.
"""

import codecs
import io
import os
import re
import shlex
import tokenize
from pathlib import Path

from benchtop.errors import UserError

MARK = "\ufeff"
# with names that both Python and iconv know
MARKS = [(codecs.BOM_UTF8, "utf-8"),
         (codecs.BOM_UTF32_LE, "UTF-32LE"), (codecs.BOM_UTF32_BE, "UTF-32BE"),
         (codecs.BOM_UTF16_LE, "UTF-16LE"), (codecs.BOM_UTF16_BE, "UTF-16BE")]    # last: they begin UTF-32's
MARKED_WIDE = {name for _, name in MARKS} - {"utf-8"}
MAGIC = {"gzip data": b"\x1f\x8b", "a zip archive, like .docx and .xlsx": b"PK\3\4", "a PDF": b"%PDF-",
         "a PNG image": b"\x89PNG", "a JPEG image": b"\xff\xd8\xff", "zstandard data": b"\x28\xb5\x2f\xfd",
         "xz data": b"\xfd7zXZ\0", "a 7z archive": b"7z\xbc\xaf\x27\x1c", "a RAR archive": b"Rar!\x1a\7",
         "an old Office document": b"\xd0\xcf\x11\xe0", "a program": b"\x7fELF", "parquet": b"PAR1\x15",
         "an SQLite database": b"SQLite format 3\0"}
CONTROLS = re.compile("[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")     # never in text; NUL is handled separately
ISO_2022 = {"\x1b$B": "ISO-2022-JP", "\x1b$@": "ISO-2022-JP", "\x1b$)C": "ISO-2022-KR",
            "\x1b$)A": "ISO-2022-CN", "\x1b$)G": "ISO-2022-CN"}
# UTF-8 bytes within UTF-16: a long run of them, or the end of a line and the text before it
NARROW = re.compile(rb"(?:[\t\n\r -~]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}){32,}"
                    rb"|[\t -~]{4,}\r\n|[\t -~]{8,}\n\Z")
TR = "tr -d '\\000'"
FEW_INVALID = 3         # invalid sequences that a file may have, but at most one per FEW_IN_BYTES bytes;
FEW_IN_BYTES = 100      # a single one is always allowed


def decode(raw: bytes, encoding: str = "utf-8") -> tuple[str, int]:
    """The text without its byte order mark, and the number of invalid sequences replaced by U+FFFD.

    >>> decode(b"\\xef\\xbb\\xbfcaf\\xc3\\xa9 caf\\xe9")
    ('café caf\ufffd', 1)
    """
    try:
        return raw.decode(encoding).lstrip(MARK), 0
    except UnicodeDecodeError:      # raised for every byte order mark but UTF-8's
        encoding = marked(raw) or encoding
        text, valid = (raw.decode(encoding, errors) for errors in ("replace", "ignore"))
        return text.lstrip(MARK), text.count("\ufffd") - valid.count("\ufffd")


def marked(raw: bytes) -> str:
    """The encoding given by a byte order mark; empty without one."""
    return next((name for mark, name in MARKS if raw.startswith(mark)), "")


def encoding_of(raw: bytes, path: Path, kind: str) -> str:
    """The encoding of a file, from its content or the beginning of that; `kind` is a suffix such as ".py".

    raises  UserError if it is in another encoding than it declares, in two, or not text
    """
    if what := next((what for what, magic in MAGIC.items() if raw.startswith(magic)), ""):
        raise UserError(f"{path} is not text but {what}; remove it from the source")
    told = marked(raw) or (cookie_of(raw) if kind == ".py" else "")
    encoding = told or "utf-8"
    text, invalid = decode(raw, encoding)
    if "\0" in text:
        raise UserError(f"{path} {about_nuls(raw, text, path, told)}")
    if name := next((name for escape, name in ISO_2022.items() if escape in text), ""):
        raise UserError(f"{path} is in {name}; {rewriting(path, f'iconv -f {name} -t UTF-8')}")
    if encoding in MARKED_WIDE:
        if is_partly_narrow(raw) or too_many(invalid, len(raw)):
            raise UserError(f"{path} begins as {encoding}, but later parts are in another encoding, for "
                            "instance appended lines; convert the whole file to UTF-8")
    elif too_many(invalid, len(raw), len(re.findall("[^\0-\x7f\ufffd]", text))):
        western = is_western(raw)
        raise UserError(f"{path} is not UTF-8 ({invalid:,} invalid sequences); "
                        + ("if it is Western European, " if western else "find out its ENCODING, then ")
                        + rewriting(path, f"iconv -f {'CP1252' if western else 'ENCODING'} -t UTF-8"))
    return encoding


def too_many(invalid: int, size: int, explained: int = 0) -> bool:
    """Whether `size` bytes have too many invalid sequences for mere damage; `explained` counts valid ones."""
    return invalid > max(1, min(FEW_INVALID, size // FEW_IN_BYTES), explained)


def about_nuls(raw: bytes, text: str, path: Path, told: str) -> str:
    """What a file with NULs may be, and how to repair it."""
    if not told and (wide := wide_encoding(raw)):
        return (f"looks like {wide} without a byte order mark; "
                + rewriting(path, f"iconv -f {wide} -t UTF-8"))
    if told in MARKED_WIDE or CONTROLS.search(text) or "\ufffd" in text:
        return ("contains NULs, so it is not text, or is in an undeclared encoding, such as UTF-16 without a "
                "byte order mark; remove it from the source")
    return f"contains NULs ({text.count(chr(0)):,}); {rewriting(path, TR)}"


def is_odd(text: str) -> bool:
    """Whether a row has NULs or escapes of ISO-2022: it is in another encoding, or not text."""
    return "\0" in text or ("\x1b$" in text and any(escape in text for escape in ISO_2022))


def is_partly_narrow(raw: bytes) -> bool:
    """Whether UTF-16 or UTF-32 contains UTF-8, for instance text appended by a shell."""
    def reads_as_utf_8(run: bytes) -> bool:
        is_kana = max(run[::2].count(b"0"), run[1::2].count(b"0")) > len(run) / 8      # bytes of U+30xx
        return len(set(run)) >= 10 and not is_kana
    runs = (run[0] for run in NARROW.finditer(raw))
    return any((len(run) < 32 and run.endswith(b"\n")) or reads_as_utf_8(run) for run in runs)


def is_western(raw: bytes) -> bool:
    """Whether bytes that are not UTF-8 may be CP1252: at least 60 % ASCII, and no control characters."""
    try:
        text = raw.decode("cp1252")
    except UnicodeDecodeError:
        return False
    return not CONTROLS.search(text) and len(re.findall("[^\0-\x7f]", text)) <= 0.4 * len(text)


def cookie_of(raw: bytes) -> str:
    """The encoding that a Python source declares; empty if that is UTF-8, or the source is not in it."""
    try:
        name = tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
        fits = "coding" in raw.decode(name)     # not if ASCII declares itself to be utf-16
        return name if fits and codecs.lookup(name).name != "utf-8" else ""
    except (SyntaxError, LookupError, ValueError):
        return ""


def wide_encoding(raw: bytes) -> str:
    """UTF-32, or UTF-16 if most bytes of one side are NULs, as in Western text; empty if neither fits."""
    if len(raw) % 2:
        return ""
    nuls = [2 * raw[side::2].count(0) / len(raw) for side in (0, 1)]
    sixteen = ["UTF-16BE" if nuls[0] > nuls[1] else "UTF-16LE"] if max(nuls) > 0.5 > 5 * min(nuls) else []
    for name in ["UTF-32LE", "UTF-32BE", *sixteen]:
        try:
            text = codecs.getincrementaldecoder(name)().decode(raw)     # raw may end within a character
            if text and "\0" not in text and not CONTROLS.search(text):
                return name
        except UnicodeDecodeError:
            continue
    return ""


def rewriting(path: Path, command: str, word: str = "utf8") -> str:
    """Advice to use a copy of a file (plain or compressed), with the shell command that makes it.

    >>> rewriting(Path("a.txt"), "iconv -f CP1252 -t UTF-8")
    'use a.utf8.txt instead, made with: iconv -f CP1252 -t UTF-8 < a.txt > a.utf8.txt'
    """
    packer = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    inner = Path(path.stem) if packer else Path(path.name)
    new = path.with_name(f"{inner.stem}.{word}{inner.suffix}{path.suffix if packer else ''}")
    old, to = shlex.quote(str(path)), shlex.quote(str(new))
    line = f"{packer} -dc {old} | {command} | {packer} > {to}" if packer else f"{command} < {old} > {to}"
    return f"use {new} instead, made with: {line}"


def shown(path: Path | str) -> str:
    """A path in printable form: file names may contain line ends, and bytes that are not UTF-8."""
    return " ".join(os.fsencode(path).decode(errors="backslashreplace").splitlines())
