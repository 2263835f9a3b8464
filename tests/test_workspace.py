from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from phiconv.errors import EnvironmentLacksError, RecipeError, StageError
from phiconv.units import size_text
from phiconv.workspace import Entry, Session, Workspace
from phiconv.workspace.collect import collect, parse_duration, parse_size
from phiconv.workspace.disk import disk_full, free_bytes, rename, rename_over, same_device
from phiconv.workspace.entry import read_manifest
from phiconv.workspace.session import open_session
from phiconv.workspace.store import remove_tree
from tests.links import link_or_skip

KEY = "ab" + "0" * 62


def entry_in(folder: Path, key: str = KEY, kind: str = "onnx") -> Entry:
    return Entry(
        kind=kind,
        key=key,
        step="int4.onnx",
        stage="write-onnx",
        recipe="toy",
        created="2026-01-01T00:00:00+00:00",
        facts={"tensors": 3},
        usage={"wall_s": 1.0},
        key_of={"stage": "write-onnx"},
        files={},
        folder=folder,
    )


def publish(
    session: Session,
    files: dict[str, bytes],
    key: str = KEY,
    digests: dict[str, str] | None = None,
) -> Entry:
    with session.lock(key), session.scratch() as folder:
        for name, data in files.items():
            path = folder / "artifact" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return session.publish(entry_in(folder, key), digests or {})


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home")


@pytest.fixture
def session(workspace: Workspace) -> Iterator[Session]:
    with open_session(workspace) as session:
        yield session


def test_home_is_the_variable_or_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHICONV_HOME", str(tmp_path))
    assert Workspace.default().home == tmp_path
    monkeypatch.delenv("PHICONV_HOME")
    assert "phiconv" in Workspace.default().home.parts


def test_published_entry_is_found_with_its_digests(session: Session) -> None:
    published = publish(session, {"a.bin": b"abc", "sub/b.bin": b""})
    found = session.find("onnx", KEY)
    assert found == published
    assert found is not None
    assert found.folder == session.workspace.artifacts / "onnx" / "ab" / KEY
    assert (found.path / "a.bin").read_bytes() == b"abc"
    assert found.files["a.bin"].sha256 == hashlib.sha256(b"abc").hexdigest()
    assert found.size_bytes == 3
    assert session.find("onnx", "cd" + KEY[2:]) is None
    assert session.find("onnx-graph", KEY) is None


def test_digests_handed_over_are_not_computed_again(session: Session) -> None:
    entry = publish(session, {"a.bin": b"abc"}, digests={"a.bin": "f" * 64})
    assert entry.files["a.bin"].sha256 == "f" * 64
    with pytest.raises(StageError, match=r"do not exist.*b\.bin"):
        publish(session, {"a.bin": b"abc"}, digests={"b.bin": "f" * 64})


@pytest.mark.parametrize(
    ("data", "later_ns"), [(b"abd", 500), (b"ab", 0), (b"ab", 500), (b"abcd", 0), (b"", 0)]
)
def test_a_changed_file_is_a_miss(session: Session, data: bytes, later_ns: int) -> None:
    file = publish(session, {"a.bin": b"abc"}).path / "a.bin"
    times = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + later_ns))
    assert session.find("onnx", KEY) is None


def test_a_touched_file_is_hashed_once_and_stamped_anew(session: Session) -> None:
    entry = publish(session, {"a.bin": b"abc"})
    os.utime(entry.path / "a.bin", ns=(700, 700))
    found = session.find("onnx", KEY)
    assert found is not None
    assert found.files["a.bin"].mtime_ns == 700  # NTFS counts in hundreds
    stored = read_manifest(entry.folder)
    assert stored is not None
    assert stored.files == found.files, "so nothing is hashed the next time"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"manifest": 99}'),
        lambda folder: (folder / "artifact" / "a.bin").unlink(),
    ],
)
def test_a_damaged_entry_is_a_miss_and_is_replaced(session: Session, damage) -> None:  # type: ignore[no-untyped-def]
    damage(publish(session, {"a.bin": b"abc"}).folder)
    assert session.find("onnx", KEY) is None
    publish(session, {"a.bin": b"new"})
    found = session.find("onnx", KEY)
    assert found is not None
    assert (found.path / "a.bin").read_bytes() == b"new"


