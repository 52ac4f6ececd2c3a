"""Fetch HellaSwag, ARC-easy, PIQA or LAMBADA, and score language models on them or on questions of your own.

    python download_hellaswag.py                                 data/hellaswag_val.jsonl: 10,042 rows, 12 MB
    python download_hellaswag.py --benchmark arc_easy            or piqa, or lambada
    python download_hellaswag.py --score experiments/RUN         score a run trained with --save_model
    python download_hellaswag.py --score RUN --benchmark piqa    the same on another benchmark
    python download_hellaswag.py --score RUN --task my.jsonl     the same for questions of your own

A row is a beginning and what might follow, one of which does; a task's row needs only these three:

    {"ctx": "A man is sitting on a roof. he", "label": 3,
     "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                 "is holding a rubik's cube.", "starts pulling up roofing on a roof."], ...}

A model reads <|endoftext|> and ctx as they are, then a space and one ending at a time, and takes the ending
whose tokens together are likeliest (acc), or likeliest per character, byte or token (acc_norm). Chance is
0.25. GPT-2 of 124M parameters is known for acc 0.2859 and acc_norm by tokens 0.2955 on this text (llm.c's
script), and for 0.2892 and 0.3114 by characters in lm-evaluation-harness, which edits the text first.

The others become such rows when they are fetched, as lm-evaluation-harness puts them. ARC-easy and PIQA: ctx
is "Question: " and what is asked, then on a line of its own "Answer:"; an ending is an answer. LAMBADA: the
last word of a text is the one ending; it is right (acc) if each of its tokens is the likeliest one, and has a
perplexity. README.md has their chance levels and what GPT-2 gets.
source  Zellers et al. 2019, arXiv:1905.07830 (HellaSwag); Clark et al. 2018, arXiv:1803.05457 (ARC);
        Bisk et al. 2019, arXiv:1911.11641 (PIQA); Paperno et al. 2016, arXiv:1606.06031, in the edition of
        Radford et al. 2019 (LAMBADA)
"""

import bisect
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from tiktoken import Encoding
from tqdm import tqdm

import hub
import shards
from documents import (
    Parser,
    UserError,
    command,
    first_line,
    is_first_process,
    leave_the_word_to_the_first,
    locked,
    positive,
    sha256_of,
)
from train_tokenizer import CannotEncode, encode

AUTHORS = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"
FIELDS = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "split", "split_type", "label", "endings",
          "source_id")


@dataclass(frozen=True)
class Question:
    """A row: a beginning, what might follow it, and the number of the ending that does.

    name  the row's `ind`, or its line in the file
    """
    name: int | str
    ctx: str
    endings: tuple[str, ...]
    label: int


# ------------------------------------------------------------------------------------------------
# Benchmarks
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Split:
    """Rows of a benchmark; the name is the last part of the file's here."""
    name: str
    rows: int
    labelled: bool = True


