"""What the lint looks at: an artifact's files and the checkpoint's, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phiconv.checkpoint.json_object import read_json_object
from phiconv.errors import CheckpointError

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint
    from phiconv.parity.hugging_face import HuggingFaceTokenizer

Provider = Literal["cpu", "cuda", "dml"]

GENAI_CONFIG = "genai_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Subject:
    """An artifact beside the checkpoint it was made from.

    Attributes:
        artifact: Folder of the artifact.
        config: genai_config.json.
        checkpoint: The opened checkpoint.
        reference: Its tokenizer.
        provider: What the recipe builds for; None when nobody knows.
    """

    artifact: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    reference: HuggingFaceTokenizer
    provider: Provider | None

    def get(self, key: str) -> Any:
        """The value under a dotted key of genai_config.json, None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @cached_property
    def generation(self) -> Mapping[str, Any]:
        """The checkpoint's generation_config.json, {} without one.

        Raises:
            CheckpointError: It is not a JSON object.
        """
        if GENERATION_CONFIG not in self.checkpoint.files:
            return {}
        return read_json_object(self.checkpoint.path / GENERATION_CONFIG)

    @cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        """The artifact's tokenizer.json, {} when it cannot be read."""
        return self._read(TOKENIZER)

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """The artifact's tokenizer_config.json, {} when it cannot be read."""
        return self._read(TOKENIZER_CONFIG)

    def _read(self, name: str) -> Mapping[str, Any]:
        try:
            return read_json_object(self.artifact / name)
        except CheckpointError:
            return {}
