"""Writes small, complete, seeded Phi-3 checkpoints with random weights for tests.

What is written loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``, and needs neither to be
made. Every tensor is seeded by its own name, so the number of shards and layers changes nothing
else.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

STORED_DTYPES: dict[str, tuple[type, str]] = {
    "bf16": (ml_dtypes.bfloat16, "bfloat16"),
    "f16": (np.float16, "float16"),
    "f32": (np.float32, "float32"),
}

SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|user|>",
)
MERGES = (
    ("Ġ", "t"), ("h", "e"), ("Ġ", "a"), ("i", "n"), ("r", "e"), ("o", "n"), ("Ġt", "he"),
    ("e", "r"), ("Ġ", "s"), ("a", "t"), ("Ġ", "w"), ("o", "r"), ("e", "n"), ("Ġ", "c"),
    ("i", "s"), ("i", "t"), ("e", "s"), ("a", "n"), ("n", "d"), ("Ġ", "f"), ("o", "u"),
    ("Ġ", "b"), ("Ġ", "p"), ("e", "d"), ("in", "g"), ("Ġ", "o"), ("Ġa", "nd"), ("Ġ", "in"),
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def write_phi3_checkpoint(
    path: Path | str,
    *,
    dtype: str = "bf16",
    shards: int = 1,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Writes a Phi3ForCausalLM checkpoint of about 0.4 M parameters into the folder ``path``.

    Args:
        path: Folder to write into; created if absent.
        dtype: Stored dtype of every tensor: "bf16", "f16" or "f32".
        shards: 1 writes ``model.safetensors``; more write that many shards and the index.
        seed: Seed of the weights.
        **config_overrides: Keys of config.json. ``rope_parameters`` (the spelling of
            transformers 5) replaces ``rope_theta`` and ``rope_scaling``.

    Returns:
        ``path``.

    Raises:
        ValueError: The vocabulary is too small for the tokenizer, or ``dtype`` is unknown.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype must be one of {sorted(STORED_DTYPES)}, not {dtype!r}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = phi3_config(torch_dtype=STORED_DTYPES[dtype][1], **config_overrides)
    _write_json(path / "config.json", config)
    _write_tokenizer(path, config)
    _write_json(
        path / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": [3, 6], "pad_token_id": 3, "do_sample": False},
    )
    _write_tensors(path, phi3_tensors(config, dtype=dtype, seed=seed), shards)
    return path


def phi3_config(**overrides: Any) -> dict[str, Any]:
    """The config.json of a test checkpoint, in the spelling of the published Phi-3 models."""
    config: dict[str, Any] = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": 352,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "pad_token_id": 3,
        "use_cache": True,
        "initializer_range": 0.02,
    }
    if "rope_parameters" in overrides:
        del config["rope_theta"], config["rope_scaling"]
    return config | overrides


def phi3_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Phi3ForCausalLM with this config.json."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.qkv_proj.weight": ((heads + 2 * kv_heads) * head_dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * head_dim),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_up_proj.weight": (2 * intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def phi3_tensors(
    config: dict[str, Any], *, dtype: str = "bf16", seed: int = 0
) -> dict[str, np.ndarray]:
    """The weights: norms about 1, untied embeddings of variance 1, matrices of variance 1/K."""
    tensors: dict[str, np.ndarray] = {}
    for name, shape in phi3_shapes(config).items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            values = np.float32(1) + values / np.float32(10)
        elif name != "model.embed_tokens.weight" or config["tie_word_embeddings"]:
            values /= np.sqrt(np.float32(shape[1]))
        tensors[name] = values.astype(STORED_DTYPES[dtype][0])
    return tensors


def _write_tensors(path: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    # transformers refuses a safetensors file that does not say which framework wrote it
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata=metadata)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, path / file, metadata=metadata)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        path / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_tokenizer(path: Path, config: dict[str, Any]) -> None:
    """Byte-level BPE with the special tokens of Phi-3; the vocabulary's tail stays unused."""
    tokens = [*SPECIAL_TOKENS, *_byte_alphabet()]
    if config["vocab_size"] < len(tokens):
        raise ValueError(f"vocab_size must be at least {len(tokens)}, not {config['vocab_size']}")
    merges = MERGES[: config["vocab_size"] - len(tokens)]
    tokens += [left + right for left, right in merges]
    specials = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [list(merge) for merge in merges],
        },
    }
    _write_json(path / "tokenizer.json", tokenizer)
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        },
    )
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte value, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(0x100)]


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
