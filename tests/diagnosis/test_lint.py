"""Every attribute and connection that contradicts the configuration is named, with its layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.diagnosis.config_lint import lint_config
from phiconv.diagnosis.decoder_graph import read_decoder
from phiconv.diagnosis.diagnose import lint_artifact
from phiconv.diagnosis.length_lint import lint_lengths
from phiconv.diagnosis.results import Finding
from phiconv.diagnosis.wiring_lint import lint_wiring
from phiconv.onnx.target import Provider
from tests.diagnosis.planting import change, constant, node, planted
from tests.onnx_artifacts import write_onnx_artifact
from tests.phi3_checkpoints import write_phi3_checkpoint

Edit = Callable[[ir.Model], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lint")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return write_phi3_checkpoint(folder / "checkpoint", sliding_window=100)


@pytest.fixture(scope="module")
def packed(folder: Path, checkpoint: Path) -> Path:
    return write_onnx_artifact(checkpoint, folder / "packed")


@pytest.fixture(scope="module")
def separate(folder: Path) -> Path:
    checkpoint = write_phi3_checkpoint(folder / "partial", partial_rotary_factor=0.75)
    return write_onnx_artifact(checkpoint, folder / "separate")


def findings(artifact: Path, checkpoint: Path, edit: Edit) -> list[Finding]:
    model = ir.load(artifact / "model.onnx")
    edit(model)
    graph, config = read_decoder(model, str(artifact)), Checkpoint(checkpoint).config
    return [
        *lint_config(graph, config),
        *lint_lengths(graph, config),
        *lint_wiring(graph, config),
    ]


def attribute(name: str, value: int | float, *, layers: tuple[int, ...] = (1,)) -> Edit:
    def edit(model: ir.Model) -> None:
        make = ir.AttrInt64 if isinstance(value, int) else ir.AttrFloat32
        for layer in layers:
            attention = node(model, f"/model/layers.{layer}/attn/GroupQueryAttention")
            attention.attributes[name] = make(name, value)

    return edit


def nothing(model: ir.Model) -> None:
    """Leaves it as it is."""


def test_a_right_graph_has_no_finding(packed: Path, checkpoint: Path, separate: Path) -> None:
    assert findings(packed, checkpoint, nothing) == []
    assert findings(separate, separate.parent / "partial", nothing) == []
    assert lint_artifact(packed, Checkpoint(checkpoint).config) == []


@pytest.mark.parametrize(
    ("edit", "check", "message"),
    [
        (attribute("num_heads", 8), "attention heads", "num_heads 8, the checkpoint has 4"),
        (attribute("kv_num_heads", 4), "attention heads", "kv_num_heads 4, the checkpoint has 2"),
        (
            attribute("scale", 0.5),
            "attention scale",
            "scale 0.5, the checkpoint has 0.176777",
        ),
        (
            attribute("softcap", 30.0),
            "attention softcap",
            "softcap 30, the checkpoint has none",
        ),
        (
            attribute("rotary_interleaved", 1),
            "rotary embedding",
            "pairs are interleaved, Phi-3's are halves",
        ),
        (
            attribute("do_rotary", 0),
            "rotary embedding",
            "queries and keys are not both rotated",
        ),
        (
            attribute("local_window_size", 50),
            "attention window",
            "attention window 50, the checkpoint has 100",
        ),
    ],
)
def test_attention_attributes(
    packed: Path, checkpoint: Path, edit: Edit, check: str, message: str
) -> None:
    (finding,) = findings(packed, checkpoint, edit)
    assert (finding.check, finding.message) == (check, message)
    assert finding.severity == "error"
    assert finding.layers == (1,)


def test_equal_findings_of_layers_are_one(packed: Path, checkpoint: Path) -> None:
    (finding,) = findings(packed, checkpoint, attribute("scale", 0.5, layers=(0, 1)))
    assert finding.layers == (0, 1)


def test_a_missing_window_is_a_warning(packed: Path, checkpoint: Path) -> None:
    """The builder's own graphs lack it; only longer texts than the window show it."""
    missing = attribute("local_window_size", -1, layers=(0, 1))
    (finding,) = findings(packed, checkpoint, missing)
    assert finding.severity == "warning"
    assert finding.message.endswith("another result for more than 100 tokens")


