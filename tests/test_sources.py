"""Which files a folder or a glob stands for, and that what is left out is said in one line.

Run: ./run.sh test tests/test_sources.py
"""

import errno
import gzip
import os
from pathlib import Path

import pytest

from benchtop import sources
from benchtop.errors import UserError
from benchtop.processes import TORCHRUNS
from benchtop.sources import open_mixture, open_source


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


def ids(*specs: str) -> list[str]:
    return [name for name, _ in open_source(list(specs))]


@pytest.fixture
def said(bench, capsys):
    """What was said since it was asked last, without the beginning."""
    def read() -> str:
        line = capsys.readouterr().out
        assert line.count("\n") == bool(line)
        return line.removeprefix("note: left out ").rstrip("\n")
    return read


# ------------------------------------------------------------------------------------------------
# What is left out
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec", ["h", "h/**/*", "h/**", "**/*", "h/**/*.txt"])
def test_what_nobody_wrote_to_be_read_is_left_out(bench, said, spec):
    write("h/a.txt", "h/deep/b.txt", "h/.hidden.txt", "h/._a.txt", "h/.git/d.txt",
          "h/.ipynb_checkpoints/a.txt", "h/deep/__pycache__/c.txt", "h/__MACOSX/a.txt",
          "h/node_modules/p/readme.txt", "h/env/pyvenv.cfg", "h/env/lib/p/m.txt")
    assert ids(spec) == ["h/a.txt", "h/deep/b.txt"]
    assert said() == ("4 hidden (h/._a.txt, ...), 4 made by tools (h/__MACOSX, ...)")


@pytest.mark.parametrize("spec", [".mine", ".mine/*.txt", ".mine/**/*.txt", ".mine/..", "x/../.mine/a.txt",
                                  "node_modules", "env"])
def test_what_is_named_is_read(bench, said, spec):
    write(".mine/a.txt", "x/a.txt", "node_modules/a.txt", "env/a.txt", "env/pyvenv.cfg")
    assert ids(spec) and ids(spec)[0].endswith("a.txt")


def test_a_folder_of_nothing_but_hidden_files_says_so(bench):
    write("h/.a.txt")
    with pytest.raises(UserError, match=r"holds no .txt.*; left out 1 hidden \(h/.a.txt\)"):
        open_source("h")


@pytest.mark.parametrize("spec", ["h", "h/*"])
def test_other_kinds_are_counted(bench, said, spec):
    write("h/a.txt", "h/image.png", "h/table.csv")
    os.mkfifo("h/pipe.txt")
    assert ids(spec) == ["h/a.txt"] and said() == "3 of unknown kind (h/image.png, ...)"


def test_nothing_left_out_is_nothing_said(bench, said):
    write("a.txt")
    assert ids(".", "a.txt", "*.txt") == ["a.txt"] and said() == ""


