"""Lint of the tokenizer's files: present, readable, and with the checkpoint's own content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phiconv.checkpoint.json_object import read_json_object
from phiconv.errors import CheckpointError
from phiconv.parity.results import Finding
from phiconv.parity.subject import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Subject

Merge = tuple[str, str]


def tokenizer_file_findings(subject: Subject) -> Iterator[Finding]:
    """The files that the runtime opens, and that a conversation needs."""
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        path = subject.artifact / name
        remedy = "export the artifact again, or copy the file from the checkpoint"
        if not path.is_file():
            yield Finding("error", f"{name} is missing", "a file", "none", remedy)
            continue
        try:
            read_json_object(path)
        except CheckpointError as error:
            yield Finding("error", f"{name} cannot be read", "JSON", error.message, remedy)
    has_template = (subject.artifact / CHAT_TEMPLATE).is_file() or bool(
        subject.tokenizer_config.get("chat_template")
    )
    if subject.reference.has_chat_template and not has_template:
        yield Finding(
            "error",
            "the chat template is missing",
            f"{CHAT_TEMPLATE}, or chat_template in {TOKENIZER_CONFIG}",
            "neither",
            f"write the checkpoint's chat template to {CHAT_TEMPLATE}",
        )


def vocabulary_findings(subject: Subject) -> Iterator[Finding]:
    """The vocabulary and merges of tokenizer.json against the checkpoint's.

    The rest of the file may be written in more than one way; what it does is what the golden set
    compares.
    """
    found, expected = subject.tokenizer.get("model"), subject.reference.document["model"]
    if not isinstance(found, dict):
        return  # not readable: said by the lint of the files, and by the runtime
    yield from _vocabulary_findings(expected, found)
    yield from _merge_findings(expected, found)
    largest = max(expected["vocab"].values(), default=0)
    size = subject.checkpoint.config.vocab_size
    if largest >= size:
        yield Finding(
            "error",
            f"{TOKENIZER}: the greatest id",
            f"less than the model's vocab_size {size}",
            str(largest),
            "use the tokenizer that belongs to this checkpoint",
        )


def _vocabulary_findings(expected: Any, found: Mapping[str, Any]) -> Iterator[Finding]:
    vocabulary = found.get("vocab")
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
    wrong = [
        token
        for token in {**expected["vocab"], **vocabulary}
        if expected["vocab"].get(token) != vocabulary.get(token)
    ]
    if wrong:
        first = wrong[0]
        yield Finding(
            "error",
            f"{TOKENIZER}: model.vocab differs in {len(wrong)} entries, first {first!r}",
            f"id {expected['vocab'].get(first, 'none')}",
            f"id {vocabulary.get(first, 'none')}",
            f"ship the checkpoint's {TOKENIZER} as it is",
        )


def _merge_findings(expected: Any, found: Mapping[str, Any]) -> Iterator[Finding]:
    right, wrong = _merges(expected.get("merges")), _merges(found.get("merges"))
    if right == wrong:
        return
    missing, extra = set(right) - set(wrong), set(wrong) - set(right)
    pairs = zip([*right, None], [*wrong, None], strict=False)
    rank, (first, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    yield Finding(
        "error",
        f"{TOKENIZER}: model.merges has {len(missing)} merges less and {len(extra)} more than the "
        f"checkpoint's; they differ from rank {rank}",
        "the end" if first is None else repr(" ".join(first)),
        "the end" if other is None else repr(" ".join(other)),
        f"ship the checkpoint's {TOKENIZER} as it is",
    )


def _merges(stored: Any) -> list[Merge]:
    """Merges in the order of rank, from either spelling: `["a", "b"]` or `"a b"`."""
    merges = []
    for merge in stored if isinstance(stored, list) else []:
        parts = merge.split(" ", 1) if isinstance(merge, str) else merge
        if isinstance(parts, list) and len(parts) == 2:
            merges.append((str(parts[0]), str(parts[1])))
    return merges
