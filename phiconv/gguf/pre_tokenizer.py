"""Which of llama.cpp's pre-tokenizers cuts text into words as a byte-level tokenizer.json does.

llama.cpp has no regular expressions in its files: `tokenizer.ggml.pre` names one that is compiled
in. It is chosen here by what tokenizer.json says, not by the tokens of a sample text, so that a
tokenizer nobody has listed works as soon as its expression is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phiconv.errors import CheckpointError
from phiconv.gguf.tokenizer_file import TokenizerFile

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K_POSSESSIVE = (  # tiktoken's spelling of the same
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: Mapping[str, str] = {
    _GPT2: "gpt-2",
    _CL100K: "dbrx",
    _CL100K_POSSESSIVE: "dbrx",
    _QWEN2: "qwen2",
    _O200K: "gpt-4o",
}
"""Expression -> `tokenizer.ggml.pre`."""
_TAKING_WHOLE_WORDS = {"dbrx": "llama-bpe"}
"""The same expression, and words that are entries are taken without looking at merges."""

_MERGES_FIRST = "words that are entries are taken whole, but llama.cpp merges their characters"


def pre_tokenizer(file: TokenizerFile) -> tuple[str, tuple[str, ...]]:
    """The value of `tokenizer.ggml.pre`, and what llama.cpp does otherwise than tokenizer.json.

    Raises:
        CheckpointError: llama.cpp has none that is known to do the same.
    """
    if file.normalizer is not None:
        raise _unknown(file, f"the normalizer {file.normalizer.get('type')}")
    expression = _expression(file)
    name = PRE_TOKENIZERS.get(expression)
    if name is None:
        raise _unknown(file, f"the pre-tokenizer expression {expression!r}")
    if not file.ignore_merges:
        return name, ()
    whole = _TAKING_WHOLE_WORDS.get(name)
    return (whole, ()) if whole else (name, (_MERGES_FIRST,))


def _expression(file: TokenizerFile) -> str:
    section = file.pre_tokenizer or {}
    steps = section.get("pretokenizers", [section])
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        raise _unknown(file, f"the pre-tokenizer {byte_level}")
    if len(steps) == 1 and byte_level.get("use_regex", True):
        return _GPT2
    if len(steps) == 2 and not byte_level.get("use_regex", True) and _is_cut(steps[0]):
        return str(steps[0]["pattern"]["Regex"])
    raise _unknown(file, f"the pre-tokenizer steps {[step.get('type') for step in steps]}")


def _is_cut(step: Mapping[str, Any]) -> bool:
    """Whether a step makes every match of its expression a word; there are two ways to say it."""
    ways = (("Isolated", False), ("Removed", True))
    is_expression = "Regex" in step.get("pattern", {})
    way = (step.get("behavior"), bool(step.get("invert")))
    return step.get("type") == "Split" and is_expression and way in ways


def _unknown(file: TokenizerFile, what: str) -> CheckpointError:
    known = ", ".join(sorted(set(PRE_TOKENIZERS.values())))
    return CheckpointError(
        f"llama.cpp is not known to have {what}",
        where=file.where,
        remedy="use the tokenizer that belongs to this checkpoint; known are the pre-tokenizers "
        f"that llama.cpp calls {known}",
    )