@dataclass(frozen=True)
class Benchmark:
    """A data set to score models on: where it is, and how its rows become those of a file here.

    repo      of the Hub, at `revision`
    files     pattern of the paths that hold a split
    splits    by the data's own names; the first one is scored
    endings   how many a row may have
    row_here  makes a row of the file here of one of the Hub; raises what Python does where that is damaged
    authors   where the authors have the same rows, for when the Hub does not give them; empty: nowhere
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
    """A row of HellaSwag on the Hub, where labels are texts and empty in the test split."""
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
        raise ValueError("the text has no last word behind others")
    return {"ctx": context, "endings": [word], "label": 0}


BENCHMARKS = {
    "hellaswag": Benchmark("HellaSwag", "Rowan/hellaswag", "data/{split}-*",
                           {"validation": Split("val", 10_042), "train": Split("train", 39_905),
                            "test": Split("test", 10_003, labelled=False)},
                           (4,), as_authors_have_it, authors=AUTHORS),
    "arc_easy": Benchmark("ARC-easy", "allenai/ai2_arc", "ARC-Easy/{split}-*",
                          {"test": Split("test", 2_376)}, (3, 4, 5), row_of_arc),
    # its main branch has a script instead of rows; in this one the Hub keeps what the script gave
    "piqa": Benchmark("PIQA", "ybisk/piqa", "*/{split}/*", {"validation": Split("val", 1_838)}, (2,),
                      row_of_piqa, revision="refs/convert/parquet"),
    "lambada": Benchmark("LAMBADA", "EleutherAI/lambada_openai", "default/{split}*",
                         {"test": Split("test", 5_153)}, (1,), row_of_lambada),
}


# ------------------------------------------------------------------------------------------------
# Fetch
# ------------------------------------------------------------------------------------------------

def path_of(name: str, split: str) -> Path:
    return shards.DATA / f"{name}_{BENCHMARKS[name].splits[split].name}.jsonl"


def command_to_fetch(name: str) -> str:
    return "python download_hellaswag.py" + (f" --benchmark {name}" if name != "hellaswag" else "")


def fetch(name: str, split: str) -> Path:
    """The file of a benchmark's split, fetched unless it is there and whole.

    raises  UserError if neither the Hub nor the authors' repository gives it
    """
    benchmark, path = BENCHMARKS[name], path_of(name, split)
    rows = benchmark.splits[split].rows
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        if path.exists():
            try:
                check_rows(path, benchmark, split)
                print(f"{path.relative_to(shards.ROOT)} is there: {rows:,} rows")
                return path
            except UserError as error:
                print(f"{error}; it is fetched again", file=sys.stderr)
        partial = path.with_name(f"{path.name}.partial")
        try:
            source = fetch_from_hub(benchmark, split, partial)
        except UserError as error:
            if not benchmark.authors:
                raise
            print(f"{error}; asking the authors' repository", file=sys.stderr)
            source = fetch_from_authors(benchmark, path.name, split, partial)
        os.replace(partial, path)
    print(f"wrote {path.relative_to(shards.ROOT)}: {rows:,} rows from {source}, SHA-256 {sha256_of(path)}")
    return path


def fetch_from_hub(benchmark: Benchmark, split: str, path: Path) -> str:
    files = hub.list_files(benchmark.repo, "", ".parquet", benchmark.revision)
    matching = [file for file in files if fnmatch(file.path, benchmark.files.format(split=split))]
    if not matching:
        raise UserError(f"{benchmark.repo} has no parquet file of {split}")
    import pyarrow
    import pyarrow.parquet
    rows = []
    for file in matching:
        kept, copy = hub.in_cache(file), hub.fetch(file)
        try:
            rows += pyarrow.parquet.read_table(copy).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file.path} of {benchmark.repo} is no readable parquet file "
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
    """Write the rows of a benchmark as files here have them, and check them."""
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(json.dumps(benchmark.row_here(row), ensure_ascii=False) + "\n")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"row {number:,} of {benchmark.title} is damaged ({error!r})") from error
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    try:
        check_rows(path, benchmark, split)
    except UserError:
        path.unlink()
        raise


def check_rows(path: Path, benchmark: Benchmark, split: str) -> list[Question]:
    """raises  UserError unless the file holds exactly the rows of the split, each with so many endings"""
    expected, labelled = benchmark.splits[split].rows, benchmark.splits[split].labelled
    questions = read_questions(path, labelled, fewest=min(2, *benchmark.endings))
    if len(questions) != expected:
        raise UserError(f"{path.name} has {len(questions):,} rows instead of {expected:,}")
    odd = next((question for question in questions if len(question.endings) not in benchmark.endings), None)
    if odd:
        raise UserError(f"{path.name} has {len(odd.endings)} endings instead of "
                        f"{' or '.join(map(str, benchmark.endings))} in row {odd.name}")
    return questions


@dataclass(frozen=True)
class Task:
    """Questions to score a model on, all of a file's or a fixed sample of them."""
    name: str
    sha256: str
    rows_in_file: int
    questions: list[Question]

    def facts(self) -> dict:
        """What results on it can be compared by."""
        return {"sha256": self.sha256, "rows_in_file": self.rows_in_file}

    @property
    def note(self) -> str:
        """What to say behind the number of rows."""
        return f", a fixed sample of {self.rows_in_file:,}" if len(self.questions) < self.rows_in_file else ""


