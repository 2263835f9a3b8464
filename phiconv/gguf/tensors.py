"""The tensors of a GGUF file as float32 rows, dequantized by gguf's own code.

Not by `phiconv.kernels`, which writes such files: a mistake in one must not hide in the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.errors import StageError

_IMPORTANCE = "quantize.imatrix."

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor.

    Attributes:
        name: Its name in the file.
        shape: Rows first; GGUF itself counts columns first.
        type: `gguf.GGMLQuantizationType`.
        data: Its rows as they are mapped: uint8 `[N, bytes of a row]`, or floats.
    """

    name: str
    shape: tuple[int, ...]
    type: Any
    data: NDArray[Any]

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `[start, stop)` as float32, a copy.

        Raises:
            StageError: gguf does not read its type.
        """
        import numpy as np
        from gguf.quants import dequantize

        try:
            with np.errstate(all="ignore"):  # a corrupt block may hold anything
                return np.array(dequantize(self.data[start:stop], self.type), np.float32)
        except NotImplementedError as error:
            raise StageError(
                f"{self.name} is {self.type.name}, which gguf does not read"
            ) from error


class GgufTensors(Mapping[str, GgufTensor]):
    """Those of a file by their names; nothing is read before rows are asked for.

    Args:
        file: The file.

    Raises:
        StageError: It is no GGUF file.

    Attributes:
        weighted: Whether they were rounded with an importance matrix.
    """

    def __init__(self, file: Path):
        import gguf

        try:
            reader = gguf.GGUFReader(file)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise StageError(f"not a GGUF file: {error}", where=str(file)) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.weighted = any(key.startswith(_IMPORTANCE) for key in reader.fields)

    def __getitem__(self, name: str) -> GgufTensor:
        tensor = self._tensors[name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return GgufTensor(name, shape, tensor.tensor_type, tensor.data)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
