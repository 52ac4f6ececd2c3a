"""compare.py on run folders that the tests write: tables, refusals, conclusions, curves, page, index."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

import compare
from benchtop import ORDER, curves, places, significance
from benchtop.conclusions import benchmark_lines, standing
from benchtop.conclusions import compare as compare_groups
from benchtop.errors import UserError
from benchtop.groups import DECISIVE, Group, check_comparable, differences_of, open_groups, read_run
from benchtop.page import page
from benchtop.places import ROOT
from benchtop.tables import groups_table, index, runs_table, short


def write_run(folder: Path, seed: int = 0, bpb: float = 1.0, **changes) -> Path:
    """A run folder as RunLog leaves it, with what compare.py reads."""
    folder.mkdir(parents=True)
    knobs = {"model_name": folder.name, "seed": seed, "muon_lr": 0.05, "gpu_cost_per_hour": 2.0}
    knobs |= changes.pop("knobs", {})
    summary = {"status": "finished", "seed": seed, "parameters": 9_000_000, "tokens": 4_915_200,
               "train_seconds": 150.0, "val_loss": 2.4 * bpb, "val_bpb": bpb, "tokens_per_second": 31_000.0,
               "peak_memory_mib": 1485.4, "cost": 0.125, "data_sha256": "d1", "data": "books",
               "tokenizer_sha256": "t1", "tokenizer": "books_v8192", "held_out_sha256": "h1",
               "held_out_tokens": 37268, "script": "train_gpt.py", "code_sha256": "c1",
               "sources": {"train_gpt.py": "c1", "shards.py": "s1"}, "preset": "demo", "device": "a CPU",
               "processes": 1, "dtype": "bfloat16", "torch": "2.13.0"} | changes.pop("summary", {})
    benchmarks = changes.pop("benchmarks", {})
    assert not changes
    if benchmarks:
        summary["benchmarks"] = {
            name: {"acc": {"value": fmean(right for _, right in items), "low": 0.25, "high": 0.75},
                   **({"perplexity": 35.126} if name == "lambada" else {})}
            for name, items in benchmarks.items()}
    (folder / "config.json").write_text(json.dumps(knobs))
    if summary["status"]:
        (folder / "summary.json").write_text(json.dumps(summary))
    rows = [{"step": step, "tokens": step * 8192, "train_seconds": step / 4, "train_loss": 5 - step / 300,
             "val_loss": "" if step % 100 else 2.4 * (bpb + 6 - step / 100), "flops": step * 1e10,
             "val_bpb": "" if step % 100 else bpb + 6 - step / 100} for step in range(50, 601, 50)]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    sample = {"prompt": "Once <b>upon</b>", "text": f" a time & {seed}", "seed": seed}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    for benchmark, items in benchmarks.items():
        (folder / f"{benchmark}.jsonl").write_text("".join(
            json.dumps({"name": name, "label": 0, "acc": {"choice": 0 if right else 1}}) + "\n"
            for name, right in items))
    return folder


SIZES = [1000 + 100 * number for number in range(20)]       # bytes of held-out documents


def write_documents(run: Path, waves: float = 0.0, sizes: list[int] = SIZES) -> Path:
    """held_out.csv of a run: all documents at its val_bpb, but by turns so many bits above and below it."""
    summary = json.loads((run / "summary.json").read_text())
    tokens = [size // 4 for size in sizes]
    above = [waves * (-1) ** number / size for number, size in enumerate(sizes)]        # they cancel
    text = [math.log(2) * size * (summary["val_bpb"] + more) for size, more in zip(sizes, above, strict=True)]
    rest = (summary["val_loss"] * sum(tokens) - sum(text)) / len(sizes)
    rows = [f"{number},{count},{size},{nats + rest:.6f},{nats:.6f}"
            for number, (count, size, nats) in enumerate(zip(tokens, sizes, text, strict=True))]
    (run / "held_out.csv").write_text("\n".join(["document,tokens,bytes,nats,text_nats", *rows, ""]))
    return run


@pytest.fixture
def with_documents(two_groups):
    """The same, with held_out.csv: documents differ by 40 bits or less in what gelu costs."""
    for seed in range(3):
        write_documents(two_groups / f"demo/seed{seed}")
        write_documents(two_groups / f"gelu/seed{seed}", 40.0)
    return two_groups


@pytest.fixture
def two_groups(tmp_path, monkeypatch):
    """experiments/demo and experiments/gelu with three seeds each; gelu is worse by 0.02 and a little."""
    monkeypatch.setattr(places, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    for seed, (bpb, more) in enumerate(((0.910, 0.021), (0.914, 0.019), (0.918, 0.020))):
        write_run(tmp_path / f"experiments/demo/seed{seed}", seed, bpb)
        mine = {"code_sha256": "c2", "sources": {"my.py": "c2", "shards.py": "s1"}, "script": "my.py"}
        write_run(tmp_path / f"experiments/gelu/seed{seed}", seed, bpb + more, knobs={"muon_lr": 0.1},
                  summary=mine)
    return tmp_path / "experiments"


def say(monkeypatch, capsys, *words: str) -> tuple[str, str, int]:
    """Run the command: what it prints, what it complains of, and its exit code."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    code, complaint = 0, ""
    try:
        compare.main()
    except SystemExit as end:       # Python prints a text and exits with 1
        code, complaint = (1, end.code + "\n") if isinstance(end.code, str) else (end.code, "")
    out, err = capsys.readouterr()
    return out, err + complaint, code


def test_groups_are_folders_of_runs_globs_and_single_runs(two_groups):
    demo, named, alone = open_groups(["demo", "mine=experiments/ge*/seed[01]", "gelu/seed2"])
    assert (demo.name, len(demo.runs), demo.is_alone) == ("demo", 3, False)
    assert (named.name, len(named.runs)) == ("mine", 2)
    assert (alone.name, len(alone.runs), alone.is_alone) == ("gelu/seed2", 1, True)
    assert [group.name for group in open_groups(["*/seed1"])] == ["demo/seed1", "gelu/seed1"]
    assert [(group.name, len(group.runs)) for group in open_groups(["*"])] == [("demo", 3), ("gelu", 3)]


