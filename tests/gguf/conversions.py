"""Converts test checkpoints and reads what comes out, with gguf's own reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from phiconv.checkpoint import Checkpoint
from phiconv.stages.convert_gguf import ConvertGguf, ConvertGgufParams
from phiconv.stages.stage import StageContext


def convert(
    checkpoint: Path, out: Path, file_type: str = "F16", *, threads: int = 2, **params: Any
) -> Mapping[str, Any]:
    """Runs the stage into the folder `out`; its facts."""
    out.mkdir(parents=True)
    stage = ConvertGguf()
    settings = ConvertGgufParams.model_validate({"file_type": file_type, **params})
    opened = Checkpoint(checkpoint)
    assert stage.check(settings, opened.config) == []
    context = StageContext(out=out, inputs=[], checkpoint=opened, threads=threads)
    facts = stage.run(settings, context)
    assert context.digests.keys() == {settings.file_name}
    return facts


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape (rows first) and bytes of every tensor by name, in the file's order."""
    reader = GGUFReader(next(folder.glob("*.gguf")))
    return {
        tensor.name: (
            tensor.tensor_type.name,
            tuple(int(size) for size in reversed(tensor.shape)),
            np.ascontiguousarray(tensor.data).tobytes(),
        )
        for tensor in reader.tensors
    }


def metadata(folder: Path) -> dict[str, Any]:
    """Every key of the file."""
    reader = GGUFReader(next(folder.glob("*.gguf")))
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
