"""The structure of bare artifacts, which have no digests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from phiconv.verify import verify
from tests.release.builds import CPU, GGUF, copied

Edit = Callable[[onnx.ModelProto], Any]


@pytest.fixture
def folder(dist: dict[str, Path], tmp_path: Path) -> Path:
    return copied(dist[CPU] / "artifact", tmp_path / "artifact")


def named(path: Path) -> dict[str, str]:
    return {problem.file: problem.what for problem in verify(path).problems}


def edit(folder: Path, change: Edit) -> None:
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def external(model: onnx.ModelProto, index: int = 0) -> dict[str, onnx.StringStringEntryProto]:
    tensors = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    return {entry.key: entry for entry in tensors[index].external_data}


def test_sound_artifacts(dist: dict[str, Path], folder: Path) -> None:
    gguf = dist[GGUF] / "artifact"
    for path in (folder, gguf, next(gguf.glob("*.gguf"))):
        found = verify(path)
        assert (found.kind, found.problems, found.notes) == ("artifact", (), ())


@pytest.mark.parametrize("alone", [False, True])
def test_a_gguf_file_cut_short(dist: dict[str, Path], tmp_path: Path, alone: bool) -> None:
    artifact = copied(dist[GGUF] / "artifact", tmp_path / "artifact")
    file = next(artifact.glob("*.gguf"))
    os.truncate(file, file.stat().st_size - 1)
    (found,) = verify(file if alone else artifact).problems
    assert found.file == file.name
    assert "ends" in found.what or "beyond" in found.what or "truncated" in found.what
    assert found.remedy


EDITS: dict[str, tuple[Edit, str]] = {
    "a location outside": (
        lambda model: setattr(external(model)["location"], "value", "../model.onnx.data"),
        "leads out of the folder",
    ),
    "an absolute location": (
        lambda model: setattr(external(model)["location"], "value", "/etc/passwd"),
        "leads out of the folder",
    ),
    "a negative offset": (
        lambda model: setattr(external(model)["offset"], "value", "-64"),
        "bytes at -64",
    ),
    "an offset that is no number": (
        lambda model: setattr(external(model)["offset"], "value", "x"),
        "invalid literal",
    ),
    "a wrong length": (
        lambda model: setattr(external(model)["length"], "value", "1"),
        "1 bytes at",
    ),
    "an unknown key": (
        lambda model: setattr(external(model)["offset"], "key", "offsat"),
        "unknown key 'offsat'",
    ),
    "data that is shared": (
        lambda model: setattr(
            external(model, 1)["offset"], "value", str(int(external(model)["offset"].value) + 16)
        ),
        "begins within",
    ),
    "data beyond the file": (
        lambda model: setattr(external(model)["offset"], "value", str(1 << 40)),
        "ends at byte",
    ),
    "a loose end": (
        lambda model: model.graph.node[3].input.__setitem__(0, "nowhere"),
        "takes nowhere, which nothing before it gives",
    ),
    "two sources": (
        lambda model: model.graph.node[3].output.__setitem__(0, model.graph.node[2].output[0]),
        "which is there already",
    ),
    "an output that nothing gives": (
        lambda model: setattr(model.graph.output[0], "name", "lagits"),
        "nothing gives the output lagits",
    ),
    "a domain that is not imported": (
        lambda model: setattr(model.graph.node[3], "domain", "com.microsaft"),
        "domain 'com.microsaft'",
    ),
    "a tensor twice": (
        lambda model: model.graph.initializer.append(model.graph.initializer[0]),
        "stands twice",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_faulty_model(folder: Path, name: str) -> None:
    change, what = EDITS[name]
    edit(folder, change)
    found = named(folder)
    assert list(found) == ["model.onnx"]
    assert any(what in problem.what for problem in verify(folder).problems), found


def test_a_model_that_cannot_be_read(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\x0a\xff\xff\xff")
    assert "cannot be read" in named(folder)["model.onnx"]


def test_data_that_is_cut_off(folder: Path) -> None:
    path = folder / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    assert "ends at byte" in named(folder)["model.onnx"]
    path.unlink()
    assert "is missing" in named(folder)["model.onnx"]


@pytest.mark.parametrize(
    ("keys", "value", "what"),
    [
        (("decoder", "filename"), "modal.onnx", "modal.onnx is missing"),
        (("decoder", "inputs", "input_ids"), "ids", "the graph has no input 'ids'"),
        (("decoder", "outputs", "logits"), "lagits", "the graph has no output 'lagits'"),
        (("decoder", "inputs", "past_key_names"), "past.%d.key", "past.0.key"),
    ],
)
def test_genai_config_against_the_graph(
    folder: Path, keys: tuple[str, ...], value: str, what: str
) -> None:
    path = folder / "genai_config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    section = document["model"]
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    path.write_text(json.dumps(document), encoding="utf-8")
    problems = verify(folder).problems
    assert {problem.file for problem in problems} == {"genai_config.json"}
    assert any(what in problem.what for problem in problems)


def test_config_files_that_are_none(folder: Path) -> None:
    (folder / "config.json").unlink()
    found = verify(folder)
    assert found.problems == () and "was not compared with the graph" in found.notes[0]
    (folder / "genai_config.json").write_text("{")
    assert "not valid JSON" in named(folder)["genai_config.json"]
    (folder / "genai_config.json").unlink()
    assert "has no genai_config.json" in verify(folder).notes[0]


def test_a_config_without_its_model(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    assert named(folder) == {"genai_config.json": "stands there without an ONNX model"}
