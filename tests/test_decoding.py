"""Text in any encoding: decoded by what it says of itself, or refused by name; garbage is never trained on.

Run: ./run.sh test tests/test_decoding.py
"""

import doctest
import gzip
import io
import json
import random
import shutil
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from benchtop import decoding
from benchtop.decoding import MARKS
from benchtop.errors import UserError
from benchtop.held_out import rule_for
from benchtop.sources import open_source

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
TEXT = "Größe 東京 🙂\r\nfor x in y:\n    pass\n"
ENGLISH = "for x in y:\n    pass  # the end\n"


def texts_of(path) -> list[str]:
    return [text for _, text in open_source(str(path))]


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        texts_of(path)
    assert "\n" not in str(error.value) and path.name in str(error.value)
    return str(error.value)


def test_the_example_in_the_docstring_is_true():
    assert doctest.testmod(decoding) == (0, 1)


# ------------------------------------------------------------------------------------------------
# Byte order marks
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mark, encoding", MARKS, ids=[encoding for _, encoding in MARKS])
@pytest.mark.parametrize("packed", PACK)
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(tmp_path, mark, encoding, packed):
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in (TEXT, "b"))
    for kind, content in (*((kind, TEXT) for kind in (".txt", ".md", ".py")), (".jsonl", rows)):
        path = tmp_path / f"notes{kind}{packed}"
        raw = mark + content.encode(encoding)
        path.write_bytes(PACK[packed](raw + raw if kind == ".jsonl" else raw))      # two that were joined
        source = open_source(str(path))
        assert [text for _, text in source] == ([TEXT, "b", TEXT, "b"] if kind == ".jsonl" else [TEXT])
        assert source.replaced == 0 and source.replaced_in_words() == ""


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=30),
       st.sampled_from(MARKS))
def test_a_marked_text_comes_back_whole(text, marked):
    mark, encoding = marked
    assert decoding.decode(mark + text.encode(encoding)) == (text, 0)


def test_a_text_with_and_without_its_mark_is_one_document_of_one_side(tmp_path):
    rows = [f"document {number}" for number in range(400)]
    both = [f"{mark}{row}" for row in rows for mark in ("", "\ufeff")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in both))
    lines = "".join(f'\ufeff{{"text": "{row}"}}\n' for row in rows)      # as of files that were joined
    (tmp_path / "more.jsonl").write_text(lines, encoding="utf-8")
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": both}), file)
    (tmp_path / "rows.parquet").write_bytes(file.getvalue())
    source = open_source(str(tmp_path))
    assert len(list(source)) == 5 * 400 and {text for _, text in source} == set(rows)
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert rule_for(source) == rule_for(open_source(str(tmp_path / "plain.jsonl")))


def test_a_mark_within_a_text_stays(tmp_path):
    (tmp_path / "a.txt").write_text("a\ufeffb", encoding="utf-8-sig")
    assert texts_of(tmp_path / "a.txt") == ["a\ufeffb"]


@pytest.mark.parametrize("mark, encoding", MARKS, ids=[encoding for _, encoding in MARKS])
def test_a_file_cut_within_a_character_ends_in_one_replacement(tmp_path, mark, encoding):
    (tmp_path / "a.txt").write_bytes(mark + "ab🙂".encode(encoding)[:-1])
    source = open_source(str(tmp_path))
    (_, text), = source
    assert text.startswith("ab") and text.rstrip("\ufffd") in ("ab", "ab\ufffd") and source.replaced == 1


# ------------------------------------------------------------------------------------------------
# No mark
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE", "cp1252"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ".jsonl"])
@pytest.mark.parametrize("packed", PACK)
def test_another_encoding_is_refused_with_a_command_that_mends_it(tmp_path, encoding, kind, packed):
    text = "Größe, Maß und Übermut\n" * 3
    path = tmp_path / f"it's{kind}{packed}"
    content = json.dumps({"text": text}, ensure_ascii=False) if kind == ".jsonl" else text
    path.write_bytes(PACK[packed](content.encode(encoding)))
    said = refused(path)
    assert encoding.upper() in said
    tools = ["iconv"] + {".gz": ["gzip"], ".zst": ["zstd"], "": []}[packed]
    if all(map(shutil.which, tools)):
        subprocess.run(said.split("with: ")[1], shell=True, check=True)
        assert texts_of(path) == [text]
        assert [*tmp_path.iterdir()] == [path], "the old one would be a second document"


