"""Token sets: the windows of token ids on which a model is measured.

The rule, which is deterministic and the same for every token set:

1. The texts are tokenized one by one with the checkpoint's own tokenizer.json (the `tokenizers`
   library, no special tokens added) and concatenated in file order with the end-of-text id
   between them. Nothing is truncated.
2. That stream is cut into consecutive chunks; the `windows` chunks used are spread evenly over it
   (chunk floor(i * chunks / windows)), so that a short measurement still sees every kind of text.
3. Where the tokenizer itself puts a beginning-of-text id before a text, every window starts with
   it and its chunk is one token shorter.

A text set too short for the windows asked for is an error, never a smaller measurement. What was
used and what there was stands in `TokenSet`, and so in every report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phiconv.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint

DEFAULT = "default"
DEFAULT_WINDOWS = 8
DEFAULT_WINDOW_LENGTH = 512


@dataclass(frozen=True)
class Text:
    """One text of a token set and the name of where it comes from."""

    source: str
    text: str


@dataclass(frozen=True)
class TokenSet:
    """Windows of token ids with the digests that identify them.

    Attributes:
        name: `default`, or the file's name.
        windows: Token ids, int64 [n, T].
        text_digest: `sha256:…` of the texts, see `text_digest`.
        ids_digest: `sha256:…` of the shape and the little-endian int64 ids of `windows`.
        sources: Names of the texts of which at least one token is in a window, in file order.
        available_tokens: Length of the stream that the windows were chosen from.
    """

    name: str
    windows: NDArray[np.int64]
    text_digest: str
    ids_digest: str
    sources: tuple[str, ...]
    available_tokens: int


def read_texts(
    spec: str | Path, *, packaged: Literal["validation", "calibration"] = "validation"
) -> list[Text]:
    """Reads the texts that `spec` names.

    Args:
        spec: `default` for the texts that ship with phiconv; else a .jsonl file with one object a
            line (`text`, and optionally `source`), or any other file as one plain UTF-8 text.
        packaged: Which of the packaged sets `default` means.

    Raises:
        RecipeError: The file is missing, is not UTF-8, or a line is not such an object; or there
            is no text in it.
    """
    if str(spec) == DEFAULT:
        file = resources.files("phiconv") / "data" / f"{packaged}.jsonl"
        return _parse_jsonl(file.read_text(encoding="utf-8"), f"{packaged}.jsonl")
    path = Path(spec)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the text file cannot be read: {error}",
            where=str(path),
            remedy=f"name a UTF-8 .jsonl or text file, or {DEFAULT!r}",
        ) from error
    texts = (
        _parse_jsonl(content, str(path)) if path.suffix == ".jsonl" else [Text(path.name, content)]
    )
    if not any(text.text for text in texts):
        raise RecipeError("the text file holds no text", where=str(path))
    return texts


def _parse_jsonl(content: str, where: str) -> list[Text]:
    texts = []
    # not splitlines(): a JSON string may hold U+2028 and its kin, which are no line ends in JSONL
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"not JSON: {error}", where=f"{where}, line {number}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise RecipeError(
                "not a JSON object with a string `text`", where=f"{where}, line {number}"
            )
        texts.append(Text(str(record.get("source", f"line {number}")), record["text"]))
    return texts


def text_digest(texts: Iterable[Text]) -> str:
    """Digest of the texts alone: `sha256:` over each one's UTF-8 length (8 bytes LE) and bytes."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return f"sha256:{digest.hexdigest()}"


def ids_digest(windows: NDArray[np.int64]) -> str:
    """Digest of windows: `sha256:` over n and T (8 bytes LE each) and the int64 LE ids."""
    digest = hashlib.sha256()
    for size in windows.shape:
        digest.update(size.to_bytes(8, "little"))
    digest.update(windows.astype("<i8").tobytes())
    return f"sha256:{digest.hexdigest()}"


