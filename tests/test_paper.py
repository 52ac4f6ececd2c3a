"""paper/: what the appendix says is what the code does, and the PDF is made of the committed runs.

Run: ./run.sh test tests/test_paper.py
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import ROOT

import train_gpt

sys.path.insert(0, str(ROOT / "paper"))
import build

from benchtop.files import sha256_of

TEXTS = "".join((ROOT / "paper" / name).read_text() for name in ("paper.tex", "appendix.tex"))


def test_every_fact_of_the_text_is_read_from_the_code():
    named = set(re.findall(r"\\fact\{([\w.]+)\}", TEXTS))
    assert len(named) > 40 and named <= set(build.facts())
    gone = r"depth warm-?up|sampled softmax|\\cite\{(depth|sampled)\}"
    assert not re.search(gone, TEXTS, re.IGNORECASE), "the paper describes what only patches do"
    # numbers that stand in the appendix by hand are of formulas, not of the code
    prose = re.sub(r"\\(fact|cite|label|ref)\{[^}]*\}", "", (ROOT / "paper" / "appendix.tex").read_text())
    assert set(re.findall(r"(?<![\w^_])\d+\.\d+|(?<![\w^_])\d{3,}", prose)) == set()


def test_facts_follow_the_code(monkeypatch):
    before = build.facts()
    assert before["knob.logit_cap"] == "15" and before["rates.matrices.batch"] == "1/12"
    assert before["rotary.slowest"] == "1,024" and before["rates.head.width"] == "-1/2"
    assert before["rates.matrices.width"] == "0" and before["muon.momentum_last"] == "0.95"
    assert (before["budget.tokens"], before["budget.epochs"]) == ("4,000,000", "4")
    assert (before["data.enough"], before["data.most_percent"]) == ("64", "5")
    monkeypatch.setattr(train_gpt.Optimizer, "betas", (0.7, 0.97))
    angles = torch.tensor([1.0, 0.5, 1e-5, 0.0])
    monkeypatch.setattr(train_gpt.GPT, "frequencies", lambda model, device: angles)
    monkeypatch.setattr(build.documents, "HELD_OUT_ONE_IN", 32)
    monkeypatch.setattr(build.held_out, "MOST_OF_TEXT", 0.075)
    after = build.facts()
    assert after["data.one_in"] == "32" != before["data.one_in"]
    assert after["data.most_percent"] == "7.5"
    assert (after["adam.beta1"], after["adam.beta2"]) == ("0.7", "0.97")
    assert (after["rotary.slowest"], after["rotary.rotating"], after["rotary.pairs"]) == ("100,000", "3", "4")


def test_the_budget_of_the_text_is_the_rule_of_the_code():
    facts = build.facts()
    for million, batch in ((1, 8192), (10, 32768), (100, 131072)):
        cfg = train_gpt.Config(train_tokens=million * 10**6).with_budget(2**53)
        assert cfg.batch_tokens == batch and f"{batch:,} for {million} million" in facts["batch.by_budget"]
    assert train_gpt.Config().with_budget(10**6).train_tokens <= 4 * 10**6


def test_powers_are_told_as_they_are():
    cfg = train_gpt.Config()
    for power, told in [(1 / 12, "1/12"), (-0.5, "-1/2"), (2 / 3, "2/3"), (2, "2"), (0, "0"),
                        (0.59, "0.590")]:
        assert build.exponent(lambda cfg, power=power: cfg.model_dim**power, "model_dim", cfg) == told


def test_windows_are_long_in_every_fourth_layer_and_the_last():
    cfg = train_gpt.Config(num_layers=6, seq_len=2048, vocab_size=64)
    model = train_gpt.GPT(cfg, 63)
    assert model.progress == 1 and model.windows(2048) == [1024, 1024, 1024, 2048, 1024, 2048]


def kept_run(folder: Path, data: str = "a", **facts) -> str:
    """A kept run of today's train_gpt.py, but for these facts of its summary."""
    preset = train_gpt.Config.preset_knobs("demo") | {"preset": "demo", "head_lr": 0.01}
    summary = {"status": "finished", "seed": 0, "tokens": 100, "train_seconds": 1.0, "val_loss": 2.0,
               "val_bpb": 1.0, "tokens_per_second": 100.0, "script": "train_gpt.py",
               "code_sha256": sha256_of(ROOT / "train_gpt.py"), "data": data, "data_sha256": data,
               "held_out_documents": 64, "held_out_tokens": 12345, **facts}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(train_gpt.Config(**preset))))
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_what_compare_would_refuse_is_no_table(tmp_path, monkeypatch):
    mixed = [kept_run(tmp_path / data, data=data) for data in ("a", "b")]
    monkeypatch.setattr(build, "TABLES", {"mixed": (mixed, ["tokens"])})
    with pytest.raises(build.UserError, match="differ in data"):
        build.tables()


