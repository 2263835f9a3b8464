"""Whether a kernel is being compiled right now, for whoever shows what is going on.

It imports nothing, so that it can be asked where numba was never needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Listener = Callable[[bool | None], None]
"""Called with whether the machine code will be kept on disk; with None once nothing compiles."""

_lock = threading.Lock()
_depth = 0
_kept: bool | None = None
_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Tells a listener, in place of the one before, from now on; at once what goes on now."""
    global _listener
    with _lock:
        _listener = listener
        _tell()


def begin(*, kept: bool) -> None:
    """A function is about to be compiled, maybe for another that is being compiled.

    Args:
        kept: Whether its machine code will be kept on disk.
    """
    global _depth, _kept
    with _lock:
        _depth += 1
        if _depth == 1:
            _kept = kept
            _tell()


def end() -> None:
    """A function was compiled, or could not be."""
    global _depth, _kept
    with _lock:
        _depth -= 1
        if _depth == 0:
            _kept = None
            _tell()


def _tell() -> None:
    if _listener is not None:
        _listener(_kept)
