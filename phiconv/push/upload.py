"""What a push would do, and doing it.

huggingface_hub's `upload_folder` uploads the files and then commits them, a release of up to 250
files in one commit: an interrupted upload changes nothing in the repository. Called again it goes
on: the server says which data it has. (Up to huggingface_hub 1 that was `upload_large_folder`,
which kept its state in the folder.)
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from phiconv import __version__
from phiconv.errors import EnvironmentLacksError, RecipeError, StageError
from phiconv.push import failures
from phiconv.push.files import PushFile, release_files
from phiconv.push.repository import (
    GIT_ATTRIBUTES,
    Remote,
    Target,
    client,
    create,
    list_files,
    look_up,
)

State: TypeAlias = Literal["new", "changed", "same"]


@dataclass(frozen=True)
class PushPlan:
    """What a push would do.

    Attributes:
        folder: The release.
        target: Where it goes.
        remote: What is there now.
        files: What the release has, and whether the repository has it already.
        others: Files that only the repository has.
    """

    folder: Path
    target: Target
    remote: Remote
    files: tuple[tuple[PushFile, State], ...]
    others: tuple[str, ...]

    @property
    def to_upload(self) -> tuple[PushFile, ...]:
        """The files that the repository does not have as they are."""
        return tuple(file for file, state in self.files if state != "same")

    @property
    def upload_bytes(self) -> int:
        """The size of `to_upload`."""
        return sum(file.size for file in self.to_upload)


@dataclass(frozen=True)
class Pushed:
    """A finished push.

    Attributes:
        url: Where to look at it: the commit, or the pull request.
        commit: The commit that has the release.
        new: Whether this push made it.
    """

    url: str
    commit: str
    new: bool


def plan_push(folder: Path, target: Target) -> PushPlan:
    """Compares a release with what the repository has.

    Args:
        folder: A release that has been verified.
        target: Where it goes.

    Raises:
        RecipeError: The folder is no release.
        EnvironmentLacksError: The Hub may not be used, cannot be reached, or refuses.
    """
    from huggingface_hub import constants

    files = release_files(folder)
    if constants.HF_HUB_OFFLINE:
        raise failures.offline(target.repo_id)
    return _compared(folder, target, look_up(target), files)


def _compared(
    folder: Path, target: Target, remote: Remote, files: tuple[PushFile, ...]
) -> PushPlan:
    def state(file: PushFile) -> State:
        there = remote.files.get(file.name)
        if there is None:
            return "new"
        return "same" if there.holds(folder / file.name, file) else "changed"

    names = {file.name for file in files} | {GIT_ATTRIBUTES}
    others = tuple(sorted(remote.files.keys() - names))
    return PushPlan(folder, target, remote, tuple((file, state(file)) for file in files), others)


def push(
    plan: PushPlan,
    *,
    make: bool = False,
    private: bool = False,
    pull_request: bool = False,
    delete_others: bool = False,
    message: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Uploads a release, and compares what is then there with it.

    Args:
        plan: What `plan_push` found.
        make: Make the repository or branch where it is missing.
        private: A repository that is made is private; one that is there must be.
        pull_request: Open a pull request instead of committing to the branch.
        delete_others: Delete the files that only the repository has.
        message: The commit's message.
        note: Told what is being done.

    Raises:
        RecipeError: A public repository is there, and it was to be private.
        EnvironmentLacksError: There is no token, no repository, or no right to write; or the
            upload broke off.
        StageError: What is then in the repository is not the release.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise failures.no_token(plan.target.repo_id)
    if private and plan.remote.private is False:
        raise RecipeError(
            "the repository is there already, and it is public",
            where=plan.target.repo_id,
            remedy="make it private on the Hub, or leave --private out",
        )
    if plan.remote.state != "there":
        if not make:
            raise _missing(plan)
        note(f"making {plan.target}")
        remote = create(plan.target, plan.remote, private=private)
        plan = _compared(plan.folder, plan.target, remote, tuple(file for file, _ in plan.files))
    if not plan.to_upload and not (delete_others and plan.others):
        commit = str(plan.remote.commit)
        url = f"{client().endpoint}/{plan.target.repo_id}/commit/{commit}"
        return Pushed(url, commit, new=False)
    return _upload(
        plan, pull_request, delete_others, message or f"Release by phiconv {__version__}"
    )


def _missing(plan: PushPlan) -> EnvironmentLacksError:
    if plan.remote.state == "no branch":
        message = f"the repository has no branch {plan.target.branch!r}"
    else:
        message = "there is no such repository, or the token may not see it"
    remedy = "check the name and `hf auth whoami`, or make it with --create"
    return EnvironmentLacksError(message, where=plan.target.repo_id, remedy=remedy)


def _upload(plan: PushPlan, pull_request: bool, delete_others: bool, message: str) -> Pushed:
    api, target = client(), plan.target
    with failures.translated_failures(target.repo_id):
        done = api.upload_folder(
            repo_id=target.repo_id,
            folder_path=plan.folder,
            revision=target.branch,
            allow_patterns=[glob.escape(file.name) for file, _ in plan.files],
            delete_patterns="*" if delete_others and plan.others else None,
            create_pr=pull_request,
            # somebody else's commit in between must not be overwritten
            parent_commit=None if pull_request else plan.remote.commit,
            commit_message=message,
        )
        commit = str(done.oid)
        remote = Remote("there", commit=commit, files=list_files(api, target.repo_id, commit))
    files = tuple(file for file, _ in plan.files)
    left = _compared(plan.folder, target, remote, files).to_upload
    if left:
        raise StageError(
            f"{len(left)} files of the repository are not those of the release, such as "
            f"{left[0].name}",
            where=f"{target.repo_id}@{commit}",
            remedy="somebody changed them meanwhile; push again",
        )
    return Pushed(str(done.pr_url or done.commit_url), commit, commit != plan.remote.commit)
