"""What the parity checks found out, as plain frozen data that turns into JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning"]

ARTIFACT = "artifact"
"""Cause: the artifact's tokenizer files give other tokens than the checkpoint's."""

UNEXPLAINED = "unexplained"
"""Cause: the files agree, and the runtime reads them in a way nobody has described."""


@dataclass(frozen=True)
class Finding:
    """One fault of genai_config.json or of the files beside it.

    Attributes:
        severity: `error` when what users run differs from the checkpoint, else `warning`.
        what: The key, file or token it concerns, and what is wrong with it.
        expected: What the checkpoint or the graph says.
        found: What is there instead.
        remedy: What to do about it.
    """

    severity: Severity
    what: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.severity}: {self.what}: expected {self.expected}, found {self.found}; "
            f"{self.remedy}"
        )


@dataclass(frozen=True)
class Difference:
    """One string on which Hugging Face and the runtime differ.

    Attributes:
        name: Name of the golden text, or `token.<id>` for an entry of the vocabulary.
        operation: `encode` to ids, `decode` of ids at once, or `stream`, token by token.
        severity: `warning` when `cause` names limitations of the runtime, else `error`.
        cause: `artifact`, `unexplained`, or the names of limitations, joined by ` + `.
        text: The string; shortened when it is long.
        index: The first id, or character of decoded text, that differs.
        expected: Ids (encode) or text of Hugging Face, from a little before `index`.
        found: The same of the runtime.
        expected_pieces: The tokens behind `expected`; empty for text.
        found_pieces: The tokens behind `found`.
    """

    name: str
    operation: Literal["encode", "decode", "stream"]
    severity: Severity
    cause: str
    text: str
    index: int
    expected: tuple[int, ...] | str
    found: tuple[int, ...] | str
    expected_pieces: tuple[str, ...] = ()
    found_pieces: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Operation and cause, by which differences are counted."""
        return f"{self.operation}: {self.cause}"

    def __str__(self) -> str:
        place = "id" if self.operation == "encode" else "character"
        expected: object = self.expected_pieces or self.expected
        found: object = self.found_pieces or self.found
        return (
            f"{self.severity}: {self.operation} of {self.name} {self.text!a} differs from "
            f"{place} {self.index} ({self.cause}): expected {expected!a}, "
            f"found {found!a}"
        )


@dataclass(frozen=True)
class ParityResult:
    """Hugging Face's tokenizer against the runtime's.

    Attributes:
        texts: How many golden texts were compared.
        tokens: How many entries of the vocabulary were compared.
        error_count: How many of both differ for a reason that is no known limitation.
        warning_count: How many golden texts have other ids by known limitations.
        causes: `<operation>: <cause>` -> number of differences.
        differences: Errors first; of many alike only the first are listed.
        failure: Why the runtime could not load the tokenizer; None when it could.
    """

    texts: int
    tokens: int
    error_count: int
    warning_count: int
    causes: Mapping[str, int] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()
    failure: str | None = None


@dataclass(frozen=True)
class TemplateDifference:
    """One conversation that is rendered, or tokenized after that, in another way.

    Attributes:
        conversation: Name in the golden set.
        add_generation_prompt: As given to both.
        severity: See `Difference`; a difference of the rendered text is always an error.
        cause: `text`, `failure` when the runtime refused the conversation, else see `Difference`.
        index: The first character or, for equal texts, the first id that differs.
        expected: Hugging Face's text, or its ids as text, from a little before `index`.
        found: The runtime's.
    """

    conversation: str
    add_generation_prompt: bool
    severity: Severity
    cause: str
    index: int
    expected: str
    found: str

    def __str__(self) -> str:
        prompt = "with" if self.add_generation_prompt else "without"
        return (
            f"{self.severity}: conversation {self.conversation} {prompt} generation prompt differs "
            f"from {self.index} ({self.cause}): expected {self.expected!a}, "
            f"found {self.found!a}"
        )


@dataclass(frozen=True)
class TemplateResult:
    """Hugging Face's chat template against the runtime's.

    Attributes:
        conversations: How many were rendered by both, each with and without generation prompt.
        refused: Names of those that the checkpoint's own template refuses.
        differences: Every one, errors first.
        failure: Why nothing was compared, though the checkpoint has a template.
    """

    conversations: int
    refused: tuple[str, ...] = ()
    differences: tuple[TemplateDifference, ...] = ()
    failure: str | None = None

    @property
    def error_count(self) -> int:
        """How many renderings differ for a reason that is no known limitation."""
        errors = sum(difference.severity == "error" for difference in self.differences)
        return errors + (self.failure is not None)


@dataclass(frozen=True)
class ParityReport:
    """Everything `check_artifact` found out.

    Attributes:
        tokenizer: Ids and decoding.
        template: The chat template.
        findings: genai_config.json and the tokenizer's files, errors first.
        versions: Of transformers, tokenizers and onnxruntime-genai.
    """

    tokenizer: ParityResult
    template: TemplateResult
    findings: tuple[Finding, ...]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return not any(self.metrics()[name] for name in ERROR_METRICS)

    def metrics(self) -> dict[str, float]:
        """The numbers that gates can limit, by the names of docs/parity.md."""
        return {
            "parity.tokenizer": float(
                self.tokenizer.error_count + (self.tokenizer.failure is not None)
            ),
            "parity.template": float(self.template.error_count),
            "parity.genai_config": float(
                sum(finding.severity == "error" for finding in self.findings)
            ),
            "parity.runtime_limitations": float(self.tokenizer.warning_count),
        }

    def lines(self) -> tuple[str, ...]:
        """Every finding, difference and failure in one line each, errors first."""
        items: list[Finding | TemplateDifference | Difference] = [
            *self.findings,
            *self.template.differences,
            *self.tokenizer.differences,
        ]
        failures = [
            f"error: {failure}"
            for failure in (self.tokenizer.failure, self.template.failure)
            if failure is not None
        ]
        return (*failures, *map(str, sorted(items, key=lambda item: item.severity)))

    def to_json(self) -> str:
        """All of it, with the metrics first."""
        document: dict[str, Any] = {"metrics": self.metrics(), **dataclasses.asdict(self)}
        return json.dumps(document, indent=2, ensure_ascii=True) + "\n"


ERROR_METRICS = ("parity.tokenizer", "parity.template", "parity.genai_config")
