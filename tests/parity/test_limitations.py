"""Each named limitation is real: without it the runtime would agree, with it we know its ids."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from phiconv.parity.golden import golden_texts
from phiconv.parity.hugging_face import HuggingFaceTokenizer
from phiconv.parity.limitations import DECODE_LIMITATIONS, ENCODE_LIMITATIONS
from phiconv.parity.results import Difference
from phiconv.parity.tokenizer import Comparison
from tests.parity.tokenizers import KINDS

Pairs = dict[str, tuple[Path, Path]]

ENCODE_EXAMPLES = [
    ("phi-4", "a\0b", "nul_ends_text"),
    ("phi-4", "<|im_end|>\u00a0a", "strips_ascii_space_only"),
    ("phi-4", "a \n<|im_end|>", "strips_ascii_space_only"),
    ("phi-4-mini", "<|user|>\u3000a", "strips_ascii_space_only"),
    ("phi-4", "a  \u0085b", "next_line_is_no_space"),
    ("phi-4-mini", "2\u0301's", "mark_prefix"),
    ("phi-3", "a  1", "sentencepiece_cuts"),
    ("phi-3", "can'there", "sentencepiece_cuts"),
    ("phi-3", "\u2581a", "sentencepiece_cuts"),
    ("phi-3", " " + "in" * 60, "sentencepiece_cuts"),
]
DECODE_EXAMPLES = [
    ("phi-4", "a\0b", "nul_ends_text"),
    ("phi-4", "a\ufffeb", "noncharacter_is_invalid"),
    ("phi-4", "<|im_end|>", "nothing_is_replacement"),
    ("phi-3", "hello", "sentencepiece_space"),
    ("phi-3", "a<|end|>b", "sentencepiece_space"),
]


def differences(pairs: Pairs, kind: str, texts: list[str]) -> list[Difference]:
    checkpoint, artifact = pairs[kind]
    reference = HuggingFaceTokenizer(checkpoint)
    comparison = Comparison(artifact, reference)
    found: list[Difference] = []
    for text, ids in zip(texts, reference.encode(texts), strict=True):
        found += comparison.encode_differences(text, text, ids)
        found += comparison.decode_differences("decode", text, text, ids)
        found += comparison.decode_differences("stream", text, text, ids)
    return found


@pytest.mark.parametrize(("kind", "text", "limitation"), ENCODE_EXAMPLES)
def test_encode_limitation(kind: str, text: str, limitation: str, tokenizer_pairs: Pairs) -> None:
    found = [d for d in differences(tokenizer_pairs, kind, [text]) if d.operation == "encode"]
    assert [(d.cause, d.severity) for d in found] == [(limitation, "warning")]


@pytest.mark.parametrize(("kind", "text", "limitation"), DECODE_EXAMPLES)
def test_decode_limitation(kind: str, text: str, limitation: str, tokenizer_pairs: Pairs) -> None:
    found = [d for d in differences(tokenizer_pairs, kind, [text]) if d.operation == "decode"]
    assert [(d.cause, d.severity) for d in found] == [(limitation, "warning")]


def test_every_limitation_has_an_example() -> None:
    assert {name for *_, name in ENCODE_EXAMPLES} == set(ENCODE_LIMITATIONS)
    assert {name for *_, name in DECODE_EXAMPLES} == set(DECODE_LIMITATIONS)


def test_several_limitations_of_one_text_are_all_named(tokenizer_pairs: Pairs) -> None:
    text = "<|im_end|>\u00a0a  \u0085b\0x"
    first = differences(tokenizer_pairs, "phi-4", [text])[0]
    assert first.cause == "nul_ends_text + strips_ascii_space_only + next_line_is_no_space"


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_hold_on_random_mixtures(kind: str, tokenizer_pairs: Pairs) -> None:
    rng = random.Random(0)
    pieces = [
        *(item.text for item in golden_texts() if 0 < len(item.text) < 12),
        *(" ", "  ", "\n", "\t", "1", "22", "the", "He", "'s", "'T", "x" * 50, "<|end|>"),
        *("<|im_end|>", "\u00a0", "\u0085", "\0", "\u0301", "\u2581"),
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randint(2, 7))) for _ in range(400)]
    found = differences(tokenizer_pairs, kind, texts)
    assert len(found) > 50
    assert [str(difference) for difference in found if difference.severity == "error"] == []
