"""The checkpoints that the tests are made of are what transformers takes them for."""

from __future__ import annotations

import numpy as np
import pytest

from phiconv.checkpoint import Checkpoint
from tests.phi3_checkpoints import phi3_config, phi3_tensors, write_phi3_checkpoint

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0 + index / 10 for index in range(8)],
    "long_factor": [2.0 + index / 10 for index in range(8)],
}


@pytest.mark.parametrize(
    ("dtype", "shards", "overrides"),
    [
        ("bf16", 1, {}),
        ("f16", 3, {"tie_word_embeddings": True}),
        ("f32", 2, {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    ],
)
def test_transformers_loads_what_is_written(tmp_path, dtype, shards, overrides):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_phi3_checkpoint(tmp_path, dtype=dtype, shards=shards, **overrides)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype] == (
        model.dtype
    )

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Grüße, the\nworld"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < model.config.vocab_size
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|user|>\nhi<|end|>\n<|assistant|>\n"

    checkpoint = Checkpoint(tmp_path)
    state = model.state_dict()
    for name in checkpoint.tensors:
        expected = state[name].float().numpy()
        assert np.array_equal(checkpoint.read(name).astype(np.float32), expected), name
    config = checkpoint.config
    assert model.config.rope_parameters["rope_theta"] == config.rope_theta
    assert model.model.rotary_emb.inv_freq.shape == (config.rotary_dim // 2,)
    if config.rope:
        assert model.model.rotary_emb.attention_scaling == config.rope.attention_factor


def test_a_tensor_depends_on_seed_and_name_alone(tmp_path):
    small = phi3_tensors(phi3_config(num_hidden_layers=1), seed=3)
    large = phi3_tensors(phi3_config(num_hidden_layers=2), seed=3)
    other = phi3_tensors(phi3_config(num_hidden_layers=1), seed=4)
    for name, values in small.items():
        assert np.array_equal(values, large[name])
        assert not np.array_equal(values, other[name])


def test_a_vocabulary_below_the_byte_alphabet_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 264"):
        write_phi3_checkpoint(tmp_path, vocab_size=200)
