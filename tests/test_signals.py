"""A signal ends a command wherever it comes, with one line and the documented exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phiconv.progress import make_display

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")

PROGRAM = """
import os, signal, sys, threading, time
import phiconv.doctor
from phiconv.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
number = int(sys.argv.pop())

def send():
    os.kill(os.getpid(), number)

{examine}

phiconv.doctor.examine = examine
main()
"""
WHERE_EXCEPTIONS_ARE_DROPPED = """
class Dropped:
    def __del__(self):
        send()
        time.sleep(0.1)

def examine(workspace):
    dropped = Dropped()
    del dropped
    time.sleep(30)
"""
TWICE = """
def examine(workspace):
    try:
        send()
        time.sleep(30)
    finally:
        send()
        time.sleep(30)
"""
BESIDE_A_THREAD_THAT_GOES_ON = """
def examine(workspace):
    threading.Thread(target=time.sleep, args=[30]).start()
    send()
    time.sleep(30)
"""


@pytest.mark.parametrize(
    ("examine", "said"),
    [
        (WHERE_EXCEPTIONS_ARE_DROPPED, "{}; nothing half-made was kept"),
        (TWICE, "stopped at once; the next build removes what is half-made"),
        (BESIDE_A_THREAD_THAT_GOES_ON, "{}; nothing half-made was kept"),
    ],
)
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_a_command(
    examine: str, said: str, number: signal.Signals, code: int, word: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(examine=examine), "doctor", str(int(number))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=25,
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.strip() == said.format(word)
    assert done.stdout == ""


def test_an_ignored_signal_stays_ignored() -> None:
    examine = """
def examine(workspace):
    send()
    return []
"""
    program = PROGRAM.format(examine=examine).replace("default_int_handler", "SIG_IGN")
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor", str(int(signal.SIGINT))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


LINES = """
def examine(workspace):
    import click
    for _ in range(100_000):
        click.echo("a line", err={err})
    return []
"""


@pytest.mark.parametrize("err", [False, True])
def test_a_reader_that_goes_away_ends_a_command_as_sigpipe_does(err: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(examine=LINES.format(err=err)), "doctor", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if err else subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read() if process.stderr else b""
    assert process.wait(60) == 141
    assert said == b""
    if process.stderr:
        process.stderr.close()


def test_a_closed_stderr_stops_nothing() -> None:
    display = make_display(None, quiet=False)
    display.note("nobody hears it")
    display.close()
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec {sys.executable} -m phiconv plan absent.yaml 2>&-"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
