"""The tokenizer's files as they ship beside the model: the publisher's own, put straight.

ONNX Runtime GenAI 0.18 reads tokenizer.json and tokenizer_config.json, and of these less than
transformers does. What transformers would make of the checkpoint's files is written down, so that
both read the same; everything else is copied byte by byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.json_object import read_json_object
from phiconv.errors import CheckpointError

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
COPIED = (SPECIAL_TOKENS_MAP, ADDED_TOKENS, "tokenizer.model", "vocab.json", "merges.txt")

# GenAI refuses a class that it does not know, and takes any tokenizer of a Llama class for
# SentencePiece. This one it takes by tokenizer.json, as does every transformers.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class ShippedTokenizer:
    """What the rest of the artifact has to know of its tokenizer.

    Attributes:
        ids: Id of every entry and added token.
        special: Text of the special tokens, by kind: ``bos``, ``eos``, ``pad`` and others.
    """

    ids: Mapping[str, int]
    special: Mapping[str, str]

    def special_id(self, kind: str) -> int | None:
        """Id of the special token of this kind; None without one."""
        return self.ids.get(self.special.get(kind, ""))


def write_tokenizer_files(checkpoint: Checkpoint, folder: Path) -> ShippedTokenizer:
    """Write the tokenizer's files and the chat template into an existing folder.

    Raises:
        CheckpointError: There is no tokenizer.json, or a file is broken.
    """
    if TOKENIZER not in checkpoint.files:
        raise CheckpointError(
            "the checkpoint has no tokenizer.json, which ONNX Runtime GenAI reads",
            where=str(checkpoint.path),
            remedy="write it beside the weights with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    stored = _read(checkpoint, TOKENIZER_CONFIG)
    document = _read(checkpoint, TOKENIZER)
    try:
        named = _named(checkpoint, stored, document)
        changed = _changed_tokens(document, named)
        special = {kind: text for kind in _KINDS if (text := _content(named.get(f"{kind}_token")))}
        if changed:
            document = _with_tokens(checkpoint.path / TOKENIZER, changed)
        ids = _ids(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _broken(checkpoint.path / TOKENIZER, repr(error)) from error
    if changed:
        _write_json(folder / TOKENIZER, document)
    else:
        shutil.copyfile(checkpoint.path / TOKENIZER, folder / TOKENIZER)
    for name in COPIED:
        if name in checkpoint.files:
            shutil.copyfile(checkpoint.path / name, folder / name)
    _write_chat_template(checkpoint, stored, folder)
    config = {key: value for key, value in stored.items() if key != "chat_template"}
    config |= {
        "model_max_length": checkpoint.config.max_position_embeddings,
        "tokenizer_class": TOKENIZER_CLASS,
    }
    _write_json(folder / TOKENIZER_CONFIG, config)
    return ShippedTokenizer(ids, special)


def _named(
    checkpoint: Checkpoint, stored: Mapping[str, Any], document: Mapping[str, Any]
) -> dict[str, Any]:
    """tokenizer_config.json with what older files beside it say of tokens.

    They only count where the config does not list all added tokens itself.
    """
    if "added_tokens_decoder" in stored:
        return dict(stored)
    named = {**stored, **_read(checkpoint, SPECIAL_TOKENS_MAP)}
    special = {_content(token) for token in _special_tokens(named)}
    own = {token["content"] for token in document["added_tokens"]}
    named["added_tokens_decoder"] = {
        token: {"content": content, "special": content in special}
        for content, token in _read(checkpoint, ADDED_TOKENS).items()
        if content not in own
    }
    return named


def _changed_tokens(document: Mapping[str, Any], named: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens that tokenizer.json has to be given, or whose flags it has otherwise.

    `added_tokens_decoder` of tokenizer_config.json has the last word in transformers, and a special
    token that is named there is added where it is missing. GenAI looks at tokenizer.json alone.
    """
    known = {token["content"]: _flagged(token) for token in document["added_tokens"]}
    listed = sorted(named["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
    changed = [
        token
        for token in (_flagged(entry) for _, entry in listed)
        if known.get(token["content"]) != token
    ]
    contents = {*known, *(token["content"] for token in changed)}
    for entry in _special_tokens(named):
        content = _content(entry)
        if content and content not in contents:
            flags = entry if isinstance(entry, dict) else {"content": content}
            changed.append(_flagged({**flags, "special": True}))
            contents.add(content)
    return changed


def _special_tokens(named: Mapping[str, Any]) -> Iterator[Any]:
    """Special tokens by role, those of a role that only this model has, and those without one."""
    yield from (named.get(f"{kind}_token") for kind in _KINDS)
    yield from (token for key, token in named.items() if key.endswith("_token"))
    for key in _LISTS:
        tokens = named.get(key) or ()
        yield from tokens.values() if isinstance(tokens, dict) else tokens


def _flagged(token: Mapping[str, Any]) -> dict[str, Any]:
    """Content and flags of an added token, with the defaults of Hugging Face's `AddedToken`."""
    special = bool(token.get("special", False))
    default = {"normalized": not special, "special": special}
    flags = {flag: bool(token.get(flag, default.get(flag, False))) for flag in _FLAGS}
    return {"content": str(token["content"]), **flags}


def _with_tokens(file: Path, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """tokenizer.json with these tokens added or changed, by the library that transformers uses."""
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise _broken(file, str(error)) from error
    tokenizer.add_tokens([AddedToken(**token) for token in tokens])
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


def _broken(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"not a tokenizer: {why}",
        where=str(file),
        remedy="download or copy the checkpoint's tokenizer files again",
    )


def _write_chat_template(checkpoint: Checkpoint, stored: Mapping[str, Any], folder: Path) -> None:
    """The one template that transformers would use, in a file of its own.

    GenAI takes a template in tokenizer_config.json for more than the file, transformers the other
    way round; and of several named ones GenAI can read none.
    """
    if CHAT_TEMPLATE in checkpoint.files:
        shutil.copyfile(checkpoint.path / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
        return
    template = stored.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        by_name = {entry.get("name"): entry.get("template") for entry in entries}
        template = by_name.get("default")
    if isinstance(template, str):
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8", newline="")


def _ids(document: Mapping[str, Any]) -> dict[str, int]:
    ids = {str(text): int(token) for text, token in document["model"]["vocab"].items()}
    return ids | {token["content"]: int(token["id"]) for token in document["added_tokens"]}


def _content(token: Any) -> str | None:
    """The text of a token, which may stand with its flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    return read_json_object(checkpoint.path / name) if name in checkpoint.files else {}


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", newline="\n")
