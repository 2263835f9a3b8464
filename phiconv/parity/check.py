"""All parity checks of one artifact at once: what the `validate` stage calls."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.parity.chat_template import compare_templates
from phiconv.parity.genai_config import lint_genai_config
from phiconv.parity.hugging_face import HuggingFaceTokenizer
from phiconv.parity.results import ParityReport
from phiconv.parity.subject import Provider
from phiconv.parity.tokenizer import Comparison

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint

_TOOLS = (
    "tokenizers",
    "transformers",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "onnxruntime-genai-directml",
)


def check_artifact(
    artifact: Path, checkpoint: Checkpoint, *, provider: Provider | None = None
) -> ParityReport:
    """Compares an artifact's tokenizer, chat template and configuration with its checkpoint's.

    No weights are read and no model is run; on any machine with onnxruntime-genai, whatever the
    artifact's provider.

    Args:
        artifact: Folder with genai_config.json, the tokenizer's files and the model file.
        checkpoint: What the artifact was made from.
        provider: What the recipe builds for; None leaves the provider unchecked.

    Raises:
        CheckpointError: The checkpoint's own tokenizer or generation config cannot be read.
        EnvironmentLacksError: onnxruntime-genai is not installed.
    """
    reference = HuggingFaceTokenizer(checkpoint.path)
    comparison = Comparison(artifact, reference)
    return ParityReport(
        tokenizer=comparison.result(),
        template=compare_templates(comparison, reference),
        findings=lint_genai_config(artifact, checkpoint, provider=provider, reference=reference),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
