"""The error of a layer from the artifact's residual stream around it, whatever ran it.

The reference's layer is run on the artifact's own residual stream, so a layer's own error is told
apart from what came in with its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from phiconv.diagnosis.reference_steps import ReferenceLayer, ReferenceSteps
from phiconv.diagnosis.results import LayerError, OperatorError
from phiconv.diagnosis.step_check import relative_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint, ModelConfig

# How much of the artifact's values is in memory at once; layers are looked at in groups.
_GROUP_BYTES = 512 << 20


class StreamErrors(NamedTuple):
    """What looking inside an artifact finds: its residual stream, and every step."""

    layers: list[LayerError]
    operators: list[OperatorError]


class Stream(NamedTuple):
    """The residual stream `[n, T, hidden]` around a layer; None where it could not be had.

    Attributes:
        before: What the layer reads.
        middle: Between its two blocks.
        after: What it leaves.
    """

    before: NDArray[Any] | None
    middle: NDArray[Any] | None
    after: NDArray[Any] | None


def layer_groups(count: int, length: int, config: ModelConfig) -> Iterator[range]:
    """Layers `[0, count)` in groups whose inner values of one window fit in memory together."""
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    width = 8 * config.hidden_size + 2 * qkv + 3 * config.intermediate_size
    size = max(1, _GROUP_BYTES // (4 * length * width))
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def worst_window(streams: Sequence[Stream], expected: NDArray[np.float32] | None) -> int:
    """The first window to be no longer finite; else the one that is off most at the end.

    Args:
        streams: Around consecutive layers.
        expected: The reference's stream `[n, T, hidden]` after the last of them, if it has one.
    """
    import numpy as np

    for around in streams:
        for stream in around:
            if stream is not None and not _finite(stream):
                return int((~np.isfinite(stream)).any(axis=(1, 2)).argmax())
    last = streams[-1].after
    if last is None or expected is None:
        return 0
    difference = np.subtract(last, expected, dtype=np.float64)
    return int(np.square(difference).sum(axis=(1, 2)).argmax())


def errors_of_layer(
    index: int,
    stream: Stream,
    expected: tuple[NDArray[np.float32], NDArray[np.float32]],
    reference: ReferenceLayer,
) -> list[LayerError]:
    """That of one layer, and the embedding's before the first.

    Args:
        index: Which layer.
        stream: The artifact's residual stream around it.
        expected: The reference's before and after it, `[n, T, hidden]`.
        reference: The reference's layer.
    """
    start, end = expected
    embedding = [LayerError(-1, _relative(stream.before, start))] if index == 0 else []
    added, attention, mlp = _local_errors(stream, reference)
    found = LayerError(
        layer=index,
        relative_error=_relative(stream.after, end),
        inherited=_relative(stream.before, start),
        added=added,
        attention=attention,
        mlp=mlp,
    )
    return [*embedding, found]


def errors_by_layer(
    streams: Sequence[Stream], checkpoint: Checkpoint, windows: NDArray[np.int64], *, threads: int
) -> list[LayerError]:
    """The layers that artifact and checkpoint both have, the reference's stream computed beside.

    Each layer of the checkpoint is read once.

    Args:
        streams: The artifact's residual stream around every layer.
        checkpoint: What it was made from.
        windows: Token ids [n, T].
        threads: CPU threads.
    """
    steps = ReferenceSteps(checkpoint, windows.shape[1], threads)
    state = steps.embeddings(windows)
    errors: list[LayerError] = []
    for index, stream in enumerate(streams[: checkpoint.config.num_hidden_layers]):
        reference = steps.layer(index)
        following = _stacked(reference.whole, state)
        errors += errors_of_layer(index, stream, (state, following), reference)
        state = following
    return errors


def _local_errors(
    stream: Stream, reference: ReferenceLayer
) -> tuple[float | None, float | None, float | None]:
    """Errors of the layer's result, and of what attention and MLP contribute, on its own input."""
    import numpy as np

    before, middle, after = stream
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


def _relative(found: NDArray[Any] | None, expected: NDArray[np.float32]) -> float | None:
    if found is None or not _finite(found) or found.shape != expected.shape:
        return None
    return relative_error(found, expected)


def _finite(values: NDArray[Any]) -> bool:
    import numpy as np

    return bool(np.isfinite(values).all())
