"""Where text comes from: Python's standard library, your files, or the Hugging Face Hub.

    stdlib                       every module of this Python's standard library, except its tests
    10B  100B  350B  full        FineWeb on the Hub; append `edu` for FineWeb-Edu (hub.py)
    climbmix                     ClimbMix, shuffled, on the Hub; its last file is held out
    notes.txt  book.md  code.py  each file is one document
    rows.jsonl  rows.parquet     each row is one document, in the column `text`
    corpus/  'corpus/*.jsonl'    a folder (searched recursively) or a glob of such files

Files may be compressed (.gz or .zst). In folders and globs, links are followed, each file counts once, and
hidden files, virtual environments, caches and files of other kinds are left out; a note says what was left
out. `a/=0.7 b/=0.3` is a Mixture (open_mixture). A document is a pair (id, text):

    >>> next(iter(open_source("stdlib")))[0]
    'stdlib/__future__.py'

Inspect a source before you train on it:  python -m benchtop.sources stdlib
"""

import glob
import hashlib
import json
import math
import os
import re
import shlex
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path

from benchtop import hub, places
from benchtop.command_line import Parser, command, counted
from benchtop.decoding import shown
from benchtop.documents import FILE_IS_DOCUMENT, ROW_IS_DOCUMENT, Source, kind_of
from benchtop.errors import UserError
from benchtop.files import sha256_of
from benchtop.held_out import VAL, rule_for
from benchtop.processes import is_first_process

MADE_BY_TOOLS = ("__MACOSX", "__pycache__", "node_modules")   # names of folders to leave out
HIDDEN, TOOLS, KIND, NOWHERE, LOCKED, AGAIN = ("hidden", "made by tools", "of unknown kind",
                                               "linked to nothing", "unreadable", "found twice")
WITHOUT_SHARES = "without shares (only download_fineweb.py takes them, as in stdlib=0.7 notes/=0.3)"


def open_source(spec: str | list[str]) -> Source:
    """A Source from a name, or from paths and globs.

    raises  UserError if a name or path is unknown, a glob matches nothing, or a file is of an unknown kind
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    if shared := [item for item in specs if split_share(item)[1]]:
        raise UserError("only download_fineweb.py takes shares of the tokens; instead of "
                        f"{shared[0]}, type {shlex.quote(split_share(shared[0])[0])}")
    if specs == ["stdlib"]:
        return python_library()
    if "stdlib" in specs:
        raise UserError(f"stdlib cannot be mixed with files {WITHOUT_SHARES}; name one of them")
    if len(specs) == 1 and specs[0] in hub.CORPORA and not os.path.exists(specs[0]):
        return hub.HubText(specs[0])
    for name in specs:
        if name in (*hub.CORPORA, *hub.READY_MADE) and not os.path.exists(name):
            why = (f"cannot be mixed with other sources {WITHOUT_SHARES}" if name in hub.CORPORA else
                   f"has tokens, not text; get it with: python download_fineweb.py --source {name}")
            raise UserError(f"{name} comes from the Hugging Face Hub and {why}")
    search = Search()
    try:
        for item in specs:
            search.find(item)
        paths = list(search.found.values())
        stamp = [[os.fsencode(path.name).hex(), sha256_of(path)] for path in paths]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    if search.left_out and is_first_process():
        print(f"note: left out {search.left_out_in_words()}")
    ids = [os.fsencode(path).decode(errors="backslashreplace") for path in paths]       # ids must be UTF-8
    return Source(word_for(specs), list(zip(ids, paths, strict=True)), stamp)


def python_library() -> Source:
    """Every module of this Python's standard library except its tests, sorted by path."""
    top = Path(sysconfig.get_paths()["stdlib"])
    leave_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = sorted(path.relative_to(top).as_posix() for path in top.rglob("*.py")
                   if path.is_file() and not leave_out.intersection(path.relative_to(top).parts[:-1]))
    files = [(f"stdlib/{name}", top / name) for name in names]
    if not files:
        raise UserError(f"no modules in {top}; this Python was installed without its library's source")
    return Source("stdlib", files, [[name, sha256_of(path)] for name, path in files])


