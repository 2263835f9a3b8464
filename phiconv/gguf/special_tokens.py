"""Which tokens begin, end and pad a text, what ends a chat turn, and how a chat is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.json_object import read_json_object
from phiconv.errors import CheckpointError
from phiconv.gguf.tokenizer_file import TOKENIZER, AddedToken, TokenizerFile

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_DEFAULT = "default"
_ANSWER = "phiconv-answer"


@dataclass(frozen=True)
class SpecialTokens:
    """What `tokenizer.ggml.*` says besides the vocabulary.

    Attributes:
        ids: `bos`, `eos`, `eot` and so on to the id, of those that there are.
        add_bos: Whether a text is read as if the `bos` token stood before it.
        add_eos: Whether it is read as if the `eos` token stood after it.
        chat_template: The Jinja template.
        more_templates: Templates for other uses, by name.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    more_templates: Mapping[str, str] = field(default_factory=dict)


def read_special_tokens(checkpoint: Checkpoint, file: TokenizerFile) -> SpecialTokens:
    """Reads them from tokenizer_config.json, config.json, tokenizer.json and the template's file.

    `eos` is what the tokenizer says. Where the chat template ends an answer with another token,
    that is `eot`, at which llama.cpp stops as well.

    Raises:
        CheckpointError: One of the files is broken.
    """
    config = _tokenizer_config(checkpoint.path)
    ids = _ids(config, checkpoint.raw_config, file.added)
    first, last = _put_around(checkpoint.path / TOKENIZER)
    templates = _chat_templates(checkpoint.path, config)
    template = templates.pop(_DEFAULT, None)
    turn_end = _turn_end(template, config, file.added)
    if turn_end is not None and turn_end not in (ids.get("eos"), ids.get("eot")):
        ids["eot"] = turn_end
    return SpecialTokens(
        ids=ids,
        add_bos=_flag(config, "add_bos_token", first is not None and first == ids.get("bos")),
        add_eos=_flag(config, "add_eos_token", last is not None and last == ids.get("eos")),
        chat_template=template,
        more_templates=templates,
    )


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json_object(path) if path.is_file() else {}


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    return value if isinstance(value, bool) else default


def _ids(
    tokenizer_config: Mapping[str, Any], config: Mapping[str, Any], added: Iterable[AddedToken]
) -> dict[str, int]:
    """By name from the tokenizer's config, else by id from the model's."""
    known = {token.content: token.id for token in added}
    ids = {}
    for kind in _KINDS:
        content = _content(tokenizer_config.get(f"{kind}_token"))
        if content in known:
            ids[kind] = known[content]
    for kind in _KINDS:
        token = config.get(f"{kind}_token_id")
        if kind not in ids and isinstance(token, int):
            ids[kind] = token
    return ids


def _content(entry: Any) -> str | None:
    value = entry.get("content") if isinstance(entry, dict) else entry
    return value if isinstance(value, str) else None


def _put_around(path: Path) -> tuple[int | None, int | None]:
    """The tokens that the tokenizer puts before and after a text of its own accord."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"not a tokenizer: {error}", where=str(path)) from error
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a").ids
    extra = len(ids) - len(alone)
    before = next((n for n in range(extra + 1) if ids[n : n + len(alone)] == alone), 0)
    return (ids[0] if before else None), (ids[-1] if extra > before else None)


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """As transformers looks for them: a file of its own goes before tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return {_DEFAULT: path.read_text(encoding="utf-8")}
    path = folder / "chat_template.json"
    found = read_json_object(path).get("chat_template") if path.is_file() else None
    found = found or config.get("chat_template")
    if isinstance(found, str):
        return {_DEFAULT: found}
    several = found if isinstance(found, list) else []
    return {str(item["name"]): str(item["template"]) for item in several if _is_named(item)}


def _is_named(item: Any) -> bool:
    return isinstance(item, dict) and item.keys() >= {"name", "template"}


def _turn_end(
    template: str | None,
    config: Mapping[str, Any],
    added: Iterable[AddedToken],
) -> int | None:
    """The added token that the template writes after an answer; None if it writes none."""
    if template is None:
        return None
    text = _rendered(template, config)
    after = text.rpartition(_ANSWER)[2].lstrip()
    found = [token for token in added if _ANSWER in text and after.startswith(token.content)]
    return max(found, key=lambda token: len(token.content)).id if found else None


def _rendered(template: str, config: Mapping[str, Any]) -> str:
    """A question and an answer, written as transformers would; empty when the template refuses."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": _ANSWER},
    ]
    tokens = {f"{kind}_token": _content(config.get(f"{kind}_token")) or "" for kind in _KINDS}
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=False, **tokens
        )
    # a template is code from the checkpoint: it may fail in any of these ways
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
        return ""
