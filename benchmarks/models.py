"""What is converted: the bundled trained checkpoint, and synthetic ones of real shapes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.synthetic import Shape, write_checkpoint

TINY = Path(__file__).parent.parent / "examples" / "tiny-phi3"

SHAPES = {
    "1.1 B": Shape(layers=8),
    "3.8 B": Shape(),
    "14 B": Shape(40, hidden=5120, intermediate=17920, heads=40, kv_heads=10, vocabulary=100352),
}
"""Phi-3-mini's shape with 8 and with all 32 layers, and Phi-4's."""


@contextmanager
def checkpoint(name: str, layers: int | None, scratch: Path, *, keep: bool) -> Iterator[Path]:
    """A checkpoint by its name, written when it is not there and removed afterwards.

    Args:
        name: `tiny` for the bundled checkpoint, or one of `SHAPES`.
        layers: Another number of layers than the shape's, unless it is `tiny`.
        scratch: Where synthetic ones are written.
        keep: Leave it there.
    """
    if name == "tiny":
        yield TINY
        return
    shape = SHAPES[name] if layers is None else replace(SHAPES[name], layers=layers)
    folder = scratch / f"{name.replace(' ', '')}-{shape.layers}-layers"
    if not (folder / "model.safetensors.index.json").exists():
        size = write_checkpoint(folder, shape)
        click.echo(f"wrote {folder}, {size / 2**30:.2f} GiB", err=True)
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder)


def parameters(name: str, layers: int | None) -> int:
    """Weights of a shape that a token's forward pass multiplies with: all but the embedding."""
    shape = SHAPES[name] if layers is None else replace(SHAPES[name], layers=layers)
    sizes = (rows[0] * rows[1] for rows in shape.tensors().values() if len(rows) == 2)
    return sum(sizes) - shape.vocabulary * shape.hidden