POSIX_NAME = pytest.mark.skipif(sys.platform == "win32", reason="a name of a file on POSIX only")


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "a/../../../x",
        "{home}/x",
        pytest.param("C:x", marks=POSIX_NAME),
        pytest.param("..\\x", marks=POSIX_NAME),
    ],
)
def test_a_manifest_that_names_a_file_outside_is_a_miss(session: Session, name: str) -> None:
    entry = publish(session, {"a.bin": b"abc"})
    file = entry.folder / "manifest.json"
    name = name.format(home=session.workspace.home)
    document = json.loads(file.read_text())
    stamp = document["files"]["a.bin"]
    document["files"][name] = stamp
    file.write_text(json.dumps(document))
    (entry.path / name).parent.mkdir(parents=True, exist_ok=True)
    (entry.path / name).write_bytes(b"abc")
    os.utime(entry.path / name, ns=(stamp["mtime_ns"], stamp["mtime_ns"]))
    assert session.find("onnx", KEY) is None


def test_files_are_listed_by_name(session: Session) -> None:
    names = [f"{letter}/{digit}" for letter in "cab" for digit in "201"]
    entry = publish(session, dict.fromkeys(names, b""))
    assert list(entry.files) == sorted(names)


def test_nothing_and_links_are_not_published(session: Session, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="wrote no file"):
        publish(session, {})
    with session.scratch() as folder:
        link_or_skip(folder / "artifact" / "a", tmp_path)
        with pytest.raises(StageError, match="symbolic link"):
            session.publish(entry_in(folder), {})
    assert list(session.folder.iterdir()) == []
    assert session.workspace.entries() == []


def test_failure_leaves_nothing(session: Session) -> None:
    with pytest.raises(ZeroDivisionError), session.scratch() as folder:
        (folder / "artifact" / "a").write_text("half")
        raise ZeroDivisionError
    assert list(session.folder.iterdir()) == []
    assert session.find("onnx", KEY) is None


def test_sessions_remove_themselves(workspace: Workspace) -> None:
    with open_session(workspace) as session:
        assert session.folder.is_dir()
    assert list(workspace.sessions.iterdir()) == []
    assert list(workspace.locks.iterdir()) == []


@contextmanager
def other_process(workspace: Workspace, body: str) -> Iterator[subprocess.Popen[str]]:
    """A process with a session of its own; it says `ready` and then waits for a line."""
    program = f"""
import sys, time
from pathlib import Path
from phiconv.workspace import Workspace
from phiconv.workspace.session import open_session
with open_session(Workspace(Path({str(workspace.home)!r}))) as session:
{textwrap.indent(textwrap.dedent(body), "    ")}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


SCRATCH = """
    with session.scratch() as folder:
        (folder / "artifact" / "half").write_text("half")
        print("ready", flush=True)
        sys.stdin.readline()
