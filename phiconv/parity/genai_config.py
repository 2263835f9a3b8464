"""Lint of an artifact's genai_config.json and tokenizer files against its checkpoint.

Needs no runtime: every rule compares files. An error is a fault by which the artifact reads,
writes or stops otherwise than the checkpoint, or cannot be run at all; what only changes defaults
that a caller may set is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.json_object import read_json_object
from phiconv.errors import CheckpointError
from phiconv.parity.graph_signature import graph_findings
from phiconv.parity.hugging_face import HuggingFaceTokenizer
from phiconv.parity.results import Finding
from phiconv.parity.subject import GENAI_CONFIG, GENERATION_CONFIG, Provider, Subject
from phiconv.parity.token_ids import (
    added_token_findings,
    control_token_findings,
    token_id_findings,
)
from phiconv.parity.tokenizer_files import tokenizer_file_findings, vocabulary_findings

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint

# transformers' defaults of what generation_config.json leaves out.
_SEARCH = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_OTHER_CHECKPOINT = "the artifact belongs to another checkpoint: export it again"


def lint_genai_config(
    artifact: Path,
    checkpoint: Checkpoint,
    *,
    provider: Provider | None = None,
    reference: HuggingFaceTokenizer | None = None,
) -> tuple[Finding, ...]:
    """Finds what is wrong with genai_config.json, the tokenizer's files and the graph's signature.

    Args:
        artifact: Folder of the artifact.
        checkpoint: What it was made from.
        provider: What the recipe builds for; None leaves the provider unchecked.
        reference: The checkpoint's tokenizer, when it is open already.

    Returns:
        The findings, errors first.

    Raises:
        CheckpointError: The checkpoint's own tokenizer or generation config cannot be read.
    """
    reference = reference or HuggingFaceTokenizer(checkpoint.path)
    try:
        config = read_json_object(artifact / GENAI_CONFIG)
    except CheckpointError as error:
        remedy = "export the artifact again"
        return (Finding("error", f"{GENAI_CONFIG} cannot be read", "JSON", error.message, remedy),)
    subject = Subject(artifact, config, checkpoint, reference, provider)
    findings = [finding for rule in RULES for finding in rule(subject)]
    return tuple(sorted(findings, key=lambda finding: finding.severity))


def size_findings(subject: Subject) -> Iterator[Finding]:
    """The model's sizes are config.json's."""
    config = subject.checkpoint.config
    expected = {
        "model.vocab_size": config.vocab_size,
        "model.decoder.head_size": config.head_dim,
        "model.decoder.hidden_size": config.hidden_size,
        "model.decoder.num_attention_heads": config.num_attention_heads,
        "model.decoder.num_hidden_layers": config.num_hidden_layers,
        "model.decoder.num_key_value_heads": config.num_key_value_heads,
    }
    for key, value in expected.items():
        if subject.get(key) != value:
            yield Finding(
                "error",
                key,
                f"{value} as in config.json",
                repr(subject.get(key)),
                _OTHER_CHECKPOINT,
            )
    kind = subject.checkpoint.raw_config.get("model_type", "phi3")
    if subject.get("model.type") != kind:
        yield Finding(
            "warning",
            "model.type",
            repr(kind),
            repr(subject.get("model.type")),
            "correct it: the runtime chooses its code by it",
        )


def context_findings(subject: Subject) -> Iterator[Finding]:
    """The context length is the checkpoint's, and generation stays within it."""
    key, limit = "model.context_length", subject.checkpoint.config.max_position_embeddings
    found = subject.get(key)
    if found != limit:
        shorter = type(found) is int and 0 < found < limit
        yield Finding(
            "warning" if shorter else "error",
            key,
            f"{limit}, max_position_embeddings of config.json",
            repr(found),
            "correct it: longer prompts are refused"
            if shorter
            else "correct it: the model was not trained on such positions",
        )
    longest = subject.get("search.max_length")
    if type(longest) is int and type(found) is int and longest > found:
        yield Finding(
            "error",
            "search.max_length",
            f"at most the context length {found}",
            str(longest),
            "lower it: the runtime refuses to generate",
        )


def search_findings(subject: Subject) -> Iterator[Finding]:
    """The search defaults are those of generation_config.json."""
    defaults: dict[str, Any] = dict(_SEARCH)
    if subject.generation.get("do_sample") or subject.get("search.do_sample"):
        defaults |= _SAMPLING  # greedy search does not look at them
    for name, default in defaults.items():
        stored = subject.generation.get(name)
        expected = default if stored is None else stored
        found = subject.get(f"search.{name}")
        if (default if found is None else found) != expected:
            yield Finding(
                "warning",
                f"search.{name}",
                f"{expected!r} as {GENERATION_CONFIG} says or leaves it",
                repr(found),
                "correct it, or say in the model card that it differs",
            )


def provider_findings(subject: Subject) -> Iterator[Finding]:
    """The provider that the runtime will choose is the recipe's."""
    if subject.provider is None:
        return
    key = "model.decoder.session_options.provider_options"
    options = subject.get(key)
    entries = options if isinstance(options, list) else []
    names = [str(name).lower() for entry in entries if isinstance(entry, dict) for name in entry]
    if (names or ["cpu"]) != [subject.provider]:
        yield Finding(
            "error",
            key,
            subject.provider,
            ", ".join(names) or "none, which is cpu",
            "name the provider the graph was built for",
        )


RULES: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    token_id_findings,
    size_findings,
    context_findings,
    search_findings,
    provider_findings,
    tokenizer_file_findings,
    vocabulary_findings,
    added_token_findings,
    control_token_findings,
    graph_findings,
)
