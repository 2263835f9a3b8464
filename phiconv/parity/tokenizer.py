"""Tokenizer parity: the ids and the text that users get, against Hugging Face's.

Compared on the golden set and on every entry of the vocabulary, without adding special tokens, as
both sides tokenize a rendered chat prompt. A difference has a cause:

- `artifact`: transformers, too, reads the artifact's files otherwise than the checkpoint's. The
  files are wrong: an error.
- names of limitations: the files are right, and the runtime gives exactly what these limitations
  predict (`phiconv.parity.limitations`). No packaging can change that: a warning.
- `unexplained`: neither. An error, since nobody knows how much text it concerns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from phiconv.errors import CheckpointError, StageError
from phiconv.parity.genai import GenAITokenizer
from phiconv.parity.golden import GoldenText, golden_texts
from phiconv.parity.hugging_face import HuggingFaceTokenizer
from phiconv.parity.limitations import DECODE_LIMITATIONS, ENCODE_LIMITATIONS, RuntimeModel
from phiconv.parity.results import ARTIFACT, UNEXPLAINED, Difference, ParityResult, Severity

LISTED_ERRORS = 50
LISTED_WARNINGS = 3  # of each operation and cause

_IDS_SHOWN = 8
_TEXT_SHOWN = 60
_BEFORE = 2  # ids or characters shown before the first that differs
_TOKENS_DECODED = 64  # entries of the vocabulary decoded at a time

Ids = Sequence[int]
T = TypeVar("T")


def tokenizer_parity(artifact: Path, checkpoint_path: Path) -> ParityResult:
    """Compares an artifact's tokenizer, as the runtime reads it, with the checkpoint's.

    Args:
        artifact: Folder with genai_config.json and tokenizer files; no weights are read.
        checkpoint_path: Folder of the checkpoint.

    Raises:
        CheckpointError: transformers cannot load the checkpoint's tokenizer.
        EnvironmentLacksError: onnxruntime-genai is not installed.
    """
    return Comparison(artifact, HuggingFaceTokenizer(checkpoint_path)).result()


class Comparison:
    """An artifact's tokenizer, as the runtime reads it, beside the reference.

    Args:
        artifact: Folder of the artifact.
        reference: The checkpoint's tokenizer.

    Raises:
        EnvironmentLacksError: onnxruntime-genai is not installed.

    Attributes:
        candidate: The runtime's tokenizer; None when it cannot be loaded.
        failure: Why it cannot be loaded.
    """

    def __init__(self, artifact: Path, reference: HuggingFaceTokenizer):
        self.candidate: GenAITokenizer | None = None
        self.failure: str | None = None
        self._artifact = artifact
        self._reference = reference
        self._model = RuntimeModel(reference)
        try:
            self.candidate = GenAITokenizer(artifact)
        except StageError as error:
            self.failure = error.message
        self._files = self._load_files()

    def result(self) -> ParityResult:
        """Compares ids and decoding of everything, and streams of the golden set."""
        if self.candidate is None:
            return ParityResult(0, 0, 0, 0, failure=self.failure)
        golden, vocabulary = golden_texts(), self._vocabulary()
        differences = [*self._golden_differences(golden), *self._token_differences(vocabulary)]
        errors = [item for item in differences if item.severity == "error"]
        names = {item.name for item in golden}
        warnings = [i for i in differences if i.severity == "warning" and i.name in names]
        return ParityResult(
            texts=len(golden),
            tokens=len(vocabulary),
            error_count=len({item.name for item in errors}),
            warning_count=len({item.name for item in warnings if item.operation == "encode"}),
            causes=dict(Counter(item.kind for item in (*errors, *warnings))),
            differences=(*errors[:LISTED_ERRORS], *_few_of_each_kind(warnings)),
        )

    def _golden_differences(self, golden: Sequence[GoldenText]) -> Iterator[Difference]:
        encoded = self._reference.encode([item.text for item in golden])
        for item, ids in zip(golden, encoded, strict=True):
            yield from self.encode_differences(item.name, item.text, ids)
            yield from self.decode_differences("decode", item.name, item.text, ids)
            yield from self.decode_differences("stream", item.name, item.text, ids)

    def _token_differences(self, vocabulary: Mapping[int, str]) -> Iterator[Difference]:
        encoded = self._reference.encode(list(vocabulary.values()))
        for (token, text), ids in zip(vocabulary.items(), encoded, strict=True):
            yield from self.encode_differences(f"token.{token}", text, ids)
        tokens = list(vocabulary)
        for start in range(0, len(tokens), _TOKENS_DECODED):
            ids = tokens[start : start + _TOKENS_DECODED]
            name = f"tokens.{ids[0]}-{ids[-1]}"
            yield from self.decode_differences("decode", name, self._reference.decode(ids), ids)

    def encode_differences(self, name: str, text: str, expected: Ids) -> Iterator[Difference]:
        """Yields the difference of the runtime's ids of `text` from the expected ones, if any."""
        assert self.candidate is not None
        try:
            found = self.candidate.encode(text)
        except StageError:
            found = []
        if found == list(expected):
            return
        cause = self._cause(
            lambda files: files.encode([text])[0],
            lambda active: self._model.encode([text], active)[0],
            ENCODE_LIMITATIONS,
            list(expected),
            found,
        )
        index = first_difference(expected, found)
        window = slice(max(index - _BEFORE, 0), max(index - _BEFORE, 0) + _IDS_SHOWN)
        yield Difference(
            name=name,
            operation="encode",
            severity=_severity(cause),
            cause=cause,
            text=_shortened(text),
            index=index,
            expected=tuple(expected[window]),
            found=tuple(found[window]),
            expected_pieces=self._reference.pieces(expected[window]),
            found_pieces=self._reference.pieces(found[window]),
        )

    def decode_differences(
        self, operation: Literal["decode", "stream"], name: str, text: str, ids: Ids
    ) -> Iterator[Difference]:
        """Yields the difference of the text that the runtime makes of `ids`, if there is one."""
        assert self.candidate is not None
        streamed = operation == "stream"
        expected = self._reference.decode(ids)
        try:
            found = self.candidate.stream(ids) if streamed else self.candidate.decode(ids)
        except StageError as error:
            found = error.message
        if found == expected:
            return
        predict = self._model.stream if streamed else self._model.decode
        cause = self._cause(
            lambda files: files.decode(ids),
            lambda active: predict(ids, active),
            DECODE_LIMITATIONS,
            expected,
            found,
        )
        index = first_difference(expected, found)
        yield Difference(
            name=name,
            operation=operation,
            severity=_severity(cause),
            cause=cause,
            text=_shortened(text),
            index=index,
            expected=excerpt(expected, index),
            found=excerpt(found, index),
        )

    def _cause(
        self,
        by_files: Callable[[HuggingFaceTokenizer], T],
        predict: Callable[[Iterable[str]], T],
        limitations: Mapping[str, str],
        expected: T,
        found: T,
    ) -> str:
        """Why `found` is not `expected`; see the module's docstring."""
        if self._files is None or by_files(self._files) != expected:
            return ARTIFACT
        for candidate in (list(limitations), *([name] for name in limitations)):
            if predict(candidate) == found:
                return " + ".join(_fewest(candidate, lambda active: predict(active) == found))
        return UNEXPLAINED

    def _vocabulary(self) -> dict[int, str]:
        """Id -> text of every entry of the vocabulary that is whole characters."""
        document = self._reference.document
        added = {token["id"] for token in document["added_tokens"]}
        ids = sorted(set(document["model"]["vocab"].values()) - added)
        texts = {token: self._reference.decode([token]) for token in ids}
        # U+0000 ends what the runtime reads, and would hide the entries after it
        return {t: text for t, text in texts.items() if text and not set(text) & set("\0\ufffd")}

    def _load_files(self) -> HuggingFaceTokenizer | None:
        """The artifact's own files as transformers reads them; None when it cannot."""
        try:
            return HuggingFaceTokenizer(self._artifact)
        except CheckpointError:
            return None


