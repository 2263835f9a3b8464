"""Ctrl-C, SIGTERM and Windows' Ctrl-Break end a command in order, the second of them at once."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED_CODE = 128 + signal.SIGINT
TERMINATED_CODE = 128 + signal.SIGTERM

_NUMBERS = [signal.SIGINT, signal.SIGTERM]
if sys.platform == "win32":  # Ctrl+Break: what Windows has to end a process that may clean up
    _NUMBERS.append(signal.SIGBREAK)
_AGAIN_SECONDS = 0.02
_SHOW_CURSOR = "\x1b[?25h"


class TerminatedError(BaseException):
    """SIGTERM came; not an `Exception`, so that only clean-up code sees it."""


@contextmanager
def signals_handled() -> Iterator[None]:
    """Raises KeyboardInterrupt or `TerminatedError` in the main thread when a signal comes.

    A signal that the process was started to ignore stays ignored.
    """
    coming: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        coming.append(number)
        if len(coming) > 1:
            _end_at_once(number)
        raise KeyboardInterrupt if number == signal.SIGINT else TerminatedError

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        """Sends a signal again that came where Python drops exceptions, such as in `__del__`."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt | TerminatedError):
            show(unraisable)
            return
        # a little later, or it comes in the same place
        threading.Timer(_AGAIN_SECONDS, _send_to_main_thread, [coming.pop()]).start()

    show = sys.unraisablehook
    before = {
        number: signal.signal(number, stop)
        for number in _NUMBERS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = show
        for number, handler in before.items():
            signal.signal(number, handler)


def _send_to_main_thread(number: int) -> None:
    if sys.platform == "win32":
        _thread.interrupt_main(signal.Signals(number))  # which ends no system call
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _end_at_once(number: int) -> None:
    """Ends the process; as after a kill, the next command cleans up."""
    message = "stopped at once; the next build removes what is half-made\n"
    cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
    os.write(2, (cursor + message).encode())
    os._exit(INTERRUPTED_CODE if number == signal.SIGINT else TERMINATED_CODE)
