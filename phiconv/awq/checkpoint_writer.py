"""Writes a checkpoint in AutoAWQ's format (`quant_method: awq`, version gemm), tensor by tensor.

Every matrix of a decoder layer becomes `<module>.qweight` int32 [K, N / 8], `.qzeros` int32
[K / group_size, N / 8] and `.scales` float16 [K / group_size, N], packed as AutoAWQ's
`WQLinear_GEMM` does; embedding, norms and head are float16, as AutoAWQ saves them. Zero points are
mandatory there: on a symmetric grid they are 8. Codes and scales are those that an fp16 ONNX graph
holds that is quantized with the same overlay.

In memory is one matrix at a time, as codes and packed; the bytes do not depend on the threads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from phiconv.checkpoint.folder import CONFIG
from phiconv.checkpoint.problems import listed, not_finite_error
from phiconv.checkpoint.safetensors_file import numpy_dtype
from phiconv.checkpoint.safetensors_writer import SafetensorsWriter
from phiconv.checkpoint.weights import INDEX_FILE, SINGLE_FILE
from phiconv.errors import StageError
from phiconv.kernels import floats, int32_packing, matmulnbits
from phiconv.write_threads import CHUNK_BYTES, ThreadBuffers, evenly, run_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phiconv.checkpoint.overlaid import OverlaidCheckpoint
    from phiconv.checkpoint.safetensors_file import StoredDtype
    from phiconv.stages.stage import Progress

BITS = 4
"""AutoAWQ's layout gemm has no other."""
OUTPUTS_PER_ITEM = 32 // BITS

_PREFIX = "model.layers."


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What was written.

    Attributes:
        nbytes: Bytes of all tensors.
        quantized: How many matrices are quantized.
        shards: How many weight files there are.
    """

    nbytes: int
    quantized: int
    shards: int


def write_awq_checkpoint(
    source: OverlaidCheckpoint,
    folder: Path,
    *,
    search: Literal["none", "mse"],
    shard_bytes: int,
    threads: int,
    progress: Progress,
) -> WrittenCheckpoint:
    """Writes config, weights and side files into an existing folder.

    Args:
        source: The checkpoint, read through its overlay, whose grid has 4 bits.
        folder: Destination.
        search: How a group's scale is chosen, as in the stage quantize.
        shard_bytes: A weight file that would be longer is split, as transformers does it.
        threads: Worker threads.
        progress: Told the bytes read and the tensor in hand.

    Raises:
        CheckpointError: A weight holds NaN or Inf; every such tensor is named.
        StageError: A weight leaves the range of fp16; every such tensor is named.
    """
    group_size = source.overlay.grid.group_size
    layout = {name: _parts(source, name, group_size) for name in _model_order(source)}
    shards = _shards(layout, shard_bytes)
    progress.start(source.nbytes, "bytes")
    work = _Work(source, search, threads, progress)
    for file, names in shards.items():
        tensors = {part: entry for name in names for part, entry in layout[name].items()}
        with SafetensorsWriter(folder / file, tensors, {"format": "pt"}) as writer:
            for name in names:
                if _is_quantized(source, name):
                    _write_quantized(work, name, writer)
                else:
                    _write_float(work, name, writer)
    work.raise_findings()
    total = sum(_nbytes(parts) for parts in layout.values())
    if len(shards) > 1:
        weight_map = {
            part: file for file, names in shards.items() for name in names for part in layout[name]
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX_FILE, index)
    for name in source.files:
        if name != CONFIG:
            shutil.copyfile(source.path / name, folder / name)
    _write_json(folder / CONFIG, _config(source, group_size))
    quantized = sum(_is_quantized(source, name) for name in layout)
    return WrittenCheckpoint(total, quantized, len(shards))


@dataclass
class _Work:
    """What the jobs share."""

    source: OverlaidCheckpoint
    search: Literal["none", "mse"]
    threads: int
    progress: Progress
    buffers: ThreadBuffers = field(default_factory=ThreadBuffers)
    not_finite: set[str] = field(default_factory=set)
    overflowing: set[str] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)

    def note(self, name: str, scan: floats.Scan) -> None:
        """Remembers a tensor that fp16 cannot hold."""
        with self.lock:
            (self.overflowing if scan.finite else self.not_finite).add(name)

    def raise_findings(self) -> None:
        if self.not_finite:
            raise not_finite_error(self.not_finite, self.source.path)
        if self.overflowing:
            raise StageError(
                f"outside the range of fp16, ±65504: {listed(sorted(self.overflowing))}",
                where=str(self.source.path),
                remedy="AutoAWQ's format is fp16; convert to ONNX in fp32 instead",
            )


def _model_order(source: OverlaidCheckpoint) -> list[str]:
    """The tensors in the model's order; a tied checkpoint may hold a head nevertheless."""
    expected = list(source.config.expected_tensors())
    return expected + [name for name in source.tensors if name not in expected]