def test_under_torchrun_the_first_process_says_it(bench, said, monkeypatch):
    write("h/a.txt", "h/.b.txt")
    for name, value in zip(TORCHRUNS, ("1", "2", "1", "2", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    assert ids("h") and said() == ""


def test_what_cannot_be_read_is_left_out_of_a_folder(bench, said, monkeypatch):
    write("h/a.txt", "h/closed.txt", "h/secret/b.txt")
    listed, access = Path.iterdir, os.access

    def closed(folder):     # root may read everything, so that chmod would not do
        if folder.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", closed)
    monkeypatch.setattr(sources.os, "access",
                        lambda path, mode: "closed" not in str(path) and access(path, mode))
    assert ids("h") == ["h/a.txt"] and said() == "2 unreadable (h/closed.txt, ...)"


def test_odd_names_stay_in_one_line(bench, said):
    write("h/two\nlines.txt", "h/two\nlines.png")
    with open(b"h/caf\xe9.png", "wb"), open(b"h/caf\xe9.txt", "wb"):
        pass
    assert ids("h") == ["h/caf\\xe9.txt", "h/two\nlines.txt"]
    assert said() == "2 of unknown kind (h/caf\\xe9.png, ...)"
    Path("h/two\nlines.txt").write_bytes(b"\xff")
    source = open_source("h")
    assert list(source) and source.replaced_in_words().endswith(" by U+FFFD in h/two lines.txt (1)")


# ------------------------------------------------------------------------------------------------
# Links
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec", ["src", "src/**/*.txt", "src/**"])
def test_links_are_followed(bench, said, spec):
    write("src/a.txt", "real/b.txt", "real/deep/c.txt", "elsewhere.txt")
    Path("src/books").symlink_to("../real")
    Path("src/z.txt").symlink_to("../elsewhere.txt")
    assert ids(spec) == ["src/a.txt", "src/books/b.txt", "src/books/deep/c.txt", "src/z.txt"]
    assert said() == ""


@pytest.mark.parametrize("spec", ["src", "src/**/*.txt"])
def test_loops_end_and_each_file_counts_once(bench, said, spec):
    write("src/a.txt", "src/z/b.txt")
    for number in range(3):     # 3**40 ways, if each were gone
        Path(f"src/z/loop{number}").symlink_to("..")
    Path("src/again").symlink_to("z")       # comes first by its name; the folder itself is preferred
    assert ids(spec) == ["src/a.txt", "src/z/b.txt"] and said() == "4 found twice (src/again, ...)"


def test_a_file_by_two_names_is_one_document(bench, said):
    write("src/a.txt")
    Path("src/b.txt").symlink_to("a.txt")
    assert ids("src") == ["src/a.txt"] and said() == "1 found twice (src/b.txt)"
    assert ids("src/b.txt", str(bench / "src"), "./src") == ["src/b.txt"]


def test_links_to_nothing_are_said(bench, said):
    write("src/a.txt")
    Path("src/b.txt").symlink_to("nowhere")
    Path("src/c.txt").symlink_to("c.txt")       # to itself
    assert ids("src") == ["src/a.txt"] and said() == "2 linked to nothing (src/b.txt, ...)"
    with pytest.raises(UserError, match=r"src/b\.txt is a link to nowhere, which does not exist"):
        open_source("src/b.txt")


def test_links_and_what_is_left_out_do_not_change_a_label(bench):
    write("one/a.txt", "one/b.txt", "two/a.txt")
    Path("two/b.txt").symlink_to("../one/b.txt")
    Path("two/.x.txt").write_text("x")
    for name in ("one", "two"):
        Path(name, "b.txt").write_text("b")
        Path(name, "a.txt").write_text("a")
    assert open_source("one").fingerprint == open_source("two").fingerprint


# ------------------------------------------------------------------------------------------------
# Extremes
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_compressed_file_of_no_bytes_is_damaged(bench, packed):
    Path(f"a.txt{packed}").touch()
    with pytest.raises(UserError, match=f"a.txt{packed} is cut off or damaged: it is empty"):
        list(open_source("."))


@pytest.mark.parametrize("specs", [[""], ["a.txt", ""], ["", "a.txt=0.5"]])
def test_an_empty_name_of_a_source_is_not_this_folder(bench, specs):
    write("a.txt")
    for opened in (open_source, open_mixture):
        with pytest.raises(UserError, match="the name of a source is empty"):
            opened(specs)
    with pytest.raises(UserError, match="the name of a source is empty"):
        open_source("")


def test_empty_files_and_white_space_are_documents_of_what_they_hold(bench):
    for name, text in (("a.txt", ""), ("b.md", " \n\t"), ("c.jsonl", "\n  \r\n"), ("d.txt", "\ufeff")):
        Path(name).write_text(text, encoding="utf-8")
    Path("e.txt.gz").write_bytes(gzip.compress(b""))
    assert [text for _, text in open_source(".")] == ["", " \n\t", "", ""]


def test_white_space_is_no_text(refusal, monkeypatch):
    Path("a.txt").write_text(" " * 999 + "\n")
    Path("b.jsonl").write_text('{"text": ""}\n{"text": "\\t"}\n')
    assert "is only white space" in refusal("train_tokenizer.py --num_workers 1 --source a.txt b.jsonl")
    monkeypatch.setattr("sys.argv", ["sources.py", "a.txt", "b.jsonl"])
    with pytest.raises(SystemExit, match=r"white space \(1,001 characters\)"):
        sources.main()


BAD = '{"text": "a"}\n{"text": 5}\n\n{"text": "b"}\nnothing\n{"body": "c"}\n'


@pytest.mark.parametrize("packed, pack", [("", bytes), (".gz", gzip.compress)])
def test_a_bad_line_comes_with_the_command_that_drops_all_of_them(bench, packed, pack):
    path = Path(f"rows.jsonl{packed}")
    path.write_bytes(pack(BAD.encode()))
    with pytest.raises(UserError, match=r"line 2 has no text .*; to drop all 3 bad lines, use ") as error:
        list(open_source(str(path)))
    before = path.read_bytes()
    os.system(str(error.value).split("with: ")[1])
    assert f"use rows.good.jsonl{packed} instead" in str(error.value) and path.read_bytes() == before
    assert [text for _, text in open_source(f"rows.good.jsonl{packed}")] == ["a", "b"]


@pytest.mark.parametrize("content, says", [
    ('{"text": "a"}\n{"text": "b',      # a download that was cut
     "; to drop it, use rows.good.jsonl instead, made with: sed '2d' <"),
    ('{"body": "a"}\n' * 9, "its columns are body"),
    ('{"body": "a"}\n' * 99, "; 20 or more other lines are bad"),
])
def test_a_file_of_nothing_but_bad_lines_is_not_to_be_emptied(bench, content, says):
    Path("rows.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        list(open_source("rows.jsonl"))
    assert says in str(error.value) and ("sed" in str(error.value)) == ("sed" in says)
