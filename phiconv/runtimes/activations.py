"""What goes into a decoder's matrices, watched during one pass of the reference.

The model runs layer by layer as in `phiconv.runtimes.reference`; what goes into each linear layer
is looked at on its way, and only what is made of it is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from phiconv.errors import StageError
from phiconv.runtimes.reference import (
    Device,
    computing,
    decoder_layer,
    embed,
    hugging_face_config,
    is_finite,
    rotary_embedding,
    run_layer,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint

Compute = Literal["fp32", "bf16"]

LINEAR_LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Boundary:
    """Where a pass over the layers stands between two of them.

    Attributes:
        layer: The layer that comes next.
        stream: The residual stream before it, float32 [n, T, hidden].
    """

    layer: int
    stream: torch.Tensor


def watch_layers(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    watch: Callable[[str, torch.Tensor], bool],
    after_layer: Callable[[Boundary], None],
    *,
    device: Device = "cpu",
    threads: int = 1,
    compute: Compute = "fp32",
    begin: Boundary | None = None,
    advance: Callable[[int, str], None] | None = None,
) -> None:
    """Runs every window through the decoder and shows what goes into each matrix.

    Args:
        checkpoint: An opened checkpoint of any stored dtype.
        windows: Token ids, [n, T].
        watch: Called, for a few windows at a time, with the name of the checkpoint's weight and
            its inputs, float32 [tokens, K]; returns whether they are finite.
        after_layer: Called with the boundary behind each layer, when its weights are gone. The
            stream is overwritten by the next layer.
        device: Where to compute.
        threads: CPU threads; do not change the result.
        compute: The dtype of the products with the weights; everything else is fp32.
        begin: Where to go on; from the embedding by default.
        advance: Called with numbers of tokens that are through a layer, and its name.

    Raises:
        StageError: What goes into a matrix, or comes out of a layer, is not finite; it is named.
        EnvironmentLacksError: There is no CUDA device.
    """
    with computing(device, threads):
        config = hugging_face_config(checkpoint)
        begin = begin or Boundary(0, embed(checkpoint, windows))
        stream = begin.stream.to(device)
        rotary = rotary_embedding(config, windows.shape[1], device)
        for index in range(begin.layer, config.num_hidden_layers):
            layer = decoder_layer(checkpoint, config, index, device)
            hooks = [_watch(layer, name, f"model.layers.{index}", watch) for name in LINEAR_LAYERS]
            if compute == "bf16":
                _use_bf16(layer)
            counted = _counted(advance, f"layer {index}")
            run_layer(layer, config, stream, rotary, device, advance=counted)
            if not is_finite(stream):
                prefix = f"model.layers.{index}"
                raise _not_finite(layer, prefix, f"what comes out of {prefix}")
            for hook in hooks:  # they hold the layer
                hook.remove()
            del layer, hooks
            after_layer(Boundary(index + 1, stream))


def _counted(advance: Callable[[int, str], None] | None, what: str) -> Callable[[int], None]:
    return lambda tokens: advance(tokens, what) if advance is not None else None


def _watch(
    layer: torch.nn.Module, name: str, prefix: str, watch: Callable[[str, torch.Tensor], bool]
) -> torch.utils.hooks.RemovableHandle:
    weight = f"{prefix}.{name}.weight"

    def look(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0].detach()
        if not watch(weight, values.reshape(-1, values.shape[-1])):
            raise _not_finite(layer, prefix, f"what goes into {prefix}.{name}")

    return layer.get_submodule(name).register_forward_pre_hook(look)


def _not_finite(layer: torch.nn.Module, prefix: str, what: str) -> StageError:
    """Names the layer's weight that is to blame, or else what overflowed."""
    broken = [
        f"{prefix}.{name}"
        for name, weight in layer.state_dict().items()
        if not bool(weight.isfinite().all())
    ]
    if broken:
        return StageError(
            f"{what} is not finite, because {broken[0]} holds NaN or Inf",
            where=broken[0],
            remedy="download or save the checkpoint again",
        )
    return StageError(
        f"{what} is not finite, although the layer's weights are",
        where=prefix,
        remedy="find the text that overflows: bisect the token set",
    )


def _use_bf16(layer: torch.nn.Module) -> None:
    """Makes the products with the layer's weights run in bf16; inputs and results stay fp32."""
    import torch

    def product(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(values.bfloat16(), weight).float()

    for name in LINEAR_LAYERS:
        linear: Any = layer.get_submodule(name)
        linear.weight = torch.nn.Parameter(linear.weight.bfloat16(), requires_grad=False)
        linear.forward = partial(product, linear.weight)


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
        advance: Called with numbers of tokens that are through a layer, and its name.

    Returns:
        The sums by the name of the checkpoint's weight, in the order of the layers.

    Raises:
        StageError: What goes into a matrix is not finite; it is named.
        EnvironmentLacksError: There is no CUDA device.
    """
    import torch

    totals: dict[str, torch.Tensor] = {}

    def add(weight: str, values: torch.Tensor) -> bool:
        total = values.square().sum(dim=0, dtype=torch.float64)
        totals[weight] = total + totals[weight] if weight in totals else total
        return bool(total.isfinite().all())

    watch_layers(
        checkpoint,
        windows,
        add,
        lambda _: None,
        device=device,
        threads=threads,
        advance=advance,
    )
    return {
        weight: SquareSums(total.cpu().numpy(), windows.size) for weight, total in totals.items()
    }
