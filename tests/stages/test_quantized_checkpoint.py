"""Quantized checkpoints through the pipeline: their integers go into every artifact unrounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.errors import RecipeError, StageError
from phiconv.kernels.matmulnbits import dequantize_rows
from phiconv.onnx.quantize import take_codes
from phiconv.stages.cast import Cast, CastParams
from phiconv.stages.export_onnx import ExportOnnx, ExportOnnxParams
from phiconv.stages.quantize import Quantize, QuantizeParams
from phiconv.stages.stage import ONNX_GRAPH, Artifact, InputRef, StageContext
from phiconv.stages.write_onnx import WriteOnnx, WriteOnnxParams
from tests.onnx.models import hugging_face_logits, initializers, lay_out, onnx_logits, write
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.quantized_checkpoints import Quantized, write_quantized
from tests.terminal import Terminal

TINY = Path(__file__).parents[2] / "examples" / "tiny-phi3"
IDS = np.arange(40, dtype=np.int64) * 7 % 340


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """tiny-phi3 as AutoAWQ would store it."""
    folder = tmp_path_factory.mktemp("quantized") / "tiny-awq"
    return write_quantized(TINY, folder, method="awq", group_size=64)


def dequantized_checkpoint(made: Quantized, original: Path, path: Path) -> Path:
    """The float checkpoint that a quantized one stands for, in fp32."""
    import ml_dtypes  # noqa: F401  # lets NumPy read bf16
    from safetensors.numpy import load_file, save_file

    path.mkdir()
    tensors = load_file(original / "model.safetensors")
    floats = {name: values.astype(np.float32) for name, values in tensors.items()}
    save_file(floats | made.weights, path / "model.safetensors", metadata={"format": "pt"})
    for file in original.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((original / "config.json").read_text()) | {"torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def nodes(folder: Path) -> dict[str, dict[str, Any]]:
    """Attributes of each MatMulNBits by node name."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return {
        node.name: {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }


def test_a_build_copies_the_integers_and_measures_them_against_what_they_stand_for(
    awq: Quantized, phiconv: Terminal, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema: 1\nname: copied\nmodel: {source: x}\nstages:\n"
        "  - {id: onnx, uses: export-onnx}\n"
        "  - id: check\n    uses: validate\n"
        "    with: {windows: 2, window_length: 64,"
        " gates: {kl_divergence.mean: {max: 1.0e-6}, top1_agreement: {min: 1}}}\n"
    )
    out = tmp_path / "out"
    built = phiconv("build", str(recipe), "--model", str(awq.path), "--out", str(out))
    assert built.code == 0, built.err
    attributes = nodes(out / "artifact")
    assert len(attributes) == 4 * 5  # qkv, o, gate, up, down; the head is float
    assert {(item["bits"], item["block_size"]) for item in attributes.values()} == {(4, 64)}
    found = initializers(out / "artifact")
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        name, k = f"{prefix}.mlp.down_proj", 1024
        parts = [found[f"{name}.MatMul.weight_{part}"] for part in ("Q4", "scales", "zero_points")]
        packed, scales, zeros = parts
        n = len(packed)
        rows = dequantize_rows(
            packed, scales.reshape(n, -1), zeros.reshape(n, -1),
            bits=4, block_size=64, K=k, symmetric=False,
        )  # fmt: skip
        assert np.array_equal(rows, awq.weights[f"{name}.weight"])


def test_grouped_queries_in_fp16_and_a_permuted_group_order(tmp_path: Path) -> None:
    original = write_phi3_checkpoint(tmp_path / "float", hidden_size=256)
    made = write_quantized(
        original, tmp_path / "q", method="gptq", group_size=128, group_order=[1, 0], symmetric=True
    )
    checkpoint = Checkpoint(made.path)
    for provider in ("cuda", "dml"):
        graph = lay_out(made.path, tmp_path / provider, provider, "fp16")
        assert take_codes(graph, checkpoint) == (2 * 7 if provider == "dml" else 2 * 5)
        write(graph, made.path, tmp_path / provider / "onnx")
        found = initializers(tmp_path / provider / "onnx")
        tensor = "model.layers.1.self_attn.o_proj.weight"
        scales = found["model.layers.1.attn.o_proj.MatMul.weight_scales"]
        assert scales.dtype == np.float16
        assert np.array_equal(scales.reshape(256, 2), made.scales[tensor].T)
        logits = onnx_logits(tmp_path / provider / "onnx", IDS)
        floats = tmp_path / "floats"
        if not floats.exists():
            dequantized_checkpoint(made, original, floats)
        assert np.abs(logits - hugging_face_logits(floats, IDS)).max() < 0.05


