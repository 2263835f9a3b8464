"""Single steps of the reference in fp32, on inputs of the caller's choice.

The modules are transformers' own, as in `phiconv.runtimes.reference`; a step is one of them with
its neighbours replaced by the identity. All arrays are float32 `[T, width]`, one window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phiconv.runtimes.linear import linear
from phiconv.runtimes.reference import (
    LayerLoader,
    attention_mask,
    computing,
    embed,
    hugging_face_config,
    modeling_module,
    rotary_embedding,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint


class ReferenceSteps:
    """The steps of a checkpoint's layers for windows of one length, on the CPU.

    Args:
        checkpoint: An opened checkpoint.
        length: T.
        threads: CPU threads; do not change the result.
    """

    def __init__(self, checkpoint: Checkpoint, length: int, threads: int):
        import torch

        self._checkpoint = checkpoint
        self._threads = threads
        with computing("cpu", threads):
            self._config = hugging_face_config(checkpoint)
            self._rotary = rotary_embedding(self._config, length, "cpu")
            self._layers = LayerLoader(checkpoint, self._config, "cpu")
            with torch.device("meta"):
                self._attention = modeling_module().Phi3Attention(self._config, 0).eval()
                self._mlp = modeling_module().Phi3MLP(self._config).eval()
        self._attention.qkv_proj = self._attention.o_proj = torch.nn.Identity()
        self._mlp.gate_up_proj = self._mlp.down_proj = torch.nn.Identity()

    def norm(self, values: NDArray[Any], weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """RMS norm with the checkpoint's epsilon and a weight of the caller's."""
        with computing("cpu", self._threads):
            norm = modeling_module().Phi3RMSNorm(len(weight), eps=self._config.rms_norm_eps)
            norm.load_state_dict({"weight": _tensor(weight)})
            return _array(norm(_tensor(values)))

    def linear(self, values: NDArray[Any], weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """`values @ weight.T` for a weight `[N, K]`."""
        with computing("cpu", self._threads):
            return _array(linear(_tensor(values), _tensor(weight)))

    def attention(self, qkv: NDArray[Any]) -> NDArray[np.float32]:
        """Rotary embedding and attention of packed q, k, v; `[T, heads * head_dim]`."""
        with computing("cpu", self._threads):
            return _array(self._attend(self._attention, _tensor(qkv))[0])

    def rotated(self, heads: NDArray[Any]) -> NDArray[np.float32]:
        """Queries or keys after rotary embedding, `[T, number of heads * head_dim]` both ways."""
        with computing("cpu", self._threads):
            split = _tensor(heads).view(1, len(heads), -1, self._attention.head_dim).transpose(1, 2)
            cos, sin = self._rotary.embeddings
            rotated = modeling_module().apply_rotary_pos_emb(split, split, cos, sin)[0]
            return _array(rotated[0].transpose(0, 1).reshape(len(heads), -1))

    def gated(self, gate_up: NDArray[Any]) -> NDArray[np.float32]:
        """Activated gate times up, of packed gate and up."""
        with computing("cpu", self._threads):
            return _array(self._mlp(_tensor(gate_up)))

    def embeddings(self, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The embeddings `[n, T, hidden]` of token ids `[n, T]`."""
        return _array(embed(self._checkpoint, windows))

    def layer(self, index: int) -> ReferenceLayer:
        """A decoder layer with the checkpoint's weights, to be used before the next is asked for.

        The next one is loaded into its memory.
        """
        with computing("cpu", self._threads):
            return ReferenceLayer(self, self._layers.load(index))

    def _attend(self, module: torch.nn.Module, values: torch.Tensor) -> Any:
        batch = values[None]
        return module(
            batch,
            attention_mask=attention_mask(self._config, batch, self._rotary.position_ids),
            position_ids=self._rotary.position_ids,
            position_embeddings=self._rotary.embeddings,
        )[0]


class ReferenceLayer:
    """One decoder layer, block by block."""

    def __init__(self, steps: ReferenceSteps, module: Any):
        self._steps = steps
        self._module = module

    def attention_block(self, residual: NDArray[Any]) -> NDArray[np.float32]:
        """What the attention block adds to a residual stream."""
        with computing("cpu", self._steps._threads):
            normed = self._module.input_layernorm(_tensor(residual))
            return _array(self._steps._attend(self._module.self_attn, normed)[0])

    def whole(self, residual: NDArray[Any]) -> NDArray[np.float32]:
        """The residual stream after the layer."""
        middle = residual + self.attention_block(residual)
        return middle + self.mlp_block(middle)

    def mlp_block(self, residual: NDArray[Any]) -> NDArray[np.float32]:
        """What the MLP adds to a residual stream."""
        with computing("cpu", self._steps._threads):
            normed = self._module.post_attention_layernorm(_tensor(residual))
            return _array(self._module.mlp(normed))


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    import numpy as np
    import torch

    array = np.ascontiguousarray(values, dtype=np.float32)
    # torch warns of memory it must not write to, such as a mapped file
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    result: NDArray[np.float32] = tensor.numpy()
    return result
