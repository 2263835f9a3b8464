"""The writer against the safetensors library."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from phiconv.checkpoint.safetensors_file import StoredDtype
from phiconv.checkpoint.safetensors_writer import SafetensorsWriter

RANDOM = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray] = {
    "z.codes": RANDOM.integers(0, 256, (5, 3), np.uint8),
    "a.codes": RANDOM.integers(0, 256, (7,), np.uint8),
    "scales": RANDOM.standard_normal((5, 2, 3)).astype(np.float16),
    "norm": RANDOM.standard_normal(9).astype(np.float32),
    "packed": RANDOM.integers(-9, 9, (4, 4), np.int32),
}
DTYPES: dict[str, StoredDtype] = {"uint8": "u8", "float16": "f16", "float32": "f32", "int32": "i32"}
LAYOUT: dict[str, tuple[StoredDtype, tuple[int, ...]]] = {
    name: (DTYPES[str(array.dtype)], array.shape) for name, array in ARRAYS.items()
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_bytes_are_those_of_the_library(
    tmp_path: Path, metadata: dict[str, str] | None, backwards: bool
) -> None:
    save_file(ARRAYS, tmp_path / "theirs", metadata=metadata)
    with SafetensorsWriter(tmp_path / "ours", LAYOUT, metadata) as writer:
        for name in sorted(ARRAYS, reverse=backwards):
            writer.write(name, ARRAYS[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_rows_can_be_written_in_parts(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "file", LAYOUT) as writer:
        for start in (0, 2, 4):
            for name in ("scales", "z.codes"):
                writer.write_rows(name, start, ARRAYS[name][start : start + 2])
        for name in ("a.codes", "norm", "packed"):
            writer.write_rows(name, 0, ARRAYS[name])
    found = load_file(tmp_path / "file")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def test_bf16_and_arrays_of_any_strides(tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_torch

    values = RANDOM.standard_normal((6, 4)).astype(ml_dtypes.bfloat16)
    with SafetensorsWriter(tmp_path / "file", {"w": ("bf16", (4, 6))}) as writer:
        writer.write("w", values.T)
    found = load_torch(tmp_path / "file")["w"]
    assert found.dtype == torch.bfloat16
    np.testing.assert_array_equal(found.float().numpy(), values.T.astype(np.float32))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"never written: a\.codes, packed, z\.codes$"),
        SafetensorsWriter(tmp_path / "file", LAYOUT) as writer,
    ):
        with pytest.raises(KeyError):
            writer.write("other", ARRAYS["norm"])
        with pytest.raises(ValueError, match=r"norm is f32 of shape \[9\], not float64"):
            writer.write("norm", ARRAYS["norm"].astype(np.float64))
        with pytest.raises(ValueError, match=r"norm is f32 of shape \[9\], not float32 of shape"):
            writer.write("norm", ARRAYS["norm"][:1])
        with pytest.raises(ValueError, match="does not fit from row 4 on"):
            writer.write_rows("scales", 4, ARRAYS["scales"][:2])
        with pytest.raises(ValueError, match="does not fit from row 0 on"):
            writer.write_rows("scales", 0, ARRAYS["scales"][:, :1])
        with pytest.raises(ValueError, match="which uint8 of shape"):
            writer.write_rows("scales", 0, ARRAYS["scales"].astype(np.uint8))
        writer.write("norm", ARRAYS["norm"])
        writer.write("scales", ARRAYS["scales"])
        writer.write_rows("z.codes", 0, ARRAYS["z.codes"][:4])  # its last row is never written
