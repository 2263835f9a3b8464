"""The stage `export-onnx`: what it refuses, and what it does without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phiconv.checkpoint.config import ModelConfig
from phiconv.stages.export_onnx import ExportOnnx, ExportOnnxParams
from tests.phi3_checkpoints import phi3_config

TINY = Path(__file__).parents[2] / "examples" / "tiny-phi3"
# Each takes seconds and hundreds of megabytes to import, or is not there in every flavour.
DONE_WITHOUT = ("torch", "transformers", "onnxruntime", "onnxruntime_genai", "huggingface_hub")
RECIPE = """\
schema: 1
name: graph
model: {{source: {model}}}
stages:
  - {{id: onnx, uses: export-onnx, with: {{provider: {provider}}}}}
  - {{id: int4, uses: quantize, with: {{bits: 4, block_size: 32, lm_head: {{bits: 8}}}}}}
"""


@pytest.mark.parametrize("provider", ["cpu", "cuda", "dml"])
def test_a_model_is_built_where_there_is_no_torch_and_no_runtime(
    provider: str, tmp_path: Path
) -> None:
    """Hence in every flavour, whatever version of GenAI it has."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=TINY.as_posix(), provider=provider))
    program = f"""
import sys
sys.modules.update(dict.fromkeys({DONE_WITHOUT}))  # importing any of them fails
from phiconv.cli import main
main(["build", {str(recipe)!r}, "--out", {str(tmp_path / "out")!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PHICONV_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out" / "artifact").iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_needs_nothing_of_the_machine_and_no_version_of_genai_counts() -> None:
    stage = ExportOnnx()
    assert stage.requires(ExportOnnxParams()) == ()
    assert stage.tools() == ("numpy", "onnx-ir", "tokenizers")


@pytest.mark.parametrize(
    ("provider", "precision", "remedy"),
    [
        ("cpu", "fp16", "use precision fp32 and a cast stage after it"),
        ("cuda", "fp32", "use precision fp16"),
        ("dml", "fp32", "use precision fp16"),
    ],
)
def test_precisions_without_a_kernel_are_refused(
    provider: str, precision: str, remedy: str
) -> None:
    params = ExportOnnxParams.model_validate({"provider": provider, "precision": precision})
    config = ModelConfig.from_dict(phi3_config(), "config.json")
    (error,) = ExportOnnx().check(params, config)
    assert error.remedy == remedy
    assert ExportOnnx().check(ExportOnnxParams(), config) == []


def test_another_activation_is_refused() -> None:
    config = ModelConfig.from_dict(phi3_config(hidden_act="gelu_new"), "config.json")
    (error,) = ExportOnnx().check(ExportOnnxParams(), config)
    assert "'gelu_new' is not exported" in error.message
    assert error.where == "config.json: hidden_act"
