"""Checks what a GGUF file says of itself against the checkpoint: no weight is read, nothing is run.

What a key means and what holds where it is missing follows `llama_model_base::load_hparams` of
llama.cpp's src/llama-model.cpp and src/models/phi3.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from phiconv.diagnosis.results import Finding
from phiconv.errors import CheckpointError
from phiconv.gguf.metadata import ARCHITECTURE, architecture_values
from phiconv.gguf.plan import gguf_names
from phiconv.gguf.structure import GgufStructure, Scalar, TensorInfo, read_structure

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint, ModelConfig

_ROTARY, _ATTENTION = "self_attn.rotary", "self_attn.attention"
# Relative difference of a float32 from the configuration's decimal.
_EQUAL = 1e-5
_SHOWN = 4


class _Key(NamedTuple):
    """A key of the architecture: what it is about, and what a difference does."""

    check: str
    component: str
    severity: Literal["error", "warning"] = "error"


_KEYS = {
    "context_length": _Key("context length", "model", "warning"),
    "embedding_length": _Key("sizes", "model"),
    "feed_forward_length": _Key("sizes", "mlp"),
    "block_count": _Key("layers", "model"),
    "attention.head_count": _Key("attention heads", _ATTENTION),
    "attention.head_count_kv": _Key("attention heads", _ATTENTION),
    "attention.layer_norm_rms_epsilon": _Key("norm epsilon", "norms"),
    # llama.cpp computes Phi-3 without its window and takes 0 for the name of Phi-4
    "attention.sliding_window": _Key("attention window", _ATTENTION, "warning"),
    "rope.dimension_count": _Key("rotary embedding", _ROTARY),
    "rope.freq_base": _Key("rotary embedding", _ROTARY),
    "rope.scaling.attn_factor": _Key("rotary embedding", _ROTARY),
    "rope.scaling.original_context_length": _Key("rotary embedding", _ROTARY),
}
# What Phi-3's files do not have, and the values with which nothing changes.
_NEUTRAL: Mapping[str, tuple[_Key, tuple[Scalar, ...]]] = {
    "rope.scaling.type": (_Key("rotary embedding", _ROTARY), ("none", "linear", "longrope")),
    "rope.scaling.factor": (_Key("rotary embedding", _ROTARY), (0.0, 1.0)),
    "rope.scale_linear": (_Key("rotary embedding", _ROTARY), (0.0, 1.0)),
    "expert_count": (_Key("experts", "mlp"), (0,)),
}
_HEAD = "output.weight"
_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")


def lint_gguf(file: Path, checkpoint: Checkpoint) -> list[Finding]:
    """Every contradiction between a file's metadata and its checkpoint.

    Args:
        file: The GGUF file.
        checkpoint: What it was made from.

    Raises:
        StageError: It is no sound GGUF file.
    """
    structure = read_structure(file)
    name = structure.metadata.get("general.architecture")
    if name != ARCHITECTURE:
        message = f"the architecture is {name}, the checkpoint's is {ARCHITECTURE}"
        return [Finding("architecture", "error", "model", (), message)]
    return [
        *_architecture(structure, checkpoint.config),
        *_heads(structure, checkpoint.config),
        *_factors(file, structure, checkpoint.config),
        *_other_tensors(structure, checkpoint),
        *_special_tokens(structure, checkpoint),
    ]


def _architecture(structure: GgufStructure, config: ModelConfig) -> Iterator[Finding]:
    found = structure.metadata
    for full_name, wanted in architecture_values(config).items():
        name = full_name.removeprefix(f"{ARCHITECTURE}.")
        value = found.get(full_name, _default(name, config))
        if not _equal(value, wanted):
            key = _KEYS[name]
            if name == "context_length" and isinstance(value, int) and value > wanted:
                key = key._replace(severity="error")  # positions that no training had
            yield _contradiction(key, name, value, wanted, config)
    for name, (key, neutral) in _NEUTRAL.items():
        value = found.get(f"{ARCHITECTURE}.{name}")
        if value is not None and not any(_equal(value, harmless) for harmless in neutral):
            message = f"{name} {_shown(value)}, the checkpoint has none"
            yield Finding(key.check, key.severity, key.component, _layers(key, config), message)
    if config.rope is None and f"{ARCHITECTURE}.rope.scaling.attn_factor" in found:
        value = found[f"{ARCHITECTURE}.rope.scaling.attn_factor"]
        if not _equal(value, 1.0):
            key = _KEYS["rope.scaling.attn_factor"]
            yield _contradiction(key, "rope.scaling.attn_factor", value, 1.0, config)


def _default(name: str, config: ModelConfig) -> object:
    """What llama.cpp takes for a key that is missing; None where it does not load the file."""
    return {
        "attention.head_count_kv": config.num_attention_heads,
        "attention.sliding_window": 0,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "rope.freq_base": 10000.0,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.original_context_length": config.max_position_embeddings,
    }.get(name)


def _heads(structure: GgufStructure, config: ModelConfig) -> Iterator[Finding]:
    """The width of a head, which follows from the number of heads where it is not stated."""
    for name in ("attention.key_length", "attention.value_length"):
        default = config.hidden_size // config.num_attention_heads
        value = structure.metadata.get(f"{ARCHITECTURE}.{name}", default)
        if not _equal(value, config.head_dim):
            yield _contradiction(
                _Key("attention heads", _ATTENTION), name, value, config.head_dim, config
            )


def _factors(file: Path, structure: GgufStructure, config: ModelConfig) -> Iterator[Finding]:
    """LongRoPE's factors, which are tensors."""
    wanted: dict[str, tuple[float, ...]] = {}
    if config.rope is not None:
        wanted = dict(
            zip(_FACTORS, (config.rope.long_factor, config.rope.short_factor), strict=True)
        )
    stored = {tensor.name: tensor for tensor in structure.tensors if tensor.name in _FACTORS}
    layers = tuple(range(config.num_hidden_layers))
    for name in _FACTORS:
        if (name in stored) != (name in wanted):
            has = "are missing" if name in wanted else "are there, the checkpoint has none"
            message = f"LongRoPE's factors {name} {has}"
        elif name in stored and (
            text := _other(_values(file, structure, stored[name]), wanted[name])
        ):
            message = f"{name}: {text}"
        else:
            continue
        yield Finding("rotary embedding", "error", _ROTARY, layers, message)


