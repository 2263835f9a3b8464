"""The weights of AutoAWQ and GPTQ checkpoints: integer codes, read as what they stand for.

Such a checkpoint has for a weight `<module>.weight` [N, K] the tensors `<module>.qweight`,
`.qzeros`, `.scales` and, by GPTQ, `.g_idx`; `phiconv.kernels.int32_packing` says how they are
packed. Here they are a float32 weight that is read row by row, `(code - zero_point) * scale`
without any rounding, and codes that go into MatMulNBits as they are (`RoundedWeights`).

Everything is stored transposed, so rows cannot be read alone: a weight is unpacked as a whole, and
the two used last are kept (50 MB for Phi-3-mini).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.problems import combined, name_list
from phiconv.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from phiconv.checkpoint.stored_quantization import StoredQuantization
from phiconv.checkpoint.weight_source import Grid
from phiconv.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_SIZES = (256, 128, 64, 32, 16)
"""MatMulNBits' block sizes, the largest first."""

_WEIGHT, _QWEIGHT, _QZEROS, _SCALES = ".weight", ".qweight", ".qzeros", ".scales"
_G_IDX, _BIAS = ".g_idx", ".bias"
_PARTS = (_QWEIGHT, _QZEROS, _SCALES, _G_IDX, _BIAS)
_KEPT = 2


@dataclass(frozen=True)
class _Unpacked:
    """A whole weight in MatMulNBits' layout."""

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    zero_points: NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Packed:
    """Where a weight is stored and on what grid.

    Attributes:
        module: The weight's name without `.weight`.
        shape: `[N, K]`.
        grid: As MatMulNBits has it.
        repeat: Blocks that share a scale: several where a group is longer than any block.
        groups: Which of the stored groups each group of consecutive features belongs to.
    """

    module: str
    shape: tuple[int, int]
    grid: Grid
    repeat: int
    groups: NDArray[np.int64] | None


