"""A folder with an ONNX decoder that phiconv need not have made: checked before anything is run.

What would fail only after minutes of work, or fail in words that help nobody, is found here from
the graph alone; no weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.checkpoint.folder import is_relative_name, member
from phiconv.errors import CheckpointError, RecipeError, StageError
from phiconv.runtimes.onnxruntime import LOGITS, model_file

if TYPE_CHECKING:
    import onnx_ir as ir

_SIDE_SUFFIXES = frozenset({".jinja", ".json", ".model", ".txt"})
_CACHE = "past_key_values."
_EXPORT = "export it with phiconv or the ONNX Runtime GenAI model builder"


@dataclass(frozen=True)
class OnnxFolder:
    """A folder that passed the checks of `open_folder`.

    Attributes:
        path: The folder.
        model: The model's file.
        files: Every file that shapes what is measured, by its path relative to the folder with
            forward slashes, sorted: the model, its external data, configs and tokenizer.
        vocab_size: Width of the logits, where the graph says it.
    """

    path: Path
    model: Path
    files: tuple[str, ...]
    vocab_size: int | None


def open_folder(path: Path) -> OnnxFolder:
    """Checks the folder of an ONNX decoder.

    Args:
        path: The folder, or the model's file in it.

    Raises:
        RecipeError: There is no such folder.
        StageError: It holds no model, or one that cannot be measured: a file of its external data
            is missing, too short or outside the folder; or it is no decoder with a KV cache and
            logits, as ONNX Runtime GenAI runs them.
    """
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise RecipeError(
            f"there is no folder {path}", remedy="give the folder that holds the ONNX model"
        )
    file = model_file(folder)
    if path.is_file() and path.resolve() != file.resolve():
        raise StageError(
            f"{path.name} is not the model of its folder, {file.name} is",
            where=str(folder),
            remedy="put each model, with its data and configs, into a folder of its own",
        )
    model = _load(file)
    _check_signature(model, file)
    side = (entry.name for entry in folder.iterdir()
            if entry.suffix in _SIDE_SUFFIXES and entry.is_file())  # fmt: skip
    files = {file.name, *_data_files(model, folder, file), *side}
    return OnnxFolder(folder, file, tuple(sorted(files)), _vocab_size(model))


def _load(file: Path) -> ir.Model:
    import onnx_ir as ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx_ir.serde import SerdeError

    try:
        return ir.load(file)
    except (OSError, ValueError, DecodeError, SerdeError) as error:
        raise StageError(
            f"the ONNX model cannot be read: {error}",
            where=str(file),
            remedy="download or copy it again",
        ) from error


def _check_signature(model: ir.Model, file: Path) -> None:
    inputs = [value.name or "" for value in model.graph.inputs]
    outputs = [value.name or "" for value in model.graph.outputs]
    missing = [
        text
        for text, found in (
            ("an input input_ids", "input_ids" in inputs),
            (f"inputs {_CACHE}*", any(name.startswith(_CACHE) for name in inputs)),
            (f"an output {LOGITS}", LOGITS in outputs),
        )
        if not found
    ]
    if missing:
        raise StageError(
            f"not a decoder that ONNX Runtime GenAI could run: it lacks {', '.join(missing)}",
            where=str(file),
            remedy=f"{_EXPORT}; its inputs are {_named(inputs)}; its outputs {_named(outputs)}",
        )


def _named(names: list[str], most: int = 6) -> str:
    shown = ", ".join(names[:most]) or "none"
    return f"{shown}, …" if len(names) > most else shown


def _data_files(model: ir.Model, folder: Path, file: Path) -> Iterable[str]:
    """Names of the external data files, each checked to be there whole."""
    ends: dict[str, tuple[int, str]] = {}
    for tensor in _external_tensors(model):
        name = str(tensor.location).replace("\\", "/")
        end = (tensor.offset or 0) + (tensor.nbytes if tensor.length is None else tensor.length)
        if end > ends.get(name, (-1, ""))[0]:
            ends[name] = end, tensor.name or ""
    for name, (end, tensor_name) in ends.items():
        _check_data_file(folder, file, name, end, tensor_name)
    return ends


def _external_tensors(model: ir.Model) -> Iterable[ir.ExternalTensor]:
    import onnx_ir as ir

    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if isinstance(tensor, ir.ExternalTensor):
                    yield tensor


def _check_data_file(folder: Path, file: Path, name: str, end: int, tensor: str) -> None:
    if not is_relative_name(name):
        raise StageError(
            f"the model's external data {name!r} leads out of its folder",
            where=f"{file}, tensor {tensor}",
            remedy="this may be an attack; use a model whose data lies beside it",
        )
    try:
        size = member(folder, name).stat().st_size
    except CheckpointError as error:
        problem = "leads out of its folder" if (folder / name).exists() else "is missing"
        raise StageError(
            f"the model's external data {name} {problem}",
            where=f"{file}, tensor {tensor}",
            remedy="download or copy the file itself into the folder",
        ) from error
    if size < end:
        raise StageError(
            f"the model's external data {name} ends at byte {size}, tensor {tensor} at {end}",
            where=str(folder),
            remedy="the file was cut off: download or copy it again",
        )


def _vocab_size(model: ir.Model) -> int | None:
    for value in model.graph.outputs:
        if value.name == LOGITS and value.shape is not None:
            width = value.shape[-1]
            return width if isinstance(width, int) else None
    return None
