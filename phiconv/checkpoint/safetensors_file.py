"""One safetensors file: its header, checked against the file, and reads of tensor rows.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes, the little-endian length
of the header; the header, a JSON object of `name -> {dtype, shape, data_offsets}`; the tensors'
bytes, little-endian, row-major, without holes.

Nothing is memory-mapped: mapped pages count as resident memory, and a file truncated under a
mapping kills the process instead of raising.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phiconv.checkpoint.json_object import parse_json_object
from phiconv.checkpoint.problems import name_list
from phiconv.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

StoredDtype = Literal["bf16", "f16", "f32", "u8", "i32"]

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32
MAX_DIMENSION = 2**63 - 1

FLOATS: Mapping[str, tuple[StoredDtype, int]] = {
    "BF16": ("bf16", 2),
    "F16": ("f16", 2),
    "F32": ("f32", 4),
}
"""The format's names of what a checkpoint stores, each with its item's bytes."""
NUMBERS: Mapping[str, tuple[StoredDtype, int]] = {**FLOATS, "U8": ("u8", 1), "I32": ("i32", 4)}
"""Those, and the integers that quantized weights are packed into."""
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where and how a tensor is stored.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Its stored dtype.
        shape: Its shape, row-major.
        nbytes: Its bytes.
        file: The name of the file that holds it, relative to the checkpoint's folder.
        offset: Where its first byte stands in that file.
    """

    name: str
    dtype: StoredDtype
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row: one index of the first axis."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else 0


def numpy_dtype(dtype: StoredDtype) -> np.dtype[Any]:
    """The NumPy dtype of a stored dtype; bf16 is `ml_dtypes.bfloat16`."""
    import ml_dtypes
    import numpy as np

    scalars: dict[StoredDtype, Any] = {
        "bf16": ml_dtypes.bfloat16,
        "f16": np.float16,
        "f32": np.float32,
        "u8": np.uint8,
        "i32": np.int32,
    }
    result: np.dtype[Any] = np.dtype(scalars[dtype])
    return result


class SafetensorsFile:
    """A safetensors file with a valid header.

    Thread-safe: every read opens its own unbuffered handle, so reads share no position and none
    stays open (an open file could not be replaced on Windows). Reads release the GIL.

    Attributes:
        path: The file.
        name: Its name, relative to the checkpoint's folder.
        tensors: Its tensors by name, in the order in which they are stored.
    """

    def __init__(
        self, path: Path, name: str, dtypes: Mapping[str, tuple[StoredDtype, int]] = FLOATS
    ):
        """Reads and checks the header.

        Args:
            path: The file.
            name: Its name, relative to the checkpoint's folder.
            dtypes: The dtypes that its tensors may have: `FLOATS` or `NUMBERS`.

        Raises:
            CheckpointError: The file is unreadable, truncated or malformed, or stores a tensor in
                another dtype.
        """
        self.path = path
        self.name = name
        try:
            with path.open("rb", buffering=0) as handle:
                status = os.fstat(handle.fileno())
                header, data_start = _read_header(handle, status.st_size, str(path))
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
        self._identity = _identity(status)
        self.tensors: Mapping[str, TensorInfo] = _parse_tensors(
            header, data_start, status.st_size, name, str(path), dtypes
        )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the file's bytes from `offset` on.

        Args:
            offset: Position in the file, in bytes.
            buffer: Writable, contiguous, one byte an item.

        Raises:
            CheckpointError: The file was changed, truncated or removed since it was opened.
        """
        try:
            with self.path.open("rb", buffering=0) as handle:
                if _identity(os.fstat(handle.fileno())) != self._identity:
                    raise _changed(str(self.path))
                handle.seek(offset)
                done = 0
                while done < len(buffer):
                    # one call reads at most 2 GiB on Linux and Windows
                    count = handle.readinto(buffer[done:])
                    if not count:
                        raise _changed(str(self.path))
                    done += count
        except OSError as error:
            raise CheckpointError(
                f"cannot be read any more: {error.strerror}", where=str(self.path)
            ) from error

    def read_rows(
        self, name: str, start: int, stop: int, out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Reads rows `[start, stop)` of a tensor's first axis.

        Args:
            name: The tensor.
            start: The first row.
            stop: One past the last row.
            out: Where to read to: C-contiguous, of shape `[stop - start, ...]` and of the stored
                dtype, or uint16 for the bits of bf16. By default a new array.

        Returns:
            `out`, or the new array; bf16 has the dtype `ml_dtypes.bfloat16`.

        Raises:
            CheckpointError: The file was changed since it was opened.
            IndexError: The tensor has no such rows.
            KeyError: There is no such tensor.
            ValueError: `out` does not fit.
        """
        info = self.tensors[name]
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"{name} of shape {list(info.shape)} has no rows [{start}, {stop})")
        return self.read_items(info, start, (stop - start, *info.shape[1:]), out)

    def read_items(
        self,
        info: TensorInfo,
        start: int,
        shape: tuple[int, ...],
        out: np.ndarray[Any, Any] | None = None,
    ) -> np.ndarray[Any, Any]:
        """Reads an array of `shape` that begins at row `start` of a tensor; see `read_rows`."""
        import numpy as np

        dtype = numpy_dtype(info.dtype)
        if out is None:
            out = np.empty(shape, dtype)
        elif out.dtype != dtype and not (info.dtype == "bf16" and out.dtype == np.uint16):
            raise ValueError(f"out is {out.dtype}, but {info.name} is {info.dtype}")
        elif out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out must be writable, C-contiguous and of shape {list(shape)}")
        if out.nbytes:
            buffer = out.reshape(-1).view(np.uint8).data
            self.read_into(info.offset + start * info.row_nbytes, buffer)
        return out


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read_header(handle: FileIO, size: int, where: str) -> tuple[dict[str, Any], int]:
    """Returns the header and the position of the first data byte."""
    start = _read_exactly(handle, min(size, len(_LFS_POINTER)), where)
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(
            "this is a Git LFS pointer, not the weights",
            where=where,
            remedy="run `git lfs pull` in the checkpoint's repository",
        )
    if size < 8:
        raise _truncated(where, "at least 8", size)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(
            f"not a safetensors file: its header would be {length} bytes long "
            f"(the limit is {MAX_HEADER_BYTES})",
            where,
        )
    if size < 8 + length:
        raise _truncated(where, f"at least {8 + length}", size)
    handle.seek(8)
    data = _read_exactly(handle, length, where)
    if not data.startswith(b"{"):
        raise _damaged("not a safetensors file: its header is no JSON object", where)
    return parse_json_object(data, f"{where} (header)"), 8 + length


