"""Measures what each way of quantizing costs on the bundled trained checkpoint.

    python -m benchmarks.accuracy

Each row is one build of recipes/int4-cpu.yaml with other parameters, validated on the CPU against
Hugging Face fp32 on the packaged held-out windows. KL in nats; size is model.onnx.data.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
GATES_OFF = ("check.gates={}",)
VARIANTS: dict[str, tuple[str, ...]] = {
    f"int{bits}, block {block}, search {search}, head int{head}": (
        f"int4.bits={bits}",
        f"int4.block_size={block}",
        f"int4.search={search}",
        f"int4.lm_head.bits={head}",
        "int4.accuracy_level=1",
    )
    for bits, block, head in ((4, 32, 4), (4, 32, 8), (4, 128, 8), (8, 32, 8))
    for search in ("none", "mse")
}


def measure(model: Path, settings: tuple[str, ...], out: Path) -> tuple[dict[str, float], int]:
    """Build one variant; returns its metrics and the size of its weights in bytes."""
    options = [argument for text in settings for argument in ("--set", text)]
    command = [sys.executable, "-m", "phiconv", "build", "-q", str(ROOT / "recipes/int4-cpu.yaml")]
    subprocess.run(
        [*command, "--model", str(model), "--out", str(out), *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    report: dict[str, Any] = json.loads((out / "report" / "report.json").read_text())
    metrics: dict[str, float] = report["result"]["validations"][0]["measurement"]["metrics"]
    return metrics, (out / "artifact" / "model.onnx.data").stat().st_size


@click.command(help=__doc__)
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True),
    default=ROOT / "examples" / "tiny-phi3",
    help="Trained checkpoint.",
)
def main(model: Path) -> None:
    """Print a Markdown table."""
    click.echo("| weights | mean KL | p99 KL | top-1 | perplexity ratio | size |")
    click.echo("|---|---|---|---|---|---|")
    for name, settings in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            metrics, size = measure(model, (*settings, *GATES_OFF), Path(folder) / "out")
        click.echo(
            f"| {name} | {metrics['kl_divergence.mean']:.5f} ± "
            f"{metrics['kl_divergence.standard_error']:.5f} | {metrics['kl_divergence.p99']:.3f} "
            f"| {metrics['top1_agreement']:.1%} | {metrics['perplexity.ratio']:.4f} "
            f"| {size / 1e6:.2f} MB |"
        )


if __name__ == "__main__":
    main()
