"""What a trial compares: a baseline script with flags, and ideas that change the script or the flags.

An idea is typed as one of
    gelu.py                     a changed copy of the script
    backout.diff                a patch for the script
    'lr2: --muon_lr 0.1'        a name and flags, which may include a patch or a script
"""

import difflib
import hashlib
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from benchtop import places
from benchtop.errors import UserError, first_line
from benchtop.files import sha256_of, write_text
from benchtop.folder import module_of
from benchtop.host import available_cores
from benchtop.identity import bench_hashes, bench_sha256, environment_for_git

BASELINE = "baseline"
# names of trials and ideas are parts of run and file names
NAME, IDEA = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", r"[A-Za-z0-9][A-Za-z0-9_.-]{0,29}"
RESERVED = (BASELINE, "output", "plan.json", "results.json")
# knobs that a trial sets for each run, or uses to check the script
TAKEN = ("seed", "model_name", "resume", "resume_changed", "held_out", "check", "smoke", "sample")
BUDGET = ("num_steps", "train_tokens", "train_minutes")
# knobs that all sides must share to be comparable
SHARED = (*BUDGET, "target_loss", "preset", "data", "tokenizer", "val_tokens")


@dataclass(frozen=True)
class Side:
    """One side of a trial: the baseline, or an idea.

    script  in the repository root, where it can import benchtop
    typed   the idea as typed by the user
    flags   the side's own flags, after those that all sides share
    patch   unified diff from the baseline's script to this one; empty if they are the same
    """
    name: str
    script: Path
    typed: str
    flags: tuple[str, ...] = ()
    patch: str = ""

    @property
    def change_sha256(self) -> str:
        """Hash of what defines an idea: its patch and its flags."""
        return hashlib.sha256(json.dumps([self.patch, *self.flags]).encode()).hexdigest()


def baseline_side(against: str) -> Side:
    script = Path(against) if Path(against).is_file() else places.ROOT / against
    if not script.is_file() or script.suffix != ".py":
        raise UserError(f"--against must be a script such as train_gpt.py; there is no {against}")
    if script.resolve().parent != places.ROOT:
        raise UserError(f"--against must be a script in {places.ROOT}; put {against} there")
    return Side(BASELINE, places.ROOT / script.name, against)


def open_idea(typed: str, baseline: Side) -> Side:
    """The Side that a command-line argument means.

    A changed script is copied to the repository root under a name with its hash, so that neither a later
    edit nor another idea changes what a trial runs.

    raises  UserError if the argument is no idea, or its patch does not apply
    """
    name, colon, rest = typed.partition(":")
    if not colon or Path(typed).is_file():
        name, rest = Path(typed).stem, shlex.quote(typed)
        if not typed.endswith((".py", ".diff", ".patch")):
            raise UserError(f"{typed!r} is not an idea; give a changed script, a patch (.diff), or a name "
                            "and flags, as in 'lr2: --muon_lr 0.1'")
    name = name.strip()
    if not re.fullmatch(IDEA, name) or name in RESERVED or name.endswith(".diff"):
        raise UserError("an idea's name must be 1 to 30 letters, digits, '.', '_' and '-', and none of "
                        f"{', '.join(RESERVED)}; it is {name!r}; name it as in 'other: {rest.strip()}'")
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UserError(f"the idea {name} cannot be read ({error}): {rest.strip()}") from error
    files = [word for word in words if not word.startswith("-") and word.endswith((".py", ".diff", ".patch"))]
    if len(files) > 1:
        raise UserError(f"the idea {name} has {len(files)} files ({', '.join(files)}); put all changes into "
                        "one")
    flags = [word for word in words if word not in files]
    check_flags(flags, f"the idea {name}", TAKEN + SHARED)
    if not words:
        raise UserError(f"the idea {name} changes nothing; give it flags, a script or a patch")
    if not files:
        return Side(name, baseline.script, typed, tuple(flags))
    return with_script(name, Path(files[0]), baseline, typed, tuple(flags))


def check_flags(flags: list[str], whose: str, taken: tuple[str, ...] = TAKEN) -> None:
    """raises  UserError if one of the flags sets a knob in `taken`"""
    for word in flags:
        if word.startswith("--") and word[2:].split("=")[0] in taken:
            raise UserError(f"leave {word.split('=')[0]} out of {whose}; the trial sets it for all runs")