@pytest.mark.parametrize(("specs", "message"), [
    (["dmo"], r"dmo is not a run folder.*did you mean demo\?"), (["x=nothing/*"], "matches no run folder"),
    (["demo", "a/../demo"], "matches no run folder"), (["a=demo", "a=gelu"], "two groups are called a"),
    (["x="], "nothing is not a run folder"), (["x=~nobody/y"], "~nobody/y is not a run folder"),
    (["demo", "b=*/seed1"], "demo/seed1 is in two groups, demo and b")])
def test_words_that_mean_no_run(two_groups, specs, message):
    with pytest.raises(UserError, match=message):
        open_groups(specs)


@pytest.mark.parametrize(("changes", "metric", "although", "message"), [
    ({"data_sha256": "d2", "data": "web"}, "val_bpb", [], "differ in data: books d1 against web d2"),
    ({"tokenizer_sha256": "t2"}, "val_bpb", [], "tokenizer.*bits per byte.*--although tokenizer"),
    ({"tokenizer_sha256": "t2", "data_sha256": "d2"}, "val_bpb", [], "--although data --although tokenizer"),
    ({"tokens": 4_000_000}, "val_bpb", [], "tokens: 4,915,200 against 4,000,000.*--although tokens"),
    ({"tokenizer_sha256": "t2"}, "val_loss", ["tokenizer"], "counts different tokens; use --metric val_bpb"),
    ({"held_out_sha256": "h2"}, "val_bpb", [], "validated on different text"),
    ({"held_out_sha256": "h2"}, "val_bpb", ["data", "tokenizer", "tokens"], "validated on different text"),
    ({"held_out_sha256": "h2", "data_sha256": "d2"}, "val_bpb", [], "not validated on the same text either"),
    # runs of before held-out text was hashed
    ({"held_out_sha256": None, "held_out_tokens": 1}, "val_bpb", [], "validated on different text")])
def test_runs_that_differ_are_refused_by_name(two_groups, changes, metric, although, message):
    write_run(two_groups / "other", summary=changes)
    with pytest.raises(UserError, match=message):
        check_comparable(open_groups(["demo", "other"]), metric, although)


@pytest.mark.parametrize(("changes", "although"), [
    ({"tokens": 1}, ["tokens"]), ({}, []), ({"held_out_sha256": None}, []),
    ({"tokenizer_sha256": "t2", "data_sha256": "d2"}, ["tokenizer", "data"])])
def test_runs_that_may_differ_are_compared(two_groups, changes, although):
    write_run(two_groups / "other", summary=changes)
    check_comparable(open_groups(["demo", "other"]), "val_bpb", although)


BENCH = {name: "1" for name in (*DECISIVE, "identity.py", "page.py")}


def bench(**changes: str | None) -> dict:
    """What a summary says of a bench in which some files have changed."""
    files = BENCH | {f"{name}.py": sha256 for name, sha256 in changes.items()}
    files = {name: sha256 for name, sha256 in files.items() if sha256}
    return {"bench": files, "bench_sha256": "cafe1234" + "".join(files.values()),
            "sources": {"train_gpt.py": "c1"}}


def on_benches(folder: Path, **groups: dict) -> None:
    """Three runs for each group, on its bench."""
    for name, facts in groups.items():
        for seed in range(3):
            write_run(folder / name / f"seed{seed}", seed, 0.9 + seed / 100, summary=dict(facts))


@pytest.mark.parametrize(("other", "line"), [
    (bench(), "all runs used the same bench (cafe1234)"),
    (bench(identity="2", page="2"), "the runs used different benches: identity.py, page.py differ; "
                                    "none of these can change the numbers"),
    (bench(page="2"), "the runs used different benches: page.py differs; it cannot change the numbers"),
    (bench(tables="1"),
     "the runs used different benches: tables.py differs; it cannot change the numbers")])
def test_runs_on_benches_of_equal_numbers_are_compared(two_groups, monkeypatch, capsys, other, line):
    on_benches(two_groups, mine=bench(), other=other)
    out, _, code = say(monkeypatch, capsys, "mine", "other")
    assert code == 0 and out.splitlines().count(line) == 1 and "other against mine" in out
    assert "is mixed" not in out and "the code of" not in out


def test_files_that_decide_numbers_are_files_of_the_bench():
    assert {Path(name).stem for name in DECISIVE} < {*ORDER}


@pytest.mark.parametrize("name", ["batches", "budget", "evaluation", "run", "saved", "scoring"])
@pytest.mark.parametrize("change", ["2", None])
def test_runs_of_other_code_that_decides_numbers_are_refused(two_groups, monkeypatch, capsys, name, change):
    on_benches(two_groups, mine=bench(), other=bench(page="2", **{name: change}))
    out, err, code = say(monkeypatch, capsys, "mine", "other")
    assert code == 1 and "against" not in out
    assert err.splitlines()[-1].endswith(f"differ in bench: {name}.py; if you know that this does not change "
                                         "the numbers, use --although bench")
    out, _, code = say(monkeypatch, capsys, "mine", "other", "--although", "bench")
    files = ", ".join(sorted([f"{name}.py", "page.py"]))
    assert code == 0 and "other against mine" in out
    assert f"the runs used different benches: {files} differ; {name}.py can change the numbers\n" in out


def test_runs_of_before_the_bench_was_hashed_are_of_another_bench(two_groups, monkeypatch, capsys):
    on_benches(two_groups, mine=bench())
    out, err, code = say(monkeypatch, capsys, "demo", "mine")
    assert code == 1 and "against" not in out
    assert "differ in bench: demo/seed0 was made before bench hashes were kept; if you know" in err
    out, _, code = say(monkeypatch, capsys, "mine", "demo", "--although", "bench")
    assert code == 0 and "demo against mine" in out and "the code of shards.py" not in out
    assert ("the runs used different benches: demo/seed0 and 2 more were made before bench hashes were kept"
            in out)
    assert "demo (demo/seed0) and this run (mine/seed0) differ in bench" in standing(
        read_run(two_groups / "mine/seed0"), "demo")
    # among themselves their sources tell
    write_run(two_groups / "old", 3, summary={"sources": {"train_gpt.py": "c1", "shards.py": "s2"}})
    out, _, code = say(monkeypatch, capsys, "demo/seed0", "old")
    assert code == 0 and "they differ in the code of shards.py" in out
    assert "runs were made before bench hashes were kept; only the sources they name are compared" in out


