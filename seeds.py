"""Repeat a run with several seeds; finished ones are skipped, and one that was interrupted resumes.

    python seeds.py 8 --name demo -- python train_gpt.py --preset demo
    python seeds.py 5 --name gelu --keep gelu -- python my_experiment.py --preset demo
    python compare.py demo 'gelu=experiments/*_gelu_seed*'

The command after -- is run once for each seed from 0 on, with --seed, --model_name and --resume auto added.
If this is interrupted, run the same command again: it resumes where it was. Ask for more seeds later, and
only the new ones are run. A run that diverged is kept and counted as a failure. At the end it prints the
runs, their mean and their standard deviation. --keep copies the small files of each run to
experiments/NAME/seedN, to be committed, with a diff of the script against train_gpt.py.
"""

import re
import shlex
import sys

from benchtop import places
from benchtop.command_line import Parser, command, counted, positive
from benchtop.errors import UserError
from benchtop.groups import Group, check_comparable
from benchtop.repeats import check_room, ended_run, keep, run_seed, script_place, verdict
from benchtop.tables import as_text, groups_table, runs_table


@command
def main() -> None:
    parser = Parser("Repeat a run with several seeds.",
                    usage="%(prog)s N --name NAME [--keep NAME] -- COMMAND")
    parser.add_argument("seeds", type=positive, metavar="N", help="number of seeds: 0 to N - 1")
    parser.add_argument("--name", required=True, help="name of the runs: NAME_seed0, NAME_seed1, ...")
    parser.add_argument("--keep", default="", metavar="NAME", help="copy small files to experiments/NAME")
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:place])
    words = sys.argv[place + 1:]
    script_place(words)
    own = ("--seed", "--model_name", "--resume")
    taken = next((word for word in words if word.split("=")[0] in own), None)
    if args.keep and not re.fullmatch(r"[A-Za-z][\w.-]*", args.keep):
        raise UserError(f"--keep must be a name that begins with a letter; it is {args.keep!r}")
    if taken:
        raise UserError(f"leave {taken} out of the command; seeds.py sets it for each run")
    names = [f"{args.name}_seed{seed}" for seed in range(args.seeds)]
    lines = {name: [*words, "--seed", str(seed), "--model_name", name, "--resume", "auto"]
             for seed, name in enumerate(names)}
    kept_in = places.EXPERIMENTS / args.keep
    if args.keep:
        check_room([run for run in map(ended_run, lines, lines.values()) if run], kept_in)
    runs = []
    for seed, (name, line) in enumerate(lines.items()):
        run = ended_run(name, line)
        if not run:
            print(f"seed {seed}: {shlex.join(line)}", flush=True)
            code = run_seed(line)
            run = ended_run(name, line)
            if not run:
                raise UserError(f"seed {seed} ended with exit code {code} before it was done; its last lines "
                                "say why; run the same command again to resume")
        print(f"seed {seed}: {run.status}, {run.name}"
              + (f", val_bpb {run.summary['val_bpb']:.4f}" if run.is_finished else ""), flush=True)
        runs.append(run)
    group = Group(args.name, runs)
    print(f"\n{as_text(runs_table([group]))}\n")
    if args.keep:
        keep(runs, kept_in)
    if not group.finished:
        raise UserError(f"none of {counted(len(runs), 'run')} finished")
    check_comparable([group], "val_bpb")        # data may have been made anew meanwhile
    print(f"{as_text(groups_table([group]))}\n\n{verdict(group)}")


if __name__ == "__main__":
    main()
