"""genai_config.json: what ONNX Runtime GenAI is told of a model and of how to generate with it.

Its keys: https://onnxruntime.ai/docs/genai/reference/config.html. Values are those that the
model builder of GenAI 0.18 takes from a checkpoint, key by key and in its order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.config_keys import ConfigKeys
from phiconv.checkpoint.json_object import read_json_object
from phiconv.checkpoint.problems import combined
from phiconv.errors import CheckpointError
from phiconv.onnx.decoder import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, POSITION_IDS, PRESENT
from phiconv.onnx.target import ExportTarget
from phiconv.onnx.tokenizer_files import ShippedTokenizer

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint, ModelConfig

GENAI_CONFIG = "genai_config.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_FILE = "model.onnx"

PROVIDER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "cpu": {},
    # a captured graph needs shapes that never change
    "cuda": {"enable_cuda_graph": "0"},
    "dml": {"enable_graph_capture": "1"},
}

# Tokens around tool calls and reasoning, in the spellings that GenAI parses.
_PARSED_TOKENS: Mapping[str, tuple[str, ...]] = {
    "bot_token_id": ("<tool_call>", "<|tool_call|>"),
    "eot_token_id": ("</tool_call>", "<|/tool_call|>"),
    "bor_token_id": ("<think>",),
    "eor_token_id": ("</think>",),
}
# How to generate, unless the caller says otherwise. The checkpoint may set those of sampling; as
# transformers reads it, config.json has none of them.
_SEARCH: Mapping[str, Any] = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "max_length": 0,  # the context length
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "past_present_share_buffer": True,  # GroupQueryAttention appends to the cache it is given
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")


def write_genai_config(
    checkpoint: Checkpoint, target: ExportTarget, tokenizer: ShippedTokenizer, folder: Path
) -> None:
    """Write genai_config.json into an existing folder.

    Raises:
        CheckpointError: generation_config.json is broken, or nothing says what ends a text.
    """
    generation = _read_generation(checkpoint)
    document = {
        "model": _model(checkpoint, target, tokenizer, generation),
        "search": _search(checkpoint.config, generation),
    }
    text = json.dumps(document, indent=4)
    (folder / GENAI_CONFIG).write_text(text, encoding="utf-8", newline="\n")


def _read_generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """What generation_config.json sets; {} without one."""
    if GENERATION_CONFIG not in checkpoint.files:
        return {}
    path = checkpoint.path / GENERATION_CONFIG
    stored = read_json_object(path)
    keys = ConfigKeys(stored, str(path))
    keys.token_ids("eos_token_id", ())
    for key in ("bos_token_id", "pad_token_id"):
        keys.optional_integer(key, minimum=0)
    if keys.errors:
        raise combined(keys.errors)
    return {key: value for key, value in stored.items() if value is not None}


def _model(
    checkpoint: Checkpoint,
    target: ExportTarget,
    tokenizer: ShippedTokenizer,
    generation: Mapping[str, Any],
) -> dict[str, Any]:
    config = checkpoint.config
    ends = _ends(checkpoint, tokenizer, generation)
    first_end = ends[0] if isinstance(ends, list) else ends
    bos = (generation.get("bos_token_id"), config.bos_token_id, tokenizer.special_id("bos"), 1)
    own_pad = tokenizer.special_id("pad")
    pad = (generation.get("pad_token_id"), config.pad_token_id, own_pad, first_end)
    parsed = {
        key: next((tokenizer.ids[text] for text in texts if text in tokenizer.ids), None)
        for key, texts in _PARSED_TOKENS.items()
    }
    return {
        "bos_token_id": _first(*bos),
        "context_length": config.max_position_embeddings,
        "decoder": _decoder(config, target),
        "eos_token_id": ends,
        "pad_token_id": _first(*pad),
        "type": "phi3",
        "vocab_size": config.vocab_size,
        **{key: token for key, token in parsed.items() if token is not None},
    }


def _ends(
    checkpoint: Checkpoint, tokenizer: ShippedTokenizer, generation: Mapping[str, Any]
) -> int | list[int]:
    """What ends a text: the ids that are named, and before them the tokenizer's eos if missing.

    One id or a list of them, as the checkpoint writes it.
    """
    own = tokenizer.special_id("eos")
    by_config = [*checkpoint.config.eos_token_ids]
    is_list = isinstance(checkpoint.raw_config.get("eos_token_id"), list)
    named: int | list[int] | None = _first(
        generation.get("eos_token_id") or None,
        by_config if is_list else by_config[0] if by_config else None,
        own,
    )
    if named is None:
        raise CheckpointError(
            "nothing says which token ends a text",
            where=str(checkpoint.path),
            remedy="set eos_token_id in generation_config.json",
        )
    ids = named if isinstance(named, list) else [named]
    return named if own is None or own in ids else [own, *ids]


def _decoder(config: ModelConfig, target: ExportTarget) -> dict[str, Any]:
    provider = PROVIDER_OPTIONS[target.provider]
    inputs = {name: name for name in (INPUT_IDS, ATTENTION_MASK)}
    if not target.fuses_rotary(config):
        inputs[POSITION_IDS] = POSITION_IDS
    return {
        "session_options": {
            "log_id": "onnxruntime-genai",
            "provider_options": [{target.provider: provider}] if provider else [],
        },
        "filename": MODEL_FILE,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "inputs": inputs | {f"past_{part}_names": name for part, name in PAST.items()},
        "outputs": {LOGITS: LOGITS}
        | {f"present_{part}_names": name for part, name in PRESENT.items()},
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
    }


def _search(config: ModelConfig, generation: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: generation[key] for key in _SAMPLING if key in generation}
    return {**_SEARCH, "max_length": config.max_position_embeddings, **own}


def _first(*values: Any) -> Any:
    """The first that is there."""
    return next((value for value in values if value is not None), None)
