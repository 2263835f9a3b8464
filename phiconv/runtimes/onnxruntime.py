"""Runs an ONNX artifact in an ONNX Runtime session, and finds out where its nodes ran."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.errors import StageError
from phiconv.report.results import Provenance
from phiconv.runtimes.device import describe_device
from phiconv.runtimes.placement import RECORD, count_nodes, placed_nodes, stray_nodes
from phiconv.runtimes.providers import ProviderChoice
from phiconv.runtimes.session import import_onnxruntime, open_session, runtime_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.runtimes import ArtifactFolder

MODEL_FILE = "model.onnx"
LOGITS = "logits"

_NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


class Session:
    """An artifact's model.onnx in an ONNX Runtime session, used with an empty KV cache.

    Args:
        folder: A folder with model.onnx (or one other .onnx file) and its external data.
        choice: Where it is to run, and what the recipe wanted; `provider` must not be None.
        threads: Intra-op threads.

    Raises:
        EnvironmentLacksError: ONNX Runtime is missing, lacks the provider, or cannot start it.
        StageError: The model cannot be loaded, or has no logits.
    """

    def __init__(self, folder: ArtifactFolder, choice: ProviderChoice, threads: int):
        if choice.provider is None:
            raise ValueError("no provider to open a session on")
        self._folder = folder
        self._choice = choice
        self._threads = threads
        self._file = model_file(folder.path)
        self._version = str(import_onnxruntime().__version__)
        self._session = open_session(
            str(self._file), str(self._file), choice.provider, threads, {RECORD: "1"}
        )
        self._nodes = placed_nodes(self._session)
        outputs = {output.name: output for output in self._session.get_outputs()}
        if LOGITS not in outputs:
            raise StageError(
                f"the model has no output {LOGITS!r}, only {', '.join(outputs)}",
                where=str(self._file),
            )

    def logits(self, windows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yields the logits of each window, see `phiconv.runtimes.Runtime.logits`."""
        for index, window in enumerate(windows):
            # kept in no variable: a window's logits should be gone before the next are computed
            yield self._window_logits(window, f"{self._file}, window {index}")

    def _window_logits(self, window: NDArray[np.int64], where: str) -> NDArray[np.float32]:
        try:
            (logits,) = self._session.run([LOGITS], self._feeds(window[None]))
        except runtime_errors() as error:
            raise StageError(f"ONNX Runtime failed: {error}", where=where) from error
        return all_positions(logits, len(window), where)

    def provenance(self) -> Provenance:
        """Says where the nodes were placed, and with which options the session was made."""
        provider = self._session.get_providers()[0]
        name, driver = describe_device(provider)
        options = {"graph_optimization_level": "all", "execution_mode": "sequential"}
        for key, value in self._session.get_provider_options().get(provider, {}).items():
            options[f"{provider}.{key}"] = str(value)
        return Provenance(
            runtime="onnxruntime",
            runtime_version=self._version,
            target_provider=self._choice.target,
            provider=provider,
            device=name,
            driver=driver,
            threads=self._threads,
            options=options,
            placement=count_nodes(self._nodes),
            strays=stray_nodes(self._nodes, provider),
        )

    def _feeds(self, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The inputs of one prefill of `ids` [1, T]: an empty KV cache, every token attended."""
        import numpy as np

        length = ids.shape[1]
        ready = {
            "input_ids": ids,
            "attention_mask": np.ones((1, length), dtype=np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
        }
        feeds = {}
        for node in self._session.get_inputs():
            if node.type not in _NUMPY_TYPES:
                raise StageError(
                    f"input {node.name} has the type {node.type}", where=str(self._file)
                )
            dtype = np.dtype(_NUMPY_TYPES[node.type])
            if node.name in ready:
                feeds[node.name] = ready[node.name].astype(dtype)
            elif node.name.startswith("past_key_values."):
                feeds[node.name] = np.zeros(self._empty_cache_shape(node), dtype=dtype)
            else:
                raise StageError(
                    f"the model has an input {node.name!r}, which no decoder with a KV cache has",
                    where=str(self._file),
                    remedy="export it with phiconv or the ONNX Runtime GenAI model builder",
                )
        return feeds

    def _empty_cache_shape(self, node: Any) -> tuple[int, int, int, int]:
        """[1, kv_heads, 0, head_size] of a `past_key_values.N.key` input."""
        shape = list(node.shape)
        heads = shape[1] if len(shape) == 4 else None
        head_size = shape[3] if len(shape) == 4 else None
        if not isinstance(head_size, int):
            head_size = _genai_decoder(self._folder.path).get("head_size", self._folder.head_size)
        if not isinstance(heads, int):
            heads = _genai_decoder(self._folder.path).get("num_key_value_heads")
        if not isinstance(heads, int) or not isinstance(head_size, int):
            raise StageError(
                f"cannot tell the shape of the KV cache input {node.name} from {shape}",
                where=str(self._file),
                remedy="put the artifact's genai_config.json beside it",
            )
        return (1, heads, 0, head_size)


def model_file(path: Path) -> Path:
    """The artifact's only .onnx file; of several the one genai_config.json names, or model.onnx.

    Raises:
        StageError: There is none, or no telling which of several it is.
    """
    found = sorted(path.glob("*.onnx"))
    if len(found) > 1:
        named = _genai_decoder(path).get("filename")
        wanted = [file for file in found if file.name == named]
        found = wanted or [file for file in found if file.name == MODEL_FILE] or found
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise StageError(f"wanted {MODEL_FILE}, the .onnx files are: {names}", where=str(path))
    return found[0]


def all_positions(logits: NDArray[Any], length: int, where: str) -> NDArray[np.float32]:
    """Checks that `logits` are [1, T, V] for all T positions and returns [T, V] float32.

    Raises:
        StageError: The graph gives another shape, such as the last position alone.
    """
    import numpy as np

    if logits.ndim != 3 or logits.shape[:2] != (1, length):
        raise StageError(
            f"the model gives logits of shape {list(logits.shape)} for {length} tokens",
            where=where,
            remedy="validation takes the logits of every position: export without pruning them",
        )
    window: NDArray[np.float32] = logits[0].astype(np.float32, copy=False)
    return window


def _genai_decoder(path: Path) -> dict[str, Any]:
    """The `model.decoder` section of the artifact's genai_config.json; empty without one."""
    file = path / "genai_config.json"
    if not file.is_file():
        return {}
    try:
        decoder = json.loads(file.read_text(encoding="utf-8"))["model"]["decoder"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise StageError(f"not a genai_config.json: {error!r}", where=str(file)) from error
    return decoder if isinstance(decoder, dict) else {}
