"""Measures what each way of quantizing costs on a trained checkpoint.

    python -m benchmarks.accuracy [--table rounding|methods|heads|gguf] [--model examples/tiny-phi3]

Each row is one build, validated on the CPU against Hugging Face fp32 on the packaged held-out
windows. KL in nats; size is that of the weights' file.

- rounding: bits, blocks and scale searches of plain rounding;
- methods: plain rounding (RTN), AWQ, clip limits and GPTQ, on the same grids with the same head;
- heads: the language-model head at 4, 8 and 16 bits;
- gguf: files for llama.cpp with an importance matrix, with AWQ's scales, and with both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

ROOT = Path(__file__).parent.parent
WINDOWS = 32
# Windows that AWQ and the importance matrix are measured on: as many tokens as Gram matrices take.
CALIBRATION = {"windows": 32}

Stages = list[dict[str, Any]]


class Row(NamedTuple):
    """One build: its name, and the stages of its recipe."""

    name: str
    stages: Stages


def rounding() -> Iterator[Row]:
    """Bits, blocks and scale searches of plain rounding."""
    for bits, block, head in ((4, 32, 4), (4, 32, 8), (4, 128, 8), (8, 32, 8)):
        for search in ("none", "mse"):
            name = f"int{bits}, block {block}, search {search}, head int{head}"
            settings = {"bits": bits, "block_size": block, "search": search}
            yield Row(name, onnx("cpu", {**settings, **head_bits(head), "accuracy_level": 1}, 8))


def methods() -> Iterator[Row]:
    """Ways to find the integers, on one grid each."""
    for block, symmetric in ((32, True), (32, False), (128, True), (128, False)):
        kind = "symmetric" if symmetric else "asymmetric"
        grid = {"bits": 4, "symmetric": symmetric}
        for name, search, awq in (
            ("RTN", "none", None),
            ("RTN, mse", "mse", None),
            ("AWQ", "none", {"rounding": "nearest", "clip": False}),
            ("AWQ + clip", "none", {"rounding": "nearest"}),
            ("GPTQ", "none", {"rounding": "gptq", "scale": False}),
            ("AWQ + GPTQ", "none", {"rounding": "gptq"}),
            ("AWQ + GPTQ, mse", "mse", {"rounding": "gptq"}),
        ):
            quantize = {**grid, "block_size": block, "search": search, **head_bits(8)}
            overlay = None
            if awq is not None:
                overlay = {**grid, "group_size": block, "search": search, **awq}
                overlay["calibration"] = CALIBRATION
            yield Row(f"block {block} {kind}, {name}", onnx("cuda", quantize, WINDOWS, overlay))


def heads() -> Iterator[Row]:
    """Formats of the head, above a body that is rounded as it is."""
    for block in (32, 128):
        body = {"bits": 4, "block_size": block, "symmetric": False}
        for bits in (4, 8, 16):
            kind = f"int{bits}" if bits < 16 else "fp16"
            settings = {**body, **head_bits(bits)}
            yield Row(f"int4 block {block}, head {kind}", onnx("cuda", settings, WINDOWS))


def gguf() -> Iterator[Row]:
    """Files for llama.cpp."""
    scales = {"group_size": 32, "search": "none", "rounding": "nearest", "clip": False}
    awq = {"id": "awq", "uses": "awq", "with": {**scales, "calibration": CALIBRATION}}
    for file_type in ("Q4_0", "Q4_K_M"):
        for name, importance, overlay in (
            ("", False, False),
            (", imatrix", True, False),
            (", AWQ", False, True),
            (", AWQ + imatrix", True, True),
        ):
            convert: dict[str, Any] = {"file_type": file_type}
            if importance:
                convert["importance"] = CALIBRATION
            stage = {"id": "made", "uses": "convert-gguf", "with": convert}
            settings = {"runtime": "llama.cpp", "windows": WINDOWS}
            stages = [stage, {"id": "check", "uses": "validate", "with": settings}]
            if overlay:
                stages = [awq, {**stage, "from": "awq"}, stages[-1]]
            yield Row(file_type + name, stages)


def onnx(
    provider: str, quantize: dict[str, Any], windows: int, awq: dict[str, Any] | None = None
) -> Stages:
    """The stages of an ONNX artifact that is measured on the CPU, through an overlay if given."""
    overlay = [] if awq is None else [{"id": "awq", "uses": "awq", "with": awq}]
    sources = ["onnx", *(stage["id"] for stage in overlay)]
    check = {"provider": provider, "when_missing": "fallback-cpu", "windows": windows}
    return [
        *overlay,
        {"id": "onnx", "uses": "export-onnx", "with": {"provider": provider}},
        {"id": "made", "uses": "quantize", "from": sources, "with": quantize},
        {"id": "check", "uses": "validate", "with": check},
    ]


def head_bits(bits: int) -> dict[str, Any]:
    """The head at 4, 8 or 16 bits: quantize's key for it."""
    return {"lm_head": {"bits": bits} if bits < 16 else {"keep_float": True}}


TABLES = {"rounding": rounding, "methods": methods, "heads": heads, "gguf": gguf}


def measure(model: Path, stages: Stages, folder: Path) -> tuple[dict[str, float], int]:
    """Builds one row; returns its metrics and the size of its weights in bytes."""
    recipe = {"schema": 1, "name": "row", "model": {"source": str(model)}, "stages": stages}
    (folder / "row.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    out = folder / "out"
    command = [sys.executable, "-m", "phiconv", "build", "-q", str(folder / "row.yaml")]
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((out / "report" / "report.json").read_text())
    metrics: dict[str, float] = report["result"]["validations"][0]["measurement"]["metrics"]
    weights = [*out.glob("artifact/*.data"), *out.glob("artifact/*.gguf")]
    return metrics, sum(file.stat().st_size for file in weights)


@click.command(help=__doc__)
@click.option(
    "--table", type=click.Choice(list(TABLES)), default="rounding", help="What is compared."
)
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True),
    default=ROOT / "examples" / "tiny-phi3",
    help="Trained checkpoint.",
)
@click.option("--only", default="", help="Rows whose name holds this text.")
def main(table: str, model: Path, only: str) -> None:
    """Print a Markdown table."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    click.echo("| weights | mean KL | p99 KL | top-1 | perplexity ratio | size |")
    click.echo("|---|---|---|---|---|---|")
    for row in TABLES[table]():
        if only not in row.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            metrics, size = measure(model.resolve(), row.stages, Path(folder))
        click.echo(
            f"| {row.name} | {metrics['kl_divergence.mean']:.5f} ± "
            f"{metrics['kl_divergence.standard_error']:.5f} | {metrics['kl_divergence.p99']:.3f} "
            f"| {metrics['top1_agreement']:.1%} | {metrics['perplexity.ratio']:.4f} "
            f"| {size / 1e6:.2f} MB |"
        )


if __name__ == "__main__":
    main()
