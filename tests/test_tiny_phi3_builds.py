"""The main job on the bundled checkpoint: recipes in, validated artifacts out.

Everything is real: the trained checkpoint, the GenAI builder, ONNX Runtime, GenAI, Hugging Face.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.onnx.builder_oracle import build_with_builder
from tests.onnx.models import (
    assert_same_initializers,
    hugging_face_logits,
    initializers,
    onnx_logits,
)

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-phi3"
PROMPT = "def read(self, size=-1):\n"


def phiconv(*arguments: str, home: Path, code: int = 0) -> str:
    """Run the command line as a user does and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "phiconv", *arguments],
        env={**os.environ, "PHICONV_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One workspace for the module: later builds reuse what earlier ones made."""
    return tmp_path_factory.mktemp("home")


def build(recipe: Path | str, out: Path, home: Path, *options: str) -> dict[str, Any]:
    path = recipe if isinstance(recipe, Path) else ROOT / "recipes" / recipe
    phiconv("build", str(path), "--model", str(TINY), "--out", str(out), *options, home=home)
    report: dict[str, Any] = json.loads((out / "report" / "report.json").read_text())
    return report


def fp32_recipe(folder: Path) -> Path:
    path = folder / "fp32.yaml"
    path.write_text(
        "schema: 1\nname: fp32\nmodel: {source: examples/tiny-phi3}\nstages:\n"
        "  - {id: onnx, uses: export-onnx, with: {provider: cpu}}\n"
        "  - {id: check, uses: validate, with: {gates: "
        "{top1_agreement: {min: 1.0}, logit_error.max: {max: 1.0e-4}}}}\n"
    )
    return path


def token_ids() -> np.ndarray:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    return np.asarray(tokenizer.encode(PROMPT, add_special_tokens=False).ids, np.int64)


def test_fp32_export_equals_hugging_face(tmp_path: Path, home: Path) -> None:
    build(fp32_recipe(tmp_path), tmp_path / "out", home)
    ids = np.resize(token_ids(), 256)
    difference = onnx_logits(tmp_path / "out" / "artifact", ids) - hugging_face_logits(TINY, ids)
    assert np.abs(difference).max() <= 1e-4


def test_genai_decodes_as_hugging_face_generates(tmp_path: Path, home: Path) -> None:
    import onnxruntime_genai as og
    import torch
    from transformers import AutoModelForCausalLM

    build(fp32_recipe(tmp_path), tmp_path / "out", home)
    model = og.Model(str(tmp_path / "out" / "artifact"))
    tokenizer = og.Tokenizer(model)
    prompt = tokenizer.encode(PROMPT)
    assert list(prompt) == token_ids().tolist()
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(
        do_sample=False, max_length=len(prompt) + 64, min_length=len(prompt) + 64
    )
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    decoded = list(generator.get_sequence(0))[len(prompt) :]

    reference = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    generated = reference.generate(
        torch.tensor([list(prompt)]), do_sample=False, min_new_tokens=64, max_new_tokens=64
    )
    assert len(decoded) == 64
    assert decoded == generated[0, len(prompt) :].tolist()


def test_fp16_cuda_graph_on_the_cpu(tmp_path: Path, home: Path) -> None:
    report = build("fp16-cuda.yaml", tmp_path / "out", home)
    text = json.dumps(report)
    assert "passed on CPUExecutionProvider, target CUDAExecutionProvider not present" in text
    (validation,) = report["result"]["validations"]
    assert validation["measurement"]["metrics"]["kl_divergence.mean"] <= 1e-5


def test_int4_bytes_equal_the_builders(tmp_path: Path, home: Path) -> None:
    build(
        "int4-cpu.yaml",
        tmp_path / "out",
        home,
        "--set",
        "int4.search=none",
        "--set",
        "int4.lm_head.bits=4",
        "--skip-validation",
    )
    theirs = build_with_builder(
        TINY, tmp_path / "theirs", "int4", "cpu", "block_size=32", "accuracy_level=4"
    )
    assert_same_initializers(initializers(tmp_path / "out" / "artifact"), initializers(theirs))


def fewer_windows(recipe: str) -> tuple[str, ...]:
    """Calibrates on an eighth of the texts, the same for every recipe that shares the overlay."""
    text = (ROOT / "recipes" / recipe).read_text(encoding="utf-8")
    return ("--set", "awq.calibration.windows=16") if "uses: awq" in text else ()


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_shipped_recipe_passes_its_gates(recipe: str, tmp_path: Path, home: Path) -> None:
    report = build(recipe, tmp_path / "out", home, *fewer_windows(recipe))
    assert report["status"] == "passed"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "artifact",
        "report",
        "manifest.json",
    }


