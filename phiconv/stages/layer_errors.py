"""The error of every layer for a validation's report, on one short window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.report.results import LayerErrorRecord

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint
    from phiconv.diagnosis import LayerError

# Enough to tell the layers apart, and little beside the logits of 8 x 512 tokens.
LAYER_TOKENS = 128


def measure(
    folder: Path,
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    *,
    provider: str,
    threads: int,
) -> tuple[tuple[LayerErrorRecord, ...], str]:
    """The embedding's and every layer's error, or none and why.

    A graph whose layers cannot be read has its logits measured all the same.

    Args:
        folder: The artifact: an ONNX model's folder, or a GGUF file or its folder.
        checkpoint: What it was made from.
        windows: The reference's token ids [n, T]; the first `LAYER_TOKENS` of the first are used.
        provider: Where it runs: by ONNX Runtime's name, or llama.cpp.
        threads: CPU threads.
    """
    from phiconv.diagnosis.diagnose import measure_layers
    from phiconv.diagnosis.gguf_stream import measure_gguf_layers

    window = windows[:1, :LAYER_TOKENS]
    try:
        if provider == machine.LLAMA_CPP:
            found = measure_gguf_layers(folder, checkpoint, window, threads=threads)
        else:
            found = measure_layers(folder, checkpoint, window, provider=provider, threads=threads)
    except (EnvironmentLacksError, StageError) as error:
        return (), f"Not measured by layer: {error.message}"
    return tuple(map(_record, found)), ""


def _record(found: LayerError) -> LayerErrorRecord:
    own = found.relative_error if found.layer < 0 else found.added
    return LayerErrorRecord(found.layer, found.relative_error, own)
