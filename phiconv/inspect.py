"""What an ONNX model, a lazy graph of the workspace, a GGUF file or a checkpoint holds."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.errors import RecipeError, StageError
from phiconv.report.results import TensorKindRecord

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.gguf.contents import GgufSummary

GENAI_CONFIG = "genai_config.json"
# The first pattern found in the name of the initializer, or of the node that takes it, decides.
_KINDS = (
    ("lm_head", re.compile(r"lm_head|embed_out|output_projection")),
    ("norm", re.compile(r"norm", re.IGNORECASE)),
    ("rotary", re.compile(r"cos_cache|sin_cache|inv_freq|rotary")),
    ("embedding", re.compile(r"embed|wte")),
    ("attention", re.compile(r"attn|attention|qkv|[qkvo]_proj")),
    ("mlp", re.compile(r"mlp|feed_forward|ffn|gate|up_proj|down_proj")),
)
_DTYPES = {
    "FLOAT": "f32",
    "FLOAT16": "f16",
    "BFLOAT16": "bf16",
    "DOUBLE": "f64",
}
_QUANTIZED = {"MatMulNBits", "GatherBlockQuantized"}


@dataclass(frozen=True)
class OnnxSummary:
    """An ONNX model folder.

    Attributes:
        model: Name of the model file.
        files: Size in bytes by path relative to the folder.
        ir_version: IR version of the model.
        opsets: Version by domain.
        operators: Count by `domain::type`, the default domain left out.
        dtypes: Number of initializers and bytes, by dtype.
        weights: How each kind of weights is stored.
        genai: What genai_config.json says, in short; {} without one.
    """

    model: str
    files: Mapping[str, int]
    ir_version: int
    opsets: Mapping[str, int]
    operators: Mapping[str, int]
    dtypes: Mapping[str, tuple[int, int]]
    weights: tuple[TensorKindRecord, ...]
    genai: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits a weight, scales and zero points included; rotary caches are no weights."""
        records = [record for record in self.weights if record.kind != "rotary"]
        parameters = sum(record.parameters for record in records)
        return 8 * sum(record.size_bytes for record in records) / max(parameters, 1)


@dataclass(frozen=True)
class CheckpointSummary:
    """A Hugging Face checkpoint folder.

    Attributes:
        architecture: As config.json names it.
        files: Size in bytes by name, of the files that shape an artifact.
        config: The normalised config's numbers.
        dtypes: Number of tensors and bytes, by dtype.
        parameters: Number of weights.
    """

    architecture: str
    files: Mapping[str, int]
    config: Mapping[str, Any]
    dtypes: Mapping[str, tuple[int, int]]
    parameters: int


def inspect_folder(path: Path) -> OnnxSummary | GgufSummary | CheckpointSummary:
    """Looks into a folder, or the folder of a model file.

    Raises:
        RecipeError: There is no such folder, or it holds none of these.
        StageError: The model or the checkpoint cannot be read.
    """
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {path}")
    model = path if path.suffix == ".onnx" else _model_file(folder)
    if model is not None and path.suffix != ".gguf":
        return _inspect_onnx(folder, model)
    gguf_file = _only_gguf(path if path.is_file() else folder)
    if gguf_file is not None:
        from phiconv.gguf.contents import inspect_gguf

        return inspect_gguf(gguf_file)
    if (folder / "config.json").is_file():
        return _inspect_checkpoint(folder)
    raise RecipeError(
        "neither an ONNX model nor a GGUF file nor a checkpoint is there",
        where=str(folder),
        remedy="give a folder with a .onnx or a .gguf file, or with config.json and safetensors "
        "files",
    )


def tensor_kinds(folder: Path) -> tuple[TensorKindRecord, ...]:
    """How each kind of weights of an ONNX or GGUF folder is stored; () when there is no model."""
    model = _model_file(folder)
    if model is not None:
        return _weights(_load(model))
    gguf_file = _only_gguf(folder)
    if gguf_file is not None:
        from phiconv.gguf.contents import inspect_gguf

        return inspect_gguf(gguf_file).weights
    return ()


def _only_gguf(folder: Path) -> Path | None:
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    found = sorted(folder.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def _model_file(folder: Path) -> Path | None:
    """`model.onnx`, the file genai_config.json names, or the only one."""
    found = sorted(folder.glob("*.onnx"))
    if len(found) > 1:
        named = _decoder(_genai_config(folder)).get("filename", "model.onnx")
        found = [file for file in found if file.name == named] or found
    return found[0] if found else None


def _load(model: Path) -> ir.Model:
    import onnx_ir as ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return ir.load(model)
    except (OSError, ValueError, DecodeError) as error:
        raise StageError(f"the ONNX model cannot be read: {error}", where=str(model)) from error


def _inspect_onnx(folder: Path, file: Path) -> OnnxSummary:
    model = _load(file)
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in model.graph.all_nodes()
    )
    dtypes: dict[str, tuple[int, int]] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            name = _dtype_name(value.const_value)
            count, size = dtypes.get(name, (0, 0))
            dtypes[name] = count + 1, size + value.const_value.nbytes
    return OnnxSummary(
        model=file.name,
        files=_file_sizes(folder),
        ir_version=model.ir_version,
        opsets=dict(sorted(model.opset_imports.items())),
        operators=dict(operators.most_common()),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1][1])),
        weights=_weights(model),
        genai=_genai_summary(folder),
    )


