"""A stand-in for the Hub, on loopback, that takes uploads.

It answers what huggingface_hub asks when it makes repositories and branches, lists, uploads and
commits, by the Xet protocol as it comes installed, and by LFS without hf_xet. Rights are checked
as the Hub does it: an unknown token is 401, one without the right to write 403, and what one may
not see is 404.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.loopback import serving
from tests.push.xet_store import RefusedError, XetStore

WRITE, READ = "hf_may_write", "hf_may_read"
_LARGE = 1 << 20


def commit_id(number: int) -> str:
    return f"{number:040x}"


@dataclass
class Repository:
    """A model repository: every branch's files, every commit's."""

    private: bool = False
    branches: dict[str, int] = field(default_factory=lambda: {"main": 1})
    commits: dict[int, dict[str, bytes]] = field(
        default_factory=lambda: {1: {".gitattributes": b"*.bin filter=lfs\n"}}
    )
    messages: list[str] = field(default_factory=list)

    def number(self, revision: str) -> int | None:
        """The commit that a branch or commit id stands for."""
        if revision in self.branches:
            return self.branches[revision]
        return next((number for number in self.commits if commit_id(number) == revision), None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        number = self.number(revision)
        assert number is not None
        return self.commits[number]


@dataclass
class HubStub:
    """What there is, and what was asked.

    Attributes:
        repositories: By id.
        requests: Method and path of every request.
        before: Called with each of them before it is answered; may raise `ConnectionError` to
            break the connection off.
        uploaded: Bytes of large files that were sent.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    before: Callable[[str], None] = lambda request: None
    uploaded: int = 0
    xet: XetStore = field(default_factory=XetStore)
    lock: Any = field(default_factory=Lock)

    def asked(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]


@contextmanager
def serve(hub: HubStub) -> Iterator[str]:
    """Serves `hub` and gives its URL."""

    class Handler(_Handler):
        stub = hub

    with serving(Handler) as url:
        yield url


class _Answer(Exception):  # noqa: N818 - it is none
    def __init__(self, status: int, value: Any = None, **headers: str) -> None:
        self.status, self.value, self.headers = status, value, headers


def _refusal(status: int, code: str, message: str | None = None) -> _Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message or code}
    return _Answer(status, {"error": message or code}, **headers)


