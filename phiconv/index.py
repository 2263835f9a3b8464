"""The index page over several builds: KL divergence against size, and a row with a link each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from phiconv.errors import RecipeError
from phiconv.publish import REPORT
from phiconv.report import REPORT_HTML, REPORT_JSON
from phiconv.report.results import RunResult
from phiconv.workspace.disk import rename_over

INDEX = "index.html"
_MARK = '<meta name="generator" content="phiconv">'


def find_reports(places: Sequence[Path]) -> list[Path]:
    """Finds the report.json files of outputs.

    Args:
        places: Each a report.json, an output folder of `phiconv build` or `phiconv validate`, or
            a folder of such.

    Raises:
        RecipeError: There is none at one of the places.
    """
    found: dict[Path, None] = {}
    for place in places:
        names = (REPORT_JSON, f"{REPORT}/{REPORT_JSON}")
        here = [place] if place.is_file() else [place / name for name in names]
        below = (path for pattern in names for path in place.glob(f"*/{pattern}"))
        reports = [path for path in here if path.is_file()] or sorted(below)
        if not reports:
            raise RecipeError(
                f"there is no {REPORT_JSON} at {place} or in its folders",
                remedy="give output folders of `phiconv build`, or the folder that holds them",
            )
        found |= dict.fromkeys(reports)
    return list(found)


def default_page(places: Sequence[Path]) -> Path:
    """Where the index of `places` goes: into the folder that holds all of them."""
    folders = [str((place.parent if place.is_file() else place).absolute()) for place in places]
    return Path(os.path.commonpath(folders)) / INDEX


def read_reports(files: Iterable[Path]) -> dict[Path, RunResult]:
    """The results of reports, by the path of each one's report.html.

    Raises:
        StageError: One cannot be read, or is not a report of this schema version.
    """
    from phiconv.report.document import read_report_file

    return {file.with_name(REPORT_HTML): read_report_file(file) for file in files}


def check_page(page: Path) -> None:
    """Makes sure that no page of the user's stands where the index goes.

    Raises:
        RecipeError: There is one; nothing was touched.
    """
    if page.exists() and not (page.is_file() and _MARK in page.read_text("utf-8", "replace")):
        raise RecipeError(
            f"{page.name} is not an index that phiconv wrote",
            where=str(page),
            remedy="move it away, or choose another place with --out",
        )


def write_index(page: Path, results: Mapping[Path, RunResult]) -> None:
    """Writes the index, whole or not at all.

    Args:
        page: The file; its folder is made if need be.
        results: A build's report.html, and its result.

    Raises:
        RecipeError: A page of the user's stands there.
    """
    from phiconv.report.html import index_html

    check_page(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    text = index_html({_link(file, page): result for file, result in results.items()})
    partial = page.with_name(f".{page.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    rename_over(partial, page)


def _link(file: Path, page: Path) -> str:
    """A file as seen from a page, as a URL."""
    try:
        path = Path(os.path.relpath(file.absolute(), page.parent.absolute()))
    except ValueError:  # on another drive of Windows
        return file.absolute().as_uri()
    return quote(path.as_posix())
