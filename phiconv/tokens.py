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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.errors import CheckpointError, RecipeError
from phiconv.resources import importing_alone
from phiconv.texts import DEFAULT as DEFAULT
from phiconv.texts import Packaged, Text
from phiconv.texts import read_texts as read_texts
from phiconv.texts import text_digest as text_digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint

DEFAULT_WINDOWS = 8
DEFAULT_WINDOW_LENGTH = 512


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
    packaged: Packaged = "validation",
    chat: bool = False,
) -> TokenSet:
    """Tokenizes the texts that `spec` names into windows, by the rule in the module's docstring.

    Args:
        spec: See `read_texts`.
        checkpoint: Whose tokenizer.json, bos and eos ids are used.
        windows: How many windows.
        window_length: Tokens a window, at least 2.
        packaged: See `read_texts`.
        chat: Whether each text is put into the checkpoint's chat template, as the user's message;
            conversations always need it.

    Returns:
        The token set; `windows` is int64 [windows, window_length].

    Raises:
        RecipeError: The texts cannot be read or are too short.
        CheckpointError: The checkpoint has no usable tokenizer.json, or an id is outside the
            model's vocabulary.
    """
    import numpy as np

    texts = read_texts(spec, packaged=packaged)
    written = _in_chat_template(texts, checkpoint) if chat else _plain(texts, str(spec))
    stream, owner, prefix = _token_stream(written, checkpoint)
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


def _plain(texts: Sequence[Text], where: str) -> Sequence[Text]:
    if any(text.messages is not None for text in texts):
        raise RecipeError(
            "there are conversations among the texts",
            where=where,
            remedy="set chat: true where the stage takes it, or give plain texts",
        )
    return texts


def _in_chat_template(texts: Sequence[Text], checkpoint: Checkpoint) -> list[Text]:
    """The texts as the checkpoint's own chat template writes them; no code in it is ever run."""
    where = str(checkpoint.path)
    try:
        with importing_alone():  # it imports the tokenizer's class only when it is asked for
            from transformers import AutoTokenizer

            tokenizer: Any = AutoTokenizer.from_pretrained(
                where, trust_remote_code=False, local_files_only=True
            )
        if not tokenizer.chat_template:
            raise CheckpointError(
                "the checkpoint has no chat template", where=where, remedy="set chat: false"
            )
        return [
            replace(text, text=tokenizer.apply_chat_template(_messages(text), tokenize=False))
            for text in texts
        ]
    except CheckpointError:
        raise
    except Exception as error:  # transformers and jinja2 raise nothing narrower in common
        raise CheckpointError(
            f"the chat template cannot be applied: {error}", where=where
        ) from error


def _messages(text: Text) -> list[dict[str, str]]:
    messages = text.messages if text.messages is not None else (("user", text.text),)
    return [{"role": role, "content": content} for role, content in messages]


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
