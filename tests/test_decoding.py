"""Text in any encoding: decoded by what it says of itself, or refused by name; garbage is never trained on.

Run: ./run.sh test tests/test_decoding.py
"""

import codecs
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

from benchtop import decoding, documents
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
    assert doctest.testmod(decoding) == (0, 2)


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


# what a mark or a comment says of a file that is something else behind it
BELIED = {
    "ASCII behind UTF-16": ENGLISH.encode("utf-16") + ENGLISH.encode(),
    "CRLF behind UTF-16": ENGLISH.encode("utf-16") + b"one line\r\n",
    "one short line behind UTF-16": ENGLISH.encode("utf-16") + b"one line\n",
    "ASCII within UTF-16": ENGLISH.encode("utf-16") + b"2 lines\r\n" * 2 + ENGLISH.encode("utf-16-le"),
    "Russian behind UTF-16": ENGLISH.encode("utf-16") + "Война и мир, том первый и второй\n".encode() * 2,
    "ASCII behind Chinese": "今天天气很好\n".encode("utf-16") * 9 + ENGLISH.encode() * 9,
    "UTF-8 with a mark behind UTF-16": ENGLISH.encode("utf-16") + ENGLISH.encode("utf-8-sig"),
    "ASCII behind UTF-16BE": codecs.BOM_UTF16_BE + ENGLISH.encode("utf-16-be") + ENGLISH.encode(),
    "UTF-16 behind the mark of UTF-8": codecs.BOM_UTF8 + ENGLISH.encode("utf-16"),
    "NULs": codecs.BOM_UTF8 + b"a" + bytes(9), "NULs in UTF-16": ("ab" + "\0" * 9).encode("utf-16"),
    "Latin-1": codecs.BOM_UTF8 + "Größe\n".encode("latin-1") * 100,
    "noise": codecs.BOM_UTF8 + random.Random(0).randbytes(500),
    "noise in UTF-16": codecs.BOM_UTF16_LE + random.Random(0).randbytes(500),
    "noise in UTF-32": codecs.BOM_UTF32_LE + random.Random(0).randbytes(500),
    "NULs in Latin-1": b"# coding: latin-1\n'Gr\xf6\xdfe'\0\n"}


@pytest.mark.parametrize("raw", BELIED.values(), ids=BELIED)
def test_what_a_mark_or_a_comment_says_is_not_believed_against_the_bytes(tmp_path, raw):
    (tmp_path / "a.py").write_bytes(raw)
    refused(tmp_path / "a.py")


@pytest.mark.parametrize("text", [
    "あいうえおかきくけこさしすせそたちつてとなにぬねの" * 3,
    "今天天气很好，我们去公园。\r\n" * 9, "扡搠晥" * 9,
    "안녕하세요 세계\n" * 9, "Война и мир\r\n" * 9, ENGLISH.replace("\n", "\r\n") * 9, "🙂" * 99,
    "呵呵呵" * 30, "a\n\ufeffb"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_marked_text_of_any_script_is_read(tmp_path, text, encoding):
    (tmp_path / "a.txt").write_bytes(("\ufeff" + text).encode(encoding))
    assert texts_of(tmp_path / "a.txt") == [text]


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
        before, new = path.read_bytes(), path.with_name(f"it's.utf8{kind}{packed}")
        subprocess.run(said.split("with: ")[1], shell=True, check=True)
        assert f"use {new} instead" in said and texts_of(new) == [text]
        assert path.read_bytes() == before, "it may be the only copy"


@pytest.mark.parametrize("encoding, text", [
    ("cp1252", "Größe\n"), ("cp1252", "naïve café and so on"), ("cp1252", "d’été – … " + "etc. " * 9999),
    ("cp1251", "Война и мир\n"), ("koi8-r", "Война и мир\n"), ("shift-jis", "東京の天気は良い\n"),
    ("gb18030", "今天天气很好\n"), ("euc-kr", "안녕하세요 세계\n")])
def test_encodings_of_other_scripts_are_refused(tmp_path, encoding, text):
    (tmp_path / "a.txt").write_bytes((text * (1 if encoding == "cp1252" else 20)).encode(encoding))
    assert "is not UTF-8" in refused(tmp_path / "a.txt")


@pytest.mark.parametrize("raw, what", [
    (b"\x7fELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0>", "a program"), (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PNG"),
    (b"PK\3\4\x14\0\0\0\x08\0", "zip"), (gzip.compress(b"text", mtime=0), "gzip"), (b"%PDF-1.7\ntext", "PDF"),
    (zstandard.compress(b"text"), "zstandard"), (random.Random(0).randbytes(500), "NULs, so it is not text"),
    (bytes(range(256)) * 4, "NULs, so it is not text"), (bytes(range(128)), "NULs, so it is not text")],
    ids=["ELF", "PNG", "zip", "gzip", "PDF", "zstandard", "noise", "every byte", "every ASCII"])
@pytest.mark.parametrize("packed", PACK)
def test_a_binary_file_that_is_called_text_is_refused_without_a_command(tmp_path, raw, what, packed):
    (tmp_path / f"a.txt{packed}").write_bytes(PACK[packed](raw))
    said = refused(tmp_path / f"a.txt{packed}")
    assert what in said and "remove it from" in said and " < " not in said


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["no mark", "a mark"])
@pytest.mark.parametrize("raw", [b"a\0b", b"abc def\0ghi jkl\n", b"one\0two\0"])
def test_text_with_a_few_nuls_is_not_taken_for_utf_16(tmp_path, raw, mark):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + raw)
    said = refused(path)
    assert f"contains NULs ({raw.count(0)})" in said and "UTF-16" not in said
    subprocess.run(said.split("with: ")[1], shell=True, check=True)
    assert texts_of(tmp_path / "a.utf8.txt") == [raw.replace(b"\0", b"").decode()]
    assert path.read_bytes() == mark + raw


@pytest.mark.parametrize("text", ["안녕하세요세계여러분", "今天天气很好我们去公园", "今天天气很好\n" * 9,
                                  "Война и мир\n" * 9])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_of_other_scripts_is_not_called_western(tmp_path, text, encoding):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert "Western" not in refused(tmp_path / "a.txt")


@pytest.mark.parametrize("encoding", ["iso-2022-jp", "iso-2022-kr"])
def test_iso_2022_is_refused_by_its_escapes(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(("東京\n" if encoding.endswith("jp") else "세계\n").encode(encoding))
    assert f"is in {encoding.upper()}; use " in refused(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"\x1b(B\x1b[m of a terminal\n")
    assert texts_of(tmp_path / "a.txt") == ["\x1b(B\x1b[m of a terminal\n"]


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


def parquet_of(path, rows, kind=None) -> str:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows, kind)}), file)
    path.write_bytes(file.getvalue())
    return str(path)