def test_a_bench_that_differs_is_named_with_all_else_that_does(two_groups):
    write_run(two_groups / "a", summary=bench())
    write_run(two_groups / "b", summary=bench(batches="2") | {"tokens": 5})
    with pytest.raises(UserError, match=r"in tokens: 4,915,200 against 5 and in bench: batches\.py; .*use "
                                        "--although tokens --although bench"):
        check_comparable(open_groups(["a", "b"]), "val_bpb")


def test_the_bench_of_single_runs_in_a_table_is_told_too(two_groups, monkeypatch, capsys):
    for number, facts in enumerate((bench(), bench(batches="2"), bench())):
        write_run(two_groups / f"try{number}", number, summary=facts)
    out, _, code = say(monkeypatch, capsys, "try*")
    assert code == 0 and "different benches: batches.py differs; batches.py can change the numbers" in out


@pytest.mark.parametrize(("counts", "warning"), [
    ([16, 16], ""), ([15, 15], "has only 15 documents;"), ([64, 1], "has only 1 document;"),
    ([None, None], "")])
def test_few_held_out_documents_are_shown_and_warned_of(two_groups, monkeypatch, capsys, counts, warning):
    for number, count in enumerate(counts):
        write_run(two_groups / f"try{number}", number, summary={"held_out_documents": count} if count else {})
    out, _, _ = say(monkeypatch, capsys, "try*")
    assert (f"warning: the held-out text {warning}" in out) == bool(warning) == ("warning" in out)
    titles, *lines = runs_table(open_groups(["try*"]))
    assert ("held-out documents" in titles) == any(counts)
    if any(counts):
        assert [line[titles.index("held-out documents")] for line in lines] == list(map(str, counts))


@pytest.mark.parametrize(("number", "text"), [
    (0, "0"), (512, "512"), (999, "999"), (1000, "1.0k"), (8192, "8.2k"), (9949, "9.9k"), (9950, "10k"),
    (84_199, "84k"), (819_200, "819k"), (999_499, "999k"), (999_500, "1.0M"), (4_915_200, "4.9M"),
    (1_234_567_890, "1,234.6M")])
def test_numbers_of_tokens_are_short_and_never_nothing(number, text):
    assert short(number) == text


def test_differences_within_a_group_count_too(two_groups):
    write_run(two_groups / "demo/seed3", 3, summary={"tokens": 5})
    with pytest.raises(UserError, match="tokens"):
        check_comparable(open_groups(["demo"]), "val_bpb")


def test_conclusions_name_difference_interval_power_and_cause(two_groups, monkeypatch, capsys):
    out, _, code = say(monkeypatch, capsys, "demo", "gelu")
    assert code == 0
    assert "gelu against demo, val_bpb: 0.9340 (3 runs) against 0.9140 (3 runs)" in out
    # paired: mean 0.02, sd 0.001, t(0.975, 2) = 4.3027
    assert ("  paired by 3 seeds +0.0200, 95 % interval +0.0175 to +0.0225, t = 34.64 with 2.0 degrees of "
            "freedom, p below 0.001") in out
    assert "  Welch             +0.0200, 95 % interval +0.0113 to +0.0287" in out
    assert "gelu is higher, so worse" in out
    # 1 - scipy.stats.nct.cdf(4.3027, 2, 0.00326 / (0.001 / sqrt(3))) is 0.8
    assert "  With 3 pairs, the smallest difference detectable with 80 % power is 0.0033.\n" in out
    assert "they differ in --muon_lr 0.05 against 0.1; the script, train_gpt.py against my.py" in out


def test_an_interval_over_documents_stands_beside_those_over_seeds(with_documents, monkeypatch, capsys):
    out, _, code = say(monkeypatch, capsys, "demo", "gelu")
    line, = (line for line in out.splitlines() if line.startswith("  seeds and text"))
    said = re.search(r"\+0\.0200, 95 % interval (\S+) to (\S+), over seeds and held-out documents "
                     r"\(20, bootstrap\); intervals above cover seeds only$", line)
    low, high = map(float, said.groups())
    # the paired one is +0.0175 to +0.0225
    assert code == 0 and low < 0.0175 and high > 0.0225
    # independently: variances of seeds and of documents add up, with Student's 4.3 for the former
    waves = [40.0 * (-1) ** number for number in range(20)]
    of_text = math.sqrt(20 * fmean(wave**2 for wave in waves)) / sum(SIZES)
    half = math.hypot(4.303 * 0.001 / math.sqrt(3), 1.96 * of_text)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert "on other text" not in out
    # nats over tokens, of the same documents
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu", "--metric", "val_loss")
    assert "  seeds and text    +0.0480, 95 % interval" in out


def test_a_difference_that_other_text_could_undo_is_said(with_documents, monkeypatch, capsys):
    for seed in range(3):
        write_documents(with_documents / f"gelu/seed{seed}", 400.0)
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu")
    assert "gelu is higher, so worse, on this held-out text; on other text it may not be\n" in out


def test_two_single_runs_have_an_interval_over_documents_alone(with_documents, monkeypatch, capsys):
    out, _, _ = say(monkeypatch, capsys, "demo/seed0", "gelu/seed0")
    assert "one run per side cannot tell this from chance" in out and "text alone        +0.0210, 95 %" in out
    assert "over held-out documents (20, bootstrap); for these models only, not for other" in out


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda run: (run / "held_out.csv").unlink(), "gelu/seed1 has no held_out.csv"),
    (lambda run: write_documents(run, sizes=SIZES[:-1]), "demo/seed0 and gelu/seed1 differ in size"),
    (lambda run: (run / "held_out.csv").write_text((run / "held_out.csv").read_text()[:300]),
     "gelu/seed1/held_out.csv is not a valid run file"),
    (lambda run: (run / "held_out.csv").write_text("document,nats\n0,1\n"), "its columns are document")])
