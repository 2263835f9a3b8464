from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiconv import data_file, segment_memory
from phiconv.data_file import DataFile, Region
from phiconv.segment_memory import SegmentMemory

SMALL = 64 << 10
LIMIT = 6 * SMALL
TIMEOUT_S = 60

Job = tuple[Region, ...]


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def make_small(patch: pytest.MonkeyPatch) -> None:
    for module in (data_file, segment_memory):
        patch.setattr(module, "SEGMENT_BYTES", SMALL)
    patch.setattr(data_file, "_DRAINED_BYTES", LIMIT)
    patch.setattr(data_file, "_FILLED_BYTES", 0)


def content_of(size: int, regions: Sequence[Region]) -> bytes:
    """What a file should hold: noise in its regions, zeros between them."""
    noise = np.random.default_rng(size).integers(1, 256, size, np.uint8)
    content = np.zeros(size, np.uint8)
    for region in regions:
        content[region.offset : region.end] = noise[region.offset : region.end]
    return content.tobytes()


def run_job(data: DataFile, content: bytes, job: Job, delay: float) -> None:
    expected = np.frombuffer(content, np.uint8)
    time.sleep(delay)
    with data.fill(*job) as filling:
        for region in job:
            covered = 0
            for first, last, out in filling.rows(region):
                assert first == covered < last <= region.rows
                covered = last
                for row in range(first, last):
                    start = region.offset + row * region.stride
                    out[row - first] = expected[start : start + region.length]
            assert covered == region.rows


def write_file(
    path: Path,
    size: int,
    regions: Sequence[Region],
    jobs: Sequence[Job],
    threads: int,
    delays: Iterable[float] = (),
) -> None:
    """Begins jobs in the file's order, each after its delay, and checks what they wrote."""
    jobs = sorted(jobs, key=lambda job: job[0].offset)
    late = dict(zip(jobs, delays, strict=False))
    content = content_of(size, regions)
    digests: list[str] = []

    def write() -> None:
        with DataFile(path, size, regions, threads=threads) as data:
            data.run(partial(run_job, data, content, job, late.get(job, 0)) for job in jobs)
            digests.append(data.sha256())

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(TIMEOUT_S)
    assert not writer.is_alive(), "jobs wait for each other"
    assert digests == [hashlib.sha256(content).hexdigest()]
    assert path.read_bytes() == content


def pieces(region: Region, cuts: Sequence[int]) -> Iterator[Region]:
    bounds = sorted({0, region.length, *(cut % (region.length + 1) for cut in cuts)})
    for start, stop in pairwise(bounds):
        yield Region(region.offset + start, stop - start)


