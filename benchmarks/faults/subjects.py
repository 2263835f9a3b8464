"""The clean artifacts that faults are planted in: every layout and format, of both checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[2]
MODELS = ("tiny-phi3", "tiny-phi4-mini")
LATER = "-later"
LATER_KINDS = ("fp16-cuda", "int4-cpu")
_STEP = 0.1  # how far, relative to its spread, a weight of the later checkpoint is from its own

Stages = list[dict[str, Any]]


class Kind(NamedTuple):
    """A kind of artifact: the stages that make it, and the provider it is laid out for."""

    provider: str
    stages: Stages

    @property
    def is_gguf(self) -> bool:
        """Whether it is a file for llama.cpp."""
        return bool(self.stages[-1]["uses"] == "convert-gguf")


def _onnx(provider: str, precision: str | None = None, **quantize: Any) -> Kind:
    export: dict[str, Any] = {"provider": provider}
    if precision is not None:
        export["precision"] = precision
    stages: Stages = [{"id": "onnx", "uses": "export-onnx", "with": export}]
    if quantize:
        settings = {"bits": 4, "lm_head": {"bits": 8}, **quantize}
        stages.append({"id": "made", "uses": "quantize", "with": settings})
    return Kind(provider, stages)


def _awq(provider: str) -> Kind:
    """As recipes/int4-dml.yaml, calibrated on fewer texts."""
    grid = {"bits": 4, "symmetric": False, "search": "mse"}
    calibration = {"windows": 8, "window_length": 128}
    overlay = {**grid, "group_size": 128, "rounding": "gptq", "calibration": calibration}
    plain = _onnx(provider, block_size=128, symmetric=False, search="mse")
    stages = [{"id": "awq", "uses": "awq", "with": overlay}, *plain.stages]
    stages[-1] = {**stages[-1], "from": ["onnx", "awq"]}
    return Kind(provider, stages)


def _gguf(file_type: str) -> Kind:
    return Kind("cpu", [{"id": "made", "uses": "convert-gguf", "with": {"file_type": file_type}}])


KINDS: Mapping[str, Kind] = {
    "fp32-cpu": _onnx("cpu", "fp32"),
    "fp16-cuda": _onnx("cuda", "fp16"),
    "fp16-dml": _onnx("dml", "fp16"),
    "int4-cpu": _onnx("cpu", block_size=32, symmetric=True, search="mse", accuracy_level=4),
    "int4-cuda": _onnx("cuda", block_size=32, symmetric=False, search="mse"),
    "int4-dml-awq": _awq("dml"),
    "q8_0": _gguf("Q8_0"),
    "q4_k_m": _gguf("Q4_K_M"),
}


def build_all(folder: Path, kinds: Mapping[str, Kind] = KINDS) -> None:
    """Builds every kind of both checkpoints, and some of their later ones, once."""
    sources = {model: ROOT / "examples" / model for model in MODELS}
    for model in MODELS:
        later = folder / f"{model}{LATER}"
        if not later.is_dir():
            _train_further(sources[model], later)
        sources[f"{model}{LATER}"] = later
    for model, source in sources.items():
        for name, kind in kinds.items():
            if model.endswith(LATER) and name not in LATER_KINDS:
                continue
            if not artifact(folder, model, name).exists():
                _build(folder / "built" / model / name, source, kind)


def artifact(folder: Path, model: str, kind: str) -> Path:
    """Where an artifact lies: an ONNX model's folder, or a GGUF file."""
    out = folder / "built" / model / kind / "artifact"
    files = sorted(out.glob("*.gguf"))
    return files[0] if files else out


def _build(out: Path, source: Path, kind: Kind) -> None:
    check: dict[str, Any] = {"provider": kind.provider, "when_missing": "fallback-cpu"}
    if kind.is_gguf:
        check = {"runtime": "llama.cpp"}
    stages = [*kind.stages, {"id": "check", "uses": "validate", "with": check}]
    recipe = {"schema": 1, "name": out.name, "model": {"source": str(source)}, "stages": stages}
    out.mkdir(parents=True)
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "phiconv", "build", str(file), "--out", str(out), "--quiet"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment)


def _train_further(source: Path, folder: Path) -> None:
    """A checkpoint whose weights are a little further on, in random directions."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    noise = np.random.default_rng(0)
    for name, tensor in sorted(tensors.items()):
        values = tensor.astype(np.float32)
        step = noise.standard_normal(values.shape, np.float32) * values.std() * _STEP
        tensors[name] = (values + step).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
