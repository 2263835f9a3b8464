from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

import phiconv
from phiconv.parity.golden import conversations, golden_texts

TEXTS = golden_texts()

COVERED: dict[str, Callable[[str], bool]] = {
    "empty": lambda text: not text,
    "leading space": lambda text: text.startswith(" "),
    "trailing space": lambda text: text.endswith(" "),
    "tab": lambda text: "\t" in text,
    "CRLF": lambda text: "\r\n" in text,
    "not NFC": lambda text: not unicodedata.is_normalized("NFC", text),
    "not NFD": lambda text: not unicodedata.is_normalized("NFD", text),
    "CJK": lambda text: "\u4f60" in text,
    "Hangul": lambda text: "\uc548" in text,
    "right to left": lambda text: any(unicodedata.bidirectional(c) in ("R", "AL") for c in text),
    "emoji with ZWJ": lambda text: "\U0001f468\u200d" in text,
    "zero width": lambda text: "\u200b" in text,
    "control character": lambda text: "\x1b" in text,
    "NUL": lambda text: "\0" in text,
    "replacement character": lambda text: "\ufffd" in text,
    "beyond the BMP": lambda text: any(ord(c) > 0xFFFF for c in text),
    "very long word": lambda text: any(len(word) >= 1000 for word in text.split()),
    "URL": lambda text: "https://" in text,
    "markdown": lambda text: "```" in text,
    "code": lambda text: "def " in text,
    "number": lambda text: "1,234" in text,
    "chat turn": lambda text: text.startswith("<|user|>\n") and "<|end|>\n<|assistant|>" in text,
    "special token in text": lambda text: "a<|end|>b" in text,
}


@pytest.mark.parametrize("kind", COVERED)
def test_covers(kind: str) -> None:
    assert any(COVERED[kind](item.text) for item in TEXTS)


def test_has_enough_texts_with_unique_names_and_contents() -> None:
    assert len(TEXTS) >= 200
    assert len({item.name for item in TEXTS}) == len(TEXTS)
    assert len({item.text for item in TEXTS}) == len(TEXTS)
    assert len({item.category for item in TEXTS}) > 15


def test_texts_are_unicode_text() -> None:
    for item in TEXTS:
        assert item.text.encode("utf-8").decode("utf-8") == item.text


def test_file_shows_invisible_characters() -> None:
    file = Path(phiconv.__file__).parent / "data" / "golden_texts.json"
    assert file.read_bytes().isascii()


def test_conversations_end_in_every_role() -> None:
    last = {conversation.messages[-1]["role"] for conversation in conversations()}
    assert last == {"system", "user", "assistant"}
    assert max(len(conversation.messages) for conversation in conversations()) > 3
