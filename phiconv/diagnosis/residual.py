"""The residual stream, layer by layer: what each layer inherits, and what it adds of its own.

The reference's layer is run on the artifact's own residual stream, so a layer's own error is told
apart from what came in with its input. Only a few layers' values are in memory at a time; of the
checkpoint, one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.diagnosis.decoder_graph import DecoderGraph, DecoderLayer
from phiconv.diagnosis.layer_errors import (
    Stream,
    StreamErrors,
    errors_by_layer,
    errors_of_layer,
    layer_groups,
    worst_window,
)
from phiconv.diagnosis.operators import (
    end_operators,
    end_values,
    layer_end,
    layer_operators,
    layer_values,
)
from phiconv.diagnosis.probe import Probe
from phiconv.diagnosis.reference_steps import ReferenceSteps
from phiconv.diagnosis.results import LayerError, OperatorError
from phiconv.errors import StageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint


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
    for indices in layer_groups(len(graph.layers), windows.shape[1], config):
        group = graph.layers[indices.start : indices.stop]
        begins = group[0].index == 0  # the ends are looked at along with the first group
        values = [value for layer in group for value in layer_values(graph, layer)]
        values += end_values(graph) if begins else []
        probe = Probe(graph.model, values, file, provider=provider, threads=threads, config=config)
        streams = _streams(probe, windows, group, graph)
        end = states[indices.stop] if indices.stop < len(states) else None
        worst = worst_window([_around(graph, layer, streams) for layer in group], end)
        whole = probe.run(windows[worst], _names(values))
        if begins:
            first, last = end_operators(graph, whole, windows[worst], steps)
        for layer in group:
            inner += layer_operators(graph, layer, whole, steps, config)
            if layer.index + 1 < len(states):  # the checkpoint has such a layer
                expected = (states[layer.index], states[layer.index + 1])
                around, reference = _around(graph, layer, streams), steps.layer(layer.index)
                layers += errors_of_layer(layer.index, around, expected, reference)
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
    around = [_around(graph, layer, streams) for layer in graph.layers]
    return errors_by_layer(around, checkpoint, windows, threads=threads)


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


def _points(graph: DecoderGraph, layer: DecoderLayer) -> tuple[ir.Value | None, ...]:
    """The residual stream before a layer, between its blocks, and after it."""
    middle, end = layer.post_norm, layer_end(graph, layer)
    return (
        _start(layer),
        None if middle is None else middle.residual,
        None if end is None else end.residual,
    )


def _around(
    graph: DecoderGraph, layer: DecoderLayer, streams: Mapping[str, NDArray[Any]]
) -> Stream:
    return Stream(*(_at(streams, point) for point in _points(graph, layer)))


def _at(streams: Mapping[str, NDArray[Any]], point: ir.Value | None) -> NDArray[Any] | None:
    return None if point is None else streams[str(point.name)]


def _start(layer: DecoderLayer) -> ir.Value | None:
    return None if layer.input_norm is None else layer.input_norm.residual


def _names(values: Sequence[ir.Value]) -> list[str]:
    return list(dict.fromkeys(str(value.name) for value in values if value.name))
