"""`python -m phiconv`, and the console script."""

from __future__ import annotations

import gc
import os
import sys

_STOPPED = (130, 143)


def main() -> None:
    """Runs the command line and exits with its documented code.

    torch and transformers bring hundreds of thousands of objects that live to the end. Looking
    for cycles among them again and again makes importing them a fifth slower, and once more at
    the end takes a second in which nothing is gained.
    """
    gc.set_threshold(100_000, 20, 20)
    try:
        from phiconv.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        _leave(130)
    except SystemExit as ended:
        if ended.code in _STOPPED:
            _leave(ended.code)
        raise
    finally:
        gc.freeze()


def _leave(code: int) -> None:
    """Ends the process at once, everything having been put in order.

    A signal comes anywhere, such as in the middle of importing torch. Python's own end would wait
    for threads, and run what packages registered for it in that state: that may crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
