"""The reference: Hugging Face's Phi-3 in fp32, one decoder layer in memory at a time.

The modules are transformers' own (`Phi3DecoderLayer`, `Phi3RotaryEmbedding`, `Phi3RMSNorm` and its
mask functions); only the loop over the layers is ours. A layer's weights are read from the
checkpoint, used for every window and dropped, so peak memory is about one layer in fp32 plus the
activations [n, T, hidden], whatever the model's depth.

On the CPU the result does not depend on the number of threads (its matrix products sum in the same
order), and is the same on every run on one machine. Another processor or a CUDA device sums in
another order: about 1e-6 of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.resources import importing_alone
from phiconv.runtimes.linear import compute_linear_layers, linear

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint

Device = Literal["cpu", "cuda"]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

# How many tokens go through a layer at once: bounds the activations inside the MLP.
_BATCH_TOKENS: dict[Device, int] = {"cpu": 1024, "cuda": 8192}
_EMBEDDING_ROWS = 16384
# Rows of the head that are in fp32 at a time: few enough that their memory is used again at once.
_HEAD_ROWS = 2048


def final_hidden_states(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    *,
    device: Device = "cpu",
    threads: int = 1,
    advance: Callable[[int, str], None] | None = None,
    observe: Callable[[int, NDArray[np.float32]], None] | None = None,
) -> NDArray[np.float32]:
    """Runs every window through the model and returns what its head would be given.

    Args:
        checkpoint: An opened checkpoint of any stored dtype.
        windows: Token ids, [n, T].
        device: Where to compute.
        threads: CPU threads; do not change the result.
        advance: Called after each layer with the number of tokens done in it, and its name.
        observe: Called with 0 and the embeddings, then with i + 1 and the residual stream after
            layer i, [n, T, hidden]. The array is overwritten by the next layer: copy to keep it.

    Returns:
        Hidden states after the final norm, float32 [n, T, hidden].

    Raises:
        StageError: The residual stream is not finite after some layer, which is named.
        EnvironmentLacksError: There is no CUDA device.
    """
    with computing(device, threads):
        config = hugging_face_config(checkpoint)
        stream = embed(checkpoint, windows).to(device)
        _check_finite(stream, "the embedding", checkpoint)
        if observe is not None:
            observe(0, stream.cpu().numpy())
        rotary = rotary_embedding(config, windows.shape[1], device)
        layers = LayerLoader(checkpoint, config, device)
        for index in range(config.num_hidden_layers):
            run_layer(layers.load(index), config, stream, rotary, device)
            _check_finite(stream, f"layer {index}", checkpoint)
            if observe is not None:
                observe(index + 1, stream.cpu().numpy())
            if advance is not None:
                advance(windows.size, f"layer {index}")
        norm = modeling_module().Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps).to(device)
        norm.load_state_dict({"weight": _tensor(checkpoint, FINAL_NORM, device)})
        for window in stream:
            window[...] = norm(window)
        final: NDArray[np.float32] = stream.cpu().numpy()
    return final


class LanguageModelHead:
    """The head of a checkpoint, applied to stored hidden states.

    Kept in the checkpoint's dtype (the embedding where there is no separate head) and cast to fp32
    a block of rows at a time, so a vocabulary of 200,064 costs 1.2 GB, not 2.5.

    Args:
        checkpoint: An opened checkpoint.
        device: Where to compute.
        threads: CPU threads; do not change the result.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: Device = "cpu", threads: int = 1):
        # transformers ties nothing when the checkpoint holds a head of its own, whatever the config
        name = LM_HEAD if LM_HEAD in checkpoint.tensors else EMBEDDING
        self._device = device
        self._threads = threads
        with computing(device, threads):
            self._weight = stored_tensor(checkpoint, name).to(device)

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits float32 [T, V] of final hidden states [T, hidden]."""
        import torch

        with computing(self._device, self._threads):
            inputs = torch.from_numpy(hidden).to(self._device)
            rows = self._weight.shape[0]
            out = torch.empty(len(hidden), rows, dtype=torch.float32, device=self._device)
            for start in range(0, rows, _HEAD_ROWS):
                block = self._weight[start : start + _HEAD_ROWS].to(torch.float32)
                out[:, start : start + _HEAD_ROWS] = linear(inputs, block)
            result: NDArray[np.float32] = out.cpu().numpy()
        return result


class LayerLoader:
    """Decoder layers in fp32, each loaded into the memory of the one before.

    Fresh memory for each would cost more than reading and converting the weights: the system clears
    it page by page.

    Args:
        checkpoint: An opened checkpoint.
        config: Transformers' reading of its config.
        device: Where the layers are to be.
    """

    def __init__(self, checkpoint: Checkpoint, config: Any, device: Device):
        self._checkpoint = checkpoint
        self._config = config
        self._device = device
        self._weights: dict[str, torch.Tensor] = {}

    def load(self, index: int) -> torch.nn.Module:
        """Layer `index` with the checkpoint's weights; its predecessor's are gone."""
        import torch

        layer = _empty_layer(self._config, index)
        for name, empty in layer.state_dict().items():
            values = stored_tensor(self._checkpoint, f"model.layers.{index}.{name}")
            if name not in self._weights:
                self._weights[name] = torch.empty(empty.shape, device=self._device)
            self._weights[name].copy_(values)
        layer.load_state_dict(self._weights, strict=True, assign=True)
        return compute_linear_layers(layer)


def run_layer(
    layer: torch.nn.Module,
    config: Any,
    stream: torch.Tensor,
    rotary: Rotary,
    device: Device,
    *,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Applies one decoder layer to `stream` [n, T, hidden] in place, a few windows at a time.

    `advance` is called with the number of tokens of each batch that is done.
    """
    batch = max(1, _BATCH_TOKENS[device] // stream.shape[1])
    for start in range(0, len(stream), batch):
        windows = stream[start : start + batch]
        windows[...] = layer(
            windows,
            attention_mask=attention_mask(config, windows, rotary.position_ids),
            position_ids=rotary.position_ids,
            position_embeddings=rotary.embeddings,
        )
        if advance is not None:
            advance(windows.shape[0] * windows.shape[1])


class Rotary(NamedTuple):
    """Position ids [1, T] and transformers' cosines and sines for them."""

    position_ids: torch.Tensor
    embeddings: tuple[torch.Tensor, torch.Tensor]


def rotary_embedding(config: Any, length: int, device: Device) -> Rotary:
    """Position ids and transformers' own cosines and sines of a window of `length` tokens."""
    import torch

    position_ids = torch.arange(length, device=device)[None]
    like = torch.empty(0, device=device)
    embeddings = (
        modeling_module().Phi3RotaryEmbedding(config).to(device)(like, position_ids=position_ids)
    )
    return Rotary(position_ids, embeddings)


def attention_mask(config: Any, embeddings: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """The attention mask that transformers' Phi3Model builds for these inputs."""
    with importing_alone():
        from transformers import masking_utils

    create = (
        masking_utils.create_causal_mask
        if config.sliding_window is None
        else masking_utils.create_sliding_window_causal_mask
    )
    return create(
        config=config,
        inputs_embeds=embeddings,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )


def decoder_layer(
    checkpoint: Checkpoint, config: Any, index: int, device: Device
) -> torch.nn.Module:
    """Decoder layer `index` in fp32 with the checkpoint's weights, as transformers computes it."""
    layer = _empty_layer(config, index)
    prefix = f"model.layers.{index}."
    weights = {name: _tensor(checkpoint, prefix + name, device) for name in layer.state_dict()}
    layer.load_state_dict(weights, strict=True, assign=True)
    return layer


def _empty_layer(config: Any, index: int) -> torch.nn.Module:
    """Transformers' decoder layer `index`, whose weights have no memory yet."""
    import torch

    with torch.device("meta"):
        layer: torch.nn.Module = modeling_module().Phi3DecoderLayer(config, index)
    return layer.eval()


def embed(checkpoint: Checkpoint, windows: NDArray[np.int64]) -> torch.Tensor:
    """Rows of the embedding for each token, float32 [n, T, hidden]; the table is read in blocks."""
    import numpy as np
    import torch

    rows, hidden = checkpoint.tensors[EMBEDDING].shape
    out = np.empty((*windows.shape, hidden), dtype=np.float32)
    for start in range(0, rows, _EMBEDDING_ROWS):
        stop = min(start + _EMBEDDING_ROWS, rows)
        block = checkpoint.read_rows(EMBEDDING, start, stop)
        here = (windows >= start) & (windows < stop)
        out[here] = block[windows[here] - start]
    return torch.from_numpy(out)


def stored_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A whole tensor of the checkpoint in its own dtype."""
    import numpy as np
    import torch

    values = checkpoint.read(name)
    if checkpoint.tensors[name].dtype == "bf16":
        # torch takes no ml_dtypes array: the same bits go in as integers
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _tensor(checkpoint: Checkpoint, name: str, device: Device) -> torch.Tensor:
    """A whole tensor of the checkpoint as float32 on the device."""
    import torch

    return stored_tensor(checkpoint, name).to(device).to(torch.float32)


def is_finite(stream: torch.Tensor) -> bool:
    """Whether a stream [n, T, hidden] holds neither NaN nor Inf, looked at a window at a time.

    For all at once PyTorch would take copies larger than the stream itself.
    """
    return all(bool(window.isfinite().all()) for window in stream)


def _check_finite(stream: torch.Tensor, what: str, checkpoint: Checkpoint) -> None:
    if not is_finite(stream):
        raise StageError(
            f"the reference is not finite after {what}",
            where=str(checkpoint.path),
            remedy="look for NaN or Inf in this part of the checkpoint (phiconv inspect)",
        )


def hugging_face_config(checkpoint: Checkpoint) -> Any:
    """Transformers' own reading of config.json, so that its defaults hold, not ours."""
    with importing_alone():
        from transformers import Phi3Config
        from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # errors only: its advice on config.json is not about this run
    try:
        config = Phi3Config.from_pretrained(str(checkpoint.path))
    finally:
        logging.set_verbosity(verbosity)
    config._attn_implementation = "sdpa"
    return config


def modeling_module() -> Any:
    """Transformers' module of the Phi-3 layers."""
    with importing_alone():
        from transformers.models.phi3 import modeling_phi3

    return modeling_phi3


@contextmanager
def computing(device: Device, threads: int) -> Iterator[None]:
    """fp32 that is fp32 (no TF32), without gradients, with `threads` CPU threads."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLacksError(
            "PyTorch finds no CUDA device for the reference",
            where="reference_device",
            remedy="set reference_device: cpu, or install PyTorch with CUDA",
        )
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