def run_chain(path: Path, folder: Path, quantize: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    checkpoint = Checkpoint(path)
    graph = folder / "graph"
    graph.mkdir(parents=True)
    ExportOnnx().run(ExportOnnxParams(), StageContext(graph, (), checkpoint))
    quantized = folder / "quantized"
    quantized.mkdir()
    inputs = [Artifact("onnx", ONNX_GRAPH, "", graph)]
    params = QuantizeParams.model_validate(quantize)
    assert not Quantize().check(params, checkpoint.config)
    facts = Quantize().run(params, StageContext(quantized, inputs, checkpoint))
    out = folder / "out"
    out.mkdir()
    inputs = [Artifact("int4", ONNX_GRAPH, "", quantized)]
    written = WriteOnnx().run(WriteOnnxParams(), StageContext(out, inputs, checkpoint))
    made_by = (("export-onnx", ExportOnnxParams()), ("quantize", params))
    ref = InputRef("graph", ONNX_GRAPH, "", quantized, made_by)
    estimate = WriteOnnx().estimate(WriteOnnxParams(), checkpoint.config, [ref])
    data_bytes = written["data_bytes"]
    assert isinstance(data_bytes, int)
    assert 0.7 < estimate.disk_bytes / data_bytes < 1.3
    return out, facts


def test_quantize_adds_the_head_and_the_accuracy_level(awq: Quantized, tmp_path: Path) -> None:
    settings = {"lm_head": {"bits": 8, "block_size": 32}, "accuracy_level": 4}
    out, facts = run_chain(awq.path, tmp_path, settings)
    assert facts == {"int4_weights": 0, "int8_weights": 1, "copied_weights": 20}
    found = nodes(out)
    assert len(found) == 21
    assert {item["accuracy_level"] for item in found.values()} == {4}
    assert sorted({(item["bits"], item["block_size"]) for item in found.values()}) == [
        (4, 64),
        (8, 32),
    ]


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"bits": 8}, "bits"), ({"block_size": 32}, "block_size"), ({"symmetric": True}, "symmetric")],
)
def test_the_weights_are_not_quantized_again(
    awq: Quantized, settings: dict[str, Any], key: str
) -> None:
    config = Checkpoint(awq.path).config
    (error,) = Quantize().check(QuantizeParams.model_validate(settings), config)
    assert isinstance(error, RecipeError)
    assert error.where == f"quantize: {key}" and "quantized already" in error.message
    stored = {"bits": 4, "block_size": 64, "symmetric": False}
    assert Quantize().check(QuantizeParams.model_validate(stored), config) == []


def test_an_override_cannot_change_them(awq: Quantized, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="an integer weight already, 4 bits in blocks of 64"):
        run_chain(awq.path, tmp_path, {"overrides": [{"match": "*down_proj*", "bits": 8}]})


def test_a_cast_is_refused_when_planned(awq: Quantized) -> None:
    (error,) = Cast().check(CastParams(), Checkpoint(awq.path).config)
    assert "export for cuda or dml" in (error.remedy or "")


def test_gguf_takes_what_the_integers_stand_for(
    awq: Quantized, phiconv: Terminal, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema: 1\nname: gguf\nmodel: {source: x}\nstages:\n"
        "  - {id: gguf, uses: convert-gguf, with: {file_type: F32}}\n"
    )
    out = tmp_path / "out"
    built = phiconv("build", str(recipe), "--model", str(awq.path), "--out", str(out))
    assert built.code == 0, built.err
    tensors = {item.name: item for item in GGUFReader(out / "artifact" / "model.gguf").tensors}
    expected = awq.weights["model.layers.2.mlp.gate_up_proj.weight"]
    assert np.array_equal(tensors["blk.2.ffn_up.weight"].data, expected)