def _read_exactly(handle: FileIO, count: int, where: str) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = handle.read(count - len(data))
        if not part:
            raise _changed(where)
        data += part
    return bytes(data)


def _parse_tensors(
    header: dict[str, Any],
    data_start: int,
    size: int,
    file: str,
    where: str,
    dtypes: Mapping[str, tuple[StoredDtype, int]],
) -> dict[str, TensorInfo]:
    """Checks every entry, that the byte ranges tile the data, and the file's length."""
    ranges: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    unsupported: dict[str, str] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _parse_entry(name, entry, where)
        ranges.append((begin, end, name))
        if dtype not in dtypes:
            unsupported[name] = dtype
            continue
        stored, itemsize = dtypes[dtype]
        nbytes = math.prod(shape) * itemsize
        if end - begin != nbytes:
            raise _damaged(
                f"tensor {name!r}: {dtype} of shape {list(shape)} takes {nbytes} bytes, "
                f"but its data_offsets span {end - begin}",
                f"{where} (header)",
            )
        tensors[name] = TensorInfo(name, stored, shape, nbytes, file, data_start + begin)
    _check_tiling(sorted(ranges), size, data_start, where)
    if unsupported:
        raise _unsupported_dtypes(unsupported, tuple(dtypes), where)
    return dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[0])))


def _parse_entry(name: str, entry: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    def malformed(what: str) -> CheckpointError:
        return _damaged(f"tensor {name!r}: {what}", f"{where} (header)")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise malformed("its entry must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise malformed("its dtype must be a string")
    if not _natural_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise malformed("its shape must be a list of non-negative integers")
    if not _natural_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise malformed("its data_offsets must be two integers [begin, end]")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _natural_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= MAX_DIMENSION for item in value
    )


def _check_tiling(
    ranges: list[tuple[int, int, str]], size: int, data_start: int, where: str
) -> None:
    """The byte ranges must cover the data exactly once, and the file must end with them."""
    position = 0
    for begin, end, name in ranges:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole"
            raise _damaged(
                f"tensor {name!r} {fault}: it begins at byte {begin} of the data, not {position}",
                f"{where} (header)",
            )
        position = end
    expected = data_start + position
    if size < expected:
        raise _truncated(where, str(expected), size)
    if size > expected:
        raise _damaged(
            f"the file is {size} bytes long, but its header accounts for {expected}", where
        )


def _damaged(message: str, where: str) -> CheckpointError:
    return CheckpointError(message, where=where, remedy="download or copy this file again")


def _truncated(where: str, expected: str, actual: int) -> CheckpointError:
    return _damaged(f"the file is truncated: expected {expected} bytes, found {actual}", where)


def _changed(where: str) -> CheckpointError:
    return CheckpointError(
        "the file was changed while it was in use",
        where=where,
        remedy="run again once nothing writes to the checkpoint",
    )


def _unsupported_dtypes(
    dtypes: dict[str, str], supported: tuple[str, ...], where: str
) -> CheckpointError:
    *first, last = supported
    found = ", ".join(sorted(set(dtypes.values())))
    return CheckpointError(
        f"only {', '.join(first)} and {last} are supported, but {found} is the dtype of "
        f"{name_list(sorted(dtypes))}",
        where=where,
        remedy="use the checkpoint in its original bf16, fp16 or fp32 form",
    )
