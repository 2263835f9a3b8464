"""The reference: a checkpoint's tokenizer as transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from phiconv.errors import CheckpointError
from phiconv.parity.golden import Message
from phiconv.resources import importing_alone


class HuggingFaceTokenizer:
    """transformers' `AutoTokenizer` on a folder; no code in the folder is ever run.

    Args:
        path: Folder with the tokenizer's files.

    Raises:
        CheckpointError: transformers cannot load a fast tokenizer from it.
    """

    def __init__(self, path: Path):
        self._where = str(path)
        try:
            with importing_alone():  # it imports the tokenizer's class only when it is asked for
                from transformers import AutoTokenizer

                self._tokenizer: Any = AutoTokenizer.from_pretrained(
                    self._where, trust_remote_code=False, local_files_only=True
                )
        except Exception as error:  # tokenizers raises nothing narrower on a broken tokenizer.json
            raise CheckpointError(
                f"transformers cannot load the tokenizer: {error}",
                where=self._where,
                remedy="download or copy the checkpoint's tokenizer files again",
            ) from error
        if not getattr(self._tokenizer, "is_fast", False):
            raise CheckpointError(
                "the tokenizer is not a fast tokenizer",
                where=self._where,
                remedy="save it with transformers' save_pretrained so that tokenizer.json exists",
            )

    @cached_property
    def document(self) -> dict[str, Any]:
        """tokenizer.json as transformers would write it: what it made of the folder's files."""
        document: dict[str, Any] = json.loads(self._tokenizer.backend_tokenizer.to_str())
        return document

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how a conversation is written."""
        return bool(self._tokenizer.chat_template)

    @property
    def chat_template(self) -> str:
        """The template that is used by default; empty without one."""
        template = self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return str(template or "")

    @property
    def special_token_ids(self) -> Mapping[str, int | None]:
        """`bos`, `eos` and `pad`, of those that the tokenizer has."""
        return {
            name: getattr(self._tokenizer, f"{name}_token_id", None)
            for name in ("bos", "eos", "pad")
        }

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without tokens that the text does not hold, as chat prompts are."""
        if not texts:
            return []
        # not verbose: a text longer than the context is no mistake here
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out, as runtimes print it."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The vocabulary's entries of ids, as they are stored."""
        entries = self._tokenizer.convert_ids_to_tokens(list(ids))
        return tuple("?" if entry is None else str(entry) for entry in entries)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str | None:
        """The conversation as text; None when the template refuses it."""
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except TemplateError:
            return None
