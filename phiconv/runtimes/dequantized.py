"""Measures a GGUF artifact's weights where no llama.cpp is installed.

gguf's own numpy code gives the weights back, and Hugging Face's Phi-3 runs with them, layer by
layer as the reference does. What this says is how much the quantization lost; it says nothing of
llama.cpp, whose kernels round the activations, too. Reports name it for what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from math import prod
from typing import TYPE_CHECKING, Any, cast

from phiconv import machine
from phiconv.checkpoint import Checkpoint, TensorInfo
from phiconv.checkpoint.config import EMBEDDING, LM_HEAD
from phiconv.errors import StageError
from phiconv.gguf.plan import gguf_names
from phiconv.gguf.tensors import GgufTensors
from phiconv.report.results import Provenance
from phiconv.runtimes.llama_cpp import gguf_file
from phiconv.runtimes.providers import ProviderChoice

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from phiconv.runtimes import ArtifactFolder

_FLOAT_BYTES = 4


class DequantizedWeights:
    """The artifact's weights in the reference; see `phiconv.runtimes.Runtime`.

    Args:
        folder: The artifact, and the checkpoint whose config.json says how its layers are run.
        choice: What the recipe wanted, and what stands in for it.
        threads: Threads of PyTorch.

    Raises:
        StageError: The file cannot be read, or lacks a tensor of the checkpoint.
    """

    def __init__(self, folder: ArtifactFolder, choice: ProviderChoice, threads: int):
        if folder.checkpoint is None:
            raise ValueError("no checkpoint to run the weights as")
        self._choice = choice
        self._threads = threads
        weights = _GgufWeights(gguf_file(folder.path), folder.checkpoint)
        self._weights = cast(Checkpoint, weights)

    def logits(self, windows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yields the logits of each window, see `phiconv.runtimes.Runtime.logits`."""
        from phiconv.runtimes.reference import LanguageModelHead, final_hidden_states

        hidden = final_hidden_states(self._weights, windows, threads=self._threads)
        head = LanguageModelHead(self._weights, threads=self._threads)
        for states in hidden:
            yield head.logits(states)

    def provenance(self) -> Provenance:
        """Says that llama.cpp did not run."""
        return stand_in(self._choice, self._threads)


def stand_in(choice: ProviderChoice, threads: int) -> Provenance:
    """What a report says of weights that are run in place of llama.cpp."""
    return Provenance(
        runtime=machine.LLAMA_CPP,
        runtime_version=f"none; gguf {version('gguf')}, torch {version('torch')}",
        target_provider=choice.target,
        provider=choice.provider,
        device=machine.processor(),
        threads=threads,
    )


class _GgufWeights:
    """What the reference needs of a checkpoint, read from a GGUF file as float32."""

    def __init__(self, path: Path, checkpoint: Checkpoint):
        self.path = checkpoint.path
        self.config = checkpoint.config
        found = GgufTensors(path)
        names = gguf_names(checkpoint.tensors, checkpoint.config)
        if names.get(LM_HEAD) not in found:
            names[LM_HEAD] = names[EMBEDDING]
        lacking = sorted(name for name in names.values() if name not in found)
        if lacking:
            raise StageError(f"the file lacks {', '.join(lacking[:5])}", where=str(path))
        self._stored = {source: found[name] for source, name in names.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            source: _info(source, checkpoint, self._stored[source].shape) for source in names
        }

    def read(self, name: str) -> NDArray[Any]:
        """A whole tensor."""
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows `[start, stop)` of a tensor."""
        return self._stored[name].rows(start, stop)


def _info(source: str, checkpoint: Checkpoint, shape: tuple[int, ...]) -> TensorInfo:
    """The tensor's place in the checkpoint with the file's shape."""
    known = source if source in checkpoint.tensors else EMBEDDING
    nbytes = prod(shape) * _FLOAT_BYTES
    return replace(checkpoint.tensors[known], name=source, dtype="f32", shape=shape, nbytes=nbytes)
