"""The error of a stored weight against the checkpoint's rows, whole and block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from phiconv.diagnosis.stored_weight import Format, StoredWeight

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint
    from phiconv.diagnosis.weight_map import WeightPart

# Rows are compared a few at a time, so that the arrays stay in the processor's caches.
_CHUNK_ELEMENTS = 1 << 18
# Blocks in which a weight that is not quantized is looked at.
_FLOAT_BLOCK = 32
# A block is bad when less than half of its energy is signal, and its error is not a trifle beside
# the mean block.
_BAD_RATIO = 0.5
_TRIFLE = 0.01
_SAMPLE_ROWS = 128


class Scales(NamedTuple):
    """Factors of rows [N] and columns [K] that take the checkpoint's weight to the stored one."""

    rows: NDArray[np.float32]
    columns: NDArray[np.float32]


@dataclass
class BlockErrors:
    """Sums over one weight.

    Attributes:
        signal: Sum of the checkpoint's squared weights.
        error: Sum of squared differences.
        blocks: Number of blocks.
        bad_blocks: How many of them hold more error than half of their signal.
        bad_error: Sum of squared differences in those.
        worst: Row, first and last column of the block with the greatest error, or None.
        finite: Whether every stored weight is finite.
    """

    signal: float = 0.0
    error: float = 0.0
    blocks: int = 0
    bad_blocks: int = 0
    bad_error: float = 0.0
    worst: tuple[int, int, int] | None = None
    finite: bool = True
    _worst_error: float = 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio, dB; infinite when nothing differs."""
        return decibel(self.signal, self.error)

    @property
    def sqnr_db_without_bad(self) -> float:
        """The same without the error of the bad blocks."""
        return decibel(self.signal, max(self.error - self.bad_error, 0.0))

    def add(
        self,
        first_row: int,
        expected: NDArray[np.float32],
        found: NDArray[np.float32],
        block_size: int,
    ) -> None:
        """Adds rows `[first_row, ...)`."""
        import numpy as np

        if not np.isfinite(found).all():
            self.finite = False
            found = np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
        difference = found - expected
        error = _block_sums(difference, block_size)
        signal = _block_sums(expected, block_size)
        bad = (error > _BAD_RATIO * signal) & (error > _TRIFLE * signal.mean())
        self.signal += float(signal.sum())
        self.error += float(error.sum())
        self.blocks += error.size
        self.bad_blocks += int(bad.sum())
        self.bad_error += float(error[bad].sum())
        greatest = int(error.argmax())
        if error.flat[greatest] > self._worst_error:
            self._worst_error = float(error.flat[greatest])
            row, block = divmod(greatest, error.shape[1])
            stop = min((block + 1) * block_size, expected.shape[1])
            self.worst = (first_row + row, block * block_size, stop - 1)


def decibel(signal: float, error: float) -> float:
    """10 log10 of a ratio of energies."""
    import math

    if error <= 0.0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf


def _block_sums(values: NDArray[np.float32], block_size: int) -> NDArray[np.float64]:
    """Sums of squares of blocks of columns, `[rows, blocks]`."""
    import numpy as np

    squares = np.square(values, dtype=np.float64)
    starts = np.arange(0, values.shape[1], block_size)
    sums: NDArray[np.float64] = np.add.reduceat(squares, starts, axis=1)
    return sums


def measure(
    part: WeightPart, weight: StoredWeight, checkpoint: Checkpoint, scales: Scales | None = None
) -> BlockErrors:
    """Compares a stored part with the checkpoint's rows, times `scales` where given.

    A norm's weight counts as one row.
    """
    errors = BlockErrors()
    block_size = weight.format.block_size or _FLOAT_BLOCK
    for start, stop in chunks(len(part), weight.shape):
        expected = checkpoint_rows(part, checkpoint, start, stop)
        found = weight.rows(part.start + start, part.start + stop)
        if scales is not None:
            expected = expected * scales.columns
            expected *= scales.rows[start:stop, None]
        if expected.ndim == 1:
            expected, found = expected[None], found[None]
        errors.add(start, expected, found, block_size)
    return errors


def checkpoint_rows(
    part: WeightPart, checkpoint: Checkpoint, start: int, stop: int
) -> NDArray[np.float32]:
    """Rows `[start, stop)` of what a part should equal, float32."""
    import numpy as np

    first = part.tensor_start
    rows: NDArray[np.float32] = checkpoint.read_rows(
        part.tensor, first + start, first + stop
    ).astype(np.float32)
    return rows


def chunks(rows: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are handled at once; all of them for a vector."""
    step = rows if len(shape) == 1 else max(1, _CHUNK_ELEMENTS // max(shape[1], 1))
    for start in range(0, rows, max(step, 1)):
        yield start, min(start + step, rows)


def expected_sqnr_db(part: WeightPart, weight: StoredWeight, checkpoint: Checkpoint) -> float:
    """SQNR that plain rounding of this very weight to this format has, from a sample of rows.

    For a format that `phiconv.kernels` does not write, about 6 dB a bit.
    """
    import numpy as np

    if len(weight.shape) == 1:
        rows = checkpoint_rows(part, checkpoint, 0, len(part))
    else:
        step = max(1, len(part) // _SAMPLE_ROWS)
        picked = range(0, len(part), step)
        rows = np.concatenate([checkpoint_rows(part, checkpoint, i, i + 1) for i in picked])
    if weight.format.quantized:
        if not _is_written_by_phiconv(weight.format):
            return 6.02 * weight.format.bits - 3
        stored = _round_to_blocks(rows, weight.format)
    else:
        stored = _round_to_float(rows, weight.format.dtype)
    difference = np.nan_to_num(stored - rows, posinf=0.0, neginf=0.0)
    return decibel(_energy(rows), _energy(difference))


def _energy(values: NDArray[np.float32]) -> float:
    import numpy as np

    return float(np.square(values, dtype=np.float64).sum())


def _round_to_float(rows: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    import ml_dtypes
    import numpy as np

    kinds = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
    with np.errstate(over="ignore"):
        rounded: NDArray[np.float32] = rows.astype(kinds.get(dtype, np.float32)).astype(np.float32)
    return rounded


def _is_written_by_phiconv(stored: Format) -> bool:
    from phiconv.kernels.matmulnbits import BLOCK_SIZES

    return stored.bits in (4, 8) and stored.block_size in BLOCK_SIZES


def _round_to_blocks(rows: NDArray[np.float32], stored: Format) -> NDArray[np.float32]:
    import numpy as np

    from phiconv.kernels import matmulnbits

    options = {"bits": stored.bits, "block_size": stored.block_size}
    shapes = matmulnbits.layout(*rows.shape, **options)
    packed = np.empty(shapes.packed, np.uint8)
    scales = np.empty(shapes.scales, np.float16 if stored.scale_dtype == "f16" else np.float32)
    zero_points = None if stored.symmetric else np.empty(shapes.zero_points, np.uint8)
    matmulnbits.quantize_rows(
        rows,
        bits=stored.bits,
        block_size=stored.block_size,
        symmetric=stored.symmetric,
        search="none",
        packed=packed,
        scales=scales,
        zero_points=zero_points,
    )
    return matmulnbits.dequantize_rows(
        packed,
        scales,
        zero_points,
        bits=stored.bits,
        block_size=stored.block_size,
        K=rows.shape[1],
        symmetric=stored.symmetric,
    )
