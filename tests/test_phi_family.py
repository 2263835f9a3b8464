"""Every member of the family, in every format: logits against Hugging Face's at every length.

Below, at and above the sliding window and LongRoPE's switch, by prefill and by decoding across.
Where a runtime does otherwise, the position from which it does is the one that its known limit
states, and what it computes there is what the limit says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiconv import machine
from phiconv.checkpoint import Checkpoint
from phiconv.report.results import KnownLimit
from phiconv.runtimes import RUNTIMES, ArtifactFolder
from phiconv.runtimes.length_limits import boundaries
from phiconv.runtimes.providers import ProviderChoice
from phiconv.runtimes.reference import LanguageModelHead, final_hidden_states
from phiconv.stages.known_limits import known_limits
from tests.gguf.conversions import convert
from tests.onnx_artifacts import write_onnx_artifact
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.phi_family import CONTEXT, FAMILY, SWITCH, WINDOW, write_member

BEFORE = BEYOND = 12
TOLERANCES = {"fp32": 1e-4, "fp16": 0.05, "F32": 1e-3}
FORMATS = {
    "cpu fp32": ("cpu", "fp32", machine.CPU),
    "cuda fp16": ("cuda", "fp16", machine.CUDA),
    "dml fp16": ("dml", "fp16", machine.DML),
    "gguf F32": ("gguf", "F32", machine.LLAMA_CPP),
}
# A window or a switch that is ignored changes every logit vector; this tells it from rounding.
VISIBLE = {"fp32": 1e-3, "fp16": 0.1, "F32": 1e-3}


@dataclass
class Model:
    """A member's checkpoint and what Hugging Face computes for one text that crosses its length."""

    name: str
    path: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.path)

    @property
    def boundary(self) -> int:
        found = boundaries(self.checkpoint.config)
        return found[0].position if found else SWITCH

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.random.default_rng(0).integers(8, 290, self.boundary + BEYOND)

    def reference(self, length: int) -> np.ndarray:
        """Logits [length, V] of a text of that many tokens, as the reference has them."""
        head = LanguageModelHead(self.checkpoint)
        return head.logits(final_hidden_states(self.checkpoint, self.tokens[None, :length])[0])

    @cached_property
    def short(self) -> np.ndarray:
        """Of the text that ends at the boundary."""
        return self.reference(self.boundary)

    @cached_property
    def long(self) -> np.ndarray:
        """Of the whole text."""
        return self.reference(len(self.tokens))

    @cached_property
    def generated(self) -> np.ndarray:
        """As generate() has them, which computes the cache anew at the switch."""
        return np.concatenate([self.short[self.boundary - BEFORE :], self.long[self.boundary :]])

    @cached_property
    def cached(self) -> np.ndarray:
        """As plain decoding on transformers' cache has them, which keeps what is in it."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        start = self.boundary - BEFORE
        rows = []
        with torch.inference_mode():
            ids = torch.from_numpy(self.tokens)[None]
            cache = model(ids[:, :start], use_cache=True).past_key_values
            for position in range(start, len(self.tokens)):
                step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                rows.append(step.logits[0, 0].numpy())
        return np.stack(rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a member once: one file spelled as published, or three as transformers 5 would."""
    folder = tmp_path_factory.mktemp("family")
    known: dict[tuple[str, str], Model] = {}

    def model(name: str, dtype: str) -> Model:
        if (name, dtype) not in known:
            old = dtype == "f32"
            path = folder / f"{name}-{dtype}"
            write_member(path, name, dtype=dtype, shards=1 if old else 3, old_spelling=old)
            known[name, dtype] = Model(name, path)
        return known[name, dtype]

    return model


def largest(error: np.ndarray) -> float:
    return float(np.abs(error).max())


def write(model: Model, provider: str, precision: str, folder: Path) -> Path:
    if provider == "gguf":
        convert(model.path, folder, precision)
        return folder
    return write_onnx_artifact(model.path, folder, provider, precision)  # type: ignore[arg-type]