def _values(file: Path, structure: GgufStructure, tensor: TensorInfo) -> list[float] | None:
    import numpy as np

    if tensor.type != "F32":
        return None
    offset = structure.data_offset + tensor.offset
    values: list[float] = np.fromfile(file, "<f4", math.prod(tensor.shape), offset=offset).tolist()
    return values


def _other(found: list[float] | None, wanted: tuple[float, ...]) -> str:
    """In what they are not what they should be; empty if in nothing."""
    if found is None:
        return "not float32"
    if len(found) != len(wanted):
        return f"{len(found)} factors, the checkpoint has {len(wanted)}"
    for index, (value, expected) in enumerate(zip(found, wanted, strict=True)):
        if not _equal(value, expected):
            return f"factor {index} is {value:.6g}, the checkpoint has {expected:.6g}"
    return ""


def _other_tensors(structure: GgufStructure, checkpoint: Checkpoint) -> Iterator[Finding]:
    """What is missing; and biases and scales, which llama.cpp uses where a file has them."""
    wanted = set(gguf_names(checkpoint.tensors, checkpoint.config).values())
    found = {tensor.name for tensor in structure.tensors}
    # a tied head may be stored a second time
    more = sorted(found - wanted - {*_FACTORS, _HEAD})
    if more:
        message = f"the checkpoint has nothing like {_shortened(more)}"
        yield Finding("tensors", "error", "model", (), message)
    if lacking := sorted(wanted - found):
        yield Finding("tensors", "error", "model", (), f"the file lacks {_shortened(lacking)}")


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _special_tokens(structure: GgufStructure, checkpoint: Checkpoint) -> Iterator[Finding]:
    """The tokens that begin and end a text."""
    from phiconv.gguf.special_tokens import read_special_tokens
    from phiconv.gguf.tokenizer_file import read_tokenizer_file

    try:
        wanted = read_special_tokens(checkpoint, read_tokenizer_file(checkpoint.path))
    except CheckpointError:
        return  # a tokenizer that is written in another way; parity compares what it does
    found = structure.metadata
    ends = {wanted.ids.get("eos"), wanted.ids.get("eot"), *checkpoint.config.eos_token_ids}
    ends -= {None}
    allowed = " or ".join(str(token) for token in sorted(filter(None, ends)))
    eos, eot = (found.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
    if ends and eos not in ends:
        yield _token("eos_token_id", eos, allowed)
    if ends and eot is not None and eot not in ends:
        yield _token("eot_token_id", eot, allowed)
    for kind, name in (("bos", "bos_token_id"), ("pad", "padding_token_id")):
        token, value = wanted.ids.get(kind), found.get(f"tokenizer.ggml.{name}")
        if token is not None and value != token:
            yield _token(name, value, str(token))
    for key, flag in (("add_bos_token", wanted.add_bos), ("add_eos_token", wanted.add_eos)):
        value = found.get(f"tokenizer.ggml.{key}", flag)
        if value != flag:
            yield _token(key, value, str(flag).lower())


def _token(name: str, value: object, wanted: str) -> Finding:
    message = f"tokenizer.ggml.{name} {_shown(value)}, the checkpoint has {wanted}"
    return Finding("special tokens", "error", "tokenizer", (), message)


def _contradiction(
    key: _Key, name: str, value: object, wanted: object, config: ModelConfig
) -> Finding:
    message = f"{name} {_shown(value)}, the checkpoint has {_shown(wanted)}"
    return Finding(key.check, key.severity, key.component, _layers(key, config), message)


def _layers(key: _Key, config: ModelConfig) -> tuple[int, ...]:
    """Every layer, where the key is about what is in layers."""
    in_layers = key.component in (_ROTARY, _ATTENTION, "mlp")
    return tuple(range(config.num_hidden_layers)) if in_layers else ()


def _equal(value: object, wanted: object) -> bool:
    if isinstance(value, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(value, wanted, rel_tol=_EQUAL)
    return value == wanted


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f"{value:.7g}" if isinstance(value, float) else "missing" if value is None else str(value)
    )
