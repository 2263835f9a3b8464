"""A GGUF vocabulary made from tokenizer.json: texts, types, scores or merges.

Two kinds, which llama.cpp calls by their first models: `gpt2`, byte-level byte-pair encoding
(Phi-4, Phi-4-mini), and `llama`, byte-pair encoding as SentencePiece has it (Phi-3, Phi-3.5).
tokenizer.model is not needed, which transformers 5 no longer writes: what it says stands in
tokenizer.json, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from phiconv.errors import CheckpointError
from phiconv.gguf.pre_tokenizer import pre_tokenizer
from phiconv.gguf.tokenizer_file import AddedToken, TokenizerFile, is_byte

# The scores that llama.cpp's converter gives to tokens that no merge makes.
_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0
# SentencePiece's own for entries put in by hand.
_BEHIND_SCORE = -1e9
_SPACE = "\u2581"

# Where general.name says Phi-3, llama.cpp strips white space after every special token but these
# three; and it does not load a vocabulary that lacks one of the four.
NEVER_STRIPPED = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_LOOKED_UP = NEVER_STRIPPED | {"</s>"}


class TokenType(IntEnum):
    """`llama_token_type` of llama.h."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model as llama.cpp takes them.

    Attributes:
        model: `tokenizer.ggml.model`.
        pre: `tokenizer.ggml.pre`.
        tokens: Text of every id, padded to the rows of the embedding.
        types: Type of every id.
        scores: Score of every id: of two merges SentencePiece makes the one whose result has the
            higher score. Empty for `gpt2`.
        merges: Merges in their order, `"left right"`. Empty for `llama`.
        add_space_prefix: Whether a text is read as if it began with a space; None where llama.cpp
            does not look for it.
        is_stripping: Whether its special tokens swallow the white space after them, which llama.cpp
            does for models called Phi-3 only.
        limits: What tokenizer.json asks for that llama.cpp cannot do, one line each.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    add_space_prefix: bool | None = None
    is_stripping: bool = False
    limits: tuple[str, ...] = ()


def read_vocabulary(file: TokenizerFile, vocab_size: int) -> Vocabulary:
    """Makes the vocabulary of a tokenizer.

    Args:
        file: tokenizer.json.
        vocab_size: Rows of the model's embedding; ids without a text become `[PAD<id>]`.

    Raises:
        CheckpointError: The tokenizer contradicts itself, does not fit the embedding, or does what
            llama.cpp cannot.
    """
    texts = file.texts(vocab_size)
    padding = {token: f"[PAD{token}]" for token in range(vocab_size) if token not in texts}
    if taken := set(padding.values()) & set(texts.values()):
        raise file.fault(f"{min(taken)!r} stands for an unused id and cannot be an entry")
    file.check_merges()
    tokens = tuple(texts.get(token) or padding[token] for token in range(vocab_size))
    stripping, limits = _stripping(file.added)
    if _is_sentencepiece(file):
        prefix, more = _space_prefix(file)
        _check_bytes(file)
        _check_splits(file)
        return Vocabulary(
            model="llama",
            pre="default",
            tokens=tokens,
            types=_types(tokens, padding, file, _sentencepiece_type),
            scores=_scores(tokens, padding, file),
            add_space_prefix=prefix,
            is_stripping=stripping,
            limits=(*limits, *more),
        )
    pre, more = pre_tokenizer(file)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=_types(tokens, padding, file, _byte_level_type),
        merges=tuple(f"{left} {right}" for left, right in file.merges),
        is_stripping=stripping,
        limits=(*limits, *more),
    )


def _types(
    tokens: Sequence[str],
    padding: Mapping[int, str],
    file: TokenizerFile,
    added_type: Callable[[AddedToken], TokenType],
) -> tuple[TokenType, ...]:
    types = [TokenType.NORMAL] * len(tokens)
    if file.byte_fallback:
        for token, text in enumerate(tokens):
            if is_byte(text):
                types[token] = TokenType.BYTE
    for entry in file.added:
        types[entry.id] = added_type(entry)
    for token in padding:
        types[token] = TokenType.UNUSED
    return tuple(types)


def _byte_level_type(token: AddedToken) -> TokenType:
    looks_special = token.content.startswith("<|") and token.content.endswith("|>")
    return TokenType.CONTROL if token.special or looks_special else TokenType.USER_DEFINED