def load_token_set(
    spec: str | Path,
    checkpoint: Checkpoint,
    *,
    windows: int = DEFAULT_WINDOWS,
    window_length: int = DEFAULT_WINDOW_LENGTH,
    packaged: Literal["validation", "calibration"] = "validation",
) -> TokenSet:
    """Tokenizes the texts that `spec` names into windows, by the rule in the module's docstring.

    Args:
        spec: See `read_texts`.
        checkpoint: Whose tokenizer.json, bos and eos ids are used.
        windows: How many windows.
        window_length: Tokens a window, at least 2.
        packaged: See `read_texts`.

    Returns:
        The token set; `windows` is int64 [windows, window_length].

    Raises:
        RecipeError: The texts cannot be read or are too short.
        CheckpointError: The checkpoint has no usable tokenizer.json, or an id is outside the
            model's vocabulary.
    """
    import numpy as np

    texts = read_texts(spec, packaged=packaged)
    stream, owner, prefix = _token_stream(texts, checkpoint)
    name = DEFAULT if str(spec) == DEFAULT else Path(spec).name
    chunk_length = window_length - len(prefix)
    starts = _chunk_starts(len(stream), chunk_length, windows, name)
    ids = np.empty((windows, window_length), dtype=np.int64)
    used: set[int] = set()
    for row, start in enumerate(starts):
        ids[row, : len(prefix)] = prefix
        ids[row, len(prefix) :] = stream[start : start + chunk_length]
        used.update(np.unique(owner[start : start + chunk_length]).tolist())
    vocab_size = checkpoint.config.vocab_size
    if int(ids.max()) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer gives id {int(ids.max())}, the model's vocabulary ends at {vocab_size}",
            where=str(checkpoint.path / "tokenizer.json"),
            remedy="use the tokenizer that belongs to this checkpoint",
        )
    return TokenSet(
        name=name,
        windows=ids,
        text_digest=text_digest(texts),
        ids_digest=ids_digest(ids),
        sources=tuple(texts[index].source for index in sorted(used)),
        available_tokens=len(stream),
    )


def _chunk_starts(tokens: int, chunk_length: int, windows: int, name: str) -> list[int]:
    chunks = tokens // chunk_length if chunk_length > 0 else 0
    if chunks < windows:
        raise RecipeError(
            f"token set {name!r} has {tokens} tokens: {chunks} windows of {chunk_length}, "
            f"not {windows}",
            where="windows, window_length",
            remedy="ask for fewer or shorter windows, or give a longer text",
        )
    return [chunk_length * (row * chunks // windows) for row in range(windows)]


def _token_stream(
    texts: Sequence[Text], checkpoint: Checkpoint
) -> tuple[NDArray[np.int64], NDArray[np.int32], list[int]]:
    """The ids of all texts, the index of the text each id belongs to, and a window's prefix."""
    import numpy as np

    tokenizer = _open_tokenizer(checkpoint)
    config = checkpoint.config
    separator = [config.eos_token_ids[0]] if config.eos_token_ids else []
    ids: list[int] = []
    owner: list[int] = []
    encodings = tokenizer.encode_batch([text.text for text in texts], add_special_tokens=False)
    for index, encoding in enumerate(encodings):
        document = encoding.ids + (separator if index + 1 < len(texts) else [])
        ids += document
        owner += [index] * len(document)
    with_special = tokenizer.encode("a").ids
    has_bos = config.bos_token_id is not None and with_special[:1] == [config.bos_token_id]
    prefix = with_special[:1] if has_bos else []
    return np.array(ids, dtype=np.int64), np.array(owner, dtype=np.int32), prefix


def _open_tokenizer(checkpoint: Checkpoint) -> Any:
    from tokenizers import Tokenizer

    file = checkpoint.path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            "the checkpoint has no tokenizer.json",
            where=str(checkpoint.path),
            remedy="save the tokenizer with transformers' save_pretrained of a fast tokenizer",
        )
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"not a tokenizer: {error}", where=str(file)) from error
    # a checkpoint may save the truncation and padding it was trained with; neither is ours
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
