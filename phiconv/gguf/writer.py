"""Writes a GGUF file in one pass over the checkpoint.

gguf's own writer lays out header, metadata and tensor infos; the tensor data is computed here,
some rows at a time and by many threads: rows are read into a thread's buffer, and one kernel turns
them into ggml's blocks at their place in the file. So memory is a few buffers for each thread
whatever the model's size, there is no intermediate file, and the bytes depend on the plan and the
checkpoint alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from phiconv.checkpoint import numpy_dtype
from phiconv.checkpoint.problems import listed, not_finite_error
from phiconv.data_file import DataFile, Region
from phiconv.errors import StageError
from phiconv.gguf.file_types import FLOAT_TYPES
from phiconv.gguf.plan import Constant, TensorPlan, Weight
from phiconv.kernels import floats, ggml
from phiconv.write_threads import CHUNK_BYTES, ThreadBuffers, evenly

if TYPE_CHECKING:
    import gguf

    from phiconv.checkpoint.weight_source import WeightSource
    from phiconv.stages.stage import Progress

    Array = npt.NDArray[Any]

_HEADER = "header"
_FLOAT_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
# Where a block holds its fp16 scales, in bytes: a weight too large for them makes one infinite.
_SCALES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
_F16_EXPONENT = 0x7C00


@dataclass(frozen=True)
class Written:
    """What the writer made.

    Attributes:
        sha256: Digest of the file.
        size: Its size in bytes.
        source_bytes: Bytes read from the checkpoint.
    """

    sha256: str
    size: int
    source_bytes: int


def write_gguf(
    path: Path,
    metadata: gguf.GGUFWriter,
    plan: TensorPlan,
    checkpoint: WeightSource,
    *,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    threads: int,
    progress: Progress,
) -> Written:
    """Writes a file.

    Args:
        path: The file; it must not exist.
        metadata: gguf's writer with every key of the file and no tensor; it is used up.
        plan: The tensors.
        checkpoint: Where the rows come from.
        importance: Importance of each column by tensor name, float32 [K]; tensors that it lacks
            are quantized without.
        threads: Number of worker threads.
        progress: Told the bytes read and the tensor in hand.

    Raises:
        CheckpointError: A weight holds NaN or Inf; every such tensor is named.
        StageError: A weight is too large for its type; every such tensor is named.
        OSError: Reading or writing failed.
    """
    header = _header(path, metadata, plan)
    regions, size = _lay_out(header, plan, metadata.data_alignment)
    jobs = list(_jobs(header, plan, checkpoint, regions))
    source_bytes = sum(job.source_bytes for job in jobs)
    progress.start(source_bytes, "bytes")
    work = _Work(checkpoint, progress, importance or {})
    with DataFile(path, size, regions.values(), threads=threads) as data:
        data.run(partial(job.run, work, data) for job in jobs)
        work.raise_findings()
        digest = data.sha256()
    return Written(digest, size, source_bytes)


def _header(path: Path, metadata: gguf.GGUFWriter, plan: TensorPlan) -> bytes:
    """Everything before the tensor data, padded to its alignment."""
    import gguf

    for tensor in plan.tensors:
        metadata.add_tensor_info(
            tensor.name,
            tensor.dimensions,
            np.dtype(np.float32),
            tensor.nbytes,
            raw_dtype=gguf.GGMLQuantizationType[tensor.type],
        )
    # gguf writes to files only
    scratch = path.with_name(f"{path.name}.{_HEADER}")
    try:
        metadata.write_header_to_file(scratch)
        metadata.write_kv_data_to_file()
        metadata.write_ti_data_to_file()
        metadata.close()
        header = scratch.read_bytes()
    finally:
        metadata.close()
        scratch.unlink(missing_ok=True)
    return header.ljust(_padded(len(header), metadata.data_alignment), b"\0")


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _lay_out(header: bytes, plan: TensorPlan, alignment: int) -> tuple[dict[str, Region], int]:
    """Places header and tensors one after the other, aligned; returns the file's size, too."""
    regions = {_HEADER: Region(0, len(header))}
    end = len(header)
    for tensor in plan.tensors:
        regions[tensor.name] = Region(end, tensor.nbytes)
        end = _padded(regions[tensor.name].end, alignment)
    return regions, end