def test_a_few_odd_rows_stop_nothing_and_their_file_is_named(tmp_path):
    good = ["é" * 20] * 9
    rows = [b"\xff" * 9, b"\0\0", ENGLISH.encode("utf-16"), *(text.encode() for text in good)]
    source = open_source(parquet_of(tmp_path / "rows.parquet", rows))
    for _ in range(2):
        assert [text for _, text in source] == ["\ufffd" * 9, "\0\0", ENGLISH, *good]
    said, more = source.replaced_in_words().split("; ")
    assert said.startswith("replaced 9 invalid UTF-8 sequences by U+FFFD in ")
    assert said.endswith("rows.parquet (9)")
    assert more == f"kept 1 row with NULs or ISO-2022 escapes in {tmp_path}/rows.parquet (1)"

    rows = [b'{"text": "%s"}\n' % ("é".encode() * 20)] * 9 + [b'{"text": "\xff\xff\xff\xff"}\n']
    (tmp_path / "rows.parquet").unlink()
    (tmp_path / "rows.jsonl").write_bytes(b"".join(rows))
    source = open_source(str(tmp_path))
    assert [text for _, text in source][-1] == "\ufffd" * 4 and "rows.jsonl (4)" in source.replaced_in_words()


ODD = {"UTF-16": ENGLISH.encode("utf-16-le"), "ISO-2022-JP": "東京".encode("iso-2022-jp"), "NULs": b"a\0b"}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_file_in_which_most_rows_are_odd_is_refused_but_not_on_the_hub(tmp_path, odd):
    path = tmp_path / "rows.parquet"
    parquet_of(path, [odd] * 3 + [b"good"] * 2)
    assert "rows.parquet: 3 of 5 rows contain NULs or ISO-2022 escapes" in refused(path)
    source = open_source(str(path))
    assert len(list(source._read_parquet("rows", path))) == 5      # as hub.py reads
    assert source.replaced_in_words() == "kept 3 rows with NULs or ISO-2022 escapes in rows (3)"
    lines = "".join(json.dumps({"text": text.decode()}) + "\n" for text in [odd] * 3 + [b"good"] * 2)
    (tmp_path / "rows.jsonl").write_text(lines)
    assert "rows.jsonl: 3 of 5 rows contain NULs or ISO-2022 escapes" in refused(tmp_path / "rows.jsonl")


def test_rows_of_another_encoding_are_refused_wherever_they_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BEGINNING", 100)
    lines = b'{"text": "plain"}\n' * 20 + '{"text": "Größe"}\n'.encode("latin-1") * 9
    (tmp_path / "rows.jsonl").write_bytes(lines)
    assert "is not UTF-8 throughout: 18 invalid" in refused(tmp_path / "rows.jsonl")
    parquet_of(tmp_path / "rows.parquet", [b"plain"] * 20 + ["Größe".encode("latin-1")] * 9)
    assert "is not UTF-8 throughout: 18 invalid" in refused(tmp_path / "rows.parquet")
    wide = ('{"text": "plain"}\n' * 20).encode("utf-16") + b'{"text": "appended"}\r\n'
    (tmp_path / "rows.jsonl").write_bytes(wide)
    assert "begins as UTF-16LE" in refused(tmp_path / "rows.jsonl")


def test_a_parquet_file_has_one_column_of_text(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet_of(path, [1, 2])
    assert "has int64 in the column text, which must be string or binary" in refused(path)
    for kind in ("string", "large_string", "binary", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        assert texts_of(parquet_of(path, ["a", "b"], kind)) == ["a", "b"]
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, path)
    assert "has 2 columns named text; rename all but one" in refused(path)


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
