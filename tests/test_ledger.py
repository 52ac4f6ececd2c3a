"""The ledger of trials. Run: ./run.sh test tests/test_ledger.py"""

import dataclasses
import threading

import pytest

from benchtop import ledger, ledger_page, places

ENTRY = ledger.Entry("2026-11-26T22:40:00Z", "t", "lr2", "0123456789ab", "val_bpb", 1.25, 1.24, 0.01, -0.001,
                     0.02, 3, 3_000_000, 12.5, 800.0, "keep", "val", "fedcba987654", "twice the rate")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "EXPERIMENTS", tmp_path / "experiments")


def test_what_is_added_is_read_back_and_earlier_lines_stay():
    failed = dataclasses.replace(ENTRY, idea="broken", verdict="crash", baseline=None, value=None, gain=None,
                                 low=None, high=None, runs=0, tokens=0, seconds=0.0, memory_mib=None)
    ledger.add(ENTRY)
    before = ledger.path().read_bytes()
    ledger.add(failed)
    assert ledger.path().read_bytes().startswith(before)
    assert ledger.read() == [ENTRY, failed]


def test_a_description_cannot_break_the_table():
    ledger.add(dataclasses.replace(ENTRY, description='a\tb\n"c" \u2028 d\r\ne'))
    ledger.add(ENTRY)
    assert [entry.description for entry in ledger.read()] == ['a b "c" d e', ENTRY.description]


def test_lines_of_processes_at_once_are_all_there():
    threads = [threading.Thread(target=ledger.add, args=[dataclasses.replace(ENTRY, runs=number)])
               for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.runs for entry in ledger.read()) == list(range(20))


def test_ledgers_of_other_versions_are_read_and_added_to(capsys):
    ledger.add(ENTRY)
    lines = ledger.path().read_text().splitlines()
    ledger.path().write_text(f"{lines[0]}\tnew\n{lines[1]}\tvalue\n")
    assert ledger.read() == [ENTRY]
    later = lines[1].replace("keep", "perhaps")
    ledger.path().write_text(f"{lines[0]}\n{later}\n")
    assert ledger.read()[0].verdict == "perhaps"
    # a column fewer, as before it was added; the new line keeps to the columns that are there
    cut = ["\t".join(line.split("\t")[:-2]) for line in lines]
    ledger.path().write_text("\n".join([*cut, ""]))
    ledger.add(dataclasses.replace(ENTRY, idea="b", baseline_key="abc"))
    assert ledger.read() == [ENTRY, dataclasses.replace(ENTRY, idea="b")]
    assert {line.count("\t") for line in ledger.path().read_text().splitlines()} == {cut[0].count("\t")}
    ledger.path().unlink()
    assert ledger.read() == []


def test_a_damaged_line_is_left_out_with_a_word_and_the_next_one_is_whole(capsys):
    ledger.add(ENTRY)
    lines = ledger.path().read_text().splitlines()
    for damaged in ("half a line", lines[1].replace("1.25", "x")):
        ledger.path().write_text(f"{lines[0]}\n{lines[1]}\n{damaged}")     # the disk was full
        ledger.add(dataclasses.replace(ENTRY, idea="b"))
        assert [entry.idea for entry in ledger.read()] == ["lr2", "b"]
        assert "left out: line 3 of ledger.tsv is not an entry" in capsys.readouterr().err


def test_what_was_not_confirmed_is_not_the_best(monkeypatch):
    drawn = []
    monkeypatch.setattr(ledger_page, "drawn", lambda points, metric, failed: drawn.append(failed) or "<svg/>")
    ledger_page.curve([ENTRY, dataclasses.replace(ENTRY, verdict="not confirmed", split="test")])
    assert drawn == [{ENTRY.change}]
    once, later = (dataclasses.replace(ENTRY, verdict=verdict, split="test")
                   for verdict in ("not confirmed", "confirmed"))
    ledger_page.curve([ENTRY, once, later])
    assert drawn.pop() == set()
    # other flags of all runs make another picture
    ledger_page.curve([ENTRY, dataclasses.replace(ENTRY, shared_flags="--num_steps 9")])
    assert len(drawn) == 3


def test_the_page_has_a_row_and_the_patch_of_each_idea_and_what_they_say_is_no_markup():
    kept = dataclasses.replace(ENTRY, description="<script>alert(1)</script> & more")
    failed = dataclasses.replace(ENTRY, idea="broken", verdict="crash", baseline=None, value=None, gain=None,
                                 low=None, high=None)
    folder = places.EXPERIMENTS / "trials/t"
    folder.mkdir(parents=True)
    (folder / "lr2.diff").write_text("-a < b\n+a > b\n")
    page = ledger_page.page([kept, failed])
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page and "<script>" not in page
    assert page.count("<tr class=") == 2 and page.count("<details>") == 1 and "-a &lt; b\n+a &gt; b" in page
    assert "<svg" in page and "2 ideas tried, 1 kept" in page
    assert "<svg" not in ledger_page.page([failed]), "there is nothing to draw"
    assert [line.split()[2:5] for line in ledger_page.as_text([kept, failed]).splitlines()[1:]] == [
        ["t", "lr2", "keep"], ["t", "broken", "crash"]]
