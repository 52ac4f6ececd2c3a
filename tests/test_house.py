"""The house rules that a program can check: who imports whom, what an import does, how long files are.

Run: ./run.sh test tests/test_house.py
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import benchtop
from benchtop import ORDER

BENCH = Path(benchtop.__file__).parent
ROOT = BENCH.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
# text is handled without torch, which takes seconds to import
TEXT = ["sources", "tokenizer", "bpe", "hub", "shards", "prepare", "tasks", "scoring", "identity", "log",
        "groups", "tables", "curves", "page"]
TEXT_SCRIPTS = ["train_tokenizer", "download_fineweb", "download_hellaswag", "compare", "convert", "judge"]
# who may rename: whole files, checkpoints, and folders that get their final name
RENAMES = {("benchtop/files.py", "whole_path"), ("benchtop/checkpoints.py", "write_checkpoint"),
           ("benchtop/checkpoints.py", "withdraw_checkpoint"),
           ("benchtop/checkpoints.py", "read_checkpoint"), ("benchtop/identity.py", "_write_code"),
           ("benchtop/tokenizer.py", "save_tokenizer"), ("benchtop/prepare.py", "publish")}


def imports_of(path: Path) -> set[str]:
    """The modules of this project that a file imports, also within functions: benchtop.files, train_gpt."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: imports are absolute"
            found |= ({f"benchtop.{alias.name}" for alias in node.names} if node.module == "benchtop"
                      else {node.module})
    return found & ({f"benchtop.{name}" for name in ORDER} | set(SCRIPTS))


GRAPH = {**{f"benchtop.{name}": imports_of(BENCH / f"{name}.py") for name in ORDER},
         **{name: imports_of(ROOT / f"{name}.py") for name in SCRIPTS}}


def test_imports_run_one_way_down_the_order_of_the_bench():
    for place, name in enumerate(ORDER):
        above = {f"benchtop.{other}" for other in ORDER[:place]}
        wrong = GRAPH[f"benchtop.{name}"] - above
        assert not wrong, f"benchtop/{name}.py imports {', '.join(wrong)}: a script, or below it in ORDER"


def test_nothing_imports_in_a_circle():
    """Scripts too: what is left when everything that imports nothing left is taken away is a circle."""
    left = {name: set(imported) for name, imported in GRAPH.items()}
    while free := [name for name, imported in left.items() if not imported & set(left)]:
        for name in free:
            del left[name]
    assert not left


def test_every_file_of_the_bench_stands_in_its_order_and_says_what_it_is_for():
    assert sorted(ORDER) == sorted(path.stem for path in BENCH.glob("*.py") if path.stem != "__init__")
    for path in [*BENCH.rglob("*.py"), *ROOT.glob("*.py")]:
        says = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert says and len(says.splitlines()[0]) >= 20, f"{path.relative_to(ROOT)} needs a docstring"


def functions_that_rename(path: Path) -> set[str]:
    found = set()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if (owner, node.func.attr) in (("os", "replace"), ("os", "rename"), ("shutil", "move")) \
                    or node.func.attr == "rename":
                found.add(function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)
    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def test_files_get_their_names_in_one_place():
    """A temporary name, a sync and a renaming are benchtop.files.whole_file's business."""
    found = {(str(path.relative_to(ROOT)), function) for path in [*BENCH.glob("*.py"), *ROOT.glob("*.py")]
             for function in functions_that_rename(path)}
    assert found <= RENAMES, found - RENAMES
    assert found == RENAMES, f"no longer needed: {RENAMES - found}"


def project_files() -> list[Path]:
    """What git tracks; without git, the scripts and the bench."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    tracked = [ROOT / name for name in listed.stdout.split() if (ROOT / name).is_file()]
    return tracked or [*ROOT.glob("*.py"), *BENCH.glob("*.py")]


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
             for path in project_files() if "tests" not in path.relative_to(ROOT).parts}
    assert lines.pop("train_gpt.py") <= 1100
    assert not {name: count for name, count in lines.items() if count > 620}


# ------------------------------------------------------------------------------------------------
# What an import does
# ------------------------------------------------------------------------------------------------

WATCH = """
import importlib, json, os, sys

root, names, libraries = sys.argv[1], *map(json.loads, sys.argv[2:])
sys.path.insert(0, root)
for name in libraries:      # what they do is not ours
    importlib.import_module(name)
importing, found = "", []


class Watched(list):
    def look(self):
        frame = sys._getframe(2)
        if frame.f_code.co_filename.startswith(root):
            found.append([importing, "argv", frame.f_code.co_filename])

    def __getitem__(self, place):
        self.look()
        return super().__getitem__(place)

    def __iter__(self):
        self.look()
        return super().__iter__()

    def __len__(self):
        self.look()
        return super().__len__()


def hear(event, arguments):
    if not importing:
        return
    writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) \\
        and arguments[0] != os.devnull
    gpu = event == "open" and str(arguments[0]).startswith(("/dev/nvidia", "/dev/kfd"))
    others = ("socket.__new__", "socket.connect", "socket.getaddrinfo", "os.mkdir", "os.remove", "os.rename",
              "subprocess.Popen", "os.system", "os.fork", "os.forkpty")
    if writes or gpu or event in others:
        found.append([importing, event, str(arguments[:1])])


sys.addaudithook(hear)
sys.argv = Watched(["script"])
for name in names:
    importing = name
    importlib.import_module(name)
importing = ""
torch = sys.modules.get("torch")
if torch and torch.cuda.is_initialized():
    found.append(["", "cuda", ""])
print(json.dumps(found))
"""


def watch(names: list[str], libraries: list[str], root: Path) -> list[list[str]]:
    """What importing these modules did: which one, the event, and of what."""
    done = subprocess.run([sys.executable, "-c", WATCH, str(root), json.dumps(names), json.dumps(libraries)],
                          cwd=root, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def libraries_of(path: Path) -> set[str]:
    """What is no module of ours, of what importing a file imports."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name.split(".")[0] not in ("benchtop", *SCRIPTS)}


def test_an_import_touches_no_argv_gpu_network_or_disk():
    libraries = set().union(*map(libraries_of, [*BENCH.glob("*.py"), *ROOT.glob("*.py")]))
    assert {"torch", "numpy"} <= libraries
    assert watch([*(f"benchtop.{name}" for name in ORDER), *SCRIPTS], sorted(libraries), ROOT) == []


def test_text_is_handled_without_torch():
    lines = ["import importlib, sys", "sys.modules['torch'] = None      # importing it raises ImportError",
             *(f"importlib.import_module('benchtop.{name}')" for name in TEXT),
             *(f"importlib.import_module('{name}')" for name in TEXT_SCRIPTS)]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("line", "event"), [
    ("open('made', 'w').close()", "open"), ("os.makedirs('made')", "os.mkdir"),
    ("import socket; socket.socket().close()", "socket.__new__"), ("print(sys.argv[0])", "argv"),
    ("list(sys.argv)", "argv"), ("subprocess.run(['true'])", "subprocess.Popen"),
    ("open(__file__).read()", "")])
def test_the_watch_sees_what_it_watches_for(tmp_path, line, event):
    (tmp_path / "touches.py").write_text(f"import os, subprocess, sys\n{line}\n")
    assert {seen for _, seen, _ in watch(["touches"], [], tmp_path)} == ({event} if event else set())