class Search:
    """Finds the files for names, folders and globs.

    found     real path of a file -> the path at which it was first found
    left_out  reason -> paths that are not part of the source
    """

    def __init__(self):
        self.found: dict[str, Path] = {}
        self.left_out: dict[str, list[Path]] = defaultdict(list)

    def find(self, item: str) -> None:
        """raises  UserError if the item matches no file, or is a file of an unknown kind"""
        path = Path(item)
        if os.path.isdir(path):
            if not self._take(self._below(path)):
                raise UserError(f"{item} holds no .txt, .md, .py, .jsonl or .parquet file{self._because()}")
        elif os.path.isfile(path):
            if not is_known(path):
                raise UserError(f"{path} is of an unknown kind; text files end in "
                                f"{' '.join(FILE_IS_DOCUMENT + ROW_IS_DOCUMENT)}, "
                                "which .gz or .zst may follow")
            self.found.setdefault(os.path.realpath(path), path)
        elif path.is_symlink():
            raise UserError(f"{item} is a link to {os.readlink(path)}, which does not exist")
        elif not self._take(self._matching(item)):
            raise UserError(f"no source named {item}: not stdlib, and no file, folder or glob of that name"
                            f"{self._because()}")

    def _take(self, paths: list[Path]) -> bool:
        """Add those files that are readable and of a known kind; returns whether there are any."""
        some = False
        for path in sorted(paths):
            real = os.path.realpath(path)
            why = (NOWHERE if not os.path.exists(path) else
                   KIND if not os.path.isfile(path) or not is_known(path) else
                   LOCKED if not os.access(path, os.R_OK) else
                   AGAIN if self.found.get(real, path) != path else "")
            some |= why in ("", AGAIN)
            if why:
                self.left_out[why].append(path)
            else:
                self.found[real] = path
        return some

    def _below(self, top: Path) -> list[Path]:
        return [file for _, files in self._walk(top) for file in files]

    def _walk(self, top: Path) -> Iterator[tuple[Path, list[Path]]]:
        """This folder and all below it, each once and with its files; paths without links come first."""
        folders, links, seen = [top], [], set()
        while folders or links:
            folder, files = folders.pop() if folders else links.pop(0), []
            real = os.path.realpath(folder)
            if real in seen:
                self.left_out[AGAIN].append(folder)
                continue
            seen.add(real)
            for path in self._listed(folder):
                is_folder = os.path.isdir(path)
                if path.name.startswith("."):
                    self.left_out[HIDDEN].append(path)
                elif is_folder and (path.name in MADE_BY_TOOLS or os.path.isfile(path / "pyvenv.cfg")):
                    self.left_out[TOOLS].append(path)
                elif is_folder:
                    (links if path.is_symlink() else folders).append(path)
                else:
                    files.append(path)
            yield folder, files

    def _listed(self, folder: Path) -> list[Path]:
        try:
            return sorted(folder.iterdir())
        except PermissionError:
            self.left_out[LOCKED].append(folder)
            return []

    def _matching(self, pattern: str) -> list[Path]:
        """The paths that match a glob; `**` matches the folders that a search below a folder visits."""
        parts = pattern.split("/")
        if "**" not in parts:
            return list(map(Path, glob.glob(pattern)))
        place = parts.index("**")
        tops = "/".join(parts[:place]) or ("/" if place else ".")
        rest = "/".join(parts[place + 1:]) or "*"
        folders = {folder for top in map(Path, glob.glob(tops)) if os.path.isdir(top)
                   for folder, _ in self._walk(top)}
        matching = {path for folder in folders
                    for path in self._matching(f"{glob.escape(str(folder))}/{rest}")}
        return [path for path in matching if not os.path.isdir(path)]

    def _because(self) -> str:
        return f"; left out {self.left_out_in_words()}" if self.left_out else ""

    def left_out_in_words(self) -> str:
        """`2 hidden (.git, ...), 1 linked to nothing (a.txt)`, in one line."""
        return ", ".join(f"{len(paths):,} {why} ({shown(min(paths))}{', ...' if len(paths) > 1 else ''})"
                         for why, paths in self.left_out.items())


def is_known(path: Path) -> bool:
    return kind_of(path) in FILE_IS_DOCUMENT + ROW_IS_DOCUMENT


def is_text(typed: str) -> bool:
    """Whether a file or folder may be a source, judged by its name; folders that contain data/ may not."""
    if os.path.isdir(typed):
        return not places.DATA.is_relative_to(Path(typed).resolve())
    return os.path.isfile(typed) and is_known(Path(typed))


def word_for(specs: list[str]) -> str:
    """A word that describes these files: the name of the file or of its folder."""
    first = Path(specs[0])
    word = first.parent.name if glob.has_magic(first.name) or len(specs) > 1 else first.name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9-]+", "-", word).strip("-")[:30] or "files"


# ------------------------------------------------------------------------------------------------
# Mixtures
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Mixture:
    """Sources with their shares of the training tokens, which sum to 1.

    Sources are sorted by label, so the order in which they were typed does not matter.
    """
    parts: tuple[tuple[Source, Fraction], ...]

    @property
    def names(self) -> list[str]:
        """A word for each source, or its label if another source has the same word."""
        labels = [source.label for source, _ in self.parts]
        words = [label.rpartition("-")[0] for label in labels]
        return [word if words.count(word) == 1 else label for word, label in zip(words, labels, strict=True)]

    @property
    def fingerprint(self) -> str:
        stamp = [[source.fingerprint, str(share)] for source, share in self.parts]
        return hashlib.sha256(json.dumps(stamp).encode()).hexdigest()

    @property
    def label(self) -> str:
        """`books70-web30-1f0c9a3e`: the sources with their shares in percent, cut to 80 characters."""
        words = [f"{name}{100 * float(share):.3g}"
                 for name, (_, share) in zip(self.names, self.parts, strict=True)]
        return f"{'-'.join(words)[:80].strip('-.')}-{self.fingerprint[:8]}"

    @property
    def revision(self) -> str:
        return " ".join(filter(None, (getattr(source, "revision", "") for source, _ in self.parts)))

    def replaced_in_words(self) -> str:
        return "; ".join(filter(None, (source.replaced_in_words() for source, _ in self.parts)))


