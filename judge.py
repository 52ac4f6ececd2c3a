"""Which of two runs writes better? A language model reads texts of both, and its verdicts are counted.

    python judge.py A B --base_url http://127.0.0.1:8000/v1 --model NAME --dry_run     requests and their cost
    OPENAI_API_KEY=... python judge.py A B --base_url https://HOST/v1 --model NAME     ask the judge

A and B are run folders. If both have weights (--save_model), each model continues the 100 prompts of
prompts.txt; the texts are kept in prompts.jsonl of its run, so another judge needs no weights. Otherwise the
texts of samples.jsonl are judged: runs with the same data and tokenizer have samples of the same prompts.

The judge is any server that speaks OpenAI's POST /chat/completions. It sees each pair twice, once with each
text first. A run wins a prompt only if it is preferred in both orders; everything else is a tie. So a judge
that always takes the first text decides nothing. If an answer is not A, B or tie, the judge is asked again, a
limited number of times; then there is no verdict.

Each answer is written to A's folder as it arrives. If this is interrupted, run the same command again: it
asks only for missing verdicts. The file's name ends in a hash of the address and of all requests, so answers
of other judges, or about other texts or prompts, never mix. The result is written to both run folders, each
from its own point of view.
source  Zheng et al. 2023, arXiv:2306.05685, for judging in both orders
"""

import contextlib
import dataclasses
import json
import os
import sys
from typing import BinaryIO

from tqdm import tqdm

from benchtop import hub
from benchtop.command_line import Help, Parser, amount, command, counted, positive
from benchtop.endpoint import JSON, KEY_VARIABLE, Answer, Asked, Endpoint
from benchtop.errors import UserError
from benchtop.judging import (
    Judgement,
    about_nonsense,
    add_line,
    conclusion,
    cost_in_words,
    dollars_of,
    held,
    only_run,
    pairs_of,
    read_answers,
    tally,
    write_results,
)


def price(text: str) -> float:
    """argparse type of a price in dollars."""
    return amount(text)


def plan(judgement: Judgement, missing: list[Asked], prices: tuple[float, float]) -> list[str]:
    """Lines that say what will be asked and what it may cost."""
    a, b, path, questions = judgement.a, judgement.b, judgement.path, judgement.questions
    lines = [f"A is {a.name}, B is {b.name}; {counted(len(judgement.pairs), 'prompt')} of "
             f"{judgement.source}, each judged in both orders"]
    others = [other.name for other in sorted(path.parent.glob(f"{path.stem[:-8]}{8 * '[0-9a-f]'}.jsonl"))
              if other != path]
    if others:
        lines.append(f"answers of other judges or about other texts, left alone: {', '.join(others)}")
    if len(missing) < len(questions):
        lines.append(f"{len(questions) - len(missing)} of {counted(len(questions), 'answer')} are in "
                     f"{os.path.relpath(path)}")
    if missing:
        tokens_in = sum(len(question.body) for question in missing) // 4
        tokens_out = len(missing) * judgement.max_tokens
        lines.append(f"{counted(len(missing), 'request')} to {judgement.model} at {judgement.url}: about "
                     f"{tokens_in:,} tokens in (4 bytes per token) and at most {tokens_out:,} out, without "
                     f"retries; {cost_in_words(dollars_of(prices, tokens_in, tokens_out))}")
    return lines


def example(endpoint: Endpoint, question: Asked) -> str:
    """A request in full, with the API key replaced by the name of its variable."""
    headers = JSON | ({"Authorization": f"Bearer [{endpoint.key_variable}]"} if endpoint.key else {})
    return "\n".join([f"POST {endpoint.url}", *(f"{name}: {value}" for name, value in headers.items()), "",
                      json.dumps(json.loads(question.body), indent=2)])


