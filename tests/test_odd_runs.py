"""What is made of runs that are damaged, old, foreign or odd: one line, and never a wrong number.

Run: ./run.sh test tests/test_odd_runs.py
"""

import csv
import json
from pathlib import Path

import pytest
from test_compare import say, write_run

from benchtop import curves, places
from benchtop.groups import Group, open_groups, read_run
from benchtop.loss_picture import loss_figure
from benchtop.page import page
from benchtop.tables import as_latex, as_markdown, groups_table, index, runs_table


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """experiments/ with a group of three good runs."""
    home = tmp_path / "experiments"
    monkeypatch.setattr(places, "EXPERIMENTS", home)
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        write_run(home / f"good/seed{seed}", seed, 0.91 + seed / 100)
    return home


def spoil(folder: Path, **changes) -> Path:
    """Change a run's summary.json."""
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def rewrite(folder: Path, rows: list[dict]) -> Path:
    """Change a run's metrics.csv."""
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return folder


ODD = [({"val_bpb": float("nan")}, "its val_bpb is nan"), ({"val_loss": float("inf")}, "its val_loss is inf"),
       ({"val_bpb": "0.9"}, "its val_bpb is 0.9, not a finite"), ({"val_bpb": True}, "its val_bpb is True"),
       ({"tokens": -5}, "its tokens is -5"), ({"tokens": [5]}, "its tokens is [5]"),
       ({"tokens": 10**400}, "its tokens is 1000"), ({"seed": None}, "it lacks seed"),
       ({"seed": "three"}, "its seed is 'three'"), ({"parameters": "many"}, "its parameters is many"),
       ({"held_out_documents": -1}, "its held_out_documents is -1"), ({"cost": {}}, "its cost is {}"),
       ({"peak_memory_mib": float("nan")}, "its peak_memory_mib is nan"), ({"bench": ["a"]}, "its bench is"),
       ({"sources": None}, "its sources is"), ({"benchmarks": [1]}, "its benchmarks is not an object"),
       ({"benchmarks": {"x": {"acc": 0.3}}}, "its accuracy on x must have value, low and high from 0 to 1"),
       ({"benchmarks": {"x": 0.3}}, "its accuracy on x"), ({"benchmarks": {"x": {}}}, "its accuracy on x"),
       ({"benchmarks": {"x": {"acc": {"value": 30.0, "low": 0.2, "high": 0.4}}}}, "its accuracy on x"),
       ({"benchmarks": {"x": {"acc": {"value": 0.3, "low": 0.2, "high": 0.4}, "perplexity": "inf"}}},
        "its perplexity on x is inf"),
       ({"script": []}, "its script is [], not a string"), ({"bench_sha256": 5}, "its bench_sha256 is 5")]


@pytest.mark.parametrize(("changes", "complaint"), ODD)
def test_a_summary_that_no_run_writes_is_left_out_by_name(runs, changes, complaint, capsys):
    spoil(write_run(runs / "good/seed3", 3, 0.9), **changes)
    group, = open_groups(["good"])
    said = capsys.readouterr().err
    assert len(group.runs) == 3 and said.count("\n") == 1
    assert f"good/seed3/summary.json is not a valid run file: {complaint}" in said


@pytest.mark.parametrize("content", ["[1, 2]", "", "{\"status\": \"fin", "nul", "\0", "3"])
@pytest.mark.parametrize("name", ["summary.json", "config.json"])
def test_a_damaged_run_alone_is_an_error_of_one_line(runs, monkeypatch, capsys, name, content):
    write_run(runs / "alone")
    (runs / "alone" / name).write_text(content)
    out, err, code = say(monkeypatch, capsys, "alone")
    assert (out, code) == ("", 1) and err.count("\n") == 1
    assert err.startswith("compare.py: error: ") and f"{name} is not a valid run file" in err


def test_a_group_of_which_no_run_can_be_read_is_an_error(runs, monkeypatch, capsys):
    for seed in range(2):
        spoil(write_run(runs / f"bad/seed{seed}", seed), tokens=float("nan"))
    for words in (["bad"], ["x=bad"], ["bad/seed0", "bad/seed1"]):
        out, err, code = say(monkeypatch, capsys, *words)
        assert (out, code) == ("", 1) and err.splitlines()[-1].endswith("has no run that can be read"), err


