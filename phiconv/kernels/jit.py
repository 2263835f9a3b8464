"""How the kernels are compiled: numba, without the GIL, IEEE semantics kept, cached on disk.

No fast-math: every sum has a fixed order and nothing is contracted to fused multiply-adds, so a
kernel gives the same bytes on every machine, whatever the vector width.
"""

from __future__ import annotations

import hashlib
import pickle
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import event
from numba.core.caching import FunctionCache, NullCache
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps

from phiconv.kernels import compiling

Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(function: Function, **options: Any) -> Function:
    compile_ = numba.njit(nogil=True, boundscheck=False, error_model="numpy", **options)
    return cast(Function, compile_(function))


@cache
def _package_digest() -> str:
    """sha256 over the sources of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _PackageCache(FunctionCache):
    """Machine code on disk, one file a signature and processor, with its sha256 in front.

    numba's own files are trusted as they are found, and its key covers only the source file of
    the function that is called: an edit to a routine in another file, inlined into it, would go
    unnoticed. Here the digest covers the machine code, numba's version and every source file of
    this package. What does not agree with it is compiled anew and replaced.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Loads machine code, without importing what only a compilation needs.

        numba refreshes the target first, as it does again before it compiles: that imports its
        implementations of Python and numpy, and scipy for its BLAS where there is one, up to a
        quarter of a second. Machine code needs no more than the functions that allocate arrays.
        """
        codegen = target_context.codegen()
        try:
            content = self._file(sig, codegen).read_bytes()
        except OSError:
            return None
        digest, code = content[:32], content[32:]
        if digest != self._digest(sig, codegen, code):
            return None
        rtsys.initialize(target_context)
        return self._impl.rebuild(target_context, pickle.loads(code))

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keeps machine code; where that cannot be done, it is compiled again next time."""
        if not self._impl.check_cachable(data):
            return
        code = dumps(self._impl.reduce(data))  # type: ignore[no-untyped-call]
        file = self._file(sig, data.codegen)
        with suppress(OSError):
            self._impl.locator.ensure_cache_path()
            partial = file.with_suffix(f".{uuid.uuid4().hex}")
            try:
                partial.write_bytes(self._digest(sig, data.codegen, code) + code)
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)

    def _file(self, sig: Any, codegen: Any) -> Path:
        """Where machine code for these types of arguments and this processor is."""
        name = hashlib.sha256(repr((sig, codegen.magic_tuple())).encode()).hexdigest()[:16]
        return Path(self._cache_path) / f"{self._impl.filename_base}.{name}.nbc"

    def _digest(self, sig: Any, codegen: Any, code: bytes) -> bytes:
        index_key = self._index_key(sig, codegen)  # type: ignore[no-untyped-call]
        key = (index_key, numba.__version__, _package_digest())
        return hashlib.sha256(repr(key).encode() + code).digest()


class _Announcing(event.Listener):
    """Says when something is compiled; numba tells nothing when machine code is loaded."""

    def on_start(self, event: Any) -> None:
        compiling.begin(kept=not isinstance(event.data["dispatcher"]._cache, NullCache))

    def on_end(self, event: Any) -> None:
        compiling.end()


event.register("numba:compile", _Announcing())  # type: ignore[no-untyped-call]


def routine(function: Function) -> Function:
    """Compiles a function that only kernels call (it is inlined there, not cached itself)."""
    return _compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def kernel(function: Function) -> Function:
    """Compiles an entry point on first call; the machine code is kept on disk.

    It is kept beside the source (`__pycache__`), in the user's cache folder where that is
    read-only, or in `NUMBA_CACHE_DIR`; where nothing can be written, every process compiles.
    """
    dispatcher: Any = _compiled(function)
    with suppress(RuntimeError):  # "no locator available"
        dispatcher._cache = _PackageCache(function)  # type: ignore[no-untyped-call]  # as cache=True
    return cast(Function, dispatcher)
