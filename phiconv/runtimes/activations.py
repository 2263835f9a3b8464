"""How strongly each input of a decoder's matrices is used, from one pass of the reference.

The model runs layer by layer as in `phiconv.runtimes.reference`; what goes into each linear layer
is looked at on its way, and only its sums are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phiconv.errors import StageError
from phiconv.runtimes.reference import (
    Device,
    computing,
    decoder_layer,
    embed,
    hugging_face_config,
    rotary_embedding,
    run_layer,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint

LINEAR_LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class SquareSums:
    """What went into one matrix.

    Attributes:
        sums: Sum over all tokens of the square of each input, float64 [K].
        tokens: How many tokens there were.
    """

    sums: NDArray[np.float64]
    tokens: int


def square_sums(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    *,
    device: Device = "cpu",
    threads: int = 1,
    advance: Callable[[int, str], None] | None = None,
) -> dict[str, SquareSums]:
    """Runs every window through the decoder and sums the squares of the inputs.

    Args:
        checkpoint: An opened checkpoint of any stored dtype.
        windows: Token ids, [n, T].
        device: Where to compute.
        threads: CPU threads; do not change the result.
        advance: Called after each layer with the number of tokens done in it, and its name.

    Returns:
        The sums by the name of the checkpoint's weight, in the order of the layers.

    Raises:
        StageError: What goes into a matrix is not finite; it is named.
        EnvironmentLacksError: There is no CUDA device.
    """
    found: dict[str, SquareSums] = {}
    with computing(device, threads):
        config = hugging_face_config(checkpoint)
        stream = embed(checkpoint, windows).to(device)
        rotary = rotary_embedding(config, windows.shape[1], device)
        for index in range(config.num_hidden_layers):
            layer = decoder_layer(checkpoint, config, index, device)
            sums = {name: _watch(layer.get_submodule(name)) for name in LINEAR_LAYERS}
            run_layer(layer, config, stream, rotary, device)
            for name, total in sums.items():
                weight = f"model.layers.{index}.{name}.weight"
                found[weight] = SquareSums(_finite(total(), weight), windows.size)
            if advance is not None:
                advance(windows.size, f"layer {index}")
    return found


def _finite(total: torch.Tensor, weight: str) -> NDArray[np.float64]:
    if not bool(total.isfinite().all()):
        raise StageError(f"what goes into {weight} is not finite")
    sums: NDArray[np.float64] = total.cpu().numpy()
    return sums


def _watch(linear: torch.nn.Module) -> Callable[[], torch.Tensor]:
    """Starts adding up the squares of what goes into a layer; the result gives the sums so far."""
    import torch

    totals: list[torch.Tensor] = []

    def add(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        total = values.square().sum(dim=0, dtype=torch.float64)
        totals[:] = [total + totals[0]] if totals else [total]

    linear.register_forward_pre_hook(add)
    return lambda: totals[0]
