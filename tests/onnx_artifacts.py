"""Complete ONNX artifacts of small checkpoints, as a build ships them, for tests that run them."""

from __future__ import annotations

import shutil
from pathlib import Path

from phiconv.onnx.target import Precision, Provider
from tests.onnx.models import lay_out, write


def write_onnx_artifact(
    checkpoint: Path, folder: Path, provider: Provider = "cpu", precision: Precision = "fp32"
) -> Path:
    """Exports `checkpoint` to `folder`: model.onnx, its data, genai_config.json, the tokenizer."""
    scratch = folder.with_name(folder.name + "-scratch")
    scratch.mkdir(parents=True)
    graph = lay_out(checkpoint, scratch, provider, precision)
    write(graph, checkpoint, folder)
    assert graph.genai is not None
    shutil.copytree(graph.genai, folder, dirs_exist_ok=True)
    shutil.rmtree(scratch)
    return folder