def test_a_window_that_one_layer_lacks_is_an_error(packed: Path, checkpoint: Path) -> None:
    (finding,) = findings(packed, checkpoint, attribute("local_window_size", -1))
    assert (finding.severity, finding.layers) == ("error", (1,))


def test_a_window_that_is_wrong_where_no_other_layer_has_one(
    packed: Path, checkpoint: Path
) -> None:
    def edit(model: ir.Model) -> None:
        attribute("local_window_size", -1, layers=(0,))(model)
        attribute("local_window_size", 50, layers=(1,))(model)

    found = {finding.layers: finding.severity for finding in findings(packed, checkpoint, edit)}
    assert found == {(0,): "warning", (1,): "error"}


@pytest.mark.parametrize(("minus", "what"), [(0, "+1"), (2, "-1")])
def test_a_mask_that_is_off_by_one(packed: Path, checkpoint: Path, minus: int, what: str) -> None:
    def edit(model: ir.Model) -> None:
        difference = node(model, "/model/attn_mask_reformat/attn_mask_subgraph/Sub")
        difference.replace_input_with(1, constant(model, "planted", np.array([minus], np.int64)))

    (finding,) = findings(packed, checkpoint, edit)
    assert (finding.check, finding.severity, finding.layers) == ("attention mask", "error", (0, 1))
    assert finding.message.startswith(f"the index of the last token is off by {what}: ")


@pytest.fixture(scope="module")
def longrope(folder: Path) -> Path:
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    return write_phi3_checkpoint(
        folder / "longrope",
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_scaling={"type": "longrope", **factors},
    )


@pytest.mark.parametrize(
    ("provider", "name", "message"),
    [
        (
            "cpu",
            "/model/rope_caches_subgraph/Greater",
            "the factors for short texts end at 96 tokens, not at 64",
        ),
        (
            "dml",
            "/model/pos_ids_reformat/GreaterOrEqual",
            "the factors for short texts end at 96 tokens, not at 64",
        ),
        ("dml", "/model/pos_ids_reformat/Mul", "positions step over 96 rows, not over 64"),
    ],
)
def test_a_switch_of_longrope_at_another_length(
    longrope: Path, tmp_path: Path, provider: Provider, name: str, message: str
) -> None:
    artifact = write_onnx_artifact(longrope, tmp_path / "artifact", provider)
    assert findings(artifact, longrope, nothing) == []

    def edit(model: ir.Model) -> None:
        other = constant(model, "planted", np.array(96, np.int64))
        node(model, name).replace_input_with(1, other)

    (finding,) = findings(artifact, longrope, edit)
    assert (finding.check, finding.layers) == ("rotary switch", (0, 1))
    assert finding.message == message


def truncated_cache(model: ir.Model) -> None:
    for name in ("cos_cache", "sin_cache"):
        change(model, name, lambda cache: cache[:64])


def bias_in_front_of_norm(model: ir.Model) -> None:
    skip = node(model, "/model/layers.1/post_attention_layernorm/SkipLayerNorm")
    skip.resize_inputs(4)
    skip.replace_input_with(3, constant(model, "bias", np.ones(128, np.float32)))


def tanh(model: ir.Model) -> None:
    for layer in range(2):
        activation = node(model, f"/model/layers.{layer}/mlp/act_fn/Sigmoid")
        activation.op_type = "Tanh"


def early_residual(model: ir.Model) -> None:
    """Layer 1's attention adds to the embeddings instead of what it read."""
    skip = node(model, "/model/layers.1/post_attention_layernorm/SkipLayerNorm")
    embedding = node(model, "/model/embed_tokens/Gather").outputs[0]
    skip.replace_input_with(0, embedding)


def lost_result(model: ir.Model) -> None:
    """The MLP's result of layer 0 is dropped: the residual stream is added twice."""
    skip = node(model, "/model/layers.1/input_layernorm/SkipLayerNorm")
    skip.replace_input_with(1, skip.inputs[0])


