"""From an idea to a verdict: is a changed train_gpt.py better, and how certain is that?

    python trial.py gelu.py -- --preset demo                             a changed copy
    python trial.py my.diff 'lr2: --muon_lr 0.1' -- --preset demo        a patch, and a flag
    python trial.py --seeds 8 --name demo -- --preset demo               no idea: the baseline's own spread
    python trial.py --confirm gelu                                       test a kept idea on unseen text
    python trial.py --ledger                                             list everything that was ever tried

Each idea is first checked with --smoke, in about 20 seconds. Then baseline and ideas are trained alternately,
one pair of runs per seed. After each pair from the third on, an idea is discarded if the interval of its gain
lies below --margin, otherwise kept if it lies above 0; the error rates account for repeated testing
(benchtop/sequential.py). If a trial is interrupted, run the same command again: its runs resume.

The seed sets the initial weights and the order of the data. Repeats of one seed are not independent: on a GPU
they differ only by rounding. The outcome of each idea is a line in experiments/ledger.tsv.

Exit status: 0 if an idea was kept or confirmed, or only the baseline was trained; 1 if all ideas were
discarded or failed; 2 if none was kept and some are undecided; 3 if the trial could not be made.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
import traceback

from benchtop import ledger, places
from benchtop.command_line import Parser, command, in_one_line, positive
from benchtop.conclusions import noise_line
from benchtop.confirm import selection, trial_to_confirm
from benchtop.errors import UserError
from benchtop.files import write_text
from benchtop.held_out import VAL
from benchtop.ideas import (
    BASELINE,
    BUDGET,
    NAME,
    TAKEN,
    Side,
    baseline_side,
    check_flags,
    import_script,
    key_of,
    machine_facts,
    open_idea,
)
from benchtop.knobs import parse_config
from benchtop.ledger_page import as_text, page
from benchtop.redaction import without_secrets
from benchtop.sequential import Sequential
from benchtop.shards import open_dataset
from benchtop.trials import Plan, Trial, read
from benchtop.turns import Turns

KEPT, NONE_KEPT, SOME_UNDECIDED, NO_TRIAL = range(4)


def seeds_of(text: str) -> tuple[int, int]:
    """argparse type of --seeds: 3..8, or 5 for 5..5."""
    match = re.fullmatch(r"(\d{1,4})(?:\.\.(\d{1,4}))?", text)
    first, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 2 <= first <= most <= 50:
        raise argparse.ArgumentTypeError(f"must be like 3..8 or 5, between 2 and 50, not {text!r}")
    return first, most


def make_parser() -> Parser:
    parser = Parser("From an idea to a verdict.",
                    usage="%(prog)s IDEA [IDEA ...] [flags] -- FLAGS OF EVERY RUN")
    parser.add_argument("ideas", nargs="*", metavar="IDEA",
                        help="a changed script, a patch (.diff), or 'NAME: flags'; none: only the baseline")
    parser.add_argument("--confirm", default="", metavar="NAME",
                        help="evaluate what trial NAME kept, one time, with fresh seeds on the test split")
    parser.add_argument("--ledger", action="store_true",
                        help="list everything that was ever tried, and write experiments/ledger.html")
    parser.add_argument("--against", default="train_gpt.py", help="script of the baseline")
    parser.add_argument("--name", default="", help="name of the trial; empty: the ideas' names")
    parser.add_argument("--seeds", type=seeds_of, default="3..8", metavar="FIRST..MOST",
                        help="pairs of runs before the first verdict, and their maximum")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="training time of each run, so that speed counts")
    budget.add_argument("--steps", type=positive, help="budget of each run in steps")
    budget.add_argument("--tokens", type=positive, help="budget of each run in tokens")
    parser.add_argument("--margin", type=float, default=0.0,
                        help="smallest gain in val_bpb that matters; 0: the standard deviation of the "
                             "baseline over its first seeds")
    parser.add_argument("--alpha", type=float, default=0.05,
                        help="largest chance of keeping an idea without gain, over all ideas together")
    parser.add_argument("--processes", type=positive, default=1,
                        help="GPUs for each run; with 1, runs train in parallel, one on each GPU")
    parser.add_argument("--description", default="", help="what the idea is, for the ledger")
    parser.add_argument("--no_check", action="store_true",
                        help="skip the check of each script (--smoke)")
    parser.add_argument("--json", action="store_true",
                        help="print the results as JSON, and progress on stderr")
    return parser


def budget_flags(args: argparse.Namespace) -> list[str]:
    """Flags that give every run the same budget and lift a preset's other limits."""
    if args.minutes is not None:
        if not 0 < args.minutes < math.inf:
            raise UserError(f"--minutes must be above 0; it is {args.minutes:g}")
        return ["--train_minutes", f"{args.minutes:g}", "--num_steps", "1000000", "--target_loss", "0"]
    if args.steps:
        return ["--num_steps", str(args.steps), "--train_minutes", "0", "--target_loss", "0"]
    return (["--train_tokens", str(args.tokens), "--train_minutes", "0", "--target_loss", "0"]
            if args.tokens else [])