def _sentencepiece_type(token: AddedToken) -> TokenType:
    return TokenType.CONTROL if token.special else TokenType.USER_DEFINED


def _scores(
    tokens: Sequence[str], padding: Mapping[int, str], file: TokenizerFile
) -> tuple[float, ...]:
    """The scores of tokenizer.model, which order its merges.

    SentencePiece numbers its entries in the order it found them and scores them -0, -1, -2, …; its
    merges follow that order. What was put in by hand, runs of spaces, has the lowest score, and its
    merges stand behind all others.
    """
    added = {token.id for token in file.added}
    normal = [
        token for text, token in file.vocabulary.items() if token not in added and not is_byte(text)
    ]
    first = min(normal, default=0)
    score_of = {token: -float(token - first) for token in normal}
    behind = {file.vocabulary.get(_SPACE)}
    seen = first
    for left, right in file.merges:
        token = file.vocabulary[left + right]
        if token < seen:
            behind.add(token)
        seen = max(seen, token)

    def score(token: int) -> float:
        if token in padding:
            return _PADDING_SCORE
        if token in added:
            return _ADDED_SCORE
        return _BEHIND_SCORE if token in behind else score_of.get(token, 0.0)

    return tuple(score(token) for token in range(len(tokens)))


def _is_sentencepiece(file: TokenizerFile) -> bool:
    kinds = {step.get("type") for step in _steps(file.normalizer, "normalizers")}
    kinds |= {step.get("type") for step in _steps(file.pre_tokenizer, "pretokenizers")}
    return "ByteLevel" not in kinds and (file.byte_fallback or bool(kinds & _SPACE_STEPS))


_SPACE_STEPS = {"Prepend", "Replace", "Metaspace"}


def _steps(section: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, without the sequence around them."""
    if section is None:
        return []
    return list(section[name]) if section.get("type") == "Sequence" else [section]


def _space_prefix(file: TokenizerFile) -> tuple[bool, tuple[str, ...]]:
    """Whether a space is put before a text, and what llama.cpp does otherwise about it."""
    steps = _steps(file.normalizer, "normalizers") + _steps(file.pre_tokenizer, "pretokenizers")
    match steps:
        case [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ]:
            return True, ()
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]:
            return False, ()
        case [{"type": "Metaspace", "replacement": "\u2581", **options}]:
            scheme = options.get("prepend_scheme", "always")
            limit = "a space is put before a text, not also after special tokens, as llama.cpp does"
            return scheme != "never", (limit,) if scheme == "first" else ()
    raise CheckpointError(
        f"llama.cpp is not known to treat spaces as {[step.get('type') for step in steps]} do",
        where=file.where,
        remedy="use the tokenizer that belongs to this checkpoint",
    )


def _check_bytes(file: TokenizerFile) -> None:
    missing = [text for text in (f"<0x{b:02X}>" for b in range(256)) if text not in file.vocabulary]
    if missing:
        raise file.fault(f"the byte tokens lack {missing[0]}, and {len(missing)} in all")


def _check_splits(file: TokenizerFile) -> None:
    """SentencePiece makes an entry of any two parts; so must the merges, or texts part ways."""
    merges = set(file.merges)
    added = {token.content for token in file.added}
    parts = {text for text in file.vocabulary if text not in added and not is_byte(text)}
    for text in parts:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair not in merges and pair[0] in parts and pair[1] in parts:
                raise file.fault(f"merges are missing: {pair[0]!r} and {pair[1]!r} make an entry")


def _stripping(added: Iterable[AddedToken]) -> tuple[bool, tuple[str, ...]]:
    """Whether llama.cpp must strip after special tokens, and where it then differs."""
    added = tuple(added)
    contents = {token.content for token in added}
    wanted = {token.content for token in added if token.rstrip}
    can = contents >= _LOOKED_UP
    stripping = bool(wanted - NEVER_STRIPPED) and can
    done = contents - NEVER_STRIPPED if stripping else set()
    limits = [
        f"white space after {text!r} belongs to it, which llama.cpp does not know"
        for text in sorted(wanted - done)
    ]
    limits += [
        f"white space after {text!r} is kept, but llama.cpp strips it"
        for text in sorted(done - wanted)
    ]
    limits += [
        f"white space before {token.content!r} belongs to it, which llama.cpp does not know"
        for token in added
        if token.lstrip
    ]
    return stripping, tuple(limits)
