"""Materialises a lazy graph: model.onnx and its external data, in one pass over the checkpoint.

Every initializer is cut into jobs of a few megabytes; a job reads checkpoint rows into a buffer
of its thread and runs one kernel, which puts the result at its place in the data file. So memory
is a few buffers for each thread and a tensor's worth of the file, whatever the model's size, and
reading, computing and writing overlap. The bytes depend on the graph and the checkpoint alone, not
on threads or timing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phiconv.checkpoint.weight_source import Grid
from phiconv.data_file import DataFile, Region
from phiconv.errors import ExportError
from phiconv.onnx.data_layout import lay_out
from phiconv.onnx.graph import DATA_FILE, OnnxGraph
from phiconv.onnx.tied import same_bytes, share_float_head
from phiconv.onnx.weight_jobs import ConstantJob, DenseJob, Job, QuantizedJob, RowsOf, Work
from phiconv.onnx.weights import Blockwise, Dense, Packed, Part, Quantization, Rows, row_count
from phiconv.write_threads import CHUNK_BYTES, evenly

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint.weight_source import WeightSource
    from phiconv.stages.stage import Progress

MODEL_FILE = "model.onnx"
# A transposed matrix is assembled as a whole, or a strip of its rows after the other: each strip
# reads the source again.
STRIP_BYTES = 96 << 20
# Rows of the source, columns of the transposed: whole cache lines for each thread.
PANEL_ROWS = 64
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
    regions = lay_out(_external_lengths(graph, shared))
    size = max((region.end for region in regions.values()), default=0)
    # in the order of the file, so that it can be written while it is filled
    jobs = sorted(_jobs(graph, checkpoint, regions), key=lambda job: job.offset)
    source_bytes = sum(job.source_bytes for job in jobs)
    progress.start(source_bytes, "bytes")
    work = Work(checkpoint, progress)
    path, waiting = folder / DATA_FILE, max(map(_waiting, jobs), default=0)
    with DataFile(path, size, regions.values(), threads=threads, waiting=waiting) as data:
        data.run(partial(job.run, work, data) for job in jobs)
        work.raise_findings()
        digest = data.sha256()
    _point_to_data(graph.model, regions | {name: regions[shared[name]] for name in shared})
    proto = ir.serde.serialize_model(graph.model)
    (folder / MODEL_FILE).write_bytes(proto.SerializeToString(deterministic=True))
    return Written(digest, size, source_bytes, len(regions))


def _external_lengths(graph: OnnxGraph, shared: Mapping[str, str]) -> dict[str, int]:
    """Byte length by name of what goes to the data file."""
    lengths: dict[str, int] = {}
    for name, value in graph.model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise ExportError(f"initializer {name} has neither data nor a weight expression")
        if name in graph.weights:
            if name not in shared:
                lengths[name] = tensor.nbytes
        elif tensor.nbytes > INLINE_BYTES:
            lengths[name] = tensor.nbytes
    return lengths


def _jobs(graph: OnnxGraph, source: WeightSource, regions: Mapping[str, Region]) -> Iterator[Job]:
    groups: dict[str, dict[Part, Region]] = {}
    for name, expr in graph.weights.items():
        if isinstance(expr, Blockwise | Packed) and name in regions:
            groups.setdefault(expr.group, {})[expr.part] = regions[name]
    for name, region in regions.items():
        match graph.weights.get(name):
            case None:
                tensor = graph.model.graph.initializers[name].const_value
                assert tensor is not None
                yield ConstantJob(region.offset, tensor)
            case Dense() as dense:
                yield from _dense_jobs(graph, source, name, dense, region)
            case Blockwise(rows, q, "weight", group):
                fitting = source.for_grid(Grid(q.bits, q.block_size, q.symmetric))
                for part in _chunks(fitting, rows):
                    yield QuantizedJob(part, groups[group], q, packed=False)
            case Packed(rows, q, "weight", group):
                _check_codes(name, rows, q, source)
                for part in _chunks(source, rows):
                    yield QuantizedJob(part, groups[group], q, packed=True)


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
) -> Iterator[DenseJob]:
    value = graph.model.graph.initializers[name]
    assert value.dtype is not None
    dtype = np.dtype(value.dtype.numpy())
    total = row_count(expr.rows)
    columns = region.length // (total * dtype.itemsize)
    if not expr.transposed:
        row_bytes = columns * dtype.itemsize
        for part in _chunks(source, expr.rows):
            place = Region(region.offset + part.start * row_bytes, row_bytes, len(part), row_bytes)
            yield DenseJob(part, (0, columns), place, dtype, expr)
        return
    stride = total * dtype.itemsize
    for first, last in evenly(columns, region.length, STRIP_BYTES):
        for part in _chunks(source, expr.rows, PANEL_ROWS):
            offset = region.offset + first * stride + part.start * dtype.itemsize
            place = Region(offset, len(part) * dtype.itemsize, last - first, stride)
            yield DenseJob(part, (first, last), place, dtype, expr)


def _chunks(source: WeightSource, rows: tuple[Rows, ...], multiple: int = 1) -> Iterator[RowsOf]:
    """Cut a concatenation of rows into ranges of about `CHUNK_BYTES`."""
    total = row_count(rows)
    nbytes = total * source.tensors[rows[0].tensor].row_nbytes
    for start, stop in evenly(total, nbytes, CHUNK_BYTES, multiple):
        yield RowsOf(source, rows, start, stop)


def _waiting(job: Job) -> int:
    """Bytes of a job's tensor that are filled while others before them are still missing."""
    match job:
        case DenseJob(region=strip) if job.expr.transposed:
            return strip.rows * strip.stride
        case QuantizedJob(regions=parts):
            return sum(region.length for part, region in parts.items() if part != "weight")
    return 0


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
