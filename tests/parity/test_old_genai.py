"""GenAI 0.14, the newest for DirectML, whose Tokenizer takes a model and no folder."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from phiconv.parity.genai import GenAITokenizer


class Config:
    def __init__(self, folder: str) -> None:
        self.folder, self.cleared = folder, False

    def clear_providers(self) -> None:
        self.cleared = True


class Model:
    def __init__(self, config: Config) -> None:
        assert config.cleared, "the provider of the artifact may be missing"
        self.folder = config.folder


class Tokenizer:
    def __init__(self, model: object) -> None:
        if not isinstance(model, Model):
            raise TypeError("__init__(): incompatible constructor arguments")
        self.folder = model.folder

    def encode(self, text: str) -> list[int]:
        return [len(text), len(self.folder)]


def test_the_tokenizer_comes_from_the_model_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = SimpleNamespace(Config=Config, Model=Model, Tokenizer=Tokenizer)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", old)
    assert GenAITokenizer(tmp_path).encode("abc") == [3, len(str(tmp_path))]
