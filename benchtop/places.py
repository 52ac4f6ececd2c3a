"""Paths of the project's folders, and the names that files and folders may have.

Read the paths through the module (places.DATA), so that a test can redirect all of them at once.
"""

import difflib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
TOKENIZERS = ROOT / "tokenizers"
EXPERIMENTS = ROOT / "experiments"

FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,239}"      # a file name has at most 255 bytes, with .partial


def name_in(folder: Path, typed: str) -> str:
    """The name of an item in `folder`; it may be typed as a path, as completed by the shell.

    For the folder data, `mine`, `mine/`, `data/mine`, `data/mine/` and the absolute path all give `mine`.
    Any other path is only stripped of trailing slashes.
    """
    path = typed.rstrip("/")
    parent, name = os.path.split(path)
    is_inside = os.path.normpath(parent) == folder.name or os.path.abspath(parent) == str(folder)
    return name if not parent or is_inside else path


def did_you_mean(name: str, there: dict[str, str]) -> str:
    """Suggest the closest existing names, or all, in an error about a missing one; "make NAME: ..." follows.

    there  existing names to compare with -> the names to show
    """
    near = [other for other in there if other.startswith(name) or name.startswith(other)]
    near = near or difflib.get_close_matches(name, there, n=1)
    if near:
        return f"; did you mean {' or '.join(there[other] for other in near)}? To"
    return f", only {', '.join(there.values())}; to" if there else "; to"