def make_trial(args: argparse.Namespace, flags: list[str], say) -> Trial:
    """raises  UserError if a flag or an idea is invalid, before anything is trained"""
    if not 0 < args.alpha < 0.5:
        raise UserError(f"--alpha must be between 0 and 0.5; it is {args.alpha:g}")
    if not 0 <= args.margin < math.inf:
        raise UserError(f"--margin must be 0 or more; it is {args.margin:g}")
    budget = budget_flags(args)
    check_flags(flags, "the command", TAKEN + ((*BUDGET, "target_loss") if budget else ()))
    baseline = baseline_side(args.against)
    ideas = [open_idea(typed, baseline) for typed in args.ideas]
    names = [idea.name for idea in ideas]
    double = next((name for name in names if names.count(name) > 1), None)
    if double:
        raise UserError(f"two ideas are called {double}; name one of them, as in 'other: {double}.diff'")
    name = args.name or "-".join(names)[:40]
    if not name:
        raise UserError("give an IDEA, as in: trial.py gelu.py -- FLAGS; or, to train the baseline alone, "
                        "--name NAME")
    if not re.fullmatch(NAME, name):
        raise UserError("--name must be 1 to 40 letters, digits, '.', '_' and '-'; it is " + repr(name))
    flags = [*budget, *flags]
    cfg = parse_config(flags, import_script(baseline.script).EXPERIMENT.Config)
    if cfg.target_loss and ideas:
        raise UserError("runs that stop at --target_loss end alike; add --target_loss 0, or give a budget")
    for idea in ideas:      # reject wrong flags before training; changed scripts are checked later
        if idea.script == baseline.script:
            parse_config([*flags, *idea.flags], import_script(baseline.script).EXPERIMENT.Config)
    dataset, _ = open_dataset(cfg.data, cfg.tokenizer)
    machine = machine_facts(args.processes)
    hashes = [dataset.sha256, dataset.manifest["tokenizer_sha256"]]
    keys = {side.name: key_of(side, flags, hashes, machine) for side in (baseline, *ideas)}
    first, most = args.seeds
    tell_of_earlier_trials(ideas, name, dataset.sha256[:12], say)
    plan = Plan(args.against, args.margin, args.alpha, first, most, flags, cfg.train_minutes > 0,
                {idea.name: {"typed": idea.typed, "flags": list(idea.flags), "change": idea.change_sha256}
                 for idea in ideas}, keys, dataset.sha256[:12], VAL, machine, args.description)
    return Trial(name, plan, baseline, ideas, Turns.on_this_machine(args.processes, cfg.device), say)


def tell_of_earlier_trials(ideas: list[Side], name: str, data: str, say) -> None:
    """Print a note for each idea tried before: an idea tried until it is kept is kept by chance."""
    others = [entry for entry in ledger.read()
              if entry.data == data and entry.split == VAL and entry.trial != name]
    for idea in ideas:
        before = [entry for entry in others if entry.change == idea.change_sha256[:12]]
        if before:
            say(f"note: {idea.name} was tried before, in {', '.join(entry.trial for entry in before)} "
                f"({', '.join(entry.verdict for entry in before)}), with the same seeds; each further trial "
                "is one more chance to keep it by luck")


