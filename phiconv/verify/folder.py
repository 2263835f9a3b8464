"""Verifies whatever a path holds: a release, the output of a build, or a bare artifact."""

from __future__ import annotations

from pathlib import Path

from phiconv.errors import RecipeError
from phiconv.publish import ARTIFACT, MANIFEST, REPORT
from phiconv.verify.artifact import GENAI_CONFIG, structure_problems
from phiconv.verify.listing import Digest, Listing, OnBytes, digest_all, list_folder
from phiconv.verify.output import is_output, output_problems
from phiconv.verify.release import is_release, release_problems
from phiconv.verify.results import Kind, Verification
from phiconv.verify.sums import SUMS
from phiconv.workspace.entry import sha256_file


def verify(
    path: Path,
    *,
    partial: bool = False,
    threads: int = 1,
    on_bytes: OnBytes | None = None,
    digest: Digest = sha256_file,
) -> Verification:
    """Checks every digest and the structure of every artifact; needs no network and no runtime.

    Args:
        path: A release, an output folder of `phiconv build`, the folder of an artifact, or a GGUF
            file.
        partial: Whether files of a release may be missing, such as after the download of one
            artifact of several.
        threads: How many files are read at a time.
        on_bytes: Called with counts of bytes read.
        digest: Gives a file's sha256 in hexadecimal.

    Raises:
        RecipeError: There is nothing of the kind.
        StageError: A folder cannot be listed.
    """
    kind = _kind(path)
    if path.is_file():
        listing = Listing(path.parent, {path.name: path.stat().st_size}, ())
    else:
        listing = list_folder(path)
    folder = listing.folder
    if kind == "output":
        listing = _without_the_users(listing)
    problems, absent = list(listing.problems), set[str]()
    if kind != "artifact":
        names = [name for name in listing.sizes if name != SUMS]
        actual = digest_all(folder, names, threads=threads, on_bytes=on_bytes, digest=digest)
        if kind == "release":
            found, absent = release_problems(listing, actual, partial=partial)
            problems += found
        else:
            problems += output_problems(listing, actual)
    damaged = {problem.file for problem in problems} | absent
    found, notes = structure_problems(folder, listing.sizes, damaged)
    return Verification(
        kind=kind,
        path=path,
        files=len(listing.sizes),
        size_bytes=sum(listing.sizes.values()),
        problems=tuple(sorted([*problems, *found], key=lambda problem: problem.file)),
        notes=tuple(notes),
    )


def _kind(path: Path) -> Kind:
    if path.is_dir():
        if is_release(path):
            return "release"
        if is_output(path):
            return "output"
        if any(any(path.glob(pattern)) for pattern in ("*.onnx", "*.gguf", GENAI_CONFIG)):
            return "artifact"
    elif path.is_file() and path.suffix == ".gguf":
        return "artifact"
    raise RecipeError(
        f"there is nothing to verify at {path}",
        remedy="give a release, an output folder of `phiconv build`, the folder of an artifact, "
        "or a GGUF file",
    )


def _without_the_users(listing: Listing) -> Listing:
    """What lies beside artifact, report and manifest is not the build's."""

    def is_built(name: str) -> bool:
        return name == MANIFEST or name.startswith((f"{ARTIFACT}/", f"{REPORT}/"))

    sizes = {name: size for name, size in listing.sizes.items() if is_built(name)}
    problems = tuple(problem for problem in listing.problems if is_built(problem.file))
    return Listing(listing.folder, sizes, problems)