def test_why_there_is_no_interval_over_documents_is_said_in_one_line(with_documents, monkeypatch, capsys,
                                                                     damage, reason):
    damage(with_documents / "gelu/seed1")
    out, _, code = say(monkeypatch, capsys, "demo", "gelu")
    line, = (line for line in out.splitlines() if "documents" in line)
    assert code == 0 and line.startswith("  no interval over documents: ") and reason in line
    assert "paired by 3 seeds +0.0200" in out


def test_nothing_is_said_of_documents_that_no_run_has_kept(two_groups, monkeypatch, capsys):
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu")
    assert "documents" not in out and "held_out.csv" not in out


def test_a_held_out_csv_that_does_not_add_up_is_refused(with_documents):
    path = with_documents / "demo/seed0/held_out.csv"
    text = path.read_text()
    assert len(read_run(path.parent).documents["nats"]) == 20
    for old, new, problem in ((",1000,", ",1001,", "does not add up to the run's val_bpb"),
                              ("0,250,", "0,251,", "does not add up to the run's val_loss"),
                              ("0,250,", "1,250,", "not numbered"), ("0,250,", "0,-250,", "not a finite"),
                              ("0,250,", "0,x,", "could not convert"), ("0,250,", "0,", "is not a valid")):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=problem):
            _ = read_run(path.parent).documents


def test_what_the_baseline_needs_for_the_same_loss_is_said(two_groups, monkeypatch, capsys):
    """The runs fall by 1 every 100 steps, so demo is 2 steps early, of 600."""
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu")
    value = math.exp(math.log(500) + (1 - 0.02) * math.log(600 / 500)) / 600
    assert f"  for gelu's final val_bpb, demo needs {value:.2f} times the FLOPs of gelu (95 % int" in out
    out, _, _ = say(monkeypatch, capsys, "gelu", "demo")
    assert f"  demo reaches gelu's final val_bpb with {1 / value:.2f} times less FLOPs (95 %" in out


def test_a_single_run_a_side_proves_nothing(two_groups, monkeypatch, capsys):
    out, _, code = say(monkeypatch, capsys, "demo/seed0", "gelu/seed1")
    assert code == 0
    assert "one run per side cannot tell this from chance" in out


def test_seeds_that_do_not_match_are_not_paired(two_groups, monkeypatch, capsys):
    for seed in range(3):
        shutil.move(two_groups / f"gelu/seed{seed}", two_groups / "gone" / str(seed))
        write_run(two_groups / f"gelu/seed{seed + 7}", seed + 7, 0.93 + seed / 1000)
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu")
    assert "Welch" in out and "paired" not in out


def test_what_cannot_be_compared_is_still_shown_and_ends_with_an_error(two_groups, monkeypatch, capsys):
    write_run(two_groups / "other", summary={"tokens": 1})
    out, err, code = say(monkeypatch, capsys, "demo", "other", "--html", "page.html")
    assert code != 0 and "seed0" in out and "against" not in out
    assert err.count("\n") == 2 and "differ in tokens" in err.splitlines()[-1]
    assert "differ in tokens" in Path("page.html").read_text()


def test_no_mean_is_taken_of_runs_that_do_not_belong_together(two_groups, monkeypatch, capsys):
    write_run(two_groups / "demo/seed3", 3, 9.0, summary={"tokens": 5})
    out, err, code = say(monkeypatch, capsys, "demo")
    assert code != 0 and "two runs of demo" in err and "demo/seed3" in out and "95 %" not in out


def test_a_group_that_is_mixed_says_so(two_groups, monkeypatch, capsys):
    write_run(two_groups / "demo/seed3", 3, 0.9, knobs={"muon_lr": 0.2})
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu")
    assert "demo is mixed: demo/seed0 and demo/seed3 differ in --muon_lr 0.05 against 0.2" in out


def test_copies_of_a_run_count_once(two_groups, monkeypatch, capsys):
    shutil.copytree(two_groups / "demo/seed0", two_groups / "20260101_120000_demo_seed0")
    (two_groups / "latest").symlink_to(two_groups / "gelu/seed0")
    out, err, _ = say(monkeypatch, capsys, "d=*demo*", "g=gelu")
    assert "against 0.9140 (3 runs)" in out and "is a copy of" in err
    group, = open_groups(["g=experiments/*"])
    assert len(group.runs) == 6


def test_two_shared_seeds_do_not_outvote_many_runs(two_groups, monkeypatch, capsys):
    for seed in (1, 5, 6):
        write_run(two_groups / f"other/seed{seed}", seed, 0.93 + seed / 1000)
    out, _, _ = say(monkeypatch, capsys, "demo", "other")
    assert "Welch" in out and "paired" not in out


def test_one_run_is_placed_among_many(two_groups, monkeypatch, capsys):
    write_run(two_groups / "try", 9, 0.922)
    out, _, _ = say(monkeypatch, capsys, "demo", "try")
    assert "difference +0.0080, 2.0 standard deviations of demo; try is a single run" in out


def test_an_effect_asked_for_is_planned_for(two_groups, monkeypatch, capsys):
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu", "--effect", "0.001")
    assert "80 % power is 0.0033. Detecting 0.0010 would need 10 pairs (7 more).\n" in out
    for seed in range(3):
        shutil.move(two_groups / f"gelu/seed{seed}", two_groups / "gone" / str(seed))
        write_run(two_groups / f"gelu/seed{seed + 7}", seed + 7, 0.930 + seed / 1000)
    write_run(two_groups / "gelu/seed6", 6, 0.933)
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu", "--effect", "0.005")
    test = significance.welch([0.910, 0.914, 0.918], [0.930, 0.931, 0.932, 0.933])
    needed = significance.runs_needed(0.005, test.sd, df_per_run=test.df_per_run)
    assert ("With 3 and 4 runs, the smallest difference detectable with 80 % power is "
            f"{significance.smallest_effect(test.error, test.df):.4f}. Detecting 0.0050 would need {needed} "
            f"runs per group ({needed - 3} more of demo, {needed - 4} more of gelu).\n") in out and needed > 4
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu", "--effect", "1e-5")
    assert "Detecting 0.0000 would need more than 10,000 runs per group." in out


def test_power_is_not_computed_for_the_effect_that_was_seen(two_groups, monkeypatch, capsys):
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu")
    assert "80 % power" in out and "would need" not in out


