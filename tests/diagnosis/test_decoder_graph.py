"""A decoder is found in every layout its makers give it, and its parts are the right ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.diagnosis.decoder_graph import DecoderGraph, read_decoder
from phiconv.diagnosis.weight_map import map_weights
from phiconv.errors import StageError
from phiconv.onnx.target import Precision, Provider
from tests.diagnosis.planting import constant, node
from tests.onnx.builder_oracle import build_with_builder
from tests.onnx_artifacts import write_onnx_artifact
from tests.phi3_checkpoints import write_phi3_checkpoint

SEPARATE = ["q_proj", "k_proj", "v_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def decoder(folder: Path) -> DecoderGraph:
    return read_decoder(ir.load(folder / "model.onnx"), str(folder))


def assert_weights_equal(graph: DecoderGraph, checkpoint: Path, limit: float) -> None:
    """Every weight the graph holds is the one its place asks for."""
    opened = Checkpoint(checkpoint)
    parts = map_weights(graph, opened)
    # q, k, v, o, gate, up, down and two norms a layer; embedding, final norm and head
    assert len(parts) == 9 * opened.config.num_hidden_layers + 3
    for part in parts:
        stop = part.tensor_start + len(part)
        expected = opened.read_rows(part.tensor, part.tensor_start, stop).astype(np.float32)
        found = part.load().rows(part.start, part.stop)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error <= limit, part.place


@pytest.mark.parametrize(
    ("overrides", "provider", "precision", "qkv", "rotary", "attention"),
    [
        ({}, "cpu", "fp32", ["qkv_proj"], 0, "GroupQueryAttention"),
        ({}, "dml", "fp16", SEPARATE, 2, "GroupQueryAttention"),
        ({"partial_rotary_factor": 0.75}, "cpu", "fp32", SEPARATE, 2, "GroupQueryAttention"),
        ({}, "cpu", "fp16", SEPARATE, 2, "MultiHeadAttention"),
        ({"tie_word_embeddings": True}, "cuda", "fp16", ["qkv_proj"], 0, "GroupQueryAttention"),
    ],
    ids=["packed", "dml", "partial-rotary", "multi-head", "tied"],
)
def test_the_layouts_of_the_model_builder(
    tmp_path: Path,
    overrides: dict[str, Any],
    provider: Provider,
    precision: Precision,
    qkv: list[str],
    rotary: int,
    attention: str,
) -> None:
    checkpoint = write_phi3_checkpoint(tmp_path / "checkpoint", **overrides)
    if attention == "MultiHeadAttention":  # the builder's alone
        folder = build_with_builder(checkpoint, tmp_path / "onnx", precision, provider)
    else:
        folder = write_onnx_artifact(checkpoint, tmp_path / "onnx", provider, precision)
    graph = decoder(folder)
    assert [layer.attention.op_type for layer in graph.layers] == [attention] * 2
    for layer in graph.layers:
        assert [linear.role for linear in layer.linears] == [*qkv, "o_proj", *MLP]
        assert len(layer.rotary) == rotary
        assert all(f"layers.{layer.index}/" in str(linear.node.name) for linear in layer.linears)
    assert [name for name, _, _ in graph.norms] == [
        *["input_layernorm", "post_attention_layernorm"] * 2,
        "norm",
    ]
    assert graph.head_norm is graph.final_norm is not None
    assert_weights_equal(graph, checkpoint, 1e-3 if precision == "fp16" else 0)


@pytest.mark.parametrize(
    "options",
    [
        ("use_qdq=true",),
        ("block_size=64", "int4_is_symmetric=false"),
        ("shared_embeddings=true",),
    ],
    ids=["qdq", "asymmetric", "shared"],
)
def test_the_int4_layouts_of_the_model_builder(tmp_path: Path, options: tuple[str, ...]) -> None:
    tied = "shared_embeddings=true" in options
    checkpoint = write_phi3_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=tied)
    folder = build_with_builder(checkpoint, tmp_path / "onnx", "int4", "cpu", *options)
    assert_weights_equal(decoder(folder), checkpoint, 0.12)


def unfuse_skip_norms(model: ir.Model) -> None:
    """An explicit Add in front of a plain norm, as exporters without that fusion write it."""
    for skip in [n for n in model.graph if n.op_type == "SkipSimplifiedLayerNormalization"]:
        added = ir.node("Add", [skip.inputs[0], skip.inputs[1]], name=f"{skip.name}/Add")
        added.outputs[0].name = f"{skip.name}/sum"
        norm = ir.node(
            "SimplifiedLayerNormalization",
            [added.outputs[0], skip.inputs[2]],
            {"epsilon": 1e-5, "axis": -1, "stash_type": 1},
            name=f"{skip.name}/norm",
        )
        norm.outputs[0].name = f"{skip.name}/norm_output"
        model.graph.insert_before(skip, [added, norm])
        skip.outputs[0].replace_all_uses_with(norm.outputs[0])
        if len(skip.outputs) > 3:
            skip.outputs[3].replace_all_uses_with(added.outputs[0])
        model.graph.remove(skip, safe=True)


def pack_gate_up(model: ir.Model) -> None:
    """One gate_up product and a Split, as Phi-3 itself has it."""
    for layer in range(2):
        prefix = f"/model/layers.{layer}/mlp"
        gate, up = (node(model, f"{prefix}/{name}_proj/MatMul") for name in ("gate", "up"))
        weights = [n.inputs[1].const_value.numpy() for n in (gate, up)]
        packed = constant(model, f"{prefix}/gate_up", np.concatenate(weights, axis=1))
        product = ir.node("MatMul", [gate.inputs[0], packed], name=f"{prefix}/gate_up/MatMul")
        product.outputs[0].name = f"{prefix}/gate_up/output"
        split = ir.node(
            "Split", product.outputs, {"num_outputs": 2, "axis": -1}, num_outputs=2, name=prefix
        )
        for index, old in enumerate((gate, up)):
            split.outputs[index].name = f"{prefix}/split_{index}"
            old.outputs[0].replace_all_uses_with(split.outputs[index])
        model.graph.insert_before(gate, [product, split])
        for old in (gate, up):
            model.graph.remove(old, safe=True)


def test_the_layouts_of_other_exporters(tmp_path: Path) -> None:
    checkpoint = write_phi3_checkpoint(tmp_path / "checkpoint")
    model = ir.load(write_onnx_artifact(checkpoint, tmp_path / "onnx") / "model.onnx")
    unfuse_skip_norms(model)
    pack_gate_up(model)
    graph = read_decoder(model, "edited")
    for layer in graph.layers:
        roles = [linear.role for linear in layer.linears]
        assert roles == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        assert layer.post_norm is not None and len(layer.post_norm.terms) == 2
    assert_weights_equal(graph, checkpoint, 0)


def test_names_do_not_matter(tmp_path: Path) -> None:
    checkpoint = write_phi3_checkpoint(tmp_path / "checkpoint")
    model = ir.load(write_onnx_artifact(checkpoint, tmp_path / "onnx") / "model.onnx")
    for index, item in enumerate(model.graph):
        item.name = f"node_{index}"
        for output in item.outputs:
            if output.name and not output.is_graph_output():
                output.name = f"value_{index}_{output.index()}"
    for index, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"weight_{index}"
    assert_weights_equal(read_decoder(model, "renamed"), checkpoint, 0)


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    checkpoint = write_phi3_checkpoint(tmp_path / "checkpoint")
    model = ir.load(write_onnx_artifact(checkpoint, tmp_path / "onnx") / "model.onnx")
    for item in model.graph:
        if item.op_type == "GroupQueryAttention":
            item.op_type = "SomethingElse"
    with pytest.raises(StageError, match="no decoder found: 0 attention, 5 RMS norm and 11 linear"):
        read_decoder(model, "model.onnx")
    model.graph.outputs[0].name = "scores"
    with pytest.raises(StageError, match="no output 'logits'"):
        read_decoder(model, "model.onnx")
