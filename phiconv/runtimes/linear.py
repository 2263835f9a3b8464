"""Products with a layer's weights in fp32, by the faster of the two libraries PyTorch has.

For dense fp32 matrices on x86 PyTorch calls MKL, which reaches 100 GFLOP/s on a core of an AMD EPYC
(Zen 5) where oneDNN, which is also in PyTorch, reaches 210. Both are fp32 throughout; they sum in
another order. Neither result depends on the number of threads.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`inputs @ weight.T + bias` in fp32: `[..., K]` and `[N, K]` to `[..., N]`.

    Gradients are not tracked.
    """
    import torch

    if inputs.device.type != "cpu" or inputs.dtype != torch.float32 or not _has_onednn():
        return torch.nn.functional.linear(inputs, weight, bias)
    return torch.nn.functional.linear(inputs.to_mkldnn(), weight, bias).to_dense()


def compute_linear_layers(module: torch.nn.Module) -> torch.nn.Module:
    """Makes every `torch.nn.Linear` inside `module` compute by `linear`, and returns `module`."""
    import torch

    for layer in module.modules():
        if type(layer) is torch.nn.Linear:
            # not a closure over the layer: it would keep the weights until they are collected
            product = partial(linear, weight=layer.weight, bias=layer.bias)
            layer.forward = product  # type: ignore[method-assign]
    return module


@cache
def _has_onednn() -> bool:
    """Whether this is an x86 processor and PyTorch was built with oneDNN.

    On others PyTorch calls what is fastest there by itself.
    """
    import torch

    vectors: str = torch.backends.cpu.get_cpu_capability()
    return vectors.startswith("AVX") and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