class _Handler(BaseHTTPRequestHandler):
    stub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.stub.requests.append(request)
        try:
            self._body = self._read()
            self.stub.before(request)
            self._send(self._answer(path))
        except ConnectionError:  # broken off here, or by the client
            self.close_connection = True

    def _answer(self, path: str) -> _Answer:
        try:
            with self.stub.lock:
                self._route(path)
        except _Answer as answer:
            return answer
        except RefusedError as error:
            return _refusal(400, "", str(error))
        return _refusal(404, "NotFound")

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, answer: _Answer) -> None:
        data = b"" if answer.value is None else json.dumps(answer.value).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str) -> None:
        model = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path)
        batch = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if path == "/api/repos/create":
            self._create()
        elif path == "/api/validate-yaml":
            self._validate_card()
        elif path.startswith(("/v1/", "/v2/")):
            self._store(path)
        elif path.startswith("/lfs/"):
            self._take_lfs(path.removeprefix("/lfs/"))
        elif batch:
            self._require_write()
            raise _Answer(200, {"objects": [self._lfs_action(o) for o in self._json()["objects"]]})
        elif model:
            self._model(model[1], model[2] or "")

    def _json(self) -> Any:
        return json.loads(self._body)

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, WRITE, READ):
            raise _refusal(401, "", "Invalid credentials in Authorization header")
        return token

    def _require_write(self) -> None:
        if self._token() != WRITE:
            raise _refusal(403, "", "this token may only read")

    def _create(self) -> None:
        self._require_write()
        wanted = self._json()
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if repo_id in self.stub.repositories:
            raise _refusal(409, "", "You already created this model repo")
        private = wanted.get("visibility") == "private"
        self.stub.repositories[repo_id] = Repository(private)
        raise _Answer(200, {"url": f"http://{self.headers['Host']}/{repo_id}"})

    def _validate_card(self) -> None:
        if "license:" not in self._json()["content"]:
            raise _Answer(400, {"errors": [{"message": '"license" is required'}], "warnings": []})
        raise _Answer(200, {"errors": [], "warnings": []})

    def _model(self, repo_id: str, rest: str) -> None:
        token = self._token()
        repository = self.stub.repositories.get(repo_id)
        if repository is None or (repository.private and token is None):
            raise _refusal(404, "RepoNotFound", "Repository not found")
        action, _, revision = rest.partition("/")
        if action in ("", "revision"):
            self._info(repo_id, repository, revision or "main")
        if action == "tree":
            raise _Answer(200, [self._entry(*f) for f in repository.files(revision).items()])
        self._require_write()
        if action == "branch":
            repository.branches.setdefault(revision, repository.branches["main"])
            raise _Answer(200, {})
        if action == "preupload":
            raise _Answer(200, {"files": [self._mode(repository, revision, file)
                                          for file in self._json()["files"]]})  # fmt: skip
        if action == "xet-write-token":
            url = f"http://{self.headers['Host']}"
            raise _Answer(200, {"casUrl": url, "accessToken": "xet", "exp": 1 << 40})
        if action == "discussions":
            self._discussion(repo_id, repository, revision)
        if action == "commit":
            self._commit(repo_id, repository, revision)

    def _info(self, repo_id: str, repository: Repository, revision: str) -> None:
        number = repository.number(revision)
        if number is None:
            raise _refusal(404, "RevisionNotFound")
        names = [{"rfilename": name} for name in repository.commits[number]]
        raise _Answer(200, {"id": repo_id, "sha": commit_id(number), "siblings": names,
                            "private": repository.private, "tags": []})  # fmt: skip

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
        if _is_large(name, len(data)):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
        return entry

    def _mode(self, repository: Repository, revision: str, file: dict[str, Any]) -> dict[str, Any]:
        large = _is_large(file["path"], file["size"])
        found = {"path": file["path"], "uploadMode": "lfs" if large else "regular",
                 "shouldIgnore": False}  # fmt: skip
        there = repository.files(revision).get(file["path"])
        if there is not None:
            found["oid"] = hashlib.sha256(there).hexdigest() if large else _blob_id(there)
        return found

    def _discussion(self, repo_id: str, repository: Repository, number: str) -> None:
        if self.command == "POST":
            number = str(len([name for name in repository.branches if "refs/pr" in name]) + 1)
            repository.branches[f"refs/pr/{number}"] = repository.branches["main"]
        raise _Answer(200, {
            "num": int(number), "title": "Release", "author": {"name": "me"}, "status": "draft",
            "createdAt": "2026-01-01T00:00:00.000Z", "isPullRequest": True, "events": [],
            "repo": {"name": repo_id, "type": "model"}, "filesWithConflicts": [],
            "changes": {"base": "refs/heads/main"},
        })  # fmt: skip

    def _commit(self, repo_id: str, repository: Repository, revision: str) -> None:
        lines = [json.loads(line) for line in self._body.splitlines()]
        [header] = [line["value"] for line in lines if line["key"] == "header"]
        before = repository.number(revision)
        assert before is not None
        if header.get("parentCommit") not in (None, commit_id(before)):
            raise _refusal(412, "", "A commit has happened since")
        files = dict(repository.commits[before])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stub.xet.files[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = max(repository.commits) + 1
        repository.commits[number] = files
        repository.branches[revision] = number
        repository.messages.append(header["summary"])
        url = f"http://{self.headers['Host']}/{repo_id}/commit/{commit_id(number)}"
        raise _Answer(200, {"success": True, "commitOid": commit_id(number), "commitUrl": url})

    def _store(self, path: str) -> None:
        if path.startswith("/v1/xorbs/"):
            new = self.stub.xet.add_xorb(path.rpartition("/")[2], self._body)
            self.stub.uploaded += len(self._body)
            raise _Answer(200, {"was_inserted": new})
        if path.startswith("/v1/xorb-grants/") and self.stub.xet.has_xorb(path.rpartition("/")[2]):
            raise _Answer(200, {"was_inserted": False})
        if path == "/v1/shards":
            self.stub.xet.add_shard(self._body)
            raise _Answer(200, {"result": 1})
        if path == "/v1/telemetry":
            raise _Answer(200)

    def _lfs_action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        action: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in self.stub.xet.files:
            href = f"http://{self.headers['Host']}/lfs/{wanted['oid']}"
            action["actions"] = {"upload": {"href": href}}
        return action

    def _take_lfs(self, digest: str) -> None:
        if hashlib.sha256(self._body).hexdigest() != digest:
            raise _refusal(400, "", "not the content that was announced")
        self.stub.uploaded += len(self._body)
        self.stub.xet.files[digest] = self._body
        raise _Answer(200)


def _is_large(name: str, size: int) -> bool:
    return name.endswith(".bin") or size > _LARGE


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