def first_difference(expected: Sequence[object], found: Sequence[object]) -> int:
    """The first index at which two sequences differ; the shorter's length if it is a prefix."""
    pairs = zip(expected, found, strict=False)
    shorter = min(len(expected), len(found))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), shorter)


def excerpt(text: str, index: int) -> str:
    """The part of a text that begins a little before `index`."""
    start = max(index - _BEFORE, 0)
    return text[start : start + _TEXT_SHOWN]


def _fewest(limitations: list[str], explains: Callable[[list[str]], bool]) -> list[str]:
    """Leaves out every limitation that the explanation does not need."""
    for name in tuple(limitations):
        without = [other for other in limitations if other != name]
        if without and explains(without):
            limitations = without
    return limitations


def _severity(cause: str) -> Severity:
    return "error" if cause in (ARTIFACT, UNEXPLAINED) else "warning"


def _few_of_each_kind(differences: Iterable[Difference]) -> list[Difference]:
    listed = Counter[str]()
    few = []
    for item in differences:
        listed[item.kind] += 1
        if listed[item.kind] <= LISTED_WARNINGS:
            few.append(item)
    return few


def _shortened(text: str) -> str:
    return text if len(text) <= _TEXT_SHOWN else text[:_TEXT_SHOWN] + "\u2026"