def open_artifact(folder: Path, model: Model, runtime: str) -> Any:
    name = machine.LLAMA_CPP if runtime == machine.LLAMA_CPP else machine.CPU
    place = ArtifactFolder(folder, model.checkpoint.config.head_dim, model.checkpoint)
    return RUNTIMES[runtime](place, ProviderChoice(name, name), 1)


@pytest.mark.parametrize("name", FAMILY)
def test_every_way_to_store_a_member_is_the_same_model(name: str, tmp_path: Path) -> None:
    found = []
    for dtype, shards, old in (("bf16", 1, True), ("f32", 1, False), ("bf16", 4, False)):
        path = tmp_path / f"{dtype}-{shards}"
        write_member(path, name, dtype=dtype, shards=shards, old_spelling=old)
        checkpoint = Checkpoint(path)
        assert {t.dtype for t in checkpoint.tensors.values()} == {dtype}
        found.append(checkpoint)
    first, *others = (checkpoint.config for checkpoint in found)
    for config in others:
        for key in ("rope", "rope_theta", "rotary_dim", "sliding_window", "head_dim",
                    "num_key_value_heads", "tie_word_embeddings"):  # fmt: skip
            assert getattr(config, key) == getattr(first, key), key
        assert boundaries(config) == boundaries(first)
    bf16, _, sharded = found
    for tensor in bf16.tensors:
        assert np.array_equal(bf16.read(tensor), sharded.read(tensor))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("name", FAMILY)
def test_logits_at_every_length(name: str, format_name: str, models: Any, tmp_path: Path) -> None:
    provider, precision, target = FORMATS[format_name]
    if provider == "gguf" and machine.llama_cpp_binding() is None:
        pytest.skip("no package that carries llama.cpp is installed")
    model = models(name, "f32" if precision in ("fp32", "F32") else "bf16")
    artifact = write(model, provider, precision, tmp_path / "artifact")
    limits = known_limits(artifact, model.checkpoint.config, target)
    runtime = "llama.cpp" if provider == "gguf" else "onnxruntime-genai"
    opened = open_artifact(artifact, model, runtime)
    check_prefill(opened, model, precision, windowed(limits))
    check_decoding(opened, model, precision, limits)


def windowed(limits: tuple[KnownLimit, ...]) -> int | None:
    """From which position the runtime has no sliding window."""
    return next((x.from_position for x in limits if "sliding window" in x.statement), None)


def check_prefill(opened: Any, model: Model, precision: str, ignored: int | None) -> None:
    """Below, at and above the boundary, in texts of these lengths."""
    bound, b = TOLERANCES[precision], model.boundary
    short = next(opened.logits(model.tokens[None, :b])) - model.short
    assert largest(short) <= bound
    error = next(opened.logits(model.tokens[None])) - model.long
    assert largest(error[:ignored]) <= bound
    if ignored is not None:
        assert ignored == b == WINDOW
        assert np.abs(error[ignored:]).max(axis=1).min() > VISIBLE[precision]


def check_decoding(
    opened: Any, model: Model, precision: str, limits: tuple[KnownLimit, ...]
) -> None:
    bound, b = TOLERANCES[precision], model.boundary
    decoded = opened.decode_logits(model.tokens, b - BEFORE)
    longrope = FAMILY[model.name].longrope
    below, above = decoded[:BEFORE], decoded[BEFORE:]
    as_generated = model.generated[:BEFORE], model.generated[BEFORE:]
    if not longrope:
        assert largest(below - as_generated[0]) <= bound
        if windowed(limits) is None:
            assert largest(above - as_generated[1]) <= bound
        return
    (limit,) = (x for x in limits if "LongRoPE" in x.statement)
    if limit.runtime == machine.LLAMA_CPP:
        # the context is longer than the switch: long factors throughout, also below it
        assert limit.from_position == 0
        assert largest(below - as_generated[0]) > VISIBLE[precision]
        assert largest(below - model.long[b - BEFORE : b]) <= bound
        assert largest(above - as_generated[1]) <= bound
        return
    # the cache keeps the short factors, exactly as transformers' own does
    assert limit.from_position == b == SWITCH
    assert largest(below - as_generated[0]) <= bound
    assert largest(above - as_generated[1]) > VISIBLE[precision]
    assert largest(decoded - model.cached) <= bound


