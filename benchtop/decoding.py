"""From a file's bytes to its text: UTF-8, or what the file says of itself, and never a guess.

A byte order mark tells UTF-8, UTF-16 and UTF-32, and is no part of the text: a document is the same one with
and without it. Line ends are part of the text and stay as they are. A Python source may name its encoding in
its first two lines (PEP 263). Everything else is UTF-8. A few invalid sequences, as where a file was cut
within a character, become U+FFFD and are counted. A file with more of them than characters that UTF-8
explains, or with NUL bytes, is in another encoding or no text; it is refused, with a command to type.
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
# by names that Python and iconv know
MARKS = [(codecs.BOM_UTF8, "utf-8"),
         (codecs.BOM_UTF32_LE, "UTF-32LE"), (codecs.BOM_UTF32_BE, "UTF-32BE"),
         (codecs.BOM_UTF16_LE, "UTF-16LE"), (codecs.BOM_UTF16_BE, "UTF-16BE")]    # begins UTF-32's, too
FEW_INVALID = 3         # sequences that a file may have, if they are no more than one in
FEW_IN_BYTES = 100      # so many bytes; one it may have in any case


def decode(raw: bytes, encoding: str = "utf-8") -> tuple[str, int]:
    """The text without its byte order mark, and how many invalid sequences became U+FFFD.

    >>> decode(b"\\xef\\xbb\\xbfcaf\\xc3\\xa9 caf\\xe9")
    ('café caf\ufffd', 1)
    """
    try:
        return raw.decode(encoding).lstrip(MARK), 0
    except UnicodeDecodeError:      # as every mark but that of UTF-8 gives
        encoding = marked(raw) or encoding
        text, valid = (raw.decode(encoding, errors) for errors in ("replace", "ignore"))
        return text.lstrip(MARK), text.count("\ufffd") - valid.count("\ufffd")


def marked(raw: bytes) -> str:
    """The encoding that a byte order mark tells; empty without one."""
    return next((name for mark, name in MARKS if raw.startswith(mark)), "")


def encoding_of(raw: bytes, path: Path, kind: str) -> str:
    """How to decode a file of a kind, as ".py", to judge by its content or the beginning of that.

    raises  UserError if it is in another encoding than it says, or no text
    """
    told = marked(raw) or (cookie_of(raw) if kind == ".py" else "")
    if told:
        return told
    if b"\0" in raw:
        wide = wide_encoding(raw)
        what, change = ((f"looks like {wide} without a byte order mark", f"iconv -f {wide} -t UTF-8")
                        if wide else ("holds NUL bytes, so it is no text", "tr -d '\\000'"))
        raise UserError(f"{path} {what}; take it out of the source, or convert it with: "
                        f"{rewriting(path, change)}")
    text, invalid = decode(raw)
    few = max(1, min(FEW_INVALID, len(raw) // FEW_IN_BYTES))
    if invalid > few and invalid > len(re.findall("[^\0-\x7f\ufffd]", text)):
        raise UserError(f"{path} is not UTF-8 ({invalid:,} invalid sequences); if it is Western European, "
                        f"convert it with: {rewriting(path, 'iconv -f CP1252 -t UTF-8')}")
    return "utf-8"


def cookie_of(raw: bytes) -> str:
    """The encoding that a Python source names and has; empty if that is UTF-8, or does not fit."""
    try:
        name = tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
        fits = "coding" in raw.decode(name)     # a source in bytes that says utf-16 is not
        return name if fits and codecs.lookup(name).name != "utf-8" else ""
    except (SyntaxError, LookupError, ValueError):
        return ""


def wide_encoding(raw: bytes) -> str:
    """UTF-16 or UTF-32, if this text is that; empty if not."""
    raw = raw[:len(raw) // 4 * 4 or len(raw) // 2 * 2]
    high_first = raw[::2].count(0) > raw[1::2].count(0)
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16BE" if high_first else "UTF-16LE"):
        try:
            if raw and "\0" not in raw.decode(name):
                return name
        except UnicodeDecodeError:
            continue
    return ""


def rewriting(path: Path, command: str) -> str:
    """The shell command that puts a file, plain or compressed, through another command."""
    old, new = shlex.quote(str(path)), shlex.quote(f"{path}.new")
    packer = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    if packer:      # the command stands last, since a shell goes on behind a failure of what stands before
        return f"{packer} -dc {old} | {command} > {new} && {packer} < {new} > {old} && rm {new}"
    return f"{command} < {old} > {new} && mv {new} {old}"


def shown(path: Path | str) -> str:
    """A path as it may be printed: a file's name need not be UTF-8, and may have line ends in it."""
    return " ".join(os.fsencode(path).decode(errors="backslashreplace").splitlines())
