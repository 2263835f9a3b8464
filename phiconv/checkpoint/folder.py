"""The folder of a checkpoint: which of its files count, and that none leads out of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from phiconv.errors import CheckpointError

CONFIG = "config.json"
CARD = "README.md"
"""The model's card: shapes no artifact and is no part of a checkpoint's digest."""

_SHAPING_FILES = frozenset(
    {
        CONFIG,
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    }
)
_LICENCE_STEMS = frozenset({"LICENSE", "LICENCE", "NOTICE", "COPYING"})
_LICENCE_SUFFIXES = frozenset({"", ".txt", ".md"})

SHAPING_PATTERNS = tuple(sorted(_SHAPING_FILES | {f"{stem}*" for stem in _LICENCE_STEMS}))
"""Shell patterns that match what `is_shaping_file` accepts, and little else."""


def is_shaping_file(name: str) -> bool:
    """Whether a file beside the weights shapes or accompanies what phiconv writes."""
    return name in _SHAPING_FILES or is_licence_file(name)


def is_licence_file(name: str) -> bool:
    """Whether a file holds a licence or a notice that goes with the model."""
    path = PurePosixPath(name)
    return path.stem.upper() in _LICENCE_STEMS and path.suffix.lower() in _LICENCE_SUFFIXES


def shaping_files(names: Iterable[str]) -> tuple[str, ...]:
    """Of `names`, the configs, tokenizer files, chat templates and licences, sorted."""
    return tuple(sorted(name for name in names if is_shaping_file(name)))


def member(folder: Path, name: str) -> Path:
    """The path of a file of the checkpoint, which must not lie outside its folder.

    A symbolic link may lead out of a snapshot of the Hugging Face cache into the blobs of that
    cache, where its files are stored; nowhere else.

    Args:
        folder: The checkpoint's folder.
        name: The file's name, relative to it, with forward slashes.

    Raises:
        CheckpointError: The name or a link leads out of the folder, or there is no such file.
    """
    if not is_relative_name(name):
        raise _leaves(folder, name)
    path = folder / name
    try:
        target = path.resolve(strict=True)
        root = folder.resolve(strict=True)
    # a chain of links can be circular (RuntimeError before Python 3.13)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{name} is missing", where=str(folder), remedy="download or copy it again"
        ) from error
    if not any(target.is_relative_to(place) for place in (root, *_cache_blobs(root))):
        raise _leaves(folder, name)
    if not target.is_file():
        raise CheckpointError(f"{name} is not a file", where=str(folder))
    return path


def is_relative_name(name: str) -> bool:
    """Whether a name stays below its folder on every platform."""
    windows = PureWindowsPath(name)
    if not name or "\0" in name or windows.drive or windows.root:
        return False
    return ".." not in windows.parts and name != "."


def _cache_blobs(root: Path) -> tuple[Path, ...]:
    """Where the links of a Hugging Face cache snapshot, or of a folder in one, lead.

    A snapshot is `<cache>/models--<org>--<name>/snapshots/<commit>`; its blobs are that
    repository's own and, since huggingface_hub 2, the store that all repositories share.
    """
    for snapshots in root.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs", repository.parent / "blobs"
    return ()


def _leaves(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{name!r} leads out of the checkpoint's folder",
        where=str(folder),
        remedy="put the file itself into the folder",
    )
