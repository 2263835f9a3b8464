"""What a calibration has done so far, on disk, so that a kill costs one layer at most.

A folder with `layer-0007/`, the result of a layer as an overlay of its own, for each layer that is
done, and `stream-0008.npy`, the residual stream before the next one, float32 [n, T, hidden]. Each
is written under another name, flushed, and renamed; a stream that is there says that every layer
before it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phiconv.awq.layer import LayerResult
from phiconv.checkpoint.overlay import CalibrationTokens, Overlay, Rounding
from phiconv.checkpoint.rounded import RoundedFile, RoundedWriter
from phiconv.checkpoint.weight_source import Grid
from phiconv.runtimes.activations import Boundary
from phiconv.workspace.disk import flush_file, flush_folder, rename, rename_over
from phiconv.workspace.store import remove_tree

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint


@dataclass(frozen=True)
class FinishedLayers:
    """The layers that are done, in a folder of their own.

    Attributes:
        folder: Where they are; made when needed.
        checkpoint: The checkpoint they belong to.
        grid: What weights are rounded to.
        rounding: How.
    """

    folder: Path
    checkpoint: Checkpoint
    grid: Grid
    rounding: Rounding

    def begin(self) -> Boundary | None:
        """Where to go on; None at the beginning. What a kill left half-made is removed."""
        import torch

        self.folder.mkdir(parents=True, exist_ok=True)
        found = sorted(self.folder.glob("stream-*.npy"))
        done = _number(found[-1]) if found else 0
        if not all(self._layer(layer).is_dir() for layer in range(done)):
            done = 0
        keep = {self._stream(done), *map(self._layer, range(done))}
        for path in set(self.folder.iterdir()) - keep:
            _remove(path)
        if not done:
            return None
        return Boundary(done, torch.from_numpy(np.load(found[-1], allow_pickle=False)))

    def save(self, layer: int, result: LayerResult, behind: Boundary) -> None:
        """Keeps a layer's result and the stream behind it."""
        partial = self.folder / "partial"
        _remove(partial)
        partial.mkdir()
        shapes = {name: self._shape(name) for name in result.codes}
        self._overlay(result, None).write(partial)
        if self.rounding == "gptq":
            with RoundedWriter(partial, self.grid, shapes) as writer:
                for name, codes in result.codes.items():
                    writer.write(name, *codes)
        for file in partial.iterdir():
            flush_file(file)
        flush_folder(partial)
        rename(partial, self._layer(layer))
        half = self.folder / "stream.partial"
        with half.open("wb") as handle:
            np.save(handle, behind.stream.cpu().numpy(), allow_pickle=False)
        flush_file(half)
        rename_over(half, self._stream(behind.layer))
        flush_folder(self.folder)
        _remove(self._stream(layer))

    def write_overlay(self, out: Path, layers: int, tokens: CalibrationTokens) -> Overlay:
        """Writes the results of all layers as one overlay to the folder `out`."""
        parts = [Overlay.load(self._layer(layer)) for layer in range(layers)]
        whole = LayerResult()
        for part in parts:
            whole.columns.update(part.columns)
            whole.rows.update(part.rows)
            whole.clips.update(part.clips)
            whole.records.extend(part.groups)
        overlay = self._overlay(whole, tokens)
        overlay.write(out)
        if self.rounding == "gptq":
            self._join_codes(out, [part.rounded for part in parts if part.rounded is not None])
        return overlay

    def _join_codes(self, out: Path, files: Iterable[RoundedFile]) -> None:
        files = list(files)
        names = [name for file in files for name in file.tensors]
        with RoundedWriter(out, self.grid, {name: self._shape(name) for name in names}) as writer:
            for file in files:
                for name in file.tensors:
                    writer.write(name, *self._codes(file, name))

    def _codes(
        self, file: RoundedFile, name: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        from phiconv.kernels.matmulnbits import layout

        bits, group_size, symmetric = self.grid
        shapes = layout(*self._shape(name), bits=bits, block_size=group_size)
        codes, scales = np.empty(shapes.packed, np.uint8), np.empty(shapes.scales, np.float16)
        zero_points = None if symmetric else np.empty(shapes.zero_points, np.uint8)
        file.read_rows(name, 0, packed=codes, scales=scales, zero_points=zero_points)
        return codes, scales, zero_points

    def _overlay(self, result: LayerResult, tokens: CalibrationTokens | None) -> Overlay:
        return Overlay(
            self.checkpoint.digest,
            self.grid,
            self.rounding,
            columns=result.columns,
            rows=result.rows,
            clips=result.clips,
            groups=tuple(result.records),
            tokens=tokens,
        )

    def _shape(self, name: str) -> tuple[int, int]:
        n, k = self.checkpoint.tensors[name].shape
        return n, k

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}"

    def _stream(self, layer: int) -> Path:
        return self.folder / f"stream-{layer:04d}.npy"


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("stream-"))


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)