def open_task(path: Path, name: str, rows: int) -> Task:
    """The questions of a file; if `rows` is not 0, so many of them, the same whenever and wherever asked."""
    return task_of(path, name, read_questions(path), rows)


def task_of(path: Path, name: str, questions: list[Question], rows: int) -> Task:
    chosen = range(len(questions))
    if 0 < rows < len(questions):
        chosen = sorted(random.Random(0).sample(chosen, rows))
    return Task(name, sha256_of(path), len(questions), [questions[number] for number in chosen])


def benchmark_if_here(name: str, rows: int = 0) -> Task | None:
    """What of a benchmark is scored, all or a fixed sample; None if it has not been fetched."""
    benchmark = BENCHMARKS[name]
    path = path_of(name, benchmark.scored)
    if not path.is_file():
        return None
    try:
        questions = check_rows(path, benchmark, benchmark.scored)
    except UserError as error:
        raise UserError(f"{error}; fetch it again with: {command_to_fetch(name)}") from error
    return task_of(path, name, questions, rows)


def read_questions(path: Path, labelled: bool = True, fewest: int = 2) -> list[Question]:
    """The rows of a .jsonl file of this kind, of whatever number of endings from `fewest` on.

    raises  UserError that names the first line that is none
    """
    questions = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            questions.append(question_of(line, f"{path.name} line {number}", number, labelled, fewest))
    if not questions:
        raise UserError(f"{path} has no rows")
    return questions


def question_of(line: str, where: str, number: int, labelled: bool, fewest: int) -> Question:
    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{where} is no row to score: {rule}")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    require(isinstance(row, dict), "it must be an object")
    ctx, endings, label = row.get("ctx"), row.get("endings"), row.get("label")
    require(isinstance(ctx, str), "ctx must be a text")
    require(isinstance(endings, list) and len(endings) >= fewest and all(isinstance(e, str) for e in endings),
            f"endings must be a list of {'two texts' if fewest > 1 else 'a text'} or more")
    if labelled:
        right = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(endings)
        require(right, f"label must be the number of an ending, from 0 to {len(endings) - 1}")
    name = row.get("ind")
    return Question(name if isinstance(name, int | str) else number, ctx, tuple(endings),
                    label if labelled else -1)


# ------------------------------------------------------------------------------------------------
# Score
# ------------------------------------------------------------------------------------------------

# what the log-probability of an ending is divided by; of a single ending there is acc alone
METRICS = ("acc", "acc_norm_characters", "acc_norm_bytes", "acc_norm_tokens")
LARGEST_EXPONENT = 700      # of a perplexity; exp of 710 is more than a float64 holds


@dataclass(frozen=True)
class Accuracy:
    """Share of rows whose likeliest ending is the right one, with its Wilson 95 % interval.

    A single ending is right if each of its tokens is the likeliest one, so that greedy decoding writes it.
    ties  rows in which several endings are likeliest; the first of them counts as the choice
    """
    value: float
    low: float
    high: float
    correct: int
    ties: int