def test_genai_computes_anew_at_a_switch_of_4096(tmp_path: Path) -> None:
    """generate_next_token empties the cache there as generate() does, and says nothing of it."""
    member = FAMILY["phi-4-mini"]
    rope = {**member.rope, "original_max_position_embeddings": 4096}
    path = write_phi3_checkpoint(
        tmp_path / "checkpoint",
        dtype="f32",
        num_hidden_layers=1,
        max_position_embeddings=8192,
        original_max_position_embeddings=4096,
        rope_parameters=rope,
        **{**member.keys, "sliding_window": None},
    )
    artifact = write_onnx_artifact(path, tmp_path / "artifact")
    model = Model("phi-4-mini", path)
    (limit,) = known_limits(artifact, model.checkpoint.config, machine.CPU)
    assert limit.from_position == 4096
    assert "generate_next_token of a single sequence computes them anew" in limit.statement
    prompt = np.random.default_rng(0).integers(8, 290, 4093)
    genai = open_artifact(artifact, model, "onnxruntime-genai")
    generator = genai._generator(4101)
    genai._append(generator, prompt)
    text, computed = list(prompt), []
    while not generator.is_done() and len(text) < 4100:
        generator.generate_next_token()
        computed.append(generator.get_output("logits")[0].copy())
        text.append(int(generator.get_next_tokens()[0]))
    assert [len(logits) for logits in computed] == [4093, 1, 1, 1, 4097, 1, 1]
    model.__dict__["tokens"] = np.array(text)
    expected = model.reference(4099)
    for index, logits in enumerate(computed[4:]):
        assert largest(logits[-1] - expected[4096 + index]) <= 1e-4


def test_limits_of_every_runtime() -> None:
    def found(name: str, target: str, has_window: bool) -> list[tuple[str, int]]:
        from phiconv.runtimes.length_limits import gguf_limits, onnx_limits

        config = configs[name]
        limits = (
            gguf_limits(config)
            if target == machine.LLAMA_CPP
            else onnx_limits(config, target, has_window=has_window)
        )
        return [(limit.runtime, limit.from_position) for limit in limits]

    from phiconv.checkpoint.config import ModelConfig
    from tests.phi3_checkpoints import phi3_config

    configs = {
        name: ModelConfig.from_dict(
            phi3_config(
                **{
                    "max_position_embeddings": CONTEXT,
                    "original_max_position_embeddings": CONTEXT,
                    **member.config_keys(old_spelling=True),
                }
            ),
            "config.json",
        )
        for name, member in FAMILY.items()
    }
    assert found("phi-4", machine.LLAMA_CPP, False) == []
    assert found("phi-4", machine.DML, False) == []
    assert found("phi-3-mini-4k", machine.LLAMA_CPP, False) == [("llama.cpp", WINDOW)]
    assert found("phi-3-mini-4k", machine.CUDA, True) == []
    # a graph of another exporter, which left the window out
    cpu = f"onnxruntime-genai ({machine.CPU})"
    assert found("phi-3-mini-4k", machine.CPU, False) == [(cpu, WINDOW)]
    dml = f"onnxruntime-genai ({machine.DML})"
    assert found("phi-3-mini-4k", machine.DML, False) == [(dml, WINDOW)]
    assert found("phi-3-mini-128k", machine.LLAMA_CPP, False) == [("llama.cpp", 0)]
    assert found("phi-3-mini-128k", machine.DML, False) == [(dml, SWITCH)]
