"""Writes a release beside its place and renames it there as a whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from phiconv.errors import PhiconvError, RecipeError, StageError
from phiconv.index import INDEX, write_index
from phiconv.publish import ARTIFACT, REPORT, place_file
from phiconv.release.card import card_markdown
from phiconv.release.output import raise_all
from phiconv.release.plan import Item, ReleasePlan
from phiconv.release.provenance import statement_json
from phiconv.release.sbom import cyclonedx_json
from phiconv.report import REPORT_HTML
from phiconv.verify.documents import CARD, PROVENANCE, REPORTS, SBOM
from phiconv.verify.folder import verify
from phiconv.verify.listing import list_folder
from phiconv.verify.sums import SUMS, parse_sums, render_sums
from phiconv.workspace import Workspace
from phiconv.workspace.disk import disk_full, flush_file, flush_folder, rename
from phiconv.workspace.entry import sha256_file
from phiconv.workspace.store import remove_tree

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Released:
    """A release that was made.

    Attributes:
        plan: What it holds.
        path: Where it is.
        files: How many files it has.
        size_bytes: Their size.
    """

    plan: ReleasePlan
    path: Path
    files: int
    size_bytes: int


def assemble(
    plan: ReleasePlan,
    to: Path,
    workspace: Workspace,
    *,
    threads: int = 1,
    on_bytes: OnBytes | None = None,
) -> Released:
    """Makes a release; what stood there stands until the new one is whole and verified.

    Args:
        plan: What it holds.
        to: The folder; a release that stands there is replaced.
        workspace: Gives the lock that keeps two processes from one folder.
        threads: How many files are copied at a time.
        on_bytes: Called with counts of bytes copied.

    Raises:
        RecipeError: The folder holds files that are of no release, or a card that was edited.
        StageError: A file of an output is damaged, or the release did not verify.
        EnvironmentLacksError: The disk is full.
    """
    place = to.absolute()
    workspace.prepare()
    name = hashlib.sha256(os.path.normcase(place).encode()).hexdigest()
    with workspace.lock(f"out-{name}"):
        check_place(place)
        new, old = (place.with_name(f".{place.name}.phiconv-{part}") for part in ("new", "old"))
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_tree(new)
        try:
            _write(plan, new, threads, on_bytes)
            _check(new, threads)
            _swap(new, place, old)
        except OSError as error:
            raise disk_full(error, place.parent, _size(plan)) or error from error
        finally:
            remove_tree(new)
        remove_tree(old)
    sizes = list_folder(place).sizes
    return Released(plan, to, len(sizes), sum(sizes.values()))


def check_place(place: Path) -> None:
    """Makes sure that a new release destroys nothing but an old one.

    Raises:
        RecipeError: Something else is there; nothing was touched.
    """
    if not place.exists() and not place.is_symlink():
        return
    if place.is_symlink() or not place.is_dir():
        raise RecipeError(f"{place.name} is no folder", where=str(place), remedy=_ELSEWHERE)
    names = {path.relative_to(place).as_posix() for path in place.rglob("*")
             if path.is_symlink() or not path.is_dir()}  # fmt: skip
    listed: Mapping[str, str] = {}
    if (place / SUMS).is_file():
        listed, _ = parse_sums((place / SUMS).read_bytes())
    strangers = sorted(names - {*listed, SUMS})
    if strangers:
        shown = ", ".join(strangers[:3]) + (", …" if len(strangers) > 3 else "")
        raise RecipeError(
            f"the folder holds files that are of no release: {shown}",
            where=str(place),
            remedy=_ELSEWHERE,
        )
    if CARD in names and sha256_file(place / CARD) != listed.get(CARD):
        raise RecipeError(
            f"{CARD} was edited since the release was made",
            where=str(place),
            remedy="move it away, then release again and edit the new one",
        )


_ELSEWHERE = "move them away, or choose another folder with --to"


def _write(plan: ReleasePlan, new: Path, threads: int, on_bytes: OnBytes | None) -> None:
    new.mkdir()
    digests = _copy_artifacts(plan, new, threads, on_bytes)
    for name, text in sorted(plan.terms.files.items()):
        _write_text(new / name, text)
    for item in plan.items:
        for name in item.output.reports:
            target = new / item.reports / name
            target.parent.mkdir(parents=True, exist_ok=True)
            place_file(item.output.folder / REPORT / name, target)
    pages = {new / item.reports / REPORT_HTML: item.output.result for item in plan.items}
    write_index(new / REPORTS / INDEX, pages)
    _write_text(new / CARD, card_markdown(plan))
    rest = [name for name in list_folder(new).sizes if name not in digests]
    digests |= {name: sha256_file(new / name) for name in rest}
    digests = dict(sorted(digests.items()))
    for document, render in ((SBOM, cyclonedx_json), (PROVENANCE, statement_json)):
        _write_text(new / document, render(plan, digests))
        digests[document] = sha256_file(new / document)
    _write_text(new / SUMS, render_sums(digests))
    for path in new.rglob("*"):
        if path.is_file():
            flush_file(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def _copy_artifacts(
    plan: ReleasePlan, new: Path, threads: int, on_bytes: OnBytes | None
) -> dict[str, str]:
    """Copies every artifact and checks each file's digest; gives sha256 by path."""
    jobs: dict[str, tuple[Item, str]] = {}
    for item in plan.items:
        for name, path in item.files.items():
            jobs[path] = (item, name)
            (new / path).parent.mkdir(parents=True, exist_ok=True)

    def copy(path: str) -> PhiconvError | None:
        item, name = jobs[path]
        sha256, size = item.output.files[name]
        source = item.output.folder / ARTIFACT / name
        try:
            place_file(source, new / path)
        except FileNotFoundError:
            return StageError("is missing", where=str(source), remedy=_REBUILD)
        found = sha256_file(new / path)
        if on_bytes:
            on_bytes(size)
        if found == sha256:
            return None
        what = f"the file was changed since it was built: its sha256 is {found}, not {sha256}"
        return StageError(what, where=str(source), remedy=_REBUILD)

    with ThreadPoolExecutor(max_workers=max(threads, 1)) as pool:
        raise_all([error for error in pool.map(copy, jobs) if error is not None])
    return {path: item.output.files[name][0] for path, (item, name) in jobs.items()}


_REBUILD = "build it again: nothing has to be recomputed"


def _check(new: Path, threads: int) -> None:
    """What `phiconv verify` would refuse is never put in place."""
    listed, _ = parse_sums((new / SUMS).read_bytes())
    known = {new / name: digest for name, digest in listed.items()}
    found = verify(new, threads=threads, digest=lambda path: known.get(path) or sha256_file(path))
    raise_all(
        [
            StageError(problem.what, where=problem.file, remedy=problem.remedy)
            for problem in found.problems
        ]
    )


def _swap(new: Path, place: Path, old: Path) -> None:
    """Moves what stands there aside and the release into its place."""
    try:
        if place.exists():
            remove_tree(old)
            rename(place, old)
        rename(new, place)
    except OSError as error:
        if not place.exists():
            with suppress(OSError):
                rename(old, place)
        raise StageError(
            f"the release cannot be put in place: {error.strerror}",
            where=str(place),
            remedy="close the programs that use the folder, then release again",
        ) from error
    flush_folder(place.parent)


def _size(plan: ReleasePlan) -> int:
    return sum(item.size_bytes for item in plan.items)
