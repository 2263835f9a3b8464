"""What a diagnosis measures, against Hugging Face and on artifacts whose errors are known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from phiconv import machine
from phiconv.checkpoint import Checkpoint
from phiconv.diagnosis import Diagnosis, Rung
from phiconv.diagnosis.diagnose import diagnose, measure_layers
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.onnx.quantize import Target, WeightInfo, quantize_graph
from phiconv.runtimes.providers import CPU, ProviderChoice
from phiconv.stages.stage import SilentProgress
from phiconv.tokens import TokenSet, load_token_set
from tests.diagnosis.planting import change, node, planted
from tests.onnx.builder_oracle import build_with_builder
from tests.onnx.models import initializers, lay_out, write
from tests.onnx_artifacts import write_onnx_artifact
from tests.phi3_checkpoints import write_phi3_checkpoint

ON_CPU = ProviderChoice(CPU, CPU)
LONGROPE = {
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1 + i / 10 for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
        "original_max_position_embeddings": 32,
    },
}


def tokens_of(checkpoint: Path) -> TokenSet:
    return load_token_set("default", Checkpoint(checkpoint), windows=2, window_length=48)


def run(artifact: Path, checkpoint: Path, choice: ProviderChoice = ON_CPU) -> Diagnosis:
    return diagnose(
        artifact,
        Checkpoint(checkpoint),
        provider=choice,
        tokens=tokens_of(checkpoint),
        threads=1,
        progress=SilentProgress(),
    )


def only(*names: str) -> Any:
    """Quantizes the weights that contain one of the names."""

    def target(weight: WeightInfo) -> Target | None:
        return Target(4, 32, True, "none", 0) if any(n in weight.name for n in names) else None

    return target


def quantized(checkpoint: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    graph = lay_out(checkpoint, folder)
    quantize_graph(graph, only(*names))
    write(graph, checkpoint, folder / "onnx")
    return folder / "onnx"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diagnose")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return write_phi3_checkpoint(folder / "checkpoint", num_hidden_layers=3)


@pytest.fixture(scope="module")
def fp32(folder: Path, checkpoint: Path) -> Path:
    return write_onnx_artifact(checkpoint, folder / "fp32")


def rung(diagnosis: Diagnosis, stage: str) -> Rung:
    (found,) = [rung for rung in diagnosis.ladder if rung.stage == stage]
    return found


def mean_kl(model: Any, other: Any, windows: np.ndarray) -> float:
    """KL(model || other) by torch, from two Hugging Face models."""
    with torch.no_grad():
        left, right = (m(torch.from_numpy(windows)).logits.double() for m in (model, other))
    log_p, log_q = left.log_softmax(-1), right.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_nothing_is_written_and_the_document_is_json(fp32: Path, checkpoint: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in fp32.iterdir()}
    diagnosis = run(fp32, checkpoint)
    assert before == {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in fp32.iterdir()}

    document = json.loads(json.dumps(diagnosis.to_json(), allow_nan=False))
    assert document["schema"] == 1
    assert document["verdict"] == diagnosis.verdict
    assert [layer["layer"] for layer in document["layers"]] == [-1, 0, 1, 2]
    assert len(document["tensors"]) == 3 * 9 + 3
    assert document["provenance"]["provider"] == CPU
    assert document["tokens"]["windows"] == 2
    components = {operator["component"] for operator in document["operators"]}
    assert {"embed_tokens", "input_layernorm", "self_attn.attention", "lm_head"} <= components


def test_the_yardstick_is_hugging_face_in_bf16(fp32: Path, checkpoint: Path) -> None:
    windows = tokens_of(checkpoint).windows
    models = [
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    found = rung(run(fp32, checkpoint), "checkpoint dtype")
    assert not found.on_path
    assert found.kl_mean == pytest.approx(mean_kl(*models, windows), rel=0.05)


def test_the_rung_of_the_weights_is_hugging_face_with_those_weights(
    folder: Path, checkpoint: Path
) -> None:
    artifact = quantized(checkpoint, folder / "down", "down_proj")
    weights = initializers(artifact)
    model, other = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) for _ in range(2)
    )
    for index, layer in enumerate(other.model.layers):
        name = f"model.layers.{index}.mlp.down_proj.MatMul.weight"
        packed = weights[f"{name}_Q4"].reshape(128, -1)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(128, 8, 32)
        values = (codes.astype(np.float32) - 8) * weights[f"{name}_scales"].reshape(128, 8, 1)
        layer.mlp.down_proj.weight.data = torch.from_numpy(values.reshape(128, 256))
    diagnosis = run(artifact, checkpoint)
    found = rung(diagnosis, "quantized weights")
    expected = mean_kl(model, other, tokens_of(checkpoint).windows)
    assert found.kl_mean == pytest.approx(expected, rel=1e-3)
    graph = rung(diagnosis, "graph")
    assert graph.kl_mean == pytest.approx(expected, rel=1e-3)
    assert [rung.stage for rung in diagnosis.ladder] == [
        "reference",
        "checkpoint dtype",
        "quantized weights",
        "graph",
    ]


def test_the_local_error_is_in_the_layer_and_block_that_was_changed(
    folder: Path, checkpoint: Path
) -> None:
    diagnosis = run(quantized(checkpoint, folder / "one", "layers.1.mlp"), checkpoint)
    embedding, first, second, third = diagnosis.layers
    assert embedding.relative_error == 0
    for clean in (first, third):
        assert clean.added is not None and clean.added < 1e-5
        assert clean.attention is not None and clean.attention < 1e-5
        assert clean.mlp is not None and clean.mlp < 1e-5
    assert second.mlp is not None and 0.05 < second.mlp < 0.5
    assert second.attention is not None and second.attention < 1e-5
    assert second.added is not None and 0.01 < second.added < 0.5
    # what one layer adds, the next inherits
    assert second.inherited is not None and second.inherited < 1e-5
    assert third.inherited == second.relative_error
    assert third.inherited is not None and third.inherited > 0.01
    assert diagnosis.faults == ()


@pytest.mark.parametrize(
    ("overrides", "provider", "precision"),
    [
        (LONGROPE, "cpu", "fp32"),
        (LONGROPE, "dml", "fp16"),
        ({"sliding_window": 20}, "cuda", "fp16"),
        ({"partial_rotary_factor": 0.75, "num_key_value_heads": 4}, "cpu", "fp32"),
        ({"tie_word_embeddings": True}, "cpu", "fp16"),
    ],
    ids=["longrope", "longrope-dml", "window", "partial", "tied-multi-head"],
)
def test_other_architectures_are_clean(
    tmp_path: Path, overrides: dict[str, Any], provider: Any, precision: Any
) -> None:
    checkpoint = write_phi3_checkpoint(tmp_path / "checkpoint", **overrides)
    if (provider, precision) == ("cpu", "fp16"):  # only the model builder lays that out
        artifact = build_with_builder(checkpoint, tmp_path / "onnx", precision, provider)
    else:
        artifact = write_onnx_artifact(checkpoint, tmp_path / "onnx", provider, precision)
    diagnosis = run(artifact, checkpoint)
    assert diagnosis.faults == ()
    assert diagnosis.findings == ()
    assert diagnosis.verdict.startswith("no fault found: mean KL ")
    cast = [rung.stage for rung in diagnosis.ladder if rung.stage == "cast"]
    assert cast == (["cast"] if precision == "fp16" else [])


SCALES = np.exp(np.random.default_rng(0).standard_normal(128) / 3).astype(np.float32)


def scale_columns(model: ir.Model) -> None:
    name = "model.layers.1.attn.qkv_proj.MatMul.weight"
    change(model, name, lambda weight: weight * SCALES[:, None])


def scale_columns_and_norm(model: ir.Model) -> None:
    scale_columns(model)
    change(model, "model.layers.1.input_layernorm.weight", lambda weight: weight / SCALES)


def test_the_layers_alone_are_those_of_the_diagnosis(checkpoint: Path, tmp_path: Path) -> None:
    artifact = quantized(checkpoint, tmp_path / "quantized", "down_proj")
    windows = tokens_of(checkpoint).windows
    found = measure_layers(artifact, Checkpoint(checkpoint), windows, provider=CPU, threads=1)
    expected = run(artifact, checkpoint).layers
    assert [layer.layer for layer in found] == [layer.layer for layer in expected]
    for one, other in zip(found, expected, strict=True):
        left, right = asdict(one), asdict(other)
        assert left["relative_error"] is not None
        assert left.keys() == right.keys()
        for name, value in right.items():
            expected_value = value if value is None else pytest.approx(value, rel=1e-3, abs=1e-6)
            assert left[name] == expected_value, (one.layer, name)


def test_scales_that_are_undone_are_no_fault(fp32: Path, checkpoint: Path, tmp_path: Path) -> None:
    diagnosis = run(planted(fp32, tmp_path / "x", scale_columns_and_norm), checkpoint)
    assert diagnosis.faults == ()
    rescaled = {error.place for error in diagnosis.tensors if error.status == "rescaled"}
    assert rescaled == {"layer 1, input_layernorm"} | {
        f"layer 1, self_attn.{name}_proj" for name in "qkv"
    }


def test_scales_that_are_not_undone_are_named(fp32: Path, checkpoint: Path, tmp_path: Path) -> None:
    diagnosis = run(planted(fp32, tmp_path / "x", scale_columns), checkpoint)
    ((component, layers),) = [(fault.component, fault.layers) for fault in diagnosis.faults]
    assert (component, layers) == ("self_attn", (1,))
    assert "its contribution is off by " in diagnosis.verdict


def test_an_artifact_of_another_checkpoint(fp32: Path, tmp_path: Path) -> None:
    other = write_phi3_checkpoint(tmp_path / "other", num_hidden_layers=3, seed=1)
    diagnosis = run(fp32, other)
    (fault,) = diagnosis.faults
    assert fault.component == "model"
    assert "seems to be made from another checkpoint" in diagnosis.verdict


def test_an_artifact_of_another_width(fp32: Path, tmp_path: Path) -> None:
    other = write_phi3_checkpoint(tmp_path / "other", num_hidden_layers=3, intermediate_size=384)
    diagnosis = run(fp32, other)
    assert diagnosis.layers == ()
    assert {fault.component for fault in diagnosis.faults} >= {"mlp.gate_proj", "mlp.down_proj"}
    assert "its shape is [256, 128], the checkpoint's [384, 128]" in diagnosis.verdict


@pytest.mark.skipif(machine.CUDA in machine.providers(), reason="this machine has CUDA")
def test_an_artifact_that_does_not_run_is_told_why(
    fp32: Path, checkpoint: Path, tmp_path: Path
) -> None:
    def edit(model: ir.Model) -> None:
        attention = node(model, "/model/layers.1/attn/GroupQueryAttention")
        attention.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 1)

    with pytest.raises(StageError) as error:
        run(planted(fp32, tmp_path / "x", edit), checkpoint)
    assert (
        "found without running it: layer 1, self_attn.attention: kv_num_heads 1, the checkpoint has"
    ) in error.value.message


def test_a_missing_provider_is_the_environments_fault(fp32: Path, checkpoint: Path) -> None:
    for provider in (None, machine.CUDA):
        with pytest.raises(EnvironmentLacksError):
            run(fp32, checkpoint, ProviderChoice(machine.CUDA, provider))


@pytest.mark.gpu
def test_the_provider_is_a_rung_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    artifact = write_onnx_artifact(checkpoint, tmp_path / "onnx", "cuda", "fp16")
    diagnosis = run(artifact, checkpoint, ProviderChoice(machine.CUDA, machine.CUDA))
    assert [rung.stage for rung in diagnosis.ladder][-2:] == ["graph", "provider"]
    assert diagnosis.faults == ()
    assert diagnosis.provenance.provider == machine.CUDA