def with_script(name: str, file: Path, baseline: Side, typed: str, flags: tuple[str, ...]) -> Side:
    file = file if file.is_file() else places.ROOT / file
    if not file.is_file():
        raise UserError(f"the idea {name} needs {file.name}, which does not exist")
    before = ended(baseline.script.read_text(encoding="utf-8"))
    try:
        after = ended(file.read_text(encoding="utf-8") if file.suffix == ".py" else
                      patched(file, baseline.script))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text") from error
    sha256 = hashlib.sha256(after.encode()).hexdigest()
    script = places.ROOT / f"idea_{re.sub(r'[^A-Za-z0-9_]', '_', name)}_{sha256[:8]}.py"
    if not script.exists() or sha256_of(script) != sha256:
        write_text(script, after)
    lines = [text.splitlines(keepends=True) for text in (before, after)]
    patch = "".join(difflib.unified_diff(*lines, f"a/{baseline.script.name}", f"b/{baseline.script.name}"))
    if not patch and not flags:
        raise UserError(f"the idea {name} changes nothing in {baseline.script.name}")
    return Side(name, script, typed, flags, patch)


def ended(text: str) -> str:
    """The text with a newline at its end, without which a diff of it cannot be applied."""
    return text if text.endswith("\n") or not text else text + "\n"


def patched(patch: Path, script: Path) -> str:
    """The text of a script with a patch applied; the script itself stays as it is.

    raises  UserError if there is no git, or the patch does not apply or changes other files
    """
    if not shutil.which("git"):
        raise UserError(f"git is needed to apply {patch}; install it, or give a changed copy of "
                        f"{script.name}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / script.name
        copy.write_text(ended(script.read_text(encoding="utf-8")), encoding="utf-8")

        def git(*words: str) -> subprocess.CompletedProcess:
            return subprocess.run(["git", "apply", *words, str(patch.resolve())], cwd=folder, text=True,
                                  env=environment_for_git() | {"GIT_CEILING_DIRECTORIES": folder},
                                  capture_output=True, errors="replace")
        touched = [line.split("\t")[-1] for line in git("--numstat").stdout.splitlines()]
        if others := [name for name in touched if name != script.name]:
            raise UserError(f"{patch} also changes {', '.join(others)}; an idea changes only {script.name}")
        done = git()
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if line.startswith("error")), done.stderr)
            why = why.removeprefix("error: ").strip()
            raise UserError(f"{patch} does not apply to {script.name} ({why}); make it again with: "
                            f"diff -u {script.name} COPY")
        return copy.read_text(encoding="utf-8")


def import_script(path: Path) -> ModuleType:
    """A training script as a module.

    raises  UserError if it cannot be imported, or has no EXPERIMENT
    """
    try:
        module = module_of(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path.name} cannot be imported: {type(error).__name__}: "
                        f"{first_line(error)}") from error
    if not hasattr(module, "EXPERIMENT"):
        raise UserError(f"{path.name} is not a training script; it lacks the EXPERIMENT of train_gpt.py")
    return module


# ------------------------------------------------------------------------------------------------
# When two runs are the same
# ------------------------------------------------------------------------------------------------

def machine_facts(processes: int) -> dict:
    """Facts about this machine that results depend on, found without using a GPU."""
    import torch

    from benchtop.gpus import nvidia_gpus
    from benchtop.machine import cpu_facts
    gpus = [gpu.get("name", "") for gpu in nvidia_gpus()]
    # sums over another number of threads differ by rounding
    cpu = {} if gpus else {
        "cpu": cpu_facts().get("model name", ""),
        "threads": torch.get_num_threads() if processes == 1 else max(1, available_cores() // processes)}
    return {"gpus": sorted(gpus[:processes]), **cpu, "torch": importlib.metadata.version("torch"),
            "processes": processes}


def key_of(side: Side, shared_flags: list[str], data: list[str], machine: dict) -> str:
    """Eight hex digits, equal for runs whose results may differ only because of the seed.

    data  hashes of dataset and tokenizer
    """
    bench = bench_sha256(bench_hashes())
    parts = [sha256_of(side.script), bench, [*shared_flags, *side.flags], data, machine]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
