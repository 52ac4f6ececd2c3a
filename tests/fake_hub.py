"""A small Hugging Face Hub on 127.0.0.1, which misbehaves when told to."""

import hashlib
import json
import os
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves datasets: `hub.files[repo][path] = bytes`; the repository is REPO, or REPO@REVISION if not main.

    faults  path -> what to do to the next requests for it, one a request: see Handler.misbehave
    asked   how often each (method, path) was asked for
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.pages: dict[str, bytes] = {}           # of other paths
        self.announced: dict[str, bytes] = {}       # what the tree tells of, where it is not the content
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.asked: Counter[tuple[str, str]] = Counter()
        self.tokens: list[str] = []
        self.wait: Callable[[str], None] = lambda path: None
        handler = type("ThisHub", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def behave(self) -> None:
        """Forget what a test told it, but for the files."""
        for told in (self.faults, self.asked, self.announced, self.tokens, self.pages):
            told.clear()
        self.wait = lambda path: None

    def environment(self, home: Path) -> dict[str, str]:
        """For a process that shall ask this Hub, with a cache of its own."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return env | {"HF_HOME": str(home), "HF_ENDPOINT": self.url, "HF_HUB_DOWNLOAD_TIMEOUT": "1",
                      "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def name_of(self, repo: str, revision: str) -> str:
        """The name in `files` of a repository's revision, which may be given by its commit."""
        for name in list(self.files):
            its_repo, _, its_revision = name.partition("@")
            if its_repo == repo and revision in (its_revision or "main", commit_of(name)):
                return name
        return f"{repo}@{revision}"

    def bytes_of(self, method: str) -> int:
        return sum(count for (asked, _), count in self.asked.items() if asked == method)


def commit_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest() if "@" in name else COMMIT


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        if self.headers.get("Authorization"):
            hub.tokens.append(self.headers["Authorization"])
        tree = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        if tree:
            self.tree(hub.name_of(tree[1], unquote(tree[2])), unquote(tree[3] or ""))
        elif file:
            self.file(hub.name_of(file[1], unquote(file[2])), unquote(file[3]))
        elif path in hub.pages:
            self.answer(200, hub.pages[path])
        else:
            self.answer(404, b'{"error": "not found"}')

    def tree(self, repo: str, folder: str) -> None:
        self.hub.asked["TREE", folder] += 1
        if self.hub.faults[f"tree {repo}"] and self.misbehave(self.hub.faults[f"tree {repo}"].pop(0), b""):
            return
        if repo not in self.hub.files:
            self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        entries = []
        for path, content in self.hub.files[repo].items():
            if path.startswith(folder):
                told = self.hub.announced.get(path, content)
                digest = hashlib.sha256(told).hexdigest()
                entries.append({"type": "file", "path": path, "size": len(told), "oid": digest[:40],
                                "lfs": {"oid": digest, "size": len(told), "pointerSize": 130}})
        self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, path: str) -> None:
        self.hub.asked[self.command, path] += 1
        content = self.hub.files.get(repo, {}).get(path)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_of(repo)})
            return
        faults = self.hub.faults[f"{self.command} {path}"]
        if faults and self.misbehave(faults.pop(0), content):
            return
        self.hub.wait(path)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit_of(repo),
                   "Accept-Ranges": "bytes"}
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin:
            start = int(begin[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], headers)
        else:
            self.answer(200, content, headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None,
               length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def misbehave(self, fault: str, content: bytes) -> bool:
        """Do something wrong; False if a right answer may follow."""
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if fault == "cut":
            self.answer(200, content[:len(content) // 2], headers, length=len(content))
            self.close_connection = True
            self.wfile.flush()
            self.connection.close()
        elif fault == "429":
            self.answer(429, b"slow down", {"Retry-After": "1"})
        elif fault.isdigit():
            errors = {"401": "GatedRepo", "403": "GatedRepo", "404": "EntryNotFound"}
            code = {"X-Error-Code": errors[fault]} if fault in errors else {}
            self.answer(int(fault), b"error", code)
        elif fault == "html":
            page = b"<html><body>Service temporarily unavailable</body></html>"
            self.answer(200, page, headers | {"Content-Type": "text/html"})
        elif fault == "longer":
            self.answer(200, content + b"more", headers)
        elif fault == "rubbish":
            self.answer(200, bytes(len(content)), headers)
        elif fault == "slow":
            time.sleep(3)
            return False
        return True
