"""FineWeb from a Hub that misbehaves. Run: ./run.sh test tests/test_hub.py"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import COMMIT, FakeHub
from launch import FORKS, copy_scripts, run, torchrun

from benchtop import hub, places, shards
from benchtop.errors import UserError
from benchtop.held_out import Rule
from benchtop.tokenizer import load_tokenizer

WORDS = ["the", "cat", "dog", "sat", "under", "a", "mat", "tree", "and", "saw", "Größe", "\n\n", "1234", "🙂"]
REPO, FOLDER = "HuggingFaceFW/fineweb", "sample/10BT"
FILES = [f"{FOLDER}/{number:03d}_00000.parquet" for number in range(6)]
CLIMBMIX = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_FILES = [f"shard_{number:05d}.parquet" for number in (0, 1, 2, 6542)]


def parquet(seed: int, rows: int = 100) -> bytes:
    """A file in FineWeb's columns."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) + f" {seed}.{row}" for row in range(rows)]
    columns = {"text": texts, "id": [f"<urn:uuid:{seed}-{row}>" for row in range(rows)],
               "dump": ["CC-MAIN-2024-10"] * rows, "url": ["https://example.org"] * rows,
               "language_score": [0.9] * rows, "token_count": [len(text) for text in texts]}
    raw = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), raw, row_group_size=25)
    return raw.getvalue()


# Starts scripts in forks of a process that has imported the libraries.
# huggingface_hub reads its environment on import, so these forks come from a server of their own, started
# with the fake Hub's environment.
FORKER = f"""
import gc, json, multiprocessing, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import argparse, concurrent.futures.process, lzma, numpy, pyarrow.parquet, regex, tiktoken, tqdm
import huggingface_hub.file_download, huggingface_hub.hf_api, huggingface_hub.utils
from launch import start_script
gc.freeze()     # so that no child copies what it only looks through
for line in sys.stdin:
    said, script, *arguments = json.loads(line)
    child = multiprocessing.get_context("fork").Process(target=start_script, args=(
        script, arguments, os.getcwd(), dict(os.environ), said))
    child.start()
    print("pid", child.pid, flush=True)
    child.join()
    print("exit", child.exitcode, flush=True)
"""


class Job:
    """A script in a fork of FORKER's process, with as much of Popen as is needed here.

    Its output has a folder of its own, to which its workers may still write when the next job has begun.
    """
    numbers = itertools.count()

    def __init__(self, forker: subprocess.Popen, folder: Path, args: list[str]):
        self.forker, self.args, self.returncode = forker, args, None
        outputs = folder / str(next(self.numbers))
        outputs.mkdir(parents=True)
        said = [outputs / "out", outputs / "err"]
        for path in said:
            path.touch()
        forker.stdin.write(json.dumps([list(map(str, said)), *args]).encode() + b"\n")
        self.pid = self._number_after("pid")
        self.stdout, self.stderr = map(open, said)

    def _number_after(self, word: str) -> int:
        """The number in the next line of FORKER, which must begin with this word."""
        line = self.forker.stdout.readline().decode()
        assert re.fullmatch(rf"{word} -?\d+\n", line), f"not {word}, but {line!r}"
        return int(line.split()[1])

    def poll(self, timeout: float | None = 0) -> int | None:
        """The exit code, or None if it does not come within these seconds (None: wait for it)."""
        if self.returncode is None and select.select([self.forker.stdout], [], [], timeout)[0]:
            self.returncode = self._number_after("exit")
        return self.returncode

    def wait(self) -> int:
        return self.poll(timeout=None)

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        if self.poll(timeout) is None:
            self.kill()
            self.wait()
            raise TimeoutError(self.stdout.read() + self.stderr.read())
        with self.stdout, self.stderr:
            return self.stdout.read(), self.stderr.read()


