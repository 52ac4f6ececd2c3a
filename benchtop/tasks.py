"""Benchmarks as data: multiple-choice questions, where they come from, and which of them are scored.

A row of a benchmark's file is a context and its possible endings; `label` is the index of the right one:

    {"ctx": "A man is sitting on a roof. he", "label": 3,
     "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                 "is holding a rubik's cube.", "starts pulling up roofing on a roof."], ...}

HellaSwag's rows are its authors' own. Rows of other benchmarks are converted to this form at download, with
the prompts of lm-evaluation-harness (listed in download_hellaswag.py). This module knows no models;
scoring.py scores them.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from benchtop import hub, places
from benchtop.command_line import counted
from benchtop.errors import UserError, first_line
from benchtop.files import locked, sha256_of, write_text

AUTHORS = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"
FIELDS = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "split", "split_type", "label", "endings",
          "source_id")


@dataclass(frozen=True)
class Question:
    """A row: a context, its possible endings, and the index of the right one (-1 if unlabelled).

    name  the row's `ind`, or its line number in the file
    """
    name: int | str
    ctx: str
    endings: tuple[str, ...]
    label: int

    @property
    def right(self) -> str:
        """The right ending."""
        return self.endings[self.label]


# ------------------------------------------------------------------------------------------------
# Benchmarks
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Split:
    """A split of a benchmark; `name` ends the name of its local file, as in hellaswag_val.jsonl."""
    name: str
    rows: int
    labelled: bool = True


@dataclass(frozen=True)
class Benchmark:
    """A data set to score models on: where it is, and how its rows are converted to the local format.

    repo      on the Hub, at `revision`
    files     glob of the files of a split
    splits    by their names on the Hub; the first one is scored
    endings   numbers of endings that a row may have
    row_here  converts a row from the Hub to the local format; a damaged row raises one of Python's errors
    authors   URL of the authors' copy, used if the Hub fails; empty: none
    """
    title: str
    repo: str
    files: str
    splits: dict[str, Split]
    endings: tuple[int, ...]
    row_here: Callable[[dict], object]
    revision: str = "main"
    authors: str = ""

    @property
    def scored(self) -> str:
        return next(iter(self.splits))


def as_authors_have_it(row: object) -> object:
    """A HellaSwag row in its authors' form; on the Hub, labels are strings, and empty in the test split."""
    if not isinstance(row, dict):
        return row
    label = str(row.get("label", ""))
    row = row | {"label": int(label) if label.isdecimal() else label}
    return {field: row[field] for field in FIELDS if field in row and (field, row[field]) != ("label", "")}


def row_of_arc(row: dict) -> dict:
    """{"id": "Mercury_7", "question": "Which?", "choices": {"text": ["this", ...], "label": ["A", ...]},
    "answerKey": "A"}; labels may be digits, too."""
    choices = row["choices"]
    return {"ind": row["id"], "ctx": "Question: " + row["question"] + "\nAnswer:", "endings": choices["text"],
            "label": choices["label"].index(row["answerKey"])}


def row_of_piqa(row: dict) -> dict:
    """{"goal": "To boil an egg", "sol1": "use water", "sol2": "use sand", "label": 0}"""
    return {"ctx": "Question: " + row["goal"] + "\nAnswer:", "endings": [row["sol1"], row["sol2"]],
            "label": row["label"]}


def row_of_lambada(row: dict) -> dict:
    """{"text": "all that comes before the last word"}"""
    context, _, word = row["text"].rpartition(" ")
    if not context or not word:
        raise ValueError("the text has no last word after a context")
    return {"ctx": context, "endings": [word], "label": 0}


