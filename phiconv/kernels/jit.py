"""How the kernels are compiled: numba, without the GIL, IEEE semantics kept, cached on disk.

No fast-math: every sum has a fixed order and nothing is contracted to fused multiply-adds, so a
kernel gives the same bytes on every machine, whatever the vector width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import FunctionCache
from numba.core.runtime.nrt import rtsys

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
    """A disk cache whose key covers every source file of this package.

    numba's own key covers only the file of the function that is called: an edit to a routine in
    another file, inlined into it, would go unnoticed and the old machine code would run on.
    """

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        key = super()._index_key(sig, codegen)  # type: ignore[no-untyped-call]
        return (*key, _package_digest())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Loads machine code, without importing what only a compilation needs.

        numba refreshes the target first, as it does again before it compiles: that imports its
        implementations of Python and numpy, and scipy for its BLAS where there is one, up to a
        quarter of a second. Machine code needs no more than the functions that allocate arrays.
        """
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)  # type: ignore[no-untyped-call]


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
