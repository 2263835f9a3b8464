from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from blake3 import blake3

from phiconv.checkpoint import digests
from phiconv.checkpoint.digests import CACHE_FILE, DigestCache, digest_file, digest_files
from phiconv.errors import CheckpointError

HOUR = 3600


def write(path: Path, data: bytes, age: float = HOUR) -> Path:
    path.write_bytes(data)
    then = time.time_ns() - int(age * 1e9)
    os.utime(path, ns=(then, then))
    return path


def hashed(paths, cache) -> int:
    """How many of the files are read again."""
    read: list[Path] = []
    original = digests.digest_file

    def spy(path, on_bytes=None, threads=1):
        read.append(path)
        return original(path, on_bytes, threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "digest_file", spy)
        result = digest_files(paths, cache=cache)
    assert result == [f"blake3:{blake3(path.read_bytes()).hexdigest()}" for path in paths]
    return len(read)


def entries(folder: Path) -> dict[str, list]:
    return json.loads((folder / CACHE_FILE).read_text())["entries"]


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_500_000])
def test_digests_are_blake3(tmp_path, size):
    path = write(tmp_path / "x", os.urandom(size))
    seen: list[int] = []
    result = digest_file(path, seen.append)
    assert result.digest == f"blake3:{blake3(path.read_bytes()).hexdigest()}"
    assert sum(seen) == size


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(digests, "BUFFER_BYTES", 1 << 16)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("size", [0, 1, 1 << 16, 3 << 16, (3 << 16) + 1, 1 << 21])
def test_the_digest_of_parts_is_that_of_the_whole(tmp_path, size):
    path = write(tmp_path / "x", os.urandom(size))
    seen: list[int] = []
    result = digest_file(path, seen.append, threads=2)
    assert result.digest == f"blake3:{blake3(path.read_bytes()).hexdigest()}"
    assert sum(seen) == size
    assert max(seen, default=0) == min(size, 1 << 16)


@pytest.mark.usefixtures("small_buffers")
def test_a_file_cut_off_while_it_is_hashed_is_refused(tmp_path):
    path = write(tmp_path / "x", bytes(3 << 20))
    with pytest.raises(CheckpointError, match="changed while it was hashed"):
        digest_file(path, lambda _: os.truncate(path, 100))


@pytest.mark.skipif(sys.platform == "win32", reason="an open file is not cut off there")
@pytest.mark.usefixtures("small_buffers")
def test_a_file_cut_off_at_any_moment_ends_no_process(tmp_path):
    """By another process, which waits for nothing: a mapping's pages would be gone."""
    path = write(tmp_path / "x", bytes(8 << 20))
    done = threading.Event()

    def cut_off():
        while not done.is_set():
            os.truncate(path, 100)
            os.truncate(path, 8 << 20)

    thread = threading.Thread(target=cut_off)
    thread.start()
    try:
        for _ in range(20):
            with suppress(CheckpointError):
                digest_file(path, threads=2)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_order_is_kept_and_bytes_are_counted(tmp_path, threads):
    paths = [write(tmp_path / f"{index}", bytes([index]) * 1000 * index) for index in range(9)]
    paths.append(paths[4])
    seen: list[int] = []
    result = digest_files(paths, threads=threads, on_bytes=seen.append)
    assert result == [digest_file(path).digest for path in paths]
    assert sum(seen) == sum(range(9)) * 1000


def test_unchanged_files_are_not_read_again(tmp_path):
    paths = [write(tmp_path / name, name.encode()) for name in "abc"]
    cache = DigestCache(tmp_path / "cache")
    assert hashed(paths, cache) == 3
    assert hashed(paths, cache) == 0
    assert hashed(paths, DigestCache(tmp_path / "cache")) == 0
    seen: list[int] = []
    digest_files(paths, cache=cache, on_bytes=seen.append)
    assert sum(seen) == 3


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "x", b"one")
    cache = DigestCache(tmp_path / "cache")
    hashed([path], cache)
    write(path, b"four", age=HOUR)
    assert hashed([path], cache) == 1
    write(path, b"FOUR", age=HOUR / 2)
    assert hashed([path], cache) == 1
    replacement = write(tmp_path / "y", b"five")
    status = path.stat()
    os.utime(replacement, ns=(status.st_mtime_ns, status.st_mtime_ns))
    replacement.replace(path)
    assert hashed([path], cache) == 1


