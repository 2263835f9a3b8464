"""Runtimes: each takes an artifact and yields the logits of token windows, and says where it ran.

`RUNTIMES` maps a recipe's name to the function that opens an artifact. The reference
(`phiconv.runtimes.reference`) is not among them: it takes the checkpoint, and is what they are
compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from phiconv.report.results import Provenance
from phiconv.runtimes.providers import ProviderChoice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint


@dataclass(frozen=True)
class ArtifactFolder:
    """What a runtime opens.

    Attributes:
        path: Folder of the artifact.
        head_size: Width of an attention head, for graphs that do not state it themselves.
        checkpoint: What it was made from, for a stand-in that runs only its weights.
    """

    path: Path
    head_size: int | None = None
    checkpoint: Checkpoint | None = None


class Runtime(Protocol):
    """An opened artifact."""

    def logits(self, windows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yields the logits [T, V] of every position of each window of `windows` [n, T].

        One window is in memory at a time.

        Raises:
            StageError: The artifact cannot be run on this input.
        """
        ...

    def provenance(self) -> Provenance:
        """Says where and how it ran."""
        ...


@runtime_checkable
class GeneratingRuntime(Runtime, Protocol):
    """A runtime with a KV cache and a sampler of its own, both of which it may get wrong."""

    def decode_logits(self, window: NDArray[np.int64], prefill: int) -> NDArray[np.float32]:
        """Logits [T - prefill, V] of the positions after the first `prefill` of `window` [T].

        Those `prefill` tokens are given at once, every later one in a step of its own.
        """
        ...

    def generate(self, prompt: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
        """Greedily continues `prompt` [T] by up to `tokens` tokens, fewer if the model ends."""
        ...


Opener = Callable[[ArtifactFolder, ProviderChoice, int], Runtime]


def _open_onnxruntime(folder: ArtifactFolder, choice: ProviderChoice, threads: int) -> Runtime:
    from phiconv.runtimes.onnxruntime import Session

    return Session(folder, choice, threads)


def _open_genai(folder: ArtifactFolder, choice: ProviderChoice, threads: int) -> GeneratingRuntime:
    from phiconv.runtimes.genai import GenAIModel

    return GenAIModel(folder, choice, threads)


def _open_llama_cpp(folder: ArtifactFolder, choice: ProviderChoice, threads: int) -> Runtime:
    from phiconv.runtimes.dequantized import DequantizedWeights
    from phiconv.runtimes.llama_cpp import LlamaCppModel

    opener = LlamaCppModel if choice.provider == choice.target else DequantizedWeights
    return opener(folder, choice, threads)


RUNTIMES: dict[str, Opener] = {
    "onnxruntime": _open_onnxruntime,
    "onnxruntime-genai": _open_genai,
    "llama.cpp": _open_llama_cpp,
}
