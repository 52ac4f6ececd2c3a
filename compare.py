"""Compare runs: tables, statistics between groups, curves, and an HTML page.

    python compare.py experiments/2026*                           a table of these runs
    python compare.py demo 'gelu=experiments/*_gelu_seed*'        groups, with conclusions
    python compare.py demo --format latex                         LaTeX tables; also text, markdown, csv
    python compare.py demo gelu --json                            everything as one JSON object, for programs
    python compare.py demo gelu --plot figures/gelu               curves by step, tokens, time, FLOPs and cost
    python compare.py demo gelu --html gelu.html                  everything on one page, for a browser
    python compare.py --index                                     rewrite experiments/README.md

A group is NAME=GLOB, or a folder of run folders, such as the committed experiments/demo. The first group is
the baseline; each other group is compared with it. Runs are not compared if they differ in data, tokenizer,
number of tokens, or bench files that affect results, unless --although allows that difference. Runs validated
on different text are never compared. On the same text, val_bpb is comparable even between tokenizers.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchtop import places
from benchtop.command_line import Help, Parser, amount, command, in_one_line
from benchtop.conclusions import Comparison, compare_all, conclusions, facts_of, target_line
from benchtop.errors import UserError
from benchtop.files import write_text
from benchtop.groups import (
    CONDITIONS,
    Group,
    NotComparable,
    check_comparable,
    describe_bench,
    few_documents,
    mixed,
    open_groups,
)
from benchtop.redaction import without_secrets
from benchtop.tables import (
    as_csv,
    as_latex,
    as_markdown,
    as_text,
    group_facts,
    groups_table,
    index,
    run_facts,
    runs_table,
)


def loss(text: str) -> float:
    """argparse type of a loss, or a difference of losses, above 0."""
    return amount(text, or_zero=False)


def make_parser() -> Parser:
    parser = Parser("Compare runs: a table, statistics between groups, curves, a page.",
                    usage="%(prog)s EXP [EXP ...] [flags]",
                    formatter_class=lambda prog: Help(prog, max_help_position=24, width=110))
    parser.add_argument("runs", nargs="*", metavar="EXP",
                        help="a run folder, a glob, a folder of runs, or a group NAME=GLOB")
    parser.add_argument("--format", choices=("text", "markdown", "latex", "csv"), default="text",
                        help="format of the tables")
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object with runs, groups and comparisons, or an error")
    parser.add_argument("--metric", choices=("val_bpb", "val_loss"),
                        help="metric to compare and to plot; without it val_bpb, or val_loss with --target")
    parser.add_argument("--although", choices=tuple(CONDITIONS), action="append",
                        help="compare even though the runs differ in this; may be repeated")
    parser.add_argument("--target", type=loss, metavar="LOSS",
                        help="test whether the mean of each group is below this value")
    parser.add_argument("--effect", type=loss, metavar="DIFFERENCE",
                        help="smallest difference you care about: print the number of runs that it needs")
    parser.add_argument("--plot", type=Path, metavar="BASE",
                        help="write curves to BASE_step.png, BASE_difference_tokens.svg, ...")
    parser.add_argument("--html", type=Path, metavar="FILE",
                        help="write a page with tables, conclusions, curves and samples")
    parser.add_argument("--index", action="store_true",
                        help="rewrite experiments/README.md, the list of committed runs")
    return parser


@dataclass
class Weighed:
    """The conclusions about some groups.

    said      lines to print
    compared  comparison of each group in `groups` with the first
    groups    the groups that were compared
    problem   why they must not be compared; empty if they may
    """
    said: list[str]
    compared: list[Comparison] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    problem: str = ""


def weigh(groups: list[Group], metric: str, although: Iterable[str], effect: float, target: float | None,
          ) -> Weighed:
    finished = [group for group in groups if group.finished]
    runs = [run for group in finished for run in group.finished]
    # exactly two are compared even if they are single runs; of more, only groups of several runs
    weighed = finished if len(finished) == 2 else [group for group in finished if not group.is_alone]
    found = Weighed([line for group in weighed for line in mixed(group)])
    found.said += [describe_bench(runs)] if len(runs) > 1 else []
    found.said += few_documents(runs)
    try:
        if weighed:
            check_comparable(weighed, metric, although)
            found.compared, found.groups = compare_all(weighed, metric, effect), weighed
            found.said += ["", *conclusions(weighed, found.compared)]
        if target is not None:
            found.said += ["", *(target_line(group, metric, target) for group in finished)]
    except NotComparable as error:
        found.problem = str(error)
    left_out = [group.name for group in finished if group not in weighed] if len(weighed) > 1 else []
    found.said += [f"not compared, since they are single runs: {', '.join(left_out)}"] if left_out else []
    found.said += [f"{run.name}: {run.status}" for group in groups for run in group.runs
                   if not run.is_finished]
    return found


def print_tables(groups: list[Group], style: str, is_comparable: bool) -> None:
    """Print the table of runs and, if the runs are comparable, the table of groups."""
    if style == "csv":
        return print(as_csv(groups))
    show = {"text": as_text, "markdown": as_markdown, "latex": as_latex}[style]
    print(show(runs_table(groups)))
    if is_comparable and any(len(group.runs) > 1 for group in groups):
        print("\n" + show(groups_table(groups)))


def print_object(content: dict) -> None:
    """Print one JSON object, with null for NaN and infinity."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    print(without_secrets(json.dumps(content, indent=2)))