@dataclass
class _Work:
    """What the jobs of one file share: source, progress, buffers and findings."""

    checkpoint: WeightSource
    progress: Progress
    importance: Mapping[str, npt.NDArray[np.float32]]
    not_finite: set[str] = field(default_factory=set)
    overflowing: set[str] = field(default_factory=set)
    buffers: ThreadBuffers = field(default_factory=ThreadBuffers)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, weight: Weight, start: int, stop: int) -> Array:
        """Rows `[start, stop)` of a weight `[n, K]`, in the checkpoint's own dtype."""
        dtype = numpy_dtype(self.checkpoint.tensors[weight.source].dtype)
        out = self.buffers.get("source", (stop - start, weight.shape[1]), dtype)
        if weight.is_vector:
            self.checkpoint.read_rows(weight.source, 0, weight.shape[1], out[0])
        else:
            self.checkpoint.read_rows(weight.source, start, stop, out)
        return out

    def note(self, weight: Weight, *, finite: bool, overflows: bool) -> None:
        """Remembers a tensor that cannot be written."""
        with self._lock:
            if not finite:
                self.not_finite.add(weight.source)
            elif overflows:
                self.overflowing.add(f"{weight.source} ({weight.type})")

    def raise_findings(self) -> None:
        """Reports every tensor that cannot be written, in one error."""
        where = str(self.checkpoint.path)
        if self.not_finite:
            raise not_finite_error(self.not_finite, self.checkpoint.path)
        if self.overflowing:
            named = listed(sorted(self.overflowing))
            raise StageError(
                f"outside the range of the fp16 that its type stores: {named}",
                where=where,
                remedy="use file_type BF16 or F32, or an override for these tensors",
            )


class _Job(Protocol):
    """Part of the file, to be made by one thread."""

    @property
    def source_bytes(self) -> int: ...

    def run(self, work: _Work, data: DataFile) -> None: ...


@dataclass(frozen=True)
class _ConstantJob:
    """Copies what the plan holds."""

    offset: int
    content: Array
    source_bytes: int = 0

    def run(self, work: _Work, data: DataFile) -> None:
        data.write(self.offset, self.content)


@dataclass(frozen=True)
class _WeightJob:
    """Computes rows `[start, stop)` of one weight."""

    weight: Weight
    start: int
    stop: int
    region: Region
    source_bytes: int

    def run(self, work: _Work, data: DataFile) -> None:
        weight = self.weight
        source = work.read(weight, self.start, self.stop)
        finite, overflows = True, False
        with data.fill(self.region) as filling:
            for first, last, out in filling.rows(self.region):
                rows = source[first:last]
                if weight.type in FLOAT_TYPES:
                    scan = floats.cast_rows(rows, out.view(_FLOAT_DTYPES[weight.type]))
                    finite &= scan.finite
                    overflows |= weight.type == "F16" and scan.max_abs >= floats.F16_OVERFLOW
                else:
                    importance = work.importance.get(weight.name)
                    finite &= ggml.quantize_rows(rows, weight.type, out, importance)
                    overflows |= _has_infinite_scale(out, weight.type)
        if not finite or overflows:
            work.note(weight, finite=finite, overflows=overflows)
        work.progress.advance(self.source_bytes, weight.source)


def _has_infinite_scale(blocks: Array, type_name: str) -> bool:
    """Whether a block's scale overflowed, as llama-quantize checks what it wrote."""
    rows = blocks.reshape(-1, ggml.TYPES[type_name].block_bytes)
    for offset in _SCALES[type_name]:
        scales = rows[:, offset : offset + 2].view("<u2")
        if bool(((scales & _F16_EXPONENT) == _F16_EXPONENT).any()):
            return True
    return False


def _jobs(
    header: bytes, plan: TensorPlan, checkpoint: WeightSource, regions: Mapping[str, Region]
) -> Iterator[_Job]:
    """Jobs in the order of the file, so that it can be written while it is filled."""
    yield _ConstantJob(0, np.frombuffer(header, np.uint8))
    for tensor in plan.tensors:
        if isinstance(tensor, Constant):
            yield _ConstantJob(regions[tensor.name].offset, np.array(tensor.values, "<f4"))
        else:
            yield from _weight_jobs(tensor, checkpoint, regions[tensor.name])


def _weight_jobs(weight: Weight, checkpoint: WeightSource, region: Region) -> Iterator[_WeightJob]:
    rows, columns = weight.shape
    source_bytes = columns * numpy_dtype(checkpoint.tensors[weight.source].dtype).itemsize
    row_bytes = ggml.row_nbytes(weight.type, columns)
    for start, stop in evenly(rows, rows * source_bytes, CHUNK_BYTES):
        place = Region(region.offset + start * row_bytes, row_bytes, stop - start, row_bytes)
        yield _WeightJob(weight, start, stop, place, (stop - start) * source_bytes)
