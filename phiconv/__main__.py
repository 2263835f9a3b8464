"""`python -m phiconv`, and the console script."""

from __future__ import annotations

import gc

from phiconv.cli import main as command_line


def main() -> None:
    """Runs the command line and exits with its documented code.

    torch and transformers bring hundreds of thousands of objects that live to the end. Looking
    for cycles among them again and again makes importing them a fifth slower, and once more at
    the end takes a second in which nothing is gained.
    """
    gc.set_threshold(100_000, 20, 20)
    try:
        command_line()
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