@dataclass(frozen=True)
class Scores:
    """What a model makes of a task.

    chance        accuracy of guessing: an ending, or each token of a single one
    cut_contexts  endings before which the context was too long for the model and was cut from the left
    cut_endings   endings that are longer than the model reads; only what is left of them is scored
    seconds       that scoring took
    accuracies    by METRICS
    items         for each row: its name and label, and for each ending its log-probability in nats and its
                  length; then the choice by each metric, -1 where a single ending is not what greedy
                  decoding writes
    perplexity    of single endings, each as a whole: exp of their mean negative log-probability
    """
    rows: int
    chance: float
    cut_contexts: int
    cut_endings: int
    seconds: float
    accuracies: dict[str, Accuracy]
    items: list[dict]
    perplexity: float | None = None

    def summary(self) -> dict:
        """All but the items, as summary.json has it."""
        return {"rows": self.rows, "chance": self.chance, "cut_contexts": self.cut_contexts,
                "cut_endings": self.cut_endings, "seconds": self.seconds,
                **({} if self.perplexity is None else {"perplexity": self.perplexity}),
                **{metric: vars(accuracy) for metric, accuracy in self.accuracies.items()}}

    def lines(self) -> list[str]:
        lines = [f"{metric.replace('acc_norm_', 'acc_norm by '):<22} {accuracy.value:.4f}   95 % interval "
                 f"{accuracy.low:.4f} to {accuracy.high:.4f}   {accuracy.correct:,} of {self.rows:,}, "
                 f"{accuracy.ties:,} ties" for metric, accuracy in self.accuracies.items()]
        if self.perplexity is not None:
            lines.append(f"{'perplexity':<22} {self.perplexity:.2f}")
        lines.append(f"{'chance':<22} {self.chance:.4f}   {self.cut_contexts:,} endings behind a context "
                     "that was too long and was cut from the left")
        if self.cut_endings:
            lines.append(f"{self.cut_endings:,} endings are longer than the model reads and were cut, too")
        return lines


@dataclass(frozen=True)
class Candidate:
    """An ending behind its context: the model predicts the last `predicted` tokens from those before them."""
    tokens: tuple[int, ...]
    predicted: int
    context_is_cut: bool
    ending_is_cut: bool

    @property
    def width(self) -> int:
        """Tokens to be read; the last is predicted only."""
        return len(self.tokens) - 1


def hellaswag_accuracy(log_probabilities: Callable[..., np.ndarray], tokenizer: Encoding,
                       questions: list[Question], shape: tuple[int, int], rank: int = 0, world_size: int = 1,
                       add_up: Callable[[np.ndarray], np.ndarray] = lambda sums: sums) -> Scores:
    """Score a model on multiple choice, or on questions of one ending each, many candidates in a row.

    log_probabilities  (B, T) int64 inputs and targets -> (B, T) log-probability of each target in nats; a
                       target of -1 is not to be predicted, and what stands there in the answer does not
                       count. The model must keep documents apart: each candidate begins with <|endoftext|>.
                       For single endings it is given True as well, and answers (2, B, T): these, then 1 where
                       the target is the likeliest token, else 0
    shape              (B, T) of every batch; T is the most that the model can read
    rank, world_size   this process scores every world_size-th batch, and
    add_up             gives the sum of all processes' arrays, in float64

    The batches are the same for any number of processes, and each candidate is in one of them; equal ones
    are scored once, or their scores would differ in the last digits.
    """
    begun = time.perf_counter()
    rows, width = shape
    endings = [candidate for question in questions
               for candidate in candidates_of(question, tokenizer, width)]
    candidates = list(dict.fromkeys(endings))
    packed = packed_rows([candidate.width for candidate in candidates], width)
    single = all(len(question.endings) == 1 for question in questions)
    sums = np.zeros((1 + single, len(candidates)))      # of log-probabilities, then of likeliest tokens
    starts = range(rank * rows, len(packed), world_size * rows)
    with tqdm(starts, unit=" batches", disable=rank > 0 or not sys.stderr.isatty(), leave=False) as bar:
        for start in bar:
            inputs, targets = np.full(shape, tokenizer.eot_token), np.full(shape, -1)       # (B, T)
            places = {}
            for row, numbers in enumerate(packed[start:start + rows]):
                first = 0
                for number in numbers:
                    candidate = candidates[number]
                    last = first + candidate.width
                    inputs[row, first:last] = candidate.tokens[:-1]
                    targets[row, last - candidate.predicted:last] = candidate.tokens[-candidate.predicted:]
                    places[number] = row, slice(last - candidate.predicted, last)
                    first = last
            scores = log_probabilities(inputs, targets, *([True] if single else []))
            scores = np.asarray(scores, dtype=np.float64).reshape(-1, *shape)               # (1 or 2, B, T)
            for number, (row, span) in places.items():
                sums[:, number] = scores[:, row, span].sum(-1)
    sums = add_up(sums)
    if not np.isfinite(sums).all():
        raise UserError("the model gives log-probabilities that are not finite")
    sums_of = dict(zip(candidates, sums.T, strict=True))
    items, begin = [], 0
    for question in questions:
        mine = endings[begin:begin + len(question.endings)]
        items.append(item_of(question, *np.transpose([sums_of[candidate] for candidate in mine]),
                             tokens=[candidate.predicted for candidate in mine]))
        begin += len(mine)
    guesses = [tokenizer.n_vocab ** item["tokens"][0] if single else len(item["tokens"]) for item in items]
    return Scores(len(questions), sum(1 / number for number in guesses) / len(questions),
                  sum(candidate.context_is_cut for candidate in endings),
                  sum(candidate.ending_is_cut for candidate in endings), time.perf_counter() - begun,
                  {metric: accuracy_of(items, metric) for metric in METRICS if metric in items[0]}, items,
                  perplexity_of(items) if single else None)