def test_several_comparisons_are_adjusted_by_holms_method(two_groups, monkeypatch, capsys):
    for seed, more in enumerate((0.002, 0.004, 0.005)):
        write_run(two_groups / f"b/seed{seed}", seed, 0.910 + 0.004 * seed + more)
        write_run(two_groups / f"c/seed{seed}", seed, 0.920 + 0.003 * seed)
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu", "b", "c")
    tests = {name: compare_groups(*open_groups(["demo", name]), "val_bpb").test.p
             for name in ("gelu", "b", "c")}
    assert tests["gelu"] < tests["c"] < tests["b"] and tests["b"] < 0.06
    # by hand: the smallest p three times, the next one twice, the largest as it is
    adjusted = {"b": max(tests["b"], 2 * tests["c"]), "c": 2 * tests["c"]}
    assert (f"3 comparisons raise the chance of a false positive; adjusted for that (Holm): gelu p = "
            f"{3 * tests['gelu']:.2g}; b p = {adjusted['b']:.2g}; c p = {adjusted['c']:.2g}") in out.replace(
                ", no longer below 0.05", "")
    assert out.count("no longer below 0.05") == sum(tests[name] < 0.05 <= adjusted[name] for name in adjusted)
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu")
    assert "Holm" not in out


@pytest.mark.parametrize(("dates", "is_said"), [
    (["20260101_1200", "20260101_1300"], True), (["20260101_1300", "20260101_1200"], True),
    (["20260101_1200", "20260101_1200"], False), (["20260101_1200", ""], False)])
def test_speeds_of_groups_that_did_not_take_turns_are_a_matter_of_the_machine(
        two_groups, monkeypatch, capsys, dates, is_said):
    for place, (name, date) in enumerate(zip("ab", dates, strict=True)):
        for seed in range(3):
            folder = f"{date}{2 * seed + place:02d}_{name}_seed{seed}" if date else f"{name}_seed{seed}"
            write_run(two_groups / folder, seed, 0.9 + seed / 100)
    out, _, _ = say(monkeypatch, capsys, "a=*a_seed*", "b=*b_seed*")
    line = "b did not take turns with a, so a difference in tokens/s may come from the machine"
    assert (line in out) == is_said == ("take turns" in out)


def test_damaged_runs_and_files_beside_them_are_left_out_with_a_word(two_groups, monkeypatch, capsys):
    (two_groups / "README.md").write_text("hello")
    (two_groups / "demo/seed1/config.json").write_text("{")
    write_run(two_groups / "demo/seed3", 3, summary={"val_bpb": None})
    out, err, code = say(monkeypatch, capsys, "demo", "gelu", "README.md")
    assert code == 0 and "(2 runs)" in out
    assert "left out: README.md is not a run folder" in err and "it lacks val_bpb" in err
    assert "seed1/config.json is not a valid run file" in err


def test_samples_may_hold_any_character(two_groups, monkeypatch, capsys):
    sample = json.dumps({"prompt": "a", "text": "b\u2028c\u0085d"}, ensure_ascii=False)
    (two_groups / "demo/seed0/samples.jsonl").write_text(sample + "\n")
    assert open_groups(["demo/seed0"])[0].runs[0].samples == [{"prompt": "a", "text": "b\u2028c\u0085d"}]


def test_runs_that_ended_at_their_target_prove_nothing(two_groups, monkeypatch, capsys):
    for seed in range(3):
        write_run(two_groups / f"t/seed{seed}", seed, 0.9 + seed / 100, summary={"target": {"step": 5}})
    out, _, _ = say(monkeypatch, capsys, "t", "--target", "3.28")
    assert "prove nothing" in out and "is reached" not in out


def test_failed_and_unfinished_runs_are_shown_and_left_out_of_means(two_groups, monkeypatch, capsys):
    write_run(two_groups / "demo/seed3", 3, 9.9, summary={"status": "failed: the loss of step 7 is nan"})
    write_run(two_groups / "demo/seed4", 4, 9.9, summary={"status": ""})
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu")
    assert "seed3: failed: the loss of step 7 is nan" in out and "seed4: unfinished" in out
    assert "3 of 5" in out and "against 0.9140 (3 runs)" in out


@pytest.mark.parametrize(("target", "verdict"), [(0.94, "is reached"), (0.917, "is not shown to be reached")])
def test_a_target_is_reached_by_the_speedruns_test(two_groups, monkeypatch, capsys, target, verdict):
    out, _, _ = say(monkeypatch, capsys, "demo", "--metric", "val_bpb", "--target", str(target))
    assert f"the target {target} {verdict}" in out


def test_mcnemar_pairs_runs_by_seed_on_each_benchmark(tmp_path, monkeypatch):
    rows = [(name, name % 3 > 0) for name in range(30)]
    worse = [(name, right and name > 15) for name, right in rows]

    def group(name: str, **benchmarks) -> Group:
        return Group(name, [read_run(write_run(tmp_path / name, 5, benchmarks=benchmarks))])
    a, b = group("a", hellaswag=rows, lambada=rows, piqa=rows), group("b", lambada=worse, hellaswag=rows)
    first, second = benchmark_lines(a, b)
    assert "hellaswag, b against a: 20 against 20 of 30 right" in first
    assert "lambada, b against a: 10 against 20 of 30 right; 0 only by the former, 10 only by the latter, " \
        "p = 0.002 (McNemar)" in second
    other = group("c", lambada=rows[1:])
    line, = benchmark_lines(a, other)
    assert "lambada: a and c were scored on different rows" in line
    assert benchmark_lines(a, group("d", mine=rows)) == []
    (other.runs[0].folder / "lambada.jsonl").unlink()
    assert benchmark_lines(a, other) == []


# ------------------------------------------------------------------------------------------------
# Formats
# ------------------------------------------------------------------------------------------------

def test_markdown_has_a_cell_for_every_column(two_groups, monkeypatch, capsys):
    out, err, _ = say(monkeypatch, capsys, "demo", "gelu", "--format", "markdown")
    runs, groups = out.strip().split("\n\n")
    for table, lines in ((runs, 8), (groups, 4)):
        assert len({line.count("|") for line in table.splitlines()}) == 1
        assert len(table.splitlines()) == lines
    assert "paired" in err      # not in what is pasted


