"""The output folder: `artifact/`, `report/` and `manifest.json`, replaced as a whole.

New content is made beside the old and renamed into place, the manifest last. A kill in between
leaves a part missing, never half a part, and the next build puts it right: the journal that lies
there meanwhile says which files are phiconv's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from phiconv.errors import EnvironmentLacksError, PhiconvError, RecipeError, StageError
from phiconv.recipe.model import names_device
from phiconv.stages.stage import JSON
from phiconv.workspace import Entry, Session
from phiconv.workspace.disk import existing_parent, flush_file, flush_folder, rename
from phiconv.workspace.entry import unchanged
from phiconv.workspace.lending import lend, may_lend, reclaim, take_back
from phiconv.workspace.store import remove_tree

ARTIFACT, REPORT, MANIFEST = "artifact", "report", "manifest.json"
MANIFEST_VERSION = 1
_JOURNAL = ".phiconv-publish.json"
_NEW, _OLD = ".phiconv-new", ".phiconv-old"
_OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}
_DEVICES_HAVE_NAMES = os.name == "nt"
_FICLONE = 0x40049409  # linux/fs.h


def publish(
    out: Path,
    entry: Entry,
    write_report: Callable[[Path], None],
    manifest: Mapping[str, JSON],
    session: Session,
    *,
    lendable: bool = True,
) -> None:
    """Puts an artifact and its report into an output folder.

    Where the very same build stands already it is let be, with the report of when it was made.
    The artifact is moved there, lent by the store, where that is possible; see
    phiconv/workspace/lending.py.

    Args:
        out: The folder; made if need be.
        entry: The shipped artifact.
        write_report: Writes the report's files into the folder it is given.
        manifest: What manifest.json says besides the files.
        session: The workspace, whose locks keep two builds from one folder and one artifact.
        lendable: Whether the artifact may leave the store; not while this session needs it.

    Raises:
        RecipeError: The folder holds files there that are not phiconv's.
        StageError: A file there cannot be replaced because it is in use, or the artifact, which
            lay in an output folder, was changed there since the build found it.
        OSError: Such as a full disk; what stood there stands.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.path.normcase(out.resolve()).encode()).hexdigest()
    with session.workspace.lock(f"out-{name}"):
        check_destination(out)
        document = {"phiconv": MANIFEST_VERSION, **manifest, ARTIFACT: _listed(entry)}
        if _stands(out, entry, document):
            return
        _clear(out, session)
        new = out / _NEW
        try:
            _prepare(new, write_report, document)
            with session.lock(entry.key):
                _replace(out, new, entry, session, lendable=lendable)
        finally:
            remove_tree(new)
        remove_tree(out / _OLD)
        (out / _JOURNAL).unlink()


def _replace(out: Path, new: Path, entry: Entry, session: Session, *, lendable: bool) -> None:
    """Puts what `_prepare` made and the artifact in the place of what stands."""
    place = _place(out)
    artifact = _artifact(new, entry, session, place, lendable=lendable)
    owned = sorted(_owned(out) | _names_in(_read_json(new / MANIFEST)))
    _write_json(out / _JOURNAL, {"phiconv": MANIFEST_VERSION, "owned": owned})
    _swap(out, new, artifact)
    reclaim(session.workspace, place, out / _OLD / ARTIFACT)


def _place(out: Path) -> Path:
    """Where the artifact goes, as lent entries name it."""
    return out.resolve() / ARTIFACT


def _artifact(
    new: Path, entry: Entry, session: Session, place: Path, *, lendable: bool
) -> Path | None:
    """The folder to move to `place`; None when what stands there is to stay."""
    found = session.workspace.lookup(entry.kind, entry.key)
    if found is not None and found.path == place:
        return None
    found = found and take_back(session, found)
    if found is None:
        raise StageError(
            "the artifact, which lay in an output folder, was changed or removed there",
            where=str(entry.path),
            remedy="build again: it will be made anew",
        )
    target = new / ARTIFACT
    target.mkdir()
    if not _reflink_all(found, target):
        if lendable and may_lend(session, found, new):
            return lend(found, place).folder / ARTIFACT
        for name in found.files:
            place_file(found.path / name, _with_parents(target / name))
    for path in _files(target):
        flush_file(path)
    return target


def _listed(entry: Entry) -> dict[str, JSON]:
    return {
        name: {"sha256": stamp.sha256, "size": stamp.size}
        for name, stamp in sorted(entry.files.items())
    }


def _stands(out: Path, entry: Entry, document: Mapping[str, Any]) -> bool:
    """Whether `out` holds this very build; files are trusted as those of the store are."""
    found = _read_json(out / MANIFEST)
    report = found.pop(REPORT, None)
    if found != document or not report or (out / _JOURNAL).exists():
        return False
    return unchanged(entry.files, out / ARTIFACT) and all(
        (out / REPORT / name).is_file() for name in report
    )


