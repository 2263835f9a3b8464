"""Checks an ONNX file as it is stored: names, connections, external data; no weight is read.

onnx_ir repairs much of what it reads (an input that nothing gives becomes a new one), so damage is
looked for in the protocol buffer itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from phiconv.checkpoint.folder import is_relative_name

if TYPE_CHECKING:
    import onnx

_KEYS = {"location", "offset", "length", "checksum", "basepath"}


class Region(NamedTuple):
    """The bytes of one tensor in a file of external data."""

    location: str
    start: int
    end: int
    tensor: str


def structure_problems(file: Path) -> list[str]:
    """What is wrong with an ONNX file.

    Args:
        file: The model; its external data lies beside it.

    Returns:
        One sentence each. Whether the external data is there and long enough is not looked at:
        `phiconv.onnx.folder.open_folder` does.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model(file, load_external_data=False)
    except (OSError, DecodeError) as error:
        return [f"it cannot be read: {error}"]
    problems = [*_domain_problems(model), *_graph_problems(model.graph)]
    regions: list[Region] = []
    for tensor in _external(model.graph):
        try:
            regions.append(_region(tensor))
        except ValueError as error:
            problems.append(f"the external data of tensor {_text(tensor.name)}: {error}")
    return problems + list(_overlaps(regions))


def _domain_problems(model: onnx.ModelProto) -> Iterator[str]:
    domains = {_text(item.domain) for item in model.opset_import}
    used = {_text(node.domain) for node in model.graph.node}
    for domain in sorted(used - domains - ({""} if "ai.onnx" in domains else set())):
        yield f"its nodes are of the domain {domain!r}, which it does not import"


def _graph_problems(graph: onnx.GraphProto) -> Iterator[str]:
    """Every value has one source, which comes before what takes it."""
    initializers = [_text(tensor.name) for tensor in graph.initializer]
    known = {_text(value.name) for value in graph.input} | set(initializers)
    for name in sorted({name for name in initializers if initializers.count(name) > 1}):
        yield f"tensor {name} stands twice"
    for node in graph.node:
        name = _text(node.name) or _text(node.op_type)
        for taken in map(_text, node.input):
            if taken and taken not in known:
                yield f"node {name} takes {taken}, which nothing before it gives"
        for given in map(_text, node.output):
            if given and given in known:
                yield f"node {name} gives {given}, which is there already"
            known.add(given)
    for output in graph.output:
        if _text(output.name) not in known:
            yield f"nothing gives the output {_text(output.name)}"


def _external(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    from onnx import TensorProto

    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor


def _region(tensor: onnx.TensorProto) -> Region:
    """Where a tensor's data lies.

    Raises:
        ValueError: It says nothing that can be.
    """
    found = {_text(entry.key): _text(entry.value) for entry in tensor.external_data}
    if unknown := found.keys() - _KEYS:
        raise ValueError(f"the unknown key {min(unknown)!r}")
    location = found.get("location", "")
    if not is_relative_name(location):
        raise ValueError(f"{location!r} leads out of the folder")
    start = int(found.get("offset", 0))
    nbytes = _nbytes(tensor)
    length = int(found.get("length", nbytes))
    if start < 0 or length != nbytes:
        raise ValueError(f"{length} bytes at {start}, where it has {nbytes}")
    return Region(location, start, start + nbytes, _text(tensor.name))


def _nbytes(tensor: onnx.TensorProto) -> int:
    import onnx_ir as ir

    bits = int(ir.DataType(tensor.data_type).itemsize * 8)
    values: int = math.prod(tensor.dims)
    return -(-values * bits // 8)


def _overlaps(regions: Iterable[Region]) -> Iterator[str]:
    """Tensors that share some bytes; two names for all the same bytes are well."""
    for before, after in pairwise(sorted(regions)):
        shared = before.location == after.location and after.start < before.end
        if shared and before[:3] != after[:3]:
            yield f"the data of tensor {after.tensor} begins within {before.tensor}"


def _text(value: str | bytes) -> str:
    """A name; protobuf gives bytes for one that is no UTF-8 text."""
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