def _is_quantized(source: OverlaidCheckpoint, name: str) -> bool:
    return name.startswith(_PREFIX) and len(source.tensors[name].shape) == 2


def _parts(
    source: OverlaidCheckpoint, name: str, group_size: int
) -> dict[str, tuple[StoredDtype, tuple[int, ...]]]:
    """The tensors that one of the checkpoint's becomes."""
    shape = source.tensors[name].shape
    if not _is_quantized(source, name):
        return {name: ("f16", shape)}
    n, k = shape
    module = name.removesuffix(".weight")
    return {
        f"{module}.qweight": ("i32", (k, n // OUTPUTS_PER_ITEM)),
        f"{module}.qzeros": ("i32", (k // group_size, n // OUTPUTS_PER_ITEM)),
        f"{module}.scales": ("f16", (k // group_size, n)),
    }


def _nbytes(parts: Mapping[str, tuple[StoredDtype, tuple[int, ...]]]) -> int:
    return sum(int(np.prod(shape)) * numpy_dtype(dtype).itemsize for dtype, shape in parts.values())


def _shards(
    layout: Mapping[str, Mapping[str, tuple[StoredDtype, tuple[int, ...]]]], limit: int
) -> dict[str, list[str]]:
    """Which weight file holds which weights: in order, a new one when one would be too long."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, parts in layout.items():
        added = _nbytes(parts)
        if groups[-1] and size + added > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += added
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, 1)
    }


def _write_quantized(work: _Work, name: str, writer: SafetensorsWriter) -> None:
    """Codes of one matrix, made or copied row by row and packed as a whole."""
    grid = work.source.overlay.grid
    n, k = work.source.tensors[name].shape
    shapes = matmulnbits.layout(n, k, bits=BITS, block_size=grid.group_size)
    codes = np.empty(shapes.packed, np.uint8)
    scales = np.empty(shapes.scales, np.float16)
    zero_points = None if grid.symmetric else np.empty(shapes.zero_points, np.uint8)

    def fill(start: int, stop: int) -> None:
        zeros = None if zero_points is None else zero_points[start:stop]
        _fill_rows(work, name, start, codes[start:stop], scales[start:stop], zeros)
        work.progress.advance((stop - start) * work.source.tensors[name].row_nbytes, name)

    run_all((partial(fill, *rows) for rows in evenly(n, 4 * n * k, CHUNK_BYTES)), work.threads)
    module = name.removesuffix(".weight")
    writer.write(f"{module}.qweight", int32_packing.pack_awq(codes.reshape(n, -1)))
    writer.write(f"{module}.scales", scales.T)
    values = (
        np.full(shapes.scales, 1 << (BITS - 1), np.uint8)
        if zero_points is None
        else int32_packing.unpack_block_zero_points(zero_points, bits=BITS, blocks=scales.shape[1])
    )
    writer.write(f"{module}.qzeros", int32_packing.pack_zero_points_awq(values))


def _fill_rows(
    work: _Work,
    name: str,
    start: int,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16],
    zero_points: NDArray[np.uint8] | None,
) -> None:
    """Rows from `start` on: the overlay's codes, or the weight rounded on its grid."""
    grid = work.source.overlay.grid
    rounded = work.source.rounded
    if rounded is not None and name in rounded.tensors:
        rounded.read_rows(name, start, packed=codes, scales=scales, zero_points=zero_points)
        return
    source = work.source.for_grid(grid)
    info = source.tensors[name]
    rows = work.buffers.get("rows", (len(codes), *info.shape[1:]), numpy_dtype(info.dtype))
    source.read_rows(name, start, start + len(codes), rows)
    usable = matmulnbits.quantize_rows(
        rows,
        bits=BITS,
        block_size=grid.group_size,
        symmetric=grid.symmetric,
        search=work.search,
        packed=codes,
        scales=scales,
        zero_points=zero_points,
    )
    if not usable:
        wide = work.buffers.get("wide", rows.shape, np.dtype(np.float32))
        work.note(name, floats.cast_rows(rows, wide))


def _write_float(work: _Work, name: str, writer: SafetensorsWriter) -> None:
    """A tensor in float16, a few megabytes at a time."""
    info = work.source.tensors[name]
    for start, stop in evenly(info.shape[0], 4 * int(np.prod(info.shape)), CHUNK_BYTES):
        rows = work.source.read_rows(name, start, stop)
        out = np.empty(rows.shape, np.float16)
        scan = floats.cast_rows(rows, out)
        if not scan.finite or scan.max_abs >= floats.F16_OVERFLOW:
            work.note(name, scan)
        writer.write_rows(name, start, out)
        work.progress.advance((stop - start) * info.row_nbytes, name)


def _config(source: OverlaidCheckpoint, group_size: int) -> dict[str, Any]:
    """config.json with what a loader needs to know."""
    config = dict(source.raw_config)
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = "float16"
    config["quantization_config"] = {
        "bits": BITS,
        "group_size": group_size,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    return config


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
