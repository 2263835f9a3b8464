"""A release is put in place as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phiconv.errors import PhiconvError, RecipeError, StageError
from phiconv.release import assembly
from phiconv.verify import verify
from tests.links import link_or_skip
from tests.release.builds import CPU, GGUF, copied, release
from tests.toy_stages import files_in

Release = Callable[..., Path]


@pytest.fixture
def make(dist: dict[str, Path], release_home: Path, tmp_path: Path) -> Release:
    """Releases the GGUF build into `to`, or what is given."""

    def made(*places: Path, **options: object) -> Path:
        return release(list(places or (dist[GGUF],)), tmp_path / "to", release_home, **options)

    return made


def assert_alone(to: Path) -> None:
    assert [path.name for path in to.parent.iterdir()] == [to.name]


def test_a_release_replaces_the_one_before(make: Release, dist: dict[str, Path]) -> None:
    make()
    to = make(dist[CPU], name="Other")
    assert not (to / "gguf").exists() and (to / "cpu_and_mobile").is_dir()
    assert verify(to).problems == ()
    assert_alone(to)


def test_an_empty_folder_is_taken(make: Release, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    assert verify(make()).problems == ()


@pytest.mark.parametrize("stranger", ["notes.txt", "gguf/mine.gguf", ".git/HEAD", ".gitattributes"])
@pytest.mark.parametrize("after_a_release", [False, True])
def test_files_of_others_are_never_touched(
    make: Release, tmp_path: Path, stranger: str, after_a_release: bool
) -> None:
    to = make() if after_a_release else tmp_path / "to"
    (to / stranger).parent.mkdir(parents=True, exist_ok=True)
    (to / stranger).write_text("mine")
    before = files_in(to)
    with pytest.raises(RecipeError, match="of no release") as caught:
        make()
    assert stranger in caught.value.message
    assert files_in(to) == before


def test_a_card_that_was_edited_is_kept(make: Release) -> None:
    to = make()
    with (to / "README.md").open("a") as card:
        card.write("More words.\n")
    with pytest.raises(RecipeError, match=r"README\.md was edited"):
        make()
    assert (to / "README.md").read_text(encoding="utf-8").endswith("More words.\n")


def test_a_file_and_a_link_are_no_place(make: Release, tmp_path: Path) -> None:
    to = tmp_path / "to"
    to.write_text("mine")
    with pytest.raises(RecipeError, match="no folder"):
        make()
    to.unlink()
    (tmp_path / "elsewhere").mkdir()
    link_or_skip(to, tmp_path / "elsewhere", to_folder=True)
    with pytest.raises(RecipeError, match="no folder"):
        make()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_artifact_is_not_released(
    make: Release, dist: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    to = make()
    before = files_in(to)
    output = copied(dist[CPU], tmp_path / "output")
    file = output / "artifact" / "model.onnx.data"
    if damage == "missing":
        file.unlink()
    else:
        with file.open("r+b") as data:
            data.seek(12345)
            data.write(b"\xff\x00\xff")
    with pytest.raises(StageError) as caught:
        make(output)
    assert caught.value.where == str(file)
    assert ("is missing" if damage == "missing" else "changed since it was built") in str(
        caught.value
    )
    assert files_in(to) == before
    assert not list(tmp_path.glob(".to*"))


def test_what_verify_would_refuse_is_not_put_in_place(
    make: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "cyclonedx_json", lambda plan, digests: "{}\n")
    with pytest.raises(PhiconvError, match="CycloneDX"):
        make()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_release_left_is_cleared(make: Release, tmp_path: Path) -> None:
    for name in (".to.phiconv-new", ".to.phiconv-old"):
        (tmp_path / name / "gguf").mkdir(parents=True)
        (tmp_path / name / "gguf" / "x").write_text("half")
    to = make()
    assert verify(to).problems == ()
    assert_alone(to)


def test_a_place_in_use_keeps_the_old_release(
    make: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = make()
    before = files_in(to)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith("phiconv-new"):
            raise PermissionError(13, "in use", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr("phiconv.workspace.disk._PATIENCE_SECONDS", 0.0)
    with pytest.raises(StageError, match="in use"):
        make()
    monkeypatch.undo()
    assert files_in(to) == before
    assert_alone(to)
