"""GGUF files byte by byte: what is sound, and what no reader should take."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from phiconv.errors import StageError
from phiconv.gguf.structure import ArrayValue, read_structure


def write(path: Path, change: Callable[[gguf.GGUFWriter], None] = lambda writer: None) -> Path:
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_block_count(1)
    writer.add_token_list(["<s>", "é", "a"])
    writer.add_token_scores([0.0, -1.0, -2.0])
    writer.add_token_types([3, 1, 1])
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(True)
    change(writer)
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "phi3.gguf")


def refused(path: Path) -> str:
    with pytest.raises(StageError) as caught:
        read_structure(path)
    assert caught.value.where == str(path) and caught.value.remedy
    return caught.value.message


def patch(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))
    return path


def test_a_sound_file_is_read_as_gguf_reads_it(file: Path) -> None:
    found = read_structure(file)
    reader = gguf.GGUFReader(file)
    assert found.metadata["general.architecture"] == "phi3"
    assert found.metadata["tokenizer.ggml.tokens"] == ArrayValue(8, 3)
    assert found.metadata["tokenizer.ggml.add_bos_token"] is True
    assert set(found.metadata) == {key for key in reader.fields if not key.startswith("GGUF.")}
    assert found.data_offset == reader.data_offset
    assert [(t.name, list(t.shape), t.type, found.data_offset + t.offset, t.nbytes)
            for t in found.tensors] == [
        (t.name, t.shape.tolist(), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]  # fmt: skip


def test_an_end_without_padding_is_sound(file: Path) -> None:
    tensor = read_structure(file).tensors[-1]
    end = read_structure(file).data_offset + tensor.offset + tensor.nbytes
    file.write_bytes(file.read_bytes()[:end])
    assert read_structure(file).tensors[-1] == tensor


def test_every_shorter_file_is_refused(file: Path) -> None:
    data = file.read_bytes()
    for length in (*range(0, 600, 7), len(data) - 33, len(data) - 100):
        file.write_bytes(data[:length])
        refused(file)


def test_a_longer_file_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    assert "1 bytes follow its last tensor" in refused(file)


def test_header(file: Path) -> None:
    data = file.read_bytes()
    for offset, raw, what in (
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 2), "version is 2"),
        (8, struct.pack("<Q", 1 << 60), "counts"),
        (16, struct.pack("<Q", 1 << 60), "counts"),
        (24, struct.pack("<Q", 1 << 60), "bytes are wanted"),
    ):
        file.write_bytes(data[:offset] + raw + data[offset + len(raw) :])
        assert what in refused(file)


def test_infos(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    shape = struct.pack("<IQQI", 2, 32, 3, 0)
    for new, what in (
        (struct.pack("<IQQI", 9, 32, 3, 0), "has 9 axes"),
        (struct.pack("<IQQI", 2, 32, 3, 99), "unknown type 99"),
        (struct.pack("<IQQI", 2, 32, 3, 12), "cannot be Q4_K"),
        (struct.pack("<IQQI", 2, 32, 0, 0), "cannot be F32"),
        (struct.pack("<IQQI", 2, 32, 9, 0), "lies at 384, not at 1152"),
    ):
        patch(write(path), shape, new)
        assert what in refused(path)
    patch(write(path), b"blk.0.attn_norm", b"blk.1.attn_norm")
    assert "a layer are missing" in refused(path)


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    bos = struct.pack("<II", 4, 0)
    patch(write(path), b"bos_token_id" + bos, b"bos_token_id" + struct.pack("<II", 4, 3))
    assert "bos_token_id is 3, with 3 tokens" in refused(path)
    patch(write(path), b"bos_token_id" + bos, b"bos_token_id" + struct.pack("<II", 77, 0))
    assert "unknown type 77" in refused(path)
    patch(write(path), b"add_bos_token\x07\0\0\0\x01", b"add_bos_token\x07\0\0\0\x05")
    assert "truth value of 5" in refused(path)
    patch(write(path), b"general.architecture", b"general.architectura")
    assert "general.architecture is missing" in refused(path)
    patch(write(path), b"phi3.block_count\x04\0\0\0\x01", b"phi3.block_count\x04\0\0\0\x02")
    assert "block_count is 2, with 1 layers" in refused(path)
    write(path, lambda writer: writer.add_custom_alignment(64))
    assert read_structure(path).data_offset % 64 == 0
    write(path, lambda writer: writer.add_uint32("general.alignment", 48))
    assert "no power of two" in refused(path)
    patch(write(path), b"general.architecture", b"general.arch\xff\xfeecture")
    assert "no UTF-8 text" in refused(path)


def test_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"

    def more(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["tokenizer.ggml.scores"].value.append(-3.0)

    write(path, more)
    assert "scores has 4 values for 3 tokens" in refused(path)


def test_the_embedding_has_a_row_for_each_token(tmp_path: Path) -> None:
    def fewer(writer: gguf.GGUFWriter) -> None:
        for key in ("tokens", "scores", "token_type"):
            writer.kv_data[0][f"tokenizer.ggml.{key}"].value.pop()

    path = write(tmp_path / "x.gguf", fewer)
    assert "the embedding has 3 rows for 2 tokens" in refused(path)


def test_a_tensor_that_stands_twice(tmp_path: Path) -> None:
    def another(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("token_embd.weighu", np.zeros((3, 32), np.float32))

    path = write(tmp_path / "x.gguf", another)
    patch(path, b"token_embd.weighu", b"token_embd.weight")
    assert "tensor token_embd.weight stands twice" in refused(path)


def test_random_damage_is_refused_or_read_but_never_anything_else(file: Path) -> None:
    data = file.read_bytes()
    choose = random.Random(5)
    end = read_structure(file).data_offset
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(choose.choice((1, 1, 8))):
            damaged[choose.randrange(end)] = choose.randrange(256)
        file.write_bytes(damaged)
        try:
            read_structure(file)
            outcomes[True] += 1
        except StageError:
            outcomes[False] += 1
    assert outcomes[False] > outcomes[True]


def test_there_must_be_a_file(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "none.gguf")
