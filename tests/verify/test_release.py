"""Every damaged byte of a release is found, and its file named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from phiconv.verify import Verification, verify
from phiconv.workspace.entry import sha256_file
from tests.release.builds import CPU, CPU_1, CUDA, FP16, GGUF, build, licensed_checkpoint, release
from tests.terminal import Terminal

LISTS = ("SHA256SUMS", "provenance.intoto.json", "sbom.cdx.json", "README.md")
MODEL = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4/model.onnx"


@pytest.fixture
def copy(released: Path, tmp_path: Path) -> Path:
    """A release to be spoilt."""
    shutil.copytree(released, tmp_path / "release")
    return tmp_path / "release"


def named(folder: Path, **options: bool) -> dict[str, str]:
    """What is wrong with each damaged file."""
    found = verify(folder, **options)  # type: ignore[arg-type]
    return {problem.file: problem.what for problem in found.problems}


def flip(path: Path, offset: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def flips(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """Random bytes: by size, by file, and among the files that hold the lists."""
    choose = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    for index in range(count):
        if index % 3 == 0:
            (path,) = choose.choices(files, sizes)
        elif index % 3 == 1:
            path = choose.choice(files)
        else:
            path = folder / choose.choice(LISTS)
        yield path, choose.randrange(path.stat().st_size), choose.randrange(1, 256)


def assert_every_flip_is_named(folder: Path, count: int, seed: int) -> None:
    """The digests of files that were not touched are remembered, to save time."""
    known = {path: sha256_file(path) for path in folder.rglob("*") if path.is_file()}
    for path, offset, mask in flips(folder, count, seed):
        flip(path, offset, mask)

        def digest(file: Path, damaged: Path = path) -> str:
            return sha256_file(file) if file == damaged else known[file]

        found = verify(folder, digest=digest)
        files = {problem.file for problem in found.problems}
        assert files == {path.relative_to(folder).as_posix()}, (path, offset, mask, found)
        flip(path, offset, mask)
    assert verify(folder).problems == ()


def test_a_release_is_whole(released: Path) -> None:
    found = verify(released, threads=2)
    assert isinstance(found, Verification)
    assert (found.kind, found.problems, found.notes) == ("release", (), ())
    files = [path for path in released.rglob("*") if path.is_file()]
    assert found.files == len(files)
    assert found.size_bytes == sum(path.stat().st_size for path in files)


def test_fifty_random_bytes(copy: Path) -> None:
    assert_every_flip_is_named(copy, 50, seed=1)


@pytest.mark.slow
def test_a_thousand_random_bytes_of_five_recipes(tmp_path: Path) -> None:
    checkpoint = licensed_checkpoint(tmp_path / "Phi-3-tiny")
    home = tmp_path / "home"
    recipes = (CPU, CPU_1, FP16, CUDA, GGUF)
    dist = build(recipes, checkpoint, tmp_path / "dist", home, "check.windows=8")
    to = release(list(dist.values()), tmp_path / "release", home, allow=("not-run:cuda",))
    assert len({path.parent for path in to.rglob("*.onnx")}) == 4
    assert_every_flip_is_named(to, 1000, seed=2)


def test_every_byte_of_every_line_of_sha256sums(copy: Path) -> None:
    path = copy / "SHA256SUMS"
    length = len(path.read_text(encoding="utf-8").splitlines()[0]) + 1
    known = {file: sha256_file(file) for file in copy.rglob("*") if file.is_file()}
    for offset in range(0, length, 3):
        flip(path, offset, 1)
        problems = verify(copy, digest=known.__getitem__).problems
        assert {problem.file for problem in problems} == {"SHA256SUMS"}, offset
        flip(path, offset, 1)


@pytest.mark.parametrize("name", [MODEL, "README.md", "reports/index.html", "sbom.cdx.json"])
def test_a_file_that_is_cut_off_or_missing(copy: Path, name: str) -> None:
    os.truncate(copy / name, 10)
    assert "its sha256 is" in named(copy)[name]
    (copy / name).unlink()
    assert named(copy) == {name: "is missing"}


@pytest.mark.parametrize("name", ["SHA256SUMS", "provenance.intoto.json"])
def test_a_list_that_is_missing(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert named(copy) == {name: "is missing"}


@pytest.mark.parametrize("name", ["extra.txt", "gguf/extra.gguf", ".hidden", "cuda/.git/HEAD"])
def test_a_file_that_nothing_lists(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("x")
    assert named(copy)[name] == "SHA256SUMS does not list it"


@pytest.mark.parametrize(
    "name", [".gitattributes", ".git/HEAD", ".cache/huggingface/x", ".DS_Store"]
)
def test_what_other_programs_put_there_is_passed_over(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text("x")
    assert named(copy) == {}


def test_lines_that_were_added_removed_or_moved(copy: Path) -> None:
    path = copy / "SHA256SUMS"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for changed in (
        [*lines, lines[-1]],
        lines[1:],
        [lines[1], lines[0], *lines[2:]],
        ["# comment\n", *lines],
        [*lines[:-1], lines[-1].rstrip("\n")],
        [lines[0].replace("  ", " *"), *lines[1:]],
        [lines[0].upper(), *lines[1:]],
    ):
        path.write_text("".join(changed), encoding="utf-8")
        assert set(named(copy)) == {"SHA256SUMS"}, changed[0]
    path.write_text("", encoding="utf-8")
    assert set(named(copy)) == {"SHA256SUMS"}


@pytest.mark.parametrize("name", ["README.md", "reports/index.html"])
def test_a_file_that_went_with_its_line(copy: Path, name: str) -> None:
    sums = copy / "SHA256SUMS"
    lines = sums.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(line for line in lines if name not in line)
    sums.write_text(kept, encoding="utf-8", newline="\n")
    (copy / name).unlink()
    lists = ("provenance.intoto.json", "sbom.cdx.json")
    expected = dict.fromkeys(lists, f"lists {name}, which is not there")
    if name == "README.md":  # every release has one
        expected = {name: "is missing"}
    assert named(copy) == expected


@pytest.mark.parametrize("path", ["../escape", "/etc/passwd", "a/../b", "C:/x", "a//b", "./a"])
def test_a_path_that_leads_out_of_the_folder(copy: Path, path: str) -> None:
    with (copy / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {path}\n")
    assert set(named(copy)) == {"SHA256SUMS"}


def test_a_renamed_file_is_named(copy: Path) -> None:
    (copy / MODEL).rename(copy / MODEL.replace("model.onnx", "renamed.bin"))
    assert "lists" in " ".join(named(copy).values())
    assert MODEL in " ".join(named(copy).values())


def rewrite(copy: Path, name: str, old: str, new: str) -> None:
    """Changes a document, and its line in SHA256SUMS."""
    path = copy / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    before = sha256_file(path)
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    sums = copy / "SHA256SUMS"
    sums.write_text(sums.read_text("utf-8").replace(before, sha256_file(path)), "utf-8")


def test_a_list_that_contradicts_the_files(copy: Path) -> None:
    digest = sha256_file(copy / MODEL)
    rewrite(copy, "sbom.cdx.json", digest, "0" * 64)
    found = named(copy)
    assert found["sbom.cdx.json"] == f"says another sha256 of {MODEL} than it has"
    assert "sbom.cdx.json" in found["provenance.intoto.json"], "the statement lists that, too"


@pytest.mark.parametrize(
    ("name", "old", "new", "what"),
    [
        ("provenance.intoto.json", "slsa.dev/provenance", "slsa.dev/other", "no in-toto statement"),
        ("provenance.intoto.json", '"subject"', '"object"', "subject is no list"),
        ("provenance.intoto.json", '"name": "LICENSE"', '"name": "../LICENSE"', "without path"),
        ("provenance.intoto.json", '"name": "LICENSE"', '"name": "NOTICE.md"', "twice"),
        ("sbom.cdx.json", "CycloneDX", "Cyclone", "is no CycloneDX 1.6 document"),
        ("sbom.cdx.json", '\n  "components"', '\n  "parts"', "components is no list"),
        ("sbom.cdx.json", "{", "", "not valid JSON"),
    ],
)
def test_a_document_that_is_none(copy: Path, name: str, old: str, new: str, what: str) -> None:
    rewrite(copy, name, old, new)
    assert what in named(copy)[name]


def test_one_artifact_of_several(copy: Path) -> None:
    shutil.rmtree(copy / "cuda")
    shutil.rmtree(copy / "reports")
    assert named(copy, partial=True) == {}
    assert all(what == "is missing" for what in named(copy).values())
    flip(copy / MODEL, 100, 1)
    assert set(named(copy, partial=True)) == {MODEL}
    (copy / MODEL).unlink()
    assert named(copy, partial=True) == {}


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_a_link_out_of_the_folder(copy: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.onnx"
    (copy / MODEL).rename(target)
    (copy / MODEL).symlink_to(target)
    assert "a link that leads out" in named(copy)[MODEL]
    (copy / "cuda" / "loop").symlink_to(copy / "cuda", target_is_directory=True)
    assert "cuda/loop" in named(copy)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_a_snapshot_of_the_hubs_cache(released: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--phi"
    snapshot, blobs = repository / "snapshots" / ("1" * 40), repository / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(released.rglob("*")):
        if path.is_file():
            blob, link = blobs / sha256_file(path), snapshot / path.relative_to(released)
            shutil.copyfile(path, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    assert named(snapshot) == {}


def test_the_command_names_the_file_and_ends_with_3(copy: Path, phiconv: Terminal) -> None:
    flip(copy / MODEL, 100, 1)
    done = phiconv("verify", str(copy))
    assert done.code == 3
    assert done.err.startswith(f"damaged: {MODEL}: its sha256 is ")
    assert "remedy: download or copy it again" in done.err
    assert done.out.endswith(": 1 problem\n")
    done = phiconv("verify", str(copy), "--json")
    found = json.loads(done.out)
    assert done.code == 3 and not found["whole"] and found["problems"][0]["file"] == MODEL


def test_there_must_be_something_to_verify(tmp_path: Path, phiconv: Terminal) -> None:
    done = phiconv("verify", str(tmp_path))
    assert done.code == 2 and "nothing to verify" in done.err
