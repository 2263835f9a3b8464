"""Finds the checkpoint that a recipe names: a folder, or a model on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import PureWindowsPath

from phiconv.checkpoint.adapter import refuse_adapter
from phiconv.checkpoint.config import ModelConfig
from phiconv.checkpoint.digests import DigestCache, OnBytes
from phiconv.checkpoint.folder import CONFIG
from phiconv.checkpoint.hub import fetch_metadata, fetch_weights
from phiconv.checkpoint.reader import Checkpoint, read_config
from phiconv.errors import EnvironmentLacksError, RecipeError


def resolve(
    source: str,
    revision: str | None = None,
    digest_cache: DigestCache | None = None,
    *,
    download: bool = True,
    on_bytes: OnBytes | None = None,
) -> Checkpoint:
    """Opens the checkpoint that `source` names, downloading it when it is a Hub id.

    An existing folder goes before a Hub id of the same spelling. A branch or tag is pinned to the
    commit it stands for now, which is the checkpoint's `revision`. An unsupported model is
    refused before its weights are downloaded.

    Args:
        source: A folder, or an id such as "microsoft/Phi-3-mini-4k-instruct".
        revision: A branch, tag or commit of the Hub repository; by default its main branch.
        digest_cache: Where digests of the files are looked up and kept.
        download: False uses what is in the Hugging Face cache already.
        on_bytes: Called, from any thread, with counts of bytes downloaded.

    Raises:
        RecipeError: `source` is neither, or a revision is given for a folder.
        CheckpointError: The checkpoint is incomplete, broken or unsupported.
        EnvironmentLacksError: The folder or model does not exist, or cannot be downloaded.
    """
    if not source:
        raise RecipeError(
            "the model's source is empty",
            where="model.source",
            remedy="give a folder, or an id such as microsoft/Phi-3-mini-4k-instruct",
        )
    # unlike those of Path, these raise nothing for a path that cannot exist
    folder = os.path.expanduser(source)  # noqa: PTH111
    if os.path.isdir(folder):  # noqa: PTH112
        if revision is not None:
            raise RecipeError(
                f"a revision belongs to a model on the Hub, but '{source}' is a folder here",
                where="model.revision",
                remedy="leave the revision out, or rename the folder",
            )
        return Checkpoint(folder, source=source, digest_cache=digest_cache)
    _refuse_path(source, folder)
    snapshot = fetch_metadata(source, revision, download=download)
    refuse_adapter(snapshot.path)
    ModelConfig.from_dict(read_config(snapshot.path), str(snapshot.path / CONFIG))
    fetch_weights(snapshot, download=download, on_bytes=on_bytes)
    return Checkpoint(
        snapshot.path, source=source, revision=snapshot.commit, digest_cache=digest_cache
    )


def looks_like_path(source: str) -> bool:
    """Whether `source` can only be meant as a path, not as a Hub id."""
    windows = PureWindowsPath(source)
    return (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or bool(windows.drive)
        or source.count("/") > 1
        or source.endswith("/")
    )


def _refuse_path(source: str, folder: str) -> None:
    if os.path.exists(folder):  # noqa: PTH110
        raise RecipeError(
            f"'{source}' is a file; a checkpoint is a folder",
            where="model.source",
            remedy="give the folder that holds config.json and the safetensors files",
        )
    if "://" in source:
        raise RecipeError(
            f"'{source}' is a URL",
            where="model.source",
            remedy="give the model's id, such as microsoft/Phi-3-mini-4k-instruct",
        )
    if looks_like_path(source):
        raise EnvironmentLacksError(
            f"there is no folder '{source}'",
            where="model.source",
            remedy="check the path; it is relative to the current folder",
        )
