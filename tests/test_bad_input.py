"""Whatever a person or a disk does to flags and files: one clear line, and nothing outside the run folder.

Run: ./run.sh test tests/test_bad_input.py
"""

import dataclasses
import json
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_resume import stop_here
from tiny_runs import ROOT, flags, rows_of

import train_gpt
from benchtop import places
from benchtop.checkpoints import load_checkpoint, read_checkpoint
from benchtop.errors import UserError

FIELDS = {field.name: field.type for field in dataclasses.fields(train_gpt.Config)}
KNOBS = sorted(name for name, kind in FIELDS.items() if kind is not bool)
SMALL = flags(num_steps=1, num_layers=1, num_samples=0, micro_batch_tokens=32)      # soon checked
values = (st.integers(-3, 300).map(str) | st.floats(width=32).map(str) | st.text(max_size=12)
          | st.sampled_from(["", "../../x", "..", "/etc/passwd", "a/b", "x\0y", "auto", "cpu", "nan", "inf",
                             "-0", "on", "1e999", "9" * 400,
                             "demo", "tiny", "--seed", "$(id)", "\n", "ü", "0x10", "1_0", "١٢"]))


def main_ends_well(monkeypatch, capsys, arguments: list[str]) -> str:
    """Run the script in this process; what it says when it refuses, one line; nothing if it does not."""
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *arguments])
    capsys.readouterr()
    try:
        train_gpt.main()
    except SystemExit as end:
        if not end.code:
            return ""
        out, err = capsys.readouterr()
        said = end.code if isinstance(end.code, str) else err or out.splitlines()[-1]
        assert len(said.strip().splitlines()) == 1 and "Traceback" not in said, said
        return said
    return ""


@settings(max_examples=80)
@given(st.dictionaries(st.sampled_from(KNOBS), values, max_size=4))
@example({"model_name": "../../x"})
@example({"resume": "/etc"})
@example({"resume": "x\0y"})
@example({"tokenizer": "../tiny"})
@example({"seed": str(10**30)})
@example({"num_heads": "0"})
@example({"val_tokens": "1"})
@example({"timeout_seconds": "1e300"})
def test_no_flag_gives_a_traceback_or_writes_outside(lab, here, monkeypatch, capsys, chosen):
    before = set(here.rglob("*"))
    monkeypatch.chdir(here)
    chosen_flags = [f"--{knob}={value}" for knob, value in chosen.items()]
    main_ends_well(monkeypatch, capsys, [*SMALL, *chosen_flags, "--check"])
    assert set(here.rglob("*")) == before


@pytest.mark.parametrize("name", ["../../x", "..", "/tmp/x", "a/b", "", "x\0", "-x", ".hidden", "a" * 300])
def test_a_model_name_never_leaves_the_experiments(lab, here, monkeypatch, capsys, name):
    said = main_ends_well(monkeypatch, capsys, flags(model_name=name))
    assert "--model_name must be" in said
    assert not list(here.iterdir())


# ------------------------------------------------------------------------------------------------
# Files of a run
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def stopped_run(lab, here):
    return stop_here(here)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                           lambda inner: st.lists(inner, max_size=3)
                           | st.dictionaries(st.sampled_from([*KNOBS, "status"]), inner, max_size=4),
                           max_leaves=6)


@settings(max_examples=40)
@given(st.sampled_from(["config.json", "summary.json"]), json_values | st.binary(max_size=30),
       st.sets(st.sampled_from(sorted(FIELDS)), max_size=3))
@example("config.json", {}, set())
def test_no_json_of_a_run_gives_a_traceback(stopped_run, monkeypatch, capsys, name, content, missing):
    """The drawn knobs override those of a small run, because checking a full-size one takes long."""
    path, whole = stopped_run / name, (stopped_run / "config.json").read_bytes()
    if name == "config.json" and content and isinstance(content, dict):
        content = json.loads(whole) | {"micro_batch_tokens": 32} | content
        content = {knob: value for knob, value in content.items() if knob not in missing}
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    try:
        for words in ([f"--resume={stopped_run}"], [*SMALL, "--resume=auto"]):
            main_ends_well(monkeypatch, capsys, [*words, "--check"])
    finally:
        path.unlink()
        (stopped_run / "config.json").write_bytes(whole)


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_checkpoint_is_whole_or_refused(stopped_run, data):
    for name in ("checkpoint_previous.pt", "checkpoint_best.pt"):
        (stopped_run / name).unlink(missing_ok=True)
    path = stopped_run / "checkpoint.pt"
    whole = path.read_bytes()
    wanted = load_checkpoint(path)
    content = bytearray(whole)
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    path.write_bytes(content)
    try:
        state = read_checkpoint(stopped_run)
        # what is not covered by a checksum carries nothing
        assert all(torch.equal(state["model"][name], tensor) for name, tensor in wanted["model"].items())
        assert state["step"] == wanted["step"] and state["rows"] == wanted["rows"]
    except UserError as error:
        assert "no intact checkpoint" in str(error) or "is not a benchtop" in str(error)
    finally:
        path.write_bytes(whole)


# ------------------------------------------------------------------------------------------------
# Odd texts
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("texts", [
    pytest.param(["one row, and no more than that"] * 1, id="one row"),
    pytest.param(["a b c " * 40, "d e f " * 40], id="two rows"),
    pytest.param(["x" * 2**20], id="a megabyte of one character"),
    pytest.param(["word " * 30000, "other " * 50], id="documents longer than a shard and a row"),
    pytest.param(["", " ", "", "text " * 100, ""] * 3, id="empty documents"),
    pytest.param(["\0\x01\ufeff\U0010ffff" * 100, "é" * 500], id="odd characters"),
])
def test_odd_texts_train_or_end_in_one_line(bench, command, monkeypatch, capsys, write_rows, texts):
    write_rows(bench / "odd.jsonl", texts)
    command("train_tokenizer.py --source odd.jsonl --vocabsize 260 --name odd --num_workers 1")
    tokenizer, = (bench / "tokenizers").iterdir()
    try:
        command(f"download_fineweb.py --version odd.jsonl --tokenizer {tokenizer.name} --name odd "
                "--num_workers 1 --shard_size 1000")
    except SystemExit as end:
        assert len(str(end.code).splitlines()) == 1
        return
    monkeypatch.setattr(places, "ROOT", ROOT)       # where the script stands that is run
    knobs = flags(num_steps=2, seq_len=8, batch_tokens=32, max_doc_len=16)
    said = main_ends_well(monkeypatch, capsys, knobs)
    if not said:
        folder, = (bench / "experiments").iterdir()
        assert [float(row["train_loss"]) > 0 for row in rows_of(folder)] == [True, True]
