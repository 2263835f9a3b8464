"""A model repository on the Hub: what it has, and making it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from phiconv import __version__
from phiconv.errors import RecipeError
from phiconv.push.failures import translated_failures
from phiconv.push.files import PushFile, git_blob_id

if TYPE_CHECKING:
    from huggingface_hub import HfApi

GIT_ATTRIBUTES = ".gitattributes"
"""The Hub's own file: it says which others are stored as large ones."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Target:
    """Where a release goes.

    Attributes:
        repo_id: `ORG/NAME` of a model repository.
        branch: None for the main branch.

    Raises:
        RecipeError: `repo_id` is not of that form.
    """

    repo_id: str
    branch: str | None = None

    def __post_init__(self) -> None:
        if not _REPOSITORY.fullmatch(self.repo_id):
            raise RecipeError(
                f"{self.repo_id!r} names no repository",
                where="--repo",
                remedy="give organisation or user, and name: ORG/NAME",
            )

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.branch}" if self.branch else self.repo_id


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: its size, and one digest of its content.

    Attributes:
        size: Its bytes.
        sha256: Of a large file; None for others.
        blob_id: git's id of the content, of a large file that of its pointer.
    """

    size: int
    sha256: str | None
    blob_id: str

    def holds(self, path: Path, file: PushFile) -> bool:
        """Whether its content is that of a local file."""
        if self.sha256 is not None:
            return self.sha256 == file.sha256
        return self.size == file.size and self.blob_id == git_blob_id(path)


@dataclass(frozen=True)
class Remote:
    """The repository as it is now.

    Attributes:
        state: Whether it, and its branch, are there.
        private: Whether it is private; None when it is not there.
        commit: The branch's commit; None when that is not there.
        files: The branch's files by path.
    """

    state: Literal["there", "no branch", "no repository"]
    private: bool | None = None
    commit: str | None = None
    files: Mapping[str, RemoteFile] = field(default_factory=dict)


def client() -> HfApi:
    """huggingface_hub's client; the token is the one that it finds by itself."""
    from huggingface_hub import HfApi

    return HfApi(library_name="phiconv", library_version=__version__)


def look_up(target: Target) -> Remote:
    """What the repository holds now.

    Raises:
        EnvironmentLacksError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = client()
    with translated_failures(target.repo_id):
        try:
            info = api.model_info(target.repo_id)
        except RepositoryNotFoundError:
            return Remote("no repository")
        try:
            commit = info.sha
            if target.branch is not None:
                commit = api.model_info(target.repo_id, revision=target.branch).sha
        except RevisionNotFoundError:
            return Remote("no branch", info.private)
        return Remote("there", info.private, commit, list_files(api, target.repo_id, commit))


def list_files(api: HfApi, repo_id: str, commit: str | None) -> dict[str, RemoteFile]:
    """The files of a commit by path."""
    from huggingface_hub import RepoFile

    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {
        entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def create(target: Target, remote: Remote, *, private: bool) -> Remote:
    """Makes the repository, and the branch, where they are missing.

    Raises:
        EnvironmentLacksError: The Hub cannot be reached, or refuses.
    """
    api = client()
    with translated_failures(target.repo_id):
        if remote.state == "no repository":
            api.create_repo(target.repo_id, private=private or None, exist_ok=True)
        if target.branch is not None:
            api.create_branch(target.repo_id, branch=target.branch, exist_ok=True)
    return look_up(target)