@pytest.fixture(scope="module")
def kit(lab, tmp_path_factory):
    """A Hub, a Benchtop with a tokenizer that asks it, and FORKER's process there, if it may fork."""
    folder = tmp_path_factory.mktemp("kit")
    copy_scripts(folder)
    patient = (folder / "benchtop/hub.py").read_text()
    (folder / "benchtop/hub.py").write_text(re.sub(r"(?m)^FIRST_WAIT = .*$", "FIRST_WAIT = 0.05", patient))
    shutil.copytree(lab / "tokenizers", folder / "tokenizers")
    fake = FakeHub()
    for number, path in enumerate(FILES):
        fake.files[REPO][path] = parquet(number)
    for number, path in enumerate(CLIMBMIX_FILES, start=10):
        fake.files[CLIMBMIX][path] = parquet(number)
    forker = FORKS and subprocess.Popen(
        [sys.executable, "-c", FORKER], cwd=folder, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=fake.environment(folder / "home"))
    yield folder, fake, forker or None
    if forker:
        with forker:
            forker.kill()
    fake.close()


class Bench:
    """Runs the script against the Hub, with a cache of its own, which is empty at first."""

    def __init__(self, folder: Path, fake: FakeHub, forker: subprocess.Popen | None):
        self.folder, self.hub, self.forker, self.home = folder, fake, forker, folder / "home"
        self.jobs: list[Job | subprocess.Popen] = []
        self.env = fake.environment(self.home)
        fake.behave()
        for place in (folder / "data", self.home):
            shutil.rmtree(place, ignore_errors=True)

    def command(self, *flags: str) -> list[str]:
        if "10B-gpt2" in flags:     # shards that are made already
            return ["download_fineweb.py", *flags]
        return ["download_fineweb.py", "--version", "10B", "--tokenizer", "tiny", "--num_workers", "1",
                "--val_tokens", "10", "--shard_size", "1500", *flags]

    def start(self, *flags: str, script: list[str] | None = None, **env: str) -> Job | subprocess.Popen:
        """Start the script, or this one; with more in its environment, as a process from scratch."""
        line = script or self.command(*flags)
        if self.forker and not env:
            self.jobs.append(Job(self.forker, self.folder / "said", line))
        else:
            self.jobs.append(subprocess.Popen([sys.executable, *line], cwd=self.folder, env=self.env | env,
                                              text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return self.jobs[-1]

    def run(self, *flags: str, script: list[str] | None = None, code: int = 0, **env: str,
            ) -> subprocess.CompletedProcess:
        job = self.start(*flags, script=script, **env)
        out, err = job.communicate(timeout=120)
        assert job.returncode == code and "Traceback" not in err, out + err
        print(out, err)
        return subprocess.CompletedProcess(job.args, job.returncode, out, err)

    def data(self, name: str) -> Path:
        return self.folder / "data" / name

    def hashes(self, name: str) -> list[str]:
        """Of the shards of a dataset: to validate on, to test on, then to train on in their order."""
        manifest = json.loads((self.data(name) / "manifest.json").read_text())
        shards.Dataset(self.data(name), manifest).verify()
        entries = sorted(manifest["shards"], key=lambda entry: ("val", "test", "train").index(entry["split"]))
        return [entry["sha256"] for entry in entries]

    def cached(self) -> list[str]:
        return sorted(path.name for path in self.home.rglob("*.parquet"))


@pytest.fixture(scope="module")
def undisturbed(kit):
    """The hashes of a dataset that nothing disturbed."""
    bench = Bench(*kit)
    bench.run("--name", "calm")
    return bench.hashes("calm")


@pytest.fixture
def bench_of_hub(kit, undisturbed):
    bench = Bench(*kit)
    yield bench
    for job in bench.jobs:      # a test that fails may leave one at work
        job.kill()
        job.wait()


# ------------------------------------------------------------------------------------------------
# What it makes
# ------------------------------------------------------------------------------------------------

def test_all_documents_arrive_once_in_an_order_over_all_files(bench_of_hub):
    bench = bench_of_hub
    bench.run("--name", "all")
    manifest = json.loads((bench.data("all") / "manifest.json").read_text())
    assert manifest["revision"] == COMMIT and manifest["source"].startswith("fineweb10B-")
    assert [unit["name"] for unit in manifest["units"]] != sorted(FILES)
    assert sorted(unit["name"] for unit in manifest["units"]) == FILES and len(manifest["shards"]) > 20
    texts = [text for number in range(6) for text in texts_of(parquet(number))]
    held_out = {text for text in texts if Rule().holds_out(text)}
    found = decoded(bench, "all", "train")
    assert sorted(found) == sorted(text for text in texts if text not in held_out)
    assert set(decoded(bench, "all", "val")) <= held_out
    assert bench.cached() == []                 # text is not kept


def texts_of(raw: bytes) -> list[str]:
    return pyarrow.parquet.read_table(io.BytesIO(raw))["text"].to_pylist()


def decoded(bench: Bench, name: str, split: str) -> list[str]:
    """The documents of a split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "TOKENIZERS", bench.folder / "tokenizers")
        tokenizer = load_tokenizer("tiny")
    manifest = json.loads((bench.data(name) / "manifest.json").read_text())
    texts = []
    for tokens in shards.Dataset(bench.data(name), manifest).tokens(split):
        borders = [*np.flatnonzero(tokens == tokenizer.eot_token), len(tokens)]
        texts += [tokenizer.decode(tokens[begin + 1:end].tolist())
                  for begin, end in itertools.pairwise(borders)]
    return texts


def test_only_as_many_files_are_fetched_as_are_needed(bench_of_hub):
    bench = bench_of_hub
    bench.run("--name", "few", "--num_shards", "2")
    fetched = {path for (method, path), _ in bench.hub.asked.items() if method == "GET"}
    assert len(fetched) <= 2        # one to train on, and one whose held-out documents are validated on
    other = bench.run("--name", "seed", "--num_shards", "2", "--seed", "3")
    assert bench.hashes("few")[0] == bench.hashes("seed")[0]            # the same to validate on
    assert bench.hashes("few")[1:] != bench.hashes("seed")[1:] and "wrote data/seed" in other.stdout


def test_text_is_kept_when_asked_and_when_it_was_there(bench_of_hub):
    bench = bench_of_hub
    bench.run("--name", "kept", "--keep_text")
    assert bench.cached() == sorted(path.rsplit("/", 1)[1] for path in FILES)
    bench.run("--name", "again")
    assert len(bench.cached()) == len(FILES) and bench.hashes("again") == bench.hashes("kept")
    assert all(count == 1 for (method, _), count in bench.hub.asked.items() if method == "GET")


@pytest.mark.parametrize("damage", [False, True], ids=["whole", "damaged"])
def test_what_an_older_revision_has_in_the_cache_stays(bench_of_hub, undisturbed, damage):
    """The user has the same file of another commit: a download of ours ends with it as it was, or whole."""
    bench = bench_of_hub
    names = []
    for path in FILES:
        content = bench.hub.files[REPO][path]
        blob = bench.home / "hub/datasets--HuggingFaceFW--fineweb/blobs" / hashlib.sha256(content).hexdigest()
        names.append(bench.home / f"hub/datasets--HuggingFaceFW--fineweb/snapshots/{'a' * 40}" / path)
        for folder in (blob.parent, names[-1].parent):
            folder.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(bytes(len(content)) if damage else content)
        names[-1].symlink_to(os.path.relpath(blob, names[-1].parent))
    bench.run("--name", "older")
    assert bench.hashes("older") == undisturbed
    assert [name.read_bytes() for name in names] == [bench.hub.files[REPO][path] for path in FILES]
    assert len(bench.cached()) == len(FILES), "and nothing else is left"
    assert bool(bench.hub.bytes_of("GET")) == damage


def cached_file(cache: Path, repo: str, commit: str, content: Path) -> Path:
    """A name in the cache that points to the repository's own link to this content, as in a shared store."""
    blob = cache / f"datasets--{repo}" / "blobs" / "etag"
    name = cache / f"datasets--{repo}" / "snapshots" / commit / "sample" / "x.parquet"
    for link, target in ((blob, content), (name, blob)):
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(target, link.parent))
    return name


@pytest.mark.parametrize(("other_commit", "other_repo"), [("", ""), ("b" * 40, ""), ("", "me--copy")])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_content_goes_with_the_last_name_that_has_it(tmp_path, monkeypatch, other_commit, other_repo,
                                                       dangling):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    store = tmp_path / "blobs" / "ab" / ("ab" + 62 * "0")
    store.parent.mkdir(parents=True)
    store.write_bytes(b"payload")
    (tmp_path / "blobs/.huggingface-shared-blobs").write_text("1\n")
    mine = cached_file(tmp_path, "a--b", "c" * 40, store)
    others = [cached_file(tmp_path, "a--b", other_commit, store)] if other_commit else []
    others += [cached_file(tmp_path, other_repo, "d" * 40, store)] if other_repo else []
    store.with_suffix(".refs").write_text("".join(f"datasets--{repo}/blobs/etag\n"
                                                  for repo in ("a--b", other_repo) if repo))
    if dangling:
        (mine.parent / "lost").symlink_to("../../../blobs/lost")
    hub.forget(mine)
    assert not mine.is_symlink() and all(name.read_bytes() == b"payload" for name in others)
    assert store.exists() == bool(others)
    assert (tmp_path / "datasets--a--b/blobs/etag").is_symlink() == bool(other_commit)


def test_a_copy_where_links_are_not_supported_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    copy = tmp_path / "datasets--a--b/snapshots" / ("c" * 40) / "x.parquet"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"content")
    hub.forget(copy)
    assert not copy.exists()


