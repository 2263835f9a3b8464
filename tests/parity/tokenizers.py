"""Small tokenizers that work like those of the published Phi-3 and Phi-4 models.

The merges are trained on the packaged texts when the tests run; what matters is the pipeline
around them: normalizer, pre-tokenizer, decoder and the flags of the added tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from phiconv.tokens import read_texts

KINDS = ("phi-3", "phi-4", "phi-4-mini")

_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_VOCABULARY = 1200
_TEXTS = 10
_PHI3_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_PHI4_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>")


def write_tokenizer_pair(kind: str, folder: Path) -> tuple[Path, Path]:
    """Writes a checkpoint's tokenizer files and, from transformers, an artifact's."""
    from transformers import AutoTokenizer

    checkpoint, artifact = folder / "checkpoint", folder / "artifact"
    checkpoint.mkdir(parents=True)
    artifact.mkdir()
    document = {"phi-3": _phi3, "phi-4": _phi4, "phi-4-mini": _phi4_mini}[kind]()
    _write(checkpoint / "tokenizer.json", document)
    eos = "<|endoftext|>"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos}
    _write(checkpoint / "tokenizer_config.json", config)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(artifact)
    ids = {token["content"]: token["id"] for token in document["added_tokens"]}
    model = {
        "type": "phi3",
        "context_length": 512,
        "vocab_size": _VOCABULARY + 300,
        "eos_token_id": ids[eos],
        "pad_token_id": ids[eos],
        "decoder": {"filename": "model.onnx"},
    }
    _write(artifact / "genai_config.json", {"model": model, "search": {}})
    return checkpoint, artifact


def _phi3() -> dict[str, Any]:
    """SentencePiece as tokenizer.json: spaces are U+2581, bytes fall back, nothing pre-splits."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    document = _trained(tokenizer, special_tokens=first)
    document["pre_tokenizer"] = None
    first_tokens = [_added(index, name, False) for index, name in enumerate(first[:3])]
    document["added_tokens"] = first_tokens + _appended(document, _PHI3_TOKENS, rstrip=True)
    return document


def _phi4() -> dict[str, Any]:
    """GPT-4's pattern; control tokens take the white space on both sides."""
    document = _byte_level(_GPT4)
    document["added_tokens"] = _appended(document, _PHI4_TOKENS, rstrip=True, lstrip=True)
    return document


def _phi4_mini() -> dict[str, Any]:
    """GPT-4o's pattern, in which words may hold combining marks."""
    document = _byte_level(_GPT4O)
    document["added_tokens"] = _appended(document, _PHI3_TOKENS, rstrip=True)
    return document


def _byte_level(pattern: str) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _trained(tokenizer: Tokenizer, **options: Any) -> dict[str, Any]:
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, show_progress=False, **options)
    texts = [text.text for text in read_texts("default", packaged="validation")[:_TEXTS]]
    # what English text does not hold, and a merge of GPT-4's contraction with what follows
    texts.append("\u2581a  1 2 \u00b2. 'there 's\u0301 \u0301's  \u0085 " * 20)
    tokenizer.train_from_iterator(texts, trainer)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


def _appended(document: dict[str, Any], names: tuple[str, ...], **flags: bool) -> list[Any]:
    size = len(document["model"]["vocab"])
    return [
        _added(size + index, name, flags["rstrip"] and name != _PHI3_TOKENS[0], flags.get("lstrip"))
        for index, name in enumerate(names)
    ]


def _added(token: int, content: str, rstrip: bool, lstrip: bool | None = None) -> dict[str, Any]:
    flags = {"single_word": False, "normalized": False, "special": True}
    return {"id": token, "content": content, "lstrip": bool(lstrip), "rstrip": rstrip, **flags}


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
