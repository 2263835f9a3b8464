"""`phiconv push` as a user meets it; what verifies a release has tests of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phiconv.push import verification
from tests.push.hub_stub import WRITE, HubStub, Repository, commit_id, serve
from tests.push.test_upload import MODEL, REPO, hub, release, write_sums
from tests.terminal import Terminal

__all__ = ["hub", "release"]

PROGRAM = """
import sys
from phiconv.push import verification
verification.require_whole = lambda folder: None
from phiconv.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def online(hub: HubStub, phiconv: Terminal, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """The command line with the stand-in, and folders that count as whole."""
    monkeypatch.setattr(verification, "require_whole", lambda folder: None)
    yield phiconv


def test_a_dry_run_says_what_would_be_uploaded(
    online: Terminal, hub: HubStub, release: Path
) -> None:
    hub.repositories[REPO].commits[1] |= {
        "README.md": (release / "README.md").read_bytes(),
        MODEL: b"before",
        "old.bin": b"x",
    }
    done = online("push", str(release), "--repo", REPO, "--dry-run", "--delete-others")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == f"{release} -> {REPO} at {commit_id(1)[:12]}"
    assert [line.split() for line in lines[1:5]] == [
        ["same", "30", "B", "README.md"],
        ["new", str((release / "SHA256SUMS").stat().st_size), "B", "SHA256SUMS"],
        ["new", "300.0", "KB", "cpu/model", "[1].bin"],
        ["changed", "5", "B", MODEL],
    ]
    assert lines[5] == "  would be deleted: old.bin"
    assert lines[6].endswith(" to upload; 1 are there already")
    assert not hub.asked("^(POST|PUT)")
    document = json.loads(online("push", str(release), "--repo", REPO, "--dry-run", "--json").out)
    assert {file["name"]: file["state"] for file in document["files"]}[MODEL] == "changed"
    assert document["others"] == ["old.bin"]


def test_a_push_ends_with_where_to_look(online: Terminal, hub: HubStub, release: Path) -> None:
    done = online("push", str(release), "--repo", REPO, "--quiet")
    assert done.code == 0, done.err
    assert done.out.startswith(f"pushed, and the same as {release}: http://127.0.0.1:")
    assert WRITE not in done.out + done.err
    done = online("push", str(release), "--repo", REPO, "--quiet")
    assert done.out.startswith("it was all there already, and the same as")


def test_what_is_wrong_is_told_with_its_code(
    online: Terminal, hub: HubStub, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = ("--create-pr", "--revision", "v2")
    assert online("push", str(release), "--repo", REPO, *pull).code == 2
    assert online("push", str(release), "--repo", "no repository").code == 2
    hub.repositories.clear()
    done = online("push", str(release), "--repo", REPO)
    assert done.code == 5
    assert "or make it with --create" in done.err
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    done = online("push", str(release), "--repo", REPO)
    assert done.code == 5
    assert "error: the token is not valid" in done.err
    assert "hf_unknown" not in done.out + done.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_an_interrupted_push_goes_on_where_it_was(release: Path, tmp_path: Path) -> None:
    """The uploader sends 64 MB at a time; what arrived before the interrupt is not sent again."""
    (release / "large.bin").write_bytes(random.Random(2).randbytes(80_000_000))
    write_sums(release)
    stub = HubStub({REPO: Repository()})
    first, second, released = threading.Lock(), threading.Event(), threading.Event()

    def hold_the_second(request: str) -> None:
        if request.startswith("POST /v1/xorbs/") and not first.acquire(blocking=False):
            while not stub.uploaded:
                time.sleep(0.01)
            second.set()
            released.wait(60)

    stub.before = hold_the_second
    with serve(stub) as url:
        environment = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_TOKEN": WRITE,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        command = [sys.executable, "-c", PROGRAM, "push", str(release), "--repo", REPO]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts background jobs with SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert second.wait(60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        released.set()
        assert process.returncode == 130, err
        assert "interrupted; the repository has all of it or none; the same command goes on" in err
        assert list(stub.repositories[REPO].commits) == [1]
        assert 10_000_000 < stub.uploaded < 70_000_000

        stub.before = lambda request: None
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert stub.uploaded < 81_000_000, "nothing was sent twice"
    large = stub.repositories[REPO].files()["large.bin"]
    assert large == (release / "large.bin").read_bytes()
