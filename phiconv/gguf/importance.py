"""Importance matrices: how strongly each input column of a matrix is used, in llama.cpp's format.

For every matrix the file holds the sum of squares of each column's inputs over all tokens, and how
many tokens there were; the quantizers weigh a column's error by the mean. llama-imatrix writes such
files and llama-quantize reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.errors import StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS = "imatrix.datasets"
_CHUNKS = "imatrix.chunk_count"
_CHUNK_SIZE = "imatrix.chunk_size"


@dataclass(frozen=True)
class ImportanceMatrix:
    """What was measured on some texts.

    Attributes:
        sums: Sum of the squares of each column's inputs, float32 [K], by GGUF tensor name.
        counts: Number of tokens, by the same names.
        datasets: Names of the texts.
        chunks: Number of windows.
        chunk_size: Tokens of a window.
    """

    sums: Mapping[str, NDArray[np.float32]]
    counts: Mapping[str, int]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int

    def means(self) -> dict[str, NDArray[np.float32]]:
        """Mean square of each column's inputs, float32 [K]; ones where nothing was counted."""
        import numpy as np

        return {
            name: sums / np.float32(self.counts[name]) if self.counts[name] else np.ones_like(sums)
            for name, sums in self.sums.items()
        }

    def save(self, path: Path) -> None:
        """Writes the file; equal matrices give equal bytes."""
        import gguf
        import numpy as np

        writer = gguf.GGUFWriter(path, arch="")
        writer.add_type("imatrix")
        writer.add_array(_DATASETS, list(self.datasets))
        writer.add_uint32(_CHUNKS, self.chunks)
        writer.add_uint32(_CHUNK_SIZE, self.chunk_size)
        for name in sorted(self.sums):
            writer.add_tensor(name + _SUMS, self.sums[name].astype(np.float32)[None])
            count = np.array([[self.counts[name]]], np.float32)
            writer.add_tensor(name + _COUNTS, count)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def load_importance(path: Path) -> ImportanceMatrix:
    """Reads a file of llama-imatrix, or of this module.

    Raises:
        StageError: It cannot be read, is no importance matrix, or holds what is no sum of squares.
    """
    import gguf
    import numpy as np

    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise _fault(path, f"not a GGUF file: {error}") from error
    tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    names = sorted(name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS))
    if not names or _text(reader, "general.type") != "imatrix":
        raise _fault(path, "not an importance matrix")
    sums, counts = {}, {}
    for name in names:
        values, count = tensors[name + _SUMS], tensors.get(name + _COUNTS)
        if count is None or count.size != 1 or (values.ndim == 2 and len(values) != 1):
            raise _fault(path, f"{name} is not one matrix with one count")
        if not (np.isfinite(values).all() and (values >= 0).all() and count >= 0):
            raise _fault(path, f"{name} holds what is no sum of squares")
        sums[name], counts[name] = values.reshape(-1), int(count.item())
    datasets = reader.fields[_DATASETS].contents() if _DATASETS in reader.fields else []
    chunks, size = (_number(reader, key) for key in (_CHUNKS, _CHUNK_SIZE))
    return ImportanceMatrix(sums, counts, tuple(datasets), chunks, size)


def _text(reader: object, key: str) -> str | None:
    field = getattr(reader, "fields", {}).get(key)
    return None if field is None else str(field.contents())


def _number(reader: object, key: str) -> int:
    field = getattr(reader, "fields", {}).get(key)
    return 0 if field is None else int(field.contents())


def _fault(path: Path, message: str) -> StageError:
    return StageError(
        message,
        where=str(path),
        remedy="give a file of llama-imatrix in its GGUF format (--output-format gguf)",
    )