@pytest.mark.parametrize("age", [0, 1, -HOUR])
def test_a_file_changed_just_now_is_not_trusted(tmp_path, age):
    """The next change could fall within the same tick of the file system's clock."""
    path = write(tmp_path / "x", b"one", age=age)
    status = path.stat()
    cache = DigestCache(tmp_path / "cache")
    assert hashed([path], cache) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert hashed([path], cache) == 1


def test_one_file_by_two_names_is_one_entry(tmp_path):
    path = write(tmp_path / "x", b"one")
    (tmp_path / "sub").mkdir()
    cache = DigestCache(tmp_path / "cache")
    hashed([path], cache)
    assert hashed([tmp_path / "sub" / ".." / "x"], cache) == 0
    assert list(entries(tmp_path / "cache")) == [str(path.resolve())]


def test_entries_of_files_that_are_gone_are_dropped(tmp_path):
    cache = DigestCache(tmp_path / "cache")
    old, new = (write(tmp_path / name, b"x") for name in ("old", "new"))
    hashed([old], cache)
    old.unlink()
    hashed([new], cache)
    assert list(entries(tmp_path / "cache")) == [str(new.resolve())]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: text.replace("blake3:", "blake4:"),
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text[:-8] + ("0" if text[-8] != "0" else "1") + text[-7:],
        lambda text: text.encode() + b"\xff",
    ],
)
def test_a_damaged_cache_counts_as_empty(tmp_path, damage):
    path = write(tmp_path / "x", b"one")
    cache = DigestCache(tmp_path / "cache")
    hashed([path], cache)
    file = tmp_path / "cache" / CACHE_FILE
    damaged = damage(file.read_text())
    file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    assert hashed([path], cache) == 1
    assert hashed([path], cache) == 0


def test_a_digest_swapped_in_the_cache_is_not_believed(tmp_path):
    path = write(tmp_path / "x", b"one")
    cache = DigestCache(tmp_path / "cache")
    hashed([path], cache)
    file = tmp_path / "cache" / CACHE_FILE
    right = digest_file(path).digest
    file.write_text(file.read_text().replace(right, f"blake3:{'0' * 64}"))
    assert hashed([path], cache) == 1


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    path = write(tmp_path / "x", b"one")
    assert hashed([path], DigestCache(tmp_path / "cache")) == 1


def test_concurrent_writers_leave_a_valid_cache(tmp_path):
    paths = [write(tmp_path / f"{index}", bytes([index])) for index in range(20)]
    folder = tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:
        # a cache of its own for each, as in different processes
        list(pool.map(lambda path: digest_files([path], cache=DigestCache(folder)), paths))
    assert [file.name for file in folder.iterdir()] == [CACHE_FILE]
    assert entries(folder).keys() <= {str(path.resolve()) for path in paths}
    assert hashed(paths, DigestCache(folder)) < len(paths)
    assert hashed(paths, DigestCache(folder)) == 0


def test_one_cache_shared_by_threads_loses_nothing(tmp_path):
    paths = [write(tmp_path / f"{index}", bytes([index])) for index in range(20)]
    cache = DigestCache(tmp_path / "cache")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: digest_files([path], cache=cache), paths))
    assert hashed(paths, cache) == 0


def test_a_file_changed_while_it_is_hashed_is_refused(tmp_path):
    path = write(tmp_path / "x", bytes(3 << 20))
    changed = threading.Event()

    def grow(_: int) -> None:
        if not changed.is_set():
            changed.set()
            with path.open("ab") as file:
                file.write(b"more")

    with pytest.raises(CheckpointError, match="changed while it was hashed"):
        digest_files([path], cache=DigestCache(tmp_path / "cache"), on_bytes=grow)


def test_a_missing_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        digest_files([tmp_path / "x"], cache=DigestCache(tmp_path / "cache"))
    assert caught.value.where == str(tmp_path / "x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        digest_files([tmp_path])
