"""A small tokenizer.json such as conversion from a SentencePiece model gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, trainers

from phiconv.parity.golden import golden_texts

SPACE = "\u2581"
CONTROL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")


def sentencepiece_document(entries: int = 400) -> dict[str, Any]:
    """Specials, bytes, entries in the order they were found, characters; ids in that order.

    As in Llama's vocabulary, which Phi-3 took over, runs of spaces stand among the entries but
    merge last, and every way to cut an entry in two is a merge.
    """
    found, characters = _trained(entries)
    runs = [SPACE * length for length in (2, 4, 8, 5, 6, 3, 7)]
    pieces = [runs[0], *found[:40], *runs[1:], *found[40:], *characters]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {text: token for token, text in enumerate(texts)}
    document = json.loads(Tokenizer(models.BPE(byte_fallback=True)).to_str())
    document["model"] |= {
        "unk_token": "<unk>",
        "fuse_unk": True,
        "vocab": vocabulary,
        "merges": _merges({text: vocabulary[text] for text in pieces}, set(runs)),
    }
    added = {"<unk>": 0, "<s>": 1, "</s>": 2}
    added |= {text: len(texts) + index for index, text in enumerate(CONTROL)}
    document["added_tokens"] = [_added(text, token) for text, token in added.items()]
    document["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ],
    }
    document["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return document


def write_sentencepiece_tokenizer(folder: Path, document: dict[str, Any]) -> None:
    """Puts the tokenizer into a checkpoint's folder."""
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _trained(entries: int) -> tuple[list[str], list[str]]:
    """Entries in the order byte-pair encoding finds them in the golden texts, and characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    trainer = trainers.BpeTrainer(vocab_size=entries, show_progress=False, limit_alphabet=120)
    plain = ("plain", "code", "chat", "url", "markdown", "contraction")
    texts = [item.text for item in golden_texts() if item.category in plain]
    # a merge across words would join what SentencePiece keeps apart
    words = [part for text in texts for part in text.replace(" ", f" {SPACE}").split(" ") if part]
    tokenizer.train_from_iterator(words, trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    characters = [text for text, _ in vocabulary if len(text) == 1]
    found = [text for text, _ in vocabulary if len(text) > 1 and set(text) != {SPACE}]
    parts = {SPACE, *characters}
    kept = []
    for text in found:
        if any(text[:cut] in parts and text[cut:] in parts for cut in range(1, len(text))):
            kept.append(text)
            parts.add(text)
    return kept, sorted(parts - set(kept))


def _merges(vocabulary: dict[str, int], last: set[str]) -> list[tuple[str, str]]:
    pairs = [
        (text[:cut], text[cut:])
        for text in vocabulary
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]

    def place(pair: tuple[str, str]) -> tuple[bool, int, int, int]:
        made = pair[0] + pair[1]
        return made in last, vocabulary[made], len(pair[0]), len(pair[1])

    return sorted(pairs, key=place)


def _added(text: str, token: int) -> dict[str, Any]:
    return {
        "id": token,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": text not in ("<unk>", "<s>", "<|endoftext|>"),
        "normalized": False,
        "special": text != "</s>",
    }
