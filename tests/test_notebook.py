"""docs/benchtop.ipynb: every cell runs. Run: ./run.sh test tests/test_notebook.py"""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from launch import ROOT, forking, run
from test_docs import SHORT, shrink_library

NOTEBOOK = ROOT / "docs/benchtop.ipynb"


def as_python(source: str) -> str:
    """A cell as plain Python: what begins with ! is a command of the shell, with variables as $NAME."""
    def shell(found: re.Match) -> str:
        words = re.sub(r"\$(\w+)", r"{\1}", found[2])
        return f"{found[1]}shell(f{words!r})"
    return re.sub(r"^( *)!(.*)$", shell, source, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_cells_run_one_after_the_other(tmp_path: Path, monkeypatch):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) == 10 and all(cell.get("outputs", []) == [] for cell in cells)
    for name in ("benchtop", *(path.name for path in ROOT.glob("*.py"))):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    shrink_library(tmp_path)
    (tmp_path / "run.sh").write_text("#!/bin/sh\n")      # what it sets up is here
    (tmp_path / "run.sh").chmod(0o755)
    shown, statuses = [], {}

    def shell(line: str) -> None:
        line = line.replace("4000000", "300000").replace("--train_tokens 1500000", shlex.join(SHORT))
        line = line.replace("trial.py", f"{forking(tmp_path)} trial.py --seeds 2 --no_check")
        program, *words = shlex.split(line)
        done = (run(tmp_path, *words, expect=None) if program == ".venv/bin/python" else
                subprocess.run([program, *words], cwd=tmp_path))
        statuses[line] = done.returncode
    monkeypatch.chdir(tmp_path)
    names = {"shell": shell, "display": shown.append, "Image": lambda path: path}
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(line for line in cell["source"] if "from IPython" not in line)
            exec(compile(as_python(source), "cell", "exec"), names)
    # a trial of two steps may end with any verdict
    assert all(status in ((0, 1, 2) if "trial.py" in line else (0,)) for line, status in statuses.items())
    assert len(statuses) == 7 and Path(shown[0]).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "gelu.html").exists()
