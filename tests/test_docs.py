"""README.md and docs/: every command runs or is read by its script, links lead somewhere, files are named.

Run: ./run.sh test tests/test_docs.py
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from launch import ROOT, forking, run
from torch.distributed.run import get_args_parser

from benchtop.knobs import parse_config
from train_gpt import PRESETS, Config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# a command with one of these needs the network, a GPU, hours, a name that only the reader knows, or is one
# more trial
NOT_HERE = ("10B", "HOST", "GPT2_FOLDER", "/NAME", " NAME", "download_hellaswag.py", "--part 1/4",
            "from_transformers", "torch.distributed.run", "paper/build.py", "backout.diff",
            "trial.py train_nanogpt.py", "DATE_TIME_MIX")
TRAININGS = {"train_gpt.py", "train_nanogpt.py", "train_llama3.py", "my_experiment.py", "gelu.py"}
SHORT = ["--num_steps", "2", "--val_every", "0", "--sample_tokens", "2", "--num_samples", "1", "--compile",
         "off", "--device", "cpu", "--seq_len", "64", "--batch_tokens", "256", "--val_tokens", "1024"]


def commands(page: Path) -> list[str]:
    """What a page's shell blocks say, a line each, without comments; of a loop over seeds, the first."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("$seed", "0").splitlines()
    return [" ".join(line.split(" #")[0].split()) for line in lines]


def of_python() -> list[str]:
    """Every command of all pages that starts Python, once, in the order of the pages."""
    found = [line for page in PAGES for line in commands(page)
             if re.match(r"(\.venv/bin/)?python ", line) and page.name != "agents.md"]
    return list(dict.fromkeys(found))