def head_on_embedding(model: ir.Model) -> None:
    head = node(model, "/lm_head/MatMul")
    head.replace_input_with(0, node(model, "/model/embed_tokens/Gather").outputs[0])


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            truncated_cache,
            ("rotary cache", "warning", "self_attn.rotary", (0, 1), "64 of 512 positions"),
        ),
        (
            bias_in_front_of_norm,
            ("bias", "error", "post_attention_layernorm", (1,), "a bias is added in front"),
        ),
        (tanh, ("activation", "error", "mlp.activation", (0, 1), "activation Tanh")),
        (
            early_residual,
            ("residual", "error", "self_attn.residual", (1,), "the residual stream is not added"),
        ),
        (
            lost_result,
            ("residual", "error", "mlp.residual", (0,), "its result is not added"),
        ),
        (
            head_on_embedding,
            ("head", "error", "lm_head", (), "it reads something that is no norm"),
        ),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_constants_and_connections(
    packed: Path, checkpoint: Path, edit: Edit, expected: tuple[Any, ...]
) -> None:
    found = findings(packed, checkpoint, edit)
    check, severity, component, layers, message = expected
    (finding,) = [finding for finding in found if finding.check == check]
    assert (finding.severity, finding.component, finding.layers) == (severity, component, layers)
    assert message in finding.message


def test_a_missing_projection(packed: Path, checkpoint: Path) -> None:
    def edit(model: ir.Model) -> None:
        projection = node(model, "/model/layers.0/attn/o_proj/MatMul")
        source = projection.inputs[0]
        assert source is not None
        projection.outputs[0].replace_all_uses_with(source)
        model.graph.remove(projection, safe=True)

    found = findings(packed, checkpoint, edit)
    assert (
        Finding("structure", "error", "self_attn.o_proj", (0,), "it is not in the graph") in found
    )


def test_separate_rotary_embedding(separate: Path) -> None:
    checkpoint = separate.parent / "partial"

    def edit(model: ir.Model) -> None:
        rotary = node(model, "/model/layers.0/attn/k_rotary/RotaryEmbedding")
        rotary.attributes["rotary_embedding_dim"] = ir.AttrInt64("rotary_embedding_dim", 32)
        rotary.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)

    messages = [(f.message, f.layers) for f in findings(separate, checkpoint, edit)]
    assert messages == [
        ("pairs are interleaved, Phi-3's are halves", (0,)),
        ("it rotates 32 dimensions, the checkpoint 24", (0,)),
    ]


def test_both_caches_of_longrope_are_checked(tmp_path: Path) -> None:
    factors = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1 + i / 10 for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
        "original_max_position_embeddings": 64,
    }
    sizes = {"original_max_position_embeddings": 64, "rope_parameters": factors}
    checkpoint = write_phi3_checkpoint(tmp_path / "checkpoint", **sizes)
    other = dict(factors, long_factor=[4.0 + i for i in range(16)])
    changed = write_phi3_checkpoint(tmp_path / "other", **{**sizes, "rope_parameters": other})
    for provider in ("cpu", "dml"):
        precision: Any = "fp32" if provider == "cpu" else "fp16"
        artifact = write_onnx_artifact(checkpoint, tmp_path / provider, provider, precision)
        assert findings(artifact, checkpoint, nothing) == []
        (finding,) = findings(artifact, changed, nothing)
        assert (finding.check, finding.layers) == ("rotary cache", (0, 1))
        if provider == "cpu":
            assert finding.message.startswith("cos_cache_large and sin_cache_large: it differs")


def test_another_checkpoints_sizes(packed: Path, tmp_path: Path) -> None:
    other = write_phi3_checkpoint(
        tmp_path / "other", num_hidden_layers=3, vocab_size=400, sliding_window=100
    )
    messages = [finding.message for finding in findings(packed, other, nothing)]
    assert messages == [
        "2 attention operators, the checkpoint has 3",
        "352 logits a token, the checkpoint's vocabulary has 400",
    ]


def test_lint_reads_a_saved_artifact(packed: Path, checkpoint: Path, tmp_path: Path) -> None:
    artifact = planted(packed, tmp_path / "x", attribute("scale", 0.5))
    (finding,) = lint_artifact(artifact, Checkpoint(checkpoint).config)
    assert finding.check == "attention scale"
