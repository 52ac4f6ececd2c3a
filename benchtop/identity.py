"""What made a result: code, data, versions and command, for the record and for checks when a run resumes.

A run folder keeps the sources that ran, so that they can be read and run again:

    code/train_gpt.py  code/benchtop/*.py     the script, any other script it imports, and the bench
    train_gpt.txt                             the script again, as a text file for a design card
    config.json  git.diff  requirements.txt   knobs, uncommitted changes, all installed packages
    meta.json                                 the tokenizer

If any of these has changed when a run resumes, the earlier version is kept beside it:
config_until_step_6.json, code_until_step_6/.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tiktoken import Encoding

from benchtop import places
from benchtop.errors import SharedError, UserError
from benchtop.files import link, sha256_of, sync, write_text
from benchtop.gpus import nvidia_gpus
from benchtop.redaction import without_secrets
from benchtop.tokenizer import tokenizer_sha256

BENCH = Path(__file__).parent
# knobs that do not change results; data and tokenizer are compared by content instead
NEUTRAL_KNOBS = ("check", "smoke", "sample", "prompt", "resume", "resume_changed", "save_every_steps",
                 "save_every_minutes", "save_model", "data", "tokenizer", "timeout_seconds",
                 "micro_batch_tokens", "gpu_cost_per_hour", "benchmarks", "compare_to", "wandb", "trackio",
                 "tensorboard")
NAMED_FILES = 5         # named in a message at most; further ones are counted


# ------------------------------------------------------------------------------------------------
# Sources
# ------------------------------------------------------------------------------------------------

def bench_files() -> list[Path]:
    return sorted(BENCH.glob("*.py"))


def bench_hashes() -> dict[str, str]:
    """The SHA-256 of each file of the bench, by name."""
    return {path.name: sha256_of(path) for path in bench_files()}


def bench_sha256(bench: dict[str, str]) -> str:
    """One hash for the whole bench, from its files' names and hashes.

    The same in a shell:   cd benchtop; LC_ALL=C; sha256sum *.py | sha256sum
    """
    lines = [f"{sha256}  {name}\n" for name, sha256 in sorted(bench.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def own_sources() -> list[Path]:
    """The repository's scripts that this process runs: its own and those that it imports."""
    scripts = {path.name: path for path in places.ROOT.glob("*.py")}
    files = [module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
    return sorted({scripts[name] for file in files if (name := os.path.basename(file)) in scripts
                   and Path(file).resolve() == scripts[name].resolve()})


def facts_about_code(script: str) -> dict:
    """The hashes of the code that this process runs: the script, the scripts it imports, the bench."""
    sources = {path.name: sha256_of(path) for path in own_sources()}
    if script not in sources:
        raise UserError(f"{script} must lie in {places.ROOT}, beside benchtop/")
    bench = bench_hashes()
    return {"script": script, "code_sha256": sources[script], "sources": sources,
            "bench_sha256": bench_sha256(bench), "bench": bench}


def code_that_runs() -> dict[str, str]:
    """The files for a run's code/ folder: name -> content."""
    files = {path.name: path for path in own_sources()}
    files |= {f"{BENCH.name}/{path.name}": path for path in bench_files()}
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def environment_for_git() -> dict[str, str]:
    """Without the variables of a hook or a script that make git look at another repository."""
    return {name: value for name, value in os.environ.items()
            if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY")}


def git(*arguments: str) -> str:
    """The output of a git command in the repository.

    raises  UserError with git's message if git fails (without a repository, for example) or is not installed
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=places.ROOT, capture_output=True, encoding="utf-8",
                              errors="replace", env=environment_for_git())
    except OSError as error:
        raise UserError(f"git cannot be started: {error.strerror}") from error
    if done.returncode:
        raise UserError(next(iter(done.stderr.splitlines()), f"git {arguments[0]} failed"))
    return done.stdout


def facts_about_git() -> dict:
    """The commit, whether the running code differs from it, and why git cannot tell; None if unknown.

    A script that git does not track differs from every commit, even if git ignores it.
    """
    commit = dirty = problem = None
    names = {path.name for path in own_sources()}
    try:
        tracked = {*git("ls-files", "-z").split("\0")}
        if not tracked & {*names, f"benchtop/{Path(__file__).name}"}:   # an unrelated repository
            raise UserError(f"git does not track {' or '.join(sorted(names))}")
        dirty = bool(git("status", "--porcelain") or names - tracked)
        commit = git("rev-parse", "--verify", "HEAD").strip()
    except UserError as error:
        problem = str(error)
    return {"git_commit": commit, "git_dirty": dirty, "git_problem": problem}


def uncommitted_changes() -> str:
    """The content of git.diff; empty if git cannot tell, which the summary records as git_problem."""
    try:
        return git("diff", "--no-ext-diff", "--no-color", "HEAD")
    except UserError:
        return ""


@functools.cache
def installed_packages() -> str:
    """All installed packages, in the format of pip freeze."""
    # each access to `metadata` reads the file anew
    facts = [package.metadata for package in importlib.metadata.distributions()]
    found = {f"{fact['Name']}=={fact['Version']}" for fact in facts}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def tokenizer_meta(tokenizer: Encoding) -> str:
    path = places.TOKENIZERS / tokenizer.name / "meta.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return json.dumps({"name": tokenizer.name, "vocab_size": tokenizer.n_vocab, "eot_id": tokenizer.eot_token,
                       "tokenizer_sha256": tokenizer_sha256(tokenizer)}, indent=2) + "\n"


# ------------------------------------------------------------------------------------------------
# Identity
# ------------------------------------------------------------------------------------------------

def identity_of(script: Path, cfg, world, tokenizer: Encoding, dataset) -> dict:
    """What made a result, for its summary and for checks when the run resumes."""
    return {"model_name": cfg.model_name, "preset": cfg.preset, "seed": cfg.seed,
            "data": dataset.folder.name, "data_sha256": dataset.sha256,
            "tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer_sha256(tokenizer),
            **facts_about_session(script, world)}


def facts_about_session(script: Path, world) -> dict:
    """Code, machine, versions and command of this process.

    cuda  version of CUDA (or HIP) that torch was built for; None without
    gpus  those of the first process's machine, if it trains on CUDA
    """
    import torch
    gpus = nvidia_gpus() if world.is_main and world.device.type == "cuda" else []
    return {**facts_about_code(script.name), **facts_about_git(), **world.facts(),
            "dtype_reason": world.dtype_reason,
            "python": platform.python_version(), "torch": str(torch.__version__),
            "cuda": torch.version.cuda or torch.version.hip, "gpus": gpus, "platform": platform.platform(),
            "command": without_secrets(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))}


def changes_since(saved: dict, cfg, identity: dict) -> list[str]:
    """How a session that resumes a run would differ from what was saved, apart from neutral knobs."""
    now, then = dataclasses.asdict(cfg), saved["config"]
    changes = [f"--{knob} is {now.get(knob)!r}, was {then.get(knob)!r}" for knob in {**then, **now}
               if knob not in NEUTRAL_KNOBS and now.get(knob) != then.get(knob)]
    then = saved["identity"]
    if identity["dtype"] != then["dtype"]:
        changes.append(f"the dtype is {identity['dtype']}, was {then['dtype']}")
    for thing in ("data", "tokenizer"):
        if identity[f"{thing}_sha256"] != then[f"{thing}_sha256"]:
            changes.append(f"the {thing} changed")
    changes += [f"{name} {what}" for name, what in differing(then["sources"], identity["sources"]).items()]
    # runs of earlier versions have no hashes of bench files
    names = list(differing(then.get("bench", {}), identity["bench"]))
    if names:
        changes.append(f"the bench changed ({name_some(names)})")
    return changes


def require_equal_machines(identity: dict, world) -> None:
    """raises  SharedError if code, data or tokenizer are not the same on all processes"""
    facts = world.gather(identity)
    for fact in ("data_sha256", "tokenizer_sha256", "bench_sha256", "sources"):
        if any(other[fact] != identity[fact] for other in facts):
            raise SharedError(f"the machines differ in {fact}; copy scripts, data and tokenizer to all")


def name_some(names: list[str]) -> str:
    """The first NAMED_FILES names, and how many more there are."""
    more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
    return ", ".join(names[:NAMED_FILES]) + more


def differing(then: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """The files whose hashes differ, by name: `changed`, `is new` or `is missing`."""
    return {name: "changed" if name in now and name in then else "is new" if name in now else "is missing"
            for name in sorted({*then, *now}) if now.get(name) != then.get(name)}


# ------------------------------------------------------------------------------------------------
# Its files in a run folder
# ------------------------------------------------------------------------------------------------

class Origin:
    """The code, knobs and environment of a session, for the run folder.

    They are collected when the session begins, since files may be edited while it trains, and written once
    the session has saved something.
    """

    def __init__(self, cfg, identity: dict, tokenizer: Encoding):
        # the knobs for resuming concern one session only
        knobs = dataclasses.asdict(cfg) | {"resume": "", "resume_changed": False}
        code = code_that_runs()
        script = identity["script"]
        texts = {"config.json": json.dumps(knobs, indent=2) + "\n", "requirements.txt": installed_packages(),
                 "git.diff": uncommitted_changes(), "meta.json": tokenizer_meta(tokenizer),
                 f"{Path(script).stem}.txt": code[script]}
        self.texts = {name: without_secrets(text) for name, text in texts.items()}
        self.code = {name: without_secrets(text) for name, text in code.items()}
        self.is_written = False

    def write(self, folder: Path, from_step: int) -> None:
        """Write the files, once; an earlier session's file that differs is kept as NAME_until_step_N."""
        if self.is_written:
            return
        for name, text in self.texts.items():
            path = folder / name
            if path.exists() and path.read_text(encoding="utf-8") != text:
                link(path, path.with_stem(f"{path.stem}_until_step_{from_step}"))
            write_text(path, text)
        self._write_code(folder / "code", folder / f"code_until_step_{from_step}")
        self.is_written = True

    def _write_code(self, folder: Path, before: Path) -> None:
        """Write the folder code/, which gets its name when it is complete."""
        if folder.exists() and scripts_in(folder) == self.code:
            return
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name, text in self.code.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(partial / name, text)
        if folder.exists() and not before.exists():
            os.replace(folder, before)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        sync(folder.parent)


def scripts_in(folder: Path) -> dict[str, str]:
    """The contents of all Python files below a folder, by their relative paths."""
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8", errors="replace")
            for path in folder.rglob("*.py")}
