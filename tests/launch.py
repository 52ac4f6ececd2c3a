"""Starting the scripts as a user would: in a folder of their own, in processes of their own."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copy_scripts(folder: Path) -> None:
    """Copy the scripts and the bench; their data, tokenizers and runs then lie below this folder."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(ROOT / "benchtop", folder / "benchtop", ignore=shutil.ignore_patterns("__pycache__"))


def run(folder: Path, script: str, *arguments: str, expect: int = 0, **options,
        ) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, script, *arguments], cwd=folder, capture_output=True, text=True,
                          timeout=300, **options)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
