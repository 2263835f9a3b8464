"""Output folders of builds: the artifact by its digests, manifest and report by each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phiconv.report.document import read_report_file, report_json
from phiconv.verify import verify
from tests.release.builds import CPU, GGUF, copied, edit_manifest


@pytest.fixture
def copy(dist: dict[str, Path], tmp_path: Path) -> Path:
    return copied(dist[CPU], tmp_path / "out")


def named(folder: Path) -> dict[str, str]:
    return {problem.file: problem.what for problem in verify(folder).problems}


@pytest.mark.parametrize("name", [CPU, GGUF])
def test_an_output_is_whole(dist: dict[str, Path], name: str) -> None:
    found = verify(dist[name])
    assert (found.kind, found.problems, found.notes) == ("output", (), ())


def test_what_lies_beside_is_the_users(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert named(copy) == {}


def test_a_changed_byte_of_the_artifact(copy: Path) -> None:
    path = copy / "artifact" / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert list(named(copy)) == ["artifact/model.onnx.data"]


def test_missing_and_unlisted_files(copy: Path) -> None:
    (copy / "artifact" / "config.json").unlink()
    (copy / "artifact" / "more.bin").write_text("x")
    (copy / "report" / "junit.xml").unlink()
    (copy / "report" / "more.html").write_text("x")
    found = named(copy)
    assert found["artifact/config.json"] == found["report/junit.xml"] == "is missing"
    assert (
        found["artifact/more.bin"] == found["report/more.html"] == "manifest.json does not list it"
    )


def test_a_damaged_digest_in_the_manifest_is_the_manifests_fault(copy: Path) -> None:
    def damage(manifest: dict[str, Any]) -> None:
        stamp = manifest["artifact"]["model.onnx"]
        stamp["sha256"] = ("0" if stamp["sha256"][0] != "0" else "1") + stamp["sha256"][1:]

    edit_manifest(copy, damage)
    first, *rest = verify(copy).problems
    assert (first.file, first.what) == (
        "manifest.json",
        "its digest of artifact/model.onnx is damaged",
    )
    assert {problem.file for problem in rest} <= {"manifest.json"}


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "recipe.name": lambda m: m["recipe"].update(name="other"),
    "recipe.digest": lambda m: m["recipe"].update(digest="sha256:0"),
    "recipe.resolved": lambda m: m["recipe"]["resolved"]["stages"][1]["with"].update(bits=8),
    "checkpoint": lambda m: m["checkpoint"].update(revision="main"),
    "verdict": lambda m: m.update(verdict="failed"),
    "validations": lambda m: m["validations"].clear(),
    "tools": lambda m: m["tools"].update(numpy="1.0"),
    "steps": lambda m: m["steps"][0].update(key="0" * 64),
    "release_path": lambda m: m.update(release_path="elsewhere"),
    "artifact": lambda m: m["artifact"]["config.json"].update(size=1),
}


@pytest.mark.parametrize("key", EDITS)
def test_manifest_and_report_must_agree(copy: Path, key: str) -> None:
    edit_manifest(copy, EDITS[key])
    assert named(copy)["manifest.json"].startswith(f"{key}: ")


def test_the_checkpoints_digest_must_hold(copy: Path) -> None:
    path = copy / "report" / "report.json"
    result = read_report_file(path)
    record = replace(result.checkpoint, files={"model.safetensors": "blake3:" + "0" * 64})
    path.write_text(report_json(replace(result, checkpoint=record)), encoding="utf-8")
    edit_manifest(copy, lambda m: m["checkpoint"].update(files=dict(record.files)))
    assert named(copy)["manifest.json"].startswith("checkpoint.files: ")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"phiconv": 1}', '{"phiconv": 1, "artifact": {"a": {}}, "report": []}',
             '{"phiconv": 1, "artifact": {}}', '{"phiconv": 7, "artifact": {}, "report": []}'],
)  # fmt: skip
def test_a_manifest_that_is_none(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    assert list(named(copy)) == ["manifest.json"]


def test_a_report_that_cannot_be_read(copy: Path) -> None:
    path = copy / "report" / "report.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["result"]["recipe"]
    path.write_text(json.dumps(document), encoding="utf-8")
    assert list(named(copy)) == ["report/report.json"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read(copy: Path) -> None:
    path = copy / "artifact" / "model.onnx.data"
    path.chmod(0)
    assert named(copy)["artifact/model.onnx.data"] == "cannot be read"
