from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest

from phiconv.errors import PhiconvError, RecipeError, StageError
from phiconv.publish import check_destination, publish
from phiconv.workspace import Entry, Session, Workspace
from phiconv.workspace.collect import collect
from phiconv.workspace.lending import take_back
from phiconv.workspace.session import open_session
from tests.links import link_or_skip
from tests.test_workspace import KEY
from tests.test_workspace import publish as make_entry
from tests.toy_stages import assert_whole, files_in


@pytest.fixture
def session(tmp_path: Path):  # type: ignore[no-untyped-def]
    with open_session(Workspace(tmp_path / "home")) as session:
        yield session


def write_report(folder: Path) -> None:
    (folder / "report.json").write_text("{}", encoding="utf-8")
    (folder / "plots").mkdir()
    (folder / "plots" / "kl.svg").write_text("<svg/>", encoding="utf-8")


def put(session: Session, out: Path, files: dict[str, bytes], key: str = KEY) -> Entry:
    entry = make_entry(session, files, key)
    publish(out, entry, write_report, {"name": "toy"}, session)
    return entry


def test_publishes_artifact_report_and_manifest(session: Session, tmp_path: Path) -> None:
    entry = put(session, tmp_path / "out", {"a.bin": b"abc", "sub/b": b""})
    found = files_in(tmp_path / "out")
    manifest = json.loads(found.pop("manifest.json"))
    assert sorted(found) == [
        "artifact/a.bin",
        "artifact/sub/b",
        "report/plots/kl.svg",
        "report/report.json",
    ]
    assert manifest == {
        "phiconv": 1,
        "name": "toy",
        "artifact": {
            "a.bin": {"sha256": entry.files["a.bin"].sha256, "size": 3},
            "sub/b": {"sha256": entry.files["sub/b"].sha256, "size": 0},
        },
        "report": ["plots/kl.svg", "report.json"],
    }
    assert_whole(tmp_path / "out")


def test_replaces_what_it_published_before(session: Session, tmp_path: Path) -> None:
    put(session, tmp_path / "out", {"old.bin": b"old", "same.bin": b"1"})
    put(session, tmp_path / "out", {"same.bin": b"2"}, "cd" + KEY[2:])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "artifact" / ".DS_Store").write_text("")
    put(session, tmp_path / "out", {"same.bin": b"3"}, "ef" + KEY[2:])
    assert files_in(tmp_path / "out" / "artifact") == {"same.bin": b"3"}
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert_whole(tmp_path / "out")


@pytest.mark.parametrize(
    "stranger", ["artifact/mine.txt", "report/sub/mine.txt", "artifact", "manifest.json"]
)
@pytest.mark.parametrize("after_a_build", [False, True])
def test_never_touches_what_is_not_its_own(
    session: Session, tmp_path: Path, stranger: str, after_a_build: bool
) -> None:
    out = tmp_path / "out"
    if after_a_build and "/" in stranger:
        put(session, out, {"a.bin": b"abc"})
    (out / stranger).parent.mkdir(parents=True, exist_ok=True)
    (out / stranger).write_text("mine")
    before = files_in(out)
    with pytest.raises(RecipeError) as caught:
        put(session, out, {"a.bin": b"new"}, "cd" + KEY[2:])
    assert stranger in caught.value.message
    assert files_in(out) == before


@pytest.mark.parametrize("name", ["con", "Aux.d/out", "NUL"])
def test_refuses_a_name_of_a_device_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("phiconv.publish._DEVICES_HAVE_NAMES", True)
    with pytest.raises(RecipeError, match="for a device"):
        check_destination(tmp_path / name)
    check_destination(tmp_path / "context")


