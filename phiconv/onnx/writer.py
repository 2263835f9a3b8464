"""Materialises a lazy graph: model.onnx and its external data, in one pass over the checkpoint.

Every initializer is cut into jobs of a few megabytes; a job reads checkpoint rows into a buffer
of its thread, runs one kernel and writes the result at its place in the data file. So memory is a
few buffers for each thread whatever the model's size, and reading, computing and writing overlap.
The bytes depend on the graph and the checkpoint alone, not on threads or timing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phiconv.checkpoint.problems import listed, not_finite_error
from phiconv.checkpoint.safetensors_file import numpy_dtype
from phiconv.checkpoint.weight_source import Grid
from phiconv.data_file import DataFile, Region
from phiconv.errors import ExportError, StageError
from phiconv.kernels import floats, matmulnbits
from phiconv.onnx.data_layout import lay_out
from phiconv.onnx.graph import DATA_FILE, OnnxGraph
from phiconv.onnx.tied import same_bytes, share_float_head
from phiconv.onnx.weights import (
    Blockwise,
    Dense,
    Packed,
    Part,
    Quantization,
    Rows,
    between,
    row_count,
)
from phiconv.write_threads import ThreadBuffers, run_all

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint.weight_source import WeightSource
    from phiconv.stages.stage import Progress

MODEL_FILE = "model.onnx"
# A job's input: small enough to stay in the second-level cache between read and write.
CHUNK_BYTES = 2 << 20
# A transposed write is contiguous only for whole tensors; wider panels mean longer runs.
PANEL_BYTES = 64 << 20
# Constants below this stay in the graph, where shape inference can see them.
INLINE_BYTES = 1 << 10


@dataclass(frozen=True)
class Written:
    """What the writer made.

    Attributes:
        data_sha256: Digest of the external data file.
        data_bytes: Its size.
        source_bytes: Bytes read from the checkpoint.
        tensors: Number of tensors in the data file.
    """

    data_sha256: str
    data_bytes: int
    source_bytes: int
    tensors: int


def write_model(
    graph: OnnxGraph, checkpoint: WeightSource, folder: Path, *, threads: int, progress: Progress
) -> Written:
    """Write ``model.onnx`` and ``model.onnx.data`` into an existing folder.

    Weights that are the same bytes are stored once, see `phiconv.onnx.tied`.

    Args:
        graph: The lazy graph; its placeholders are replaced by external tensors.
        checkpoint: Where the rows come from.
        folder: Destination.
        threads: Number of worker threads.
        progress: Told the bytes read and the tensor in hand.

    Raises:
        CheckpointError: A weight holds NaN or Inf; every such tensor is named.
        StageError: A weight leaves the range of fp16; every such tensor is named.
        OSError: Reading or writing failed.
    """
    import onnx_ir as ir

    share_float_head(graph)
    shared = same_bytes(graph)
    lengths, constants = _external_tensors(graph, shared)
    regions = lay_out(lengths)
    jobs = list(_jobs(graph, checkpoint, regions))
    progress.start(sum(job.source_bytes for job in jobs), "bytes")
    work = _Work(checkpoint, progress)
    with DataFile(folder / DATA_FILE, regions) as data:
        for name, tensor in constants.items():
            # as stored: numpy has no type for two 4-bit numbers a byte
            data.write(regions[name].offset, np.frombuffer(tensor.tobytes(), np.uint8))
            data.complete(regions[name].offset, regions[name].end)
        _run(jobs, work, data, threads)
        work.raise_findings()
        digest = data.sha256()
    _point_to_data(graph.model, regions | {name: regions[shared[name]] for name in shared})
    proto = ir.serde.serialize_model(graph.model)
    (folder / MODEL_FILE).write_bytes(proto.SerializeToString(deterministic=True))
    return Written(digest, data.size, sum(job.source_bytes for job in jobs), len(regions))


@dataclass
class _Work:
    """What the jobs of one model share: source, progress, buffers and findings."""

    checkpoint: WeightSource
    progress: Progress
    not_finite: set[str] = field(default_factory=set)
    overflowing: dict[str, float] = field(default_factory=dict)
    buffers: ThreadBuffers = field(default_factory=ThreadBuffers)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(
        self, source: WeightSource, rows: tuple[Rows, ...], start: int, stop: int
    ) -> np.ndarray:
        """Rows ``[start, stop)`` of a concatenation, in the source's own dtype."""
        info = source.tensors[rows[0].tensor]
        out = self.buffers.get("source", (stop - start, *info.shape[1:]), numpy_dtype(info.dtype))
        filled = 0
        for part in between(rows, start, stop):
            end = filled + len(part)
            source.read_rows(part.tensor, part.start, part.stop, out[filled:end])
            filled = end
        return out

    def note_unusable(self, names: set[str], scan: floats.Scan) -> None:
        """Remember tensors that hold NaN or Inf, or values that fp16 cannot hold."""
        with self._lock:
            if not scan.finite:
                self.not_finite |= names
                return
            for name in names:
                self.overflowing[name] = max(scan.max_abs, self.overflowing.get(name, 0.0))

    def raise_findings(self) -> None:
        """Report every tensor that cannot be converted, in one error."""
        if self.not_finite:
            raise not_finite_error(self.not_finite, self.checkpoint.path)
        if self.overflowing:
            named = [f"{name} (|w| up to {m:.4g})" for name, m in sorted(self.overflowing.items())]
            raise StageError(
                f"outside the range of fp16, ±65504: {listed(named)}",
                where=str(self.checkpoint.path),
                remedy="use precision fp32, or a cast stage with overflow: clamp",
            )