@pytest.mark.parametrize("encoding, text", [
    ("cp1252", "Größe\n"), ("cp1252", "naïve café and so on"), ("cp1252", "d’été – … " + "etc. " * 9999),
    ("cp1251", "Война и мир\n"), ("koi8-r", "Война и мир\n"), ("shift-jis", "東京の天気は良い\n"),
    ("gb18030", "今天天气很好\n"), ("euc-kr", "안녕하세요 세계\n")])
def test_encodings_of_other_scripts_are_refused(tmp_path, encoding, text):
    (tmp_path / "a.txt").write_bytes((text * (1 if encoding == "cp1252" else 20)).encode(encoding))
    assert "is not UTF-8" in refused(tmp_path / "a.txt")


@pytest.mark.parametrize("raw", [
    b"a\0b", b"\x7fELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0>", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"PK\3\4\x14\0\0\0\x08\0", gzip.compress(b"text", mtime=0), random.Random(0).randbytes(500)],
    ids=["a NUL", "ELF", "PNG", "zip", "gzip", "noise"])
def test_a_binary_file_that_is_called_text_is_refused(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    refused(tmp_path / "a.txt")


@pytest.mark.parametrize("raw, replaced", [
    (ENGLISH.encode() + "é".encode()[:1], 1), (b"\xa9 cut at the beginning", 1),
    (b"three \xff\n strays \xff\n only \xff" + ENGLISH.encode() * 9, 3), ("é".encode() * 9 + b"\xff" * 9, 9),
])
def test_a_few_stray_bytes_are_replaced_and_their_files_named(tmp_path, raw, replaced):
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text("whole")
    source = open_source(str(tmp_path))
    for _ in range(2):
        assert sum(text.count("\ufffd") for _, text in source) == source.replaced == replaced + 1
    said = source.replaced_in_words()
    assert f"{replaced + 1} invalid UTF-8 sequences" in said and "2 files" in said
    assert all(f"{tmp_path / name} ({count})" in said for name, count in (("a.txt", replaced), ("b.txt", 1)))
    assert "c.txt" not in said


def test_odd_rows_stop_nothing_and_their_file_is_named(tmp_path):
    file = io.BytesIO()
    rows = [b"\xff" * 9, b"\0\0", ENGLISH.encode("utf-16")]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), file)
    (tmp_path / "rows.parquet").write_bytes(file.getvalue())
    source = open_source(str(tmp_path))
    assert [text for _, text in source] == ["\ufffd" * 9, "\0\0", ENGLISH]
    assert source.replaced_in_words().startswith("replaced 9 invalid UTF-8 sequences by U+FFFD in ")
    assert source.replaced_in_words().endswith("rows.parquet (9)")

    rows = [b'{"text": "%s"}\n' % ("é".encode() * 20)] * 9 + [b'{"text": "\xff\xff\xff\xff"}\n']
    (tmp_path / "rows.parquet").unlink()
    (tmp_path / "rows.jsonl").write_bytes(b"".join(rows))
    source = open_source(str(tmp_path))
    assert [text for _, text in source][-1] == "\ufffd" * 4 and "rows.jsonl (4)" in source.replaced_in_words()


# ------------------------------------------------------------------------------------------------
# Python says it in a comment (PEP 263)
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "koi8-r", "shift-jis", "utf-8"])
@pytest.mark.parametrize("first", ["", "#!/usr/bin/env python\n"])
def test_a_python_source_is_read_in_the_encoding_that_it_names(tmp_path, encoding, first):
    letters = {"koi8-r": "Война", "shift-jis": "東京"}.get(encoding, "Größe")
    text = f"{first}# -*- coding: {encoding} -*-\n{letters} = '{letters * 9}'\n"
    (tmp_path / "a.py").write_bytes(text.encode(encoding))
    assert texts_of(tmp_path / "a.py") == [text]
    if encoding != "utf-8":
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        refused(tmp_path / "a.txt")


@pytest.mark.parametrize("named", ["nonsense", "rot13", "utf-16", "undefined", "mbcs"])
def test_a_name_that_does_not_fit_is_passed_over(tmp_path, named):
    (tmp_path / "a.py").write_text(f"# coding: {named}\nx = 12\n")
    assert texts_of(tmp_path / "a.py") == [f"# coding: {named}\nx = 12\n"]
    (tmp_path / "a.py").write_bytes(f"# coding: {named}\nx = 'Größe {'ü' * 9}'\n".encode("cp1252"))
    assert "CP1252" in refused(tmp_path / "a.py")
