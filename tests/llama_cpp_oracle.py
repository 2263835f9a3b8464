"""ggml's own quantizers, called in the llama.cpp that the package `xllamacpp` carries."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.ggml import TYPES, row_nbytes

Array = npt.NDArray[Any]

VERSION = "2026.10.11549"  # of xllamacpp, the one the expectations were checked with


def missing() -> str | None:
    """Why there is nothing to compare with here, if so."""
    if importlib.util.find_spec("xllamacpp") is None:
        return f"ggml's bytes are compared with xllamacpp=={VERSION}, which is not installed"
    if platform.system() == "Windows":
        return "xllamacpp does not export ggml's functions on Windows"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "compilers contract ggml's quantizers to fused multiply-adds on this machine"
    return None


@cache
def library() -> ctypes.CDLL:
    """The shared library, types of the functions used declared."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.so")
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_quantize_init.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_init.restype = None
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    for name in TYPES:
        if name not in ("F32", "F16", "BF16"):
            function = getattr(ggml, f"dequantize_row_{name.replace('Q', 'q')}")
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
            function.restype = None
    return ggml


def quantize(values: Array, type_name: str, importance: Array | None = None) -> Array:
    """`ggml_quantize_chunk` of float32 `[n, K]`; uint8 `[n, bytes of a row]`."""
    values = np.ascontiguousarray(values, np.float32)
    n, k = values.shape
    type_id = TYPES[type_name].type_id
    out = np.zeros((n, row_nbytes(type_name, k)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    ggml = library()
    ggml.ggml_quantize_init(type_id)
    address = None if weights is None else weights.ctypes.data
    written = ggml.ggml_quantize_chunk(
        type_id, values.ctypes.data, out.ctypes.data, 0, n, k, address
    )
    assert written == out.nbytes
    return out


def dequantize(blocks: Array, type_name: str, k: int) -> Array:
    """ggml's `dequantize_row_*` of uint8 `[n, bytes of a row]`; float32 `[n, K]`."""
    function = getattr(library(), f"dequantize_row_{type_name.replace('Q', 'q')}")
    values = np.empty((blocks.shape[0], k), np.float32)
    function(blocks.ctypes.data, values.ctypes.data, values.size)
    return values
