from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from phiconv.errors import RecipeError, StageError
from phiconv.onnx.folder import open_folder
from tests.links import link_or_skip

INT64, FLOAT = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
VOCAB = 16


def decoder(inputs: tuple[str, ...] = ("input_ids", "past_key_values.0.key")) -> onnx.ModelProto:
    """The least graph that looks like a decoder: a lookup."""
    table = onnx.numpy_helper.from_array(np.zeros((VOCAB, VOCAB), np.float32), "table")
    shape = ["batch", "tokens"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        "decoder",
        [onnx.helper.make_tensor_value_info(name, INT64, shape) for name in inputs],
        [onnx.helper.make_tensor_value_info("logits", FLOAT, [*shape, VOCAB])],
        [table],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)])


def save(folder: Path, model: onnx.ModelProto | None = None, name: str = "model.onnx") -> Path:
    folder.mkdir(exist_ok=True)
    model = model or decoder()
    onnx.save(
        model, folder / name, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return folder


def move_data(folder: Path, location: str) -> None:
    """Makes the model look for its data somewhere else."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (entry,) = [e for e in model.graph.initializer[0].external_data if e.key == "location"]
    entry.value = location
    onnx.save(model, folder / "model.onnx")


def test_it_names_every_file_that_shapes_the_measurement(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    for name in ("genai_config.json", "tokenizer.json", "chat_template.jinja", "README.md"):
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "unrelated.bin").write_bytes(b"x")
    found = open_folder(folder)
    assert found.files == (
        "chat_template.jinja",
        "genai_config.json",
        "model.onnx",
        "tokenizer.json",
        "weights.bin",
    )
    assert found.model == folder / "model.onnx"
    assert found.vocab_size == VOCAB
    assert open_folder(folder / "model.onnx") == found


def test_data_below_the_folder_is_fine(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    (folder / "data").mkdir()
    (folder / "weights.bin").rename(folder / "data" / "weights.bin")
    move_data(folder, "data/weights.bin")
    assert open_folder(folder).files == ("data/weights.bin", "model.onnx")


def test_a_snapshot_of_the_hugging_face_cache_is_taken(tmp_path: Path) -> None:
    """Its files are links to blobs; the models of official repositories lie in folders of it."""
    repository = tmp_path / "hub" / "models--org--name"
    folder = repository / "snapshots" / ("0" * 40) / "cpu" / "int4"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    source = save(tmp_path / "source")
    for file in source.iterdir():
        link_or_skip(folder / file.name, file.rename(repository / "blobs" / file.name))
    assert open_folder(folder).files == ("model.onnx", "weights.bin")
    (folder / "weights.bin").unlink()
    link_or_skip(folder / "weights.bin", tmp_path / "elsewhere.bin")
    (tmp_path / "elsewhere.bin").write_bytes(bytes(10_000))
    with pytest.raises(StageError, match=r"weights\.bin leads out of its folder"):
        open_folder(folder)


def cut(folder: Path) -> None:
    with (folder / "weights.bin").open("r+b") as file:
        file.truncate(100)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "weights.bin").unlink(), "external data weights.bin is missing"),
        (cut, "external data weights.bin ends at byte 100, tensor table at 1024"),
        (lambda folder: move_data(folder, "../secret"), "'../secret' leads out of its folder"),
        (lambda folder: move_data(folder, "/etc/passwd"), "'/etc/passwd' leads out of its folder"),
        (lambda folder: move_data(folder, "C:\\x"), "'C:/x' leads out of its folder"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"\xff" * 50), "cannot be read"),
        (lambda folder: (folder / "model.onnx").unlink(), "the .onnx files are: none"),
        (lambda folder: save(folder, decoder(("input_ids",))), "it lacks inputs past_key_values.*"),
        (
            lambda folder: save(folder, decoder(("x", "past_key_values.0.key"))),
            "it lacks an input input_ids",
        ),
    ],
)
def test_a_broken_folder_is_refused_with_one_message(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = save(tmp_path / "model")
    spoil(folder)
    with pytest.raises(StageError) as caught:
        open_folder(folder)
    assert message in caught.value.message
    assert caught.value.exit_code == 3
    assert str(folder) in (caught.value.where or "")


def test_there_must_be_a_folder_and_its_own_model(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no folder"):
        open_folder(tmp_path / "absent")
    folder = save(tmp_path / "model")
    save(folder, name="other.onnx")
    with pytest.raises(StageError, match=r"other\.onnx is not the model of its folder"):
        open_folder(folder / "other.onnx")
