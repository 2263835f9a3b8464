"""The lazy ONNX artifact: a graph, a weight plan and the files that ship beside the model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.errors import ExportError
from phiconv.onnx import weights as plan
from phiconv.onnx.weights import Expression, Packed

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH_FILE = "graph.onnx"
WEIGHTS_FILE = "weights.json"
GENAI_FOLDER = "genai"
OVERLAY_KEY_FILE = "overlay.key"
DATA_FILE = "model.onnx.data"


@dataclass
class OnnxGraph:
    """An ONNX model whose large initializers are expressions over a checkpoint.

    Attributes:
        model: The graph. An initializer named in `weights` holds a placeholder with its final
            dtype and shape but no data; any other initializer holds its data.
        weights: Expression by initializer name.
        genai: Folder with genai_config.json and the tokenizer files.
        overlay: Key of the overlay through which the weights are to be read; None for none.
    """

    model: ir.Model
    weights: dict[str, Expression] = field(default_factory=dict)
    genai: Path | None = None
    overlay: str | None = None

    @classmethod
    def load(cls, folder: Path) -> OnnxGraph:
        """Read an artifact that `save` wrote."""
        import onnx_ir as ir

        try:
            model = ir.load(folder / GRAPH_FILE)
            weights = json.loads((folder / WEIGHTS_FILE).read_text(encoding="utf-8"))
            key = folder / OVERLAY_KEY_FILE
            overlay = key.read_text(encoding="utf-8") if key.exists() else None
        except (OSError, ValueError) as error:
            raise ExportError(f"not a lazy ONNX artifact: {error}", where=str(folder)) from error
        return cls(model, plan.from_json(weights), folder / GENAI_FOLDER, overlay)

    def save(self, folder: Path) -> None:
        """Write graph, weight plan and side files into an existing folder."""
        import shutil

        import onnx_ir as ir

        proto = ir.serde.serialize_model(self.model)
        (folder / GRAPH_FILE).write_bytes(proto.SerializeToString(deterministic=True))
        document = json.dumps(plan.to_json(self.weights), indent=0, sort_keys=True)
        (folder / WEIGHTS_FILE).write_text(document, encoding="utf-8", newline="\n")
        if self.overlay is not None:
            (folder / OVERLAY_KEY_FILE).write_text(self.overlay, encoding="utf-8")
        if self.genai is not None and self.genai != folder / GENAI_FOLDER:
            shutil.copytree(self.genai, folder / GENAI_FOLDER)

    def add_initializer(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], expr: Expression
    ) -> ir.Value:
        """Register a lazily computed initializer and return its value."""
        import onnx_ir as ir

        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        value.const_value = placeholder(name, dtype, shape)
        self.model.graph.register_initializer(value)
        self.weights[name] = expr
        return value

    def count_copied(self) -> int:
        """How many weights are copied from codes, not quantized."""
        return len({expr.group for expr in self.weights.values() if isinstance(expr, Packed)})

    def remove_initializer(self, name: str) -> None:
        """Drop an initializer that no node uses any more."""
        del self.model.graph.initializers[name]
        del self.weights[name]


def placeholder(name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
    """A tensor with a type and a shape whose data does not exist yet."""
    import onnx_ir as ir

    return ir.ExternalTensor(
        location=DATA_FILE, offset=0, length=0, dtype=dtype, shape=ir.Shape(shape), name=name
    )
