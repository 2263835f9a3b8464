"""Writes a safetensors file tensor by tensor, so that it need not fit into memory.

Equal tensors give equal bytes, whatever the order in which they are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.safetensors_file import numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    from phiconv.checkpoint.safetensors_file import StoredDtype

_NAMES: Mapping[StoredDtype, str] = {
    "bf16": "BF16",
    "f16": "F16",
    "f32": "F32",
    "u8": "U8",
    "i32": "I32",
}
_ALIGNMENT = 8


class SafetensorsWriter:
    """A safetensors file whose tensors are known by dtype and shape before any is there.

    Tensors lie in the file by falling size of their items, then by name, as the safetensors
    library has them, so that each is aligned. A context manager: leaving it without an error
    checks that every tensor was written.

    Args:
        path: The file; replaced if it exists.
        tensors: dtype and shape by name.
        metadata: Texts for the header's `__metadata__`.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[StoredDtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        self._missing = set(tensors)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in sorted(tensors, key=lambda name: (-_item_bytes(tensors[name][0]), name)):
            dtype, shape = tensors[name]
            self._offsets[name] = end
            end += math.prod(shape) * _item_bytes(dtype)
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [self._offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
        self._data_start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data_start + end)

    def write(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Writes a whole tensor.

        Raises:
            KeyError: The file has no such tensor.
            ValueError: Its dtype or shape is another.
        """
        dtype, shape = self._tensors[name]
        if array.dtype != numpy_dtype(dtype) or array.shape != shape:
            raise ValueError(
                f"{name} is {dtype} of shape {list(shape)}, not {array.dtype} of shape "
                f"{list(array.shape)}"
            )
        self._write(name, 0, array)
        self._missing.discard(name)

    def write_rows(self, name: str, start: int, array: np.ndarray[Any, Any]) -> None:
        """Writes rows of a tensor's first axis from `start` on; they must come in order.

        Raises:
            KeyError: The file has no such tensor.
            ValueError: Its dtype or shape is another.
        """
        dtype, shape = self._tensors[name]
        stop = start + len(array)
        fits = array.shape[1:] == shape[1:] and stop <= shape[0]
        if array.dtype != numpy_dtype(dtype) or not fits:
            raise ValueError(
                f"{name} is {dtype} of shape {list(shape)}, which {array.dtype} of shape "
                f"{list(array.shape)} does not fit from row {start} on"
            )
        self._write(name, start * math.prod(shape[1:]) * array.itemsize, array)
        if stop == shape[0]:
            self._missing.discard(name)

    def _write(self, name: str, offset: int, array: np.ndarray[Any, Any]) -> None:
        import numpy as np

        self._file.seek(self._data_start + self._offsets[name] + offset)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is None and self._missing:
            raise ValueError(f"never written: {', '.join(sorted(self._missing))}")


def _item_bytes(dtype: StoredDtype) -> int:
    return int(numpy_dtype(dtype).itemsize)
