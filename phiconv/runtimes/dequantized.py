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
        return Provenance(
            runtime=machine.LLAMA_CPP,
            runtime_version=f"none; gguf {version('gguf')}, torch {version('torch')}",
            target_provider=self._choice.target,
            provider=self._choice.provider,
            device=machine.processor(),
            threads=self._threads,
        )


class _GgufWeights:
    """What the reference needs of a checkpoint, read from a GGUF file as float32."""

    def __init__(self, path: Path, checkpoint: Checkpoint):
        import gguf

        self.path = checkpoint.path
        self.config = checkpoint.config
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise StageError(f"not a GGUF file: {error}", where=str(path)) from error
        found = {tensor.name: tensor for tensor in reader.tensors}
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
        import numpy as np
        from gguf.quants import dequantize

        stored = self._stored[name]
        values: NDArray[Any] = dequantize(stored.data[start:stop], stored.tensor_type)
        return np.array(values, np.float32)  # F32 would be a view of the mapped file


def _info(name: str, checkpoint: Checkpoint, dimensions: Any) -> TensorInfo:
    """The tensor's place in the checkpoint with the file's shape; GGUF counts columns first."""
    source = name if name in checkpoint.tensors else EMBEDDING
    shape = tuple(int(size) for size in reversed(dimensions))
    nbytes = prod(shape) * _FLOAT_BYTES
    return replace(checkpoint.tensors[source], name=name, dtype="f32", shape=shape, nbytes=nbytes)
