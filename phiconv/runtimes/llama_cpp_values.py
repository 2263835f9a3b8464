"""Values from inside llama.cpp's graph of Phi-3, by the names that its model code gives them.

`llm_graph_context::cb` of llama.cpp's src/llama-graph.cpp names them: `attn_norm-3` is the result
of layer 3's first norm. They are read as ggml's scheduler hands them out while it computes, so
nothing is computed twice and nothing else is changed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from phiconv.errors import EnvironmentLacksError
from phiconv.runtimes.llama_cpp import Context, LlamaFile
from phiconv.runtimes.llama_cpp_library import REMEDY

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# ggml_backend_sched_eval_callback of ggml-backend.h: asked whether a value is wanted, then told
# that it is there; false would end the computation.
_EvalCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_FLOAT_BYTES = 4
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_get_name": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "ggml_nelements": (ctypes.c_int64, (ctypes.c_void_p,)),
    "ggml_nbytes": (ctypes.c_size_t, (ctypes.c_void_p,)),
    "ggml_backend_tensor_get": (
        None,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t),
    ),
}


class ValueProbe:
    """Runs windows of one length and keeps what is asked for.

    Args:
        file: The opened file.
        length: Tokens of a window.
        threads: Threads of llama.cpp.

    Raises:
        EnvironmentLacksError: The library does not hand out values.
        StageError: llama.cpp makes no context of this length.
    """

    def __init__(self, file: LlamaFile, length: int, threads: int):
        self._watcher = _Watcher(_functions(file))
        self._callback = _EvalCallback(self._watcher.look)
        pointer = ctypes.cast(self._callback, ctypes.c_void_p)
        self._context = Context(file, length, threads, pointer)

    def run(self, window: NDArray[np.int64], names: Iterable[str]) -> dict[str, NDArray[Any]]:
        """The named values for one window [T], float32 `[T, width]`; names not found are left out.

        Raises:
            StageError: llama.cpp failed.
        """
        import numpy as np

        self._watcher.start(names)
        self._context.clear()
        self._context.logits(window)
        return {
            name: np.concatenate(parts).reshape(len(window), -1)
            for name, parts in self._watcher.found.items()
        }


class _Watcher:
    """Copies the wanted values; a long window comes in several parts."""

    def __init__(self, calls: ctypes.CDLL):
        self.found: dict[str, list[NDArray[Any]]] = {}
        self._wanted: frozenset[str] = frozenset()
        self._calls = calls

    def start(self, names: Iterable[str]) -> None:
        self.found = {}
        self._wanted = frozenset(names)

    def look(self, tensor: int, asked: bool, _: object) -> bool:
        import numpy as np

        name = self._calls.ggml_get_name(tensor).decode(errors="replace")
        if asked:
            return name in self._wanted
        values = np.empty(self._calls.ggml_nelements(tensor), np.float32)
        if self._calls.ggml_nbytes(tensor) == _FLOAT_BYTES * values.size:  # contiguous float32
            self._calls.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            self.found.setdefault(name, []).append(values)
        return True


def _functions(file: LlamaFile) -> ctypes.CDLL:
    calls = file.library.calls
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(calls, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise EnvironmentLacksError(
            f"{file.library.binding} does not hand out the values inside its graph: {error}",
            where="llama.cpp",
            remedy=REMEDY,
        ) from error
    return calls
