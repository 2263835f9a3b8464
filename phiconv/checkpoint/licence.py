"""The terms a model comes under: its licence files, and what its own card says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.folder import CARD, is_licence_file, member
from phiconv.errors import CheckpointError

if TYPE_CHECKING:
    from phiconv.checkpoint.reader import Checkpoint

# What the first lines of a licence say -> its identifier, as model cards write it.
_TITLES = {"MIT License": "mit", "Apache License": "apache-2.0"}
_HEAD = 400
_CARD_KEYS = ("license", "license_name", "license_link")
_FENCE = "---"


@dataclass(frozen=True)
class ModelTerms:
    """What goes with a model whatever format it is in.

    Attributes:
        license: Identifier in lower case, such as `mit`: as the model's card has it, else by the
            first lines of its licence file.
        license_name: As the card has it, for a licence without an identifier.
        license_link: As the card has it.
        languages: As the card has them, such as `en`.
        files: Text of every licence and notice file, by its name.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def model_terms(checkpoint: Checkpoint) -> ModelTerms:
    """Reads the terms of a checkpoint; a card that cannot be read counts as none."""
    files = {name: _text(checkpoint.path / name) for name in checkpoint.files
             if is_licence_file(name)}  # fmt: skip
    card = _card(checkpoint.path)
    said = {key: card[key] for key in _CARD_KEYS if isinstance(card.get(key), str)}
    licences = (text for name, text in files.items() if not _is_notice(name))
    said.setdefault("license", next(filter(None, map(recognised_licence, licences)), None))
    language = card.get("language")
    languages = language if isinstance(language, list) else [language]
    return ModelTerms(
        **said, languages=tuple(item for item in languages if isinstance(item, str)), files=files
    )


def recognised_licence(text: str) -> str | None:
    """The identifier of a licence by its first lines; None for one that is not known."""
    head = text[:_HEAD]
    return next((name for title, name in _TITLES.items() if title in head), None)


def _is_notice(name: str) -> bool:
    return PurePosixPath(name).stem.upper() == "NOTICE"


def _text(path: Path) -> str:
    """A text as it is, line ends included; old ones may be in Latin-1."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _card(folder: Path) -> dict[str, Any]:
    """The front matter of the model's README.md; {} when there is none."""
    import yaml

    try:
        text = member(folder, CARD).read_text(encoding="utf-8")
        first, _, rest = text.partition("\n")
        front, fence, _ = rest.partition(f"\n{_FENCE}")
        found = yaml.safe_load(front) if first.strip() == _FENCE and fence else None
    except (CheckpointError, OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
