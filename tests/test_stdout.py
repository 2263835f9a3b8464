"""What is printed where stdout has few letters: pipes and files on Windows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "żółw 猫 🙂…"


def printed(program: str, encoding: str, **variables: str) -> bytes:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", **variables},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "utf-8"])
def test_names_are_spelled_out(encoding: str, tmp_path: Path) -> None:
    program = "from phiconv.cli import main; main(['cache', 'ls'])"
    shown = printed(program, encoding, PHICONV_HOME=str(tmp_path / NAME)).decode(encoding)
    assert f"workspace {tmp_path}{os.sep}{escaped(NAME, encoding)}" in shown.splitlines()


def escaped(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "UTF8"])
def test_json_stays_json(encoding: str) -> None:
    program = f"from phiconv.cli.options import print_json; print_json({{'folder': {NAME!r}}})"
    shown = printed(program, encoding)
    assert json.loads(shown.decode("utf-8")) == {"folder": NAME}
    assert shown.isascii() == ("utf" not in encoding.lower())
