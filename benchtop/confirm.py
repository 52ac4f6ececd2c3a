"""Confirmation: a kept idea against its baseline again, with fresh seeds, on the unseen test split.

Trying many ideas on one held-out text selects those that happen to suit its documents and seeds. The gain
that remains here is what the idea is worth.
"""

from dataclasses import replace
from pathlib import Path

from benchtop import ledger, places
from benchtop.errors import UserError
from benchtop.held_out import TEST
from benchtop.ideas import BASELINE, Side, baseline_side, import_script, key_of, machine_facts, with_script
from benchtop.knobs import parse_config
from benchtop.shards import open_dataset
from benchtop.trials import Plan, Trial, read
from benchtop.turns import Turns

# each run is evaluated on the test split only at its end
LOOK_ONCE = ["--held_out", TEST, "--val_every", "1000000000"]


def trial_to_confirm(name: str, say) -> tuple[Trial, dict]:
    """The trial that confirms what the trial `name` kept, and the results of the trial `name`.

    raises  UserError if `name` kept nothing, if its code or data have changed, or if one of its ideas was
            evaluated on the test split before
    """
    folder = places.EXPERIMENTS / "trials" / name
    if not (folder / "results.json").is_file():
        known = sorted(path.parent.name for path in folder.parent.glob("*/results.json"))
        raise UserError(f"there is no finished trial {name}" + (f", only {', '.join(known)}" if known else
                        "; make one with: python trial.py IDEA -- FLAGS"))
    results, facts = read(folder / "results.json"), read(folder / "plan.json")
    plan = Plan(**{field: facts[field] for field in facts if field in Plan.__dataclass_fields__})
    kept = [idea for idea, result in results["ideas"].items() if result["verdict"] == ledger.KEEP]
    if plan.split == TEST or not kept:
        raise UserError(f"the trial {name} kept no idea, so there is nothing to confirm")
    baseline = baseline_side(plan.against)
    ideas = [again(idea, plan.ideas[idea], folder, baseline) for idea in kept]
    for idea in ideas:
        if idea.change_sha256 != plan.ideas[idea.name]["change"]:
            raise UserError(f"{baseline.script.name} has changed since the trial {name}; run a new trial of "
                            f"{idea.name}")
    flags = [*plan.flags, *LOOK_ONCE]
    cfg = parse_config(flags, import_script(baseline.script).EXPERIMENT.Config)
    dataset, _ = open_dataset(cfg.data, cfg.tokenizer)
    if dataset.sha256[:12] != plan.data:
        raise UserError(f"the data have changed since the trial {name}; run a new trial of its ideas")
    hashes = [dataset.sha256, dataset.manifest["tokenizer_sha256"]]
    if key_of(baseline, plan.flags, hashes, plan.machine) != plan.keys[BASELINE]:
        raise UserError(f"{baseline.script.name} or the bench has changed since the trial {name}; run a "
                        "new trial of its ideas")
    if not any(shard["split"] == TEST for shard in dataset.manifest["shards"]):
        raise UserError(f"{dataset.folder.name} has no test split (ready-made shards and data of earlier "
                        "versions have none); make it again with download_fineweb.py, and run a new trial")
    target = places.EXPERIMENTS / "trials" / f"{name}-confirm"
    before = looks(plan.data)
    for idea in ideas:
        if before.get(idea.change_sha256[:12], target.name) != target.name:
            raise UserError(f"{idea.name} was already evaluated on the test split, in the trial "
                            f"{before[idea.change_sha256[:12]]}; a second evaluation would turn that "
                            "split into another validation set")
    say(f"this is confirmation number {len({*before.values(), target.name})} on the test split of "
        f"{dataset.folder.name}")
    machine = machine_facts(plan.machine["processes"])
    plan = replace(plan, margin=results["margin"], flags=flags, split=TEST, machine=machine,
                   ideas={idea.name: plan.ideas[idea.name] for idea in ideas},
                   keys={side.name: key_of(side, flags, hashes, machine) for side in (baseline, *ideas)})
    turns = Turns.on_this_machine(machine["processes"], cfg.device)
    return Trial(target.name, plan, baseline, ideas, turns, say), results


def looks(data: str) -> dict[str, str]:
    """Hashes of changes that were evaluated on the test split of these data -> the trial, finished or not."""
    found = {entry.change: entry.trial for entry in ledger.read()
             if entry.split == TEST and entry.data == data}
    for file in (places.EXPERIMENTS / "trials").glob("*/plan.json"):
        plan = read(file)
        if plan.get("split") == TEST and plan.get("data") == data:
            found |= {idea["change"][:12]: file.parent.name for idea in plan["ideas"].values()}
    return found


def again(name: str, facts: dict, folder: Path, baseline: Side) -> Side:
    """An idea as it was tried, restored from the trial's folder and plan."""
    patch, flags = folder / f"{name}.diff", tuple(facts["flags"])
    if patch.is_file():
        return with_script(name, patch, baseline, facts["typed"], flags)
    return Side(name, baseline.script, facts["typed"], flags)


def selection(before: dict, results: dict) -> list[str]:
    """How much of each gain is left, in words; also adds these figures to `results`."""
    lines = []
    for name, result in results["ideas"].items():
        if "gain" in result:
            then, now = before["ideas"][name]["gain"], result["gain"]
            result |= {"gain_when_picked": then, "selection": then - now}
            lines.append(f"{name}: the gain was {then:+.4f} when it was selected and is {now:+.4f} on unseen "
                         f"text and seeds; the difference, {then - now:+.4f}, is selection and chance")
    return lines
