"""What happens inside llama.cpp: a GGUF file's residual stream, layer by layer, and every step.

llama.cpp gives no name to what its attention blocks add and to the stream between the blocks: both
follow from the stream after the layer and what the MLP adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.diagnosis.gguf_weight_map import GgmlWeight, gguf_weight
from phiconv.diagnosis.layer_errors import (
    Stream,
    StreamErrors,
    errors_by_layer,
    errors_of_layer,
    layer_groups,
    worst_window,
)
from phiconv.diagnosis.reference_steps import ReferenceSteps
from phiconv.diagnosis.results import LayerError, OperatorError
from phiconv.diagnosis.step_check import INT8_TOLERANCE, StepCheck
from phiconv.errors import StageError
from phiconv.runtimes.llama_cpp import LlamaFile, gguf_file
from phiconv.runtimes.llama_cpp_values import ValueProbe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint
    from phiconv.gguf.tensors import GgufTensors

_EMBEDDING, _FINAL_NORM, _LOGITS = "embd", "result_norm", "result_output"
_INNER = ("attn_norm", "wqkv", "kqv_out", "ffn_norm", "ffn_up", "ffn_swiglu")
# What llama.cpp rounds activations to before it multiplies them with a weight of this type.
_TOLERANCES = {"f32": 1e-3, "f16": 1e-2, "bf16": 1e-2}

Values = Mapping[str, "NDArray[Any]"]


def gguf_stream_errors(
    file: LlamaFile,
    tensors: GgufTensors,
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    states: Sequence[NDArray[np.float32]],
    *,
    threads: int,
    advance: Callable[[int, str], None],
) -> StreamErrors:
    """Runs the file in llama.cpp, looks inside, and compares every layer and every step.

    Args:
        file: The file as llama.cpp opened it.
        tensors: Its tensors.
        checkpoint: What it was made from.
        windows: Token ids [n, T]; single steps are compared on one of them, the one whose residual
            stream is off most.
        states: The reference's residual stream [n, T, hidden]: the embeddings, then after every
            layer.
        threads: CPU threads.
        advance: Called with the number of tokens done in a layer, and its name.

    Raises:
        StageError: llama.cpp failed.
        EnvironmentLacksError: It does not hand out its values.
    """
    config, length = checkpoint.config, windows.shape[1]
    steps = ReferenceSteps(checkpoint, length, threads)
    probe = ValueProbe(file, length, threads)
    layers: list[LayerError] = []
    first: list[OperatorError] = []
    inner: list[OperatorError] = []
    last: list[OperatorError] = []
    for group in layer_groups(config.num_hidden_layers, length, config):
        streams = _streams(probe, windows, group)
        worst = worst_window(streams, states[group.stop])
        window = windows[worst]
        ends = (_FINAL_NORM, _LOGITS) if group.start == 0 else ()
        whole = probe.run(window, [*(name for i in group for name in _names(i)), *ends])
        if group.start == 0:
            final = f"l_out-{config.num_hidden_layers - 1}"
            whole |= {} if final in whole else probe.run(window, [final])
            first, last = _end_steps(whole, final, tensors, window, steps)
        for index, stream in zip(group, streams, strict=True):
            values = {**whole, **_between(index, stream, worst)}
            inner += _layer_steps(index, values, tensors, steps)
            expected = (states[index], states[index + 1])
            layers += errors_of_layer(index, stream, expected, steps.layer(index))
            advance(windows.size, f"layer {index}")
    return StreamErrors(layers, [*first, *inner, *last])


def measure_gguf_layers(
    artifact: Path, checkpoint: Checkpoint, windows: NDArray[np.int64], *, threads: int
) -> list[LayerError]:
    """The layers of `gguf_stream_errors` without their steps, the reference's computed beside.

    Args:
        artifact: The GGUF file, or the folder that holds it.
        checkpoint: What it was made from.
        windows: Token ids [n, T]; one short window will do, whose residual stream is in memory as a
            whole.
        threads: CPU threads.

    Raises:
        StageError: llama.cpp failed, or the residual stream is not as wide as the checkpoint's.
        EnvironmentLacksError: llama.cpp does not hand out its values.
    """
    config, file = checkpoint.config, gguf_file(artifact)
    probe = ValueProbe(LlamaFile(file), windows.shape[1], threads)
    streams = _streams(probe, windows, range(config.num_hidden_layers))
    for stream in streams:
        if stream.before is not None and stream.before.shape[-1] != config.hidden_size:
            raise StageError(
                f"the residual stream is {stream.before.shape[-1]} wide, the checkpoint's "
                f"{config.hidden_size}",
                where=str(file),
            )
    return errors_by_layer(streams, checkpoint, windows, threads=threads)


def _names(layer: int) -> list[str]:
    """What is looked at in a layer."""
    return [*(f"{name}-{layer}" for name in _INNER), *_stream_names(layer)]


def _stream_names(layer: int) -> tuple[str, str, str]:
    """The stream before a layer, what its MLP adds, and the stream after it."""
    before = f"l_out-{layer - 1}" if layer else _EMBEDDING
    return before, f"ffn_out-{layer}", f"l_out-{layer}"


def _streams(probe: ValueProbe, windows: NDArray[np.int64], layers: range) -> list[Stream]:
    import numpy as np

    names = list(dict.fromkeys(name for layer in layers for name in _stream_names(layer)))
    found = [probe.run(window, names) for window in windows]
    stacked = {
        name: np.stack([values[name] for values in found])
        for name in names
        if all(name in values for values in found)
    }
    streams = []
    for layer in layers:
        before, added, after = (stacked.get(name) for name in _stream_names(layer))
        middle = None if after is None or added is None else after - added
        streams.append(Stream(before, middle, after))
    return streams


def _between(layer: int, stream: Stream, window: int) -> dict[str, NDArray[Any]]:
    """What llama.cpp has no name for, of one window."""
    if stream.before is None or stream.middle is None:
        return {}
    before, middle = stream.before[window], stream.middle[window]
    return {f"middle-{layer}": middle, f"attn_added-{layer}": middle - before}


def _layer_steps(
    layer: int, values: Values, tensors: GgufTensors, steps: ReferenceSteps
) -> list[OperatorError]:
    check = StepCheck(values, layer, steps)
    before = _stream_names(layer)[0]
    at = {name: f"{name}-{layer}" for name in (*_INNER, "middle", "attn_added", "ffn_out")}

    def weight(name: str) -> GgmlWeight | None:
        return _readable(tensors, f"blk.{layer}.{name}.weight")

    check.norm("input_layernorm", before, at["attn_norm"], weight("attn_norm"))
    _linear(check, "self_attn.qkv_proj", at["attn_norm"], at["wqkv"], weight("attn_qkv"))
    check.step("self_attn.attention", [at["wqkv"]], at["kqv_out"], steps.attention)
    _linear(check, "self_attn.o_proj", at["kqv_out"], at["attn_added"], weight("attn_output"))
    check.norm("post_attention_layernorm", at["middle"], at["ffn_norm"], weight("ffn_norm"))
    _linear(check, "mlp.gate_up_proj", at["ffn_norm"], at["ffn_up"], weight("ffn_up"))
    check.step("mlp.activation", [at["ffn_up"]], at["ffn_swiglu"], steps.gated)
    _linear(check, "mlp.down_proj", at["ffn_swiglu"], at["ffn_out"], weight("ffn_down"))
    return check.errors


def _end_steps(
    values: Values,
    final: str,
    tensors: GgufTensors,
    window: NDArray[np.int64],
    steps: ReferenceSteps,
) -> tuple[list[OperatorError], list[OperatorError]]:
    """The embedding's step, and those of the final norm and the head."""
    before, after = StepCheck(values, None, steps), StepCheck(values, None, steps)
    table = _readable(tensors, "token_embd.weight")
    if table is not None:
        before.rows("embed_tokens", _EMBEDDING, table, window.tolist())
    after.norm("norm", final, _FINAL_NORM, _readable(tensors, "output_norm.weight"))
    head = _readable(tensors, "output.weight") or table
    _linear(after, "lm_head", _FINAL_NORM, _LOGITS, head)
    return before.errors, after.errors


def _linear(
    check: StepCheck, component: str, source: str, output: str, weight: GgmlWeight | None
) -> None:
    tolerance = 0.0 if weight is None else _TOLERANCES.get(weight.format.dtype, INT8_TOLERANCE)
    check.linear(component, source, output, weight, tolerance)


def _readable(tensors: GgufTensors, name: str) -> GgmlWeight | None:
    """A weight, or None where it is missing or not read here: `TensorError` says so."""
    try:
        return gguf_weight(tensors, name)
    except StageError:
        return None
