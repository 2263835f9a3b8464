"""Measures the kernels, one core each, beside ONNX Runtime's quantizer and a plain copy.

python -m benchmarks.kernels [--rows 8192] [--columns 3072] [--repeats 7]

MB/s are of input, best of the repeats, after a run that is not counted and compiles. "of CPU" is
by CPU time of the process, which a busy machine disturbs less than the wall.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from phiconv.kernels.floats import cast_rows, cast_transposed
from phiconv.kernels.matmulnbits import dequantize_rows, layout, quantize_rows
from phiconv.kernels.overlay import scale_rows

Array = npt.NDArray[Any]
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


def measure(name: str, nbytes: int, run: Callable[[], object], repeats: int) -> None:
    """Prints a row: name, MB/s by the wall and by CPU time, seconds of the first run."""
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    wall, cpu = [], []
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    speeds = (nbytes / min(wall) / 1e6, nbytes / max(min(cpu), 1e-9) / 1e6)
    print(f"{name:<48}{speeds[0]:>9.0f}{speeds[1]:>9.0f}{first:>9.2f}", flush=True)


def quantizer(weight: Array, scale: str, search: str, **how: Any) -> Callable[[], object]:
    """A run of the quantizer into buffers made beforehand."""
    shapes = layout(*weight.shape, bits=how["bits"], block_size=how["block_size"])
    packed = np.empty(shapes.packed, np.uint8)
    scales = np.empty(shapes.scales, DTYPES[scale])
    zeros = None if how["symmetric"] else np.empty(shapes.zero_points, np.uint8)
    out: dict[str, Any] = {"packed": packed, "scales": scales, "zero_points": zeros}
    return partial(quantize_rows, weight, search=search, **how, **out)


def ort_quantizer(weight: Array, block_size: int, symmetric: bool) -> Callable[[], object]:
    """A run of what ONNX Runtime needs for the same: widen, transpose, quantize."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    n, k = weight.shape
    shapes = layout(n, k, bits=4, block_size=block_size)
    packed, zeros = np.zeros(shapes.packed, np.uint8), np.zeros(shapes.zero_points, np.uint8)
    scales = np.zeros(shapes.scales, np.float32)

    def run() -> None:
        transposed = np.ascontiguousarray(weight.astype(np.float32).T)
        quantize_matmul_4bits(packed, transposed, scales, zeros, block_size, n, k, symmetric)

    return run


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Measures the kernels, one core each.")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # ONNX Runtime would use every core
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    shape = (args.rows, args.columns)
    wide = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    weights = {name: wide.astype(dtype) for name, dtype in DTYPES.items()}
    bf16 = weights["bf16"]
    print(f"{shape} on one core{'':<29}{'MB/s':>9}{'of CPU':>9}{'first s':>9}")
    copy = partial(np.copyto, np.empty_like(bf16), bf16)
    measure("copy bf16", bf16.nbytes, copy, args.repeats)
    for search in ("none", "mse"):
        for source, scale in (("bf16", "f32"), ("bf16", "f16"), ("f16", "f16"), ("f32", "f32")):
            for bits, block_size, symmetric in ((4, 32, True), (4, 128, False), (8, 32, True)):
                kind = "symmetric" if symmetric else "asymmetric"
                name = f"{source}, int{bits} block {block_size} {kind}, {scale} scales, {search}"
                how = {"bits": bits, "block_size": block_size, "symmetric": symmetric}
                run = quantizer(weights[source], scale, search, **how)
                measure(name, weights[source].nbytes, run, args.repeats)
    for symmetric in (True, False):
        name = f"ONNX Runtime: bf16, int4 block 32 {'' if symmetric else 'a'}symmetric"
        measure(name, bf16.nbytes, ort_quantizer(bf16, 32, symmetric), 2)
    quantized = layout(*shape, bits=4, block_size=32)
    packed, scales = np.zeros(quantized.packed, np.uint8), np.zeros(quantized.scales, np.float32)
    how = {"bits": 4, "block_size": 32, "symmetric": True}
    run = partial(dequantize_rows, packed, scales, None, K=shape[1], **how)
    measure("dequantize int4 block 32 (packed bytes)", packed.nbytes, run, args.repeats)
    for source, target in (("bf16", "f16"), ("bf16", "f32"), ("f32", "f16"), ("f16", "f16")):
        out = np.empty(shape, DTYPES[target])
        weight = weights[source]
        run = partial(cast_rows, weight, out)
        measure(f"cast {source} to {target}", weight.nbytes, run, args.repeats)
        out = np.empty(shape[::-1], DTYPES[target])
        run = partial(cast_transposed, weight, 0, shape[1], out)
        measure(f"cast {source} to {target}, transposed", weight.nbytes, run, args.repeats)
    factors, limits = np.ones(max(shape), np.float32), np.full(shape, 3, np.uint8)
    for name, clip in (("", None), (" with clip limits", limits[:, : -(-shape[1] // 128)])):
        run = partial(
            scale_rows,
            bf16,
            np.empty(shape, np.float32),
            columns=factors[: shape[1]],
            rows=factors[: shape[0]],
            clip=clip,
            group_size=128,
        )
        measure(f"bf16 through an overlay{name}", bf16.nbytes, run, args.repeats)
    out = np.empty(shape[::-1], np.float16)
    measure(
        "numpy: cast bf16 to f16, transposed",
        bf16.nbytes,
        partial(np.copyto, out, bf16.T, "unsafe"),
        2,
    )


if __name__ == "__main__":
    main()
