"""A process at work in the workspace: it finds entries, makes new ones, and cleans up.

A session owns `sessions/<id>/`, in which artifacts are made before they are renamed into the
store, and holds the lock `session-<id>` for as long as it lives. A folder whose lock is free
belongs to a process that was killed; the next session removes it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from phiconv.workspace.disk import flush_folder, rename
from phiconv.workspace.entry import ARTIFACT, Entry, stamp_files, write_manifest
from phiconv.workspace.store import Workspace, remove_tree


@dataclass(frozen=True)
class Session:
    """See the module; made by `open_session`.

    Attributes:
        workspace: The store.
        folder: This session's own folder.
    """

    workspace: Workspace
    folder: Path

    def lock(
        self, key: str, on_wait: Callable[[], None] | None = None
    ) -> AbstractContextManager[None]:
        """Holds a key's lock: `find`, `publish` and garbage collection are done under it."""
        return self.workspace.lock(key, on_wait)

    def find(self, kind: str, key: str) -> Entry | None:
        """The verified entry of a key, noted as in use now."""
        entry = self.workspace.lookup(kind, key)
        if entry is not None:
            entry.touch()
        return entry

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new entry folder with an empty `artifact/` in it; removed unless published."""
        folder = self.folder / uuid.uuid4().hex
        (folder / ARTIFACT).mkdir(parents=True)
        try:
            yield folder
        finally:
            remove_tree(folder)

    def publish(self, entry: Entry, digests: Mapping[str, str]) -> Entry:
        """Moves a finished artifact from its scratch folder into the store, atomically.

        Args:
            entry: Describes it; `folder` is the scratch folder, `files` is filled in here.
            digests: sha256 of files that are known already.

        Raises:
            StageError: The artifact is empty or holds a link.
            OSError: Such as a full disk; nothing is published.
        """
        entry = replace(entry, files=stamp_files(entry.path, digests))
        for folder in {path.parent for path in entry.path.rglob("*")}:
            flush_folder(folder)
        write_manifest(entry)
        final = self.workspace.entry_folder(entry.kind, entry.key)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            self.discard(final)
        rename(entry.folder, final)
        flush_folder(final.parent)
        return replace(entry, folder=final)

    def discard(self, folder: Path) -> None:
        """Takes an entry out of the store in one step, then removes it."""
        aside = self.folder / uuid.uuid4().hex
        rename(folder, aside)
        remove_tree(aside)


@contextmanager
def open_session(workspace: Workspace) -> Iterator[Session]:
    """Starts a session after sweeping up what killed ones left.

    Raises:
        EnvironmentLacksError: The workspace cannot be written.
    """
    workspace.prepare()
    sweep(workspace)
    name = uuid.uuid4().hex
    # The lock is taken before the folder exists: a folder without a held lock is always dead.
    with workspace.lock(_lock_name(name)):
        folder = workspace.sessions / name
        folder.mkdir()
        try:
            yield Session(workspace, folder)
        finally:
            remove_tree(folder)
    _forget_lock(workspace, name)


def sweep(workspace: Workspace) -> None:
    """Removes the folders of sessions that are no more."""
    for folder in workspace.sessions.iterdir():
        with workspace.try_lock(_lock_name(folder.name)) as held:
            if held:
                remove_tree(folder)
        if held:
            _forget_lock(workspace, folder.name)


def oldest_start(workspace: Workspace, but: str) -> float | None:
    """When the oldest living session other than `but` began: seconds since the epoch."""
    starts: list[float] = []
    for folder in workspace.sessions.iterdir():
        if folder.name == but:
            continue
        with workspace.try_lock(_lock_name(folder.name)) as held:
            lock_file = workspace.locks / f"{_lock_name(folder.name)}.lock"
            if not held and lock_file.exists():
                starts.append(lock_file.stat().st_mtime)
    return min(starts, default=None)


def _lock_name(session: str) -> str:
    return f"session-{session}"


def _forget_lock(workspace: Workspace, session: str) -> None:
    """Removes the lock file of a session that has ended: no other will have its name."""
    with suppress(OSError):  # on Windows a process that is just trying the lock holds it open
        (workspace.locks / f"{_lock_name(session)}.lock").unlink()
