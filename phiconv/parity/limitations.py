"""What ONNX Runtime GenAI's tokenizer is known to do otherwise than Hugging Face's.

Every limitation is written as a prediction: the ids, or the text, that the runtime gives instead.
A difference counts as explained only where a prediction reproduces what the runtime gave on that
very string, so a new fault of the runtime is never taken for a known one. Measured on
onnxruntime-genai 0.18.0; the causes were read in onnxruntime-extensions (operators/tokenizer:
bpe_kernels.cc, bpe_tokenizer_model.hpp, bpe_utils.hpp, bpe_streaming.hpp).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from phiconv.parity.hugging_face import HuggingFaceTokenizer

ENCODE_LIMITATIONS: dict[str, str] = {
    "nul_ends_text": "Text ends at U+0000: it is passed as a C string.",
    "strips_ascii_space_only": "A control token with `rstrip` takes only spaces, tabs and line "
    "ends after it, not other white space such as U+00A0; one with `lstrip` takes none before it.",
    "next_line_is_no_space": "U+0085 is not white space to the pre-tokenizer.",
    "mark_prefix": "The pre-tokenizer of Phi-4-mini ends a word's optional first character "
    "before a combining mark, and then does not find the word.",
    "sentencepiece_cuts": "A SentencePiece-like tokenizer (Phi-3, Phi-3.5) has no pre-tokenizer, "
    "but the runtime cuts the text as GPT-4's does, or after a leading space every 101 pieces, "
    "and merges nothing across a cut.",
}
"""Limitation -> what the runtime does; they change ids."""

DECODE_LIMITATIONS: dict[str, str] = {
    "sentencepiece_space": "With a SentencePiece-like tokenizer the space before the first word "
    "stays, and the one after a control token goes.",
    "nul_ends_text": "Decoded text ends at U+0000; a stream leaves the character out.",
    "noncharacter_is_invalid": "Decoded text ends at U+FFFE or U+FFFF, taken for invalid UTF-8; a "
    "stream leaves the character out.",
    "nothing_is_replacement": "Ids of no text, such as a control token alone, decode to U+FFFD.",
}
"""Limitation -> what the runtime does; they change decoded text."""

# Rust's char::is_whitespace, by which Hugging Face strips beside added tokens.
_UNICODE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_ASCII_SPACE = " \t\r\n"
# The published splitting patterns of GPT-2 and GPT-4 (openai/tiktoken, tiktoken_ext).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNDERLINE = "\u2581"  # SentencePiece's space
# After a leading space the runtime merges runs of pieces: up to the next word once there are more
# than 10, and never more than 101.
_RUN_TO_WORD, _LONGEST_RUN = 11, 101


class RuntimeModel:
    """Predicts the runtime's ids and text from the reference tokenizer and limitations.

    Args:
        reference: The tokenizer that the runtime should agree with.
    """

    def __init__(self, reference: HuggingFaceTokenizer):
        self._reference = reference
        self._document = reference.document
        self._added = self._document.get("added_tokens") or []
        self._special = {token["id"] for token in self._added if token["special"]}

    @cached_property
    def is_sentencepiece(self) -> bool:
        """Whether spaces are U+2581 and nothing splits the text before it is merged."""
        decoder = json.dumps(self._document.get("decoder"), ensure_ascii=False)
        return _UNDERLINE in decoder and self._document.get("pre_tokenizer") is None

    def encode(self, texts: Sequence[str], limitations: Iterable[str]) -> list[list[int]]:
        """Ids [texts, ids] that the runtime gives if it has these limitations and no other."""
        active = set(limitations)
        if "nul_ends_text" in active:
            texts = [text.partition("\0")[0] for text in texts]
        texts = [self._strip(text, "strips_ascii_space_only" in active) for text in texts]
        if "sentencepiece_cuts" in active and self.is_sentencepiece:
            return [self._encode_cut(text) for text in texts]
        tokenizer = self._unstripped
        tokenizer.pre_tokenizer = self._pre_tokenizer(active)
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], limitations: Iterable[str]) -> str:
        """Text that the runtime makes of ids at once."""
        active = set(limitations)
        text = self._joined(ids, active)
        if "nul_ends_text" in active:
            text, nul, _ = text.partition("\0")
            if nul and not text:
                return "\ufffd"
        if "noncharacter_is_invalid" in active:
            text = re.sub("(?s)[\ufffe\uffff].*", "\ufffd", text)
        return text or ("\ufffd" if "nothing_is_replacement" in active else "")

    def stream(self, ids: Sequence[int], limitations: Iterable[str]) -> str:
        """Text that the runtime makes of ids one by one."""
        active = set(limitations)
        text = self._joined(ids, active)
        if "nul_ends_text" in active:
            text = text.replace("\0", "")
        if "noncharacter_is_invalid" in active:
            text = re.sub("[\ufffe\uffff]", "", text)
        return text

    @cached_property
    def _unstripped(self) -> Any:
        """The reference's tokenizer, whose added tokens leave the white space beside them."""
        from tokenizers import Tokenizer

        added = [{**token, "lstrip": False, "rstrip": False} for token in self._added]
        document = {**self._document, "added_tokens": added, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(document))

    @cached_property
    def _strip(self) -> Callable[[str, bool], str]:
        """Takes white space away beside added tokens, as the runtime or as Hugging Face does."""

        def alternatives(side: str) -> str:
            contents = sorted((t["content"] for t in self._added if t[side]), key=len, reverse=True)
            return "|".join(map(re.escape, contents)) or "(?!)"

        right, left = alternatives("rstrip"), alternatives("lstrip")
        runtime = re.compile(f"({right})[{_ASCII_SPACE}]+")
        after = re.compile(f"({right})[{_UNICODE_SPACE}]+")
        before = re.compile(f"[{_UNICODE_SPACE}]+(?={left})")

        def strip(text: str, ascii_only: bool) -> str:
            if ascii_only:
                return runtime.sub(r"\1", text)
            return before.sub("", after.sub(r"\1", text))

        return strip

    def _pre_tokenizer(self, active: set[str]) -> Any:
        """The reference's pre-tokenizer with the runtime's idea of the pattern's parts."""
        stored = self._document.get("pre_tokenizer")
        if stored is None:
            return None
        steps = stored["pretokenizers"] if stored["type"] == "Sequence" else [stored]
        edited: list[dict[str, Any]] = []
        for step in steps:
            if step["type"] == "ByteLevel" and step.get("use_regex"):
                split = {"type": "Split", "behavior": "Isolated", "invert": False}
                edited += [
                    {**split, "pattern": {"Regex": _edited(_GPT2, active)}},
                    {**step, "use_regex": False},
                ]
            elif step["type"] == "Split" and "Regex" in step["pattern"]:
                edited.append(
                    {**step, "pattern": {"Regex": _edited(step["pattern"]["Regex"], active)}}
                )
            else:
                edited.append(step)
        return _parsed_pre_tokenizer({"type": "Sequence", "pretokenizers": edited})

    def _encode_cut(self, text: str) -> list[int]:
        """Ids of a text that is cut where the runtime cuts it before it merges."""
        contents = {token["content"]: token["id"] for token in self._added}
        longest_first = sorted(contents, key=len, reverse=True)
        ids: list[int] = []
        for segment in re.split(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})", text):
            if segment in contents:
                ids.append(contents[segment])
            elif segment:
                cuts = self._runs if segment[0] == " " else self._words
                for piece in cuts(_UNDERLINE + segment):
                    stored = piece.replace(" ", _UNDERLINE)
                    ids += [token.id for token in self._unstripped.model.tokenize(stored)]
        return ids

    def _words(self, text: str) -> list[str]:
        split = {"type": "Split", "behavior": "Isolated", "invert": False}
        pattern = {"Regex": _edited(_GPT4, {"next_line_is_no_space"})}
        splitter = _parsed_pre_tokenizer({**split, "pattern": pattern})
        return [piece for piece, _ in splitter.pre_tokenize_str(text)]

    def _runs(self, text: str) -> list[str]:
        vocabulary = self._document["model"]["vocab"]
        runs, start, count = [], 0, 0
        for index, character in enumerate(text):
            ends_word = character in f" \n\r{_UNDERLINE}" and (
                text[index - 1] not in f" \n\r{_UNDERLINE}"
            )
            if count >= _LONGEST_RUN or (count >= _RUN_TO_WORD and ends_word):
                runs.append(text[start:index])
                start, count = index, 0
            stored = _UNDERLINE if character == " " else character
            count += 1 if stored in vocabulary else len(character.encode())
        return [*runs, text[start:]]

    def _joined(self, ids: Sequence[int], active: set[str]) -> str:
        if "sentencepiece_space" not in active or not self.is_sentencepiece:
            return self._reference.decode(ids)
        text, run, after_special = "", list[int](), False
        for token in [*ids, None]:
            if token is not None and token not in self._special:
                run.append(token)
                continue
            if run:
                first = self._reference.pieces(run[:1])[0]
                keeps_space = first.startswith(_UNDERLINE) and not after_special
                text += " " * keeps_space + self._reference.decode(run)
            run, after_special = [], True
        return text


def _edited(pattern: str, active: set[str]) -> str:
    if "next_line_is_no_space" in active:
        # within brackets, too: a class inside a class is a union
        classes = {r"\s": r"[^\S\x{85}]", r"\S": r"[\S\x{85}]"}
        pattern = re.sub(r"\\[sS]", lambda match: classes[match[0]], pattern)
    if "mark_prefix" in active:
        # possessive: the optional first character is not given back
        pattern = pattern.replace(r"[^\r\n\p{L}\p{N}]?[", r"[^\r\n\p{L}\p{N}]?+[")
    return pattern


def _parsed_pre_tokenizer(stored: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    return Tokenizer.from_str(json.dumps({"model": model, "pre_tokenizer": stored})).pre_tokenizer
