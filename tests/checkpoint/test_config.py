from __future__ import annotations

import math
import re

import pytest

from phiconv.checkpoint import CheckpointProblemsError, ModelConfig
from phiconv.checkpoint.config import UNSUPPORTED_ARCHITECTURES, UNSUPPORTED_PARTS
from phiconv.errors import CheckpointError
from tests.phi3_checkpoints import phi3_config, phi3_shapes

FACTORS = {"short_factor": [1.0] * 16, "long_factor": [2] * 16}
LONG = {"max_position_embeddings": 512, "original_max_position_embeddings": 128}


def read(**overrides):
    return ModelConfig.from_dict(phi3_config(**overrides), "folder/config.json")


def without(*keys):
    return {key: value for key, value in phi3_config().items() if key not in keys}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"num_hidden_layers": 5, "intermediate_size": 64},
    ],
)
def test_expected_tensors(overrides):
    assert read(**overrides).expected_tensors() == phi3_shapes(phi3_config(**overrides))


def test_absent_keys_take_the_defaults_of_transformers():
    from transformers import Phi3Config

    sizes = {
        key: phi3_config()[key]
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    }
    expected = Phi3Config(vocab_size=32064, **sizes)
    config = ModelConfig.from_dict(
        {"architectures": ["Phi3ForCausalLM"], "vocab_size": 32064, **sizes}, "config.json"
    )
    for key in (
        "num_key_value_heads",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rms_norm_eps",
        "sliding_window",
        "tie_word_embeddings",
        "bos_token_id",
        "pad_token_id",
        "hidden_act",
    ):
        assert getattr(config, key) == getattr(expected, key), key
    assert config.eos_token_ids == (expected.eos_token_id,)
    assert config.rope_theta == expected.rope_parameters["rope_theta"]
    assert config.partial_rotary_factor == expected.rope_parameters["partial_rotary_factor"]
    assert config.rope is None
    assert config.dtype is None


def test_old_and_new_spellings_are_the_same_config():
    old = read(
        **LONG,
        rope_theta=5000.0,
        partial_rotary_factor=1.0,
        rope_scaling={"type": "longrope", **FACTORS},
        torch_dtype="bfloat16",
    )
    new = read(
        **LONG,
        rope_parameters={
            "rope_type": "longrope",
            "type": "longrope",
            "rope_theta": 5000,
            "partial_rotary_factor": 1,
            "original_max_position_embeddings": 128,
            **FACTORS,
        },
        dtype="bfloat16",
    )
    assert old == new
    assert old.dtype == "bfloat16"
    assert old.rope is not None
    assert old.rope.factor == 4
    assert old.rope.attention_factor == math.sqrt(1 + math.log(4) / math.log(128))
    assert old.rope.long_factor == (2.0,) * 16


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_older_names_of_longrope(name):
    rope = read(**LONG, rope_scaling={"type": name, **FACTORS}).rope
    assert rope is not None and rope.type == "longrope"


def test_configured_factors_go_before_derived_ones():
    scaling = {"type": "longrope", "factor": 8, "attention_factor": 1.25, **FACTORS}
    rope = read(**LONG, rope_scaling=scaling).rope
    assert rope is not None
    assert (rope.factor, rope.attention_factor) == (8.0, 1.25)


def test_longrope_that_lengthens_nothing_scales_nothing():
    same = {"max_position_embeddings": 128, "original_max_position_embeddings": 128}
    rope = read(**same, rope_scaling={"type": "longrope", **FACTORS}).rope
    assert rope is not None
    assert (rope.factor, rope.attention_factor) == (1.0, 1.0)


def test_the_first_token_may_be_a_special_one():
    config = read(bos_token_id=0, pad_token_id=0, eos_token_id=0)
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_ids) == (0, 0, (0,))


def test_of_an_unsupported_model_nothing_else_is_told():
    with pytest.raises(CheckpointError, match="LlamaForCausalLM") as caught:
        read(architectures=["LlamaForCausalLM"], vocab_size=None)
    assert not isinstance(caught.value, CheckpointProblemsError)


def test_partial_rotary_factor():
    config = read(partial_rotary_factor=0.75)
    assert (config.head_dim, config.rotary_dim) == (32, 24)


def test_default_rope_type_is_no_scaling():
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 500.0}).rope is None


def test_several_eos_tokens():
    assert read(eos_token_id=[7, 3]).eos_token_ids == (7, 3)
    assert read(eos_token_id=None).eos_token_ids == ()


def test_remote_code_is_ignored():
    assert read(auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}) == read()