def test_what_cannot_be_opened_is_left_out(runs, capsys):
    write_run(runs / "good/seed3", 3)
    (runs / "good/seed3/summary.json").unlink()
    (runs / "good/seed3/metrics.csv").unlink()
    (runs / "good/seed3/metrics.csv").mkdir()
    (runs / "good/loop").symlink_to(runs / "good/loop")
    group, = open_groups(["good"])
    assert len(group.runs) == 3
    assert "good/seed3 cannot be read (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\n\n", b"step,val_bpb", b"step\n1,2,3\n", b"a\0b\n\xff\xfe\n",
                                     b"step,val_bpb\n1,much\n"])
def test_an_unfinished_run_with_any_metrics_is_a_line_or_left_out(runs, monkeypatch, capsys, content):
    write_run(runs / "good/seed3", 3, summary={"status": ""})
    (runs / "good/seed3/metrics.csv").write_bytes(content)
    out, err, code = say(monkeypatch, capsys, "good")
    assert code == 0 and ("seed3: unfinished" in out or "seed3/metrics.csv is not a valid run file" in err)


def test_metrics_without_a_column_have_no_curve_over_it(runs, monkeypatch, capsys):
    for seed in range(3):
        rewrite(runs / f"good/seed{seed}", [{"step": 1, "val_bpb": 2.0}, {"step": 2, "val_bpb": 1.5}])
    _, _, code = say(monkeypatch, capsys, "good", "--plot", "figures/good")
    assert code == 0
    assert {path.name for path in Path("figures").iterdir()} == {"good_step.png", "good_step.svg"}


@pytest.mark.parametrize(("rows", "points"), [
    ([{"step": 0, "val_bpb": 8.0}], [(0, 8)]), ([{"step": 5, "val_bpb": ""}], []), ([{"step": 5}], []),
    ([{"step": 1, "val_bpb": 2}, {"step": 2, "val_bpb": "nan"}, {"step": 3, "val_bpb": "inf"}], [(1, 2)]),
    ([{"step": 1, "val_bpb": 3}, {"step": 2, "val_bpb": 2}, {"step": 1, "val_bpb": 4}], [(1, 4), (2, 2)]),
    ([{"step": "nan", "val_bpb": 3}, {"step": 2, "val_bpb": 0}], [(2, 0)])])
def test_curves_are_of_finite_values_in_order(runs, rows, points):
    run = read_run(rewrite(write_run(runs / "odd"), rows))
    assert list(zip(*curves.curve(run, "step", "val_bpb"), strict=True)) == points
    figure = curves.draw([Group("odd", [run])], "step", "val_bpb")
    assert (figure is not None) == bool(points)


def test_a_run_that_failed_shows_the_last_number_that_is_one(runs):
    run = write_run(runs / "failed", summary={"status": "failed: the loss\nis nan", "val_loss": float("nan"),
                                              "train_seconds": float("nan")})
    rewrite(run, [{"step": 1, "val_loss": 2.5, "train_seconds": 61}, {"step": 2, "val_loss": "nan"}])
    titles, line = runs_table(open_groups(["failed"]))
    assert line[titles.index("val_loss")] == "2.5000" and line[titles.index("time")] == "1:01"
    assert "- `failed`: failed: the loss is nan" in index(runs)


def row_of(step: int, train: float = 3.0, **validation: float) -> dict:
    return {"step": step, "tokens": 100 * step, "train_loss": train, **validation}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("rows", "validations"), [
    ([], 0), ([row_of(1)], 0), ([row_of(1, val_loss=2.0, val_bpb=1.0)], 1),
    ([row_of(0, val_loss=0.0, val_bpb=0.0)], 1),
    ([row_of(1, float("nan")), row_of(2, val_loss=float("nan"), val_bpb=float("nan"))], 0),
    ([row_of(1, float("inf")), *2 * [row_of(2, val_loss=2.0, val_bpb=1.0)]], 2)])
def test_the_picture_of_a_run_is_drawn_of_any_rows(rows, validations):
    figure = loss_figure(rows, "odd", 44, {})
    figure.canvas.draw()
    models = [line for line in figure.axes[1].lines if line.get_label() == "this model"]
    assert [len(line.get_xdata()) for line in models] == [validations]


@pytest.mark.parametrize("flag", ["--target", "--effect"])
@pytest.mark.parametrize("value", ["nan", "-1", "0", "inf", "much"])
def test_a_target_or_an_effect_is_a_number_above_0(runs, monkeypatch, capsys, flag, value):
    out, err, code = say(monkeypatch, capsys, "good", f"{flag}={value}")
    assert (out, code) == ("", 2) and err.count("\n") == 1 and flag in err


