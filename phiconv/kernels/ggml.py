"""ggml's block formats by name: sizes, quantizers with and without importance matrix, inverses.

The bytes are those of `ggml_quantize_chunk` of llama.cpp (ggml 0.26.0, October 2026) on x86-64,
where no compiler contracts its quantizers to fused multiply-adds, and the same on every machine.
An ARM64 build of ggml does contract them, and now and then chooses another scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from phiconv.kernels import ggml_legacy, ggml_legacy_weighted, ggml_q4_q5_k, ggml_q6_k
from phiconv.kernels.floats import bit_view, cast_rows

Array = npt.NDArray[Any]


class GgmlType(NamedTuple):
    """One of ggml's tensor types.

    Attributes:
        type_id: `ggml_type` of ggml.h, which GGUF files carry.
        block_size: Values of a block; rows are whole blocks.
        block_bytes: Bytes of a block.
    """

    type_id: int
    block_size: int
    block_bytes: int


TYPES: dict[str, GgmlType] = {
    "F32": GgmlType(0, 1, 4),
    "F16": GgmlType(1, 1, 2),
    "Q4_0": GgmlType(2, 32, 18),
    "Q4_1": GgmlType(3, 32, 20),
    "Q5_0": GgmlType(6, 32, 22),
    "Q5_1": GgmlType(7, 32, 24),
    "Q8_0": GgmlType(8, 32, 34),
    "Q4_K": GgmlType(12, 256, 144),
    "Q5_K": GgmlType(13, 256, 176),
    "Q6_K": GgmlType(14, 256, 210),
    "BF16": GgmlType(30, 1, 2),
}

_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_NO_IMPORTANCE = np.empty(0, np.float32)

# Called with source, source_format and out.
_PLAIN: dict[str, Callable[..., bool]] = {
    "Q4_0": partial(ggml_legacy.quantize_symmetric, five_bits=False),
    "Q4_1": partial(ggml_legacy.quantize_affine, five_bits=False),
    "Q5_0": partial(ggml_legacy.quantize_symmetric, five_bits=True),
    "Q5_1": partial(ggml_legacy.quantize_affine, five_bits=True),
    "Q8_0": ggml_legacy.quantize_bytes,
    "Q4_K": partial(ggml_q4_q5_k.quantize_plain, five_bits=False),
    "Q5_K": partial(ggml_q4_q5_k.quantize_plain, five_bits=True),
    "Q6_K": partial(ggml_q6_k.quantize, importance=_NO_IMPORTANCE),
}

# Called with source, source_format, importance and out. Q8_0 has no use for importance.
_WEIGHTED: dict[str, Callable[..., bool]] = {
    "Q4_0": partial(ggml_legacy_weighted.quantize_symmetric, five_bits=False),
    "Q4_1": partial(ggml_legacy_weighted.quantize_affine, five_bits=False),
    "Q5_0": partial(ggml_legacy_weighted.quantize_symmetric, five_bits=True),
    "Q5_1": partial(ggml_legacy_weighted.quantize_affine, five_bits=True),
    "Q4_K": partial(ggml_q4_q5_k.quantize_weighted, five_bits=False),
    "Q5_K": partial(ggml_q4_q5_k.quantize_weighted, five_bits=True),
    "Q6_K": ggml_q6_k.quantize,
}

# Called with blocks and out.
_DEQUANTIZE: dict[str, Callable[..., None]] = {
    "Q4_0": partial(ggml_legacy.dequantize, five_bits=False, affine=False),
    "Q4_1": partial(ggml_legacy.dequantize, five_bits=False, affine=True),
    "Q5_0": partial(ggml_legacy.dequantize, five_bits=True, affine=False),
    "Q5_1": partial(ggml_legacy.dequantize, five_bits=True, affine=True),
    "Q8_0": ggml_legacy.dequantize_bytes,
    "Q4_K": partial(ggml_q4_q5_k.dequantize, five_bits=False),
    "Q5_K": partial(ggml_q4_q5_k.dequantize, five_bits=True),
    "Q6_K": ggml_q6_k.dequantize,
}


def row_nbytes(type_name: str, k: int) -> int:
    """Bytes of a row of `k` values.

    Raises:
        ValueError: `type_name` is not in `TYPES`, or `k` not a multiple of its block size.
    """
    if type_name not in TYPES:
        raise ValueError(f"{type_name!r} is none of {', '.join(TYPES)}")
    _, block_size, block_bytes = TYPES[type_name]
    if k % block_size:
        raise ValueError(f"{type_name} wants rows in blocks of {block_size}, not of {k} values")
    return k // block_size * block_bytes


def quantize_rows(
    weight: Array, type_name: str, out: Array, importance: Array | None = None
) -> bool:
    """Quantizes as `ggml_quantize_chunk` does.

    Args:
        weight: `[n, K]`, C-contiguous; bfloat16 (or its bits as uint16), float16 or float32.
        type_name: One of `TYPES`.
        out: Receives uint8 `[n, row_nbytes(type_name, K)]`, C-contiguous.
        importance: float32 `[K]`, the importance matrix's mean square activations, by which the
            searches weigh columns; floats and Q8_0 ignore it. None is another algorithm than ones.

    Returns:
        Whether every weight is finite. What is written where one is not is not defined.

    Raises:
        ValueError: Type, shapes, dtypes or layouts do not fit.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, not of shape {weight.shape}")
    n, k = weight.shape
    source, source_format = bit_view(weight, "weight")
    _check_bytes(out, (n, row_nbytes(type_name, k)), "out")
    if importance is not None and (importance.shape != (k,) or importance.dtype != np.float32):
        raise ValueError(f"importance must be float32 [{k}]")
    if weight.size == 0:
        return True
    if type_name in _FLOATS:
        return cast_rows(weight, out.view(_FLOATS[type_name])).finite
    source = source.reshape(-1).view(np.uint16)
    blocks = out.reshape(-1, TYPES[type_name].block_bytes)
    if importance is not None and type_name in _WEIGHTED:
        importance = np.ascontiguousarray(importance)
        return bool(_WEIGHTED[type_name](source, source_format, importance=importance, out=blocks))
    return bool(_PLAIN[type_name](source, source_format, out=blocks))


def dequantize_rows(blocks: Array, type_name: str, k: int) -> npt.NDArray[np.float32]:
    """What ggml's `to_float` makes of quantized rows.

    Args:
        blocks: uint8 `[n, row_nbytes(type_name, k)]`, C-contiguous.
        type_name: One of `TYPES`.
        k: Values of a row.

    Returns:
        float32 `[n, k]`.

    Raises:
        ValueError: Type, shape, dtype or layout do not fit.
    """
    _check_bytes(blocks, (blocks.shape[0], row_nbytes(type_name, k)), "blocks")
    values = np.empty((blocks.shape[0], k), np.float32)
    if type_name in _FLOATS:
        cast_rows(blocks.view(_FLOATS[type_name]), values)
    else:
        _, block_size, block_bytes = TYPES[type_name]
        rows = blocks.reshape(-1, block_bytes)
        _DEQUANTIZE[type_name](rows, out=values.reshape(-1, block_size))
    return values


def _check_bytes(array: Array, shape: tuple[int, int], name: str) -> None:
    if array.shape != shape or array.dtype != np.uint8 or not array.flags.c_contiguous:
        found = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"{name} must be C-contiguous uint8 of shape {shape}, not {found}")
