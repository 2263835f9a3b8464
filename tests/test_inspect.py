from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from phiconv.errors import RecipeError, StageError
from phiconv.inspect import CheckpointSummary, OnnxSummary, inspect_folder, tensor_kinds
from phiconv.summary import inspection_text


def write_model(folder: Path) -> None:
    """An embedding, a norm, an int4 and a float MatMul, with external data."""

    def initializer(name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=name)
        value.const_value = ir.Tensor(array, name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        return value

    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    embedding = initializer("model.embed_tokens.weight", np.zeros((10, 64), np.float16))
    norm = initializer("model.norm.weight", np.zeros(64, np.float32))
    packed = initializer("layers.0.mlp.up.weight_Q4", np.zeros((128, 2, 16), np.uint8))
    scales = initializer("layers.0.mlp.up.weight_scales", np.zeros(256, np.float32))
    head = initializer("lm_head.weight", np.zeros((128, 10), np.float32))
    nodes = [ir.node("Gather", [embedding, ids])]
    nodes.append(ir.node("SimplifiedLayerNormalization", [nodes[-1].outputs[0], norm]))
    attributes = {"K": 64, "N": 128, "bits": 4, "block_size": 32}
    inputs = [nodes[-1].outputs[0], packed, scales]
    nodes.append(ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft"))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], head]))
    graph = ir.Graph(
        [ids],
        nodes[-1].outputs,
        nodes=nodes,
        initializers=[embedding, norm, packed, scales, head],
        opset_imports={"": 22, "com.microsoft": 1},
        name="toy",
    )
    ir.save(
        ir.Model(graph, ir_version=10),
        folder / "model.onnx",
        external_data="model.onnx.data",
        size_threshold_bytes=0,
    )
    config = {
        "model": {
            "type": "phi3",
            "context_length": 4096,
            "decoder": {
                "filename": "model.onnx",
                "hidden_size": 64,
                "session_options": {"provider_options": [{"cuda": {}}]},
            },
        },
        "search": {"top_k": 1},
    }
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_sums_up_an_onnx_folder(tmp_path: Path) -> None:
    write_model(tmp_path)
    found = inspect_folder(tmp_path)
    assert isinstance(found, OnnxSummary)
    assert found == inspect_folder(tmp_path / "model.onnx")
    kinds = {record.kind: (record.format, record.parameters, record.size_bytes)
             for record in found.weights}  # fmt: skip
    assert kinds == {
        "embedding": ("f16", 640, 1280),
        "norm": ("f32", 64, 256),
        "mlp": ("int4 block 32", 64 * 128, 128 * 2 * 16 + 256 * 4),
        "lm_head": ("f32", 1280, 5120),
    }
    assert found.weights == tensor_kinds(tmp_path)
    assert found.bits_per_weight == 8 * (1280 + 256 + 5120 + 5120) / (640 + 64 + 8192 + 1280)
    assert found.operators["com.microsoft::MatMulNBits"] == 1
    assert found.opsets == {"": 22, "com.microsoft": 1}
    assert found.dtypes == {"f32": (3, 6400), "uint8": (1, 4096), "f16": (1, 1280)}
    assert found.genai == {
        "type": "phi3",
        "context_length": 4096,
        "providers": ["cuda"],
        "hidden_size": 64,
        "search": {"top_k": 1},
    }
    text = inspection_text(found)
    assert "int4 block 32" in text
    assert "opset ai.onnx 22, com.microsoft 1" in text


def test_the_model_that_genai_config_names_is_looked_at(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "another.onnx").write_bytes(b"")
    assert inspect_folder(tmp_path).model == "model.onnx"  # type: ignore[union-attr]


def test_sums_up_a_checkpoint(toy_checkpoint: Path) -> None:
    found = inspect_folder(toy_checkpoint)
    assert isinstance(found, CheckpointSummary)
    assert found.architecture == "Phi3ForCausalLM"
    assert found.config["hidden_size"] == 128
    [(dtype, (count, size))] = found.dtypes.items()
    assert (dtype, count) == ("bf16", 15)
    assert size == 2 * found.parameters
    assert "Phi3ForCausalLM" in inspection_text(found)


def test_says_what_it_cannot_look_at(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no folder"):
        inspect_folder(tmp_path / "absent")
    with pytest.raises(RecipeError, match="neither"):
        inspect_folder(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(StageError, match="cannot be read"):
        inspect_folder(tmp_path)
    write_model(tmp_path)
    (tmp_path / "genai_config.json").write_text("{")
    with pytest.raises(StageError, match=r"genai_config\.json cannot be read"):
        inspect_folder(tmp_path)
    assert tensor_kinds(tmp_path / "absent") == ()