def _weights(model: ir.Model) -> tuple[TensorKindRecord, ...]:
    """Sums up initializers by what they are and how they are stored; stored once, counted once."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    counted: set[object] = set()
    for node in model.graph.all_nodes():
        quantized = node.op_type in _QUANTIZED
        for name, tensor in _initializers(node):
            place = _place(name, tensor)
            if place in counted:
                continue
            counted.add(place)
            layout = _quantized_format(node) if quantized else _dtype_name(tensor)
            total = sums[_kind(name, node), layout]
            total[0] += _parameters(node, name, tensor) if quantized else tensor.size
            total[1] += tensor.nbytes
    return tuple(
        TensorKindRecord(kind, layout, parameters, size)
        for (kind, layout), (parameters, size) in sorted(
            sums.items(), key=lambda item: (-item[1][1], item[0])
        )
    )


def _place(name: str, tensor: ir.TensorProtocol) -> object:
    """Where the data lies: two initializers can have one place in the data file."""
    import onnx_ir as ir

    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.location), tensor.offset, tensor.length
    return name


def _initializers(node: ir.Node) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for value in node.inputs:
        if value is not None and value.is_initializer() and value.const_value is not None:
            yield value.name or "", value.const_value


def _kind(name: str, node: ir.Node) -> str:
    if "LayerNormalization" in node.op_type:
        return "norm"
    if node.op_type in ("Gather", "GatherBlockQuantized") and "embed" in name:
        return "embedding"
    for text in (name, node.name or ""):
        for kind, pattern in _KINDS:
            if pattern.search(text):
                return kind
    return "other"


def _quantized_format(node: ir.Node) -> str:
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    zero_points = len(node.inputs) > 3 and node.inputs[3] is not None
    return f"int{bits} block {block}{' with zero points' if zero_points else ''}"


def _parameters(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> int:
    """Weights behind a quantized node's input: its packed data has all, scales have none."""
    data = node.inputs[1] if node.op_type == "MatMulNBits" else node.inputs[0]
    if data is None or data.name != name:
        return 0
    if node.op_type == "MatMulNBits":
        return node.attributes["K"].as_int() * node.attributes["N"].as_int()
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    return tensor.nbytes * 8 // bits


def _dtype_name(tensor: ir.TensorProtocol) -> str:
    name = tensor.dtype.name
    return _DTYPES.get(name, name.lower())


def _file_sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _genai_config(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        where = str(folder / GENAI_CONFIG)
        raise StageError(f"{GENAI_CONFIG} cannot be read: {error}", where=where) from error
    return document if isinstance(document, dict) else {}


def _decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    return decoder if isinstance(decoder, dict) else {}


def _genai_summary(folder: Path) -> dict[str, Any]:
    config = _genai_config(folder)
    model = config.get("model")
    if not isinstance(model, dict):
        return {}
    decoder = _decoder(config)
    options = decoder.get("session_options", {}).get("provider_options", [])
    names = ("type", "context_length", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    summary = {name: model[name] for name in names if name in model}
    summary["providers"] = [name for entry in options for name in entry] or ["cpu"]
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    summary |= {name: decoder[name] for name in (*shape, "head_size") if name in decoder}
    search = config.get("search", {})
    return summary | {"search": search} if search else summary


def _inspect_checkpoint(folder: Path) -> CheckpointSummary:
    from dataclasses import asdict

    from phiconv.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    dtypes: dict[str, tuple[int, int]] = {}
    parameters = 0
    for info in checkpoint.tensors.values():
        count, size = dtypes.get(info.dtype, (0, 0))
        dtypes[info.dtype] = count + 1, size + info.nbytes
        elements = 1
        for extent in info.shape:
            elements *= extent
        parameters += elements
    names = (*checkpoint.files, *checkpoint.weight_files)
    config = {name: value for name, value in asdict(checkpoint.config).items() if value is not None}
    return CheckpointSummary(
        architecture=checkpoint.config.architecture,
        files={name: (folder / name).stat().st_size for name in names},
        config=config,
        dtypes=dtypes,
        parameters=parameters,
    )
