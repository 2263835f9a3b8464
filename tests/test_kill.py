"""Killed at any moment: the next build succeeds and nothing broken is ever left standing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phiconv.workspace.entry import sha256_file
from tests.toy_stages import Bench, assert_whole

ROOT = Path(__file__).parent.parent
SMALL, LARGE = 1 << 20, 16 << 20
"""Sizes of the artifact's parts in bytes."""

if sys.platform == "win32":
    # Windows ends processes by Ctrl+Break, which goes to a whole group of them.
    STOPS = [(signal.CTRL_BREAK_EVENT, 143, "terminated")]
    OF_ITS_OWN: dict[str, Any] = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
else:
    STOPS = [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    OF_ITS_OWN = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}


def start(
    bench: Bench, part_bytes: int, *options: str, pause: float = 0.03
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.toy_cli", str(pause), str(part_bytes)),
            *("build", str(bench.recipe())),
            *("--model", str(bench.checkpoint), "--out", str(bench.out), *options),
        ],
        cwd=ROOT,
        env={**os.environ, "PHICONV_HOME": str(bench.workspace.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **OF_ITS_OWN,
    )


def assert_no_broken_hit(bench: Bench) -> None:
    """Every entry that would be a hit holds exactly the bytes that were published.

    One whose artifact was in an output that a killed build was just replacing is a miss, until
    the next build there gives the artifact back.
    """
    for entry in bench.workspace.entries():
        found = bench.workspace.lookup(entry.kind, entry.key)
        assert found is not None or entry.is_lent
        for name, stamp in found.files.items() if found else ():
            assert sha256_file(found.path / name) == stamp.sha256


def start_tiny_phi3(bench: Bench, *options: str) -> subprocess.Popen[str]:
    """The shipped int4 recipe on the bundled checkpoint."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "phiconv", "build", "recipes/int4-cpu.yaml"),
            *("--model", "examples/tiny-phi3", "--out", str(bench.out), *options),
        ],
        cwd=ROOT,
        env={**os.environ, "PHICONV_HOME": str(bench.workspace.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_builds(
    bench: Bench, kills: int, seed: int, start: Callable[..., subprocess.Popen[str]]
) -> None:
    moments = random.Random(seed)
    began = time.monotonic()
    first = start(bench)
    _, errors = first.communicate()
    assert first.returncode == 0, errors
    duration = time.monotonic() - began
    for kill in range(kills):
        # Every build has all to do, and other bytes than the one before to publish.
        process = start(bench, "--rebuild", "--set", f"int4.bits={4 + 4 * (kill % 2)}")
        time.sleep(moments.uniform(0.2, 1.1) * duration)
        process.kill()
        process.communicate()
        assert_whole(bench.out)
        assert_no_broken_hit(bench)
    process = start(bench)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert (bench.out / "manifest.json").is_file()
    assert_whole(bench.out)
    assert_no_broken_hit(bench)
    assert list(bench.workspace.sessions.iterdir()) == []
    assert {path.name for path in bench.out.iterdir()} == {"artifact", "report", "manifest.json"}


def test_three_kills(bench: Bench) -> None:
    kill_builds(bench, 3, 1, lambda bench, *options: start(bench, SMALL, *options))


@pytest.mark.slow
def test_twenty_kills(bench: Bench) -> None:
    kill_builds(bench, 20, 2, lambda bench, *options: start(bench, LARGE, *options))


@pytest.mark.slow
def test_twenty_kills_of_a_real_build(bench: Bench) -> None:
    kill_builds(bench, 20, 3, start_tiny_phi3)


@pytest.mark.parametrize(("number", "code", "word"), STOPS)
def test_a_signal_ends_a_build_with_one_line_and_no_leftovers(
    bench: Bench, number: signal.Signals, code: int, word: str
) -> None:
    process = start(bench, SMALL, pause=30)
    assert process.stderr is not None
    for line in process.stderr:
        if "int4.onnx" in line:
            break
    try:
        process.send_signal(number)
    except OSError:
        process.kill()
        process.communicate()
        pytest.skip("Ctrl+Break needs a console")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    kept = "finished stages are kept; 'int4.onnx' begins again in the next build"
    assert errors.splitlines()[-1] == f"{word}; {kept}"
    assert "Traceback" not in errors
    assert out == ""
    assert list(bench.workspace.sessions.iterdir()) == []
    assert {entry.step for entry in bench.workspace.entries()} == {"onnx", "int4"}
    assert not (bench.out / "artifact").exists()
