"""A stand-in for the Hugging Face Hub on the loopback interface.

It serves one model from a folder through the endpoints that a download uses: model info, tree
listing, and `resolve` with HEAD and GET.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.loopback import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, and what was asked for.

    Attributes:
        folder: The model's files.
        repo_id: The model's id.
        revisions: The names that stand for `COMMIT`, besides itself.
        refusal: None, or status and X-Error-Code of every answer about the model.
        broken_file: A file whose download breaks off after half of its bytes.
        requests: Method and path of every request.
    """

    folder: Path
    repo_id: str = "org/phi"
    revisions: tuple[str, ...] = ("main", "v1")
    refusal: tuple[int, str] | None = None
    broken_file: str | None = None
    requests: list[str] = field(default_factory=list)

    @property
    def downloads(self) -> list[str]:
        """The files asked for with GET, sorted."""
        prefix = f"GET /{self.repo_id}/resolve/{COMMIT}/"
        return sorted(r.removeprefix(prefix) for r in self.requests if r.startswith(prefix))


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Serves `hub` and gives its URL."""

    class Handler(_Handler):
        model = hub

    with serving(Handler) as url:
        yield url


class _Handler(BaseHTTPRequestHandler):
    model: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.model.requests.append(f"{self.command} {path}")
        api, files = f"/api/models/{self.model.repo_id}", f"/{self.model.repo_id}/resolve/"
        known = path == api or path.startswith((f"{api}/", files))
        if self.model.refusal:
            self._error(*self.model.refusal)
        elif not known:
            self._error(404, "RepoNotFound")
        elif path == api:
            self._info("main")
        elif path.startswith(f"{api}/revision/"):
            self._info(path.removeprefix(f"{api}/revision/"))
        elif path.startswith(f"{api}/tree/"):
            self._tree(path.removeprefix(f"{api}/tree/"))
        else:
            self._file(*path.removeprefix(files).split("/", 1))

    def _info(self, revision: str) -> None:
        if revision not in (COMMIT, *self.model.revisions):
            self._error(404, "RevisionNotFound")
            return
        names = [{"rfilename": name} for name in self._names()]
        self._json({"id": self.model.repo_id, "sha": COMMIT, "siblings": names, "tags": []})

    def _tree(self, revision: str) -> None:
        if revision != COMMIT:
            self._error(404, "RevisionNotFound")
            return
        self._json(
            [
                {
                    "type": "file",
                    "path": name,
                    "size": (self.model.folder / name).stat().st_size,
                    "oid": self._etag(name),
                }
                for name in self._names()
            ]
        )

    def _file(self, revision: str, name: str) -> None:
        if revision != COMMIT:
            self._error(404, "RevisionNotFound")
        elif name not in self._names():
            self._error(404, "EntryNotFound")
        else:
            data = (self.model.folder / name).read_bytes()
            headers = {"ETag": f'"{self._etag(name)}"', "X-Repo-Commit": COMMIT}
            self._send(200, data, headers, cut=name == self.model.broken_file)

    def _names(self) -> list[str]:
        files = (path for path in self.model.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.model.folder).as_posix() for path in files)

    def _etag(self, name: str) -> str:
        return hashlib.sha1((self.model.folder / name).read_bytes()).hexdigest()

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = cut