"""


def test_what_a_killed_process_left_is_swept_and_what_a_live_one_has_is_not(
    workspace: Workspace,
) -> None:
    with other_process(workspace, SCRATCH) as process:
        with open_session(workspace) as session:
            assert len(list(workspace.sessions.iterdir())) == 2
        process.kill()
        process.wait()
        with open_session(workspace) as session:
            assert [path.name for path in workspace.sessions.iterdir()] == [session.folder.name]
        assert list(workspace.sessions.iterdir()) == []
        assert list(workspace.locks.iterdir()) == [], "of sessions that are no more"


def test_the_second_process_waits_for_the_lock(workspace: Workspace) -> None:
    body = f"""
    with session.lock({KEY!r}):
        print("ready", flush=True)
        sys.stdin.readline()
        time.sleep(0.2)
        (session.workspace.home / "done").touch()
    """
    waited: list[bool] = []
    with open_session(workspace) as session, other_process(workspace, body) as process:

        def on_wait() -> None:
            waited.append(True)
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

        with session.lock(KEY, on_wait):
            assert (workspace.home / "done").exists()
            with workspace.try_lock(KEY) as held:
                assert not held
        with session.lock(KEY, on_wait):
            pass
    assert waited == [True]


def aged(entry: Entry, days: float) -> Entry:
    then = time.time() - days * 86400
    os.utime(entry.folder / "manifest.json", (then, then))
    return entry


def test_collects_by_age_then_by_size(session: Session) -> None:
    keys = [f"{index:02d}" + "0" * 62 for index in range(4)]
    for index, key in enumerate(keys):
        aged(publish(session, {"a": b"x" * 100}, key), 10 - index)
    dry = collect(session, older_than=timedelta(days=9.5), max_bytes=250, dry_run=True)
    assert [entry.key for entry in dry.entries] == keys[:2]
    assert dry.kept_bytes == 200
    assert dry.freed_bytes == 200
    assert len(session.workspace.entries()) == 4
    collect(session, older_than=timedelta(days=9.5))
    assert [entry.key for entry in session.workspace.entries()] == keys[1:]
    collect(session, max_bytes=150)
    assert [entry.key for entry in session.workspace.entries()] == keys[3:]
    assert not (session.workspace.locks / f"{keys[0]}.lock").exists()
    collect(session)
    assert len(session.workspace.entries()) == 1


def test_collects_broken_entries(session: Session) -> None:
    (publish(session, {"a": b"x"}).folder / "manifest.json").unlink()
    assert len(collect(session, dry_run=True).broken) == 1
    assert len(collect(session).broken) == 1
    assert list(session.workspace.folders()) == []


def test_keeps_what_another_build_may_be_using(workspace: Workspace) -> None:
    body = f"""
    assert session.find("onnx", {KEY!r})
    print("ready", flush=True)
    sys.stdin.readline()
    """
    other = "cd" + KEY[2:]
    with open_session(workspace) as session:
        publish(session, {"a": b"x"})
        aged(publish(session, {"a": b"x"}, other), 2)
        with other_process(workspace, body):
            done = collect(session, max_bytes=0)
            assert [entry.key for entry in done.entries] == [other]
            assert done.in_use == 1
        assert [entry.key for entry in collect(session, max_bytes=0).entries] == [KEY]


def test_keeps_what_the_oldest_of_several_builds_may_be_using(workspace: Workspace) -> None:
    body = f"""
    session.find("onnx", {KEY!r})
    print("ready", flush=True)
    sys.stdin.readline()
    """
    with open_session(workspace) as session:
        entry = publish(session, {"a": b"x"})
        with other_process(workspace, body):
            used = entry.used
            with other_process(workspace, body.replace(KEY, "cd" + KEY[2:])):
                assert entry.used == used, "the younger one has not touched it"
                done = collect(session, max_bytes=0)
    assert (done.entries, done.in_use) == ((), 1)


@pytest.mark.parametrize(
    ("text", "days"), [("30d", 30), ("12h", 0.5), ("2w", 14), ("90m", 0.0625), ("86400s", 1)]
)
def test_reads_durations(text: str, days: float) -> None:
    assert parse_duration(text) == timedelta(days=days)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9),
        ("1GiB", 2**30),
        ("1.5 kb", 1500),
        ("7", 7),
        ("7B", 7),
        ("2T", 2 * 10**12),
    ],
)
def test_reads_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "d", "3", "3y", "-1d", "GB", "1XB"])
def test_refuses_what_is_neither(text: str) -> None:
    if text != "3":
        with pytest.raises(RecipeError):
            parse_size(text)
    with pytest.raises(RecipeError):
        parse_duration(text)


def test_a_full_disk_is_found_among_the_causes(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("write failed")
    wrapped.__cause__ = full
    for error in (full, wrapped):
        found = disk_full(error, tmp_path / "not" / "there", 5 * 10**9)
        assert isinstance(found, EnvironmentLacksError)
        assert "5.0 GB is needed" in found.message
        assert size_text(free_bytes(tmp_path))[:2] in found.message
        assert found.where == str(tmp_path)
    assert disk_full(OSError(errno.EACCES, "no"), tmp_path, None) is None


def test_a_workspace_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(EnvironmentLacksError, match="workspace cannot be written"),
        open_session(Workspace(tmp_path / "file" / "home")),
    ):
        pass


def test_a_drive_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Path("Q:/phiconv" if sys.platform == "win32" else "/phiconv")
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    with pytest.raises(EnvironmentLacksError, match="there is no ") as caught:
        free_bytes(absent)
    assert caught.value.where == str(absent)


def test_same_device_of_places_that_do_not_exist(tmp_path: Path) -> None:
    assert same_device(tmp_path / "a" / "b", tmp_path / "c")


def test_collects_unfinished_work_that_nobody_is_at(session: Session) -> None:
    work = {key: session.workspace.unfinished_work(key) for key in (KEY, "cd" + KEY[2:])}
    for folder in work.values():
        folder.mkdir()
        (folder / "layer-0").write_bytes(b"x")
    then = time.time() - 86400
    os.utime(work[KEY], (then, then))
    assert collect(session, older_than=timedelta(days=2)).unfinished == ()
    assert collect(session, older_than=timedelta(hours=1), dry_run=True).unfinished == (work[KEY],)
    assert collect(session, older_than=timedelta(hours=1)).unfinished == (work[KEY],)
    with other_process(
        session.workspace,
        f"""
    with session.lock({"cd" + KEY[2:]!r}):
        print("ready", flush=True)
        sys.stdin.readline()
    """,
    ):
        assert collect(session).unfinished == ()
    assert len(collect(session).unfinished) == 1
    assert list(session.workspace.unfinished.iterdir()) == []


def test_a_rename_waits_for_who_has_just_opened_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phiconv.workspace.disk._OPEN_FILES_STAY", True)
    refusals = 3
    move = Path.replace

    def scanned(self: Path, target: Path) -> Path:
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise PermissionError(13, "Access is denied", str(self))
        return move(self, target)

    monkeypatch.setattr(Path, "replace", scanned)
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "new").write_bytes(b"new")
    rename_over(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"new"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("patient", [True, False])
def test_a_rename_gives_up_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    monkeypatch.setattr("phiconv.workspace.disk._OPEN_FILES_STAY", patient)
    monkeypatch.setattr("phiconv.workspace.disk._PATIENCE_SECONDS", 0.05)
    tries = 0

    def refuse(self: Path, target: Path) -> Path:
        nonlocal tries
        tries += 1
        raise PermissionError(13, "Access is denied", str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        rename(tmp_path / "a", tmp_path / "b")
    assert (tries > 1) is patient


@pytest.mark.skipif(sys.platform != "win32", reason="other systems rename what is open")
def test_a_rename_of_what_is_open_succeeds_once_it_is_closed(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    file = (tmp_path / "from" / "file").open("wb")
    closing = threading.Timer(0.2, file.close)
    closing.start()
    rename(tmp_path / "from", tmp_path / "to")
    closing.join()
    assert (tmp_path / "to" / "file").is_file()


def test_read_only_files_and_folders_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    outside.chmod(0o444)
    (folder / "inner" / "file").write_bytes(b"x")
    (folder / "inner" / "file").chmod(0o444)
    with suppress(OSError):  # Windows makes links for the privileged only
        (folder / "inner" / "link").symlink_to(outside)
    (folder / "inner").chmod(0o555)
    remove_tree(folder)
    assert not folder.exists()
    assert not outside.stat().st_mode & 0o222