def refuse(status: int = 0, message: str | None = None) -> None:
    """Replaces parser.exit under --json: an error is raised as UserError, and so printed as JSON."""
    if status:
        raise UserError(str(message).strip().partition("error: ")[2])
    sys.exit()


def write_files(groups: list[Group], metric: str, plot: Path | None, html: Path | None, found: Weighed,
                ) -> list[Path]:
    """Write what --plot and --html ask for; imports are late because matplotlib loads slowly."""
    written = []
    if plot:
        from benchtop.curves import save_curves
        written += save_curves(groups, metric, plot, found.groups)
    if html:
        from benchtop.page import page
        html.parent.mkdir(parents=True, exist_ok=True)
        text = page(groups, metric, [*found.said, found.problem], not found.problem, found.groups)
        write_text(html, without_secrets(text))
        written.append(html)
    return written


def run(parser: Parser, args: argparse.Namespace) -> None:
    """raises  UserError if the runs cannot be read or compared"""
    if args.index:
        write_text(places.EXPERIMENTS / "README.md", without_secrets(index(places.EXPERIMENTS)))
    if not args.runs:
        return args.index or parser.error("name runs to compare, as in: python compare.py experiments/2026*")
    if args.html and not args.html.name:
        raise UserError("--html must be the name of a file; it is empty")
    if args.plot and not args.plot.name:
        raise UserError(f"--plot must be the start of file names, such as figures/demo; it is {args.plot}")
    metric = args.metric or ("val_bpb" if args.target is None else "val_loss")
    groups = open_groups(args.runs)
    found = weigh(groups, metric, args.although or [], args.effect or 0.0, args.target)
    if not args.json:
        print_tables(groups, args.format, is_comparable=not found.problem)
    if found.said and not args.json:
        out = sys.stdout if args.format == "text" else sys.stderr   # stdout is the table alone
        print("\n" + "\n".join(found.said).strip("\n"), file=out)
    for path in write_files(groups, metric, args.plot, args.html, found):
        print(f"wrote {os.path.relpath(path)}", file=sys.stderr)
    if found.problem:
        raise UserError(found.problem)
    if args.json:       # last, since an error before this line is printed as an object of its own
        print_object({"metric": metric, "runs": run_facts(groups), "groups": group_facts(groups),
                      "comparisons": facts_of(found.compared), "said": [line for line in found.said if line]})


@command
def main() -> None:
    parser = make_parser()
    as_json = "--json" in sys.argv[1:]
    if as_json:
        parser.exit = refuse
    try:
        run(parser, parser.parse_args())
    except (UserError, OSError) as error:
        if as_json and not isinstance(error, BrokenPipeError):
            print_object({"error": in_one_line(error)})
        raise


if __name__ == "__main__":
    main()
