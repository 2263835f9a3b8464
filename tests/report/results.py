"""Results with everything in them: every status, missing values, text that must be escaped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from phiconv.gates import Limits, judge
from phiconv.report.distribution import kl_by_position, kl_histogram
from phiconv.report.positions import POSITIONS
from phiconv.report.results import (
    Check,
    CheckpointRecord,
    FileRecord,
    LayerErrorRecord,
    Measurement,
    Provenance,
    RunResult,
    StageRecord,
    TensorKindRecord,
    TokenSetRecord,
    Validation,
)

CPU, DML = "CPUExecutionProvider", "DmlExecutionProvider"
TOKENS = TokenSetRecord(
    "default", 8, 512, "sha256:" + "a" * 64, "sha256:" + "b" * 64, ("queue.py", "topic:global")
)
GATES: Limits = {"kl_divergence.mean": {"max": 0.05}, "top1_agreement": {"min": 0.9}}


def kl_values(scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(0).lognormal(-5, 2, (8, 512))


def measured(
    target: str = CPU, *, top1: float = 0.97, ratio: float = 1.002, scale: float = 1.0
) -> Measurement:
    kl = kl_values(scale)
    return Measurement(
        status="measured",
        tokens=TOKENS,
        provenance=Provenance(
            runtime="onnxruntime",
            runtime_version="1.31.1",
            target_provider=target,
            provider=CPU,
            device="AMD EPYC",
            threads=2,
            options={"graph_optimization_level": "all"},
            placement={CPU: {"GroupQueryAttention": 4, "MatMulNBits": 21}},
        ),
        metrics={
            "kl_divergence.mean": float(kl.mean()),
            "top1_agreement": top1,
            "perplexity.reference": 21.5,
            "perplexity.ratio": ratio,
        },
        kl_histogram=kl_histogram(kl),
        kl_by_position=kl_by_position(kl),
    )


def positions(seed: int) -> dict[str, np.ndarray]:
    """The arrays of a measurement; measurements share the difficulty of the tokens."""
    own = np.random.default_rng(seed)
    shape = (TOKENS.windows, TOKENS.window_length)
    kl = kl_values() * own.lognormal(0, 0.05, shape)
    reference = -np.random.default_rng(1).exponential(2.5, shape)
    candidate = reference + 0.01 * own.normal(size=shape)
    reference[:, -1] = candidate[:, -1] = np.nan
    return {
        "kl_divergence": kl.astype(np.float32),
        "top1_equal": own.random(shape) < 0.97,
        "reference_log_probability": reference,
        "candidate_log_probability": candidate,
    }


def with_positions(folder: Path, seed: int) -> Measurement:
    """A measurement whose folder holds the values of every position."""
    arrays = positions(seed)
    folder.mkdir(parents=True)
    np.savez(folder / POSITIONS, **arrays)
    reference, candidate = (
        arrays[f"{side}_log_probability"] for side in ("reference", "candidate")
    )
    metrics = {
        "kl_divergence.mean": float(arrays["kl_divergence"].mean(dtype=np.float64)),
        "kl_divergence.standard_error": 3e-4,
        "top1_agreement": float(arrays["top1_equal"].mean()),
        "top1_agreement.standard_error": 4e-3,
        "perplexity.reference": float(np.exp(-np.nanmean(reference))),
        "perplexity.candidate": float(np.exp(-np.nanmean(candidate))),
        "perplexity.ratio": float(np.exp(np.nanmean(reference - candidate))),
        "perplexity.ratio_standard_error": 1e-3,
    }
    return replace(measured(), metrics=metrics)


LAYERS = (
    LayerErrorRecord(-1, 0.0, 0.0),
    LayerErrorRecord(0, 0.012, 0.012),
    LayerErrorRecord(1, 0.034, 0.031),
    LayerErrorRecord(2, 0.021, 0.008),
)


def with_layers(measurement: Measurement) -> Measurement:
    """The measurement with the error of three layers, layer 1 the worst."""
    return replace(measurement, layers=LAYERS)


CHECKS = (
    Check("placement", "clean", f"25 nodes on {CPU}", (), ("placement.fallback",)),
    Check(
        "kernels",
        "errors",
        f"static {DML} kernel check found 1 node that it cannot run or leaves to the CPU",
        ("unsupported: GroupQueryAttention <layer 0>", "note: Shape"),
        ("kernels.unserved",),
    ),
    Check("tokenizer", "warnings", "381 golden texts compared", ("warning: a|b",), ()),
    Check("genai_config", "not_checked", "onnxruntime-genai cannot be imported"),
)
COUNTS = {"placement.fallback": 0.0, "kernels.unserved": 1.0}


def with_checks(measurement: Measurement) -> Measurement:
    """The measurement with one clean, one failed, one noted and one impossible check."""
    return replace(measurement, metrics={**measurement.metrics, **COUNTS}, checks=CHECKS)


def not_run() -> Measurement:
    return Measurement("not_run", TOKENS, Provenance("onnxruntime", "", DML, None))


def validation(stage: str, measurement: Measurement, gates: Limits = GATES) -> Validation:
    return Validation(stage, "int4.onnx", measurement, judge(measurement, gates))


def result(*validations: Validation) -> RunResult:
    return RunResult(
        recipe="tiny-int4",
        recipe_digest="sha256:" + "c" * 64,
        created="2026-11-20T09:44:54+00:00",
        checkpoint=CheckpointRecord(
            source="tiny <phi3> & co | _x_",
            digest="sha256:" + "d" * 64,
            revision="f39ac1d",
            architecture="Phi3ForCausalLM",
            files={"model.safetensors": "blake3:" + "e" * 64},
        ),
        stages=(
            StageRecord("onnx", "export-onnx", "onnx-graph", "1" * 64, cached=True),
            StageRecord(
                id="int4.onnx",
                uses="write-onnx",
                kind="onnx",
                key="2" * 64,
                cached=False,
                wall_s=1.25,
                cpu_s=2.5,
                peak_rss_bytes=600_000_000,
                size_bytes=8_600_000,
                facts={"nan": math.nan, "tensors": 23},
            ),
            StageRecord("check", "validate", "measurement", "3" * 64, False, 70.0, 130.0, 744_000),
        ),
        artifact_key="2" * 64,
        files=(
            FileRecord("model.onnx", 32_778, "sha256:" + "f" * 64),
            FileRecord("b.json", 12, "sha256:00"),
        ),
        tensor_kinds=(
            TensorKindRecord("mlp", "int4 block 32", 3_145_728, 1_966_080),
            TensorKindRecord("norm", "f32", 2_304, 9_216),
        ),
        validations=validations,
        tools={"phiconv": "0.1.0", "onnxruntime": "1.31.1"},
        machine={"system": "Linux", "processor": "AMD EPYC"},
        release_path="cpu_and_mobile/cpu-int4",
    )


def every_status() -> RunResult:
    return result(
        validation("good", measured(DML)),
        validation(
            "bad", measured(top1=0.5, ratio=math.inf), {**GATES, "perplexity.ratio": {"max": 1.1}}
        ),
        validation("skipped", not_run()),
        validation("free", measured(), {}),
    )