def test_latex_is_a_tabular_of_booktabs(two_groups, monkeypatch, capsys):
    write_run(two_groups / "100%_under_score&", 0)
    out, _, _ = say(monkeypatch, capsys, "100%_under_score&", "--format", "latex")
    assert r"100\%\_under\_score\&" in out
    body = out.split(r"\midrule")[1].split(r"\bottomrule")[0].strip()
    heading = out.split(r"\toprule")[1].split(r"\\")[0]
    columns = out.split("tabular}{")[1].split("}")[0]
    assert body.count(" & ") == heading.count(" & ") == len(columns) - 1


def test_csv_has_the_numbers_in_full(two_groups, monkeypatch, capsys):
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["group"] for row in rows] == ["demo"] * 3 + ["gelu"] * 3
    assert [float(row["val_bpb"]) for row in rows[:3]] == [0.910, 0.914, 0.918]
    assert rows[0]["parameters"] == "9000000"


def test_columns_nobody_measured_are_left_out(two_groups):
    titles = runs_table(open_groups(["demo"]))[0]
    assert "hellaswag" not in titles and "cost" in titles


def test_what_a_run_is_scored_on_is_no_difference_of_recipe(tmp_path):
    first, second = (read_run(write_run(tmp_path / name, knobs={"benchmarks": name}))
                     for name in ("piqa", "all"))
    assert differences_of(first, second) == []


def test_another_number_of_threads_is_named_if_both_runs_know_it(tmp_path):
    one, two, old = (read_run(write_run(tmp_path / name)) for name in ("one", "two", "old"))
    for run, threads in ((one, 1), (two, 2)):
        run.summary["threads"] = threads
    assert differences_of(one, two) == ["threads 1 against 2"] and differences_of(one, old) == []


