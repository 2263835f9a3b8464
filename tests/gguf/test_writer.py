from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file, save_file

from phiconv.errors import CheckpointError, StageError
from phiconv.gguf.file_types import FILE_TYPES
from phiconv.kernels.ggml import TYPES
from tests import llama_cpp_oracle
from tests.gguf.conversions import convert, tensors
from tests.phi3_checkpoints import write_phi3_checkpoint

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    return write_phi3_checkpoint(folder, hidden_size=256, intermediate_size=512)


def change(checkpoint: Path, name: str, index: tuple[int, ...], value: float) -> None:
    """Sets one weight of a checkpoint in a single file."""
    file = checkpoint / "model.safetensors"
    weights = {key: array.copy() for key, array in load_file(file).items()}
    weights[name][index] = value
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.skipif(llama_cpp_oracle.missing() is not None, reason=str(llama_cpp_oracle.missing()))
@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_every_tensor_is_what_ggml_makes_of_it(file_type: str, dtype: str, tmp_path: Path) -> None:
    source = write_phi3_checkpoint(tmp_path / "model", hidden_size=256, dtype=dtype)
    convert(source, tmp_path / "out", file_type)
    weights = load_file(source / "model.safetensors")
    stored = tensors(tmp_path / "out")
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.0.attn_qkv.weight": "model.layers.0.self_attn.qkv_proj.weight",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.gate_up_proj.weight",
        "blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    }
    for name, weight in names.items():
        kind, shape, data = stored[name]
        values = weights[weight].astype(np.float32)
        assert shape == values.shape
        if kind in ("F32", "F16", "BF16"):
            target = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
            assert data == values.astype(target).tobytes()
        else:
            assert data == llama_cpp_oracle.quantize(values, kind).tobytes()


def test_one_file_with_its_digest_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    facts = convert(checkpoint, tmp_path / "out", "Q4_K_M", file_name="Phi-3-q4.gguf")
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == facts["file"] == "Phi-3-q4.gguf"
    assert facts["bytes"] == file.stat().st_size


def test_bytes_depend_on_neither_threads_nor_place(checkpoint: Path, tmp_path: Path) -> None:
    digests = set()
    for threads in (1, 2, 5):
        out = tmp_path / f"place-{threads}" / "out"
        convert(checkpoint, out, "Q4_K_M", threads=threads)
        digests.add(hashlib.sha256((out / "model.gguf").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_shards_give_the_bytes_of_one_file(checkpoint: Path, tmp_path: Path) -> None:
    sharded = write_phi3_checkpoint(
        tmp_path / "model", hidden_size=256, intermediate_size=512, shards=3
    )
    convert(sharded, tmp_path / "sharded", "Q6_K")
    convert(checkpoint, tmp_path / "whole", "Q6_K")
    assert tensors(tmp_path / "sharded") == tensors(tmp_path / "whole")


def test_tensors_are_aligned_and_fill_the_file(checkpoint: Path, tmp_path: Path) -> None:
    # rows of 208 fp16 values: sizes that are no multiple of the alignment
    odd = write_phi3_checkpoint(tmp_path / "odd", hidden_size=104, intermediate_size=202)
    for source, out in ((checkpoint, tmp_path / "a"), (odd, tmp_path / "b")):
        convert(source, out, "Q4_K_M")
        reader = GGUFReader(out / "model.gguf")
        end = reader.data_offset
        for tensor in reader.tensors:
            assert tensor.data_offset == end
            assert tensor.data_offset % reader.alignment == 0
            end = -(-(end + tensor.n_bytes) // reader.alignment) * reader.alignment
        assert end == (out / "model.gguf").stat().st_size


def test_ggufs_own_dump_reads_the_file(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out", "Q4_K_M")
    command = [sys.executable, "-m", "gguf.scripts.gguf_dump", str(tmp_path / "out" / "model.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Dumping 15 tensor(s)" in done.stdout


def test_fallbacks_are_reported_tensor_by_tensor(tmp_path: Path) -> None:
    odd = write_phi3_checkpoint(tmp_path / "odd", hidden_size=96, intermediate_size=208,
                                num_attention_heads=3, num_key_value_heads=3)  # fmt: skip
    facts = convert(odd, tmp_path / "out", "Q4_K_S")
    lines = facts["fallbacks"].split("; ")
    assert "output.weight: Q8_0 instead of Q6_K (rows of 96)" in lines
    assert "blk.0.ffn_up.weight: Q5_0 instead of Q4_K (rows of 96)" in lines
    assert "blk.1.ffn_down.weight: F16 instead of Q4_K (rows of 208)" in lines
    stored = tensors(tmp_path / "out")
    assert len(lines) == sum(kind != "F32" for kind, _, _ in stored.values())


@pytest.mark.parametrize("file_type", ["F32", "F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_weights_are_named(file_type: str, value: float, tmp_path: Path) -> None:
    source = write_phi3_checkpoint(tmp_path / "model", hidden_size=256)
    change(source, DOWN, (3, 5), value)
    change(source, "model.layers.0.input_layernorm.weight", (1,), value)
    with pytest.raises(CheckpointError, match="NaN or Inf") as caught:
        convert(source, tmp_path / "out", file_type)
    assert DOWN in caught.value.message
    assert "model.layers.0.input_layernorm.weight" in caught.value.message


@pytest.mark.parametrize(("file_type", "value"), [("F16", 7e4), ("Q8_0", 1e7), ("Q4_K_M", 1e10)])
def test_weights_beyond_the_type_are_named(file_type: str, value: float, tmp_path: Path) -> None:
    source = write_phi3_checkpoint(tmp_path / "model", hidden_size=256)
    change(source, DOWN, (3, 5), value)
    with pytest.raises(StageError, match="outside the range") as caught:
        convert(source, tmp_path / "out", file_type)
    assert DOWN in caught.value.message
    convert(source, tmp_path / "bf16", "BF16")


def test_an_override_that_matches_nothing_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    overrides = [{"match": "blk.*.ffn_down.weight", "type": "Q8_0"}, {"match": "x", "type": "F16"}]
    with pytest.raises(StageError, match="no tensor matches the override x"):
        convert(checkpoint, tmp_path / "out", "Q4_0", overrides=overrides)


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_gguf_gives_the_weights_back(checkpoint: Path, file_type: str, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out", file_type)
    weights = load_file(checkpoint / "model.safetensors")
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    tensor = stored["blk.1.ffn_down.weight"]
    expected = weights[DOWN].astype(np.float32)
    found = dequantize(tensor.data, tensor.tensor_type)
    bits = (
        8 * TYPES[tensor.tensor_type.name].block_bytes / TYPES[tensor.tensor_type.name].block_size
    )
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < 1.5 * 2.0 ** (1 - bits) or file_type in ("F32", "F16", "BF16")
    assert error < 0.12
