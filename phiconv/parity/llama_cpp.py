"""Tokenizer and chat template parity of a GGUF file: llama.cpp against Hugging Face.

Ids and decoding are compared on the golden set and on every entry of the vocabulary; the template
as text, and where llama.cpp's library renders it, on the golden conversations. llama.cpp's
programs run the stored template itself; its library has only built-in copies of known ones, so a
difference there is a limitation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.errors import StageError
from phiconv.parity.golden import Conversation, conversations, golden_texts
from phiconv.parity.hugging_face import HuggingFaceTokenizer
from phiconv.parity.llama_cpp_limitations import LlamaCppModel
from phiconv.parity.results import (
    UNEXPLAINED,
    Difference,
    ParityReport,
    ParityResult,
    Severity,
    TemplateDifference,
    TemplateResult,
)
from phiconv.parity.token_ids import turn_end_id
from phiconv.parity.tokenizer import LISTED_ERRORS, excerpt, first_difference

if TYPE_CHECKING:
    from phiconv.runtimes.llama_cpp import LlamaFile

END_BY_TEXT = "end_by_text"
"""Limitation: llama.cpp takes `</s>` and its like, by their text, for tokens that end a generation,
and does not print them, whatever the vocabulary says of them."""
BUILT_IN_TEMPLATE = "built_in_template"
"""Limitation: the library's own copy of a template differs from the stored template, which
llama.cpp's programs run."""

_SHOWN = 8
_TEXT_SHOWN = 60


def gguf_parity(artifact: Path, checkpoint_path: Path) -> ParityReport:
    """Compares how a GGUF file reads and writes text with its checkpoint.

    Args:
        artifact: The file, or the folder that holds it; no weights are read.
        checkpoint_path: Folder of the checkpoint.

    Raises:
        CheckpointError: transformers cannot load the checkpoint's tokenizer.
        EnvironmentLacksError: There is no llama.cpp.
    """
    from phiconv.runtimes.llama_cpp import LlamaFile, gguf_file

    versions = {name: version(name) for name in ("tokenizers", "transformers")}
    reference = HuggingFaceTokenizer(checkpoint_path)
    try:
        file = LlamaFile(gguf_file(artifact), vocab_only=True)
    except StageError as error:
        failed = ParityResult(0, 0, 0, 0, failure=error.message)
        return ParityReport(failed, TemplateResult(0, failure=error.message), (), versions)
    versions["llama.cpp"] = file.library.version
    comparison = _Comparison(file, reference)
    return ParityReport(comparison.tokenizer(), comparison.template(), (), versions)


