from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phiconv.checkpoint import Checkpoint, CheckpointProblemsError, DigestCache
from phiconv.errors import CheckpointError
from tests.links import link_or_skip
from tests.phi3_checkpoints import phi3_config, phi3_tensors, write_phi3_checkpoint

SHARDS = [f"model-{index:05d}-of-00003.safetensors" for index in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write_phi3_checkpoint(tmp_path / "checkpoint", shards=3, seed=5)


@pytest.fixture
def single(tmp_path) -> Path:
    return write_phi3_checkpoint(tmp_path / "checkpoint", seed=5)


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    return caught.value


def edit_json(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_are_what_was_written(tmp_path, dtype, shards):
    write_phi3_checkpoint(tmp_path, dtype=dtype, shards=shards, seed=5)
    checkpoint = Checkpoint(tmp_path)
    written = phi3_tensors(phi3_config(), dtype=dtype, seed=5)
    assert set(checkpoint.tensors) == set(written)
    assert checkpoint.dtype == dtype
    assert checkpoint.nbytes == sum(values.nbytes for values in written.values())
    for name, values in written.items():
        whole = checkpoint.read(name)
        assert whole.dtype == values.dtype and np.array_equal(whole, values)
        rows = len(values)
        assert np.array_equal(checkpoint.read_rows(name, 3, rows - 2), values[3 : rows - 2])
        assert checkpoint.read_rows(name, rows, rows).shape == (0, *values.shape[1:])


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_reads_are_what_torch_reads(tmp_path, dtype):
    import torch
    from safetensors.torch import load_file as load_torch

    write_phi3_checkpoint(tmp_path, dtype=dtype)
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in load_torch(tmp_path / "model.safetensors").items():
        ours = checkpoint.read(name)
        assert np.array_equal(ours.view(np.uint8), tensor.view(torch.uint8).numpy())


def test_rows_are_read_into_the_callers_buffer(single):
    checkpoint = Checkpoint(single)
    expected = checkpoint.read(DOWN)[10:20]
    out = np.zeros((10, 256), ml_dtypes.bfloat16)
    assert checkpoint.read_rows(DOWN, 10, 20, out) is out
    assert np.array_equal(out, expected)
    bits = np.zeros((10, 256), np.uint16)
    checkpoint.read_rows(DOWN, 10, 20, bits)
    assert np.array_equal(bits, expected.view(np.uint16))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((9, 256), np.uint16), r"of shape \[10, 256\]"),
        (np.zeros((10, 512), np.uint16)[:, ::2], "C-contiguous"),
        (np.zeros((10, 256), np.float16), "out is float16, but"),
        (np.frombuffer(bytes(5120), np.uint16).reshape(10, 256), "must be writable"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(single, out, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint(single).read_rows(DOWN, 10, 20, out)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 129)])
def test_rows_that_do_not_exist_are_refused(single, start, stop):
    with pytest.raises(IndexError, match="has no rows"):
        Checkpoint(single).read_rows(DOWN, start, stop)


def test_an_unknown_tensor_is_refused(single):
    with pytest.raises(CheckpointError, match="there is no tensor 'nonesuch'"):
        Checkpoint(single).read("nonesuch")


