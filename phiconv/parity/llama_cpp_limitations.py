"""What llama.cpp's tokenizer is known to do otherwise than Hugging Face's.

Each limitation is a change to Hugging Face's tokenizer that gives llama.cpp's ids, so that a
difference counts as known only if a limitation predicts it to the last id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phiconv.parity.hugging_face import HuggingFaceTokenizer

ENCODE_LIMITATIONS = {
    "ascii_strip": "after a special token only ASCII white space is stripped, not Unicode's",
    "ascii_case": "in words of Phi-4-mini only A to Z are upper and a to z lower case: any other "
    "letter is both, and a combining mark is no part of a word",
    "merges_first": "a word that is an entry of the vocabulary is reached by merges only",
}

_ASCII_SPACE = "[ \\t\\n\\v\\f\\r]+"
# A letter as the pre-tokenizer that llama.cpp calls gpt-4o sees it.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_UPPER_CLASS, _LOWER_CLASS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


class LlamaCppModel:
    """Predicts llama.cpp's ids.

    Args:
        reference: The checkpoint's tokenizer.
    """

    def __init__(self, reference: HuggingFaceTokenizer):
        self._document = json.dumps(reference.document)
        stripping = [t["content"] for t in reference.document["added_tokens"] if t["rstrip"]]
        names = "|".join(map(re.escape, sorted(stripping, key=len, reverse=True)))
        self._stripped = re.compile(f"({names}){_ASCII_SPACE}") if stripping else None
        self._tokenizer = cache(self._changed)

    def explain(self, text: str, found: list[int]) -> str | None:
        """The limitations that give these ids, joined by ` + `; None when none do."""
        names = tuple(ENCODE_LIMITATIONS)
        for active in (*((name,) for name in names), names):
            if self.encode(text, active) == found:
                return " + ".join(active)
        return None

    def encode(self, text: str, active: Iterable[str]) -> list[int]:
        """Ids of a text with these limitations."""
        active = tuple(active)
        if "ascii_strip" in active and self._stripped is not None:
            text = self._stripped.sub(r"\1", text)
        ids: list[int] = self._tokenizer(active).encode(text, add_special_tokens=False).ids
        return ids

    def _changed(self, active: tuple[str, ...]) -> Any:
        from tokenizers import Tokenizer

        document = json.loads(self._document)
        if "ascii_strip" in active:
            for token in document["added_tokens"]:
                token["rstrip"] = False
        if "merges_first" in active:
            document["model"]["ignore_merges"] = False
        if "ascii_case" in active:
            section = document.get("pre_tokenizer") or {}
            for step in section.get("pretokenizers", [section]):
                pattern = step.get("pattern", {})
                if "Regex" in pattern:
                    upper = pattern["Regex"].replace(_UPPER_CLASS, _UPPER)
                    pattern["Regex"] = upper.replace(_LOWER_CLASS, _LOWER)
        return Tokenizer.from_str(json.dumps(document))