class PackedWeights:
    """The quantized weights of a checkpoint. Thread-safe.

    Args:
        quantization: The checkpoint's format.
        files: Its weight files.
        shapes: `[N, K]` of every weight that the architecture has, by tensor.
        where: The checkpoint's folder.

    Attributes:
        tensors: The grid of each weight, by tensor.

    Raises:
        CheckpointError: Something is missing, of another shape than the format says, or cannot be
            held by MatMulNBits. Everything found is reported.
    """

    def __init__(
        self,
        quantization: StoredQuantization,
        files: Mapping[str, SafetensorsFile],
        shapes: Mapping[str, tuple[int, ...]],
        where: Path,
    ):
        self._quantization = quantization
        self._files = files
        self._where = str(where)
        self._stored = {
            name: info for file in files.values() for name, info in file.tensors.items()
        }
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Unpacked] = OrderedDict()
        self._being_unpacked: dict[str, threading.Lock] = {}
        errors: list[CheckpointError] = []
        self._weights: dict[str, _Packed] = {}
        for name, shape in shapes.items():
            module = name.removesuffix(_WEIGHT)
            if module + _QWEIGHT not in self._stored:
                continue
            try:
                self._weights[name] = self._describe(module, shape)
            except CheckpointError as error:
                errors.append(error)
        if not errors and not self._weights:
            errors.append(self._error("quantization_config is present, but no weight is quantized"))
        if errors:
            raise combined(errors)
        self.tensors: Mapping[str, Grid] = {
            name: weight.grid for name, weight in self._weights.items()
        }

    def in_place_of_parts(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Of a checkpoint's tensors, those that are none of a quantized weight; and the weights."""
        parts = {weight.module + part for weight in self._weights.values() for part in _PARTS}
        left = {name: info for name, info in tensors.items() if name not in parts}
        for name, weight in self._weights.items():
            n, k = weight.shape
            file = self._stored[weight.module + _QWEIGHT].file
            left[name] = TensorInfo(name, "f32", (n, k), 4 * n * k, file, 0)
        return left

    def read_rows(
        self,
        name: str,
        start: int,
        *,
        packed: np.ndarray[Any, Any],
        scales: np.ndarray[Any, Any],
        zero_points: np.ndarray[Any, Any] | None,
    ) -> None:
        """See `RoundedWeights.read_rows`.

        Raises:
            CheckpointError: The files were changed, a scale is NaN or infinite, or there are zero
                points in a checkpoint that says it has none.
            ValueError: The arrays do not fit.
        """
        import numpy as np

        weight = self._unpacked(name)
        stop = start + len(packed)
        if packed.shape[1:] != weight.codes.shape[1:] or scales.shape != packed.shape[:2]:
            raise ValueError(f"{name} has codes of shape {list(weight.codes.shape)}")
        packed[...] = weight.codes[start:stop]
        with np.errstate(over="ignore"):  # what float16 cannot hold is the caller's to find
            scales[...] = weight.scales[start:stop]
        if (zero_points is None) != (weight.zero_points is None):
            raise ValueError("zero_points belong to asymmetric grids, and only to them")
        if zero_points is not None and weight.zero_points is not None:
            zero_points[...] = weight.zero_points[start:stop]

    def read_dense(
        self, name: str, start: int, stop: int, out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Rows `[start, stop)` of a weight, float32 `[n, K]`, in `out` if it is given.

        Raises:
            CheckpointError: As `read_rows`.
            IndexError: The weight has no such rows.
            ValueError: `out` does not fit.
        """
        import numpy as np

        from phiconv.kernels.matmulnbits import dequantize_rows

        stored = self._weights[name]
        if not 0 <= start <= stop <= stored.shape[0]:
            raise IndexError(f"{name} of shape {list(stored.shape)} has no rows [{start}, {stop})")
        shape = (stop - start, stored.shape[1])
        if out is not None and (out.dtype != np.float32 or out.shape != shape):
            raise ValueError(f"out must be float32 of shape {list(shape)}")
        weight = self._unpacked(name)
        zero_points = weight.zero_points
        rows = dequantize_rows(
            weight.codes[start:stop],
            weight.scales[start:stop].astype(np.float32),
            None if zero_points is None else zero_points[start:stop],
            bits=stored.grid.bits,
            block_size=stored.grid.group_size,
            K=stored.shape[1],
            symmetric=stored.grid.symmetric,
        )
        if out is None:
            return rows
        out[...] = rows
        return out

    def _describe(self, module: str, shape: tuple[int, ...]) -> _Packed:
        """Checks the stored tensors of one weight against its shape.

        Raises:
            CheckpointError: They do not fit it, or MatMulNBits does not fit them.
        """
        n, k = shape
        stored = self._quantization
        missing = [
            module + part for part in (_QZEROS, _SCALES) if module + part not in self._stored
        ]
        if missing:
            raise self._error(f"missing tensors: {name_list(missing)}")
        bits, group_size = self._bits(module, k), self._group_size(module, k)
        block = next((size for size in BLOCK_SIZES if group_size % size == 0), None)
        if group_size in BLOCK_SIZES:
            block = group_size
        if block is None or (block != group_size and k % group_size):
            raise self._error(
                f"{module} has groups of {group_size} features, which no block size of MatMulNBits "
                f"({', '.join(map(str, sorted(BLOCK_SIZES)))}) divides"
            )
        groups = -(-k // group_size)
        pack = 32 // bits
        weight = (k, n // 8) if stored.method == "awq" else (-(-k // pack), n)
        expected = {_QWEIGHT: weight, _QZEROS: (groups, n // pack), _SCALES: (groups, n)}
        for part, wanted in expected.items():
            found = self._stored[module + part]
            integers = part != _SCALES
            if found.shape != wanted or n % pack or (found.dtype == "i32") != integers:
                raise self._error(
                    f"{module}{part} is {found.dtype} {list(found.shape)}, not "
                    f"{'i32' if integers else 'floating point'} {list(wanted)}"
                )
        return _Packed(
            module,
            (n, k),
            Grid(bits, block, stored.symmetric),
            group_size // block,
            self._group_order(module, k, group_size),
        )

    def _bits(self, module: str, k: int) -> int:
        if not self._quantization.varies:
            return self._quantization.bits
        rows = self._stored[module + _QWEIGHT].shape[0]
        bits = next((bits for bits in (4, 8) if rows == -(-k * bits // 32)), None)
        if bits is None:
            raise self._error(f"{module} has neither 4 nor 8 bits a weight")
        return bits

    def _group_size(self, module: str, k: int) -> int:
        if not self._quantization.varies:
            size = self._quantization.group_size
            return k if size == -1 else size
        groups = self._stored[module + _SCALES].shape[0]
        return -(-k // groups)

    def _group_order(self, module: str, k: int, group_size: int) -> NDArray[np.int64] | None:
        """Which stored group each group of consecutive features has; None where in order.

        Raises:
            CheckpointError: The features of a group do not lie together.
        """
        import numpy as np

        name = module + _G_IDX
        if name not in self._stored:
            return None
        info = self._stored[name]
        groups = -(-k // group_size)
        if info.shape != (k,) or info.dtype != "i32":
            raise self._error(f"{name} is {info.dtype} of shape {list(info.shape)}, not i32 [{k}]")
        order = self._read(name).astype(np.int64)
        if not np.array_equal(order, np.repeat(order[::group_size], group_size)[:k]):
            raise self._error(
                f"{module} was quantized with act-order (desc_act): features that share a scale do "
                "not lie together, as MatMulNBits' blocks do",
                remedy="take a checkpoint that was quantized without desc_act, or the original",
            )
        first = order[::group_size]
        if not ((first >= 0) & (first < groups)).all():
            raise self._error(f"{name} names groups that there are not")
        return None if np.array_equal(first, np.arange(groups)) else first

    def _unpacked(self, name: str) -> _Unpacked:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
            busy = self._being_unpacked.setdefault(name, threading.Lock())
        with busy:
            with self._lock:
                if name in self._kept:
                    return self._kept[name]
            weight = self._unpack(name)
            with self._lock:
                self._kept[name] = weight
                self._being_unpacked.pop(name, None)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return weight

    def _unpack(self, name: str) -> _Unpacked:
        import numpy as np

        from phiconv.kernels.int32_packing import block_zero_points, unpack_awq, unpack_gptq

        weight = self._weights[name]
        (n, k), grid = weight.shape, weight.grid
        qweight = self._read(weight.module + _QWEIGHT)
        rows = unpack_awq(qweight) if self._quantization.method == "awq" else unpack_gptq(qweight)
        blocks, block_bytes = -(-k // grid.group_size), grid.group_size * grid.bits // 8
        codes = np.zeros((n, blocks * block_bytes), np.uint8)
        codes[:, : rows.shape[1]] = rows
        scales = self._blocks(self._read(weight.module + _SCALES).T, weight)
        if not np.isfinite(scales.astype(np.float32)).all():
            raise self._error(f"{weight.module}{_SCALES} holds NaN or Inf")
        zero_points = self._zero_points(weight)
        self._check_bias(weight.module)
        if grid.symmetric:
            if (zero_points != 1 << grid.bits - 1).any():
                raise self._error(
                    f"{weight.module}{_QZEROS} holds other values than the middle code, but "
                    "quantization_config says sym"
                )
            return _Unpacked(codes.reshape(n, blocks, block_bytes), scales, None)
        packed = block_zero_points(self._blocks(zero_points, weight), grid.bits)
        return _Unpacked(codes.reshape(n, blocks, block_bytes), scales, packed)

    def _zero_points(self, weight: _Packed) -> NDArray[np.uint8]:
        """Zero points of each stored group, `[N, groups]`."""
        import numpy as np

        from phiconv.kernels.int32_packing import unpack_zero_points

        stored = self._quantization
        values = unpack_zero_points(
            self._read(weight.module + _QZEROS),
            bits=weight.grid.bits,
            awq_order=stored.method == "awq",
        )
        # AutoGPTQ stores one less, modulo the number of codes
        return values + np.uint8(stored.zero_offset) & np.uint8((1 << weight.grid.bits) - 1)

    def _blocks(self, values: NDArray[Any], weight: _Packed) -> NDArray[Any]:
        """What each stored group has, for each block: `[N, blocks]`."""
        import numpy as np

        if weight.groups is not None:
            values = values[:, weight.groups]
        if weight.repeat > 1:
            values = np.repeat(values, weight.repeat, axis=1)
        return np.ascontiguousarray(values)

    def _check_bias(self, module: str) -> None:
        """Phi-3 has no biases; AutoGPTQ stores zeros for them."""
        if module + _BIAS in self._stored and self._read(module + _BIAS).any():
            raise self._error(f"{module}{_BIAS} is not zero, but Phi3ForCausalLM has no biases")

    def _read(self, name: str) -> np.ndarray[Any, Any]:
        info = self._stored[name]
        return self._files[info.file].read_items(info, 0, info.shape)

    def _error(self, message: str, remedy: str | None = None) -> CheckpointError:
        return CheckpointError(
            message,
            where=self._where,
            remedy=remedy or "use the checkpoint in its original bf16, fp16 or fp32 form",
        )
