"""Measures the two digests that phiconv uses, on one core (docs/adr/0003-digests.md).

python -m benchmarks.digests
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable

import click
from blake3 import blake3

SIZE = 256 << 20
RUNS = 5


def speed(digest: Callable[[bytes], object], data: bytes) -> float:
    """Best of some runs, in GB/s."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        digest(data)
        best = min(best, time.perf_counter() - start)
    return len(data) / best / 1e9


@click.command(help=__doc__)
def main() -> None:
    """Print GB/s of each."""
    data = os.urandom(SIZE)
    click.echo(f"BLAKE3   {speed(lambda b: blake3(b).digest(), data):.1f} GB/s")
    click.echo(f"SHA-256  {speed(lambda b: hashlib.sha256(b).digest(), data):.1f} GB/s")


if __name__ == "__main__":
    main()
