"""The jobs that make a model's data file: each reads rows, runs one kernel and fills its place.

A thread has one job at a time, so memory is a few buffers a thread whatever the model's size.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from phiconv.checkpoint.problems import listed, not_finite_error
from phiconv.checkpoint.safetensors_file import numpy_dtype
from phiconv.data_file import DataFile, Filling, Region
from phiconv.errors import StageError
from phiconv.kernels import floats, matmulnbits
from phiconv.onnx.weights import Dense, Part, Quantization, Rows, between, row_count
from phiconv.write_threads import ThreadBuffers

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint.weight_source import WeightSource
    from phiconv.stages.stage import Progress


@dataclass
class Work:
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


class Job(Protocol):
    """Part of the data file, to be made by one thread.

    It reads before it asks for memory to fill, so that reading goes on while others wait for some.
    """

    @property
    def offset(self) -> int:
        """Its first byte in the file."""
        ...

    @property
    def source_bytes(self) -> int:
        """What it takes from the checkpoint, every byte counted by one job alone."""
        ...

    def run(self, work: Work, data: DataFile) -> None:
        """Fills its bytes."""
        ...


@dataclass(frozen=True)
class ConstantJob:
    """Copies a tensor that the graph holds."""

    offset: int
    tensor: ir.TensorProtocol
    source_bytes: int = 0

    def run(self, work: Work, data: DataFile) -> None:
        """Copies it."""
        # as stored: numpy has no type for two 4-bit numbers a byte
        data.write(self.offset, np.frombuffer(self.tensor.tobytes(), np.uint8))


@dataclass(frozen=True)
class RowsOf:
    """Rows ``[start, stop)`` of one weight.

    Attributes:
        source: Where they are read.
        rows: What the weight is a concatenation of.
        start: The first row.
        stop: The row after the last.
    """

    source: WeightSource
    rows: tuple[Rows, ...]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """Their bytes in the source."""
        return len(self) * self.source.tensors[self.rows[0].tensor].row_nbytes

    @property
    def tensors(self) -> set[str]:
        """The checkpoint's tensors among them."""
        return {part.tensor for part in self.rows}

    def read(self, work: Work) -> np.ndarray:
        """Reads them into a buffer of the thread."""
        return work.read(self.source, self.rows, self.start, self.stop)


@dataclass(frozen=True)
class DenseJob:
    """Rounds rows to the target type.

    Attributes:
        input: The rows.
        columns: Which columns of the rows; of rows that are not transposed, all.
        region: Their place in the tensor's region.
        dtype: The target type.
        expr: The weight.
    """

    input: RowsOf
    columns: tuple[int, int]
    region: Region
    dtype: np.dtype
    expr: Dense

    @property
    def offset(self) -> int:
        """See `Job`."""
        return self.region.offset

    @property
    def source_bytes(self) -> int:
        """See `Job`."""
        first, last = self.columns
        item = numpy_dtype(self.input.source.tensors[self.input.rows[0].tensor].dtype).itemsize
        return len(self.input) * (last - first) * item

    def run(self, work: Work, data: DataFile) -> None:
        """Reads, computes and fills."""
        read = self.input.read(work)
        matrix = read.reshape(len(read), -1)
        finite, largest = True, 0.0
        with data.fill(self.region) as filling:
            for first, last, memory in filling.rows(self.region):
                out = memory.view(self.dtype)
                if self.expr.transposed:
                    k = self.columns[0]
                    scan = floats.cast_transposed(matrix, k + first, k + last, out)
                else:
                    scan = floats.cast_rows(matrix[first:last], out)
                finite, largest = finite and scan.finite, max(largest, scan.max_abs)
                if self.expr.overflow == "clamp":
                    limits = np.finfo(out.dtype)
                    np.clip(out, limits.min, limits.max, out=out)
        overflows = self.dtype == np.float16 and largest >= floats.F16_OVERFLOW
        if not finite or (overflows and self.expr.overflow == "error"):
            work.note_unusable(self.input.tensors, floats.Scan(finite, largest))
        work.progress.advance(self.source_bytes, self.input.rows[0].tensor)


@dataclass(frozen=True)
class QuantizedJob:
    """Makes packed integers, scales and zero points of rows.

    Attributes:
        input: The rows.
        regions: Where the parts of the whole weight lie.
        quantization: The format.
        packed: Whether the source has the codes, which are copied then.
    """

    input: RowsOf
    regions: Mapping[Part, Region]
    quantization: Quantization
    packed: bool

    @property
    def offset(self) -> int:
        """See `Job`."""
        return self._region("weight").offset

    @property
    def source_bytes(self) -> int:
        """See `Job`."""
        return self.input.nbytes

    def run(self, work: Work, data: DataFile) -> None:
        """Reads, computes and fills."""
        read = None if self.packed else self.input.read(work)
        places = {part: self._region(part) for part in self.regions}
        with data.fill(*places.values()) as filling:
            outputs = self._arrays(places, filling)
            if read is None:
                self._copy(outputs, work)
            else:
                self._quantize(read, outputs, work)
        work.progress.advance(self.source_bytes, self.input.rows[0].tensor)

    def _region(self, part: Part) -> Region:
        whole, total = self.regions[part], row_count(self.input.rows)
        row_bytes = whole.length // total
        return Region(whole.offset + self.input.start * row_bytes, len(self.input) * row_bytes)

    def _arrays(self, places: Mapping[Part, Region], filling: Filling) -> dict[Part, np.ndarray]:
        q = self.quantization
        k = self.input.source.tensors[self.input.rows[0].tensor].shape[1]
        shapes = matmulnbits.layout(len(self.input), k, bits=q.bits, block_size=q.block_size)
        scale_dtype = np.dtype(np.float32 if q.scale_dtype == "FLOAT" else np.float16)
        byte = np.dtype(np.uint8)
        arrays: dict[Part, np.ndarray] = {
            "weight": filling.array(places["weight"], shapes.packed, byte),
            "scales": filling.array(places["scales"], shapes.scales, scale_dtype),
        }
        if not q.symmetric:
            arrays["zero_points"] = filling.array(places["zero_points"], shapes.zero_points, byte)
        return arrays

    def _quantize(self, read: np.ndarray, outputs: dict[Part, np.ndarray], work: Work) -> None:
        q = self.quantization
        usable = matmulnbits.quantize_rows(
            read,
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
            scan = floats.cast_rows(read, np.empty(read.shape, np.float32))
            work.note_unusable(self.input.tensors, scan)

    def _copy(self, outputs: dict[Part, np.ndarray], work: Work) -> None:
        rounded = self.input.source.rounded
        assert rounded is not None
        zero_points = outputs.get("zero_points")
        filled = 0
        for part in between(self.input.rows, self.input.start, self.input.stop):
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
            work.note_unusable(self.input.tensors, floats.Scan(finite=True, max_abs=float("inf")))
