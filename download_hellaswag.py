"""Fetch HellaSwag, ARC-easy, PIQA or LAMBADA, and score language models on them or on questions of your own.

    python download_hellaswag.py                                 data/hellaswag_val.jsonl: 10,042 rows, 12 MB
    python download_hellaswag.py --benchmark arc_easy            or piqa, or lambada
    python download_hellaswag.py --score experiments/RUN         score a run trained with --save_model
    python download_hellaswag.py --score RUN --benchmark piqa    score it on another benchmark
    python download_hellaswag.py --score RUN --task my.jsonl     score it on questions of your own

A row has a context, several endings and the number of the right one; a --task needs only these fields:

    {"ctx": "A man is sitting on a roof. he", "label": 3,
     "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                 "is holding a rubik's cube.", "starts pulling up roofing on a roof."], ...}

A model reads <|endoftext|>, the unchanged ctx, a space and one ending at a time. It chooses the ending whose
tokens together are likeliest (acc), or likeliest per character, byte or token (acc_norm). Chance is 0.25.
Published for GPT-2 with 124M parameters: acc 0.2859 and acc_norm by tokens 0.2955 on this text (llm.c's
script); acc 0.2892 and acc_norm by characters 0.3114 in lm-evaluation-harness, which edits the text first.

Other benchmarks are converted to this form when downloaded, with the prompts of lm-evaluation-harness. In
ARC-easy and PIQA, ctx is "Question: ", the question and, on a line of its own, "Answer:"; each ending is an
answer. In LAMBADA, the only ending is the last word of a text. It counts as right (acc) if each of its tokens
is the likeliest one; its perplexity is reported too. docs/benchmarks.md has the chance levels and the scores
of GPT-2.
source  Zellers et al. 2019, arXiv:1905.07830 (HellaSwag); Clark et al. 2018, arXiv:1803.05457 (ARC);
        Bisk et al. 2019, arXiv:1911.11641 (PIQA); Paperno et al. 2016, arXiv:1606.06031, in the edition of
        Radford et al. 2019 (LAMBADA)
"""

import re
from pathlib import Path

from benchtop import places
from benchtop.command_line import Parser, command, counted, positive
from benchtop.errors import UserError, exit_quietly_on_other_ranks
from benchtop.folder import load_script, summary_of, write_benchmark
from benchtop.processes import is_first_process
from benchtop.tasks import BENCHMARKS, benchmark_if_here, command_to_fetch, fetch, open_task


def score_run(folder: Path, path: Path | None, name: str, rows: int) -> None:
    """Score a run on the questions of a file or a benchmark, and write the result to the run folder.

    The model comes from the script that trained the run, which must still be here.
    """
    task = open_task(path, path.stem, rows) if path else benchmark_if_here(name, rows)
    if task is None:
        raise UserError(f"{BENCHMARKS[name].title} is not downloaded; "
                        f"fetch it with: {command_to_fetch(name)}")
    taken = ("samples", "prompts", *BENCHMARKS) if path else ()
    if not re.fullmatch(places.FOLDER_NAME, task.name) or task.name in taken:
        raise UserError(f"the result would be written to {task.name}.jsonl of the run; rename {path}, using "
                        f"only letters, digits, '.', '_' and '-', but not {' or '.join(taken)}")
    before = (summary_of(folder).get("benchmarks") or {}).get(task.name) or {}
    scored = before.get("rows", 0)
    if before and (before.get("sha256") != task.sha256 or scored > len(task.questions)):
        raise UserError(f"{folder} already has a score on {counted(scored, 'row')} of {task.name}, "
                        f"which this one on {len(task.questions):,} would replace; rename the task, or score "
                        "all rows")
    from benchtop.saved import score_saved  # late: it imports torch
    scores, facts, is_main = score_saved(load_script(folder).EXPERIMENT, folder, task)
    if is_main:
        write_benchmark(folder, task.name, task.facts() | scores.summary() | facts, scores.items)
        print(f"{task.name}: {counted(scores.rows, 'row')}{task.note}", *scores.lines(),
              f"wrote {folder / task.name}.jsonl", sep="\n")


@command
def main() -> None:
    parser = Parser("Fetch HellaSwag or another benchmark, or score a run on it.")
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="which benchmark (default: hellaswag)")
    parser.add_argument("--split", help="split to fetch (default: the one that is scored)")
    parser.add_argument("--score", metavar="RUN_FOLDER", type=Path,
                        help="score the model of this run (trained with --save_model) instead of fetching")
    parser.add_argument("--task", metavar="FILE.jsonl", type=Path,
                        help="with --score: questions of your own instead of a benchmark")
    parser.add_argument("--hellaswag_rows", metavar="N", type=lambda text: positive(text, 0),
                        help="with --score: rows to score, a fixed subset; 0: all (default: 0)")
    args = parser.parse_args()
    name = args.benchmark or "hellaswag"
    benchmark = BENCHMARKS[name]
    try:
        if args.score and args.split:
            raise UserError(f"--split selects what to fetch; --score uses the {benchmark.scored} split, "
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
        exit_quietly_on_other_ranks()
        raise


if __name__ == "__main__":
    main()
