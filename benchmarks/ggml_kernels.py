"""Measures phiconv's ggml kernels beside ggml's own quantizers, on one thread.

    python -m benchmarks.ggml_kernels                 every type
    python -m benchmarks.ggml_kernels --only Q4_K     one type

Speeds are MB/s of the weights as float32, whatever they are stored as: 4 bytes a weight. Each is
the best of several runs in CPU time, ggml and phiconv taking turns. ggml is the one in the package
xllamacpp; it reads float32 and has no threads here. The first call's CPU time is what compiling
the kernel costs, or loading it where it was compiled before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import ml_dtypes
import numpy as np
import numpy.typing as npt

from phiconv.kernels.ggml import TYPES, dequantize_rows, quantize_rows, row_nbytes
from tests import llama_cpp_oracle

Array = npt.NDArray[Any]
NAMES = [name for name in TYPES if name.startswith("Q")]


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _best(works: list[Callable[[], object]], runs: int) -> list[float]:
    """The least CPU time of each of `works`, run in turns."""
    times = [[_seconds(work) for work in works] for _ in range(runs)]
    return [min(column) for column in zip(*times, strict=True)]


def _row(name: str, weight: Array, importance: Array | None, runs: int) -> str:
    n, k = weight.shape
    half = weight.astype(ml_dtypes.bfloat16)
    out = np.empty((n, row_nbytes(name, k)), np.uint8)
    first = _seconds(lambda: quantize_rows(half[:1], name, out[:1], importance))
    quantize_rows(weight, name, out, importance)
    if (out != llama_cpp_oracle.quantize(weight, name, importance)).any():
        raise click.ClickException(f"{name}: the bytes are not ggml's")
    dequantize_rows(out[:1], name, k)
    seconds = _best(
        [
            lambda: llama_cpp_oracle.quantize(weight, name, importance),
            lambda: quantize_rows(weight, name, out, importance),
            lambda: quantize_rows(half, name, out, importance),
            lambda: llama_cpp_oracle.dequantize(out, name, k),
            lambda: dequantize_rows(out, name, k),
        ],
        runs,
    )
    ggml, f32, bf16, ggml_inverse, inverse = (weight.nbytes / s / 1e6 for s in seconds)
    return (
        f"| {name} | {'yes' if importance is not None else 'no'} | {ggml:.0f} "
        f"| {f32:.0f} (**{f32 / ggml:.1f}×**) | {bf16:.0f} (**{bf16 / ggml:.1f}×**) "
        f"| {ggml_inverse:.0f} → {inverse:.0f} ({inverse / ggml_inverse:.1f}×) | {first:.1f} s |"
    )


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(NAMES), multiple=True, help="Types to measure.")
@click.option("--runs", default=5, show_default=True, help="Runs of each kernel.")
@click.option("--rows", default=256, show_default=True, help="Rows of the weight.")
@click.option("--columns", default=3072, show_default=True, help="Columns of the weight.")
def main(only: tuple[str, ...], runs: int, rows: int, columns: int) -> None:
    """Print a Markdown table of speeds."""
    reason = llama_cpp_oracle.missing()
    if reason is not None:
        raise click.ClickException(reason)
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((rows, columns), np.float32) * np.float32(0.02)
    weight = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    importance = generator.random(columns, np.float32) ** 4
    click.echo("| type | importance | ggml | float32 | bfloat16 | dequantize | first call |")
    click.echo("|---|---|---|---|---|---|---|")
    for name in only or NAMES:
        for weights in (None, importance):
            if weights is None or name != "Q8_0":
                click.echo(_row(name, weight, weights, runs))


if __name__ == "__main__":
    main()