def test_refuses_an_output_that_is_a_file_or_a_link(session: Session, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError):
        check_destination(tmp_path / "file")
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    link_or_skip(tmp_path / "out" / "artifact", tmp_path / "elsewhere", to_folder=True)
    with pytest.raises(RecipeError):
        check_destination(tmp_path / "out")


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up after it."""


OTHER = "cd" + KEY[2:]
# The probe that a move is possible, three moves aside, three into place, one back into the store.
MOVES = 8


@pytest.mark.parametrize("moves", range(MOVES))
def test_a_kill_during_the_swap_leaves_whole_parts_and_the_next_publish_repairs(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    out = tmp_path / "out"
    put(session, out, {"a.bin": b"old", "gone.bin": b"x"})
    entry = make_entry(session, {"a.bin": b"new"}, "cd" + KEY[2:])
    rename = Path.rename
    done = 0

    def rename_and_die(self: Path, target: Path) -> Path:
        nonlocal done
        if done == moves:
            raise Killed
        done += 1
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_and_die)
        patch.setattr("phiconv.publish.remove_tree", lambda folder: None)
        with pytest.raises(Killed):
            publish(out, entry, write_report, {}, session)
    assert_whole(out)
    assert files_in(out / "artifact") in (
        {},
        {"a.bin": b"old", "gone.bin": b"x"},
        {"a.bin": b"new"},
    )
    assert session.find("onnx", OTHER) is not None, "what was made is lost"
    publish(out, entry, write_report, {}, session)
    assert files_in(out / "artifact") == {"a.bin": b"new"}
    assert {path.name for path in out.iterdir()} == {"artifact", "report", "manifest.json"}
    assert_whole(out)
    before = session.find("onnx", KEY)
    assert before is not None, "what gave way is lost"
    assert files_in(before.path) == {"a.bin": b"old", "gone.bin": b"x"}


@pytest.mark.parametrize("moves", range(1, MOVES - 1))
def test_a_file_in_use_leaves_everything_as_it_was(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    out = tmp_path / "out"
    put(session, out, {"a.bin": b"old"})
    before = files_in(out)
    entry = make_entry(session, {"a.bin": b"new"}, "cd" + KEY[2:])
    rename = Path.rename
    done = 0

    def refuse_once(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == moves + 1:
            raise PermissionError(13, "in use", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_once)
    monkeypatch.setattr("phiconv.workspace.disk._PATIENCE_SECONDS", 0.0)
    with pytest.raises(PhiconvError, match="cannot be replaced: in use"):
        publish(out, entry, write_report, {}, session)
    assert files_in(out) == before


def test_a_failing_report_leaves_everything_as_it_was(session: Session, tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(session, out, {"a.bin": b"old"})
    before = files_in(out)
    entry = make_entry(session, {"a.bin": b"new"}, "cd" + KEY[2:])

    def fail(folder: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        publish(out, entry, fail, {}, session)
    assert files_in(out) == before


def test_the_same_build_is_let_be_unless_something_is_amiss(
    session: Session, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    put(session, out, {"a.bin": b"abc"})
    reports: list[Path] = []

    def report(folder: Path) -> None:
        reports.append(folder)
        write_report(folder)

    def again(name: str = "toy") -> int:
        entry = session.find("onnx", KEY) or make_entry(session, {"a.bin": b"abc"})
        publish(out, entry, report, {"name": name}, session)
        assert_whole(out)
        return len(reports)

    assert again() == 0
    (out / "artifact" / "a.bin").write_bytes(b"abd")
    assert again() == 1
    (out / "report" / "report.json").unlink()
    assert again() == 2
    (out / "artifact" / "a.bin").unlink()
    assert again() == 3
    (out / "manifest.json").unlink()
    with pytest.raises(RecipeError):
        again()
    (out / "artifact" / "a.bin").unlink()
    (out / "report" / "report.json").unlink()
    (out / "report" / "plots" / "kl.svg").unlink()
    assert again() == 4
    assert again() == 4
    assert again("other") == 5


def placed(session: Session, key: str = KEY) -> Path:
    """Where the artifact of a hit lies."""
    found = session.find("onnx", key)
    assert found is not None
    return found.path


def without_reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phiconv.publish._reflink", lambda source, target: False)


def test_what_ships_is_moved_and_stays_a_hit(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reflinks(monkeypatch)
    entry = make_entry(session, {"a.bin": b"abc", "sub/b": b""})
    made = (entry.path / "a.bin").stat()
    publish(tmp_path / "out", entry, write_report, {}, session)
    assert (tmp_path / "out" / "artifact" / "a.bin").stat() == made
    assert made.st_nlink == 1
    assert files_in(entry.folder).keys() == {"manifest.json"}
    assert placed(session) == tmp_path / "out" / "artifact"
    assert_whole(tmp_path / "out")


def test_a_moved_artifact_that_is_changed_or_gone_is_a_miss(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reflinks(monkeypatch)
    entry = put(session, tmp_path / "out", {"a.bin": b"abc"})
    (tmp_path / "out" / "artifact" / "a.bin").write_bytes(b"abd")
    assert session.find("onnx", KEY) is None
    with pytest.raises(StageError, match="changed or removed"):
        publish(tmp_path / "other", entry, write_report, {}, session)
    assert not (tmp_path / "other" / "artifact").exists()
    put(session, tmp_path / "out", {"a.bin": b"abc"})
    assert placed(session) == tmp_path / "out" / "artifact"
    shutil.rmtree(tmp_path / "out")
    assert session.find("onnx", KEY) is None
    assert len(collect(session).broken) == 1
    assert list(session.workspace.folders()) == []


def test_an_artifact_that_gives_way_goes_back_into_the_store(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reflinks(monkeypatch)
    out = tmp_path / "out"
    first = put(session, out, {"a.bin": b"one"})
    second = put(session, out, {"a.bin": b"two"}, OTHER)
    assert placed(session) == first.folder / "artifact"
    assert placed(session, OTHER) == out / "artifact"
    publish(out, first, write_report, {"name": "toy"}, session)
    assert placed(session) == out / "artifact"
    assert placed(session, OTHER) == second.folder / "artifact"
    assert files_in(out / "artifact") == {"a.bin": b"one"}
    assert files_in(second.folder / "artifact") == {"a.bin": b"two"}


def test_a_second_output_leaves_the_first_alone(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reflinks(monkeypatch)
    entry = put(session, tmp_path / "one", {"a.bin": b"abc", "sub/b": b""})
    publish(tmp_path / "two", entry, write_report, {"name": "toy"}, session)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    assert placed(session) == tmp_path / "two" / "artifact"
    for out in ("one", "two", "one"):
        publish(tmp_path / out, entry, write_report, {"name": "again"}, session)
        assert_whole(tmp_path / out)
    assert files_in(tmp_path / "one" / "artifact") == {"a.bin": b"abc", "sub/b": b""}


def test_a_stage_reads_a_copy_of_what_was_moved(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reflinks(monkeypatch)
    entry = put(session, tmp_path / "out", {"a.bin": b"abc", "sub/b": b""})
    lent = session.find("onnx", KEY)
    assert lent is not None and lent.is_lent
    assert lent.stored_bytes == 0
    back = take_back(session, lent)
    assert back is not None
    assert files_in(entry.folder / "artifact") == files_in(tmp_path / "out" / "artifact")
    assert placed(session) == entry.folder / "artifact"
    publish(tmp_path / "out", back, write_report, {"name": "other"}, session)
    assert placed(session) == tmp_path / "out" / "artifact"
    assert_whole(tmp_path / "out")


def test_a_copy_for_a_stage_is_checked_byte_by_byte(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reflinks(monkeypatch)
    put(session, tmp_path / "out", {"a.bin": b"abc"})
    lent = session.find("onnx", KEY)
    assert lent is not None
    file = tmp_path / "out" / "artifact" / "a.bin"
    times = file.stat()
    file.write_bytes(b"abd")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert take_back(session, lent) is None
    file.unlink()
    assert take_back(session, lent) is None
    assert not (lent.folder / "artifact").exists()


def test_what_another_build_may_be_reading_is_copied(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reflinks(monkeypatch)
    with open_session(session.workspace):
        entry = put(session, tmp_path / "out", {"a.bin": b"abc"})
    assert placed(session) == entry.folder / "artifact"
    assert files_in(tmp_path / "out" / "artifact") == {"a.bin": b"abc"}
    assert_whole(tmp_path / "out")


def test_what_this_build_needs_later_is_copied(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reflinks(monkeypatch)
    entry = make_entry(session, {"a.bin": b"abc"})
    publish(tmp_path / "out", entry, write_report, {}, session, lendable=False)
    assert placed(session) == entry.folder / "artifact"
    assert_whole(tmp_path / "out")


def test_to_another_file_system_is_copied(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reflinks(monkeypatch)
    rename = Path.rename

    def across(self: Path, target: Path) -> Path:
        if self.is_relative_to(session.workspace.artifacts):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", across)
    data = b"x" * (17 << 20)
    entry = put(session, tmp_path / "out", {"large": data})
    copied, kept = tmp_path / "out" / "artifact" / "large", entry.path / "large"
    assert kept.is_file()
    assert copied.read_bytes() == data
    assert copied.stat().st_nlink == 1
    assert copied.stat().st_mtime_ns == kept.stat().st_mtime_ns


def test_to_another_disk_is_copied(session: Session, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        entry = put(session, Path(elsewhere) / "out", {"a.bin": b"abc"})
        assert placed(session) == entry.folder / "artifact"
        assert_whole(Path(elsewhere) / "out")


def test_collection_counts_what_was_moved_as_the_users(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reflinks(monkeypatch)
    put(session, tmp_path / "out", {"a.bin": b"x" * 100})
    make_entry(session, {"a.bin": b"x" * 70}, OTHER)
    done = collect(session, max_bytes=0)
    assert [entry.key for entry in done.entries] == [OTHER]
    assert (done.freed_bytes, done.kept_bytes) == (70, 0)
    assert placed(session) == tmp_path / "out" / "artifact"
    done = collect(session, older_than=timedelta(0))
    assert [entry.key for entry in done.entries] == [KEY]
    assert done.freed_bytes == 0
    assert files_in(tmp_path / "out" / "artifact") == {"a.bin": b"x" * 100}