def test_metadata(single):
    (single / "LICENSE").write_text("MIT")
    (single / "README.md").write_text("nothing that counts")
    checkpoint = Checkpoint(single)
    assert checkpoint.files == (
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    assert checkpoint.weight_files == ("model.safetensors",)
    assert checkpoint.raw_config == json.loads((single / "config.json").read_text())
    assert checkpoint.config.hidden_size == 128
    assert checkpoint.source == str(single) and checkpoint.revision is None
    assert checkpoint.path.is_absolute()


def test_a_tied_checkpoint_needs_no_head_but_may_hold_one(tmp_path):
    write_phi3_checkpoint(tmp_path, tie_word_embeddings=True)
    assert Checkpoint(tmp_path).lm_head == "model.embed_tokens.weight"
    head = np.ones((352, 128), ml_dtypes.bfloat16)
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": head}))
    assert Checkpoint(tmp_path).lm_head == "lm_head.weight"


def test_digests_cover_every_file_that_shapes_the_output(sharded, tmp_path):
    cache = DigestCache(tmp_path / "workspace")
    seen: list[int] = []
    checkpoint = Checkpoint(sharded, digest_cache=cache)
    digests = checkpoint.hash_files(threads=2, on_bytes=seen.append)
    assert list(digests) == sorted((*checkpoint.files, *SHARDS))
    assert all(re.fullmatch("blake3:[0-9a-f]{64}", digest) for digest in digests.values())
    assert sum(seen) == checkpoint.file_nbytes
    assert checkpoint.digests == digests
    before = checkpoint.digest
    assert re.fullmatch("[0-9a-f]{64}", before)

    edit_json(sharded / INDEX, lambda index: index.pop("metadata"))
    (sharded / "README.md").write_text("nothing that counts")
    assert Checkpoint(sharded, digest_cache=cache).digest == before
    for name in digests:
        copy = tmp_path / "copy"
        shutil.copytree(sharded, copy)
        data = (copy / name).read_bytes()
        changed = data[:-1] + bytes([data[-1] ^ 1]) if name in SHARDS else data + b"\n"
        (copy / name).write_bytes(changed)
        assert Checkpoint(copy, digest_cache=cache).digest != before, name
        shutil.rmtree(copy)


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"numpy", "ml_dtypes", "huggingface_hub", "tqdm", "blake3", "torch", "transformers"}
    program = "import sys, phiconv.checkpoint; print(*sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert not heavy & set(done.stdout.split())


def test_an_empty_folder(tmp_path):
    error = refusal(tmp_path)
    assert error.message == "the folder is empty"
    assert error.where == str(tmp_path) and error.remedy


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_pickled_checkpoint(single, name):
    (single / "model.safetensors").rename(single / name)
    error = refusal(single)
    assert f"the weights are pickled ('{name}'); phiconv never loads pickle" in error.message
    assert "safetensors" in error.remedy


def test_no_weights(single):
    (single / "model.safetensors").rename(single / "weights.safetensors")
    message = refusal(single).message
    assert message.startswith("there is neither model.safetensors nor model.safetensors.index.json")
    assert message.endswith("found 'weights.safetensors'")


def test_a_missing_config(single):
    (single / "config.json").unlink()
    assert refusal(single).message == "config.json is missing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"{}", "architectures is missing"),
        (b"[]", "must hold a JSON object, but holds list"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "the key 'vocab_size' stands twice"),
    ],
)
def test_an_invalid_config(single, content, message):
    (single / "config.json").write_bytes(content)
    error = refusal(single)
    assert message in error.message
    assert error.where == str(single / "config.json")


def test_a_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    error = refusal(sharded)
    assert error.message == f"{SHARDS[1]} is missing"
    assert error.where == str(sharded)


def test_a_truncated_shard(sharded):
    path = sharded / SHARDS[2]
    size = path.stat().st_size
    os.truncate(path, size - 100)
    error = refusal(sharded)
    assert error.message == f"the file is truncated: expected {size} bytes, found {size - 100}"
    assert error.where == str(path)


def test_a_tensor_that_its_shard_lacks(sharded):
    edit_tensors(sharded / SHARDS[2], lambda tensors: tensors.pop(DOWN))
    error = refusal(sharded)
    assert error.message == f"{SHARDS[2]} lacks what the index says it holds: '{DOWN}'"
    assert error.where == str(sharded / INDEX)


def test_a_tensor_that_the_index_does_not_list(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(DOWN))
    error = refusal(sharded)
    assert error.message == f"{SHARDS[2]} holds tensors that the index does not list: '{DOWN}'"


def test_a_tensor_in_two_shards(sharded):
    copy = load_file(sharded / SHARDS[2])[DOWN]
    edit_tensors(sharded / SHARDS[0], lambda tensors: tensors.update({DOWN: copy}))
    error = refusal(sharded)
    expected = f"{SHARDS[2]} holds tensors that '{SHARDS[0]}' holds too: '{DOWN}'"
    assert expected in str(error)


@pytest.mark.parametrize(
    "content",
    [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {DOWN: 3}}],
)
def test_a_malformed_index(sharded, content):
    (sharded / INDEX).write_text(json.dumps(content))
    error = refusal(sharded)
    assert error.message.startswith("weight_map")
    assert error.where == str(sharded / INDEX)