BENCHMARKS = {
    "hellaswag": Benchmark("HellaSwag", "Rowan/hellaswag", "data/{split}-*",
                           {"validation": Split("val", 10_042), "train": Split("train", 39_905),
                            "test": Split("test", 10_003, labelled=False)},
                           (4,), as_authors_have_it, authors=AUTHORS),
    "arc_easy": Benchmark("ARC-easy", "allenai/ai2_arc", "ARC-Easy/{split}-*",
                          {"test": Split("test", 2_376)}, (3, 4, 5), row_of_arc),
    # its main branch has a script instead of rows; on this one the Hub keeps the script's output
    "piqa": Benchmark("PIQA", "ybisk/piqa", "*/{split}/*", {"validation": Split("val", 1_838)}, (2,),
                      row_of_piqa, revision="refs/convert/parquet"),
    "lambada": Benchmark("LAMBADA", "EleutherAI/lambada_openai", "default/{split}*",
                         {"test": Split("test", 5_153)}, (1,), row_of_lambada),
}


# ------------------------------------------------------------------------------------------------
# Fetch
# ------------------------------------------------------------------------------------------------

def path_of(name: str, split: str) -> Path:
    return places.DATA / f"{name}_{BENCHMARKS[name].splits[split].name}.jsonl"


def command_to_fetch(name: str) -> str:
    return "python download_hellaswag.py" + (f" --benchmark {name}" if name != "hellaswag" else "")


def fetch(name: str, split: str) -> Path:
    """Download the file of a benchmark's split, unless it is here and intact; returns its path.

    raises  UserError if neither the Hub nor the authors' repository provides it
    """
    benchmark, path = BENCHMARKS[name], path_of(name, split)
    rows = benchmark.splits[split].rows
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        if path.exists():
            try:
                check_rows(lines_of(path), path.name, benchmark, split)
                print(f"{path.relative_to(places.ROOT)} is there already: {counted(rows, 'row')}")
                return path
            except UserError as error:
                print(f"{error}; downloading it again", file=sys.stderr)
        try:
            source = fetch_from_hub(benchmark, split, path)
        except UserError as error:
            if not benchmark.authors:
                raise
            print(f"{error}; trying the authors' repository", file=sys.stderr)
            source = fetch_from_authors(benchmark, path.name, split, path)
    print(f"wrote {path.relative_to(places.ROOT)}: {counted(rows, 'row')} from {source}, "
          f"SHA-256 {sha256_of(path)}")
    return path


def fetch_from_hub(benchmark: Benchmark, split: str, path: Path) -> str:
    files = hub.list_files(benchmark.repo, "", ".parquet", benchmark.revision)
    matching = [file for file in files if fnmatch(file.path, benchmark.files.format(split=split))]
    if not matching:
        raise UserError(f"{benchmark.repo} has no parquet file for the split {split}")
    import pyarrow
    import pyarrow.parquet
    rows = []
    for file in matching:
        kept, copy = hub.in_cache(file), hub.fetch(file)
        try:
            rows += pyarrow.parquet.read_table(copy).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file.path} of {benchmark.repo} is not a readable parquet file "
                            f"({first_line(error)})") from error
        finally:
            if not kept:
                hub.forget(copy)
    write_rows(rows, benchmark, split, path)
    return f"{benchmark.repo} at {files[0].revision}"


def fetch_from_authors(benchmark: Benchmark, name: str, split: str, path: Path) -> str:
    url = f"{benchmark.authors}/{name}"
    content = hub.fetch_url(url)
    try:
        rows = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{url} is not JSON lines ({error})") from error
    write_rows(rows, benchmark, split, path)
    return url


def write_rows(rows: list, benchmark: Benchmark, split: str, path: Path) -> None:
    """Write the rows of a split in the local format.

    raises  UserError if a row is damaged or check_rows rejects them; then nothing is written
    """
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(json.dumps(benchmark.row_here(row), ensure_ascii=False))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"row {number:,} of {benchmark.title} is damaged ({error!r})") from error
    check_rows(lines, path.name, benchmark, split)
    write_text(path, "".join(f"{line}\n" for line in lines))