def test_more_shards_later_leave_the_old_ones(bench_of_hub, undisturbed):
    bench = bench_of_hub
    bench.run("--name", "grows", "--num_shards", "2")
    times = {path: path.stat().st_mtime_ns for path in bench.data("grows").glob("*.bin")}
    assert "reusing" in bench.run("--name", "grows", "--num_shards", "2").stdout
    bench.run("--name", "grows", "--num_shards", "9")
    assert bench.hashes("grows") == undisturbed[:2 + 9]
    bench.run("--name", "grows")
    assert bench.hashes("grows") == undisturbed
    assert all(path.stat().st_mtime_ns == made for path, made in times.items())
    refused = bench.run("--name", "grows", "--num_shards", "1", code=1)
    assert "made with a different num_shards" in refused.stderr
    assert "reusing" in bench.run("--name", "grows").stdout


@pytest.mark.parametrize("more", [0, 1, 5, 9])
def test_killed_and_started_again_it_ends_with_the_same_bytes(bench_of_hub, undisturbed, more):
    """Killed twice: as it fetches a file (0), or once there are so many more shards than before."""
    bench = bench_of_hub
    bench.hub.wait = lambda path: time.sleep(0.1)

    def got() -> int:
        return len(list(bench.folder.glob("data/.killed.partial/**/*.bin"))) if more \
            else bench.hub.bytes_of("GET")
    for workers in ("1", "2"):
        enough = got() + max(more, 1)
        job = bench.start("--name", "killed", "--num_workers", workers)
        while got() < enough:
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.005)
        job.kill()
        job.communicate()
    bench.hub.wait = lambda path: None
    bench.run("--name", "killed", "--num_workers", "2" if more == 5 else "1")
    assert bench.hashes("killed") == undisturbed and bench.cached() == []


