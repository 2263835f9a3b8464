"""Runs an artifact and looks inside: the values of any tensors of its graph.

The graph is changed in memory only. Its external data stays where it is: ONNX Runtime is told the
artifact's folder, so nothing is copied and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.errors import StageError
from phiconv.runtimes.session import open_session, runtime_errors

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from phiconv.checkpoint import ModelConfig

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_QDQ_LEVEL = "session.qdq_matmulnbits_accuracy_level"
_INT8_LEVEL = 4
_FP32_LEVEL = "1"
_NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


class Probe:
    """A session on a graph whose outputs are the values that are asked for.

    Args:
        model: The graph; unchanged when this returns.
        values: What to look at, beside the graph's own outputs.
        file: The artifact's model file; its folder holds the external data.
        provider: Execution provider, by ONNX Runtime's name.
        threads: Intra-op threads.
        config: The checkpoint's configuration, for the shape of the KV cache.
        exact_activations: Has no activation rounded to int8.

    Raises:
        EnvironmentLacksError: The runtime lacks the provider.
        StageError: The graph cannot be loaded.
    """

    def __init__(
        self,
        model: ir.Model,
        values: Sequence[ir.Value],
        file: Path,
        *,
        provider: str,
        threads: int,
        config: ModelConfig,
        exact_activations: bool = False,
    ):
        self._where = str(file)
        self._config = config
        graph = _serialized(model, values, exact_activations)
        options = {_DATA_FOLDER: str(file.parent)}
        if exact_activations:
            options[_QDQ_LEVEL] = _FP32_LEVEL
        self._session = open_session(graph, str(file), provider, threads, options)

    def run(self, window: NDArray[np.int64], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The named values for one window [T], the batch axis left out where there is one.

        Raises:
            StageError: The runtime failed.
        """
        try:
            found = self._session.run(list(names), self._feeds(window))
        except runtime_errors() as error:
            raise StageError(f"ONNX Runtime failed: {error}", where=self._where) from error
        return {name: value[0] for name, value in zip(names, found, strict=True)}

    def _feeds(self, window: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The inputs of a prefill: an empty KV cache, every token attended."""
        import numpy as np

        length = len(window)
        sizes = (self._config.num_key_value_heads, self._config.head_dim)
        ready = {
            "input_ids": window[None],
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
        }
        feeds = {}
        for node in self._session.get_inputs():
            dtype = np.dtype(_NUMPY_TYPES.get(node.type, "float32"))
            if node.name.startswith("past_key_values."):
                heads, width = (
                    declared if isinstance(declared, int) else size
                    for declared, size in zip(node.shape[1::2], sizes, strict=True)
                )
                feeds[node.name] = np.zeros((1, heads, 0, width), dtype)
            elif node.name in ready:
                feeds[node.name] = ready[node.name].astype(dtype)
            else:
                raise StageError(f"the model has an unknown input {node.name}", where=self._where)
        return feeds


def _serialized(model: ir.Model, values: Sequence[ir.Value], exact_activations: bool) -> bytes:
    import onnx_ir as ir

    with _outputs(model, values), _without_accuracy_level(model, exact_activations):
        proto = ir.serde.serialize_model(model)
    data: bytes = proto.SerializeToString()
    return data


@contextmanager
def _outputs(model: ir.Model, values: Sequence[ir.Value]) -> Iterator[None]:
    """Adds graph outputs for a while."""
    outputs = model.graph.outputs
    own = len(outputs)
    present = set(outputs)
    for value in values:
        if value not in present:
            present.add(value)
            outputs.append(value)
    try:
        yield
    finally:
        del outputs[own:]


@contextmanager
def _without_accuracy_level(model: ir.Model, wanted: bool) -> Iterator[None]:
    removed = {}
    if wanted:
        for node in model.graph:
            if "accuracy_level" in node.attributes:
                removed[node] = node.attributes.pop("accuracy_level")
    try:
        yield
    finally:
        for node, attribute in removed.items():
            node.attributes["accuracy_level"] = attribute


def rounds_activations(node: ir.Node) -> bool:
    """Whether ONNX Runtime's CPU provider may round the input of a linear operator to int8.

    It does so at MatMulNBits' accuracy_level 4, and by default where it turns DequantizeLinear and
    MatMul into a MatMulNBits of its own.
    """
    if node.op_type == "MatMulNBits":
        attribute = node.attributes.get("accuracy_level")
        return attribute is not None and attribute.as_int() == _INT8_LEVEL
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    producer = None if weight is None else weight.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