def candidates_of(question: Question, tokenizer: Encoding, longest: int) -> Iterator[Candidate]:
    """Each ending with what stands before it, at most `longest` tokens to be read."""
    def tokens_of(text: str) -> list[int]:
        try:
            return encode(tokenizer, text)[0]
        except CannotEncode as error:
            raise UserError(f"tiktoken cannot encode a text of row {question.name}") from error
    context = tokens_of(question.ctx)
    for ending in question.endings:
        predicted = tokens_of(f" {ending}")
        # <|endoftext|> begins the text, as in training; of what follows, the last `longest` tokens stay
        behind = context + predicted
        kept = behind[max(0, len(behind) - longest):]
        yield Candidate((tokenizer.eot_token, *kept), min(len(predicted), len(kept)), len(kept) < len(behind),
                        len(kept) < len(predicted))


def packed_rows(widths: list[int], width: int) -> list[list[int]]:
    """Numbers of candidates, row by row; a row holds `width` tokens.

    The longest go first, each into the fullest row that has room (best fit, decreasing).
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []        # what each row has left, and its number; sorted
    for number in sorted(range(len(widths)), key=lambda number: (-widths[number], number)):
        place = bisect.bisect_left(room, (widths[number], 0))
        left, row = room.pop(place) if place < len(room) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        bisect.insort(room, (left - widths[number], row))
    return rows


def item_of(question: Question, sums: np.ndarray, likeliest: np.ndarray | None = None, *,
            tokens: list[int]) -> dict:
    """What a row's endings score; `likeliest` counts a single ending's likeliest tokens."""
    lengths = {"characters": [len(ending) for ending in question.endings],
               "bytes": [len(ending.encode(errors="replace")) for ending in question.endings],
               "tokens": tokens}
    item = {"name": question.name, "label": question.label, "log_probabilities": sums.tolist(), **lengths}
    if likeliest is not None:
        return item | {"acc": {"choice": 0 if likeliest[0] == tokens[0] else -1, "tie": False}}
    for metric in METRICS:
        divisors = lengths.get(metric.removeprefix("acc_norm_"), [1] * len(sums))
        scores = sums / np.maximum(divisors, 1)
        item[metric] = {"choice": int(scores.argmax()), "tie": bool((scores == scores.max()).sum() > 1)}
    return item


def accuracy_of(items: list[dict], metric: str) -> Accuracy:
    correct = sum(item[metric]["choice"] == item["label"] for item in items)
    return Accuracy(correct / len(items), *wilson_interval(correct, len(items)), correct,
                    sum(item[metric]["tie"] for item in items))


def perplexity_of(items: list[dict]) -> float:
    nats = -sum(item["log_probabilities"][0] for item in items) / len(items)
    return math.exp(min(nats, LARGEST_EXPONENT))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion.

    source  Wilson 1927, J. Am. Stat. Assoc. 22, 209
    """
    z = 1.959963984540054
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