def test_finished_files_are_not_fetched_again_after_a_kill(bench_of_hub, undisturbed):
    bench = bench_of_hub
    bench.hub.wait = lambda path: time.sleep(0.3)
    job = bench.start("--name", "late")
    while not list(bench.folder.glob("data/.late.partial/unit_000002/000001.bin")):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.01)
    job.kill()
    job.communicate()
    manifest_order = [json.loads(path.read_text())["name"]
                      for path in sorted(bench.folder.glob("data/.late.partial/unit_*/progress.json"))]
    bench.hub.asked.clear()
    bench.run("--name", "late")
    assert bench.hashes("late") == undisturbed
    assert not any(bench.hub.asked["GET", path] for path in manifest_order[:2])


def test_a_file_whose_download_began_early_is_fetched_once(bench_of_hub, undisturbed):
    bench = bench_of_hub
    bench.hub.wait = lambda path: time.sleep(0.1)
    bench.run("--name", "beside")
    assert bench.hashes("beside") == undisturbed and all(bench.hub.asked["GET", path] == 1 for path in FILES)


def test_parts_make_the_same_as_one_machine(bench_of_hub, undisturbed):
    bench = bench_of_hub
    for part in ("2/3", "1/3", "3/3"):
        said = bench.run("--name", "parts", "--part", part).stdout
        assert f"part {part[0]} of 3" in said and not bench.data("parts").exists()
    asked = dict(bench.hub.asked)
    bench.run("--name", "parts")
    assert bench.hashes("parts") == undisturbed
    again = {path for (method, path), count in bench.hub.asked.items()
             if method == "GET" and count > asked.get((method, path), 0)}
    assert len(again) <= 1      # the one with the documents to validate on


