"""Sources of text, the shuffle, worker processes and what all commands share.

Run: ./run.sh test tests/test_documents.py
"""

import argparse
import codecs
import doctest
import gzip
import io
import itertools
import json
import os
import random
import re
import runpy
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import benchtop.command_line
from benchtop import bpe, documents, places, sources
from benchtop.command_line import positive
from benchtop.errors import UserError
from benchtop.held_out import rule_for
from benchtop.sources import open_source
from benchtop.workers import in_parallel

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
TEXTS = ["one\r\ntwo\n", "Größe 東京 🙂", "", " \n"]


def parquet_of(texts, column: str = "text") -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), column: texts}), file)
    return file.getvalue()


def jsonl_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in texts).encode()


def texts_of(path: Path) -> list[str]:
    return [text for _, text in open_source(str(path))]


@pytest.mark.parametrize("module", [sources, bpe])
def test_the_examples_in_the_docstrings_are_true(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


# ------------------------------------------------------------------------------------------------
# Python's library
# ------------------------------------------------------------------------------------------------

def test_stdlib_leaves_out_tests_and_installed_packages(tmp_path, monkeypatch):
    kept = ["a/__init__.py", "a/testing.py", "b.py", "tests.py"]
    for name in [*kept, "test/x.py", "a/tests/x.py", "idlelib/idle_test/x.py", "site-packages/p/x.py",
                 "dist-packages/x.py", "a/__pycache__/x.py", "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dangling.py").symlink_to("nowhere")
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(open_source("stdlib")) == [(f"stdlib/{name}", name) for name in kept]


def test_stdlib_is_each_module_once_in_sorted_order():
    source = open_source("stdlib")
    ids = [name for name, text in source]
    assert ids == sorted(set(ids)) and "stdlib/json/decoder.py" in ids
    assert ids == [name for name, text in source], "a second reading gives the same"


def test_a_python_without_its_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no modules"):
        open_source("stdlib")


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ".TXT"])
def test_a_text_file_is_one_document(tmp_path, kind, packed):
    path = tmp_path / f"notes{kind}{packed}"
    path.write_bytes(PACK[packed]("".join(TEXTS).encode()))
    assert list(open_source(str(path))) == [(str(path), "".join(TEXTS))]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_row_is_a_document(tmp_path, kind, packed):
    path = tmp_path / f"rows{kind}{packed}"
    path.write_bytes(PACK[packed]({".jsonl": jsonl_of, ".parquet": parquet_of}[kind](TEXTS)))
    assert list(open_source(str(path))) == [(f"{path}:{row}", text) for row, text in enumerate(TEXTS, 1)]


def test_an_id_tells_the_line_when_lines_are_empty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"text": "a"}\r\n  \n{"text": "b"}')
    assert list(open_source(str(path))) == [(f"{path}:2", "a"), (f"{path}:4", "b")]


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_compressed_files_may_be_joined(tmp_path, packed):
    path = tmp_path / f"notes.txt{packed}"
    path.write_bytes(b"".join(PACK[packed](text.encode()) for text in TEXTS))
    assert texts_of(path) == ["".join(TEXTS)]


@pytest.mark.parametrize("column", [
    pyarrow.array(["a", None, "b"]), pyarrow.array(["a", "b"], pyarrow.large_string()),
    pyarrow.array(["a", "b"]).dictionary_encode(), pyarrow.array([b"a", b"b"]),
], ids=str)
def test_a_parquet_column_may_be_of_any_text_type(tmp_path, column):
    (tmp_path / "rows.parquet").write_bytes(parquet_of(column))
    assert texts_of(tmp_path / "rows.parquet") == ["a", "b"]


