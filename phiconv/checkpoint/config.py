"""The architecture of a checkpoint, read from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phiconv.checkpoint.config_keys import ConfigKeys
from phiconv.checkpoint.problems import combined
from phiconv.checkpoint.rope import RopeParameters, RopeScaling, check_rotary_dim, read_rope
from phiconv.checkpoint.stored_quantization import StoredQuantization, read_quantization

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

MAX_LAYERS = 4096
"""Far above any model; a larger number is a damaged or hostile config."""

SUPPORTED_ARCHITECTURE = "Phi3ForCausalLM"
UNSUPPORTED_ARCHITECTURES: Mapping[str, str] = {
    "Phi3SmallForCausalLM": "Phi-3-small: block-sparse attention",
    "PhiMoEForCausalLM": "Phi-3.5-MoE: mixture of experts",
    "PhimoeForCausalLM": "Phi-3.5-MoE: mixture of experts",
    "SlimMoEForCausalLM": "Phi-mini-MoE: mixture of experts",
    "Phi3VForCausalLM": "Phi-3-vision: image input",
    "Phi4MMForCausalLM": "Phi-4-multimodal: image and audio input, LoRA adapters",
    "Phi4MultimodalForCausalLM": "Phi-4-multimodal: image and audio input, LoRA adapters",
    "Phi4FlashForCausalLM": "Phi-4-mini-flash: state-space layers",
    "PhiForCausalLM": "Phi-1, Phi-1.5 and Phi-2: parallel attention and MLP",
}
"""What is not converted although it is called Phi, and why."""

UNSUPPORTED_PARTS: Mapping[str, str] = {
    "num_local_experts": "mixture of experts",
    "blocksparse_block_size": "block-sparse attention",
    "img_processor": "image input",
    "vision_config": "image input",
    "audio_processor": "audio input",
    "audio_config": "audio input",
    "mb_per_layer": "state-space layers",
}
"""Keys of config.json that give away what a model has besides, whatever its architecture's name."""

_REMEDY = (
    "phiconv converts Phi3ForCausalLM: Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4 and Phi-4-mini"
)


