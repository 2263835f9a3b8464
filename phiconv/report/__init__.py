"""Reports of a build: report.json, report.md, junit.xml and report.html from one `RunResult`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phiconv.report.results import RunResult

REPORT_JSON = "report.json"
REPORT_MARKDOWN = "report.md"
REPORT_HTML = "report.html"
JUNIT = "junit.xml"


def write_reports(result: RunResult, folder: Path) -> None:
    """Writes all four reports into `folder`, which is made if it is not there.

    The caller publishes the folder as a whole, so nothing here needs to be atomic.

    Raises:
        OSError: A file cannot be written.
    """
    from phiconv.report.document import report_json
    from phiconv.report.html import report_html
    from phiconv.report.junit import junit_xml
    from phiconv.report.markdown import report_markdown

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        (REPORT_JSON, report_json(result)),
        (REPORT_MARKDOWN, report_markdown(result)),
        (JUNIT, junit_xml(result)),
        (REPORT_HTML, report_html(result)),
    ):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
