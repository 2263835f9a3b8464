"""Nothing damaged goes to the Hub."""

from __future__ import annotations

from pathlib import Path

from phiconv.errors import Problems, RecipeError, StageError


def require_whole(folder: Path) -> None:
    """Verifies a release, offline.

    Raises:
        RecipeError: The folder is no release.
        StageError: It is not as it was made (`Problems` for several files).
    """
    from phiconv import machine
    from phiconv.verify import verify

    found = verify(folder, threads=machine.threads())
    if found.kind != "release":
        raise RecipeError(
            f"{folder} is no release",
            where=str(folder),
            remedy="make one with `phiconv release`, and push that",
        )
    errors = [
        StageError(problem.what, where=str(folder / problem.file), remedy=problem.remedy)
        for problem in found.problems
    ]
    if errors:
        raise errors[0] if len(errors) == 1 else Problems([*errors])
