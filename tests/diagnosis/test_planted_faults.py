"""Every planted fault is caught by a default gate or a lint, and named; clean artifacts pass.

Phi-3 has no biases, so "the missing bias of one layer" has two nearest analogues here: a bias that
is there and should not be, and an addition that is missing (the residual stream's). The wrong eos
id is the business of the genai_config lint.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from phiconv.checkpoint import Checkpoint
from phiconv.diagnosis import Diagnosis
from phiconv.diagnosis.diagnose import diagnose
from phiconv.diagnosis.rotary_cache import expected_cache
from phiconv.diagnosis.verdict import failed_gates
from phiconv.runtimes.providers import CPU, ProviderChoice
from phiconv.runtimes.reference import final_hidden_states
from phiconv.stages.stage import SilentProgress
from phiconv.tokens import load_token_set
from tests.diagnosis.conftest import TINY, export
from tests.diagnosis.planting import (
    add_after,
    change,
    constant,
    drop_residual,
    node,
    planted,
    set_float,
)
from tests.onnx.builder_oracle import build_with_builder
from tests.phi3_checkpoints import write_phi3_checkpoint

WINDOWS, WINDOW_LENGTH = 2, 128


def run(artifact: Path, checkpoint: Path = TINY) -> Diagnosis:
    opened = Checkpoint(checkpoint)
    tokens = load_token_set("default", opened, windows=WINDOWS, window_length=WINDOW_LENGTH)
    # one thread: busy machines stall on short parallel loops
    return diagnose(
        artifact,
        opened,
        provider=ProviderChoice(CPU, CPU),
        tokens=tokens,
        threads=1,
        progress=SilentProgress(),
    )


def named(diagnosis: Diagnosis) -> list[tuple[str, tuple[int, ...]]]:
    return [(fault.component, fault.layers) for fault in diagnosis.faults]


def caught_by_gate(diagnosis: Diagnosis) -> bool:
    return bool(failed_gates(diagnosis.ladder[-1]))


def caught_by_lint(diagnosis: Diagnosis) -> bool:
    return any(finding.severity == "error" for finding in diagnosis.findings)


@pytest.mark.parametrize("artifact", ["fp32", "int4", "dml_fp16"])
def test_a_clean_artifact_has_no_fault(artifact: str, request: pytest.FixtureRequest) -> None:
    diagnosis = run(request.getfixturevalue(artifact))
    assert diagnosis.faults == ()
    assert diagnosis.verdict.startswith("no fault found: mean KL ")
    assert not caught_by_gate(diagnosis)
    assert not caught_by_lint(diagnosis)


def test_wrong_head_of_the_model_builder(tmp_path: Path) -> None:
    checkpoint = write_phi3_checkpoint(tmp_path / "checkpoint", intermediate_size=176)
    artifact = build_with_builder(checkpoint, tmp_path / "builder", "fp32", "cpu")
    diagnosis = run(artifact, checkpoint)
    assert caught_by_gate(diagnosis)
    assert caught_by_lint(diagnosis)
    assert named(diagnosis) == [("lm_head", ())]
    assert diagnosis.verdict.startswith(
        "the error enters at stage 'graph', lm_head (it reads the post_attention_layernorm of "
        "layer 0, not the final norm"
    )


def test_corrupt_scale_of_one_block(int4: Path, tmp_path: Path) -> None:
    def flip_exponent_bit(scales: np.ndarray) -> np.ndarray:
        scales.reshape(256, 32)[17, 5] *= 2.0**10
        return scales

    name = "model.layers.2.mlp.down_proj.MatMul.weight_scales"
    artifact = planted(int4, tmp_path / "x", lambda model: change(model, name, flip_exponent_bit))
    diagnosis = run(artifact)
    assert caught_by_gate(diagnosis)
    assert named(diagnosis) == [("mlp.down_proj", (2,))]
    assert "stage 'quantized weights', layer 2, mlp.down_proj (SQNR -" in diagnosis.verdict
    assert "1 of 8192 blocks is wrong, the worst in row 17, columns 160 to 191" in (
        diagnosis.verdict
    )


def test_corrupt_tensor(int4: Path, tmp_path: Path) -> None:
    def scramble(packed: np.ndarray) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, packed.shape, np.uint8)

    name = "model.layers.3.mlp.down_proj.MatMul.weight_Q4"
    artifact = planted(int4, tmp_path / "x", lambda model: change(model, name, scramble))
    diagnosis = run(artifact)
    assert caught_by_gate(diagnosis)
    assert named(diagnosis) == [("mlp.down_proj", (3,))]
    assert "stage 'quantized weights', layer 3, mlp.down_proj (SQNR -" in diagnosis.verdict
    assert "expected about 21 dB; equals no weight of this shape" in diagnosis.verdict


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_swapped_q_and_k(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def swap_columns(weight: np.ndarray) -> np.ndarray:
        return np.concatenate([weight[:, 256:512], weight[:, :256], weight[:, 512:]], axis=1)

    def swap_rows(packed: np.ndarray) -> np.ndarray:
        rows = packed.reshape(768, -1)
        swapped = np.concatenate([rows[256:512], rows[:256], rows[512:]])
        return swapped.reshape(packed.shape)

    def edit(model: ir.Model) -> None:
        name = "model.layers.1.attn.qkv_proj.MatMul.weight"
        if kind == "fp32":
            change(model, name, swap_columns)
        else:
            change(model, f"{name}_Q4", swap_rows)
            change(model, f"{name}_scales", swap_rows)

    diagnosis = run(planted(request.getfixturevalue(kind), tmp_path / "x", edit))
    assert caught_by_gate(diagnosis)
    assert sorted(named(diagnosis)) == [("self_attn.k_proj", (1,)), ("self_attn.q_proj", (1,))]
    assert "holds the weight of layer 1, self_attn." in diagnosis.verdict
    assert "the two are swapped" in diagnosis.verdict


def rotary_caches(theta: float, first: int = 0) -> dict[str, np.ndarray]:
    from dataclasses import replace

    config = replace(Checkpoint(TINY).config, rope_theta=theta)
    rows = config.max_position_embeddings
    cache = expected_cache(config, "plain", rows + first).rows(first, rows + first)
    return {"cos_cache": cache.cos, "sin_cache": cache.sin}


@pytest.mark.parametrize("kind", ["fp32", "dml_fp16"])
def test_rope_theta(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def edit(model: ir.Model) -> None:
        for name, values in rotary_caches(500.0).items():
            change(model, name, lambda old, new=values: new.astype(old.dtype))

    diagnosis = run(planted(request.getfixturevalue(kind), tmp_path / "x", edit))
    assert caught_by_lint(diagnosis)
    assert named(diagnosis) == [("self_attn.rotary", (0, 1, 2, 3))]
    assert "it follows rope_theta 500, the checkpoint has 10000" in diagnosis.verdict
    assert len(diagnosis.faults[0].evidence) >= 4  # and every layer's own steps say so


def test_positions_off_by_one_in_the_caches(int4: Path, tmp_path: Path) -> None:
    """Attention only sees differences of positions, so nothing but the lint can tell."""

    def edit(model: ir.Model) -> None:
        for name, values in rotary_caches(10000.0, first=1).items():
            change(model, name, lambda old, new=values: new.astype(old.dtype))

    diagnosis = run(planted(int4, tmp_path / "x", edit))
    assert caught_by_lint(diagnosis)
    assert named(diagnosis) == [("self_attn.rotary", (0, 1, 2, 3))]
    assert "it is shifted: row 0 holds position 1" in diagnosis.verdict
    assert diagnosis.verdict.startswith("a fault at stage 'graph', ")


def test_positions_off_by_one_for_the_queries_of_a_layer(dml_fp16: Path, tmp_path: Path) -> None:
    def edit(model: ir.Model) -> None:
        rotary = node(model, "/model/layers.2/attn/q_rotary/RotaryEmbedding")
        one = constant(model, "one", np.array([1], np.int64))
        shifted = ir.node("Add", [rotary.inputs[1], one], name="planted")
        shifted.outputs[0].name = "planted/output"
        model.graph.insert_before(rotary, shifted)
        rotary.replace_input_with(1, shifted.outputs[0])

    diagnosis = run(planted(dml_fp16, tmp_path / "x", edit))
    assert caught_by_lint(diagnosis)
    assert named(diagnosis) == [("self_attn.rotary", (2,))]
    assert "the positions of queries are shifted: Add of 1" in diagnosis.faults[0].message
    assert any("rotary (queries)" in line for line in diagnosis.faults[0].evidence)


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_wrong_epsilon(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name = "/model/layers.1/input_layernorm/SkipLayerNorm"

    def edit(model: ir.Model) -> None:
        set_float(model, name, "epsilon", 1e-6)

    diagnosis = run(planted(request.getfixturevalue(kind), tmp_path / "x", edit))
    assert caught_by_lint(diagnosis)
    assert named(diagnosis) == [("input_layernorm", (1,))]
    assert "layer 1, input_layernorm (epsilon 1e-06, the checkpoint has 1e-05)" in (
        diagnosis.verdict
    )


def test_transposed_weight(fp32: Path, tmp_path: Path) -> None:
    name = "model.layers.0.attn.o_proj.MatMul.weight"
    artifact = planted(fp32, tmp_path / "x", lambda model: change(model, name, np.transpose))
    diagnosis = run(artifact)
    assert caught_by_gate(diagnosis)
    assert named(diagnosis) == [("self_attn.o_proj", (0,))]
    assert "stage 'weights', layer 0, self_attn.o_proj (SQNR -" in diagnosis.verdict
    assert "is the right weight transposed" in diagnosis.verdict


def test_missing_addition_of_one_layer(int4: Path, tmp_path: Path) -> None:
    name = "/model/layers.2/post_attention_layernorm/SkipLayerNorm"
    artifact = planted(int4, tmp_path / "x", lambda model: drop_residual(model, name))
    diagnosis = run(artifact)
    assert caught_by_gate(diagnosis)
    assert caught_by_lint(diagnosis)
    assert named(diagnosis) == [("self_attn.residual", (2,))]
    assert "layer 2, self_attn.residual (the residual stream is not added" in diagnosis.verdict


def test_bias_that_the_checkpoint_does_not_have(int4: Path, tmp_path: Path) -> None:
    def edit(model: ir.Model) -> None:
        output = node(model, "/model/layers.1/mlp/gate_proj/MatMul_Q4").outputs[0]
        bias = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
        add_after(model, output, constant(model, "planted.bias", bias))

    diagnosis = run(planted(int4, tmp_path / "x", edit))
    assert caught_by_lint(diagnosis)
    assert named(diagnosis) == [("mlp.gate_proj", (1,))]
    assert "a bias is added (planted.bias), the checkpoint has none" in diagnosis.verdict
    assert any("relative error" in line for line in diagnosis.faults[0].evidence)


def with_residual_stream_times(factor: float, folder: Path) -> Path:
    """A checkpoint that computes the same with another scale of the residual stream.

    What is added to the stream is multiplied by a power of two, which the norms take out again.
    """
    folder.mkdir()
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed_tokens" in name or "o_proj" in name or "down_proj" in name:
            tensor *= ml_dtypes.bfloat16(factor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_fp16_overflow(tmp_path: Path) -> None:
    """Weights that fp16 holds well, in a model whose activations it does not."""
    checkpoint = Checkpoint(TINY)
    tokens = load_token_set("default", checkpoint, windows=WINDOWS, window_length=WINDOW_LENGTH)
    peaks: list[float] = []
    final_hidden_states(
        checkpoint, tokens.windows, observe=lambda _, stream: peaks.append(np.abs(stream).max())
    )
    largest = float(np.finfo(np.float16).max)
    factor = 2.0 ** np.ceil(np.log2(largest / max(peaks)))
    scaled = with_residual_stream_times(factor, tmp_path / "checkpoint")
    layer = next(index for index, peak in enumerate(peaks) if peak * factor > largest) - 1
    assert layer >= 0

    diagnosis = run(export(scaled, tmp_path / "fp16", "cuda", "fp16"), scaled)
    assert caught_by_gate(diagnosis)
    ((component, layers),) = named(diagnosis)
    assert component in {"mlp.down_proj", "mlp.residual", "self_attn.residual"}
    assert layers == (layer,)
    assert f"stage 'graph', layer {layer}, {component} (" in diagnosis.verdict
    assert "overflow fp16: they reach " in diagnosis.verdict
