"""What the attention kernels of an execution provider take, as far as a graph's layout shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint import ModelConfig

Provider = Literal["cpu", "cuda", "dml"]
Precision = Literal["fp32", "fp16"]

# GroupQueryAttention's fused rotary embedding works on 8 pairs at a time.
FUSED_ROTARY_PAIRS = 8
# Where GroupQueryAttention's local_window_size is known to be honoured.
WINDOW_PROVIDERS = ("cpu", "cuda")


@dataclass(frozen=True)
class ExportTarget:
    """The provider that a graph is laid out for.

    Attributes:
        provider: ``cpu``, ``cuda`` or ``dml``.
        precision: Type of the graph's inputs, outputs and activations.
    """

    provider: Provider
    precision: Precision

    @property
    def dtype(self) -> ir.DataType:
        """The type of activations."""
        import onnx_ir as ir

        return ir.DataType.FLOAT if self.precision == "fp32" else ir.DataType.FLOAT16

    @property
    def has_if(self) -> bool:
        """Whether the provider runs `If`; DirectML does not."""
        return self.provider != "dml"

    def fuses_rotary(self, config: ModelConfig) -> bool:
        """Whether GroupQueryAttention rotates q and k itself, and takes them packed with v.

        DirectML's does not; no provider's does where the rotated pairs are no multiple of 8.
        """
        return self.provider != "dml" and config.rotary_dim // 2 % FUSED_ROTARY_PAIRS == 0

    def window(self, config: ModelConfig) -> int:
        """GroupQueryAttention's `local_window_size`: the sliding window, or -1 for none.

        A window as long as the context changes nothing, and DirectML's kernel has none.
        """
        window = config.sliding_window
        if self.provider not in WINDOW_PROVIDERS or window is None:
            return -1
        return window if window < config.max_position_embeddings else -1
