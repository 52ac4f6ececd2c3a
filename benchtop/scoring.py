"""Scores of a language model on multiple choice: log-probabilities in, accuracies with their intervals out.

The model is one function from token ids to log-probabilities, both numpy arrays, so nothing here needs torch.
The questions come from tasks.py; saved.py wraps a model into that function.
"""

import bisect
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tiktoken import Encoding
from tqdm import tqdm

from benchtop.errors import NonFinite, UserError
from benchtop.significance import wilson_interval
from benchtop.tasks import Question
from benchtop.tokenizer import CannotEncode, encode

# acc_norm_X divides an ending's log-probability by its length in X; single endings have only acc
METRICS = ("acc", "acc_norm_characters", "acc_norm_bytes", "acc_norm_tokens")
LARGEST_EXPONENT = 700      # of a perplexity; exp(710) overflows a float64


@dataclass(frozen=True)
class Accuracy:
    """Fraction of rows whose likeliest ending is the right one, with its Wilson 95 % interval.

    A single ending is right if each of its tokens is the likeliest one, so that greedy decoding writes it.
    ties  rows in which several endings tie for the likeliest; the first of them counts as the choice
    """
    value: float
    low: float
    high: float
    correct: int
    ties: int


@dataclass(frozen=True)
class Scores:
    """The results of a model on a task.

    chance        accuracy of random guessing: of an ending, or of each token of a single ending
    cut_contexts  endings whose context was too long for the model and was cut from the left
    cut_endings   endings longer than the model can read; only their last tokens are scored
    seconds       time that scoring took
    accuracies    by METRICS
    items         for each row: its name and label; for each ending, its log-probability in nats and its
                  lengths; then the choice by each metric, -1 if greedy decoding does not write a single
                  ending
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
        """All but the items, in the form of summary.json."""
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
        lines.append(f"{'chance':<22} {self.chance:.4f}   {self.cut_contexts:,} endings had a context "
                     "too long for the model, which was cut from the left")
        if self.cut_endings:
            lines.append(f"{self.cut_endings:,} endings are longer than the model can read and were cut, too")
        return lines


@dataclass(frozen=True)
class Candidate:
    """A context and one ending: the model predicts the last `predicted` tokens from those before them."""
    tokens: tuple[int, ...]
    predicted: int
    context_is_cut: bool
    ending_is_cut: bool

    @property
    def width(self) -> int:
        """Number of tokens that the model reads: all but the last, which is only predicted."""
        return len(self.tokens) - 1


def hellaswag_accuracy(log_probabilities: Callable[..., np.ndarray], tokenizer: Encoding,
                       questions: list[Question], shape: tuple[int, int], rank: int = 0, world_size: int = 1,
                       add_up: Callable[[np.ndarray], np.ndarray] = lambda sums: sums) -> Scores:
    """Score a model on multiple choice, or on questions with one ending each; rows pack many candidates.

    log_probabilities  (B, T) int64 inputs and targets -> (B, T) log-probability of each target in nats;
                       where a target is -1, the result is ignored. The model must keep documents apart: each
                       candidate begins with <|endoftext|>. For single endings it gets True as a third
                       argument and must return (2, B, T): the log-probabilities, then 1 where the target is
                       the likeliest token, else 0
    shape              (B, T) of every batch; T is the most that the model can read
    rank, world_size   this process scores every world_size-th batch
    add_up             sums an array over all processes, in float64

    The batches are the same for any number of processes. Equal candidates are scored only once, since their
    scores could otherwise differ in the last digits.
    """
    begun = time.perf_counter()
    rows, width = shape
    endings = [candidate for question in questions
               for candidate in candidates_for(question, tokenizer, width)]
    candidates = list(dict.fromkeys(endings))
    packed = packed_rows([candidate.width for candidate in candidates], width)
    single = all(len(question.endings) == 1 for question in questions)
    sums = np.zeros((1 + single, len(candidates)))      # log-probabilities, then likeliest tokens
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
        raise NonFinite("the model gives log-probabilities that are not finite")
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


def candidates_for(question: Question, tokenizer: Encoding, longest: int) -> Iterator[Candidate]:
    """Each ending with its context, cut from the left to at most `longest` tokens to read."""
    def tokens_of(text: str) -> list[int]:
        try:
            return encode(tokenizer, text)[0]
        except CannotEncode as error:
            raise UserError(f"tiktoken cannot encode a text of row {question.name}") from error
    context = tokens_of(question.ctx)
    for ending in question.endings:
        predicted = tokens_of(f" {ending}")
        # the text begins with <|endoftext|>, as in training; of the rest, the last `longest` tokens are kept
        behind = context + predicted
        kept = behind[max(0, len(behind) - longest):]
        yield Candidate((tokenizer.eot_token, *kept), min(len(predicted), len(kept)), len(kept) < len(behind),
                        len(kept) < len(predicted))


def packed_rows(widths: list[int], width: int) -> list[list[int]]:
    """Pack candidates into rows of `width` tokens; returns the numbers of the candidates in each row.

    The longest go first, each into the fullest row that has room (best-fit decreasing).
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []        # (free tokens, number) of each row, sorted
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
    """A row's entry in Scores.items; `likeliest` counts the likeliest tokens of a single ending."""
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
