"""The residual stream, layer by layer: what each layer inherits, and what it adds of its own.

The reference's layer is run on the artifact's own residual stream, so a layer's own error is told
apart from what came in with its input. Only a few layers' values are in memory at a time; of the
checkpoint, one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from phiconv.diagnosis.decoder_graph import DecoderGraph, DecoderLayer
from phiconv.diagnosis.operators import (
    end_operators,
    end_values,
    layer_end,
    layer_operators,
    layer_values,
    relative_error,
)
from phiconv.diagnosis.probe import Probe
from phiconv.diagnosis.reference_steps import ReferenceLayer, ReferenceSteps
from phiconv.diagnosis.results import LayerError, OperatorError
from phiconv.errors import StageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint, ModelConfig

# How much of the artifact's values is in memory at once; layers are looked at in groups.
_GROUP_BYTES = 512 << 20


class StreamErrors(NamedTuple):
    """What `stream_errors` finds."""

    layers: list[LayerError]
    operators: list[OperatorError]


def stream_errors(
    graph: DecoderGraph,
    checkpoint: Checkpoint,
    file: Path,
    windows: NDArray[np.int64],
    states: Sequence[NDArray[np.float32]],
    *,
    provider: str,
    threads: int,
    advance: Callable[[int, str], None],
) -> StreamErrors:
    """Runs the artifact, looks inside, and compares every layer and every step.

    Args:
        graph: The artifact's decoder.
        checkpoint: What it was made from.
        file: The artifact's model file.
        windows: Token ids [n, T]; single steps are compared on one of them, the one whose residual
            stream is off most.
        states: The reference's residual stream [n, T, hidden]: the embeddings, then after every
            layer.
        provider: Execution provider, by ONNX Runtime's name.
        threads: CPU threads.
        advance: Called with the number of tokens done in a layer, and its name.
    """
    config = checkpoint.config
    steps = ReferenceSteps(checkpoint, windows.shape[1], threads)
    layers: list[LayerError] = []
    first: list[OperatorError] = []
    inner: list[OperatorError] = []
    last: list[OperatorError] = []
    for group in _groups(graph.layers, config, windows.shape[1]):
        begins = group[0].index == 0  # the ends are looked at along with the first group
        values = [value for layer in group for value in layer_values(graph, layer)]
        values += end_values(graph) if begins else []
        probe = Probe(graph.model, values, file, provider=provider, threads=threads, config=config)
        streams = _streams(probe, windows, group, graph)
        worst = _worst_window(streams, group, states, graph)
        whole = probe.run(windows[worst], _names(values))
        if begins:
            first, last = end_operators(graph, whole, windows[worst], steps)
        for layer in group:
            inner += layer_operators(graph, layer, whole, steps, config)
            if layer.index + 1 < len(states):  # the checkpoint has such a layer
                around = (states[layer.index], states[layer.index + 1])
                reference = steps.layer(layer.index)
                layers += _layer_errors(graph, layer, streams, around, reference)
            advance(windows.size, f"layer {layer.index}")
    return StreamErrors(layers, [*first, *inner, *last])


def layer_errors(
    graph: DecoderGraph,
    checkpoint: Checkpoint,
    file: Path,
    windows: NDArray[np.int64],
    *,
    provider: str,
    threads: int,
) -> list[LayerError]:
    """The layers of `stream_errors` without their steps, the reference's stream computed beside.

    Each layer of the checkpoint is read once. The artifact's residual stream is in memory as a
    whole: give it a short window.

    Raises:
        StageError: The graph's residual stream is not as wide as the checkpoint's, or the runtime
            failed.
    """
    points = [point for layer in graph.layers for point in _points(graph, layer) if point]
    config = checkpoint.config
    probe = Probe(graph.model, points, file, provider=provider, threads=threads, config=config)
    streams = _streams(probe, windows, graph.layers, graph)
    del probe
    widths = {stream.shape[-1] for stream in streams.values()} - {config.hidden_size}
    if widths:
        raise StageError(
            f"the residual stream is {min(widths)} wide, the checkpoint's {config.hidden_size}",
            where=str(file),
        )
    steps = ReferenceSteps(checkpoint, windows.shape[1], threads)
    state = steps.embeddings(windows)
    errors: list[LayerError] = []
    for layer in graph.layers[: config.num_hidden_layers]:
        reference = steps.layer(layer.index)
        following = _stacked(reference.whole, state)
        errors += _layer_errors(graph, layer, streams, (state, following), reference)
        state = following
    return errors


def _streams(
    probe: Probe,
    windows: NDArray[np.int64],
    group: Sequence[DecoderLayer],
    graph: DecoderGraph,
) -> dict[str, NDArray[Any]]:
    """The residual stream [n, T, hidden] at every point of some layers, by name."""
    import numpy as np

    points = [point for layer in group for point in _points(graph, layer) if point is not None]
    names = _names(points)
    found = [probe.run(window, names) for window in windows]
    return {name: np.stack([values[name] for values in found]) for name in names}


def _worst_window(
    streams: Mapping[str, NDArray[Any]],
    group: Sequence[DecoderLayer],
    states: Sequence[NDArray[np.float32]],
    graph: DecoderGraph,
) -> int:
    """The first window to be no longer finite; else the one that is off most after the layers."""
    import numpy as np

    for layer in group:
        for point in _points(graph, layer):
            stream = _at(streams, point)
            if stream is not None and not _finite(stream):
                return int((~np.isfinite(stream)).any(axis=(1, 2)).argmax())
    last = group[-1]
    stream = _at(streams, _points(graph, last)[-1])
    if stream is None or last.index + 1 >= len(states):
        return 0
    difference = np.subtract(stream, states[last.index + 1], dtype=np.float64)
    return int(np.square(difference).sum(axis=(1, 2)).argmax())


def _layer_errors(
    graph: DecoderGraph,
    layer: DecoderLayer,
    streams: Mapping[str, NDArray[Any]],
    around: tuple[NDArray[np.float32], NDArray[np.float32]],
    reference: ReferenceLayer,
) -> list[LayerError]:
    """That of one layer, and the embedding's before the first.

    `around` is the reference's residual stream before the layer and after it.
    """
    start, end = around
    before, middle, after = (_at(streams, point) for point in _points(graph, layer))
    embedding = [LayerError(-1, _relative(before, start))] if layer.index == 0 else []
    added, attention, mlp = _local_errors(before, middle, after, reference)
    found = LayerError(
        layer=layer.index,
        relative_error=_relative(after, end),
        inherited=_relative(before, start),
        added=added,
        attention=attention,
        mlp=mlp,
    )
    return [*embedding, found]


def _local_errors(
    before: NDArray[Any] | None,
    middle: NDArray[Any] | None,
    after: NDArray[Any] | None,
    reference: ReferenceLayer,
) -> tuple[float | None, float | None, float | None]:
    """Errors of the layer's result, and of what attention and MLP contribute, on its own input."""
    import numpy as np

    if before is None or not _finite(before):
        return None, None, None
    attention = _stacked(reference.attention_block, before)
    added = attention_error = mlp_error = None
    if after is not None and _finite(after):
        expected = before + attention
        expected += _stacked(reference.mlp_block, expected)
        added = relative_error(after, expected)
    if middle is not None and _finite(middle):
        contributed = np.subtract(middle, before, dtype=np.float32)
        attention_error = relative_error(contributed, attention)
        if after is not None and _finite(after):
            contributed = np.subtract(after, middle, dtype=np.float32)
            mlp_error = relative_error(contributed, _stacked(reference.mlp_block, middle))
    return added, attention_error, mlp_error


