"""The error of a stored weight against the checkpoint's rows, whole and block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from phiconv.diagnosis.weight_format import Format, StoredWeight

GGML_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""Types of ggml that `phiconv.kernels.ggml` rounds to."""

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint
    from phiconv.diagnosis.weight_part import WeightPart

# Rows are compared a few at a time, so that the arrays stay in the processor's caches.
_CHUNK_ELEMENTS = 1 << 18
# Blocks in which a weight that is not quantized is looked at.
_FLOAT_BLOCK = 32
# A block is bad when its error is this many times what plain rounding has, and this many times that
# of the worst blocks of other rows: GPTQ's errors are greater, and less alike. On tiny-phi3, with
# outlier channels and without, the worst sound blocks have up to 127 and 3 times that; one whose
# scale is halved has 31 and 8.
_BEYOND_FORMAT, _BEYOND_OTHERS = 12.0, 5.0
# The worst blocks of this many rows are not among the others: they may be the bad ones.
_SET_ASIDE = 2
# But never when less than this share of its energy is error; and where nothing is known of the
# format, when more than that is.
_LEAST_BAD, _SURELY_BAD = 1e-4, 0.5
# Rounding that minds some columns a thousand times as much as others may give single blocks away,
# but hardly makes their error greater than their energy.
_IMPOSSIBLE = 1.25
# Nor is it when its error is a trifle beside the mean block.
_TRIFLE = 0.02
_SAMPLE_ROWS = 128
# Sums of float32 squares that are smaller are computed in float64.
_SMALLEST = 1e-30


class Scales(NamedTuple):
    """Factors of rows [N] and columns [K] that take the checkpoint's weight to the stored one."""

    rows: NDArray[np.float32]
    columns: NDArray[np.float32]


@dataclass
class BlockErrors:
    """Sums over one weight.

    Attributes:
        bad_ratio: Beyond which share of its signal the error of a block is bad.
        signal: Sum of the checkpoint's squared weights.
        error: Sum of squared differences.
        blocks: Number of blocks.
        bad_blocks: How many of them hold more error than `bad_ratio` of their signal.
        bad_error: Sum of squared differences in those.
        worst: Row, first and last column of the block with the greatest error, or None.
        finite: Whether every stored weight is finite.
    """

    bad_ratio: float = _SURELY_BAD
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
        bad = (error > self.bad_ratio * signal) & (error > self.bad_ratio * _TRIFLE * signal.mean())
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

    rows, width = values.shape
    if width % block_size == 0:
        blocks = values.reshape(rows, -1, block_size)
        with np.errstate(over="ignore"):
            sums = np.einsum("rbk,rbk->rb", blocks, blocks)
        # float32 is enough unless squares leave its range
        if np.isfinite(sums).all() and (sums > _SMALLEST).all():
            wide: NDArray[np.float64] = sums.astype(np.float64)
            return wide
    squares = np.square(values, dtype=np.float64)
    exact: NDArray[np.float64] = np.add.reduceat(squares, np.arange(0, width, block_size), axis=1)
    return exact


def measure(
    part: WeightPart,
    weight: StoredWeight,
    checkpoint: Checkpoint,
    scales: Scales | None = None,
    *,
    expected_db: float | None = None,
    undone: bool = False,
) -> BlockErrors:
    """Compares a stored part with the checkpoint's rows.

    A norm's weight counts as one row.

    Args:
        part: The part.
        weight: Its stored weight.
        checkpoint: What it should equal.
        scales: What the checkpoint's rows are multiplied by before.
        expected_db: What `expected_sqnr_db` says of it, which decides which blocks are bad; without
            it those are that hold more error than half of their signal.
        undone: Whether it is the stored weight that is divided by the scales instead: then no
            channel counts more than it does in the checkpoint.
    """
    errors = BlockErrors(_bad_ratio(part, weight, checkpoint, scales, expected_db))
    block_size = weight.format.block_size or _FLOAT_BLOCK
    for start, stop in chunks(len(part), weight.shape):
        expected, found = _both(part, weight, checkpoint, scales, (start, stop), undone=undone)
        errors.add(start, expected, found, block_size)
    return errors


