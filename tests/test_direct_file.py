from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from phiconv.direct_file import BLOCK_BYTES, DirectFile
from phiconv.segment_memory import SegmentMemory

with_pwrite = pytest.mark.skipif(not hasattr(os, "pwrite"), reason="written by other means here")
SHM = Path("/dev/shm")


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder of a file system without a disk; its size is a limit."""
    if sys.platform != "linux" or not SHM.is_dir() or not os.access(SHM, os.W_OK):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        yield Path(folder)


def write(path: Path, size: int) -> bytes:
    """Writes a file in three blocks, the last first, and returns what it should hold."""
    memory = SegmentMemory(1).open(0)[: 5 * BLOCK_BYTES]
    memory[:] = np.random.default_rng(0).integers(0, 256, len(memory), np.uint8)
    file = DirectFile(path, size)
    try:
        for start, stop in ((4, 5), (0, 1), (1, 4)):
            block = memory[start * BLOCK_BYTES : stop * BLOCK_BYTES]
            file.write(start * BLOCK_BYTES, block.data)
        file.finish()
    finally:
        file.close()
    return memory[:size].tobytes()


def test_blocks_in_any_order_and_a_length_that_is_no_block_s(tmp_path: Path) -> None:
    content = write(tmp_path / "data", 4 * BLOCK_BYTES + 1)
    assert (tmp_path / "data").read_bytes() == content


def test_a_file_system_without_a_disk(in_memory: Path) -> None:
    content = write(in_memory / "data", 4 * BLOCK_BYTES + 1)
    assert (in_memory / "data").read_bytes() == content


@with_pwrite
def test_a_file_system_that_refuses_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    original = os.pwrite
    refused = 0

    def pwrite(descriptor: int, block: memoryview, offset: int) -> int:
        nonlocal refused
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(descriptor, block, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    content = write(tmp_path / "data", 5 * BLOCK_BYTES)
    assert (tmp_path / "data").read_bytes() == content
    assert refused <= 1, "it is tried once"


@with_pwrite
@pytest.mark.parametrize("most", [BLOCK_BYTES, 1000])
def test_writes_cut_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    original = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda descriptor, block, at: original(descriptor, block[:most], at)
    )
    content = write(tmp_path / "data", 5 * BLOCK_BYTES)
    assert (tmp_path / "data").read_bytes() == content


@with_pwrite
def test_a_write_of_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda descriptor, block, at: 0)
    with pytest.raises(OSError, match="nothing"):
        write(tmp_path / "data", 5 * BLOCK_BYTES)


def test_a_full_disk_is_known_at_once(in_memory: Path) -> None:
    before = shutil.disk_usage(in_memory)
    with pytest.raises(OSError) as raised:
        DirectFile(in_memory / "data", before.total + (1 << 30))
    assert raised.value.errno == errno.ENOSPC
    assert (in_memory / "data").stat().st_blocks == 0