def _stacked(
    step: Callable[[NDArray[Any]], NDArray[np.float32]], windows: NDArray[Any]
) -> NDArray[np.float32]:
    """A step of the reference applied to each of `[n, T, hidden]`."""
    import numpy as np

    return np.stack([step(window) for window in windows])


def _points(graph: DecoderGraph, layer: DecoderLayer) -> tuple[ir.Value | None, ...]:
    """The residual stream before a layer, between its blocks, and after it."""
    middle, end = layer.post_norm, layer_end(graph, layer)
    return (
        _start(layer),
        None if middle is None else middle.residual,
        None if end is None else end.residual,
    )


def _at(streams: Mapping[str, NDArray[Any]], point: ir.Value | None) -> NDArray[Any] | None:
    return None if point is None else streams[str(point.name)]


def _start(layer: DecoderLayer) -> ir.Value | None:
    return None if layer.input_norm is None else layer.input_norm.residual


def _groups(
    layers: Sequence[DecoderLayer], config: ModelConfig, length: int
) -> Iterator[Sequence[DecoderLayer]]:
    """Layers whose values fit in memory together."""
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    width = 8 * config.hidden_size + 2 * qkv + 3 * config.intermediate_size
    size = max(1, _GROUP_BYTES // (4 * length * width))
    for start in range(0, len(layers), size):
        yield layers[start : start + size]


def _names(values: Sequence[ir.Value]) -> list[str]:
    return list(dict.fromkeys(str(value.name) for value in values if value.name))


def _relative(found: NDArray[Any] | None, expected: NDArray[np.float32]) -> float | None:
    if found is None or not _finite(found) or found.shape != expected.shape:
        return None
    return relative_error(found, expected)


def _finite(values: NDArray[Any]) -> bool:
    import numpy as np

    return bool(np.isfinite(values).all())