def _both(
    part: WeightPart,
    weight: StoredWeight,
    checkpoint: Checkpoint,
    scales: Scales | None,
    rows: tuple[int, int],
    *,
    undone: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows of a part as they should be, and as they are; see `measure`."""
    start, stop = rows
    expected = checkpoint_rows(part, checkpoint, start, stop)
    found = weight.rows(part.start + start, part.start + stop)
    if scales is not None and undone:
        found = _divided(_divided(found, scales.columns), scales.rows[start:stop, None])
    elif scales is not None:
        expected = expected * scales.columns
        expected *= scales.rows[start:stop, None]
    return (expected[None], found[None]) if expected.ndim == 1 else (expected, found)


def _bad_ratio(
    part: WeightPart,
    weight: StoredWeight,
    checkpoint: Checkpoint,
    scales: Scales | None,
    expected_db: float | None,
) -> float:
    """Beyond which share of its energy the error of a block is neither its format's nor its kind's.

    The weight's own blocks are looked at in a sample of rows.
    """
    import numpy as np

    if expected_db is None:
        return _SURELY_BAD
    by_format = max(_LEAST_BAD, _BEYOND_FORMAT * 10 ** (-expected_db / 10))
    if weight.format.weighted:
        return max(_IMPOSSIBLE, by_format)
    if len(weight.shape) == 1:
        return min(_SURELY_BAD, by_format)
    block_size = weight.format.block_size or _FLOAT_BLOCK
    worst = []
    for row in _sampled(len(part)):
        expected, found = _both(part, weight, checkpoint, scales, (row, row + 1))
        signal = _block_sums(expected, block_size)
        error = _block_sums(np.nan_to_num(found - expected), block_size)
        worst.append(float((error[signal > 0] / signal[signal > 0]).max(initial=0.0)))
    others = sorted(worst)[:-_SET_ASIDE] or [0.0]
    return min(max(by_format, _BEYOND_OTHERS * others[-1]), max(_IMPOSSIBLE, by_format))


def _sampled(rows: int) -> range:
    """Indices of about `_SAMPLE_ROWS` rows, evenly spread."""
    return range(0, rows, max(1, rows // _SAMPLE_ROWS))


def _divided(values: NDArray[np.float32], factors: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    quotient: NDArray[np.float32] = np.divide(values, np.where(factors == 0, 1, factors))
    return quotient.astype(np.float32, copy=False)


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
        picked = _sampled(len(part))
        rows = np.concatenate([checkpoint_rows(part, checkpoint, i, i + 1) for i in picked])
    if not weight.format.quantized:
        stored = _round_to_float(rows, weight.format.dtype)
    elif weight.format.dtype in GGML_TYPES:
        stored = _round_to_ggml(rows, weight.format.dtype)
    elif _is_matmulnbits(weight.format):
        stored = _round_to_blocks(rows, weight.format)
    else:
        return 6.02 * weight.format.bits - 3
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


def _is_matmulnbits(stored: Format) -> bool:
    from phiconv.kernels.matmulnbits import BLOCK_SIZES

    is_known = stored.bits in (4, 8) and stored.block_size in BLOCK_SIZES
    return stored.dtype == "int" and is_known


def _round_to_ggml(rows: NDArray[np.float32], type_name: str) -> NDArray[np.float32]:
    import numpy as np

    from phiconv.kernels import ggml

    width = rows.shape[1]
    packed = np.empty((len(rows), ggml.row_nbytes(type_name, width)), np.uint8)
    ggml.quantize_rows(rows, type_name, packed)
    return ggml.dequantize_rows(packed, type_name, width)


def _round_to_blocks(rows: NDArray[np.float32], stored: Format) -> NDArray[np.float32]:
    import numpy as np

    from phiconv.kernels import matmulnbits

    options = {"bits": int(stored.bits), "block_size": stored.block_size}
    shapes = matmulnbits.layout(*rows.shape, **options)
    packed = np.empty(shapes.packed, np.uint8)
    scales = np.empty(shapes.scales, np.float16 if stored.scale_dtype == "f16" else np.float32)
    zero_points = None if stored.symmetric else np.empty(shapes.zero_points, np.uint8)
    matmulnbits.quantize_rows(
        rows,
        bits=int(stored.bits),
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
        bits=int(stored.bits),
        block_size=stored.block_size,
        K=rows.shape[1],
        symmetric=stored.symmetric,
    )
