"""Where artifacts lie, how they are found, and what lies there."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from phiconv.errors import EnvironmentLacksError
from phiconv.workspace.entry import ARTIFACT, Entry, read_manifest, verified

HOME_VARIABLE = "PHICONV_HOME"
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by phiconv; see `phiconv cache ls`.\n"


class Workspace:
    """A folder with this inside.

    - `artifacts/<kind>/<key[:2]>/<key>/`: one folder an entry: `manifest.json` and `artifact/`,
      which may lie in an output folder instead;
    - `locks/`: one lock file for each key that was ever built;
    - `sessions/`: the half-made artifacts of running processes;
    - `unfinished/<key>/`: what long steps had done when they were killed, to go on from there;
    - `digests/`: digests of checkpoint files already read.

    Args:
        home: The folder; made when a session first needs it.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    @classmethod
    def default(cls) -> Workspace:
        """`$PHICONV_HOME`, else the platform's cache folder."""
        home = os.environ.get(HOME_VARIABLE)
        if home:
            return cls(Path(home).expanduser().absolute())
        from platformdirs import user_cache_path

        return cls(user_cache_path("phiconv", appauthor=False))

    @property
    def artifacts(self) -> Path:
        """Finished artifacts."""
        return self.home / "artifacts"

    @property
    def locks(self) -> Path:
        """Lock files."""
        return self.home / "locks"

    @property
    def sessions(self) -> Path:
        """What running processes are making."""
        return self.home / "sessions"

    @property
    def unfinished(self) -> Path:
        """What killed steps can go on from."""
        return self.home / "unfinished"

    def unfinished_work(self, key: str) -> Path:
        """Where a step keeps what it has done; used under its key's lock only."""
        return self.unfinished / key

    @property
    def digests(self) -> Path:
        """The cache of checkpoint digests."""
        return self.home / "digests"

    def prepare(self) -> None:
        """Makes the folders.

        Raises:
            EnvironmentLacksError: The place cannot be written.
        """
        try:
            for folder in (
                self.artifacts,
                self.locks,
                self.sessions,
                self.unfinished,
                self.digests,
            ):
                folder.mkdir(parents=True, exist_ok=True)
            tag = self.home / "CACHEDIR.TAG"
            if not tag.exists():
                tag.write_text(_TAG, encoding="utf-8")
        except OSError as error:
            raise EnvironmentLacksError(
                f"the workspace cannot be written: {error.strerror}",
                where=str(self.home),
                remedy=f"set {HOME_VARIABLE} to a folder that you can write",
            ) from error

    def entry_folder(self, kind: str, key: str) -> Path:
        """Where the entry of a key is, or would be."""
        return self.artifacts / kind / key[:2] / key

    def artifact_path(self, kind: str, key: str) -> Path:
        """Where the artifact of a key is, or would be."""
        return self.entry_folder(kind, key) / ARTIFACT

    def lookup(self, kind: str, key: str) -> Entry | None:
        """The verified entry of a key; None when there is none that can be trusted."""
        return verified(self.entry_folder(kind, key))

    def folders(self) -> Iterator[Path]:
        """Every entry's folder, whole or not, in a fixed order."""
        yield from sorted(self.artifacts.glob("*/??/*"))

    def entries(self) -> list[Entry]:
        """Every entry with a whole manifest; its files are not looked at."""
        found = (read_manifest(folder) for folder in self.folders())
        return [entry for entry in found if entry is not None]

    @contextmanager
    def lock(self, name: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Holds the lock of a key (or another name) among all processes.

        Args:
            name: What is locked; names a file.
            on_wait: Called once when another process holds it.
        """
        lock = FileLock(self.locks / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_wait:
                on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def try_lock(self, name: str) -> Iterator[bool]:
        """Holds the lock if it is free; yields whether it is held."""
        lock = FileLock(self.locks / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def remove_tree(folder: Path) -> None:
    """Removes a folder; what another process removes meanwhile, or holds open, is let be."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        return
    # Windows removes no read-only file, other systems nothing from a read-only folder.
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            with suppress(OSError):
                path.chmod(path.stat().st_mode | stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)