def test_torchrun_makes_the_same_as_one_process(bench_of_hub, undisturbed):
    bench = bench_of_hub
    done = run(bench.folder, *torchrun(3)[1:], *bench.command("--name", "ranks", "--num_shards", "9"),
               env=bench.env)
    assert bench.hashes("ranks") == undisturbed[:2 + 9]
    assert done.stdout.count("wrote data/ranks") == 1


def test_torchrun_adds_what_one_process_adds(bench_of_hub, undisturbed):
    bench = bench_of_hub
    bench.run("--name", "ranks", "--num_shards", "2")
    run(bench.folder, *torchrun(2)[1:], *bench.command("--name", "ranks", "--num_shards", "9"),
        env=bench.env)
    assert bench.hashes("ranks") == undisturbed[:2 + 9]
    said = bench.run("--name", "ranks", "--part", "2/2").stdout
    assert said == "data/ranks already exists; to add shards to it, leave out --part\n"


def test_a_dry_run_only_talks(bench_of_hub):
    bench = bench_of_hub
    said = bench.run("--name", "dry", "--num_shards", "1", "--dry_run").stdout
    assert "of 6 of fineweb10B-" in said and "download    " in said and "MB are free" in said
    assert not (bench.folder / "data").exists() and not bench.cached()
    assert not bench.hub.asked["GET", FILES[0]]


def test_the_tokenizer_learns_from_the_hub(bench_of_hub):
    bench = bench_of_hub
    bench.run(script=["train_tokenizer.py", "--source", "10B", "--samples", "9000", "--vocabsize", "300",
                      "--name", "web", "--num_workers", "1"])
    assert (bench.folder / "tokenizers" / "web" / "meta.json").is_file()
    shutil.rmtree(bench.folder / "tokenizers" / "web")


# ------------------------------------------------------------------------------------------------
# A corpus that holds out a file
# ------------------------------------------------------------------------------------------------

def climbmix(bench: Bench, name: str, *flags: str) -> str:
    return bench.run("--version", "climbmix", "--val_tokens", "1e6", "--name", name, *flags).stdout


def texts_by_side(bench: Bench, name: str) -> list[list[str]]:
    return [decoded(bench, name, split) for split in ("train", "val")]