def check_destination(out: Path) -> None:
    """Makes sure that a build's output can be written and nothing in its way is the user's.

    Raises:
        RecipeError: A file is in the way, of a folder or of phiconv's, or on Windows the name is a
            device's; nothing was touched.
        EnvironmentLacksError: The folder cannot be written.
    """
    if _DEVICES_HAVE_NAMES and any(map(names_device, out.parts)):
        raise RecipeError(
            "Windows keeps the name for a device",
            where=str(out),
            remedy="choose another folder with --out",
        )
    parent = existing_parent(out)
    if not parent.is_dir():
        raise RecipeError(
            f"{parent} is a file", where=str(out), remedy="choose another folder with --out"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise EnvironmentLacksError(
            "the output folder cannot be written",
            where=str(parent),
            remedy="choose another with --out, or let this user write there",
        )
    strangers = _strangers(out)
    if strangers:
        shown = ", ".join(strangers[:3]) + (", …" if len(strangers) > 3 else "")
        raise RecipeError(
            f"the output folder holds files that phiconv did not put there: {shown}",
            where=str(out),
            remedy="move them away, or choose another folder with --out",
        )


def _strangers(out: Path) -> list[str]:
    if out.exists() and not out.is_dir():
        return [out.name]
    owned = _owned(out)
    found = [str(name) for name in (ARTIFACT, REPORT) if (out / name).is_symlink()]
    manifest = out / MANIFEST
    if manifest.exists() and not _read_json(manifest):
        found.append(MANIFEST)
    for part in (ARTIFACT, REPORT):
        if (out / part).is_file():
            found.append(part)
        for path in _files(out / part):
            name = path.relative_to(out).as_posix()
            if name not in owned and path.name not in _OF_THE_SYSTEM:
                found.append(name)
    return found


def _owned(out: Path) -> set[str]:
    """The files below `out` that a manifest or a journal calls phiconv's."""
    journal = _read_json(out / _JOURNAL).get("owned", [])
    return _names_in(_read_json(out / MANIFEST)) | set(journal)


def _names_in(manifest: Mapping[str, Any]) -> set[str]:
    return {
        f"{part}/{name}"
        for part in (ARTIFACT, REPORT)
        for name in (manifest.get(part) or ())
        if isinstance(name, str)
    }


def _read_json(path: Path) -> dict[str, Any]:
    """A file of phiconv's; {} when it is not there or not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) and "phiconv" in document else {}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
    flush_file(path)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())


def _clear(out: Path, session: Session) -> None:
    """Removes what a killed build left; nobody else writes here while the lock is held."""
    reclaim(session.workspace, _place(out), out / _OLD / ARTIFACT)
    for name in (_NEW, _OLD):
        remove_tree(out / name)


def _prepare(new: Path, write_report: Callable[[Path], None], document: Mapping[str, Any]) -> None:
    (new / REPORT).mkdir(parents=True)
    write_report(new / REPORT)
    for path in _files(new):
        flush_file(path)
    report = [path.relative_to(new / REPORT).as_posix() for path in _files(new / REPORT)]
    _write_json(new / MANIFEST, {**document, REPORT: report})


def _with_parents(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _reflink_all(entry: Entry, target: Path) -> bool:
    """Shares the blocks of every file, or of none."""
    for name in entry.files:
        copy = _with_parents(target / name)
        if not _reflink(entry.path / name, copy):
            return False
        shutil.copystat(entry.path / name, copy)
    return True


def place_file(source: Path, target: Path) -> None:
    """Copies a file, sharing its blocks where the file system can (a reflink).

    Never a hard link: onnx and onnx_ir refuse external data that has two names. The time of
    modification is the source's.
    """
    if not _reflink(source, target):
        shutil.copyfile(source, target)
    shutil.copystat(source, target)


def _reflink(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        with source.open("rb") as read, target.open("wb") as write:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


def _swap(out: Path, new: Path, artifact: Path | None) -> None:
    """Moves the old content aside and the new into place, the manifests first and last."""
    old = out / _OLD
    old.mkdir()
    done: list[tuple[Path, Path]] = []
    kept = {ARTIFACT} if artifact is None else set()
    moves = [(out / name, old / name) for name in (MANIFEST, ARTIFACT, REPORT) if name not in kept]
    moves += [] if artifact is None else [(artifact, out / ARTIFACT)]
    moves += [(new / name, out / name) for name in (REPORT, MANIFEST)]
    try:
        for source, target in moves:
            if source.exists():
                rename(source, target)
                done.append((source, target))
        flush_folder(out)
    except OSError as error:
        for source, target in reversed(done):
            with suppress(OSError):
                rename(target, source)
        (out / _JOURNAL).unlink()
        raise _in_use(error) from error


def _in_use(error: OSError) -> PhiconvError:
    return StageError(
        f"the old output cannot be replaced: {error.strerror}",
        where=str(error.filename),
        remedy="close the programs that use it, then build again: nothing has to be recomputed",
    )
