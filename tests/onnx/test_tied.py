"""A tied embedding is stored once, and computes what two copies do."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from phiconv import machine
from phiconv.inspect import tensor_kinds
from phiconv.onnx.graph import OnnxGraph
from phiconv.onnx.quantize import Target, WeightInfo, quantize_graph
from phiconv.onnx.target import Provider
from phiconv.onnx.tied import same_bytes, share_float_head
from phiconv.stages.checks import check_kernels, check_wiring
from tests.onnx.models import (
    hugging_face_logits,
    initializers,
    lay_out,
    onnx_logits,
    open_checkpoint,
    write,
)
from tests.phi_family import write_member

IDS = np.random.default_rng(0).integers(8, 290, 60)
TABLE = 352 * 192


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_member(tmp_path_factory.mktemp("tied") / "checkpoint", "phi-4-mini")


def written(graph: OnnxGraph, checkpoint: Path, folder: Path) -> Path:
    write(graph, checkpoint, folder)
    assert graph.genai is not None
    return shutil.copytree(graph.genai, folder, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("provider", "precision", "target"),
    [("cpu", "fp32", machine.CPU), ("cuda", "fp16", machine.CUDA)],
)
def test_a_float_head_takes_the_embedding_as_it_is(
    tied: Path, provider: Provider, precision: str, target: str, tmp_path: Path
) -> None:
    graph = lay_out(tied, tmp_path, provider, precision)  # type: ignore[arg-type]
    artifact = written(graph, tied, tmp_path / "artifact")
    model = ir.load(artifact / "model.onnx")
    (head,) = (node for node in model.graph if node.op_type == "FusedMatMul")
    assert head.outputs[0] is model.graph.outputs[0]
    assert head.inputs[1].name == "model.embed_tokens.weight"
    assert "lm_head.MatMul.weight" not in model.graph.initializers
    error = np.abs(onnx_logits(artifact, IDS) - hugging_face_logits(tied, IDS)).max()
    assert error <= {"fp32": 1e-4, "fp16": 0.05}[precision]
    # the checks of a validation read such a head
    (graph_check,) = check_wiring(artifact, open_checkpoint(tied)).checks
    (kernels,) = check_kernels(artifact, target).checks
    assert (graph_check.state, kernels.state) == ("clean", "clean")
    assert [k.parameters for k in tensor_kinds(artifact) if k.kind == "embedding"] == [TABLE]


def test_a_graph_for_directml_keeps_two(tied: Path, tmp_path: Path) -> None:
    graph = lay_out(tied, tmp_path, "dml", "fp16")
    share_float_head(graph)
    assert {"model.embed_tokens.weight", "lm_head.MatMul.weight"} <= graph.weights.keys()


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_rounded_alike_both_point_to_one_place(
    tied: Path, bits: int, symmetric: bool, tmp_path: Path
) -> None:
    def alike(weight: WeightInfo) -> Target | None:
        body = weight.role == "body"
        return None if body else Target(bits, 32, symmetric, "none", 0)

    graph = lay_out(tied, tmp_path)
    quantize_graph(graph, alike)
    shared = same_bytes(graph)
    assert len(shared) == (2 if symmetric else 3)
    artifact = written(graph, tied, tmp_path / "artifact")
    found = initializers(artifact)
    tensors = {
        name: value.const_value
        for name, value in ir.load(artifact / "model.onnx").graph.initializers.items()
    }
    for name, other in shared.items():
        one, two = tensors[name], tensors[other]
        assert isinstance(one, ir.ExternalTensor)
        assert isinstance(two, ir.ExternalTensor)
        assert (one.offset, one.length) == (two.offset, two.length)
        assert found[name].tobytes() == found[other].tobytes()
    # what the runtime computes with the one copy is what it computes with two
    apart = lay_out(tied, tmp_path / "apart")
    quantize_graph(apart, alike)
    for name in shared:
        parts = apart.weights[name]
        apart.model.graph.initializers[name].const_value = ir.tensor(found[name], name=name)
        del apart.weights[name], parts
    two_copies = written(apart, tied, tmp_path / "two")
    assert same_bytes(apart) == {}
    assert np.array_equal(onnx_logits(artifact, IDS), onnx_logits(two_copies, IDS))
    saved = (two_copies / "model.onnx.data").stat().st_size
    saved -= (artifact / "model.onnx.data").stat().st_size
    assert saved >= TABLE * bits // 8
    assert check_wiring(artifact, open_checkpoint(tied)).checks[0].state == "clean"


def test_what_is_rounded_otherwise_is_stored_twice(tied: Path, tmp_path: Path) -> None:
    def unlike(weight: WeightInfo) -> Target | None:
        return Target(8 if weight.role == "embedding" else 4, 32, True, "none", 0)

    graph = lay_out(tied, tmp_path)
    quantize_graph(graph, unlike)
    assert same_bytes(graph) == {}


def test_a_model_that_is_not_tied_is_left_alone(tmp_path: Path) -> None:
    path = write_member(tmp_path / "checkpoint", "phi-4")
    graph = lay_out(path, tmp_path)
    share_float_head(graph)
    assert "lm_head.MatMul.weight" in graph.weights
    quantize_graph(graph, lambda _: Target(8, 32, True, "none", 0))
    assert same_bytes(graph) == {}
