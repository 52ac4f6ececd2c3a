"""experiments/ledger.tsv: one line for each idea that was ever tried, whatever the outcome.

Lines are only appended. New columns of later versions come last, and readers ignore columns they do not know.
"""

import csv
import io
import os
import sys
import time
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from benchtop import places
from benchtop.errors import UserError
from benchtop.files import locked

KEEP, DISCARD, UNDECIDED = "keep", "discard", "undecided"
CONFIRMED, NOT_CONFIRMED = "confirmed", "not confirmed"


@dataclass(frozen=True)
class Entry:
    """A line of the ledger. Numbers are None where nothing was measured.

    time                  UTC, as 2026-11-26T22:40:00Z, when the trial finished
    change                first 12 hex digits of the SHA-256 of the idea's patch and flags
    baseline, value       means of the metric over the pairs, of the baseline and of the idea
    gain, low, high       the idea's gain over the baseline (larger is better), with its interval
    runs                  number of the idea's runs; tokens and seconds are totals, memory_mib the maximum
    split                 held-out text used: val, or test for a confirmation
    flags, shared_flags   the idea's own flags, and those of all runs of the trial
    baseline_key          key of the baseline's runs (benchtop/ideas.py)
    """
    time: str
    trial: str
    idea: str
    change: str
    metric: str
    baseline: float | None
    value: float | None
    gain: float | None
    low: float | None
    high: float | None
    runs: int
    tokens: int
    seconds: float
    memory_mib: float | None
    verdict: str
    split: str
    data: str
    description: str
    flags: str = ""
    shared_flags: str = ""
    baseline_key: str = ""


def path() -> Path:
    return places.EXPERIMENTS / "ledger.tsv"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def add(entry: Entry) -> None:
    """Append a line, under a lock, and sync it to disk; a new file starts with the column names."""
    file = path()
    file.parent.mkdir(exist_ok=True)
    names = [field.name for field in fields(Entry)]
    with locked(file.with_suffix(".lock"), wait=True), open(file, "ab+") as out:
        out.seek(0)
        content = out.read().decode(errors="replace")
        if not content:
            out.write(("\t".join(names) + "\n").encode())
        elif not content.endswith("\n"):       # an incomplete line, left by a full disk
            out.write(b"\n")
        # in the columns of the file, which an earlier version may have created
        columns = content.splitlines()[0].split("\t") if content else names
        line = [cell_of(getattr(entry, name, None)) for name in columns]
        out.write(("\t".join(line) + "\n").encode())
        out.flush()
        os.fsync(out.fileno())


def cell_of(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:.7g}" if isinstance(value, float) else str(value)
    return " ".join(text.split())       # a tab or newline in a description would break the table


def read() -> list[Entry]:
    """All entries, oldest first; none without a ledger. Damaged lines are skipped with a message.

    raises  UserError if the file cannot be read
    """
    try:
        text = path().read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path()} cannot be read ({error})") from error
    entries = []
    rows = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, row in enumerate(rows, 2):
        try:
            entries.append(entry_of(row))
        except (KeyError, ValueError, TypeError) as error:
            print(f"left out: line {number} of {path().name} is not an entry ({error})", file=sys.stderr)
    return entries


def entry_of(row: dict[str, str]) -> Entry:
    values = {}
    for field in fields(Entry):
        if field.default is not MISSING and not row.get(field.name):
            continue        # a column that this file lacks
        cell = row[field.name] or ""
        if field.type is str:
            values[field.name] = cell
        elif field.type is int:
            values[field.name] = int(cell)
        else:
            values[field.name] = float(cell) if cell or field.type is float else None
    return Entry(**values)