@pytest.mark.parametrize(("architecture", "reason"), UNSUPPORTED_ARCHITECTURES.items())
def test_unsupported_architectures_are_named_with_the_reason(architecture, reason):
    message = re.escape(f"architectures is not supported: {architecture} ({reason})")
    with pytest.raises(CheckpointError, match=message) as caught:
        read(architectures=[architecture])
    assert "Phi3ForCausalLM" in caught.value.remedy


@pytest.mark.parametrize(("key", "part"), UNSUPPORTED_PARTS.items())
def test_what_a_model_has_besides_is_named(key, part):
    with pytest.raises(CheckpointError, match=rf"not supported: Phi9ForCausalLM \({part}\)"):
        read(architectures=["Phi9ForCausalLM"], **{key: {"size": 2}})
    with pytest.raises(
        CheckpointError, match=f"{key} is set, which no Phi3ForCausalLM has: {part}"
    ):
        read(**{key: {"size": 2}})
    assert read(**{key: None}) == read()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is not supported: LlamaForCausal"),
        ({"architectures": []}, "architectures is not supported: none named"),
        ({"architectures": None}, "architectures is missing"),
        ({"architectures": "Phi3ForCausalLM"}, "architectures must be a list of names"),
        ({"model_type": "llama"}, "model_type must be 'phi3', not 'llama'"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantization_config.quant_method is 'bitsandbytes': of quantized checkpoints those of",
        ),
        ({"quantization_config": 4}, "quantization_config must be an object, not 4"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config.bits is missing",
        ),
        ({"attention_bias": True}, "attention_bias is true, but Phi3ForCausalLM has no biases"),
        ({"lm_head_bias": True}, "lm_head_bias is true"),
        ({"vocab_size": "352"}, "vocab_size must be an integer, not '352'"),
        ({"vocab_size": True}, "vocab_size must be an integer, not True"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": 2**31}, "vocab_size must be at most 2147483647, not 2147483648"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be at most 4096"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, not 0"),
        ({"num_attention_heads": 12}, r"hidden_size \(128\) must be a multiple of num_attention"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, not 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, not 1"),
        ({"hidden_act": 3}, "hidden_act must be a string, not 3"),
        ({"sliding_window": -1}, "sliding_window must be at least 1, not -1"),
        ({"eos_token_id": [3, "x"]}, "eos_token_id must be a token id or a list of token ids"),
        ({"eos_token_id": [3, 400]}, r"eos_token_id \(400\) must be less than vocab_size \(352\)"),
        ({"pad_token_id": 352}, r"pad_token_id \(352\) must be less than vocab_size \(352\)"),
        ({"bos_token_id": -1}, "bos_token_id must be at least 0, not -1"),
        ({"rope_scaling": "su"}, "rope_scaling must be an object, not 'su'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_type is 'linear'; Phi-3 has",
        ),
        (
            {"rope_scaling": {"type": "su", **FACTORS, "long_factor": None}},
            "long_factor is missing",
        ),
        (
            {"rope_scaling": {"type": "su", **FACTORS, "long_factor": ["a"]}},
            "rope_scaling.long_factor must be a list of positive numbers",
        ),
        (
            {"rope_scaling": {"type": "su", **FACTORS, "short_factor": [1.0] * 3}},
            "short_factor must hold 16 numbers, half the rotary dimension, not 3",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", **FACTORS, **LONG}},
            "rope_parameters.original_max_position_embeddings is 128, but transformers goes by",
        ),
        (
            {"original_max_position_embeddings": 600, "rope_scaling": {"type": "su", **FACTORS}},
            r"original_max_position_embeddings \(600\) must not exceed max_position_embeddings",
        ),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor of 1.5 rotates 48 of 32"),
        ({"partial_rotary_factor": 0.4, "head_dim": 40, "rope_theta": "x"}, "rope_theta must be a"),
        ({"partial_rotary_factor": 0.1}, "partial_rotary_factor of 0.1 rotates 3 of 32"),
    ],
)
def test_refusals(overrides, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(**overrides)
    assert caught.value.where == "folder/config.json"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_sizes_have_no_default(key):
    with pytest.raises(CheckpointError, match=f"^{key} is missing"):
        ModelConfig.from_dict(without(key), "config.json")


def test_every_fault_is_reported():
    with pytest.raises(CheckpointProblemsError) as caught:
        read(vocab_size=None, hidden_act=3, rope_scaling={"type": "su", "factor": -1})
    text = str(caught.value)
    for part in ("vocab_size is missing", "hidden_act must", "factor must", "long_factor is missi"):
        assert part in text
    assert len(caught.value.errors) == 5
