"""Where text comes from: Python's own library, your files, or the Hugging Face Hub.

    stdlib                       every module of this Python's library, outside its tests and site-packages
    10B  100B  350B  full        FineWeb on the Hub, with `edu` appended FineWeb-Edu (hub.py)
    climbmix                     ClimbMix, shuffled, on the Hub; its last file is held out
    notes.txt  book.md  code.py  one file is one document
    rows.jsonl  rows.parquet     one row is one document, in the column `text`
    corpus/  'corpus/*.jsonl'    a folder (searched to its depths) or a glob of such files

Files may be plain, .gz or .zst. A document is a pair (id, text):

    >>> next(iter(open_source("stdlib")))[0]
    'stdlib/__future__.py'

Look at a source before you train on it:  python -m benchtop.sources stdlib
"""

import glob
import os
import re
import sysconfig
from pathlib import Path

from benchtop import hub, places
from benchtop.command_line import Parser, command, counted
from benchtop.documents import FILE_IS_DOCUMENT, ROW_IS_DOCUMENT, Source, kind_of
from benchtop.errors import UserError
from benchtop.files import sha256_of
from benchtop.held_out import rule_for


def open_source(spec: str | list[str]) -> Source:
    """A Source from a name or from paths and globs.

    raises  UserError if a name or path is unknown, a glob matches nothing or a file's kind is not known
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    if specs == ["stdlib"]:
        return python_library()
    if "stdlib" in specs:
        raise UserError("stdlib cannot be mixed with files; name one of them")
    if len(specs) == 1 and specs[0] in hub.CORPORA and not os.path.exists(specs[0]):
        return hub.HubText(specs[0])
    for name in specs:
        if name in (*hub.CORPORA, *hub.READY_MADE) and not os.path.exists(name):
            raise UserError(f"{name} comes from the Hugging Face Hub and "
                            + ("cannot be mixed with other sources" if name in hub.CORPORA else
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


def is_known(path: Path) -> bool:
    return kind_of(path) in FILE_IS_DOCUMENT + ROW_IS_DOCUMENT


def is_text(typed: str) -> bool:
    """Whether a source can be made of a file or folder, to judge by its name; not of what holds data/."""
    if os.path.isdir(typed):
        return not places.DATA.is_relative_to(Path(typed).resolve())
    return os.path.isfile(typed) and is_known(Path(typed))


def word_for(specs: list[str]) -> str:
    """What people would call these files: the file's name, or its folder's."""
    first = Path(specs[0])
    word = first.parent.name if glob.has_magic(first.name) or len(specs) > 1 else first.name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9-]+", "-", word).strip("-")[:30] or "files"

# ------------------------------------------------------------------------------------------------
# Looking at a source
# ------------------------------------------------------------------------------------------------

@command
def main() -> None:
    parser = Parser("Count the documents of a source and show the first.")
    parser.add_argument("source", nargs="+",
                        help="stdlib, FineWeb (10B, 10Bedu, ...), climbmix, or files, folders and globs")
    source = open_source(parser.parse_args().source)
    documents = characters = 0
    for name, text in source:
        if not documents:
            print(f"{name}:\n{text[:500]}\n...")
        documents += 1
        characters += len(text)
    if not characters:
        raise UserError("the source is empty")
    print(f"{counted(documents, 'document')}, {characters:,} characters, {source.replaced:,} invalid UTF-8 "
          f"sequences replaced; label {source.label}")
    rule = rule_for(source)
    if not rule:
        print("held out: too little text to hold some out")
        return
    count = ""
    if not source.is_large:     # whose text need not be here to read it again
        texts = {text for _, text in rule.documents(source) if rule.holds_out(text)}
        count = f"; {len(texts):,} of {sum(map(len, texts)):,} characters"
    print(f"held out: {rule.facts()['rule']}{count}")


if __name__ == "__main__":
    main()
