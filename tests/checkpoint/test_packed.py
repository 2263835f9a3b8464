"""AutoAWQ and GPTQ checkpoints, read as the float weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phiconv.checkpoint import Checkpoint, CheckpointProblemsError
from phiconv.checkpoint.weight_source import Grid
from phiconv.errors import CheckpointError
from phiconv.kernels.matmulnbits import dequantize_rows, layout
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.quantized_checkpoints import Quantized, write_quantized

FORMATS: dict[str, dict[str, Any]] = {
    "awq": {"method": "awq"},
    "awq-128": {"method": "awq", "group_size": 128},
    "awq-whole-rows": {"method": "awq", "group_size": -1},
    "gptq": {"method": "gptq"},
    "gptq-sym": {"method": "gptq", "symmetric": True},
    "gptq-v2": {"method": "gptq", "version": "gptq_v2"},
    "gptq-8": {"method": "gptq", "bits": 8, "group_size": 64},
    "gptq-8-sym": {"method": "gptq", "bits": 8, "symmetric": True, "version": "gptq_v2"},
    "gptq-whole-rows": {"method": "gptq", "group_size": -1, "symmetric": True},
    "gptq-head": {"method": "gptq", "head": True, "zero_bias": True},
    "gptq-order": {"method": "gptq", "group_size": 128, "group_order": [1, 0]},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phi3_checkpoint(
        tmp_path_factory.mktemp("float") / "model", hidden_size=256, intermediate_size=256
    )


def rounded(checkpoint: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
    """Rows that the codes stand for, with scales as stored."""
    assert checkpoint.rounded is not None
    grid = checkpoint.rounded.tensors[name]
    k = checkpoint.tensors[name].shape[1]
    shapes = layout(stop - start, k, bits=grid.bits, block_size=grid.group_size)
    packed, scales = np.empty(shapes.packed, np.uint8), np.empty(shapes.scales, np.float16)
    zeros = None if grid.symmetric else np.empty(shapes.zero_points, np.uint8)
    checkpoint.rounded.read_rows(name, start, packed=packed, scales=scales, zero_points=zeros)
    return dequantize_rows(
        packed, scales, zeros, bits=grid.bits, block_size=grid.group_size, K=k,
        symmetric=grid.symmetric,
    )  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_the_checkpoint_says(original: Path, tmp_path: Path, name: str) -> None:
    made = write_quantized(original, tmp_path / "quantized", **FORMATS[name])
    checkpoint = Checkpoint(made.path)
    plain = Checkpoint(original)
    assert checkpoint.tensors.keys() == plain.tensors.keys()
    for tensor, info in checkpoint.tensors.items():
        assert info.shape == plain.tensors[tensor].shape
        if tensor not in made.weights:
            assert info.dtype == "bf16"
            assert np.array_equal(checkpoint.read(tensor), plain.read(tensor))
            continue
        n = info.shape[0]
        assert info.dtype == "f32" and info.nbytes == made.weights[tensor].nbytes
        assert np.array_equal(checkpoint.read(tensor), made.weights[tensor])
        assert np.array_equal(
            checkpoint.read_rows(tensor, 3, n - 5), made.weights[tensor][3 : n - 5]
        )
        assert np.array_equal(rounded(checkpoint, tensor, 1, n), made.weights[tensor][1:])


def test_grids(original: Path, tmp_path: Path) -> None:
    def grids(name: str) -> set[Grid]:
        made = write_quantized(original, tmp_path / name, **FORMATS[name])
        found = Checkpoint(made.path).rounded
        assert found is not None and found.tensors.keys() == made.weights.keys()
        return set(found.tensors.values())

    assert grids("awq") == {Grid(4, 32, symmetric=False)}
    assert grids("gptq-8-sym") == {Grid(8, 32, symmetric=True)}
    # a scale for 256 features is one for each of as many blocks as there must be
    assert grids("awq-whole-rows") == {Grid(4, 256, symmetric=False)}
    assert grids("gptq-order") == {Grid(4, 128, symmetric=False)}


def test_groups_longer_than_any_block_share_their_scale(tmp_path: Path) -> None:
    original = write_phi3_checkpoint(tmp_path / "float", intermediate_size=640)
    made = write_quantized(original, tmp_path / "q", method="gptq", group_size=-1, symmetric=False)
    checkpoint = Checkpoint(made.path)
    down = "model.layers.0.mlp.down_proj.weight"
    assert checkpoint.rounded is not None
    assert checkpoint.rounded.tensors[down] == Grid(4, 128, symmetric=False)  # 640 = 5 blocks
    assert np.array_equal(checkpoint.read(down), made.weights[down])
    assert np.array_equal(rounded(checkpoint, down, 0, 128), made.weights[down])


def test_single_weights_can_have_a_grid_of_their_own(original: Path, tmp_path: Path) -> None:
    made = write_quantized(original, tmp_path / "4", method="gptq", symmetric=True)
    eight = write_quantized(
        original, tmp_path / "8", method="gptq", bits=8, group_size=64, symmetric=True
    )
    module = "model.layers.1.mlp.down_proj"
    tensors = load_file(made.path / "model.safetensors")
    for name, values in load_file(eight.path / "model.safetensors").items():
        if name.startswith(module):
            tensors[name] = values
    save_file(tensors, made.path / "model.safetensors")
    edit_quantization(made.path, dynamic={f"+:{module}": {"bits": 8, "group_size": 64}})
    checkpoint = Checkpoint(made.path)
    assert checkpoint.rounded is not None
    assert checkpoint.rounded.tensors[f"{module}.weight"] == Grid(8, 64, symmetric=True)
    assert np.array_equal(checkpoint.read(f"{module}.weight"), eight.weights[f"{module}.weight"])


def test_a_weight_of_neither_4_nor_8_bits_is_refused(original: Path, tmp_path: Path) -> None:
    made = write_quantized(original, tmp_path / "q", method="gptq")
    edit_quantization(made.path, dynamic={"+:.*": {"group_size": 32}})

    def cut(tensors: dict[str, np.ndarray]) -> None:
        for layer in (0, 1):
            name = f"model.layers.{layer}.mlp.down_proj.qweight"
            tensors[name] = tensors[name][:-1].copy()

    edit_tensors(made.path, cut)
    with pytest.raises(CheckpointProblemsError) as caught:
        Checkpoint(made.path)
    assert [error.message for error in caught.value.errors] == [
        f"model.layers.{layer}.mlp.down_proj has neither 4 nor 8 bits a weight" for layer in (0, 1)
    ]


def test_arrays_of_another_shape_are_refused(original: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_quantized(original, tmp_path / "q", method="awq").path)
    name = "model.layers.0.mlp.down_proj.weight"
    for out in (np.empty((7, 256), np.float32), np.empty((8, 256), np.float16)):
        with pytest.raises(ValueError, match=r"float32 of shape \[8, 256\]"):
            checkpoint.read_rows(name, 0, 8, out)
    out = np.empty((8, 256), np.float32)
    assert checkpoint.read_rows(name, 0, 8, out) is out
    assert np.array_equal(out, checkpoint.read(name)[:8])
    with pytest.raises(IndexError, match=r"has no rows \[250, 257\)"):
        checkpoint.read_rows(name, 250, 257)
    codes, scales = np.empty((8, 8, 16), np.uint8), np.empty((8, 8), np.float16)
    zeros = np.empty((8, 4), np.uint8)
    rounded = checkpoint.rounded
    assert rounded is not None
    rounded.read_rows(name, 0, packed=codes, scales=scales, zero_points=zeros)
    with pytest.raises(ValueError, match="asymmetric"):
        rounded.read_rows(name, 0, packed=codes, scales=scales, zero_points=None)
    with pytest.raises(ValueError, match="codes of shape"):
        rounded.read_rows(name, 0, packed=codes[:, :, :1], scales=scales, zero_points=zeros)
    with pytest.raises(ValueError, match="codes of shape"):
        rounded.read_rows(name, 0, packed=codes, scales=scales[:, :1], zero_points=zeros)


def test_reading_is_thread_safe(original: Path, tmp_path: Path) -> None:
    made = write_quantized(original, tmp_path / "q", method="awq")
    checkpoint = Checkpoint(made.path)
    jobs = [(name, row) for row in range(0, 96, 8) for name in made.weights] * 2

    def matches(job: tuple[str, int]) -> bool:
        name, row = job
        rows = checkpoint.read_rows(name, row, row + 8)
        return np.array_equal(rows, made.weights[name][row : row + 8])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(matches, jobs))


def test_the_weight_is_autoawqs_own(original: Path, tmp_path: Path) -> None:
    """Where AutoAWQ is installed: its dequantization, which rounds to fp16, of the same tensors."""
    packing = pytest.importorskip("awq.utils.packing_utils", reason="autoawq is not installed")
    import torch

    made = write_quantized(original, tmp_path / "q", method="awq")
    stored = load_file(made.path / "model.safetensors")
    checkpoint = Checkpoint(made.path)
    for name in made.weights:
        parts = (stored[name.replace("weight", part)] for part in ("qweight", "qzeros", "scales"))
        theirs = packing.dequantize_gemm(*map(torch.from_numpy, parts), 4, 32).T.numpy()
        assert theirs.dtype == np.float16
        assert np.array_equal(checkpoint.read(name).astype(np.float16), theirs)


def edit_quantization(path: Path, **keys: Any) -> None:
    document = json.loads((path / "config.json").read_text())
    document["quantization_config"] |= keys
    (path / "config.json").write_text(json.dumps(document))


def edit_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "keys", "message"),
    [
        ("awq", {"version": "gemv"}, "version is 'gemv': of AWQ's layouts gemm is read"),
        ("awq", {"bits": 8}, "bits is 8: AWQ's layout gemm is for 4 bits"),
        ("awq", {"quant_method": "compressed-tensors"}, "quant_method is 'compressed-tensors'"),
        ("awq", {"quant_method": None}, "quant_method is ''"),
        ("awq", {"group_size": 0}, "config.group_size must be -1 or at least 1, not 0"),
        ("gptq", {"group_size": -2}, "config.group_size must be at least -1, not -2"),
        ("awq", {"group_size": 24}, "groups of 24 features, which no block size of MatMulNBits"),
        ("awq", {"group_size": 64}, r"qkv_proj.qzeros is i32 \[8, 64\], not i32 \[4, 64\]"),
        ("gptq", {"bits": 3}, "bits is 3: MatMulNBits weights have 4 or 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("gptq", {"bits": 8}, r"qkv_proj.qweight is i32 \[32, 512\], not i32 \[64, 512\]"),
    ],
)
def test_formats_that_are_not_read_are_refused(
    original: Path, tmp_path: Path, method: str, keys: dict[str, Any], message: str
) -> None:
    made = write_quantized(original, tmp_path / "q", method=method)
    edit_quantization(made.path, **keys)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(made.path)


def act_order(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.0.mlp.down_proj.g_idx"
    tensors[name] = np.random.default_rng(0).permutation(tensors[name])


def drop(part: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"model.layers.0.mlp.down_proj.{part}"]

    return change


def shift_groups(by: int) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.down_proj.g_idx"] += by

    return change


def cut_groups(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.0.mlp.down_proj.g_idx"
    tensors[name] = tensors[name][:-1].copy()


def float_groups(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.0.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].astype(np.float32)


def integer_scales(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.0.mlp.down_proj.scales"
    tensors[name] = tensors[name].astype(np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shift_groups(1), "down_proj.g_idx names groups that there are not"),
        (shift_groups(-1), "down_proj.g_idx names groups that there are not"),
        (cut_groups, r"down_proj.g_idx is i32 of shape \[255\], not i32 \[256\]"),
        (float_groups, r"down_proj.g_idx is f32 of shape \[256\], not i32 \[256\]"),
        (integer_scales, r"down_proj.scales is i32 \[8, 256\], not floating point \[8, 256\]"),
        (act_order, "down_proj was quantized with act-order .* do not lie together"),
        (drop("scales"), "missing tensors: 'model.layers.0.mlp.down_proj.scales'"),
        (drop("qzeros"), "missing tensors: 'model.layers.0.mlp.down_proj.qzeros'"),
        (drop("qweight"), "does not have: .*down_proj"),
    ],
)
def test_damaged_checkpoints_are_refused(
    original: Path,
    tmp_path: Path,
    change: Callable[[dict[str, np.ndarray]], None],
    message: str,
) -> None:
    made = write_quantized(original, tmp_path / "q", method="gptq")
    edit_tensors(made.path, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(made.path)


def with_zero(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.mlp.down_proj.qzeros"][0, 0] ^= 1


def with_bias(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.mlp.down_proj.bias"] = np.ones(256, np.float16)


def with_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.mlp.down_proj.scales"][1, 2] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_zero, "holds other values than the middle code, but .* says sym"),
        (with_bias, "down_proj.bias is not zero"),
        (with_nan, "down_proj.scales holds NaN or Inf"),
    ],
)
def test_what_only_the_weights_tell_is_found_when_they_are_read(
    original: Path,
    tmp_path: Path,
    change: Callable[[dict[str, np.ndarray]], None],
    message: str,
) -> None:
    made: Quantized = write_quantized(original, tmp_path / "q", method="gptq", symmetric=True)
    edit_tensors(made.path, change)
    checkpoint = Checkpoint(made.path)
    checkpoint.read("model.layers.1.mlp.down_proj.weight")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read("model.layers.0.mlp.down_proj.weight")


def test_a_float_checkpoint_has_no_codes(original: Path) -> None:
    checkpoint = Checkpoint(original)
    assert checkpoint.config.quantization is None
    assert checkpoint.rounded is None


def test_a_config_without_quantized_weights_is_refused(original: Path, tmp_path: Path) -> None:
    made = write_quantized(original, tmp_path / "q", method="awq")
    save_file(load_file(original / "model.safetensors"), made.path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no weight is quantized"):
        Checkpoint(made.path)
