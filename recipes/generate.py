"""Writes recipes/<model>/<target>.yaml: what the official repositories publish, from one table.

Usage: python recipes/generate.py [--check]; with --check nothing is written, and the exit status is
1 when a recipe is not as it would be written.

The layouts of Phi-3-mini-4k, Phi-3.5-mini and Phi-4-mini are those of microsoft/*-onnx and
microsoft/*-gguf. Where only the layout of a sister repository is known, the model is given that.
A revision stands only where the commit is known; `phiconv lock` pins the others.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

FOLDER = Path(__file__).parent
INT4_GATES = (0.05, 0.90, 1.05)
FLOAT_GATES = (0.001, 0.99, 1.005)


@dataclass(frozen=True)
class Model:
    """A model of the family.

    Attributes:
        repository: On the Hugging Face Hub.
        targets: Names in `TARGETS`.
        revision: Its commit, where it is known.
        tied: Whether the head is the embedding: both are then rounded alike and stored once.
        boundary: Whether a sliding window or a switch of LongRoPE's factors is in reach.
    """

    repository: str
    targets: tuple[str, ...]
    revision: str | None = None
    tied: bool = False
    boundary: bool = True

    @property
    def name(self) -> str:
        """Without the organisation: what files and builds are named after."""
        return self.repository.partition("/")[2]


@dataclass(frozen=True)
class Target:
    """Something that is published of a model.

    Attributes:
        title: First line of the recipe.
        path: Folder in the release.
        provider: Of the graph and of its validation; None for GGUF.
        method: `rtn` rounds to nearest; `awq` searches scales, then rounds by GPTQ; None leaves
            floats.
        block_size: Weights that share a scale.
        accuracy_level: MatMulNBits attribute; 0 leaves it out.
        file_type, suffix: GGUF type and the end of the file's name.
    """

    title: str
    path: str
    provider: str | None
    method: str | None = None
    block_size: int = 0
    accuracy_level: int = 0
    file_type: str = ""
    suffix: str = ""


def _onnx(path: str, provider: str, title: str, method: str, block: int, level: int = 0) -> Target:
    return Target(title, path, provider, method, block, level)


TARGETS: Mapping[str, Target] = {
    "directml-int4-awq-block-128": _onnx(
        "directml/directml-int4-awq-block-128", "dml", "int4 for DirectML, AWQ", "awq", 128
    ),
    "cuda-fp16": Target("fp16 for NVIDIA GPUs", "cuda/cuda-fp16", "cuda"),
    "cuda-int4-rtn-block-32": _onnx(
        "cuda/cuda-int4-rtn-block-32", "cuda", "int4 for NVIDIA GPUs", "rtn", 32
    ),
    "gpu-int4-awq-block-128": _onnx(
        "gpu/gpu-int4-awq-block-128", "cuda", "int4 for NVIDIA GPUs, AWQ", "awq", 128
    ),
    "gpu-int4-rtn-block-32": _onnx(
        "gpu/gpu-int4-rtn-block-32", "cuda", "int4 for NVIDIA GPUs", "rtn", 32
    ),
    "cpu-int4-rtn-block-32": _onnx(
        "cpu_and_mobile/cpu-int4-rtn-block-32",
        "cpu",
        "int4 for CPU and mobile, fp32 activations",
        "rtn",
        32,
        1,
    ),
    "cpu-int4-rtn-block-32-acc-level-4": _onnx(
        "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4",
        "cpu",
        "int4 for CPU and mobile, int8 activations",
        "rtn",
        32,
        4,
    ),
    "cpu-int4-awq-block-128-acc-level-4": _onnx(
        "cpu_and_mobile/cpu-int4-awq-block-128-acc-level-4",
        "cpu",
        "int4 for CPU and mobile, AWQ, int8 activations",
        "awq",
        128,
        4,
    ),
    "gguf-q4": Target("GGUF for llama.cpp, Q4_K_M", "gguf", None, file_type="Q4_K_M", suffix="q4"),
    "gguf-fp16": Target("GGUF for llama.cpp, F16", "gguf", None, file_type="F16", suffix="fp16"),
    "gguf-bf16": Target("GGUF for llama.cpp, BF16", "gguf", None, file_type="BF16", suffix="bf16"),
}

PHI_3 = (
    "directml-int4-awq-block-128",
    "cuda-fp16",
    "cuda-int4-rtn-block-32",
    "cpu-int4-rtn-block-32",
    "cpu-int4-rtn-block-32-acc-level-4",
)
PHI_3_5 = ("gpu-int4-awq-block-128", "cpu-int4-awq-block-128-acc-level-4")
PHI_4 = ("gpu-int4-rtn-block-32", "cpu-int4-rtn-block-32-acc-level-4")
GGUF = ("gguf-q4", "gguf-fp16")

MODELS = (
    Model(
        "microsoft/Phi-3-mini-4k-instruct",
        PHI_3 + GGUF,
        revision="f39ac1d28e925b323eae81227eaba4464caced4e",
    ),
    Model("microsoft/Phi-3-mini-128k-instruct", PHI_3 + GGUF),
    Model("microsoft/Phi-3-medium-4k-instruct", PHI_3 + GGUF),
    Model("microsoft/Phi-3-medium-128k-instruct", PHI_3 + GGUF),
    Model("microsoft/Phi-3.5-mini-instruct", PHI_3_5 + GGUF),
    Model("microsoft/phi-4", (*PHI_4, "gguf-q4", "gguf-bf16"), boundary=False),
    Model("microsoft/Phi-4-mini-instruct", PHI_4 + GGUF, tied=True),
)


def recipes() -> dict[str, str]:
    """Every recipe by its path relative to this folder."""
    return {
        f"{model.name.lower()}/{target}.yaml": recipe(model, target)
        for model in MODELS
        for target in model.targets
    }


def recipe(model: Model, target_name: str) -> str:
    """The text of one recipe."""
    target = TARGETS[target_name]
    lines = [
        "# yaml-language-server: $schema=../../docs/recipe.schema.json",
        "# Generated by recipes/generate.py; change the table there.",
        f"# {model.name}: {target.title}.",
        "schema: 1",
        f"name: {model.name.lower()}-{target_name}",
        "model:",
        f"  source: {model.repository}",
        *([f"  revision: {model.revision}"] if model.revision else []),
        "stages:",
        *(_gguf_stages(model, target) if target.provider is None else _onnx_stages(model, target)),
        *_check(model, target),
        "release:",
        f"  path: {target.path}",
    ]
    return "\n".join(lines) + "\n"


def _gguf_stages(model: Model, target: Target) -> list[str]:
    return [
        "  - id: gguf",
        "    uses: convert-gguf",
        "    with:",
        f"      file_type: {target.file_type}",
        f"      file_name: {model.name}-{target.suffix}.gguf",
        f"      base_model: {model.repository}",
    ]


def _onnx_stages(model: Model, target: Target) -> list[str]:
    precision = ", precision: fp16" if target.method is None else ""
    export = (
        f"  - {{id: onnx, uses: export-onnx, with: {{provider: {target.provider}{precision}}}}}"
    )
    if target.method is None:
        return [export]
    awq = target.method == "awq"
    grid = [
        "bits: 4",
        f"block_size: {target.block_size}",
        f"symmetric: {'false' if awq else 'true'}",
    ]
    search = [
        "  - id: awq",
        "    uses: awq",
        f"    with: {{bits: 4, group_size: {target.block_size}, symmetric: false, search: mse, "
        "rounding: gptq}",
    ]
    rounding = [
        *grid,
        "search: mse",
        *([f"accuracy_level: {target.accuracy_level}"] if target.accuracy_level else []),
        "lm_head: {bits: 8}",
        # DirectML has no kernel for a quantized embedding
        *(["embedding: {bits: 8}"] if model.tied and target.provider != "dml" else []),
    ]
    return [
        *(search if awq else []),
        export,
        "  - id: int4",
        "    uses: quantize",
        *(["    from: [onnx, awq]"] if awq else []),
        "    with:",
        *(f"      {setting}" for setting in rounding),
    ]


def _check(model: Model, target: Target) -> list[str]:
    floats = target.method is None and target.file_type in ("", "F16", "BF16")
    kl, top1, ratio = FLOAT_GATES if floats else INT4_GATES
    gguf = target.provider is None
    settings = [
        *([] if gguf else [f"provider: {target.provider}"]),
        # a runtime with a KV cache, so that boundaries are crossed by decoding, too
        *(["runtime: llama.cpp"] if gguf else ["runtime: onnxruntime-genai"]),
        *([] if target.provider == "cpu" else ["when_missing: fallback-cpu"]),
        *(["length_probes: true"] if model.boundary else []),
    ]
    return [
        "  - id: check",
        "    uses: validate",
        "    with:",
        *(f"      {setting}" for setting in settings),
        "      gates:",
        f"        kl_divergence.mean: {{max: {kl}}}",
        f"        top1_agreement: {{min: {top1:.2f}}}",
        f"        perplexity.ratio: {{max: {ratio}}}",
    ]


@click.command
@click.option("--check", is_flag=True, help="Write nothing; fail when a recipe is out of date.")
def main(check: bool) -> None:
    """Write the recipes of every model and target."""
    stale = False
    for name, text in recipes().items():
        file = FOLDER / name
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        stale = True
        click.echo(f"{name}: {'out of date' if check else 'written'}")
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
