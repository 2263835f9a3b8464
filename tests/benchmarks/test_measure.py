from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.measure import CommandFailedError, Usage, middle, run, total

PROGRAM = """
import subprocess, sys
from pathlib import Path
block = bytearray(32 << 20)
Path(sys.argv[1]).write_bytes(bytes(3 << 20))
subprocess.run([sys.executable, "-c", "import sys; open(sys.argv[1], 'rb').read()", sys.argv[1]])
print("done")
"""


def test_accounts_for_a_process_and_its_children(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    usage = run(command, log=tmp_path / "log")
    assert (tmp_path / "log").read_text() == "done\n"
    assert usage.wall > 0
    assert usage.cpu > 0
    assert usage.peak_rss > 32 << 20
    if sys.platform == "linux":
        assert usage.read is not None and usage.written is not None
        assert usage.read > 3 << 20
        assert 3 << 20 <= usage.written < 4 << 20
    else:
        assert usage.read is None


def test_a_failure_shows_what_the_command_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(4)"]
    with pytest.raises(CommandFailedError, match=r"(?s)exited with 4.*no such model"):
        run(command, log=tmp_path / "log")
    assert run(command, log=tmp_path / "log", expected=(0, 4)).wall > 0


def test_usages_are_added_and_their_median_taken() -> None:
    usages = [Usage(1, 2, 30, 4, 5), Usage(3, 5, 10, 6, None), Usage(8, 9, 20, 1, 2)]
    assert total(usages) == Usage(12, 16, 30, 11, None)
    assert middle(usages) == Usage(3, 5, 20, 4, None)
