"""The calibration: one pass over the decoder layers, each searched while its inputs are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from phiconv.awq.layer import Settings, search_layer
from phiconv.awq.resume import FinishedLayers
from phiconv.awq.statistics import InputStatistics, StatisticsCollector, sampled_tokens
from phiconv.runtimes.activations import LINEAR_LAYERS, Boundary, Compute, watch_layers

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint
    from phiconv.runtimes.reference import Device


def calibrate(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    settings: Settings,
    finished: FinishedLayers,
    *,
    gram_tokens: int,
    compute: Compute,
    device: Device,
    advance: Callable[[int, str], None],
) -> int:
    """Searches every layer that is not finished yet.

    Peak memory is the residual stream, one layer's weights, and the Gram matrices of its inputs.

    Args:
        checkpoint: The checkpoint.
        windows: Token ids, [n, T].
        settings: How layers are searched.
        finished: Where results go, a layer at a time.
        gram_tokens: How many tokens the Gram matrices are taken on, at most.
        compute: The dtype of the products with the weights.
        device: Where the layers run.
        advance: Called with units of work and their name: a layer is as many as there are tokens
            for running it, and as many again for searching it.

    Returns:
        How many layers were finished already.

    Raises:
        StageError: What goes into a weight is not finite, or degenerate; it is named.
        EnvironmentLacksError: There is no CUDA device.
    """
    sample = sampled_tokens(windows.size, gram_tokens)
    collectors: dict[str, StatisticsCollector] = {}

    def watch(weight: str, values: torch.Tensor) -> bool:
        return collectors.setdefault(weight, StatisticsCollector(sample)).add(values)

    def after_layer(boundary: Boundary) -> None:
        layer = boundary.layer - 1

        def taken(weight: str) -> Callable[[], InputStatistics]:
            return lambda: collectors.pop(weight).result()

        result = search_layer(
            checkpoint,
            layer,
            {weight: taken(weight) for weight in list(collectors)},
            settings,
            lambda weight: advance(windows.size // len(LINEAR_LAYERS), f"search {weight}"),
        )
        finished.save(layer, result, boundary)

    begin = finished.begin()
    resumed = begin.layer if begin else 0
    if resumed:
        advance(2 * windows.size * resumed, f"layer {resumed - 1}")
    watch_layers(
        checkpoint,
        windows,
        watch,
        after_layer,
        device=device,
        threads=settings.threads,
        compute=compute,
        begin=begin,
        advance=advance,
    )
    return resumed