def tables_of(spec: str, monkeypatch) -> dict[str, str]:
    monkeypatch.setattr(build, "TABLES", {"one": ([spec], [])})
    return build.tables()


def test_runs_of_todays_program_are_a_table_with_the_knobs_that_their_command_set(tmp_path, monkeypatch):
    made = tables_of(kept_run(tmp_path / "flags"), monkeypatch)
    assert "head\\_lr & 0.008 & 0.01" in made["one_knobs.tex"] and "muon" not in made["one_knobs.tex"]
    assert build.facts_of_runs() == {"one.documents": "64", "one.tokens": "12,345"}


@pytest.mark.parametrize("place", ["run", "."])
def test_runs_of_another_program_than_the_appendix_describes_are_no_table(place, tmp_path, monkeypatch):
    source = (ROOT / "train_gpt.py").read_text()
    wordy = source.replace('"""Train a GPT.', '"""Learn.', 1) + "# a comment\n"
    computes_otherwise = source.replace("0.95", "0.96", 1)
    assert len({source, wordy, computes_otherwise}) == 3
    run = kept_run(tmp_path / "run")
    for text, refused in [(wordy, ""), (computes_otherwise, "than the appendix describes")]:
        copy = tmp_path / place / "train_gpt.txt"
        copy.write_text(text)
        facts = json.loads((tmp_path / "run" / "summary.json").read_text()) | {"code_sha256": sha256_of(copy)}
        (tmp_path / "run" / "summary.json").write_text(json.dumps(facts))
        if refused:
            with pytest.raises(build.UserError, match=refused):
                tables_of(run, monkeypatch)
        else:
            assert tables_of(run, monkeypatch)
        copy.write_text(source)         # not what made the run, as its hash tells
        with pytest.raises(build.UserError, match=r"no copy of that version at .*/train_gpt\.txt or"):
            tables_of(run, monkeypatch)


def test_code_that_no_longer_looks_like_its_description_stops_the_build():
    def other(x):
        return x / 2
    with pytest.raises(build.UserError, match=r"looks for eps.* in .*other and finds it 0 times"):
        build.constants(other, r"eps=(\S+)")
    assert build.constants(other, r"x / (\d)") == ["2"]


def test_a_fact_that_is_not_there_is_an_error_in_latex(tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("LaTeX is not installed")
    (tmp_path / "facts.tex").write_text(build.as_macros({"knob.num_layers": "6"}))
    for name, code in [("knob.num_layers", 0), ("knob.layers", 1)]:
        (tmp_path / "t.tex").write_text("\\documentclass{article}\\input{facts.tex}\\begin{document}"
                                        f"\\fact{{{name}}}\\end{{document}}")
        done = subprocess.run(["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code and ("there is no fact knob.layers" in done.stdout) == bool(code)


def test_the_tables_are_those_of_compare(monkeypatch):
    made = build.tables()
    kinds = ("", "_differences", "_knobs")
    assert set(made) == {f"{name}{kind}.tex" for name in build.TABLES for kind in kinds}
    shown = subprocess.run([sys.executable, "compare.py", *build.TABLES["example"][0], "--format", "latex"],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made["example.tex"].strip() in shown
    for text in made.values():
        assert text.startswith(r"\begin{tabular}") and text.endswith("\\end{tabular}\n")


@pytest.mark.slow
def test_the_pdf_is_made_and_says_what_the_runs_say(tmp_path):
    if not shutil.which("latexmk"):
        pytest.skip("latexmk is not installed")
    for name in (*(path.name for path in ROOT.glob("*.py")), "benchtop", "paper", "experiments"):
        source = ROOT / name
        if source.is_dir():
            made = shutil.ignore_patterns("2*", "made", "*.pdf", "__pycache__")
            shutil.copytree(source, tmp_path / name, ignore=made)
        else:
            shutil.copy(source, tmp_path)
    done = subprocess.run([sys.executable, "paper/build.py"], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    pdf = tmp_path / "paper" / "paper.pdf"
    assert pdf.read_bytes().startswith(b"%PDF") and "wrote paper/paper.pdf" in done.stdout
    log = (tmp_path / "paper" / "made" / "paper.log").read_text(errors="replace")
    assert not re.search(r"undefined|Overfull \\hbox \((?:[2-9]\d|\d{3,})", log)
    if shutil.which("pdftotext"):
        text = subprocess.run(["pdftotext", str(pdf), "-"], capture_output=True, text=True, check=True).stdout
        table = (tmp_path / "paper" / "made" / "example.tex").read_text()
        values = re.findall(r"& (\d\.\d{4}) &", table)
        assert values and all(value in text for value in values)
        assert "??" not in text


def test_without_latex_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "MADE", tmp_path / "made")
    monkeypatch.setattr(sys, "argv", ["build.py"])
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as end:
        build.main()
    assert "apt install latexmk" in str(end.value.code)
    assert Path(tmp_path / "made" / "example.pdf").stat().st_size > 1000