def ask_all(judgement: Judgement, endpoint: Endpoint, missing: list[Asked],
            answers: dict[tuple[int, str], Answer], file: BinaryIO) -> None:
    """Ask what is missing; add each answer to `answers` and `file` as it arrives, so none is lost."""
    def kept() -> str:
        given = sum(bool(answer.said) for answer in answers.values())
        return (f"{given} of {counted(len(judgement.questions), 'answer')} are kept, and the same command "
                "resumes from there")
    try:
        for answer in tqdm(endpoint.answers(missing), total=len(missing), unit="answer", disable=None,
                           leave=False):
            if not answers:
                add_line(file, judgement.heading())
            place = answer.number, answer.first
            answers[place] = answer.after(answers.get(place))
            add_line(file, dataclasses.asdict(answers[place]))
    except UserError as error:
        raise UserError(f"{error}; {kept()}") from error
    except KeyboardInterrupt:
        print(f"\njudge.py: interrupted; {kept()}", file=sys.stderr)
        sys.exit(130)
    finally:
        endpoint.stop.set()


@command
def main() -> None:
    parser = Parser("Have a language model judge which of two runs writes better.",
                    usage="%(prog)s A B --base_url URL --model NAME [flags]",
                    formatter_class=lambda prog: Help(prog, max_help_position=26, width=110))
    parser.add_argument("a", metavar="A", help="run folder, here or in experiments/")
    parser.add_argument("b", metavar="B", help="run folder to judge it against")
    parser.add_argument("--base_url", required=True, metavar="URL",
                        help="address of the API, without /chat/completions, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="the judge: a model of that server")
    parser.add_argument("--key_variable", default=KEY_VARIABLE, metavar="NAME",
                        help="environment variable that holds the API key, if one is needed; '' = send none")
    parser.add_argument("--dry_run", action="store_true",
                        help="print number and cost of the requests and one of them in full; send nothing")
    parser.add_argument("--price_in", type=price, default=0, metavar="DOLLARS",
                        help="price of a million input tokens; 0 = unknown")
    parser.add_argument("--price_out", type=price, default=0, metavar="DOLLARS",
                        help="price of a million output tokens; 0 = unknown")
    parser.add_argument("--max_tokens", type=positive, default=16, metavar="N",
                        help="longest answer, in tokens; a reasoning model needs many more")
    parser.add_argument("--at_once", type=positive, default=4, metavar="N", help="requests at a time")
    parser.add_argument("--attempts", type=positive, default=hub.TRIES, metavar="N",
                        help="tries for one answer, if a request fails or the reply is not a verdict")
    parser.add_argument("--timeout", type=positive, default=60, metavar="SECONDS",
                        help="longest time for one request")
    args = parser.parse_args()
    a, b = only_run(args.a), only_run(args.b)
    if a.folder.resolve() == b.folder.resolve() or (a.summary and a.summary == b.summary):
        raise UserError(f"{args.a} and {args.b} are the same run; name two")
    endpoint = Endpoint(args.base_url, args.key_variable, args.timeout, args.attempts, args.at_once)
    pairs, source = pairs_of(a, b)
    prices = args.price_in, args.price_out
    judgement = Judgement(a, b, source, pairs, endpoint.url, args.model, args.max_tokens)
    with contextlib.nullcontext() if args.dry_run else held(judgement.path) as file:
        answers = read_answers(judgement, file)
        given = {place for place, answer in answers.items() if answer.said}
        missing = [question for question in judgement.questions
                   if (question.number, question.first) not in given]
        print(*plan(judgement, missing, prices), sep="\n", flush=True)
        if args.dry_run:
            return print("", example(endpoint, judgement.questions[0]), "", "nothing was sent", sep="\n")
        ask_all(judgement, endpoint, missing, answers, file)
    found, given = tally(answers), list(answers.values())
    if not found.judged:
        raise UserError(f"{args.model} gave no verdict on any prompt, {about_nonsense(given)}")
    used = {fact: sum(getattr(answer, fact) for answer in given)
            for fact in ("requests", "with_usage", "tokens_in", "tokens_out")}
    used["dollars"] = dollars_of(prices, used["tokens_in"], used["tokens_out"])
    paths = write_results(judgement, found, given, used)
    print(*conclusion(judgement, found, given, used), "wrote " + ", ".join(map(os.path.relpath, paths)),
          sep="\n")


if __name__ == "__main__":
    main()
