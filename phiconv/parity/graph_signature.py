"""Lint of the model file: the inputs, outputs and sizes that genai_config.json promises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.folder import is_relative_name
from phiconv.parity.results import Finding
from phiconv.parity.subject import Subject

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint import ModelConfig

# The names that the runtime uses where genai_config.json gives none.
_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
_OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}
# Inputs that the runtime leaves out where the graph has none.
_OPTIONAL = ("attention_mask", "position_ids")
_DECODER = "model.decoder"


def graph_findings(subject: Subject) -> Iterator[Finding]:
    """The model file that genai_config.json names, and its graph."""
    return signature_findings(subject.artifact, subject.config, subject.checkpoint.config)


def signature_findings(
    artifact: Path, config: Mapping[str, Any], sizes: ModelConfig
) -> Iterator[Finding]:
    """The model file that genai_config.json names, and its graph, without the checkpoint.

    Args:
        artifact: The folder.
        config: genai_config.json.
        sizes: What config.json says; the artifact has a copy of it.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    decoder = _section(_section(config, "model"), "decoder")
    name = decoder.get("filename")
    key = f"{_DECODER}.filename"
    if not isinstance(name, str) or not is_relative_name(name):
        yield Finding(
            "error", key, "a file in the artifact's folder", repr(name), "name the model file"
        )
        return
    path = artifact / name
    if not path.is_file():
        yield Finding("error", f"{key}: {name} is missing", "a file", "none", "name the model file")
        return
    try:
        model = ir.load(path)
    except (OSError, ValueError, DecodeError) as error:
        yield Finding("error", f"{name} cannot be read", "ONNX", str(error), "export it again")
        return
    yield from _data_findings(artifact, model)
    layers = sizes.num_hidden_layers
    for side, defaults, values in (
        ("inputs", _INPUTS, model.graph.inputs),
        ("outputs", _OUTPUTS, model.graph.outputs),
    ):
        names = [value.name for value in values]
        yield from _name_findings(decoder, layers, side, defaults, names)
    yield from _shape_findings(decoder, sizes, model.graph)


def _data_findings(artifact: Path, model: ir.Model) -> Iterator[Finding]:
    """Every external data file lies in the artifact's folder and is long enough."""
    import onnx_ir as ir

    ends: dict[str, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location = str(tensor.location)
            end = (tensor.offset or 0) + (tensor.length or 0)
            ends[location] = max(ends.get(location, 0), end)
    for location, end in ends.items():
        what, remedy = f"external data {location!r}", "ship it beside the model file"
        if not is_relative_name(location) or not (artifact / location).is_file():
            yield Finding("error", what, "a file in the artifact's folder", "none", remedy)
        elif (size := (artifact / location).stat().st_size) < end:
            yield Finding("error", what, f"at least {end} bytes", f"{size} bytes", remedy)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _name_findings(
    decoder: Mapping[str, Any],
    layers: int,
    side: str,
    defaults: Mapping[str, str],
    names: list[str | None],
) -> Iterator[Finding]:
    """Names in genai_config.json and in the graph are the same."""
    stored = _section(decoder, side)
    patterns = {**defaults, **stored}
    known: dict[str, str] = {}
    for key, pattern in patterns.items():
        if not isinstance(pattern, str):
            continue
        promised = _expanded(pattern, layers)
        other = next((known[name] for name in promised if name in known), None)
        if other is not None:
            yield Finding(
                "error",
                f"{_DECODER}.{side}.{key} is the name of {other}, too",
                "a name of its own",
                pattern,
                f"give the name of the graph's {side[:-1]}",
            )
        known |= dict.fromkeys(promised, key)
        missing = [name for name in promised if name not in names]
        if not missing or (key not in stored and key in _OPTIONAL):
            continue
        yield Finding(
            "warning" if key in _OPTIONAL else "error",
            f"{_DECODER}.{side}.{key}: the graph has no {side[:-1]} {missing[0]!r}",
            pattern,
            f"{len(promised) - len(missing)} of {len(promised)} in the graph",
            f"give the name of the graph's {side[:-1]}",
        )
    # the runtime fetches the outputs it knows and leaves the others; inputs must all be fed
    for name in names if side == "inputs" else ():
        if name not in known:
            yield Finding(
                "error",
                f"graph input {name!r} is not in {_DECODER}.{side}",
                "a name for every input",
                "none: nothing would feed it",
                f"name it in {_DECODER}.{side}",
            )


def _shape_findings(
    decoder: Mapping[str, Any], config: ModelConfig, graph: ir.Graph
) -> Iterator[Finding]:
    """The fixed extents of the logits and of the KV cache are the checkpoint's."""
    stored = {**_INPUTS, **_OUTPUTS, **_section(decoder, "inputs"), **_section(decoder, "outputs")}
    heads = ("num_key_value_heads", config.num_key_value_heads)
    cache = {1: heads, 3: ("head_dim", config.head_dim)}
    expected: dict[str, Mapping[int, tuple[str, int]]] = {
        str(stored["logits"]): {-1: ("vocab_size", config.vocab_size)}
    }
    for key in ("past_key_names", "past_value_names", "present_key_names", "present_value_names"):
        for name in _expanded(str(stored[key]), config.num_hidden_layers):
            expected[name] = cache
    said: set[tuple[str, int]] = set()
    for value in (*graph.inputs, *graph.outputs):
        for axis, (name, extent) in expected.get(value.name or "", {}).items():
            found = _extent(value, axis)
            if found is not None and found != extent and (name, found) not in said:
                said.add((name, found))
                yield Finding(
                    "error",
                    f"shape of {value.name}: {name}",
                    f"{extent} as in config.json",
                    str(found),
                    "the model file belongs to another checkpoint: export it again",
                )


def _extent(value: ir.Value, axis: int) -> int | None:
    """A fixed extent of a graph's input or output; None when it is free or unknown."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    extent: Any = value.shape[axis]
    return extent if isinstance(extent, int) else None


def _expanded(pattern: str, layers: int) -> list[str]:
    """The names of all layers, for a pattern with `%d`."""
    if "%d" not in pattern:
        return [pattern]
    return [pattern.replace("%d", str(layer)) for layer in range(layers)]