def test_a_parquet_file_of_many_row_groups_keeps_its_order(tmp_path):
    texts = [str(number) for number in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet", row_group_size=300)
    assert texts_of(tmp_path / "rows.parquet") == texts


def test_folders_globs_and_several_paths(bench):
    for name in ("b.txt", "deep/er/a.md", "deep/c.jsonl.gz", "deep/image.png", "README"):
        (bench / name).parent.mkdir(parents=True, exist_ok=True)
        (bench / name).write_bytes(gzip.compress(jsonl_of(["row"])) if name.endswith(".gz") else b"text")

    def ids(*specs: str) -> list[str]:
        return [name for name, _ in open_source(list(specs))]

    assert ids(".") == ["b.txt", "deep/c.jsonl.gz:1", "deep/er/a.md"]
    assert ids("**/*.md") == ids("deep/*/*.md") == ["deep/er/a.md"]
    assert ids("deep", "b.txt") == ["deep/c.jsonl.gz:1", "deep/er/a.md", "b.txt"]
    assert ids("b.txt", "*.txt", ".") == ["b.txt", "deep/c.jsonl.gz:1", "deep/er/a.md"], "each file once"


def test_a_file_whose_name_is_not_utf8_is_read(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"coffee")
    (name, text), = open_source(str(tmp_path))
    assert text == "coffee" and name.encode()


def test_another_file_has_another_label_and_a_change_another_fingerprint(bench):
    for folder in ("old", "new"):
        (bench / folder).mkdir()
        (bench / folder / "notes.txt").write_text(folder)
    old, new = open_source("old/notes.txt"), open_source("new/notes.txt")
    assert old.label != new.label and old.label.startswith("notes-")
    (bench / "new/notes.txt").write_text("old")
    assert open_source("new/notes.txt").label == old.label, "wherever the same file lies"
    assert open_source(str(bench / "old/notes.txt")).label == old.label, "however the file is called"

    again = open_source("old/notes.txt")
    assert (again.label, again.fingerprint) == (old.label, old.fingerprint)
    (bench / "old/notes.txt").write_text("other")
    changed = open_source("old/notes.txt")
    assert changed.label != old.label and changed.fingerprint != old.fingerprint


@pytest.mark.parametrize("name", [
    "notes.txt", ".hidden.txt", "Ω.txt", "a b;c.txt", "..a.txt", "-rf.txt", "two\nlines.txt",
    "x" * 99 + ".txt",
])
def test_a_label_is_safe_in_a_file_name(bench, name):
    (bench / name).write_text("text")
    (bench / "other.txt").write_text("text")        # of a folder, hidden files are no part
    for label in (open_source(name).label, open_source(".").label, open_source([name, "."]).label):
        assert label[0].isalnum() and label.replace("-", "").isalnum() and label.isascii() and len(label) < 40


# ------------------------------------------------------------------------------------------------
# What is no valid UTF-8
# ------------------------------------------------------------------------------------------------

def decoded(raw: bytes) -> tuple[str, int]:
    """The codec's own replacement, and how often it replaced."""
    errors = []
    codecs.register_error("counted", lambda error: errors.append(error) or ("\ufffd", error.end))
    return raw.decode("utf-8", "counted"), len(errors)


@settings(max_examples=150)
@given(raw=st.binary(max_size=12) | st.lists(st.sampled_from(
    [b"a", "é".encode(), b"\xc3", b"\xff", b"\xed\xa0\x80", b"\xf0\x9f", "\ufffd".encode()])).map(b"".join))
def test_invalid_utf8_is_replaced_and_counted(tmp_path_factory, raw):
    folder = tmp_path_factory.getbasetemp()
    raw = "é".encode() * 40 + raw.translate(None, delete=b"\0")     # more of UTF-8 than of something else
    in_json = raw.translate(None, delete=bytes([*range(32), *b'"\\']))
    for name, content, plain in [("a.txt", raw, raw), ("a.jsonl", b'{"text": "%s"}' % in_json, in_json),
                                 ("a.parquet", parquet_of([raw]), raw)]:
        (folder / name).write_bytes(content)
        source = open_source(str(folder / name))
        for _ in range(2):      # the count starts again with each reading
            (_, text), = source
            assert (text, source.replaced) == decoded(plain)


@given(st.lists(st.sampled_from(["a", "🙂", "\ufffd", "\ud800", "\udfff"])))
def test_half_surrogate_pairs_in_json_are_replaced_and_counted(tmp_path_factory, characters):
    path = tmp_path_factory.getbasetemp() / "b.jsonl"
    path.write_bytes(jsonl_of(["\u2028".join(characters)]))     # apart, lest two halves make a pair
    source = open_source(str(path))
    expected = ["\ufffd" if character in ("\ud800", "\udfff") else character for character in characters]
    assert [text for _, text in source] == ["\u2028".join(expected)]
    assert source.replaced == characters.count("\ud800") + characters.count("\udfff")


# ------------------------------------------------------------------------------------------------
# What a person can mend ends in one line
# ------------------------------------------------------------------------------------------------

DAMAGED = {
    "column.jsonl": b'{"body": "a", "two\\nlines": 1}',
    "number.jsonl": b'{"text": 5}',
    "list.jsonl": b'["text"]',
    "half.jsonl": b'{"text": "a"}\n{"text": "b',
    "deep.jsonl": b"[" * 100_000,
    "digits.jsonl": b"1" * 5000,
    "column.parquet": parquet_of(["a"], column="body"),
    "number.parquet": parquet_of([1, 2]),
    "cut.parquet": parquet_of(["a"] * 100)[:-20],
    "junk.parquet": b"no parquet at all",
    "empty.parquet": b"",
    "cut.txt.gz": gzip.compress(b"a long story")[:-4],
    "junk.txt.gz": b"no gzip at all",
    "behind.txt.gz": gzip.compress(b"a long story") + b"junk",
    "bits.txt.gz": gzip.compress(b"a long story")[:10] + b"\xff" * 20,
    "cut.txt.zst": zstandard.compress(b"a long story")[:-4],
    "junk.txt.zst": b"no zstd at all",
    "cut.parquet.gz": gzip.compress(parquet_of(["a"]))[:-4],
    "unknown.docx": b"",
    "unknown": b"",
    "archive.tar.gz": gzip.compress(b""),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_ends_in_one_line_that_names_it(bench, refusal, name):
    (bench / name).write_bytes(DAMAGED[name])
    assert name in refusal(f"benchtop/sources.py {name}")


@pytest.mark.parametrize("spec, hint", [
    ("nowhere.txt", "no file, folder or glob"),
    ("'*.txt'", "no file, folder or glob"),
    ("folder", "holds no .txt"),
    ("stdlib nowhere.txt", "cannot be mixed"),
    ("10B-gpt2", "has tokens, not text"), ("350B-gpt2", "no source named"),
    ("10B-edu", "no source named"),
    ("n" * 300, "File name too long"),
    ("empty.jsonl", "empty"),
    ("", "required"),
    ("stdlib --verbos", "there is no flag --verbos"),
])
def test_a_source_that_is_not_there_ends_in_one_line(bench, refusal, spec, hint):
    (bench / "folder").mkdir()
    (bench / "empty.jsonl").write_text("\n")
    assert hint in refusal(f"benchtop/sources.py {spec}")


def test_an_unreadable_file_ends_in_one_line(bench, refusal):
    (bench / "secret.txt").write_text("a")
    (bench / "secret.txt").chmod(0)
    if os.access(bench / "secret.txt", os.R_OK):
        pytest.skip("this user may read everything")
    assert "secret.txt" in refusal("benchtop/sources.py secret.txt")


@settings(max_examples=300)
@given(st.randoms(use_true_random=False))
def test_no_damage_to_a_parquet_file_raises_another_exception(tmp_path_factory, rng):
    content = bytearray(parquet_of(["some text"] * 50))
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path = tmp_path_factory.getbasetemp() / "c.parquet"
    path.write_bytes(content[:rng.choice([len(content), rng.randrange(len(content))])])
    try:
        texts_of(path)
    except UserError as error:
        assert path.name in str(error)


def test_a_shell_sees_one_line_and_a_failure(bench, shell):
    (bench / "half.jsonl").write_text('{"text": "a')
    for line in ("-m benchtop.sources half.jsonl", "-m benchtop.sources nowhere",
                 "train_tokenizer.py --source half.jsonl", "download_fineweb.py --tokenizer nosuch",
                 "train_tokenizer.py --vocabsiz 300"):
        result = shell(line)
        script = "sources.py" if line.startswith("-m") else line.split()[0]
        assert result.returncode in (1, 2)
        assert not result.stdout
        assert result.stderr.startswith(f"{script}: error: ") and result.stderr.count("\n") == 1


def test_the_command_counts_a_source(command, capsys, pages):
    command("benchtop/sources.py pages.jsonl")
    said = capsys.readouterr().out
    assert said.startswith(f"pages.jsonl:1:\n{pages[0]}"[:500])
    assert f"400 documents, {sum(map(len, pages)):,} characters, 0 invalid" in said
    rule = rule_for(open_source("pages.jsonl"))
    held_out = [text for text in pages if rule.split_of(text) == "val"]
    assert f"; {len(held_out):,} of {sum(map(len, held_out)):,} characters" in said


@pytest.mark.parametrize("error, code, says", [
    (UserError("two\nlines"), "x.py: error: two lines", ""),
    (BrokenProcessPool(), "x.py: error: a worker process was killed", ""),
    (KeyboardInterrupt(), 130, "x.py: interrupted"),
])
def test_a_command_ends_without_a_traceback(monkeypatch, capsys, error, code, says):
    @benchtop.command_line.command
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/some/where/x.py"])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value.code).startswith(str(code)) and says in capsys.readouterr().err


def test_a_flag_that_was_perhaps_meant_is_named(refusal):
    assert "did you mean --vocabsize?" in refusal("train_tokenizer.py --vocabsiz 300")


def test_advice_names_the_command_that_was_typed(refusal):
    assert "(python train_tokenizer.py --help lists" in refusal("train_tokenizer.py --vocabsiz 300")
    assert "(python -m benchtop.sources --help lists" in refusal("benchtop/sources.py stdlib --verbos")


@pytest.mark.parametrize("script", [
    "benchtop/sources", "train_tokenizer", "download_fineweb", "download_hellaswag", "compare", "judge",
    "trial", "convert", "benchmarks/step", "benchmarks/race"])
def test_help_shows_each_default_once(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    monkeypatch.syspath_prepend((places.ROOT / script).parent)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(places.ROOT / f"{script}.py"), run_name="__main__")
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "show this help" in said
    assert not re.search(r"\(default: (None|False)?\)|\(default: [^)]*\) \(default", said)


@given(st.integers() | st.text(max_size=3))
def test_positive_takes_whole_numbers_from_one_on(value):
    try:
        number = positive(str(value))
        assert 1 <= number == (value if isinstance(value, int) else float(value))
    except argparse.ArgumentTypeError:
        assert not (isinstance(value, int) and value >= 1)


@pytest.mark.parametrize("text, number", [
    ("1e6", 10**6), ("2.5E3", 2500), ("4_000_000", 4_000_000), (" 7 ", 7),
    ("1.5", None), ("1e-1", None), ("-1e6", None), ("0", None), ("1e400", None), ("nan", None), ("", None),
])
def test_a_whole_number_may_be_written_for_people(text, number):
    if number:
        assert positive(text) == number
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            positive(text)


# ------------------------------------------------------------------------------------------------
# Shuffle, batches
# ------------------------------------------------------------------------------------------------

def numbered(count: int, characters: int = 10) -> list[tuple[str, str]]:
    return [(str(number), "x" * characters) for number in range(count)]


@given(st.lists(st.tuples(st.text(max_size=2), st.text(max_size=9))), st.integers(), st.integers(0, 100))
def test_a_shuffle_keeps_every_document(given_documents, seed, characters):
    assert Counter(documents.shuffled(given_documents, seed, characters)) == Counter(given_documents)


@pytest.mark.parametrize("characters", [100, 10_000])       # less and more than there are
def test_the_seed_decides_the_order(characters):
    def order(seed: int) -> list:
        return list(documents.shuffled(numbered(200), seed, characters))

    assert order(0) == order(0) and order(1) == order(1)
    assert len({str(order(seed)) for seed in range(5)} | {str(numbered(200))}) == 6


def test_every_order_is_equally_likely():
    orders = Counter(tuple(documents.shuffled(numbered(4), seed)) for seed in range(4800))
    chi_squared = sum((count - 200) ** 2 / 200 for count in orders.values())
    assert len(orders) == 24 and chi_squared < 49.7      # the 0.999 quantile for 23 degrees of freedom


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(0, 200))
def test_a_shuffle_holds_no_more_than_it_may(lengths, characters):
    read = given_back = most = 0

    def source():
        nonlocal read, most
        for number, length in enumerate(lengths):
            read += length
            most = max(most, read - given_back)
            yield str(number), "x" * length

    for _, text in documents.shuffled(source(), 0, characters):
        given_back += len(text)
    assert most <= max(characters, max(lengths)) + max(lengths)     # at least one is held, and one arrives
    assert most >= min(sum(lengths), characters), "but it holds as much as it may"


@given(st.lists(st.text(max_size=9)), st.integers(1, 30))
def test_batches_are_the_texts_in_order_and_just_long_enough(texts, characters):
    batches = list(documents.batched([("name", text) for text in texts], characters))
    assert list(itertools.chain(*batches)) == [("name", text) for text in texts]
    for batch in batches[:-1]:
        *all_but_last, last = (len(text) for _, text in batch)
        assert sum(all_but_last) + last >= characters > sum(all_but_last)


# ------------------------------------------------------------------------------------------------
# Worker processes
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_give_results_in_the_order_of_the_tasks(num_workers):
    tasks = [str(random.Random(number).random()) for number in range(50)]
    assert list(in_parallel(float, tasks, num_workers)) == list(map(float, tasks))
    assert list(in_parallel(float, [], num_workers)) == []


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_few_tasks_are_under_way_at_once(num_workers):
    taken = 0

    def tasks():
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    for done, _ in enumerate(in_parallel(abs, tasks(), num_workers), 1):
        assert taken <= done + 2 * num_workers


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_exception_in_a_worker_arrives(num_workers):
    results = in_parallel(int, ["1", "2", "three", "4"], num_workers)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_tasks_nobody_waits_for_are_given_up():
    results = in_parallel(time.sleep, itertools.repeat(0.01), 2)
    next(results)
    started = time.perf_counter()
    results.close()
    assert time.perf_counter() - started < 5


def test_a_killed_worker_is_told():
    with pytest.raises(BrokenProcessPool):
        list(in_parallel(os._exit, [1], 2))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_setup_comes_first_in_each_worker(bench, num_workers):
    (bench / "there").mkdir()
    results = in_parallel(os.path.abspath, ["x"] * 20, num_workers, os.chdir, ("there",))
    assert set(results) == {str(bench / "there" / "x")}


def test_workers_end_when_their_parent_is_killed(bench, shell):
    program = ("import itertools, time; from benchtop.workers import in_parallel; "
               "list(in_parallel(time.sleep, itertools.repeat(0.01), 2, print, ('up',)))")
    process = shell(f'-u -c "{program}"', start=True)
    assert process.stdout.readline() == process.stdout.readline() == "up\n"
    process.kill()
    process.communicate(timeout=20)     # reads to the end, and the end comes when the last worker is gone


def test_importing_does_nothing(bench, shell):
    before = sorted(bench.iterdir())
    program = "import sys, train_tokenizer, download_fineweb; sys.exit('torch' in sys.modules)"
    result = shell(f'-B -W error -c "{program}" --argument', stderr=subprocess.STDOUT)
    assert (result.returncode, result.stdout) == (0, "") and sorted(bench.iterdir()) == before


def test_a_null_is_no_document(bench):
    (bench / "null.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    assert [text for _, text in open_source("null.jsonl")] == ["a"]