def status_of(verdicts: list[str]) -> int:
    if {ledger.KEEP, ledger.CONFIRMED} & {*verdicts}:
        return KEPT
    return SOME_UNDECIDED if ledger.UNDECIDED in verdicts else NONE_KEPT


def run_trial(args: argparse.Namespace, flags: list[str]) -> int:
    """Run or confirm a trial, resuming an interrupted one; returns the exit status."""
    say = functools.partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.confirm:
        if args.ideas or flags:
            raise UserError("--confirm takes ideas and flags from the trial; leave them out")
        trial, before = trial_to_confirm(args.confirm, say)
    else:
        trial, before = make_trial(args, flags, say), None
    if trial.begin():
        say(f"the trial {trial.name} has ended; this is what it found")
        results = read(trial.folder / "results.json")
    else:
        if not args.no_check and not before:
            trial.check()
        trial.write_plan()
        if trial.ideas:
            plan = trial.plan
            found = Sequential(1.0, plan.alpha, plan.first, plan.most, len(trial.ideas)).power(1.0)
            say(f"{plan.first} to {plan.most} pairs; power {found:.0%} for a gain of one standard deviation "
                "of the pairs' differences")
        trial.run()
        results = trial.finish()
    report(results, trial.plan, say)
    for line in selection(before, results) if before else ():
        say(line)
    if args.json:
        print(json.dumps(results, indent=2))
    verdicts = [result["verdict"] for result in results["ideas"].values()]
    return status_of(verdicts) if verdicts else KEPT


def report(results: dict, plan: Plan, say) -> None:
    values, metric = list(results["baseline"].values()), results["metric"]
    say(f"\n{BASELINE}: {metric} " + " ".join(f"{value:.4f}" for value in values))
    for name, result in results["ideas"].items():
        gain = (f"gain {result['gain']:+.4f} ({result['low']:+.4f} to {result['high']:+.4f}) over "
                f"{result['pairs']} pairs; " if "gain" in result else "")
        say(f"{name}: {result['verdict'].upper()}; {gain}{result['reason']}")
    home = places.EXPERIMENTS.name
    if not results["ideas"]:
        say(noise_line(results["trial"], values, metric))
    also = f"; a line for each idea in {home}/{ledger.path().name}" if results["ideas"] else ""
    say(f"saved in {home}/trials/{results['trial']}{also}")
    if results["ideas"]:
        say(f"each end of an interval is wrong in at most {100 * plan.alpha:.3g}% of trials")
    say(f"tables, curves and samples: python compare.py trials/{results['trial']} "
        + "--although tokens " * (plan.by_clock and bool(results["ideas"]))
        + f"--html {results['trial']}.html")


def show_ledger(as_json: bool) -> None:
    entries = ledger.read()
    if as_json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
        return
    if not entries:
        raise UserError("nothing has been tried yet; start with: python trial.py IDEA -- FLAGS")
    print(as_text(entries))
    file = ledger.path().with_suffix(".html")
    write_text(file, without_secrets(page(entries)))
    print(f"wrote {file.relative_to(places.ROOT)}", file=sys.stderr)


@command
def main() -> None:
    parser = make_parser()
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    try:
        args = parser.parse_args(sys.argv[1:place])
    except SystemExit as end:
        sys.exit(NO_TRIAL if end.code else 0)       # argparse's 2 would mean undecided
    flags = sys.argv[place + 1:]
    try:
        if args.ledger:
            show_ledger(args.json)
            return
        status = run_trial(args, flags)
    except (UserError, OSError) as error:
        words = in_one_line(error)
        print(f"trial.py: error: {words}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": without_secrets(words)}))
        status = NO_TRIAL
    except SystemExit as end:       # from a wrong flag after --, or from a signal
        sys.exit(end.code if isinstance(end.code, int) and end.code > 128 else NO_TRIAL)
    except Exception:       # Python would exit with 1, which means that all ideas were discarded
        traceback.print_exc()
        status = NO_TRIAL
    sys.exit(status)


if __name__ == "__main__":
    main()