def test_climbmix_validates_on_its_last_file_and_trains_on_all_others(bench_of_hub):
    bench = bench_of_hub
    climbmix(bench, "whole")
    *others, last = (texts_of(bench.hub.files[CLIMBMIX][path]) for path in CLIMBMIX_FILES)
    train, val = texts_by_side(bench, "whole")
    test = decoded(bench, "whole", "test")
    assert sorted(train) == sorted(itertools.chain(*others)) and sorted(val + test) == sorted(last) and test
    assert any(Rule().holds_out(text) for text in train), "no hash holds out anything"
    manifest = json.loads((bench.data("whole") / "manifest.json").read_text())
    assert manifest["source"].startswith("climbmix-") and bench.cached() == []
    assert manifest["held_out"]["rule"] == "the documents of shard_06542.parquet"
    assert Rule.of_facts(manifest["held_out"]) == Rule(one_in=0, file="shard_06542.parquet")


def test_what_climbmix_holds_out_depends_on_neither_seed_nor_size(bench_of_hub):
    bench = bench_of_hub
    climbmix(bench, "some", "--num_shards", "1", "--seed", "5")
    assert {path for (method, path), _ in bench.hub.asked.items() if method == "GET"} > {CLIMBMIX_FILES[3]}
    assert sum(method == "GET" for method, _ in bench.hub.asked) == 2, "one file of each side is enough"
    climbmix(bench, "more")
    climbmix(bench, "some", "--seed", "5")      # it grows
    some, more = texts_by_side(bench, "some"), texts_by_side(bench, "more")
    assert bench.hashes("some")[0] == bench.hashes("more")[0]
    assert sorted(some[0]) == sorted(more[0]) and some[0] != more[0]
    few = bench.run("--version", "climbmix", "--val_tokens", "100", "--name", "few").stdout
    assert "wrote data/few" in few and set(decoded(bench, "few", "val")) < set(more[1])


def test_climbmix_killed_and_started_again_ends_with_the_same_bytes(bench_of_hub):
    bench = bench_of_hub
    climbmix(bench, "calm")
    bench.hub.wait = lambda path: time.sleep(0.2)
    for written in (1, 3):      # once while it validates or begins to train, once in a later file
        job = bench.start("--version", "climbmix", "--val_tokens", "1e6", "--name", "killed")
        while len(list(bench.folder.glob("data/.killed.partial/**/*.bin"))) < written:
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.005)
        job.kill()
        job.communicate()
    bench.hub.faults[f"GET {CLIMBMIX_FILES[2]}"] = ["cut", "rubbish"]
    climbmix(bench, "killed", "--num_workers", "2")
    assert bench.hashes("killed") == bench.hashes("calm") and bench.cached() == []


def test_parts_of_climbmix_make_the_same_as_one_machine(bench_of_hub):
    bench = bench_of_hub
    climbmix(bench, "one")
    for part in ("2/2", "1/2"):
        climbmix(bench, "parts", "--part", part)
    climbmix(bench, "parts")
    assert bench.hashes("parts") == bench.hashes("one")


def test_a_tokenizer_of_climbmix_is_measured_on_the_held_out_file(bench_of_hub):
    bench = bench_of_hub
    bench.run(script=["train_tokenizer.py", "--source", "climbmix", "--samples", "1e5", "--vocabsize", "300",
                      "--regex", "nanochat", "--name", "mix", "--num_workers", "1"])
    meta = json.loads((bench.folder / "tokenizers/mix/meta.json").read_text())
    shutil.rmtree(bench.folder / "tokenizers/mix")
    others = [text for path in CLIMBMIX_FILES[:3] for text in texts_of(bench.hub.files[CLIMBMIX][path])]
    last = texts_of(bench.hub.files[CLIMBMIX][CLIMBMIX_FILES[3]])
    assert (meta["documents"], meta["characters"]) == (len(others), sum(map(len, others)))
    assert meta["statistics"]["held_out_bytes"] == sum(len(text.encode()) for text in last)
    assert r"\p{N}{1,2}" in meta["pattern"] and meta["regex"] == "nanochat"


def test_climbmix_without_its_last_file_is_refused(bench_of_hub):
    bench = bench_of_hub
    last = bench.hub.files[CLIMBMIX].pop(CLIMBMIX_FILES[3])
    try:
        refused = bench.run("--version", "climbmix", "--name", "headless", code=1)
    finally:
        bench.hub.files[CLIMBMIX][CLIMBMIX_FILES[3]] = last
    assert "has no shard_06542.parquet, the file to validate on" in refused.stderr
    assert not bench.data("headless").exists()