@dataclass(frozen=True)
class _Job:
    """Rows ``[start, stop)`` of one weight, to be computed and written by one thread."""

    source: WeightSource
    rows: tuple[Rows, ...]
    start: int
    stop: int
    source_bytes: int

    def run(self, work: _Work, data: DataFile) -> None:
        raise NotImplementedError

    def _names(self) -> set[str]:
        return {part.tensor for part in self.rows}


@dataclass(frozen=True)
class _DenseJob(_Job):
    """Rounds rows to the target type and writes them, in order or transposed."""

    region: Region
    dtype: np.dtype
    expr: Dense

    def run(self, work: _Work, data: DataFile) -> None:
        source = work.read(self.source, self.rows, self.start, self.stop)
        if self.expr.transposed:
            scan = self._write_transposed(source, work, data)
        else:
            out = work.buffers.get("dense", source.shape, self.dtype)
            scan = floats.cast_rows(source, out)
            self._clamp(out)
            offset = self.region.offset + self.start * (out.nbytes // len(out))
            data.write(offset, out)
            data.complete(offset, offset + out.nbytes)
        overflows = self.dtype == np.float16 and scan.max_abs >= floats.F16_OVERFLOW
        if not scan.finite or (overflows and self.expr.overflow == "error"):
            work.note_unusable(self._names(), scan)

    def _write_transposed(self, source: np.ndarray, work: _Work, data: DataFile) -> floats.Scan:
        """Write ``[N, K]`` rows as columns of ``[K, N]``, a few output rows at a time."""
        n, k = source.shape
        total = row_count(self.rows)
        step = max(1, CHUNK_BYTES // (n * self.dtype.itemsize))
        finite, largest = True, 0.0
        for first in range(0, k, step):
            last = min(first + step, k)
            out = work.buffers.get("dense", (last - first, n), self.dtype)
            scan = floats.cast_transposed(source, first, last, out)
            finite, largest = finite and scan.finite, max(largest, scan.max_abs)
            self._clamp(out)
            if n == total:
                data.write(self.region.offset + first * n * self.dtype.itemsize, out)
                continue
            for row in range(last - first):
                position = (first + row) * total + self.start
                data.write(self.region.offset + position * self.dtype.itemsize, out[row])
        return floats.Scan(finite, largest)

    def _clamp(self, out: np.ndarray) -> None:
        if self.expr.overflow == "clamp":
            limits = np.finfo(out.dtype)
            np.clip(out, limits.min, limits.max, out=out)


@dataclass(frozen=True)
class _QuantizedJob(_Job):
    """Makes packed integers, scales and zero points of rows, and writes them."""

    regions: dict[Part, Region]
    quantization: Quantization

    def run(self, work: _Work, data: DataFile) -> None:
        outputs = self._outputs(work)
        self._fill(outputs, work)
        for part, array in outputs.items():
            offset = self.regions[part].offset + self.start * (array.nbytes // len(array))
            data.write(offset, array)
            data.complete(offset, offset + array.nbytes)

    def _outputs(self, work: _Work) -> dict[Part, np.ndarray]:
        q, n = self.quantization, self.stop - self.start
        k = self.source.tensors[self.rows[0].tensor].shape[1]
        shapes = matmulnbits.layout(n, k, bits=q.bits, block_size=q.block_size)
        scale_dtype = np.dtype(np.float32 if q.scale_dtype == "FLOAT" else np.float16)
        byte = np.dtype(np.uint8)
        outputs: dict[Part, np.ndarray] = {
            "weight": work.buffers.get("weight", shapes.packed, byte),
            "scales": work.buffers.get("scales", shapes.scales, scale_dtype),
        }
        if not q.symmetric:
            outputs["zero_points"] = work.buffers.get("zero_points", shapes.zero_points, byte)
        return outputs

    def _fill(self, outputs: dict[Part, np.ndarray], work: _Work) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class _BlockwiseJob(_QuantizedJob):
    """Quantizes rows."""

    def _fill(self, outputs: dict[Part, np.ndarray], work: _Work) -> None:
        source = work.read(self.source, self.rows, self.start, self.stop)
        q = self.quantization
        usable = matmulnbits.quantize_rows(
            source,
            bits=q.bits,
            block_size=q.block_size,
            symmetric=q.symmetric,
            search=q.search,
            packed=outputs["weight"],
            scales=outputs["scales"],
            zero_points=outputs.get("zero_points"),
        )
        if not usable:
            # NaN or Inf as stored, or too large for the scales' type: only the source tells.
            scan = floats.cast_rows(
                source, work.buffers.get("scan", source.shape, np.dtype(np.float32))
            )
            work.note_unusable(self._names(), scan)


@dataclass(frozen=True)
class _PackedJob(_QuantizedJob):
    """Copies the codes that the source has."""

    def _fill(self, outputs: dict[Part, np.ndarray], work: _Work) -> None:
        rounded = self.source.rounded
        assert rounded is not None
        zero_points = outputs.get("zero_points")
        filled = 0
        for part in between(self.rows, self.start, self.stop):
            end = filled + len(part)
            rounded.read_rows(
                part.tensor,
                part.start,
                packed=outputs["weight"][filled:end],
                scales=outputs["scales"][filled:end],
                zero_points=zero_points[filled:end] if zero_points is not None else None,
            )
            filled = end
        if not np.isfinite(outputs["scales"]).all():
            work.note_unusable(self._names(), floats.Scan(finite=True, max_abs=float("inf")))


def _external_tensors(
    graph: OnnxGraph, shared: Mapping[str, str]
) -> tuple[dict[str, int], dict[str, ir.TensorProtocol]]:
    """Byte length by name of what goes to the data file, and the constants among it."""
    lengths: dict[str, int] = {}
    constants: dict[str, ir.TensorProtocol] = {}
    for name, value in graph.model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise ExportError(f"initializer {name} has neither data nor a weight expression")
        if name in graph.weights:
            if name not in shared:
                lengths[name] = tensor.nbytes
        elif tensor.nbytes > INLINE_BYTES:
            lengths[name] = tensor.nbytes
            constants[name] = tensor
    return lengths, constants


def _jobs(graph: OnnxGraph, source: WeightSource, regions: dict[str, Region]) -> Iterator[_Job]:
    """Jobs in the order of the data file, so that its digest can follow closely."""
    groups: dict[str, dict[Part, Region]] = {}
    for name, expr in graph.weights.items():
        if isinstance(expr, Blockwise | Packed) and name in regions:
            groups.setdefault(expr.group, {})[expr.part] = regions[name]
    for name in regions:
        match graph.weights.get(name):
            case Dense() as dense:
                yield from _dense_jobs(graph, source, name, dense, regions[name])
            case Blockwise(rows, q, "weight", group):
                fitting = source.for_grid(Grid(q.bits, q.block_size, q.symmetric))
                for start, stop, size in _chunks(fitting, rows, CHUNK_BYTES):
                    yield _BlockwiseJob(fitting, rows, start, stop, size, groups[group], q)
            case Packed(rows, q, "weight", group):
                _check_codes(name, rows, q, source)
                for start, stop, size in _chunks(source, rows, CHUNK_BYTES):
                    yield _PackedJob(source, rows, start, stop, size, groups[group], q)


def _check_codes(name: str, rows: tuple[Rows, ...], q: Quantization, source: WeightSource) -> None:
    """Makes sure that there are codes to copy.

    Raises:
        ExportError: There are none, or they are on another grid.
    """
    known = source.rounded.tensors if source.rounded is not None else {}
    grid = Grid(q.bits, q.block_size, q.symmetric)
    for part in rows:
        if known.get(part.tensor) != grid:
            raise ExportError(
                f"{name} is to be copied from the codes of {part.tensor}, of which there are none "
                f"with {q.bits} bits in blocks of {q.block_size}",
                where=str(source.path),
                remedy="write the graph with the overlay that it was quantized with",
            )


def _dense_jobs(
    graph: OnnxGraph, source: WeightSource, name: str, expr: Dense, region: Region
) -> Iterator[_Job]:
    value = graph.model.graph.initializers[name]
    assert value.dtype is not None
    dtype = np.dtype(value.dtype.numpy())
    limit = PANEL_BYTES if expr.transposed else CHUNK_BYTES
    for start, stop, size in _chunks(source, expr.rows, limit):
        yield _DenseJob(source, expr.rows, start, stop, size, region, dtype, expr)


def _chunks(
    source: WeightSource, rows: tuple[Rows, ...], limit: int
) -> Iterator[tuple[int, int, int]]:
    """Cut a concatenation of rows into equal ranges of at most `limit` bytes."""
    info = source.tensors[rows[0].tensor]
    total = row_count(rows)
    pieces = -(-total * info.row_nbytes // limit)
    step = -(-total // pieces)
    for start in range(0, total, step):
        stop = min(start + step, total)
        yield start, stop, (stop - start) * info.row_nbytes


def _run(jobs: list[_Job], work: _Work, data: DataFile, threads: int) -> None:
    """Run the jobs on a thread pool; the first failure cancels what has not begun."""
    transposed_left: dict[int, int] = {}
    for job in jobs:
        if isinstance(job, _DenseJob) and job.expr.transposed:
            offset = job.region.offset
            transposed_left[offset] = transposed_left.get(offset, 0) + 1
    lock = threading.Lock()

    def execute(job: _Job) -> None:
        job.run(work, data)
        if isinstance(job, _DenseJob) and job.expr.transposed:
            # Panels interleave in the file: it is final only when the last of them is.
            with lock:
                transposed_left[job.region.offset] -= 1
                last = transposed_left[job.region.offset] == 0
            if last:
                data.complete(job.region.offset, job.region.end)
        work.progress.advance(job.source_bytes, job.rows[0].tensor)

    run_all((partial(execute, job) for job in jobs), threads)


def _point_to_data(model: ir.Model, regions: dict[str, Region]) -> None:
    """Make every initializer of the data file an external tensor of the saved graph."""
    import onnx_ir as ir

    for name, region in regions.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            location=DATA_FILE,
            offset=region.offset,
            length=region.length,
            dtype=value.dtype,
            shape=value.shape,
            name=name,
        )