@dataclass(frozen=True)
class ModelConfig:
    """The hyperparameters of a Phi3ForCausalLM, whichever way its config.json spells them.

    Absent keys take the defaults of transformers' `Phi3Config`; sizes have none.

    Attributes:
        architecture: "Phi3ForCausalLM".
        vocab_size: Rows of the embedding; the tokenizer may know fewer tokens.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP; gate_up_proj has twice as many rows.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Width of a head.
        max_position_embeddings: The context length.
        original_max_position_embeddings: The context length before LongRoPE extended it.
        rms_norm_eps: Epsilon of the RMS norms.
        rope_theta: Base of the rotary frequencies.
        partial_rotary_factor: The part of a head that is rotated.
        rope: LongRoPE's factors, or None.
        sliding_window: Width of the attention window in tokens, or None.
        tie_word_embeddings: Whether the head may share the embedding's weight.
        dtype: The dtype the config names, such as "bfloat16", or None.
        bos_token_id: Begin-of-sequence token.
        eos_token_ids: The tokens that end a sequence, first the config's own.
        pad_token_id: Padding token.
        hidden_act: The MLP's activation function.
        quantization: How the weights are quantized already; None where they are not.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    rope: RopeScaling | None
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    hidden_act: str
    quantization: StoredQuantization | None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> ModelConfig:
        """Reads the content of a config.json.

        Args:
            raw: The parsed JSON object.
            where: The file, for error messages.

        Raises:
            CheckpointError: The architecture is not supported, the checkpoint is quantized in a
                way that is not read, or keys are missing, of the wrong type or contradict each
                other. All are reported.
        """
        keys = ConfigKeys(raw, where)
        _refuse_unsupported(keys, raw)
        if keys.errors:
            raise combined(keys.errors)
        config = _read(cls, keys)
        if keys.errors:
            raise combined(keys.errors)
        return config

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the model's order.

        With tied embeddings `lm_head.weight` is not among them, though a checkpoint may hold it.
        """
        hidden = self.hidden_size
        rows = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        layer_tensors: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.qkv_proj.weight": (rows, hidden),
            "self_attn.o_proj.weight": (hidden, self.num_attention_heads * self.head_dim),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_up_proj.weight": (2 * self.intermediate_size, hidden),
            "mlp.down_proj.weight": (hidden, self.intermediate_size),
        }
        tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, hidden)}
        for layer in range(self.num_hidden_layers):
            for name, shape in layer_tensors.items():
                tensors[f"model.layers.{layer}.{name}"] = shape
        tensors["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            tensors[LM_HEAD] = (self.vocab_size, hidden)
        return tensors


def _refuse_unsupported(keys: ConfigKeys, raw: Mapping[str, Any]) -> None:
    """Notes what rules the checkpoint out, whatever its other keys say.

    The architecture's name decides; `auto_map`, which names Python code inside the checkpoint, is
    never followed.
    """
    architectures = raw.get("architectures")
    if architectures is None:
        keys.refuse("architectures", "is missing", _REMEDY)
    elif not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        keys.refuse("architectures", "must be a list of names", _REMEDY)
    elif architectures != [SUPPORTED_ARCHITECTURE]:
        name = ", ".join(architectures) or "none named"
        reason = UNSUPPORTED_ARCHITECTURES.get(name) or ", ".join(_unsupported_parts(keys))
        keys.refuse(
            "architectures",
            f"is not supported: {name}" + (f" ({reason})" if reason else ""),
            _REMEDY,
        )
    elif raw.get("model_type", "phi3") != "phi3":
        keys.refuse("model_type", f"must be 'phi3', not {raw['model_type']!r}")
    else:
        for part, key in _unsupported_parts(keys).items():
            keys.refuse(key, f"is set, which no Phi3ForCausalLM has: {part}", _REMEDY)
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        if keys.flag(bias, False):
            keys.refuse(bias, "is true, but Phi3ForCausalLM has no biases")


def _unsupported_parts(keys: ConfigKeys) -> dict[str, str]:
    """What a model has that is not converted, and the key that says so."""
    return {part: key for key, part in UNSUPPORTED_PARTS.items() if keys.present(key)}


def _read(cls: type[ModelConfig], keys: ConfigKeys) -> ModelConfig:
    heads = keys.integer("num_attention_heads")
    hidden_size = keys.integer("hidden_size")
    max_position_embeddings = keys.integer("max_position_embeddings", 4096)
    rope = read_rope(keys, max_position_embeddings)
    config = cls(
        architecture=SUPPORTED_ARCHITECTURE,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("intermediate_size"),
        num_hidden_layers=keys.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("head_dim", max(hidden_size // heads, 1)),
        max_position_embeddings=max_position_embeddings,
        original_max_position_embeddings=rope.original_max_position_embeddings,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-5),
        rope_theta=rope.theta,
        partial_rotary_factor=rope.partial_rotary_factor,
        rope=rope.scaling,
        sliding_window=keys.optional_integer("sliding_window"),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        # transformers 5 writes `dtype`, older versions `torch_dtype`
        dtype=keys.text("dtype", keys.text("torch_dtype", "")) or None,
        bos_token_id=keys.optional_integer("bos_token_id", 1, minimum=0),
        eos_token_ids=keys.token_ids("eos_token_id", (32000,)),
        pad_token_id=keys.optional_integer("pad_token_id", 32000, minimum=0),
        hidden_act=keys.text("hidden_act", "silu"),
        quantization=read_quantization(keys),
    )
    if not keys.errors:
        _check_consistency(keys, config, rope)
    return config


def _check_consistency(keys: ConfigKeys, config: ModelConfig, rope: RopeParameters) -> None:
    heads, hidden = config.num_attention_heads, config.hidden_size
    if hidden % heads and not keys.present("head_dim"):
        keys.refuse(
            "hidden_size", f"({hidden}) must be a multiple of num_attention_heads ({heads})"
        )
    if heads % config.num_key_value_heads:
        keys.refuse(
            "num_attention_heads",
            f"({heads}) must be a multiple of num_key_value_heads ({config.num_key_value_heads})",
        )
    check_rotary_dim(keys, rope, config.head_dim)
    if config.original_max_position_embeddings > config.max_position_embeddings and rope.scaling:
        keys.refuse(
            "original_max_position_embeddings",
            f"({config.original_max_position_embeddings}) must not exceed "
            f"max_position_embeddings ({config.max_position_embeddings})",
        )
    ids = {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": max(config.eos_token_ids, default=None),
    }
    for key, token in ids.items():
        if token is not None and token >= config.vocab_size:
            keys.refuse(key, f"({token}) must be less than vocab_size ({config.vocab_size})")