# ------------------------------------------------------------------------------------------------
# What may happen to it
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("faults", [
    {f"GET {FILES[0]}": ["cut"], f"HEAD {FILES[1]}": ["429"], f"GET {FILES[1]}": ["429"],
     f"GET {FILES[2]}": ["500", "503"], f"GET {FILES[3]}": ["html"], f"GET {FILES[4]}": ["longer"],
     f"GET {FILES[5]}": ["slow"]},
    {f"GET {FILES[0]}": ["cut", "cut", "cut"], f"HEAD {FILES[2]}": ["500", "502", "503"],
     f"HEAD {FILES[3]}": ["html"], f"GET {FILES[3]}": ["html"], f"GET {FILES[4]}": ["rubbish", "rubbish"],
     f"HEAD {FILES[5]}": ["slow"], f"tree {REPO}": ["500", "429", "html"]},
], ids=["once", "often"])
def test_what_the_network_does_is_waited_out(bench_of_hub, undisturbed, faults):
    bench = bench_of_hub
    for path, what in faults.items():
        bench.hub.faults[path] = list(what)
    bench.run("--name", "faulty")
    assert bench.hashes("faulty") == undisturbed
    assert not any(bench.hub.faults.values()), "every fault has happened"


@pytest.mark.parametrize(("faults", "line"), [
    ({f"HEAD {FILES[0]}": ["401"] * 9}, "accept the terms"),
    ({f"tree {REPO}": ["401"] * 9}, "accept the terms"),
    ({f"HEAD {FILES[2]}": ["404"] * 9}, "(404)"),
    ({f"GET {FILES[2]}": ["500"] * 99}, "5 attempts: 500 Internal Server Error; run the same command again"),
    ({f"GET {FILES[2]}": ["rubbish"] * 99}, "in 5 attempts: its SHA-256 differs from the announced one; "),
], ids=str)
def test_what_waiting_does_not_mend_is_one_line(bench_of_hub, undisturbed, faults, line):
    bench = bench_of_hub
    for path, what in faults.items():
        bench.hub.faults[path] = list(what)
    refused = bench.run("--name", "refused", code=1)
    assert line in refused.stderr.splitlines()[-1] and not bench.data("refused").exists()
    bench.hub.faults.clear()
    bench.run("--name", "refused")          # and it goes on
    assert bench.hashes("refused") == undisturbed


def test_a_file_that_is_no_parquet_is_named(bench_of_hub):
    bench = bench_of_hub
    good = bench.hub.files[REPO][FILES[3]]
    try:
        bench.hub.files[REPO][FILES[3]] = good[:500] + b"rubbish" + good[507:-300] + bytes(300)
        refused = bench.run("--name", "corrupt", code=1)
    finally:
        bench.hub.files[REPO][FILES[3]] = good
    assert "003_00000.parquet is not a readable parquet file" in refused.stderr
    assert not bench.data("corrupt").exists()


def test_a_repository_that_is_not_there(bench_of_hub):
    bench = bench_of_hub
    refused = bench.run("--version", "100Bedu", code=1)
    assert re.search(r"error: http://127\S+ .*fineweb-edu.*", refused.stderr.splitlines()[-1])


