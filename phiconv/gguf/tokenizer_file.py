"""tokenizer.json as far as a GGUF vocabulary is made of it, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phiconv.checkpoint.json_object import read_json_object
from phiconv.errors import CheckpointError

TOKENIZER = "tokenizer.json"

_REMEDY = "download or copy the checkpoint's tokenizer.json again"
_SHOWN = 5


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before anything else is done to it.

    Attributes:
        id: Its id.
        content: Its text.
        special: Whether it is left out of decoded text.
        lstrip: Whether white space before it belongs to it.
        rstrip: Whether white space after it belongs to it.
    """

    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool


@dataclass(frozen=True)
class TokenizerFile:
    """A byte-pair tokenizer as Hugging Face's tokenizers library writes it.

    Attributes:
        where: The file, for error messages.
        vocabulary: Id of each entry.
        merges: Pairs of entries that become one, first come first.
        added: The added tokens, by id.
        byte_fallback: Whether characters that are no entry become `<0x..>` tokens.
        ignore_merges: Whether a word that is an entry is taken as it is.
        normalizer: The section of that name, None without one.
        pre_tokenizer: Likewise.
    """

    where: str
    vocabulary: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Sequence[AddedToken]
    byte_fallback: bool
    ignore_merges: bool
    normalizer: Mapping[str, Any] | None
    pre_tokenizer: Mapping[str, Any] | None

    def texts(self, vocab_size: int) -> dict[int, str]:
        """Text of every id that has one.

        Args:
            vocab_size: Rows of the model's embedding.

        Raises:
            CheckpointError: Two ids have one text, two texts one id, or an id has no row.
        """
        texts: dict[int, str] = {}
        for text, token in self.vocabulary.items():
            if token in texts:
                raise self.fault(f"{texts[token]!r} and {text!r} have the same id, {token}")
            texts[token] = text
        texts |= {token.id: token.content for token in self.added}
        largest = max(texts, default=-1)
        if largest >= vocab_size:
            raise CheckpointError(
                f"the tokenizer has ids up to {largest}, the embedding ends at {vocab_size - 1}",
                where=self.where,
                remedy="use the tokenizer that belongs to this checkpoint",
            )
        ids: dict[str, int] = {}
        for token in sorted(texts):
            if texts[token] in ids:
                first = ids[texts[token]]
                raise self.fault(f"the ids {first} and {token} have one text, {texts[token]!r}")
            ids[texts[token]] = token
        return texts

    def check_merges(self) -> None:
        """Finds merges that make no entry, and entries that no merge makes.

        Raises:
            CheckpointError: There are such; text would be cut into other tokens than in training.
        """
        made: set[str] = set()
        for left, right in self.merges:
            unknown = [part for part in (left, right, left + right) if part not in self.vocabulary]
            if unknown:
                raise self.fault(f"the merge of {left!r} and {right!r} needs {unknown[0]!r}")
            made.add(left + right)
        if self.ignore_merges:
            return  # an entry may then be reached as a whole word only
        added = {token.content for token in self.added}
        unmade = [
            text
            for text in self.vocabulary
            if len(text) > 1 and text not in made and text not in added and not is_byte(text)
        ]
        if unmade:
            shown = ", ".join(repr(text) for text in unmade[:_SHOWN])
            more = f" and {len(unmade) - _SHOWN} more" if len(unmade) > _SHOWN else ""
            raise self.fault(f"merges are missing: none makes {shown}{more}")

    def fault(self, message: str) -> CheckpointError:
        """An error about this file."""
        return CheckpointError(message, where=self.where, remedy=_REMEDY)


def is_byte(text: str) -> bool:
    """Whether a SentencePiece entry stands for one byte: `<0x00>` to `<0xFF>`."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def read_tokenizer_file(folder: Path) -> TokenizerFile:
    """Reads and checks the form of a checkpoint's tokenizer.json.

    Raises:
        CheckpointError: There is none, it is broken, or it is no byte-pair encoding that llama.cpp
            has.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            "the checkpoint has no tokenizer.json",
            where=str(folder),
            remedy="save the tokenizer with transformers' save_pretrained of a fast tokenizer",
        )
    document = read_json_object(path)
    try:
        return _parse(document, str(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"not a tokenizer: {error!r}", where=str(path), remedy=_REMEDY
        ) from error


def _parse(document: Mapping[str, Any], where: str) -> TokenizerFile:
    model = document["model"]
    _check_model(model, where)
    vocabulary = {str(text): int(token) for text, token in model["vocab"].items()}
    return TokenizerFile(
        where=where,
        vocabulary=vocabulary,
        merges=[_pair(merge) for merge in model["merges"]],
        added=sorted((_added(item) for item in document["added_tokens"]), key=lambda t: t.id),
        byte_fallback=bool(model.get("byte_fallback")),
        ignore_merges=bool(model.get("ignore_merges")),
        normalizer=document.get("normalizer"),
        pre_tokenizer=document.get("pre_tokenizer"),
    )


def _check_model(model: Mapping[str, Any], where: str) -> None:
    kind = model.get("type", "BPE")
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if kind == "BPE" and not affixes:
        return
    what = f"{kind} model" if kind != "BPE" else f"byte-pair encoding with {affixes[0]}"
    raise CheckpointError(
        f"llama.cpp takes no {what} for Phi-3",
        where=where,
        remedy="use the tokenizer that belongs to this checkpoint",
    )


def _pair(merge: Any) -> tuple[str, str]:
    """A merge in either spelling: `"a b"` or, from tokenizers 0.20 on, `["a", "b"]`."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(left, str) or not isinstance(right, str):
        raise TypeError(f"the merge {merge!r} is no pair of texts")
    return left, right


def _added(item: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        id=int(item["id"]),
        content=str(item["content"]),
        special=bool(item.get("special")),
        lstrip=bool(item.get("lstrip")),
        rstrip=bool(item.get("rstrip")),
    )
