from __future__ import annotations

import json
from pathlib import Path

import pytest

from phiconv.errors import PhiconvError, RecipeError
from phiconv.publish import check_destination, place_file, publish
from phiconv.workspace import Entry, Session, Workspace
from phiconv.workspace.session import open_session
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
    publish(out, entry, write_report, {"name": "toy"}, session.workspace)
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


def test_refuses_an_output_that_is_a_file_or_a_link(session: Session, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError):
        check_destination(tmp_path / "file")
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "artifact").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError):
        check_destination(tmp_path / "out")


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up after it."""


@pytest.mark.parametrize("moves", range(6))
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
            publish(out, entry, write_report, {}, session.workspace)
    assert_whole(out)
    assert files_in(out / "artifact") in (
        {},
        {"a.bin": b"old", "gone.bin": b"x"},
        {"a.bin": b"new"},
    )
    publish(out, entry, write_report, {}, session.workspace)
    assert files_in(out / "artifact") == {"a.bin": b"new"}
    assert {path.name for path in out.iterdir()} == {"artifact", "report", "manifest.json"}
    assert_whole(out)


@pytest.mark.parametrize("moves", range(6))
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
    with pytest.raises(PhiconvError, match="cannot be replaced: in use"):
        publish(out, entry, write_report, {}, session.workspace)
    assert files_in(out) == before


def test_a_failing_report_leaves_everything_as_it_was(session: Session, tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(session, out, {"a.bin": b"old"})
    before = files_in(out)
    entry = make_entry(session, {"a.bin": b"new"}, "cd" + KEY[2:])

    def fail(folder: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        publish(out, entry, fail, {}, session.workspace)
    assert files_in(out) == before


def test_the_same_build_is_let_be_unless_something_is_amiss(
    session: Session, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    entry = put(session, out, {"a.bin": b"abc"})
    reports: list[Path] = []

    def report(folder: Path) -> None:
        reports.append(folder)
        write_report(folder)

    def again(name: str = "toy") -> int:
        publish(out, entry, report, {"name": name}, session.workspace)
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


def test_output_files_have_one_name_only(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnx refuses to read external data that has two."""
    data = b"x" * (17 << 20)
    entry = put(session, tmp_path / "out", {"large": data})
    monkeypatch.setattr("phiconv.publish._reflink", lambda source, target: False)
    place_file(entry.path / "large", tmp_path / "copied")
    for placed in (tmp_path / "out" / "artifact" / "large", tmp_path / "copied"):
        assert placed.read_bytes() == data
        assert placed.stat().st_nlink == 1
        assert placed.stat().st_mtime_ns == (entry.path / "large").stat().st_mtime_ns