def test_offline_says_so(bench_of_hub):
    refused = bench_of_hub.run("--name", "offline", code=1, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in refused.stderr


def test_the_token_reaches_the_hub_and_no_file(bench_of_hub):
    bench = bench_of_hub
    bench.run("--name", "token", "--num_shards", "1", HF_TOKEN="hf_" + "x" * 30)
    assert f"Bearer hf_{'x' * 30}" in bench.hub.tokens
    assert not [path for path in bench.data("token").iterdir() if b"hf_xxx" in path.read_bytes()]


def test_pauses_grow_and_are_as_long_as_asked(monkeypatch):
    waits, answers = [], iter([ConnectionError("gone"), ConnectionError("gone"), TimeoutError(), 7])

    def ask():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    assert hub._patiently("it", ask) == 7
    assert waits[0] < waits[1] < waits[2] < 6
    with pytest.raises(UserError, match="in 5 attempts: gone;"):
        hub._patiently("it", lambda: (_ for _ in ()).throw(ConnectionError("gone")))


# ------------------------------------------------------------------------------------------------
# Ready-made shards
# ------------------------------------------------------------------------------------------------

def shard_of(tokens: list[int]) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.array(tokens, dtype="<u2").tobytes()


@pytest.fixture
def gpt2(kit):
    """A tokenizer that stands in for GPT-2's, in the scripts of the kit."""
    folder, fake, _ = kit
    script = folder / "benchtop/tokenizer.py"
    real = script.read_text()
    script.write_text(real.replace('return tiktoken.get_encoding("gpt2")', "return encoding_of('gpt2', "
                                   "PATTERNS['gpt2'], [bytes([byte]) for byte in range(256)])"))
    rng = random.Random(0)
    for number in range(4):
        name = f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"
        tokens = [token for _ in range(9) for token in (256, *rng.choices(range(256), k=20 + number))]
        fake.files["kjj0/fineweb10B-gpt2"][name] = shard_of(tokens)
    yield
    script.write_text(real)
    del fake.files["kjj0/fineweb10B-gpt2"]


def test_ready_made_shards_get_a_manifest(bench_of_hub, gpt2):
    bench = bench_of_hub
    said = bench.run("--version", "10B-gpt2", "--num_shards", "2").stdout
    assert "wrote data/10B-gpt2: 405 tokens in 18 documents for training, 189 in 9 for validation" in said
    manifest = json.loads((bench.data("10B-gpt2") / "manifest.json").read_text())
    shards.Dataset(bench.data("10B-gpt2"), manifest).verify()
    assert (manifest["tokenizer"], manifest["revision"]) == ("gpt2", COMMIT)
    assert [entry["bytes"] for entry in manifest["shards"]] == [180, 189, 198]
    asked = bench.hub.asked["GET", "fineweb_train_000001.bin"]
    bench.hub.faults["GET fineweb_train_000003.bin"] = ["cut", "rubbish"]
    bench.run("--version", "10B-gpt2")
    assert len(bench.hashes("10B-gpt2")) == 4
    assert bench.hub.asked["GET", "fineweb_train_000001.bin"] == asked == 1
    assert not list(bench.home.rglob("*.bin"))


def test_ready_made_shards_never_replace_others(bench_of_hub, gpt2):
    bench = bench_of_hub
    for line in (["--num_shards", "1"], ["--version", "10B-gpt2", "--name", "ready"]):
        bench.run("--name", "mine", *line)
    before = [(bench.data(name) / "manifest.json").read_bytes() for name in ("mine", "ready")]
    for name, why, flags in [("mine", "source", []), ("ready", "num_shards", ["--num_shards", "1"])]:
        refused = bench.run("--version", "10B-gpt2", "--name", name, *flags, code=1)
        assert f"data/{name} exists and was made with a different {why}" in refused.stderr
    assert [(bench.data(name) / "manifest.json").read_bytes() for name in ("mine", "ready")] == before
    shard = bench.data("ready") / "train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    refused = bench.run("--version", "10B-gpt2", "--name", "ready", code=1)
    assert re.search("train_000001.bin has changed .*; first remove it with: rm -r ", refused.stderr)


def test_ready_made_shards_of_another_vocabulary_are_refused(bench_of_hub, gpt2):
    bench = bench_of_hub
    bench.hub.files["kjj0/fineweb10B-gpt2"]["fineweb_train_000001.bin"] = shard_of([256, 300, 4])
    refused = bench.run("--version", "10B-gpt2", code=1)
    assert "has token 300" in refused.stderr and not bench.data("10B-gpt2").exists()