def test_every_benchmark_that_runs_have_is_shown(two_groups, monkeypatch, capsys):
    rows = [(name, name % 4 > 0) for name in range(8)]
    write_run(two_groups / "demo/seed3", 3, benchmarks={"hellaswag": rows, "my_quiz": rows})
    write_run(two_groups / "gelu/seed3", 3, benchmarks={"lambada": rows})
    titles, *lines = runs_table(open_groups(["demo", "gelu"]))
    assert titles[-4:] == ["hellaswag", "my_quiz", "lambada", "lambada perplexity"]
    assert lines[3][-4:] == ["0.750 (0.250-0.750)"] * 2 + ["", ""]
    assert lines[7][-4:] == ["", "", "0.750 (0.250-0.750)", "35.13"]
    out, _, _ = say(monkeypatch, capsys, "demo", "gelu", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    found = {name: [row[name] for row in rows] for name in rows[0]
             if name.startswith(("hellaswag", "my_quiz", "lambada"))}
    empty = [""] * 3
    assert found == {**{f"{name}_{part}": [*empty, value, *empty, ""] for name in ("hellaswag", "my_quiz")
                        for part, value in (("acc", "0.75"), ("low", "0.25"), ("high", "0.75"))},
                     "lambada_acc": [*empty, "", *empty, "0.75"], "lambada_low": [*empty, "", *empty, "0.25"],
                     "lambada_high": [*empty, "", *empty, "0.75"],
                     "lambada_perplexity": [*empty, "", *empty, "35.126"]}


def test_json_is_one_object_with_all_that_is_said(with_documents, monkeypatch, capsys):
    out, _, code = say(monkeypatch, capsys, "demo", "gelu", "--json", "--effect", "0.001")
    found = json.loads(out)
    assert code == 0 and {*found} == {"metric", "runs", "groups", "comparisons", "said"}
    assert [(run["group"], run["seed"], run["val_bpb"]) for run in found["runs"]][:2] == [
        ("demo", 0, 0.910), ("demo", 1, 0.914)]
    demo, gelu = found["groups"]
    assert demo["val_bpb"]["mean"] == pytest.approx(0.914) and demo["val_bpb"]["sd"] == pytest.approx(0.004)
    assert (gelu["group"], gelu["runs"], gelu["finished"]) == ("gelu", 3, 3)
    one, = found["comparisons"]
    test = compare_groups(*open_groups(["demo", "gelu"]), "val_bpb").test
    assert (one["baseline"], one["group"], one["test"], one["seeds"]) == ("demo", "gelu", "paired", [0, 1, 2])
    assert (one["paired"]["mean"], one["paired"]["low"], one["paired"]["p"]) == (test.mean, test.low, test.p)
    assert one["welch"]["df"] > 3 and one["p_holm"] == test.p
    assert one["power"] == {"detectable_difference": pytest.approx(0.0033, abs=5e-5), "effect": 0.001,
                            "runs_needed": 10}
    assert one["over_documents"]["documents"] == 20 and one["over_documents"]["covers_seeds"]
    assert one["over_documents"]["low"] < test.low and one["over_documents_problem"] == ""
    assert [each["axis"] for each in one["compute_multipliers"]] == ["flops", "tokens", "time"]
    assert any("paired by 3 seeds" in line for line in found["said"])


@pytest.mark.parametrize(("words", "problem"), [
    (["nothing"], "nothing is not a run folder"), (["demo", "other"], "differ in tokens"), ([], "name runs"),
    (["demo", "--metrik", "x"], "there is no flag --metrik; did you mean --metric?"),
    (["demo", "--effect", "-1"], "argument --effect: must be above 0, not -1"),
    (["demo", "gelu", "--html", "demo/seed0/config.json/x"], "demo/seed0/config.json")])
def test_json_has_the_error_and_the_status_is_1(two_groups, monkeypatch, capsys, words, problem):
    write_run(two_groups / "other", summary={"tokens": 1})
    if "--html" in words:
        monkeypatch.chdir(two_groups)
    out, err, code = say(monkeypatch, capsys, *words, "--json")
    assert code == 1 and "\n" not in err.strip()
    objects = out.replace("}\n{", "}\0{").split("\0")
    assert problem in json.loads(objects[-1])["error"] and len(objects) == 1


def test_json_has_null_for_what_is_not_finite(two_groups, monkeypatch, capsys):
    write_run(two_groups / "demo/seed3", 3, summary={"status": "failed: nan", "val_loss": math.nan})
    quiz = {"acc": {"value": 0.5, "low": 0.4, "high": 0.6}, "margin": -math.inf}
    write_run(two_groups / "demo/seed4", 4, summary={"status": "", "benchmarks": {"quiz": quiz}})
    write_run(two_groups / "demo/seed5", 5, summary={"benchmarks": {"quiz": quiz}})
    monkeypatch.setenv("MY_API_KEY", "books_v8192")
    out, _, code = say(monkeypatch, capsys, "demo", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and found["comparisons"] == []
    assert [run["val_loss"] for run in found["runs"]][3:] == [None, None, 2.4]
    assert found["runs"][5]["benchmarks"]["quiz"] == quiz | {"margin": None}
    assert found["runs"][0]["tokenizer"] == "[MY_API_KEY]"
    out, _, _ = say(monkeypatch, capsys, "demo/seed0", "gelu/seed0", "--json")
    one, = json.loads(out)["comparisons"]
    assert one["test"] is one["paired"] is one["power"] is one["p_holm"] is None
    assert one["difference"] == pytest.approx(0.021)


# ------------------------------------------------------------------------------------------------
# Curves and the page
# ------------------------------------------------------------------------------------------------

def test_curves_are_drawn_over_every_axis_that_the_runs_know(two_groups, monkeypatch, capsys):
    say(monkeypatch, capsys, "demo", "gelu", "--plot", "figures/gelu")
    written = {path.name for path in Path("figures").iterdir()}
    assert written == {f"gelu_{kind}{axis}.{ending}" for axis in ("step", "tokens", "time", "flops", "cost")
                       for ending in ("png", "svg") for kind in ("", "difference_")}
    for row in two_groups.glob("*/*/metrics.csv"):
        row.write_text(row.read_text().replace(",flops", ",other"))
    shutil.rmtree("figures")
    say(monkeypatch, capsys, "demo", "gelu", "--plot", "figures/gelu")
    assert not list(Path("figures").glob("*flops*")) and list(Path("figures").glob("*tokens*"))


def test_no_difference_is_drawn_of_what_may_not_be_compared(two_groups, monkeypatch, capsys):
    write_run(two_groups / "other/seed0", summary={"tokens": 1})
    _, _, code = say(monkeypatch, capsys, "demo", "other", "--html", "a.html")
    assert code == 1 and 'id="by-step"' in Path("a.html").read_text()
    assert 'id="difference' not in Path("a.html").read_text()
    for number in range(3):     # single runs, which are not weighed
        write_run(two_groups / f"try{number}")
    assert compare.weigh(open_groups(["try*"]), "val_bpb", [], 0.0, None).groups == []
    assert len(compare.weigh(open_groups(["demo", "gelu"]), "val_bpb", [], 0.0, None).groups) == 2


def test_the_difference_of_curves_is_drawn_with_its_interval(two_groups):
    axes, = curves.draw_differences(open_groups(["demo", "gelu"]), "step", "val_bpb").axes
    line, zero = axes.lines
    assert list(line.get_xdata()) == [100, 200, 300, 400, 500, 600]
    assert line.get_label() == " gelu - demo (3 seeds)"
    assert line.get_ydata() == pytest.approx([0.02] * 6) and set(zero.get_ydata()) == {0}
    band = axes.collections[0].get_paths()[0].vertices
    heights = band[band[:, 0] == 600][:, 1]
    # as the conclusions have it: t(0.975, 2) = 4.3027
    assert (min(heights), max(heights)) == pytest.approx((0.02 - 0.002484, 0.02 + 0.002484), abs=1e-6)
    assert curves.draw_differences(open_groups(["demo"]), "step", "val_bpb") is None


def test_a_run_that_broke_off_does_not_cut_the_mean_short(two_groups):
    write_run(two_groups / "demo/seed3", 3, summary={"status": "failed: nan"})
    path = two_groups / "demo/seed3/metrics.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:4]) + "\n")
    line = curves.draw(open_groups(["demo"]), "step", "val_bpb").axes[0].lines[0]
    assert line.get_xdata()[-1] == 600 and "(3 runs)" in line.get_label()


def test_the_same_runs_make_the_same_svg(two_groups):
    one, other = (curves.as_bytes(open_groups(["demo"]), "step", "val_bpb", "svg") for _ in range(2))
    assert one == other and b"<text" in one


def test_a_groups_curve_is_the_mean_in_a_band_of_one_deviation(two_groups):
    figure = curves.draw(open_groups(["demo"]), "step", "val_bpb")
    axes, = figure.axes
    x, y = axes.lines[0].get_data()
    assert list(x) == [100, 200, 300, 400, 500, 600]
    assert y[-1] == pytest.approx(0.914)
    band = axes.collections[0].get_paths()[0].vertices
    heights = band[band[:, 0] == 600][:, 1]
    assert (min(heights), max(heights)) == pytest.approx((0.910, 0.918))


@pytest.fixture
def browser():
    """A page of headless Chromium without network."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("no Chromium here; on Debian: apt install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = opened.new_context(offline=True, viewport={"width": 1200, "height": 900})
        yield context.new_page()
        opened.close()


@pytest.mark.slow
def test_the_page_sorts_switches_axes_and_shows_samples(two_groups, monkeypatch, capsys, browser):
    _, _, code = say(monkeypatch, capsys, "demo", "gelu", "--html", "out/page.html")
    assert code == 0
    complaints = []
    browser.on("console", lambda message: complaints.append(message.text))
    browser.on("pageerror", lambda error: complaints.append(str(error)))
    browser.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
    browser.goto(Path("out/page.html").resolve().as_uri())

    def column(title):
        place = browser.locator(".runs thead th").all_inner_texts().index(title)
        return browser.locator(f".runs tbody td:nth-child({place + 1})").all_inner_texts()
    assert len(column("run")) == 6
    head = browser.get_by_role("button", name="val_bpb")
    head.click()
    assert column("val_bpb") == sorted(column("val_bpb"))
    assert browser.locator("th[aria-sort=ascending]").count() == 1
    head.click()
    assert column("val_bpb") == sorted(column("val_bpb"), reverse=True)
    browser.get_by_role("button", name="group").click()
    assert column("group") == ["demo"] * 3 + ["gelu"] * 3

    def shown() -> list[str]:
        return [figure.get_attribute("id") for figure in browser.locator("figure:visible").all()]
    assert shown() == ["by-step", "difference-by-step"]
    browser.get_by_role("radio", name="training FLOPs").check(force=True)
    assert shown() == ["by-flops", "difference-by-flops"]
    assert all(svg.bounding_box()["width"] > 300 for svg in browser.locator("figure:visible svg").all())

    samples = browser.locator(".samples pre").all_inner_texts()
    assert [text[:25] for text in samples] == ["Once <b>upon</b> a time &"] * 2
    left, right = (browser.locator(".samples > div").nth(place).bounding_box() for place in (0, 1))
    assert left["y"] == right["y"] and right["x"] > left["x"]       # side by side
    assert "paired by 3 seeds" in browser.locator("body").inner_text()
    assert complaints == []


def test_what_runs_say_is_never_markup(two_groups):
    shutil.move(two_groups / "gelu", two_groups / "<img src=x>")
    html = page(open_groups(["demo", "<img src=x>"]), "val_bpb", ["<script>alert(1)</script>"])
    assert "<img" not in html and "<script>alert" not in html and "<b>upon" not in html


def test_the_page_begins_with_no_winner_and_has_the_table_of_groups(two_groups):
    groups = open_groups(["demo", "gelu"])
    html = page(groups, "val_bpb", [])
    assert html.count("<p>") == 1 and "<p>6 of 6 runs finished</p>" in html and "lowest" not in html
    table = html.split('<table class="groups">')[1].split("</table>")[0]
    cells = [re.findall(r"<t[dh].*?>(.*?)</t[dh]>", line) for line in table.split("<tr>")[1:]]
    assert cells == groups_table(groups)
    assert re.findall("<h2>(.*?)</h2>", html) == ["Groups", "Runs", "Curves", "Samples of seed 0"]
    # no mean of runs that do not belong together, and no table for single runs
    assert '<table class="groups">' not in page(groups, "val_bpb", [], is_comparable=False)
    assert '<table class="groups">' not in page(open_groups(["demo/seed0", "gelu/seed0"]), "val_bpb", [])


def test_what_is_refused_has_no_table_of_groups_on_the_page(two_groups, monkeypatch, capsys):
    write_run(two_groups / "demo/seed3", 3, summary={"tokens": 5})
    _, _, code = say(monkeypatch, capsys, "demo", "gelu", "--html", "page.html")
    assert code == 1 and '<table class="groups">' not in Path("page.html").read_text()


def test_samples_side_by_side_are_of_one_seed_where_there_is_one(two_groups):
    shutil.rmtree(two_groups / "gelu/seed0")
    (two_groups / "demo/seed1/samples.jsonl").unlink()
    html = page(open_groups(["demo", "gelu"]), "val_bpb", [])
    assert "<h2>Samples of seed 2</h2>" in html
    assert re.findall(r"<h3>(.*?)</h3>", html) == ["demo: demo/seed2", "gelu: gelu/seed2"]
    write_run(two_groups / "other/seed7", 7, 0.91)
    write_run(two_groups / "other/seed8", 8, 0.93)
    write_run(two_groups / "other/seed9", 9, 0.97)
    html = page(open_groups(["demo", "other"]), "val_bpb", [])
    assert "<h2>Samples of the run nearest to each group's mean, since no seed is in all groups</h2>" in html
    # demo's mean is that of seed 1, which has no samples
    assert re.findall(r"<h3>(.*?)</h3>", html)[1] == "other: other/seed8"


# ------------------------------------------------------------------------------------------------
# --compare_to, and the index
# ------------------------------------------------------------------------------------------------

def test_standing_is_in_the_groups_standard_deviations(two_groups):
    run = read_run(write_run(two_groups / "20260101_120000_try", 9, 0.922))
    assert standing(run, "demo") == ("val_bpb is 0.0080 above demo, 2.0 standard deviations (3 runs: mean "
                                     "0.9140, standard deviation 0.0040)")
    assert "val_bpb is 0.0120 below demo, 3.0 standard deviations" in standing(
        read_run(write_run(two_groups / "20260101_120001_try", 9, 0.902)), "demo")


def test_standing_leaves_the_run_itself_out(two_groups):
    run = read_run(write_run(two_groups / "demo/seed3", 3, 0.922))
    assert "above demo, 2.0 standard deviations (3 runs" in standing(run, "demo")


def test_standing_says_why_it_cannot_be_told(two_groups):
    other = read_run(write_run(two_groups / "a", summary={"held_out_sha256": "h2"}))
    assert standing(other, "demo") == (
        "no comparison with demo: demo (demo/seed0) and this run (a) were validated on different text")
    lonely = read_run(write_run(two_groups / "b", bpb=0.93))
    assert "so no standard deviation" in standing(lonely, "demo/seed0")


def test_the_index_names_failures_and_numbers_of_held_out_documents(two_groups):
    write_run(two_groups / "demo/seed3", 3, summary={"status": "failed: the loss of step 7 is nan"})
    write_run(two_groups / "20260101_000000_private", 0)
    write_run(two_groups / "new", 0, summary={"held_out_documents": 44})
    text = index(two_groups)
    assert "| [new](new/) | 1 | demo | 4.9M | 44 | 2." in text
    assert "| [demo](demo/) | 3 of 4 | demo | 4.9M |  | 2.1936 ± 0.0096 | 0.9140 ± 0.0040 |" in text
    assert "- `demo/seed3`: failed: the loss of step 7 is nan" in text
    assert "private" not in text


def test_the_committed_index_is_what_the_committed_runs_say(tmp_path):
    """If this fails, run: python compare.py --index"""
    listed = subprocess.run(["git", "ls-files", "experiments"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines() or pytest.skip("no git repository here"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert (ROOT / "experiments/README.md").read_text() == index(tmp_path / "experiments")


def test_compare_needs_no_torch():
    code = "import compare, judge, benchtop.page, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
