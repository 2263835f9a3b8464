from __future__ import annotations

import json
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save_file

from phiconv.checkpoint.safetensors_file import SafetensorsFile, numpy_dtype
from phiconv.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def read_all(file: SafetensorsFile) -> dict[str, bytes]:
    result = {}
    for name, info in file.tensors.items():
        buffer = bytearray(info.nbytes)
        file.read_into(info.offset, memoryview(buffer))
        result[name] = bytes(buffer)
    return result


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "b": rng.standard_normal((5, 7)).astype(ml_dtypes.bfloat16),
        "a": rng.standard_normal((3, 4, 2)).astype(np.float16),
        "c": rng.standard_normal(9).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "empty": np.empty((0, 4), np.float32),
    }


def test_tensors_are_what_safetensors_wrote(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path, "x.safetensors")
    assert set(file.tensors) == set(tensors)
    for name, data in read_all(file).items():
        info = file.tensors[name]
        assert info.shape == tensors[name].shape
        assert numpy_dtype(info.dtype) == tensors[name].dtype
        assert data == tensors[name].tobytes()
        assert info.nbytes == len(data)
        assert info.file == "x.safetensors"
    offsets = [info.offset for info in file.tensors.values()]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "its header is no JSON object"),
        (b" {}", b"", "its header is no JSON object"),
        (b"{", b"", "not valid JSON"),
        (b'{"a": NaN}', b"", "NaN is not a JSON number"),
        (b'{"\xff": 1}', b"", "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
        (
            b'{"t": {"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
            b' "t": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
            b"",
            "the key 't' stands twice",
        ),
        ({"t": [1]}, b"", "tensor 't': its entry must hold exactly dtype, shape and data_offsets"),
        ({"t": F32 | {"more": 1}}, b"", "its entry must hold exactly"),
        ({"t": F32 | {"dtype": 3}}, b"", "its dtype must be a string"),
        ({"t": F32 | {"shape": [2, -3]}}, b"", "its shape must be a list of non-negative"),
        ({"t": F32 | {"shape": [2, True]}}, b"", "its shape must be a list of non-negative"),
        ({"t": F32 | {"shape": [2**63]}}, b"", "its shape must be a list of non-negative"),
        ({"t": F32 | {"shape": [1] * 33}}, b"", "its shape must be a list of non-negative"),
        ({"t": F32 | {"data_offsets": [24, 0]}}, b"", "its data_offsets must be two integers"),
        ({"t": F32 | {"data_offsets": [0]}}, b"", "its data_offsets must be two integers"),
        ({"t": F32 | {"shape": [2, 4]}}, bytes(24), r"\[2, 4\] takes 32 bytes, but .* span 24"),
        ({"t": F32, "u": F32}, bytes(24), "tensor 'u' overlaps the tensor before it"),
        (
            {"t": F32, "u": F32 | {"data_offsets": [28, 52]}},
            bytes(52),
            "tensor 'u' leaves a hole: it begins at byte 28 of the data, not 24",
        ),
        ({"t": F32 | {"data_offsets": [4, 28]}}, bytes(28), "tensor 't' leaves a hole"),
        ({"t": F32}, bytes(25), "bytes long, but its header accounts for"),
        (
            {"t": {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]}},
            bytes(24),
            "only BF16, F16 and F32 are supported, but I64 is the dtype of 't'",
        ),
    ],
)
def test_malformed_files_are_refused(tmp_path, header, data, message):
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path, path.name)
    assert caught.value.where.startswith(str(path))


def test_a_truncated_file_is_named_with_expected_and_actual_bytes(tmp_path):
    path = write(tmp_path / "x.safetensors", {"t": F32}, bytes(23))
    size = path.stat().st_size
    with pytest.raises(CheckpointError, match=f"expected {size + 1} bytes, found {size}") as caught:
        SafetensorsFile(path, path.name)
    assert caught.value.where == str(path)


def test_truncation_at_every_byte_is_refused(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            SafetensorsFile(path, path.name)


def test_an_overlong_header_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / "x.safetensors", b"{}", length=100_000_001)
    with pytest.raises(CheckpointError, match="header would be 100000001 bytes long"):
        SafetensorsFile(path, path.name)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer") as caught:
        SafetensorsFile(path, path.name)
    assert "git lfs pull" in caught.value.remedy


def test_a_missing_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsFile(tmp_path / "x.safetensors", "x.safetensors")


@pytest.mark.parametrize("change", ["truncate", "grow", "remove", "rewrite"])
def test_a_file_changed_while_open_is_refused(tmp_path, change):
    path = write(tmp_path / "x.safetensors", {"t": F32}, bytes(24))
    file = SafetensorsFile(path, path.name)
    whole = path.read_bytes()
    if change == "remove":
        path.unlink()
    elif change == "rewrite":
        other = tmp_path / "other"
        other.write_bytes(whole)
        other.replace(path)
    else:
        path.write_bytes(whole[:-1] if change == "truncate" else whole + b"\0")
    with pytest.raises(CheckpointError, match=r"was changed|cannot be read any more"):
        file.read_into(file.tensors["t"].offset, memoryview(bytearray(24)))


def test_a_short_read_is_refused(tmp_path):
    path = write(tmp_path / "x.safetensors", {"t": F32}, bytes(24))
    file = SafetensorsFile(path, path.name)
    with pytest.raises(CheckpointError, match="was changed"):
        file.read_into(file.tensors["t"].offset, memoryview(bytearray(25)))


def test_threads_read_independently(tmp_path):
    values = np.arange(64 * 1000, dtype=np.float32).reshape(64, 1000)
    path = tmp_path / "x.safetensors"
    save_file({"t": values}, path)
    file = SafetensorsFile(path, path.name)
    info = file.tensors["t"]

    def row(index: int) -> np.ndarray:
        out = np.empty(1000, np.float32)
        file.read_into(info.offset + index * info.row_nbytes, out.view(np.uint8).data)
        return out

    order = list(range(64)) * 4
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        for index, out in zip(order, pool.map(row, order), strict=True):
            assert np.array_equal(out, values[index])


def test_corrupted_headers_are_refused_or_read_as_safetensors_reads_them(tmp_path, tensors):
    """Damage is refused with a CheckpointError, or harmless to safetensors' own reader as well."""
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(20)
    refused = accepted = 0
    for _ in range(800):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(header_end)] = rng.choice(
                (rng.randrange(256), ord('"'), ord("0"), ord("9"), ord("]"), ord(" "))
            )
        path.write_bytes(damaged)
        try:
            ours = read_all(SafetensorsFile(path, path.name))
        except CheckpointError:
            refused += 1
            continue
        accepted += 1
        theirs = {name: bytes(entry["data"]) for name, entry in deserialize(bytes(damaged))}
        assert ours == theirs
    assert refused > 300 and accepted > 10
