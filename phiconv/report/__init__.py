"""Reports of a build: report.json, report.md, junit.xml and report.html from one `RunResult`.

Beside them lies positions.npz, what the measurements found at every position.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phiconv.report.results import RunResult

REPORT_JSON = "report.json"
REPORT_MARKDOWN = "report.md"
REPORT_HTML = "report.html"
JUNIT = "junit.xml"


def write_reports(
    result: RunResult, folder: Path, measurements: Mapping[str, Path] | None = None
) -> None:
    """Writes all four reports into `folder`, which is made if it is not there.

    The caller publishes the folder as a whole, so nothing here needs to be atomic.

    Args:
        result: What the build found out.
        folder: Where to.
        measurements: Stage -> the folder of its measurement, for positions.npz.

    Raises:
        OSError: A file cannot be written.
    """
    from phiconv.report.document import report_json
    from phiconv.report.html import report_html
    from phiconv.report.junit import junit_xml
    from phiconv.report.markdown import report_markdown
    from phiconv.report.positions import POSITIONS, write_positions

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        (REPORT_JSON, report_json(result)),
        (REPORT_MARKDOWN, report_markdown(result)),
        (JUNIT, junit_xml(result)),
        (REPORT_HTML, report_html(result)),
    ):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    write_positions(folder / POSITIONS, result.validations, measurements or {})
