"""What the card says of running the artifacts works as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

CPU = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"
GGUF = "gguf/Phi-3-mini-4k-instruct-q4.gguf"


@pytest.fixture(scope="module")
def folder(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release somewhere else, with the snippets saved under the names that the card gives."""
    to = tmp_path_factory.mktemp("download") / "release"
    shutil.copytree(released, to)
    card = (to / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"[Ss]ave as `(\w+\.py)`", card)
    for name, text in zip(names, re.findall(r"```python\n(.*?)```", card, re.DOTALL), strict=True):
        (to / name).write_text(text, encoding="utf-8")
    return to


def answer(python: Path | str, folder: Path, *arguments: str) -> str:
    """What a snippet prints; nothing of this environment helps it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-I", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_snippets_answer(folder: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("xllamacpp")
    question = "What does os.path.join do?"
    assert answer(sys.executable, folder, "chat.py", CPU, question)
    assert answer(sys.executable, folder, "llama.py", GGUF, question)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "snippet", "module"),
    [
        ("onnxruntime-genai==0.18.0", "chat.py", "onnxruntime_genai"),
        ("xllamacpp==2026.10.11549", "llama.py", "xllamacpp"),
    ],
)
def test_in_an_environment_that_has_nothing_else(
    folder: Path, tmp_path: Path, package: str, snippet: str, module: str
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    if subprocess.run([*pip, package], capture_output=True, check=False).returncode:
        pytest.skip(f"{package} cannot be installed here")
    listed = answer(python, folder, "-c", f"import {module}, sys; print(*sys.modules)")
    assert not {"torch", "transformers", "phiconv", "gguf"} & set(listed.split())
    assert answer(python, folder, snippet)
