"""Files of datasets on the Hugging Face Hub: list and download them.

Downloads are stored in huggingface_hub's own cache and verified against the size and SHA-256 that the Hub
announces. Network failures are retried: an interrupted download resumes, and a busy or failing Hub is asked
again after a growing pause (or the one it asks for); each pause is reported. What a retry cannot fix (no such
dataset, no permission) ends in a one-line error. HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE have their
usual meaning.
"""

import contextlib
import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from benchtop.documents import Document, Source, Unit, parquet_rows, shuffled
from benchtop.errors import UserError, first_line
from benchtop.files import sha256_of

TRIES = 5               # attempts per file
FIRST_WAIT = 1.0        # seconds; doubled after each attempt
LONGEST_WAIT = 60.0     # seconds; up to LONGEST_ASKED_WAIT if the Hub asks for it
LONGEST_ASKED_WAIT = 300.0


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset at one commit.

    sha256  of its content; empty if the Hub does not give it
    """
    repo: str
    revision: str
    path: str
    size: int
    sha256: str


def list_files(repo: str, folder: str, suffix: str, revision: str = "main") -> list[HubFile]:
    """The files below a folder of a dataset, sorted by path, at the commit that `revision` points to now.

    raises  UserError if there are none or the Hub does not answer
    """
    hub = _library()
    from huggingface_hub.hf_api import RepoFile

    def ask() -> list[HubFile]:
        tree = hub.HfApi().list_repo_tree(repo, folder or None, recursive=True, revision=revision,
                                          repo_type="dataset")
        entries = [entry for entry in tree if isinstance(entry, RepoFile) and entry.path.endswith(suffix)]
        if not entries:
            raise UserError(f"{repo} on {_endpoint()} has no {suffix} files in {folder or 'it'}")
        entries.sort(key=lambda entry: entry.path)
        url = hub.hf_hub_url(repo, entries[0].path, revision=revision, repo_type="dataset")
        commit = hub.get_hf_file_metadata(url).commit_hash
        if not commit:
            raise UserError(f"{_endpoint()} does not report the commit of {repo}; is HF_ENDPOINT right?")
        return [HubFile(repo, commit, entry.path, entry.size, entry.lfs.sha256 if entry.lfs else "")
                for entry in entries]
    return _patiently(f"the list of files of {repo}", ask)


def fetch(file: HubFile) -> Path:
    """The path of a complete copy in the cache; downloaded if it is missing or damaged.

    raises  UserError if retrying does not help
    """
    hub, damaged = _library(), []

    def ask() -> Path:
        # forced after damage, since damaged content stays cached if another revision points to it
        path = Path(hub.hf_hub_download(file.repo, file.path, repo_type="dataset", revision=file.revision,
                                        force_download=bool(damaged)))
        problem = problem_of(path, file)
        if problem:
            damaged.append(path)
            forget(path)
            raise _Damaged(problem)
        return path
    return _patiently(f"{file.path} of {file.repo}", ask)


def fetch_url(url: str) -> bytes:
    """The complete content of a small file anywhere on the web.

    raises  UserError if retrying does not help
    """
    import httpx2

    def ask() -> bytes:
        response = httpx2.get(url, follow_redirects=True, timeout=30)
        response.raise_for_status()
        return response.content
    if _library().constants.HF_HUB_OFFLINE:
        raise UserError(f"HF_HUB_OFFLINE is set; unset it to fetch {url}")
    return _patiently(url, ask, host=url.split("/")[2])


def in_cache(file: HubFile) -> bool:
    look = _library().try_to_load_from_cache
    return isinstance(look(file.repo, file.path, revision=file.revision, repo_type="dataset"), str)


def problem_of(path: Path, file: HubFile) -> str:
    """How a copy differs from what the Hub announced; empty if it does not."""
    size = path.stat().st_size
    if size != file.size:
        return f"it has {size:,} bytes instead of {file.size:,}"
    if file.sha256 and sha256_of(path) != file.sha256:
        return "its SHA-256 differs from the announced one"
    return ""


def forget(path: Path) -> None:
    """Remove a copy from the cache, and its content unless another revision or repository uses it, too.

    huggingface_hub removes the files and checks the other repositories. The other revisions are checked here,
    since its own check fails if a repository has one broken link.
    """
    hub = _library()
    cache = Path(hub.constants.HF_HUB_CACHE)
    snapshots = cache / path.relative_to(cache).parts[0] / "snapshots"
    content = content_of(path)
    is_shared = any(content_of(name) == content for name in snapshots.rglob("*") if name != path)
    hub.DeleteCacheStrategy(expected_freed_size=0, files=frozenset([path]), cache_dir=cache,
                            blobs=frozenset() if is_shared or content == path else frozenset([content]),
                            refs=frozenset(), repos=frozenset(), snapshots=frozenset()).execute()


def content_of(name: Path) -> Path:
    """The target of a name in the cache, following one link only: beyond it, contents may be shared."""
    return Path(os.path.abspath(name.parent / os.readlink(name))) if name.is_symlink() else name


class Download(threading.Thread):
    """Downloads a file in the background; a process that exits does not wait for it."""

    def __init__(self, file: HubFile):
        super().__init__(daemon=True)
        self.file, self._result, self._error = file, None, None
        self.start()

    def run(self) -> None:
        try:
            self._result = fetch(self.file)
        except Exception as error:      # raised by result()
            self._error = error

    def result(self) -> Path:
        self.join()
        if self._error:
            raise self._error
        return self._result


# ------------------------------------------------------------------------------------------------
# Retries
# ------------------------------------------------------------------------------------------------

class _Damaged(Exception):
    pass


def _library():
    """huggingface_hub without progress bars; imported late, since the import is slow."""
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.utils
    huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def _endpoint() -> str:
    return _library().constants.ENDPOINT


def _patiently(what: str, ask: Callable, host: str = ""):
    """The result of `ask`, which is tried up to TRIES times."""
    for attempt in range(1, TRIES + 1):
        try:
            return ask()
        except Exception as error:
            complaint, asked_wait = _reason_to_wait(what, error, host or _endpoint())
            if attempt == TRIES:
                raise UserError(f"cannot fetch {what} in {TRIES} attempts: {complaint}; run the same "
                                "command again later") from error
            wait = pause(attempt, asked_wait)
            print(f"{what}: {complaint}; trying again in {wait:.0f} s ({attempt} of {TRIES - 1})",
                  file=sys.stderr, flush=True)
            time.sleep(wait)


def _reason_to_wait(what: str, error: Exception, host: str) -> tuple[str, float]:
    """What went wrong, and how many seconds the Hub asks to wait.

    raises  UserError if waiting does not help; the error itself if it is not a network error
    """
    hub = _library()
    import httpx2
    if isinstance(error, hub.errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__         # what made the library look into its cache
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    if isinstance(error, hub.errors.OfflineModeIsEnabled) or hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"HF_HUB_OFFLINE is set, and {what} is not in the cache; unset it") from error
    if isinstance(error, hub.errors.GatedRepoError) or status in (401, 403):
        raise UserError(f"{host} denies you {what} ({status}); accept the terms on its page, "
                        "then set HF_TOKEN to a token from your settings, or type: hf auth login") from error
    if status == 404 or isinstance(error, hub.errors.EntryNotFoundError):
        advice = "; is HF_ENDPOINT right?" if host == _endpoint() else ""
        raise UserError(f"{host} does not have {what} (404){advice}") from error
    if status is not None and status not in (408, 425, 429) and status < 500:
        raise UserError(f"{host} refuses {what}: {status} {response.reason_phrase}") from error
    if isinstance(error, UserError):
        raise error
    of_the_network = (_Damaged, httpx2.HTTPError, hub.errors.HfHubHTTPError, hub.errors.FileMetadataError,
                      ConnectionError, TimeoutError)
    is_short = isinstance(error, OSError) and "onsistency check failed" in str(error)
    if not isinstance(error, of_the_network) and not is_short and not isinstance(error, ValueError):
        raise error
    if status is not None:
        return f"{status} {response.reason_phrase}", seconds_asked(response)
    return first_line(error), 0.0


def pause(attempt: int, asked_wait: float) -> float:
    """Seconds to wait after a failed attempt (the first is 1), if the server asks for `asked_wait`."""
    wait = min(LONGEST_WAIT, FIRST_WAIT * 2**(attempt - 1)) * random.uniform(0.75, 1.25)
    return max(wait, min(asked_wait, LONGEST_ASKED_WAIT))


def seconds_asked(response) -> float:
    """Seconds that a response's Retry-After (seconds or a date) asks to wait; 0 without one.

    source  RFC 9110, 10.2.3
    """
    told = response.headers.get("Retry-After", "")
    with contextlib.suppress(ValueError):
        return float(told)
    with contextlib.suppress(ValueError, OverflowError):
        return parsedate_to_datetime(told).timestamp() - time.time()
    return 0.0


# ------------------------------------------------------------------------------------------------
# Documents
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Corpus:
    """Text on the Hub: the parquet files below a folder of a dataset.

    word      name of its data
    held_out  the file that is held out as a whole; empty: documents are held out by a hash of their text
    tokens    approximate size, for estimates; 0: unknown
    """
    word: str
    repo: str
    folder: str
    held_out: str = ""
    tokens: float = 0


CORPORA = {f"{size}{kind}": Corpus(f"fineweb{size}{kind}", f"HuggingFaceFW/fineweb{'-edu' if kind else ''}",
                                   folder)
           for kind in ("", "edu")
           for size, folder in (("10B", "sample/10BT"), ("100B", "sample/100BT"), ("350B", "sample/350BT"),
                                ("full", "data"))}
# the data of the five-minute runs that karpathy/autoresearch compares
CORPORA["climbmix"] = Corpus("climbmix", "karpathy/climbmix-400b-shuffle", "", "shard_06542.parquet", 4e11)
READY_MADE = {"10B-gpt2": "kjj0/fineweb10B-gpt2", "100B-gpt2": "kjj0/fineweb100B-gpt2",
              "10Bedu-gpt2": "kjj0/finewebedu10B-gpt2"}


class HubText(Source):
    """Documents of parquet files on the Hub, one file at a time.

    revision  commit of the files
    raises    UserError if the file to hold out is not among them
    """
    is_large = True

    def __init__(self, version: str):
        self.corpus = CORPORA[version]
        self.held_out_file = self.corpus.held_out
        self.hub_files = list_files(self.corpus.repo, self.corpus.folder, ".parquet")
        self.revision = self.hub_files[0].revision
        if self.held_out_file not in ("", *(file.path for file in self.hub_files)):
            raise UserError(f"{self.corpus.repo} on {_endpoint()} has no {self.held_out_file}, the file to "
                            "validate on")
        stamp = [[file.path, file.size, file.sha256] for file in self.hub_files]
        super().__init__(self.corpus.word, [], stamp)
        self._downloads: dict[str, Download] = {}

    def __iter__(self) -> Iterator[Document]:
        """All documents; the order of the files depends only on their names."""
        for unit in self.units(seed=None):
            yield from unit.read()

    def units(self, seed: int | None) -> list[Unit]:
        """One unit per file, shuffled by the seed; without a seed, in a fixed order.

        A held-out file comes first in the fixed order, which is used to find held-out text, otherwise last.
        """
        files = sorted(self.hub_files, key=lambda file: hashlib.sha256(file.path.encode()).digest())
        if seed is not None:
            random.Random(seed).shuffle(files)
        files.sort(key=lambda file: (file.path == self.held_out_file) == (seed is not None))
        return [self._unit(file, seed) for file in files]

    def _unit(self, file: HubFile, seed: int | None) -> Unit:
        def begin() -> None:
            self._downloads[file.path] = Download(file)

        def read() -> Iterator[Document]:
            download = self._downloads.pop(file.path, None)
            path = download.result() if download else fetch(file)
            unit.documents = parquet_rows(path)
            full = (document for document in self._read_parquet(file.path, path) if document[1])
            return full if seed is None else shuffled(full, seed)

        def remove() -> None:
            forget(fetch(file))
        unit = Unit(file.path, read, file.size, is_here=lambda: in_cache(file), begin=begin, remove=remove)
        return unit
