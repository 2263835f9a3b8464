from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from phiconv.data_file import DataFile, Region


def test_digest_of_a_file_filled_in_random_order_by_threads(tmp_path: Path) -> None:
    regions = {
        "0": Region(0, 3_000_001),
        "1": Region(3_000_064, 17),
        "2": Region(3_000_128, 9_000_000),
        "3": Region(12_000_128, 64),
    }
    content = {
        name: np.random.default_rng(int(name)).bytes(r.length) for name, r in regions.items()
    }
    pieces = [
        (region.offset + at, content[name][at : at + 700_000])
        for name, region in regions.items()
        for at in range(0, region.length, 700_000)
    ]
    random.Random(0).shuffle(pieces)
    path = tmp_path / "data"
    with DataFile(path, regions) as data:

        def fill(part: list[tuple[int, bytes]]) -> None:
            for offset, piece in part:
                data.write(offset, np.frombuffer(piece, np.uint8))
                data.complete(offset, offset + len(piece))

        threads = [threading.Thread(target=fill, args=(pieces[i::3],)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        digest = data.sha256()
    written = path.read_bytes()
    assert len(written) == data.size
    assert digest == hashlib.sha256(written).hexdigest()
    for name, region in regions.items():
        assert written[region.offset : region.end] == content[name]


def test_an_error_while_writing_does_not_hang(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="boom"),
        DataFile(tmp_path / "data", {"a": Region(0, 10 << 20)}),
    ):
        raise RuntimeError("boom")


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        DataFile(tmp_path / "data", {"a": Region(0, 1)})
    assert (tmp_path / "data").read_bytes() == b"precious"
