"""The memory that a validation takes, told at plan time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from phiconv.stages.reference import INTERPRETER_BYTES
from phiconv.stages.stage import GGUF, InputRef

if TYPE_CHECKING:
    from phiconv.checkpoint import ModelConfig
    from phiconv.stages.validate import ValidateParams

_FLOAT = 4
# ONNX Runtime, and what reads graphs, weights and tokenizers for the checks.
_RUNTIME_BYTES = 100 << 20
# Of the head, as checkpoints store it.
_STORED = 2


def peak_bytes(params: ValidateParams, config: ModelConfig, inputs: Sequence[InputRef]) -> int:
    """The most resident memory of the stage `validate`, in bytes.

    Beside the interpreter and the artifact in its runtime that is what one of two phases takes:

    - comparing logits: those of a window twice, in the runtime's memory and as an array, and a
      chunk of the reference's; the head that makes these, and the hidden states;
    - the error by layer: a layer of the reference in fp32.

    Against what was measured on examples/tiny-phi3, on a vocabulary of 200,064 and on weights of
    0.5 GB in int4 and 0.8 GB in fp16: 1.03 to 1.35 times as much.

    Args:
        params: Of the stage.
        config: The checkpoint's.
        inputs: The artifact first.
    """
    layers = 0
    if params.layer_errors and params.runtime != "llama.cpp":
        layers = _FLOAT * _layer_weights(config)
    held = _held_bytes(config, inputs[0]) if inputs else 0
    return INTERPRETER_BYTES + _RUNTIME_BYTES + held + max(_comparing_bytes(params, config), layers)


def _comparing_bytes(params: ValidateParams, config: ModelConfig) -> int:
    from phiconv.metrics.comparison import CHUNK_POSITIONS

    length = _longest_window(params, config)
    logits = _FLOAT * config.vocab_size * (2 * length + min(CHUNK_POSITIONS, length))
    head = _STORED * config.vocab_size * config.hidden_size
    hidden = _FLOAT * params.windows * params.window_length * config.hidden_size
    # attention scores of as many heads as are computed at once, and the MLP's activations
    at_once = min(config.num_attention_heads, os.cpu_count() or 1)
    scores = _FLOAT * at_once * length**2
    activations = _FLOAT * length * (4 * config.hidden_size + 3 * config.intermediate_size)
    return logits + head + hidden + scores + activations


def _longest_window(params: ValidateParams, config: ModelConfig) -> int:
    from phiconv.runtimes.length_reference import probe_length, probed_boundaries

    probes = probed_boundaries(config) if params.length_probes else ()
    return max([params.window_length, *(probe_length(config, found) for found in probes)])


def _layer_weights(config: ModelConfig) -> int:
    attention = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return config.hidden_size * (2 * attention + 3 * config.intermediate_size)


def _held_bytes(config: ModelConfig, artifact: InputRef) -> int:
    """The artifact in its runtime.

    Weights are held twice: as read and as packed for the kernels, or, of fp16 on a CPU, as fp32.
    Of the embedding only the rows of the tokens are ever read.
    """
    weights, embedding = _weight_bytes(config, artifact)
    return 2 * (weights - embedding)


def _weight_bytes(config: ModelConfig, artifact: InputRef) -> tuple[int, int]:
    """Bytes of all weights, and of the embedding among them."""
    from phiconv.stages.convert_gguf import ConvertGguf, ConvertGgufParams
    from phiconv.stages.write_onnx import artifact_bytes

    rows = config.vocab_size * config.hidden_size
    if not artifact.made_by:
        files = artifact.path.glob("*") if artifact.path.is_dir() else [artifact.path]
        total = sum(file.stat().st_size for file in files if file.is_file())
        # as it is stored nobody has said yet: no more than fp16, and half of all
        return total, min(_STORED * rows, total // 2)
    if artifact.kind != GGUF:
        return artifact_bytes(config, artifact.made_by)
    weights = sum(prod(shape) for shape in config.expected_tensors().values())
    made = [params for _, params in artifact.made_by if isinstance(params, ConvertGgufParams)]
    total = ConvertGguf().estimate(made[-1], config, ()).disk_bytes if made else 0
    return total, total * rows // weights