def test_no_test_is_made_of_runs_without_a_spread(runs, monkeypatch, capsys):
    for seed in range(3):
        write_run(runs / f"same/seed{seed}", seed, 0.91, summary={"cost": seed})
        write_run(runs / f"other/seed{seed}", seed, 0.93, summary={"cost": seed})
    out, _, code = say(monkeypatch, capsys, "same", "other", "--target", "0.92", "--metric", "val_bpb")
    assert code == 0 and "agree to the last digit" in out
    assert not {"better", "worse", "reached", "p below", "inf"} & set(out.replace(",", " ").split())
    assert "same: all 3 runs have val_bpb 0.9100 to the last digit" in out
    # one side with a spread is enough
    out, _, _ = say(monkeypatch, capsys, "good", "other")
    assert "Welch" in out


def test_a_benchmarks_items_of_another_form_are_named(runs, monkeypatch, capsys):
    rows = [(name, name > 2) for name in range(5)]
    for name in "ab":
        write_run(runs / name, benchmarks={"quiz": rows})
    for content in ('{"name": 1, "label": 0}\n', "[1]\n", '{"name": 1, "label": 0, "acc": 1}\n'):
        (runs / "b/quiz.jsonl").write_text(content)
        _, err, code = say(monkeypatch, capsys, "a", "b")
        assert code == 1 and err.count("\n") == 1 and "quiz.jsonl is not a valid run file" in err


def test_samples_of_another_form_are_named(runs, monkeypatch, capsys):
    (runs / "good/seed0/samples.jsonl").write_text('{"prompt": "a"}\n')
    _, err, code = say(monkeypatch, capsys, "good", "--html", "page.html")
    assert code == 1 and err.count("\n") == 1 and "samples.jsonl is not a valid run file" in err


def test_hundreds_of_runs_are_one_table(runs, monkeypatch, capsys):
    for seed in range(200):
        folder = runs / f"many/seed{seed}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "summary.json").write_text(
            (runs / "good/seed0/summary.json").read_text().replace('"seed": 0', f'"seed": {seed}')
            .replace("0.91", f"0.{9100 + seed}"))
    out, _, code = say(monkeypatch, capsys, "many", "good")
    assert code == 0 and "200" in out and "paired by 3 seeds" in out


def test_runs_of_one_name_are_told_apart_or_refused(runs, monkeypatch, capsys, tmp_path):
    for number, place in enumerate(("x", "y")):
        write_run(tmp_path / place / "mine", number, 0.9)
    _, err, code = say(monkeypatch, capsys, "x/mine", "y/mine")
    assert code == 1 and err == "compare.py: error: two groups are called mine; rename one, as in a=GLOB\n"
    out, _, code = say(monkeypatch, capsys, "a=x/mine", "b=y/mine")
    assert code == 0 and "b against a" in out


def test_a_page_holds_only_what_a_page_may_hold(runs):
    sample = {"prompt": "a\0b<script>", "text": "\ud800 \x1b[31m </pre>\r\n", "seed": 0}
    (runs / "good/seed0/samples.jsonl").write_text(json.dumps(sample) + "\n")
    html = page(open_groups(["good"]), "val_bpb", ["\udcff"])
    assert html.encode().decode() == html and not {"\0", "\x1b"} & set(html)
    assert "a\ufffdb&lt;script&gt;" in html and "&lt;/pre&gt;" in html


def test_cells_of_markdown_keep_to_their_column(runs):
    spoil(write_run(runs / "a|b"), device="GPU | 80 GB\nSXM", preset=None)
    lines = index(runs).splitlines()
    assert r"1 x GPU \| 80 GB SXM |" in index(runs)
    assert {line.replace(r"\|", "").count("|") for line in lines if line.startswith("|")} == {10}
    table = as_markdown(groups_table(open_groups(["a|b"])))
    assert {line.replace(r"\|", "").count("|") for line in table.splitlines()} == {9}


def test_cells_of_latex_hold_no_command():
    table = as_latex([["run", "x"], ["a_b\n&%$#{}~^\\ <1|2>", "1"]])
    cell = (r"a\_b \&\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{} "
            r"\textless{}1\textbar{}2\textgreater{}")
    assert cell + r" & 1 \\" in table.splitlines()
