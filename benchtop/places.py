"""Where things lie, and which names they may have.

Read them through the module (places.DATA), so that a test can move all of them at once.
"""

import difflib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
TOKENIZERS = ROOT / "tokenizers"
EXPERIMENTS = ROOT / "experiments"

FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,239}"      # a file name ends at 255 bytes, .partial included


def name_in(folder: Path, typed: str) -> str:
    """The name of something in a folder, which may be typed as the shell completes it.

    In data, `mine`, `mine/`, `data/mine` and `data/mine/` are all `mine`, and so is the absolute path.
    Any other path stays as it is.
    """
    path = typed.rstrip("/")
    parent, name = os.path.split(path)
    is_inside = os.path.normpath(parent) == folder.name or os.path.abspath(parent) == str(folder)
    return name if not parent or is_inside else path


def what_is_there(name: str, there: dict[str, str]) -> str:
    """For a complaint that there is no such folder: the nearest ones that are, or all. "To make ..." follows.

    there  names to compare with, and the folders that they stand for
    """
    near = [other for other in there if other.startswith(name) or name.startswith(other)]
    near = near or difflib.get_close_matches(name, there, n=1)
    if near:
        return f"; did you mean {' or '.join(there[other] for other in near)}? To"
    return f", only {', '.join(there.values())}; to" if there else "; to"