def score_run(folder: Path, path: Path | None, name: str, rows: int) -> None:
    """Score the weights of a run on a file's questions or a benchmark, and leave the result in its folder.

    The model is that of the script that trained it, which must still lie here.
    """
    import run_folder
    task = open_task(path, path.stem, rows) if path else benchmark_if_here(name, rows)
    if task is None:
        raise UserError(f"{BENCHMARKS[name].title} is not here; fetch it with: {command_to_fetch(name)}")
    taken = ("samples", "prompts", *BENCHMARKS) if path else ()
    if not re.fullmatch(shards.FOLDER_NAME, task.name) or task.name in taken:
        raise UserError(f"the result is written to {task.name}.jsonl of the run; name {path} otherwise, with "
                        f"letters, digits, '.', '_' and '-', but not {' or '.join(taken)}")
    before = run_folder.summary_of(folder).get("benchmarks", {}).get(task.name)
    if before and (before["sha256"] != task.sha256 or before["rows"] > len(task.questions)):
        raise UserError(f"{folder} has a score on {before['rows']:,} rows of {task.name}, which this one on "
                        f"{len(task.questions):,} would replace; name the task otherwise, or take all rows")
    script = run_folder.load_script(folder)
    scores, facts, is_main = script.score_saved(folder, task)
    if is_main:
        run_folder.write_benchmark(folder, task.name, task.facts() | scores.summary() | facts, scores.items)
        print(f"{task.name}: {scores.rows:,} rows{task.note}", *scores.lines(),
              f"wrote {folder / task.name}.jsonl", sep="\n")


@command
def main() -> None:
    parser = Parser("Fetch HellaSwag or another benchmark, or score a run on it.")
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="which one (default: hellaswag)")
    parser.add_argument("--split", help="what of it to fetch (default: what is scored, as validation)")
    parser.add_argument("--score", metavar="RUN_FOLDER", type=Path,
                        help="score the model of this run (trained with --save_model) instead of fetching")
    parser.add_argument("--task", metavar="FILE.jsonl", type=Path,
                        help="with --score: questions of your own instead of a benchmark")
    parser.add_argument("--hellaswag_rows", metavar="N", type=lambda text: positive(text, 0),
                        help="with --score: a fixed sample of so many rows; 0: all (default: 0)")
    args = parser.parse_args()
    name = args.benchmark or "hellaswag"
    benchmark = BENCHMARKS[name]
    try:
        if args.score and args.split:
            raise UserError(f"--split is what to fetch; --score takes the {benchmark.scored} split, "
                            "or a --task")
        if not args.score and (args.task or args.hellaswag_rows is not None):
            raise UserError("--task and --hellaswag_rows need a model to score: --score RUN_FOLDER")
        if args.task and args.benchmark:
            raise UserError("--task is a file of your own; leave out --benchmark")
        split = args.split or benchmark.scored
        if split not in benchmark.splits:
            raise UserError(f"--split of {benchmark.title} must be {' or '.join(benchmark.splits)}; "
                            f"it is {split!r}")
        if args.score:
            score_run(args.score, args.task, name, args.hellaswag_rows or 0)
        elif is_first_process():
            fetch(name, split)
    except UserError:
        leave_the_word_to_the_first()
        raise


if __name__ == "__main__":
    main()
