"""Overlays: what AWQ and GPTQ found for a checkpoint; `phiconv.checkpoint.overlaid` applies them.

A folder of

- `overlay.json`: which checkpoint it belongs to, the grid it was searched for, what each group of
  weights lost, and the calibration tokens;
- `overlay.safetensors`: factors and clip limits. `columns:<tensor>` float32 [K] and
  `rows:<tensor>` float32 [N]: the weight is read as `W * columns[None, :] * rows[:, None]` (a
  norm's vector as `W * rows`). `clip:<tensor>` uint8 [N, ceil(K / group_size)]: how far each
  group is clamped when it is quantized (`phiconv.kernels.overlay`);
- `rounded.safetensors`, for GPTQ only: `<tensor>:codes`, `<tensor>:scales` float16 and, on an
  asymmetric grid, `<tensor>:zero_points`, in the layout of MatMulNBits
  (`phiconv.kernels.matmulnbits.layout`).

Factors come in pairs that cancel out (a norm's rows are divided by what the columns of the weights
behind it are multiplied by), so the model stays the same function as long as all of them are
applied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phiconv.checkpoint.json_object import read_json_object
from phiconv.checkpoint.problems import name_list
from phiconv.checkpoint.rounded import ROUNDED_FILE, RoundedFile
from phiconv.checkpoint.safetensors_file import NUMBERS, SafetensorsFile
from phiconv.checkpoint.safetensors_writer import SafetensorsWriter
from phiconv.checkpoint.weight_source import Grid
from phiconv.errors import CheckpointError, StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint.reader import Checkpoint
    from phiconv.checkpoint.safetensors_file import StoredDtype

VERSION = 1
OVERLAY_FILE = "overlay.json"
FACTORS_FILE = "overlay.safetensors"

Rounding = Literal["nearest", "gptq"]
_COLUMNS, _ROWS, _CLIP = "columns:", "rows:", "clip:"
_REMEDY = "make the overlay again"


@dataclass(frozen=True)
class GroupRecord:
    """What became of the weights that share one input.

    Losses are relative output errors, `|(W - W')X|^2 / |WX|^2`; None where not computed.

    Attributes:
        layer: Index of the decoder layer.
        group: `qkv`, `o_proj`, `gate_up` or `down_proj`.
        tensors: Checkpoint tensors that are quantized together.
        loss_rtn: Rounded as they are.
        loss_scaled: Rounded after scaling.
        loss_clipped: Rounded after scaling and clipping.
        loss_gptq: Rounded by GPTQ.
        ratio: The exponent of the scales that was found best; None without a search.
        scaled: Whether the scales are applied: not where the loss would have risen.
    """

    layer: int
    group: str
    tensors: tuple[str, ...]
    loss_rtn: float | None = None
    loss_scaled: float | None = None
    loss_clipped: float | None = None
    loss_gptq: float | None = None
    ratio: float | None = None
    scaled: bool = False


@dataclass(frozen=True)
class CalibrationTokens:
    """What the statistics were taken on.

    Attributes:
        name: The texts.
        ids_digest: Digest of the token ids.
        windows: Number of windows.
        window_length: Tokens of a window.
        sampled: Tokens that the Gram matrices were taken on.
    """

    name: str
    ids_digest: str
    windows: int
    window_length: int
    sampled: int


@dataclass(frozen=True)
class Overlay:
    """An overlay.

    Attributes:
        checkpoint: Digest of the checkpoint it belongs to.
        grid: What weights were to be quantized to.
        rounding: `gptq` where `rounded` holds the codes.
        columns: Factor of each column, float32 [K], by tensor.
        rows: Factor of each row, float32 [N], by tensor; of each element of a vector.
        clips: Clip index of each group, uint8 [N, ceil(K / group_size)], by tensor.
        groups: What became of each group of weights.
        tokens: The calibration tokens; None for an overlay that was made otherwise.
        rounded: The codes.
    """

    checkpoint: str
    grid: Grid
    rounding: Rounding = "nearest"
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    rows: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    clips: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    groups: tuple[GroupRecord, ...] = ()
    tokens: CalibrationTokens | None = None
    rounded: RoundedFile | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The checkpoint tensors that are read otherwise than stored, sorted."""
        return tuple(sorted({*self.columns, *self.rows, *self.clips}))

    @property
    def needs_grid(self) -> bool:
        """Whether it holds what is of use on its own grid only."""
        return bool(self.clips) or self.rounded is not None

    @classmethod
    def load(cls, folder: Path) -> Overlay:
        """Reads an overlay; codes stay in their file.

        Raises:
            StageError: It is damaged, or of another version.
        """
        document = read_json_object(folder / OVERLAY_FILE)
        where = str(folder / OVERLAY_FILE)
        if document.get("version") != VERSION:
            raise StageError(
                f"an overlay of version {document.get('version')!r}, not {VERSION}",
                where=where,
                remedy=_REMEDY,
            )
        try:
            overlay = _parse(document)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(f"not an overlay: {error!r}", where) from error
        found = _read_factors(folder / FACTORS_FILE)
        overlay = replace(overlay, columns=found[_COLUMNS], rows=found[_ROWS], clips=found[_CLIP])
        if overlay.rounding == "gptq":
            overlay = replace(overlay, rounded=RoundedFile(folder / ROUNDED_FILE, overlay.grid))
        return overlay

    def write(self, folder: Path) -> None:
        """Writes `overlay.json` and `overlay.safetensors` into an existing folder.

        Equal overlays give equal bytes. Codes are not written: `RoundedWriter` does, one weight
        at a time.
        """
        entries: dict[str, NDArray[Any]] = {
            **{_COLUMNS + name: array for name, array in self.columns.items()},
            **{_ROWS + name: array for name, array in self.rows.items()},
            **{_CLIP + name: array for name, array in self.clips.items()},
        }
        layout: dict[str, tuple[StoredDtype, tuple[int, ...]]] = {
            name: ("u8" if name.startswith(_CLIP) else "f32", array.shape)
            for name, array in entries.items()
        }
        with SafetensorsWriter(folder / FACTORS_FILE, layout) as writer:
            for name, array in entries.items():
                writer.write(name, array)
        document = {
            "version": VERSION,
            "checkpoint": self.checkpoint,
            "grid": self.grid._asdict(),
            "rounding": self.rounding,
            "groups": [asdict(group) for group in self.groups],
            "tokens": asdict(self.tokens) if self.tokens else None,
        }
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        (folder / OVERLAY_FILE).write_text(text, encoding="utf-8", newline="\n")

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """Makes sure that it is this checkpoint's overlay.

        Raises:
            StageError: It belongs to another, or a tensor has another shape.
        """
        where = str(checkpoint.path)
        if checkpoint.rounded is not None:
            raise StageError(
                "an overlay is for weights in floating point, but the checkpoint's are integers",
                where=where,
                remedy="make it from the checkpoint that this one was quantized from",
            )
        if self.checkpoint != checkpoint.digest:
            raise StageError(
                f"the overlay belongs to the checkpoint {self.checkpoint[:12]}, this one is "
                f"{checkpoint.digest[:12]}",
                where=where,
                remedy=f"{_REMEDY} from this checkpoint",
            )
        codes = self.rounded.shapes if self.rounded is not None else {}
        wrong = [
            name
            for name in sorted({*self.tensors, *codes})
            if name not in checkpoint.tensors or not self._fits(name, checkpoint, codes)
        ]
        if wrong:
            raise _damaged(f"no tensors of such shapes: {name_list(wrong)}", where)

    def _fits(
        self, name: str, checkpoint: Checkpoint, codes: Mapping[str, tuple[int, int]]
    ) -> bool:
        shape = checkpoint.tensors[name].shape
        if len(shape) == 1:
            vector = name in self.rows and self.rows[name].shape == shape
            return vector and not (name in self.columns or name in self.clips or name in codes)
        n, k = shape
        blocks = -(-k // self.grid.group_size)
        fits = name not in self.columns or self.columns[name].shape == (k,)
        fits &= name not in self.rows or self.rows[name].shape == (n,)
        fits &= name not in self.clips or self.clips[name].shape == (n, blocks)
        return fits and (name not in codes or codes[name] == (n, blocks))


def _parse(document: Mapping[str, Any]) -> Overlay:
    grid = Grid(**document["grid"])
    if grid.bits not in (4, 8) or grid.group_size < 1 or not isinstance(grid.symmetric, bool):
        raise ValueError(f"no such grid: {document['grid']}")
    if document["rounding"] not in ("nearest", "gptq"):
        raise ValueError(f"no such rounding: {document['rounding']}")
    if not isinstance(document["checkpoint"], str):
        raise TypeError("checkpoint must be a digest")
    tokens = document["tokens"]
    return Overlay(
        checkpoint=document["checkpoint"],
        grid=grid,
        rounding=document["rounding"],
        groups=tuple(
            GroupRecord(**{**group, "tensors": tuple(group["tensors"])})
            for group in document["groups"]
        ),
        tokens=CalibrationTokens(**tokens) if tokens is not None else None,
    )


def _read_factors(path: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """The overlay's arrays, each checked for values that make no sense."""
    import numpy as np

    from phiconv.kernels.overlay import MAX_CLIP

    try:
        file = SafetensorsFile(path, path.name, NUMBERS)
    except CheckpointError as error:
        raise _damaged(error.message, error.where) from error
    kinds: dict[str, tuple[StoredDtype, int]] = {
        _COLUMNS: ("f32", 1),
        _ROWS: ("f32", 1),
        _CLIP: ("u8", 2),
    }
    found: dict[str, dict[str, NDArray[Any]]] = {kind: {} for kind in kinds}
    for entry, info in file.tensors.items():
        kind = entry[: entry.find(":") + 1]
        if kind not in kinds:
            raise _damaged(f"no part of an overlay: {entry!r}", str(path))
        if (info.dtype, len(info.shape)) != kinds[kind]:
            raise _damaged(f"{entry!r} is {info.dtype} of shape {list(info.shape)}", str(path))
        array = file.read_rows(entry, 0, info.shape[0])
        usable = array <= MAX_CLIP if kind == _CLIP else np.isfinite(array) & (array > 0)
        if not usable.all():
            what = f"greater than {MAX_CLIP}" if kind == _CLIP else "not finite and positive"
            raise _damaged(f"{entry!r} holds values that are {what}", str(path))
        found[kind][entry.removeprefix(kind)] = array
    return found


def _damaged(message: str, where: str | None) -> StageError:
    return StageError(f"the overlay is damaged: {message}", where=where, remedy=_REMEDY)