def panels(region: Region, columns: int, cuts: Sequence[int]) -> Iterator[Region]:
    """Column ranges of a matrix that fills the region."""
    rows = region.length // columns
    row = Region(0, columns)
    for part in pieces(row, cuts):
        yield Region(region.offset + part.offset, part.length, rows, columns)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[Region], list[Job]]:
    """A file's tensors, each cut into jobs: ranges, panels, or ranges of two tensors at once."""
    regions: list[Region] = []
    jobs: list[Job] = []
    end = 0
    cuts = st.lists(st.integers(0, 1 << 20), max_size=6)
    for _ in range(draw(st.integers(1, 6))):
        end += draw(st.sampled_from((0, 1, 64, 5000, 3 * SMALL)))
        match draw(st.sampled_from(("range", "panels", "pair"))):
            case "range":
                region = Region(end, draw(st.integers(1, 10 * SMALL)))
                jobs += [(part,) for part in pieces(region, draw(cuts))]
            case "panels":
                columns = draw(st.integers(1, 3 * SMALL))
                rows = draw(st.integers(1, max(1, 12 * SMALL // columns // 8)))
                region = Region(end, rows * columns)
                jobs += [(part,) for part in panels(region, columns, draw(cuts))]
            case _:
                region = Region(end, draw(st.integers(64, 6 * SMALL)))
                regions.append(region)
                behind = Region(region.end, draw(st.integers(64, 4 * SMALL)))
                at = sorted({0, 64, *(cut % 64 for cut in draw(cuts))})
                for a, b in pairwise(at):
                    job = [_share(region, a, b), _share(behind, a, b)]
                    jobs.append(tuple(part for part in job if part.length))
                region = behind
        regions.append(region)
        end = region.end
    return end + draw(st.sampled_from((0, 1, 4096))), regions, [job for job in jobs if job]


def _share(region: Region, first: int, last: int) -> Region:
    start, stop = (region.length * part // 64 for part in (first, last))
    return Region(region.offset + start, stop - start)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.randoms(use_true_random=False), st.integers(1, 4))
def test_jobs_of_any_size_that_end_in_any_order_never_wait_for_ever(
    layout: tuple[int, list[Region], list[Job]], chance: random.Random, threads: int
) -> None:
    size, regions, jobs = layout
    delays = chance.choices((0, 0, 0, 0.002, 0.01), k=len(jobs))
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        make_small(patch)
        write_file(Path(folder) / "data", size, regions, jobs, threads, delays)


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, small_segments: None, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    held: set[int] = set()
    most = 0

    def opened(memory: SegmentMemory, index: int, original: Callable[..., object]) -> object:
        nonlocal most
        held.add(index)
        most = max(most, len(held))
        return original(memory, index)

    def closed(memory: SegmentMemory, index: int, original: Callable[..., object]) -> object:
        held.remove(index)
        return original(memory, index)

    for name, watch in (("open", opened), ("close", closed)):
        original = getattr(SegmentMemory, name)
        monkeypatch.setattr(
            SegmentMemory, name, lambda memory, index, o=original, w=watch: w(memory, index, o)
        )
    region = Region(0, 100 * SMALL + 17)
    jobs = [(part,) for part in pieces(region, range(0, region.length, SMALL // 3))]
    write_file(tmp_path / "data", region.length, [region], jobs, threads)
    # Who lacks bytes in the first segment takes what it needs, here two segments at most.
    assert 0 < most <= LIMIT // SMALL + 2 * threads
    assert not held


def test_rows_that_lie_in_two_places_of_memory(tmp_path: Path, small_segments: None) -> None:
    # The first segment stays open, so that those of the matrix cannot all lie side by side.
    first, matrix = Region(0, SMALL // 2), Region(SMALL, 4 * SMALL)
    jobs = [*((part,) for part in panels(matrix, 1000, [300, 700])), (first,)]
    matrix = Region(SMALL, 4 * SMALL // 1000 * 1000)
    write_file(tmp_path / "data", 5 * SMALL, [first, matrix], jobs, 1)


def test_a_file_of_nothing(tmp_path: Path) -> None:
    write_file(tmp_path / "data", 0, [], [], 1)


def test_an_array_of_a_region(tmp_path: Path) -> None:
    region = Region(64, 24)
    with DataFile(tmp_path / "data", 100, [region], threads=1) as data:
        with data.fill(region) as filling:
            filling.array(region, (2, 3), np.dtype(np.int32))[:] = [[1, 2, 3], [4, 5, 6]]
        data.sha256()
    assert np.fromfile(tmp_path / "data", np.int32, offset=64, count=6).tolist() == [*range(1, 7)]


def test_an_error_while_writing_does_not_hang(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="boom"),
        DataFile(tmp_path / "data", 10 << 20, [Region(0, 10 << 20)], threads=1),
    ):
        raise RuntimeError("boom")


def test_a_job_that_fails_ends_those_that_wait_for_memory(
    tmp_path: Path, small_segments: None
) -> None:
    region = Region(0, 40 * SMALL)
    parts = list(pieces(region, range(0, region.length, SMALL)))

    def job(data: DataFile, part: Region) -> None:
        if part.offset == 0:
            time.sleep(0.05)  # until the others wait
            raise RuntimeError("boom")
        data.write(part.offset, np.ones(part.length, np.uint8))

    with (
        pytest.raises(RuntimeError, match="boom"),
        DataFile(tmp_path / "data", region.length, [region], threads=4) as data,
    ):
        data.run(partial(job, data, part) for part in parts)


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="written by other means here")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_what_the_disk_refuses_is_raised_where_the_file_is_filled(
    tmp_path: Path, small_segments: None, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    region = Region(0, 100 * SMALL)
    original = os.pwrite

    def pwrite(descriptor: int, block: memoryview, offset: int) -> int:
        if offset >= 10 * SMALL:
            raise OSError(code, os.strerror(code))
        return original(descriptor, block, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with (
        pytest.raises(OSError) as raised,
        DataFile(tmp_path / "data", region.length, [region], threads=2) as data,
    ):
        for part in pieces(region, range(0, region.length, SMALL)):
            data.write(part.offset, np.ones(part.length, np.uint8))
        data.sha256()
    assert raised.value.errno == code


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        DataFile(tmp_path / "data", 1, [Region(0, 1)], threads=1)
    assert (tmp_path / "data").read_bytes() == b"precious"