def check_rows(lines: list[str], name: str, benchmark: Benchmark, split: str) -> list[Question]:
    """The questions in a file's lines.

    raises  UserError unless there are as many as in the split, each with an allowed number of endings
    """
    expected, labelled = benchmark.splits[split].rows, benchmark.splits[split].labelled
    questions = questions_of(lines, name, labelled, fewest=min(2, *benchmark.endings))
    if len(questions) != expected:
        raise UserError(f"{name} has {counted(len(questions), 'row')} instead of {expected:,}")
    odd = next((question for question in questions if len(question.endings) not in benchmark.endings), None)
    if odd:
        raise UserError(f"{name} has {len(odd.endings)} endings instead of "
                        f"{' or '.join(map(str, benchmark.endings))} in row {odd.name}")
    return questions


# ------------------------------------------------------------------------------------------------
# Read
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """Questions to score a model on: all of a file's, or a fixed subset of them."""
    name: str
    sha256: str
    rows_in_file: int
    questions: list[Question]

    def facts(self) -> dict:
        """What must be equal for results to be comparable."""
        return {"sha256": self.sha256, "rows_in_file": self.rows_in_file}

    @property
    def note(self) -> str:
        """Text to print after the number of rows."""
        note = f", a fixed subset of {self.rows_in_file:,}" if len(self.questions) < self.rows_in_file else ""
        unclear = sum(question.endings.count(question.right) > 1 for question in self.questions)
        if unclear:
            note += f"; in {unclear:,} the right ending is listed twice, so no model can tell which is meant"
        return note


def open_task(path: Path, name: str, rows: int) -> Task:
    """The questions of a file; if `rows` is not 0, a fixed subset of that many, the same on every machine."""
    return task_of(path, name, read_questions(path), rows)


def task_of(path: Path, name: str, questions: list[Question], rows: int) -> Task:
    chosen = range(len(questions))
    if 0 < rows < len(questions):
        chosen = sorted(random.Random(0).sample(chosen, rows))
    return Task(name, sha256_of(path), len(questions), [questions[number] for number in chosen])


def benchmark_if_here(name: str, rows: int = 0) -> Task | None:
    """The scored split of a benchmark, or a fixed subset of `rows`; None if it is not downloaded."""
    benchmark = BENCHMARKS[name]
    path = path_of(name, benchmark.scored)
    if not path.is_file():
        return None
    try:
        questions = check_rows(lines_of(path), path.name, benchmark, benchmark.scored)
    except UserError as error:
        raise UserError(f"{error}; download it again with: {command_to_fetch(name)}") from error
    return task_of(path, name, questions, rows)


def read_questions(path: Path) -> list[Question]:
    """The rows of a .jsonl file in this format, with two or more endings each.

    raises  UserError that names the first invalid line
    """
    return questions_of(lines_of(path), path.name)


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error


def questions_of(lines: list[str], name: str, labelled: bool = True, fewest: int = 2) -> list[Question]:
    """The questions in the lines of the file `name`; each must have at least `fewest` endings."""
    questions = [question_of(line, f"{name} line {number}", number, labelled, fewest)
                 for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UserError(f"{name} has no rows")
    return questions


def question_of(line: str, where: str, number: int, labelled: bool, fewest: int) -> Question:
    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{where} is not a valid row: {rule}")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    require(isinstance(row, dict), "it must be an object")
    ctx, endings, label = row.get("ctx"), row.get("endings"), row.get("label")
    require(isinstance(ctx, str), "ctx must be a string")
    require(isinstance(endings, list) and len(endings) >= fewest and all(isinstance(e, str) for e in endings),
            f"endings must be a list of {'two' if fewest > 1 else 'one'} or more strings")
    if labelled:
        right = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(endings)
        require(right, f"label must be the number of an ending, from 0 to {len(endings) - 1}; it is "
                       f"{label!r}")
    name = row.get("ind")
    return Question(name if isinstance(name, int | str) else number, ctx, tuple(endings),
                    label if labelled else -1)
