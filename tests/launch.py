"""Starting the scripts as a user would: in a folder of their own, in processes of their own."""

import atexit
import functools
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import uuid
from multiprocessing.forkserver import _forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["torch", "torch.distributed", "torch._dynamo", "numpy", "tiktoken", "matplotlib.pyplot",
             "pyarrow", "safetensors.torch", "huggingface_hub", "regex", "tqdm", "settled"]

# Processes are forked from one that has imported the libraries, and nothing of Benchtop: a start and a tiny
# run then take less than half of the time. What a script does to its process stays there. Elsewhere than on
# Linux, a process must not fork once it has imported them.
FORKS = sys.platform == "linux"
PATIENCE = 3000     # seconds until a process counts as hanging; on a busy machine, all take long
forked = multiprocessing.get_context("forkserver" if FORKS else "spawn")
forked.set_forkserver_preload(LIBRARIES)


def copy_scripts(folder: Path) -> None:
    """Copy the scripts and the bench; their data, tokenizers and runs then lie below this folder."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(ROOT / "benchtop", folder / "benchtop", ignore=shutil.ignore_patterns("__pycache__"))


def start(folder: Path, script: str, *arguments: str, out: str, err: str, env: dict | None = None,
          ) -> multiprocessing.Process:
    """Start a script as the head of a session of its own, with its output at the end of these two files."""
    start_server()
    process = forked.Process(target=start_script,
                             args=(script, arguments, str(folder), env or {**os.environ}, [out, err]))
    process.start()
    return process


@functools.cache
def start_server() -> None:
    """Start the server that forks, which finds settled.py beside this file."""
    if not FORKS:
        return
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), before)))
    try:
        _forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def start_script(script: str, arguments: tuple[str, ...], folder: str, env: dict, said: list[str]) -> None:
    """Do what `python script arguments` does, or `python -m module arguments`, in the forked process."""
    os.setsid()
    for number, path in ((0, os.devnull), *enumerate(said, start=1)):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)    # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    forked.set_forkserver_preload(["__main__"])     # the default, for a script with workers
    if script != "-m":
        be_script(script, *arguments)
    elif arguments[:2] == ("torch.distributed.run", "--standalone"):
        be_torchrun(int(arguments[2].partition("=")[2]), *arguments[3:])
    else:
        import_from(folder)
        module, *sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def import_from(folder: str) -> None:
    """Import from this folder first, and from the repository only what it has to itself."""
    sys.path = [folder, *(place for place in sys.path if place not in ("", str(ROOT)))]


def be_script(script: str, *arguments: str) -> None:
    path = Path(script).resolve()
    import_from(str(path.parent))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()


def be_torchrun(processes: int, script: str, *arguments: str) -> None:
    """As torchrun does it, but its processes are forked, too."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    config = LaunchConfig(1, 1, processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", start_method="fork" if FORKS else "spawn",
                          max_restarts=0)
    elastic_launch(config, be_script)(script, *arguments)


def run(folder: Path, script: str, *arguments: str, expect: int | None = 0, env: dict | None = None,
        ) -> subprocess.CompletedProcess:
    """Run a script and wait for it; what it said on stdout and stderr, and its exit code.

    expect  the exit code that it must have; None: any
    """
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = start(folder, script, *arguments, out=out.name, err=err.name, env=env)
        process.join(timeout=PATIENCE)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{script} {' '.join(arguments)}: {out.read()}{err.read()}")
        done = subprocess.CompletedProcess([script, *arguments], process.exitcode, out.read(), err.read())
        process.close()
    assert expect in (None, done.returncode), done.stdout + done.stderr
    return done


def forking(folder: Path) -> str:
    """Copy run_forking.py into a Benchtop and return its name; `python run_forking.py SCRIPT ...` runs
    SCRIPT, and forks the runs that it starts."""
    shutil.copy(Path(__file__).with_name("run_forking.py"), folder)
    return "run_forking.py"


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
