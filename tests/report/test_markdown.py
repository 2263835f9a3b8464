from __future__ import annotations

from markdown_it import MarkdownIt

from phiconv.report.markdown import report_markdown
from tests.report.results import every_status, measured, result, validation

# What GitHub allows in one comment.
COMMENT_CHARACTERS = 65_536


def rendered(text: str) -> str:
    return str(MarkdownIt("commonmark").enable("table").render(text))


def test_the_verdict_comes_first() -> None:
    text = report_markdown(result(validation("check", measured("DmlExecutionProvider"))))
    assert text.splitlines()[0] == (
        "## ✅ tiny-int4: passed on CPUExecutionProvider, target DmlExecutionProvider not present"
    )


def test_it_renders_with_every_table_and_fits_a_comment() -> None:
    text = report_markdown(every_status())
    assert len(text) < COMMENT_CHARACTERS / 4
    html = rendered(text)
    assert html.count("<table>") == 4, "three measurements and the stages"
    assert "❌ tiny-int4: failed on CPUExecutionProvider" in html
    assert "<li>failed: top1_agreement measured 0.5, limit min 0.9, provider CPU" in html
    assert "not run, target DmlExecutionProvider not present" in html
    assert "from the cache" in html or "cached" in html


def test_text_from_outside_is_taken_literally() -> None:
    html = rendered(report_markdown(every_status()))
    assert "tiny &lt;phi3&gt; &amp; co | _x_" in html
    assert "<phi3>" not in html


def test_a_build_without_validation_says_so() -> None:
    assert "## ℹ️ tiny-int4: built, not validated" in report_markdown(result())  # noqa: RUF001