def open_mixture(specs: list[str]) -> Source | Mixture:
    """A Mixture if each source is typed with its share, as in a/=0.7 b/=0.3; without shares, as open_source.

    Shares that do not sum to 1 are divided by their sum, with a note. A single source is returned as it is.
    raises  UserError if a share is missing or not a positive number, or sources have text in common
    """
    typed = [split_share(item) for item in specs]
    if not any(share for _, share in typed):
        return open_source(specs)
    if without := [name for name, share in typed if not share]:
        raise UserError(f"{without[0]} has no share; give each source one, as in a/=0.7 b/=0.3, or none")
    total = sum(share for _, share in typed)
    if total != 1 and is_first_process():
        shares = ", ".join(f"{name} {float(share / total):.4g}" for name, share in typed)
        print(f"note: the shares sum to {float(total):.6g} instead of 1, so they are taken as {shares}")
    sources = [open_source(name) for name, _ in typed]
    if len(sources) == 1:
        return sources[0]
    names = [name for name, _ in typed]
    for (name, source), (other, another) in combinations(zip(names, sources, strict=True), 2):
        refuse_common_text(name, source, other, another)
    parts = [(source, share / total) for source, (_, share) in zip(sources, typed, strict=True)]
    return Mixture(tuple(sorted(parts, key=lambda part: part[0].label)))


def split_share(item: str) -> tuple[str, Fraction | None]:
    """(a/, 0.7) for a/=0.7; (item, None) without `=`, or if a file, folder or glob has one in its name.

    raises  UserError if the share of a source is not a positive number, or the item is empty
    """
    if not item:        # Path("") is the current folder
        raise UserError("the name of a source is empty (perhaps an unset variable); type stdlib, a file, a "
                        "folder (. is the current one) or a glob")
    name, equals, typed = item.rpartition("=")
    if not (name and equals) or os.path.exists(item) or glob.glob(item):
        return item, None
    try:
        share = float(typed)
    except ValueError:
        if name not in ("stdlib", *hub.CORPORA) and not os.path.exists(name) and not glob.glob(name):
            return item, None
        share = math.nan
    if not 0 < share < math.inf:
        raise UserError(f"the share of {name} must be a positive number, as in {name}=0.5; it is {typed!r}")
    return name, Fraction(repr(share))


def refuse_common_text(name: str, source: Source, other: str, another: Source) -> None:
    """raises  UserError if two sources of a mixture, known by these names, have text in common"""
    if source.fingerprint == another.fingerprint:
        raise UserError(f"{name} and {other} are the same text; name each source once")
    files, others = ({os.path.realpath(path): path for _, path in each.files} for each in (source, another))
    if common := sorted(files.keys() & others.keys()):
        raise UserError(f"{files[common[0]]} is part of {name} and of {other}; mix sources that have no file "
                        "in common")


# ------------------------------------------------------------------------------------------------
# Inspect a source
# ------------------------------------------------------------------------------------------------

@command
def main() -> None:
    parser = Parser("Count the documents of a source and show the first.")
    parser.add_argument("source", nargs="+",
                        help="stdlib, FineWeb (10B, 10Bedu, ...), climbmix, or files, folders and globs")
    source = open_source(parser.parse_args().source)
    documents = characters = 0
    is_blank = True
    for name, text in source:
        if not documents:
            print(f"{name}:\n{text[:500]}\n...")
        documents += 1
        characters += len(text)
        is_blank &= not text or text.isspace()
    if not characters:
        raise UserError("the source is empty")
    if is_blank:
        raise UserError(f"the source is nothing but white space ({characters:,} characters)")
    print(f"{counted(documents, 'document')}, {characters:,} characters, "
          f"{source.replaced_in_words() or '0 invalid UTF-8 sequences replaced'}; label {source.label}")
    rule = rule_for(source)
    if not rule:
        print("held out: too little text to hold some out")
        return
    count = ""
    if not source.is_large:     # a large source is not read a second time
        texts = {text for name, text in rule.documents(source) if rule.split_of(text, name) == VAL}
        count = f"; {len(texts):,} of {sum(map(len, texts)):,} characters"
    print(f"held out: {rule.facts()['rule']}{count}")


if __name__ == "__main__":
    main()
