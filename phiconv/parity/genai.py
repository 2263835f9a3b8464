"""The tokenizer that users run: ONNX Runtime GenAI's, on an artifact's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.parity.golden import Message


def _tokenizer(og: Any, folder: str) -> Any:
    try:
        return og.Tokenizer(folder)
    except TypeError:
        # 0.14, the newest for DirectML, takes it from a model alone: on the CPU, which always is
        config = og.Config(folder)
        config.clear_providers()
        return og.Tokenizer(og.Model(config))


class GenAITokenizer:
    """`onnxruntime_genai.Tokenizer`, which needs none of the folder's weights since 0.18.

    Args:
        folder: The artifact: genai_config.json and the tokenizer's files.

    Raises:
        EnvironmentLacksError: onnxruntime-genai is not installed.
        StageError: It cannot load this folder's tokenizer.
    """

    def __init__(self, folder: Path):
        self._where = str(folder)
        try:
            import onnxruntime_genai as og
        except ImportError as error:
            raise EnvironmentLacksError(
                f"onnxruntime-genai cannot be imported: {error}",
                remedy='pip install "phiconv[cpu]"',
            ) from error
        try:
            self._tokenizer = _tokenizer(og, self._where)
        except RuntimeError as error:
            raise self._failure("cannot load the tokenizer", error) from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            StageError: The runtime refuses the text.
        """
        try:
            return [int(token) for token in self._tokenizer.encode(text)]
        except RuntimeError as error:
            raise self._failure("cannot encode a text", error) from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids at once; special tokens are left out.

        Raises:
            StageError: The runtime refuses the ids, or makes of them what is no text.
        """
        import numpy as np

        try:
            return str(self._tokenizer.decode(np.array(ids, dtype=np.int32)))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise self._failure("cannot decode ids", error) from error

    def stream(self, ids: Sequence[int]) -> str:
        """The text of ids, decoded one by one and joined.

        Raises:
            StageError: As for `decode`.
        """
        stream = self._tokenizer.create_stream()
        try:
            return "".join(stream.decode(token) for token in ids)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise self._failure("cannot stream ids", error) from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as text.

        Raises:
            StageError: There is no template, or it fails.
        """
        text = json.dumps([dict(message) for message in messages], ensure_ascii=False)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    text, add_generation_prompt=add_generation_prompt
                )
            )
        except (RuntimeError, UnicodeDecodeError) as error:
            raise self._failure("cannot apply the chat template", error) from error

    def _failure(self, what: str, error: Exception) -> StageError:
        return StageError(f"ONNX Runtime GenAI {what}: {error}", where=self._where)
