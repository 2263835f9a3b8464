"""phiconv's graph is the one that GenAI's model builder lays out, but for what ADR 0006 says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import AttributeProto, TensorProto

from phiconv.onnx import rotary_cache
from phiconv.onnx.graph import GENAI_FOLDER, GRAPH_FILE, WEIGHTS_FILE
from phiconv.onnx.target import Precision, Provider
from phiconv.onnx.weights import Dense, Rows
from tests.onnx.builder_oracle import build_with_builder, builder_graph
from tests.onnx.models import (
    assert_same_initializers,
    hugging_face_logits,
    initializers,
    lay_out,
    onnx_logits,
    open_checkpoint,
    write,
)
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.phi_family import FAMILY, SWITCH, longrope, write_member

IDS = np.random.default_rng(0).integers(10, 300, 48)
TARGETS: tuple[tuple[Provider, Precision], ...] = (
    ("cpu", "fp32"),
    ("cuda", "fp16"),
    ("dml", "fp16"),
)

# What no member of the family has, but a checkpoint may.
UNFUSED_LONGROPE = longrope(12, 1.5, 8.0, partial_rotary_factor=0.75)
OTHERS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped heads": {},
    "tied": {"tie_word_embeddings": True},
    "window": {"sliding_window": 16},
    "partial rotary": {"partial_rotary_factor": 0.5},
    "rotary that is not fused": {"partial_rotary_factor": 0.75},
    "wide heads": {"head_dim": 64},
    "one layer": {"num_hidden_layers": 1},
    "twelve layers": {"num_hidden_layers": 12},
    "gate_up as wide as the vocabulary": {"intermediate_size": 176},
    "longrope that is not fused": {
        "original_max_position_embeddings": SWITCH,
        "rope_parameters": UNFUSED_LONGROPE | {"original_max_position_embeddings": SWITCH},
    },
    "longrope with a scale of its own": {
        "original_max_position_embeddings": SWITCH,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / 16 for i in range(16)],
            "long_factor": [1.0 + i for i in range(16)],
            "factor": 4.0,
            "attention_factor": 1.3,
        },
    },
}


@pytest.fixture(scope="module", params=[*FAMILY, *OTHERS])
def any_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("contract") / "checkpoint"
    if request.param in FAMILY:
        return write_member(path, request.param, old_spelling=False)
    return write_phi3_checkpoint(path, **OTHERS[request.param])


@pytest.mark.parametrize(("provider", "precision"), TARGETS)
def test_same_graph_as_the_builder(
    any_checkpoint: Path, provider: Provider, precision: Precision, tmp_path: Path
) -> None:
    """Nodes, names, shapes, order and metadata byte for byte; see below for the rotary caches."""
    checkpoint = open_checkpoint(any_checkpoint)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    lay_out(any_checkpoint, ours, provider, precision).save(ours)
    builder_graph(checkpoint, provider, precision, tmp_path / GENAI_FOLDER).save(theirs)

    assert (ours / WEIGHTS_FILE).read_bytes() == (theirs / WEIGHTS_FILE).read_bytes()
    mine, other = (onnx.load(f / GRAPH_FILE, load_external_data=False) for f in (ours, theirs))
    pairs = list(zip(stored_tensors(mine), stored_tensors(other), strict=True))
    assert len(pairs) == (4 if checkpoint.config.rope and provider != "dml" else 2)
    for tensor, expected in pairs:
        check_cache(tensor, expected)
        tensor.raw_data = expected.raw_data
    assert serialized(mine) == serialized(other)

    name = f"genai-{provider}-{precision}/genai_config.json"
    expected_config = (tmp_path / GENAI_FOLDER / "genai_config.json").read_text()
    assert (ours / name).read_text() == expected_config


def serialized(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))


def stored_tensors(model: onnx.ModelProto) -> list[TensorProto]:
    """The cos and sin caches: initializers, or constants in the branches of If."""
    found = [tensor for tensor in model.graph.initializer if tensor.raw_data]
    for node in model.graph.node:
        for branch in node.attribute:
            if branch.type == AttributeProto.GRAPH:
                found += [constant.attribute[0].t for constant in branch.g.node]
    return found


def check_cache(tensor: TensorProto, expected: TensorProto) -> None:
    """The same to 1 ulp of the cosine and of the frequency, by which torch's own are off.

    An ulp of the frequency is one of the angle, which grows with the position.
    """
    assert (tensor.name, tensor.data_type) == (expected.name, expected.data_type)
    assert tensor.dims == expected.dims
    dtype = ir.DataType(tensor.data_type).numpy()
    mine, other = (
        np.frombuffer(t.raw_data, dtype).reshape(t.dims).astype(np.float64)
        for t in (tensor, expected)
    )
    positions = np.arange(len(mine))[:, None]
    ulp = np.finfo(dtype).eps * np.maximum(np.abs(other), np.finfo(np.float16).tiny)
    # frequencies are at most 1, and one ulp is at most 1.2e-7 of it
    assert (np.abs(mine - other) <= ulp + 1.2e-7 * 1.5 * positions).all()
    assert np.mean(mine != other) < 0.1


@pytest.mark.parametrize(
    ("theta", "width"), [(10_000.0, 96), (10_000.0, 128), (250_000.0, 128), (500_000.0, 80)]
)
def test_rotary_frequencies_are_torchs_to_one_ulp(theta: float, width: int) -> None:
    import torch

    from phiconv.checkpoint import ModelConfig
    from tests.phi3_checkpoints import phi3_config

    config = ModelConfig.from_dict(phi3_config(head_dim=width, rope_theta=theta), "config.json")
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    expected = (1.0 / theta**exponents).numpy()
    found = rotary_cache.frequencies(config)
    exact = 1.0 / theta ** exponents.numpy().astype(np.float64)
    np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    # of the two, ours is the nearer one
    assert (np.abs(found - exact) <= np.abs(expected - exact) + exact * 2**-24).all()


@pytest.mark.parametrize(("provider", "precision"), TARGETS)
def test_same_artifact_as_the_builders_own(
    tmp_path: Path, provider: Provider, precision: Precision
) -> None:
    """What the peer writes by itself, weights and all, with nothing of it replaced."""
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    graph = lay_out(path, tmp_path, provider, precision)
    write(graph, path, tmp_path / "ours")
    theirs = build_with_builder(path, tmp_path / "theirs", precision, provider)

    assert operators(tmp_path / "ours") == operators(theirs)
    assert_same_initializers(initializers(tmp_path / "ours"), initializers(theirs))
    genai = graph.genai
    assert genai is not None
    names = sorted(file.name for file in genai.iterdir())
    assert names == sorted(f.name for f in theirs.iterdir() if "model.onnx" not in f.name)
    for name in ("genai_config.json", "chat_template.jinja"):
        assert (genai / name).read_text() == (theirs / name).read_text(), name


def operators(folder: Path) -> list[tuple[str, str]]:
    return [(node.domain, node.op_type) for node in ir.load(folder / "model.onnx").graph]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {"sliding_window": 16},
        {"partial_rotary_factor": 0.5},
        {"partial_rotary_factor": 0.75},
    ],
    ids=lambda overrides: next(iter(overrides), "gqa"),
)
def test_fp32_logits_equal_hugging_face(tmp_path: Path, overrides: dict[str, object]) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="f32", **overrides)
    graph = lay_out(path, tmp_path)
    write(graph, path, tmp_path / "onnx")
    difference = onnx_logits(tmp_path / "onnx", IDS) - hugging_face_logits(path, IDS)
    assert np.abs(difference).max() <= 1e-4


def test_the_builder_itself_leaves_the_sliding_window_out(tmp_path: Path) -> None:
    """Why phiconv sets it; when this fails, the builder has learned it."""
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="f32", sliding_window=16)
    theirs = build_with_builder(path, tmp_path / "theirs", "fp32", "cpu")
    difference = np.abs(onnx_logits(theirs, IDS) - hugging_face_logits(path, IDS)).max(axis=1)
    assert difference[:16].max() <= 1e-4
    assert difference[16:].min() > 1e-3


def test_gate_up_as_wide_as_the_vocabulary_is_not_the_head(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="f32", intermediate_size=176)
    config = json.loads((path / "config.json").read_text())
    assert 2 * config["intermediate_size"] == config["vocab_size"]
    graph = lay_out(path, tmp_path)
    write(graph, path, tmp_path / "onnx")
    expected = hugging_face_logits(path, IDS)
    assert np.abs(onnx_logits(tmp_path / "onnx", IDS) - expected).max() <= 1e-4
    assert graph.weights["lm_head.MatMul.weight"] == Dense(
        (Rows("lm_head.weight", 0, config["vocab_size"]),), transposed=True
    )


def test_rotary_width_that_the_fused_operator_cannot_run_is_exported_unfused(
    tmp_path: Path,
) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", partial_rotary_factor=0.75)
    unfused = lay_out(path, tmp_path / "a")
    assert any(node.op_type == "RotaryEmbedding" for node in unfused.model.graph)
    path = write_phi3_checkpoint(tmp_path / "fits", partial_rotary_factor=0.5)
    fused = lay_out(path, tmp_path / "b")
    assert not any(node.op_type == "RotaryEmbedding" for node in fused.model.graph)


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer"),
    [
        ({}, None, {}),
        ({}, {}, {}),
        ({"eos_token_id": [3, 6], "bos_token_id": None, "pad_token_id": None}, None, {}),
        ({"eos_token_id": None}, None, {"pad_token": None}),
        ({"eos_token_id": 6, "pad_token_id": None}, {"eos_token_id": 5}, {"bos_token": None}),
        ({}, {"eos_token_id": [7, 6], "pad_token_id": 0, "bos_token_id": 2}, {}),
        (
            {"bos_token_id": None, "pad_token_id": None},
            {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "num_beams": 2},
            {"bos_token": None, "pad_token": None, "eos_token": None},
        ),
        ({}, {"do_sample": False, "temperature": 1.0, "repetition_penalty": 1.2}, {}),
        (
            {"repetition_penalty": 1.1, "num_beams": 2, "no_repeat_ngram_size": 3, "top_p": 0.5},
            {"temperature": 0.5, "top_k": None},
            {},
        ),
        ({"eos_token_id": 6}, None, {"eos_token": {"content": "<|end|>", "__type": "AddedToken"}}),
    ],
)
def test_same_genai_config_whatever_names_the_token_ids(
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    tokenizer: dict[str, Any],
    tmp_path: Path,
) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", **config)
    if generation is None:
        (path / "generation_config.json").unlink()
    else:
        (path / "generation_config.json").write_text(json.dumps(generation))
    change_json(path / "tokenizer_config.json", tokenizer)
    assert genai_configs(path, tmp_path) == [expected := genai_configs(path, tmp_path)[1], expected]


def test_same_genai_config_with_tokens_of_tool_calls_and_reasoning(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint")
    document = json.loads((path / "tokenizer.json").read_text())
    flags = {k: v for k, v in document["added_tokens"][0].items() if k not in ("id", "content")}
    names = ["<|tool_call|>", "<|/tool_call|>", "<think>"]
    first = max(document["model"]["vocab"].values()) + 1
    document["model"]["vocab"]["</think>"] = first
    document["added_tokens"] += [
        {"id": first + 1 + index, "content": name, **flags} for index, name in enumerate(names)
    ]
    (path / "tokenizer.json").write_text(json.dumps(document))
    ours, theirs = genai_configs(path, tmp_path)
    assert ours == theirs
    model = json.loads(ours)["model"]
    keys = ("bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id")
    assert [model[key] for key in keys] == [first + 1, first + 2, first + 3, first]


def genai_configs(path: Path, tmp_path: Path) -> list[str]:
    """genai_config.json by phiconv and by the builder."""
    scratch = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    scratch.mkdir()
    genai = lay_out(path, scratch).genai
    assert genai is not None
    builder_graph(open_checkpoint(path), "cpu", "fp32", scratch / "theirs")
    return [(folder / "genai_config.json").read_text() for folder in (genai, scratch / "theirs")]


def change_json(file: Path, changes: dict[str, Any]) -> None:
    document = json.loads(file.read_text()) | changes
    kept = {key: value for key, value in document.items() if value is not None}
    file.write_text(json.dumps(kept))
