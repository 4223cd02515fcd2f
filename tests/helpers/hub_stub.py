"""A model hub on this machine: what huggingface_hub asks over HTTP, from folders, with a record of requests."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN = "hf_the_right_one"


@dataclass
class Hub:
    """Repositories, and what was asked about them.

    Attributes:
        repositories: Per id and revision, the folder that holds its files.
        gated: The ids that need `TOKEN`.
        requests: Method and path of every request, in order.
        ranges: Repository path and range of every request for a part of a file, in order.
        encodings: What each of these accepts; a part is one of the compressed file where gzip is accepted.
        sent: Per file name, how many bytes of its content were sent.
        unranged: Answer a request for a part with the whole, as a server may.
        tokens: The value of every Authorization header that was sent.
        endpoint: Where the hub listens.
    """

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    encodings: list[str | None] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    unranged: bool = False
    tokens: list[str] = field(default_factory=list)
    endpoint: str = ""

    def downloads(self) -> set[str]:
        """Return the names of the files whose content was fetched whole."""
        parts = [path for path, _ in self.ranges]
        return {_name(path) for verb, path in self.requests if _fetches(verb, path) and path not in parts}

    def folder(self, repo: str, revision: str) -> Path | None:
        """Return the folder of a branch or commit; None if there is no such revision."""
        branches = self.repositories[repo]
        return branches.get(revision) or next((f for b, f in branches.items() if commit(repo, b) == revision), None)


def commit(repo: str, branch: str) -> str:
    """Return the commit that a branch is at."""
    return hashlib.sha1(f"{repo}@{branch}".encode(), usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub on a free port of loopback, which huggingface_hub takes for the real one in the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", hub.endpoint)
            template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _fetches(verb: str, path: str) -> bool:
    return verb == "GET" and "/resolve/" in path


def _name(path: str) -> str:
    return path.split("/resolve/")[1].split("/", 1)[1]


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


class _Handler(BaseHTTPRequestHandler):
    """Answers about one hub's repositories as the real one does."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token:
            self.hub.tokens.append(token)
        repo = next((r for r in self.hub.repositories if path.startswith((f"/api/models/{r}", f"/{r}/resolve/"))), None)
        if repo is None:
            self._refuse(401 if not token else 404, "RepoNotFound", "Repository not found")
        elif repo in self.hub.gated and token != TOKEN:
            self._refuse(401, "GatedRepo", f"Access to model {repo} is restricted.")
        elif path.startswith("/api/"):
            self._describe(repo, path.removeprefix(f"/api/models/{repo}").strip("/"))
        else:
            revision, _, name = path.removeprefix(f"/{repo}/resolve/").partition("/")
            self._file(repo, revision, name)

    def _describe(self, repo: str, rest: str) -> None:
        kind, _, revision = rest.partition("/")
        revision = revision.strip("/") or "main"
        folder = self.hub.folder(repo, revision)
        if folder is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = _files(folder)
        sha = revision if len(revision) == 40 else commit(repo, revision)
        if kind == "tree":
            tree = [_entry(name, path) for name, path in files.items()]
            self._send(json.dumps(tree).encode(), {"Content-Type": "application/json"})
        else:
            info = {"id": repo, "modelId": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
            self._send(json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        folder = self.hub.folder(repo, revision)
        path = None if folder is None else _files(folder).get(name)
        if path is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        sha = revision if len(revision) == 40 else commit(repo, revision)
        headers = {"X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        if "Range" in self.headers and not self.hub.unranged:
            self._part(path, name, headers)
            return
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._count(name, content)
        self._send(content, {"ETag": etag, **headers})

    def _part(self, path: Path, name: str, headers: dict[str, str]) -> None:
        self.hub.ranges.append((unquote(urlsplit(self.path).path), self.headers["Range"]))
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.hub.encodings.append(self.headers["Accept-Encoding"])
        if "gzip" in (self.headers["Accept-Encoding"] or ""):
            # As RFC 9110 has it: a range counts the bytes of what is sent, the encoded file.
            packed = gzip.compress(path.read_bytes())
            part = packed[first : last + 1]
            said = f"bytes {first}-{first + len(part) - 1}/{len(packed)}"
            self._send(part, headers | {"Content-Encoding": "gzip", "Content-Range": said}, 206)
            return
        size = path.stat().st_size
        if first >= size:
            self._send(b"", headers | {"Content-Range": f"bytes */{size}"}, 416)
            return
        with path.open("rb") as opened:
            opened.seek(first)
            content = opened.read(last - first + 1)
        self._count(name, content)
        self._send(content, headers | {"Content-Range": f"bytes {first}-{first + len(content) - 1}/{size}"}, 206)

    def _count(self, name: str, content: bytes) -> None:
        if self.command == "GET":
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(content)

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._send(body, {"X-Error-Code": code, "X-Error-Message": message}, status)

    def _send(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # whoever asked for a part may leave before the whole
                self.wfile.write(body)


def _entry(name: str, path: Path) -> dict[str, object]:
    blob = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": blob[:40]}
