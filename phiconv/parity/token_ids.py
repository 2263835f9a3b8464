"""Lint of the special tokens: what ends a turn, what pads, and that control tokens are tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from phiconv.parity.golden import conversations
from phiconv.parity.hugging_face import HuggingFaceTokenizer
from phiconv.parity.results import Finding
from phiconv.parity.subject import GENERATION_CONFIG, TOKENIZER, Subject

_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]+\|>")
_ANSWER = "phiconv-answer"


def token_id_findings(subject: Subject) -> Iterator[Finding]:
    """eos, bos and pad of genai_config.json against the checkpoint's."""
    yield from _eos_findings(subject)
    for name, use in (("pad", "masks as padding"), ("bos", "takes for the beginning")):
        yield from _single_id_findings(subject, name, use)


def added_token_findings(subject: Subject) -> Iterator[Finding]:
    """The added tokens of tokenizer.json against the checkpoint's."""
    if not subject.tokenizer:
        return  # said by the lint of the files
    found = {token.get("id"): token for token in _added(subject.tokenizer)}
    expected = {token["id"]: token for token in _added(subject.reference.document)}
    remedy = f"ship the checkpoint's {TOKENIZER} as it is"
    for token_id, token in expected.items():
        content = token["content"]
        what = f"{TOKENIZER}: added token {content!r} ({token_id})"
        other = found.get(token_id)
        if other is None:
            yield Finding("error", f"{what} is missing", "an added token", "none", remedy)
        elif other.get("content") != content:
            yield Finding("error", what, repr(content), repr(other.get("content")), remedy)
        else:
            for flag in _FLAGS:
                right, wrong = bool(token.get(flag)), bool(other.get(flag))
                if right != wrong:
                    yield Finding("error", f"{what}: {flag}", str(right), str(wrong), remedy)
    for token_id in sorted(set(found) - set(expected), key=str):
        content = found[token_id].get("content")
        what = f"{TOKENIZER}: added token {content!r} ({token_id})"
        yield Finding("error", what, "none, as in the checkpoint", "an added token", remedy)


def control_token_findings(subject: Subject) -> Iterator[Finding]:
    """What the chat template writes as control tokens, in the checkpoint's own tokenizer."""
    if not subject.reference.has_chat_template:
        return
    rendered = (
        subject.reference.render(conversation.messages, True)
        for conversation in conversations()
        if not conversation.name.startswith("control_tokens")
    )
    names = sorted({name for text in rendered if text for name in _CONTROL_TOKEN.findall(text)})
    special = {token["content"] for token in _added(subject.reference.document) if token["special"]}
    for name, ids in zip(names, subject.reference.encode(names), strict=True):
        what = f"the chat template's control token {name!r}"
        remedy = "correct the checkpoint's tokenizer: the model reads and prints it as text"
        if len(ids) != 1:
            yield Finding("warning", what, "one token", f"{len(ids)} tokens", remedy)
        elif name not in special:
            yield Finding("warning", what, "special: true", "special: false", remedy)


def turn_end_id(reference: HuggingFaceTokenizer) -> int | None:
    """The added token that the chat template writes after an assistant's answer, if it does."""
    if not reference.has_chat_template:
        return None
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
    text = reference.render(turns, False)
    if text is None or _ANSWER not in text:
        return None
    added = {token["id"] for token in _added(reference.document)}
    after = reference.encode([text.rpartition(_ANSWER)[2]])[0]
    return next((token for token in after if token in added), None)


def _eos_findings(subject: Subject) -> Iterator[Finding]:
    key = "model.eos_token_id"
    value = subject.get(key)
    found = value if isinstance(value, list) else [value]
    required = _required_eos(subject)
    expected = _named(subject, list(required))
    if not found or not all(type(token) is int for token in found):
        yield Finding("error", key, expected, _shown(value), "name every id that ends a turn")
        return
    for token, source in required.items():
        if token not in found:
            yield Finding(
                "error",
                f"{key} lacks {_named(subject, [token])}, which {source}",
                expected,
                _named(subject, found),
                "add it: generation would run on past the end of a turn",
            )
    config_ids = subject.checkpoint.config.eos_token_ids
    allowed = {*required, *config_ids, subject.reference.special_token_ids["eos"]}
    special = {token["id"] for token in _added(subject.reference.document) if token["special"]}
    for token in found:
        if token not in allowed:
            yield Finding(
                "warning" if token in special else "error",
                f"{key} holds {_named(subject, [token])}, which ends no turn",
                expected,
                _named(subject, found),
                "remove it: generation stops wherever the model writes it",
            )


def _required_eos(subject: Subject) -> dict[int, str]:
    """Id -> why it must end generation."""
    stored = subject.generation.get("eos_token_id")
    ids = stored if isinstance(stored, list) else [stored]
    named = [token for token in ids if type(token) is int]
    if named:
        required = dict.fromkeys(named, f"ends generation by {GENERATION_CONFIG}")
    else:
        required = dict.fromkeys(
            subject.checkpoint.config.eos_token_ids, "ends generation by config.json"
        )
    end = turn_end_id(subject.reference)
    if end is not None:
        required.setdefault(end, "ends a turn of the chat template")
    return required


def _single_id_findings(subject: Subject, name: str, use: str) -> Iterator[Finding]:
    key = f"model.{name}_token_id"
    candidates = (
        (GENERATION_CONFIG, subject.generation.get(f"{name}_token_id")),
        ("config.json", getattr(subject.checkpoint.config, f"{name}_token_id")),
        ("the tokenizer", subject.reference.special_token_ids[name]),
    )
    source, expected = next(
        ((source, token) for source, token in candidates if type(token) is int), ("", None)
    )
    found = subject.get(key)
    if expected is not None and found != expected:
        yield Finding(
            "error",
            key,
            f"{_named(subject, [expected])} of {source}",
            _named(subject, [found]) if type(found) is int else _shown(found),
            f"correct it: it is what the runtime {use}",
        )


def _named(subject: Subject, ids: list[int]) -> str:
    """Ids with their tokens: `[3500 '<|endoftext|>', 3503 '<|end|>']`."""
    size = subject.checkpoint.config.vocab_size
    named = [
        f"{token} {subject.reference.pieces([token])[0]!r}" if 0 <= token < size else str(token)
        for token in ids
    ]
    return named[0] if len(named) == 1 else f"[{', '.join(named)}]"


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _added(document: Any) -> list[dict[str, Any]]:
    tokens = document.get("added_tokens")
    return [token for token in tokens or [] if isinstance(token, dict)]