def test_int4_for_directml(tmp_path: Path, home: Path) -> None:
    """AWQ, built and measured where there is no DirectML, and checked against its kernels."""
    import onnx_ir as ir

    report = build("int4-dml.yaml", tmp_path / "out", home, *fewer_windows("int4-dml.yaml"))
    (validation,) = report["result"]["validations"]
    verdict = "passed on CPUExecutionProvider, target DmlExecutionProvider not present"
    assert verdict in (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
    checks = {check["name"]: check for check in validation["measurement"]["checks"]}
    assert checks["kernels"]["state"] == "clean"
    assert "DmlExecutionProvider" in checks["kernels"]["summary"]
    assert checks["genai_config"]["state"] == "clean"

    artifact = tmp_path / "out" / "artifact"
    config = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    (options,) = config["model"]["decoder"]["session_options"]["provider_options"]
    assert options == {"dml": {"enable_graph_capture": "1"}}
    assert "position_ids" in config["model"]["decoder"]["inputs"]
    graph = ir.load(artifact / "model.onnx").graph
    formats = {
        (int(node.attributes["bits"].as_int()), int(node.attributes["block_size"].as_int()))
        for node in graph
        if node.op_type == "MatMulNBits" and len(node.inputs) > 3
    }
    assert formats == {(4, 128), (8, 128)}
    assert sum(node.op_type == "RotaryEmbedding" for node in graph) == 2 * 4

    facts = {stage["id"]: stage["facts"] for stage in report["result"]["stages"]}
    # q, k, v, o, gate, up and down of four layers: rounded by GPTQ, not again
    assert facts["int4"]["copied_weights"] == 4 * 7


def test_recipes_on_one_grid_share_their_calibration(tmp_path: Path, home: Path) -> None:
    build("int4-dml.yaml", tmp_path / "dml", home, *fewer_windows("int4-dml.yaml"))
    report = build("int4-cuda-awq.yaml", tmp_path / "cuda", home, *fewer_windows("int4-dml.yaml"))
    cached = {stage["id"]: stage["cached"] for stage in report["result"]["stages"]}
    assert cached["awq"]


def test_builds_are_byte_identical_and_cached(tmp_path: Path) -> None:
    digests = []
    for index in range(2):
        out, threads = tmp_path / f"folder-{index}" / "out", str(index + 1)
        build("int4-cpu.yaml", out, tmp_path / f"home-{index}", "--threads", threads)
        manifest = json.loads((out / "manifest.json").read_text())
        digests.append(manifest["artifact"])
    assert digests[0] == digests[1]
    again = phiconv(
        "build", str(ROOT / "recipes" / "int4-cpu.yaml"), "--model", str(TINY),
        "--out", str(tmp_path / "again"), home=tmp_path / "home-0",
    )  # fmt: skip
    assert again.count("cached") >= 5, again


def test_a_failed_gate_exits_with_4_and_runs_no_model_again(tmp_path: Path, home: Path) -> None:
    build("int4-cpu.yaml", tmp_path / "out", home)
    text = phiconv(
        "build", str(ROOT / "recipes" / "int4-cpu.yaml"), "--model", str(TINY), "--out",
        str(tmp_path / "out"), "--set", "check.gates.kl_divergence.mean.max=1e-9",
        home=home, code=4,
    )  # fmt: skip
    assert "kl_divergence.mean" in text
    assert "CPUExecutionProvider" in text
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["verdict"] == "failed"
