"""What an artifact's runtime is known to do otherwise than the checkpoint, for its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phiconv import machine
from phiconv.errors import StageError
from phiconv.report.results import KnownLimit
from phiconv.runtimes.length_limits import gguf_limits, onnx_limits

if TYPE_CHECKING:
    from pathlib import Path

    from phiconv.checkpoint import ModelConfig


def known_limits(folder: Path, config: ModelConfig, target: str) -> tuple[KnownLimit, ...]:
    """The limits of an artifact.

    Args:
        folder: The artifact.
        config: The configuration of the checkpoint it was made from.
        target: The execution provider it is for, by ONNX Runtime's name, or `llama.cpp`.
    """
    if target == machine.LLAMA_CPP:
        return gguf_limits(config)
    return onnx_limits(config, target, has_window=_has_window(folder, config, target))


def _has_window(folder: Path, config: ModelConfig, target: str) -> bool:
    """Whether the graph's attention has the model's window; what cannot be read is not accused."""
    from phiconv.diagnosis.diagnose import lint_artifact

    try:
        findings = lint_artifact(folder, config)
    except StageError:
        return target != machine.DML
    return not any(finding.check == "attention window" for finding in findings)