class _Comparison:
    """A GGUF file beside the checkpoint's tokenizer."""

    def __init__(self, file: LlamaFile, reference: HuggingFaceTokenizer):
        self._file = file
        self._reference = reference
        self._model = LlamaCppModel(reference)

    def tokenizer(self) -> ParityResult:
        texts = [(item.name, item.text) for item in golden_texts()]
        tokens = self._vocabulary()
        differences = [
            *self._encode_all(texts),
            *self._decode_all(texts),
            *self._encode_all(tokens),
        ]
        errors = [item for item in differences if item.severity == "error"]
        warnings = [item for item in differences if item.severity == "warning"]
        names = {name for name, _ in texts}
        other_ids = {item.name for item in warnings if item.operation == "encode"}
        return ParityResult(
            texts=len(texts),
            tokens=len(tokens),
            error_count=len({item.name for item in errors}),
            warning_count=len(other_ids & names),
            causes=dict(Counter(item.kind for item in differences)),
            differences=(*errors[:LISTED_ERRORS], *warnings[:LISTED_ERRORS]),
        )

    def template(self) -> TemplateResult:
        """Compares the template as text, what ends a turn, and the library's rendering."""
        if not self._reference.has_chat_template:
            return TemplateResult(0)
        stored, expected = self._file.chat_template or "", self._reference.chat_template
        if stored != expected:
            at = first_difference(expected, stored)
            message = f"the stored template differs from character {at} on"
            return TemplateResult(0, failure=message)
        refused = []
        differences = list(self._turn_end())
        compared = 0
        for conversation in conversations():
            text = self._reference.render(conversation.messages, True)
            if text is None:
                refused.append(conversation.name)
            else:
                compared += 1
                differences += self._rendering(conversation, text)
        return TemplateResult(compared, tuple(refused), tuple(differences))

    def _vocabulary(self) -> list[tuple[str, str]]:
        """Every entry that is whole characters."""
        ids = range(self._file.vocab_size)
        texts = ((token, self._reference.decode([token])) for token in ids)
        return [(f"token.{token}", text) for token, text in texts if text and "\ufffd" not in text]

    def _encode_all(self, texts: Sequence[tuple[str, str]]) -> Iterator[Difference]:
        expected = self._reference.encode([text for _, text in texts])
        for (name, text), ids in zip(texts, expected, strict=True):
            found = self._file.encode(text)
            if found != ids:
                yield self._encode_difference(name, text, ids, found)

    def _encode_difference(
        self, name: str, text: str, expected: Sequence[int], found: Sequence[int]
    ) -> Difference:
        at = first_difference(expected, found)
        window = slice(max(at - 2, 0), max(at - 2, 0) + _SHOWN)
        cause = self._model.explain(text, list(found))
        return Difference(
            name=name,
            operation="encode",
            severity="warning" if cause else "error",
            cause=cause or UNEXPLAINED,
            text=text if len(text) <= _TEXT_SHOWN else text[:_TEXT_SHOWN] + "\u2026",
            index=at,
            expected=tuple(expected[window]),
            found=tuple(found[window]),
            expected_pieces=self._reference.pieces(expected[window]),
            found_pieces=self._reference.pieces(found[window]),
        )

    def _decode_all(self, texts: Sequence[tuple[str, str]]) -> Iterator[Difference]:
        """Joins the bytes of the single tokens, as llama.cpp's programs print them."""
        encoded = self._reference.encode([text for _, text in texts])
        for (name, text), ids in zip(texts, encoded, strict=True):
            expected = self._reference.decode(ids)
            found = self._file.decode(ids)
            if found != expected:
                at = first_difference(expected, found)
                is_known = self._reference.decode(self._without_ends(ids)) == found
                yield Difference(
                    name=name,
                    operation="stream",
                    severity="warning" if is_known else "error",
                    cause=END_BY_TEXT if is_known else UNEXPLAINED,
                    text=text[:_TEXT_SHOWN],
                    index=at,
                    expected=excerpt(expected, at),
                    found=excerpt(found, at),
                )

    def _without_ends(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if not self._file.ends_generation(token)]

    def _turn_end(self) -> Iterator[TemplateDifference]:
        """Generation must stop at what the template writes after an answer."""
        token = turn_end_id(self._reference)
        if token is not None and not self._file.ends_generation(token):
            (piece,) = self._reference.pieces([token])
            yield TemplateDifference(
                "end of an answer", False, "error", "failure", 0, f"stops at {piece}", "goes on"
            )

    def _rendering(self, conversation: Conversation, expected: str) -> Iterator[TemplateDifference]:
        messages = [(turn["role"], turn["content"]) for turn in conversation.messages]
        found = self._file.render(messages, add_generation_prompt=True)
        if found is None:
            yield _template_difference(
                conversation, "warning", BUILT_IN_TEMPLATE, expected, "no built-in copy"
            )
        elif found != expected:
            yield _template_difference(conversation, "warning", BUILT_IN_TEMPLATE, expected, found)
        for difference in self._encode_all([(conversation.name, expected)]):
            yield TemplateDifference(
                conversation.name,
                True,
                difference.severity,
                difference.cause,
                difference.index,
                str(list(difference.expected)),
                str(list(difference.found)),
            )


def _template_difference(
    conversation: Conversation, severity: Severity, cause: str, expected: str, found: str
) -> TemplateDifference:
    at = first_difference(expected, found)
    return TemplateDifference(
        conversation.name, True, severity, cause, at, excerpt(expected, at), excerpt(found, at)
    )