def test_missing_and_extra_tensors(single):
    def edit(tensors):
        tensors["model.layers.0.extra"] = tensors.pop("model.norm.weight")

    edit_tensors(single / "model.safetensors", edit)
    error = refusal(single)
    assert isinstance(error, CheckpointProblemsError)
    missing, extra = error.errors
    assert missing.message == "missing tensors: 'model.norm.weight'"
    assert extra.message == "tensors that Phi3ForCausalLM does not have: 'model.layers.0.extra'"


def test_many_names_are_cut_short(single):
    edit_json(single / "config.json", lambda config: config.update(num_hidden_layers=4))
    message = refusal(single).message
    assert message.startswith("missing tensors: 'model.layers.2.input_layernorm.weight', ")
    assert message.endswith(" and 7 more")


def test_wrong_shapes(single):
    edit_json(single / "config.json", lambda config: config.update(num_key_value_heads=1))
    message = refusal(single).message
    assert "'model.layers.0.self_attn.qkv_proj.weight' is [256, 128], not [192, 128]" in message
    assert "'model.layers.1.self_attn.qkv_proj.weight' is [256, 128], not [192, 128]" in message


def test_all_problems_are_reported_together(sharded):
    edit_json(sharded / "config.json", lambda config: config.update(vocab_size=None, hidden_act=1))
    (sharded / SHARDS[0]).unlink()
    os.truncate(sharded / SHARDS[1], 1000)
    error = refusal(sharded)
    assert isinstance(error, CheckpointProblemsError)
    text = str(error)
    for part in ("vocab_size is missing", "hidden_act must", f"{SHARDS[0]} is missing", "truncate"):
        assert part in text
    assert error.exit_code == 3


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "a/../../outside.safetensors",
        "/tmp/outside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "C:outside.safetensors",
        "\\\\server\\share\\outside.safetensors",
        "",
        "a\0b",
    ],
)
def test_a_shard_path_that_leaves_the_folder(sharded, name):
    shutil.copy(sharded / SHARDS[0], sharded.parent / "outside.safetensors")

    def redirect(index):
        weight_map = index["weight_map"]
        index["weight_map"] = {k: name if v == SHARDS[0] else v for k, v in weight_map.items()}

    edit_json(sharded / INDEX, redirect)
    error = refusal(sharded)
    assert error.message == f"{name!r} leads out of the checkpoint's folder"
    assert error.where == str(sharded / INDEX)


@pytest.mark.parametrize("name", [SHARDS[1], "config.json", "tokenizer.json"])
def test_a_symbolic_link_that_leaves_the_folder(sharded, name):
    outside = sharded.parent / "outside"
    (sharded / name).rename(outside)
    link_or_skip(sharded / name, outside)
    assert refusal(sharded).message == f"{name!r} leads out of the checkpoint's folder"


def test_a_symbolic_link_within_the_folder(sharded):
    (sharded / "blobs").mkdir()
    (sharded / SHARDS[1]).rename(sharded / "blobs" / "x")
    link_or_skip(sharded / SHARDS[1], Path("blobs") / "x")
    assert len(Checkpoint(sharded).weight_files) == 3


def test_a_circular_symbolic_link(sharded):
    (sharded / SHARDS[1]).unlink()
    link_or_skip(sharded / SHARDS[1], SHARDS[1])
    assert refusal(sharded).message == f"{SHARDS[1]} is missing"


def test_a_shard_that_is_a_folder(sharded):
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[1]).mkdir()
    assert refusal(sharded).message == f"{SHARDS[1]} is not a file"


def test_a_snapshot_of_the_hugging_face_cache(sharded, tmp_path):
    """Links lead to the repository's blobs, and from there to the store all of them share."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", cache / "blobs" / "ab"):
        folder.mkdir(parents=True)
    for file in sharded.iterdir():
        blob = repository / "blobs" / file.name
        if file.name == SHARDS[0]:
            shutil.copy(file, cache / "blobs" / "ab" / "shared")
            link_or_skip(blob, Path("..", "..", "blobs", "ab", "shared"))
        else:
            shutil.copy(file, blob)
        link_or_skip(snapshot / file.name, Path("..", "..", "blobs", file.name))
    checkpoint = Checkpoint(snapshot)
    assert np.array_equal(checkpoint.read(DOWN), Checkpoint(sharded).read(DOWN))

    other = cache / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(sharded / SHARDS[1], other / "x")
    (snapshot / SHARDS[1]).unlink()
    link_or_skip(snapshot / SHARDS[1], other / "x")
    assert "leads out of the checkpoint's folder" in refusal(snapshot).message