def shrink_library(folder: Path) -> None:
    """In this copy of Benchtop, let stdlib be benchtop/, which is prepared in a tenth of the time."""
    path, library = folder / "benchtop/sources.py", 'Path(sysconfig.get_paths()["stdlib"])'
    source = path.read_text(encoding="utf-8")
    assert source.count(library) == 1
    path.write_text(source.replace(library, "Path(__file__).parent"), encoding="utf-8")


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A fresh checkout with a text of one's own and a small standard library."""
    folder = tmp_path_factory.mktemp("desk")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in ("benchtop", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shrink_library(folder)
    for name in ("demo", "relu2", "gelu", "trials"):        # a reader's trial must not meet the kept ones
        shutil.copytree(ROOT / "experiments" / name, folder / "experiments" / name)
    shutil.copy(ROOT / "experiments/ledger.tsv", folder / "experiments")
    (folder / "my_texts").mkdir()
    text = (ROOT / "benchtop" / "documents.py").read_text()
    for number in range(3):
        (folder / "my_texts" / f"{number}.txt").write_text(text * (number + 1))
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    old, new = (sign[0] for sign in first_experiment())
    assert source.count(old + "\n") == 1
    for name in ("gelu.py", "my_experiment.py"):
        (folder / name).write_text(source.replace(old, new), encoding="utf-8")
    return folder


def first_experiment() -> tuple[list[str], list[str]]:
    """Lines that README's diff takes out and puts in."""
    diff = re.search(r"```diff\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)[1]
    old, new = ([line[1:] for line in diff.splitlines() if line.startswith(sign)] for sign in "-+")
    assert len(old) == len(new) == 1
    return old, new


@pytest.mark.slow
def test_each_command_of_the_pages_runs(desk):
    """In one folder, in their order; runs are cut to two steps and two seeds, torchrun starts two processes,
    and the newest run stands for what a reader would name."""
    done = []
    for line in of_python():
        if any(word in line for word in NOT_HERE):
            continue
        words = shlex.split(line)[1:]
        runs = sorted(path for path in desk.glob("experiments/2*/model.safetensors")
                      if path.with_name("train_gpt.txt").is_file())
        if any("DATE_TIME" in word for word in words):
            words = [re.sub(r"DATE_TIME_\w+", runs[-1].parent.name, word) for word in words]
        words = ["--nproc_per_node=2" if word.startswith("--nproc") else word for word in words]
        if "--train_tokens" in words:
            place = words.index("--train_tokens")
            del words[place:place + 2]
        if "trial.py" in words and "--" in words:
            place = words.index("--")
            words[place:place] = ["--seeds", "2", "--no_check"]
            words += SHORT
        elif TRAININGS & {*words} and not {"--help", "--smoke", "--sample"} & {*words}:
            words += [*SHORT, "--save_model"]
        expected = (0, 1, 2) if "trial.py" in words else (0,)
        if ("--resume" in words and "auto" not in words) or words[0] == "judge.py":
            continue        # they need a run that was stopped, and a server; other tests have these
        if "--sample" in words and "--prompt" not in words:
            continue        # prompts are typed; test_training.py has it
        if "to_transformers" in words:
            words[-1] = str(max(desk.glob("experiments/2*llama3*")))
        if words[:2] == ["-m", "benchtop.launch"]:
            code = subprocess.run([sys.executable, *words], cwd=desk).returncode
        else:
            launcher = [forking(desk)] if words[0] == "trial.py" else []
            code = run(desk, *launcher, *words, expect=None).returncode
        assert code in expected, line
        done.append(line)
    assert len(done) >= 25


@cache
def help_of(script: str) -> str:
    return (run(ROOT, script, "--help", "all", expect=None).stdout
            or run(ROOT, script, "--help", expect=None).stdout)


def test_commands_that_cannot_run_here_have_flags_that_exist():
    looked_at = 0
    for line in of_python():
        if any(word in line for word in (*NOT_HERE, "judge.py")) and "torch.distributed" not in line:
            _, script, *words = shlex.split(line)
            if script.startswith("paper/"):
                continue
            for word in words[:words.index("--")] if "--" in words else words:
                if word.startswith("--"):
                    assert re.search(rf"(^|\s){word.split('=')[0]}\b", help_of(script)), line
                    looked_at += 1
    assert looked_at >= 15


def test_the_commands_for_many_gpus_have_flags_that_exist():
    lines = [line.removeprefix("srun ").removeprefix(".venv/bin/python -m ")
             for page in PAGES for line in commands(page)
             if re.match(r"(srun )?.venv/bin/python -m torch.distributed.run .*train_gpt\.py", line)]
    assert len(lines) >= 3
    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    for line in lines:
        words = shlex.split(line)
        place = words.index("train_gpt.py")
        assert parse_config(words[place + 1:], Config).preset.startswith("gpt2-")
        assert {flag.partition("=")[0] for flag in words[1:place] if flag.startswith("-")} <= known


def test_presets_and_their_flags_are_known():
    words = {word for page in PAGES for line in commands(page) if line.startswith("./run.sh ")
             for word in shlex.split(line)[1:2]}
    assert words <= {*PRESETS, "test", "proof", "seeds", "setup", "paper"} and len(words) > 4
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"`{preset}`" in text for preset in PRESETS)


def test_the_readme_names_every_file():
    readme = PAGES[0].read_text(encoding="utf-8")
    for path in ROOT.iterdir():
        if (path.suffix in (".py", ".sh") and not path.name.startswith("idea_")) or path.name in (
                "Dockerfile", "LICENSE", "requirements.txt"):
            assert f"`{path.name}`" in readme, path.name


def test_the_readme_is_for_newcomers():
    lines = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 220
    assert all(len(line) <= 150 or line.startswith(("|", ".venv")) for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target
    assert not re.search(r"\bTODO|TBD|(?<!root)@[A-Z]{3,}", text)


def test_every_page_is_listed():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_messages_of_the_faq_are_those_of_the_code():
    """Of each message, a stretch without a variable part stands in a literal of the code."""
    literals = [(ROOT / "run.sh").read_text(encoding="utf-8")]
    for path in [*ROOT.glob("*.py"), *(ROOT / "benchtop").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                literals.append("".join(part.value if isinstance(part, ast.Constant) else "\0"
                                        for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(node.value)
    code = "\0".join(literals)
    blocks = (ROOT / "docs/faq.md").read_text(encoding="utf-8").split("\n\n")
    messages = re.findall(r"`([^`]+)`", "\n".join(block for block in blocks if block.startswith("**`")))
    assert len(messages) >= 25
    for message in messages:
        parts = re.split(r"\b[A-Z][A-Z0-9_]*\b|\.\.\.|\d[\d,.]*|[()'\";:,]|--\w+|must be|train_gpt\.py",
                         " ".join(message.split()))
        assert any(len(part.strip()) >= 10 and part.strip() in code for part in parts), message
    assert "there is no such message" not in code


def test_flags_that_pages_name_exist():
    """Those in the text, such as `--alpha 0.05`, in some script's help."""
    scripts = ["train_gpt.py", "train_nanogpt.py", "train_tokenizer.py", "download_fineweb.py", "proof.py",
               "download_hellaswag.py", "compare.py", "trial.py", "judge.py", "convert.py"]
    known = " ".join(help_of(script) for script in scripts)
    # of torchrun, SLURM, rsync, and of scripts beside these
    theirs = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    theirs |= {"--gpus", "--nodes", "--signal", "--requeue", "--time", "--exclude", "--no_pdf", "--dry_run",
               "--text", "--keep", "--seconds"}
    for page in PAGES:
        for flag in set(re.findall(r"`(--\w[\w]*)", page.read_text(encoding="utf-8"))) - theirs:
            assert re.search(rf"{flag}\b", known), f"{page.name}: {flag}"
