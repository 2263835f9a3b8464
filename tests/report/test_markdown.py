from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from markdown_it import MarkdownIt

from phiconv.report.markdown import report_markdown
from tests.report.results import (
    DML,
    every_status,
    measured,
    not_run,
    result,
    validation,
    with_checks,
    with_layers,
    with_positions,
)

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


def test_the_worst_layer_is_a_line() -> None:
    html = rendered(report_markdown(result(validation("check", with_layers(measured())))))
    assert (
        "<p>Relative error of the residual stream 0.021 after layer 2; layer 1 adds most, 0.031</p>"
    ) in html


def test_every_check_is_a_line_of_its_own() -> None:
    found = validation("check", with_checks(measured(DML)))
    html = rendered(report_markdown(result(found)))
    assert "<li>✅ placement: 25 nodes on CPUExecutionProvider</li>" in html
    assert "<li>❌ kernels: static DmlExecutionProvider kernel check found 1 node" in html
    assert "<li>✅ tokenizer: 381 golden texts compared</li>" in html
    assert "genai_config: onnxruntime-genai cannot be imported</li>" in html
    assert (
        "<li>failed: kernels.unserved measured 1, limit max 0, provider DmlExecutionProvider, "
        "tokens default 8x512 (bbbbbbbbbbbb): unsupported: GroupQueryAttention &lt;layer 0&gt; "
        "(and 1 more)</li>"
    ) in html
    assert "<td>Nodes the target does not serve</td>" not in html, "it stands with the checks"


def test_a_failed_check_of_what_was_not_run_is_told() -> None:
    text = report_markdown(result(validation("check", with_checks(not_run()))))
    assert text.startswith(
        "## ❌ tiny-int4: failed before it ran; not run, target DmlExecutionProvider not present"
    )
    assert "- failed: kernels.unserved measured 1" in text.replace("\\", "")


def test_text_from_outside_is_taken_literally() -> None:
    html = rendered(report_markdown(every_status()))
    assert "tiny &lt;phi3&gt; &amp; co | _x_" in html
    assert "<phi3>" not in html


def test_a_build_without_validation_says_so() -> None:
    assert "## ℹ️ tiny-int4: built, not validated" in report_markdown(result())  # noqa: RUF001


def test_errors_stand_beside_what_they_are_of(tmp_path: Path) -> None:
    measurement = with_positions(tmp_path / "m", 1)
    top1 = measurement.metrics["top1_agreement"]
    assert top1 is not None
    text = report_markdown(result(validation("check", measurement)))
    html = rendered(text)
    assert f"<td>{measurement.metrics['kl_divergence.mean']:.4g} ± 0.0003</td>" in html
    assert f"<td>{top1:.5f} ± 0.004</td>" in html
    assert html.count("±") == 4, "the ratio, and what it stands for"
    assert "<p>± standard error, each of the 8 windows one draw</p>" in html
    assert "Standard error of" not in html
    assert "close:" not in html
    near = validation("check", measurement, {"top1_agreement": {"min": top1 - 0.003}})
    assert "<li>close: top1_agreement passed min" in rendered(report_markdown(result(near)))


def test_errors_of_few_windows_are_said_to_be_too_small(tmp_path: Path) -> None:
    measurement = with_positions(tmp_path / "m", 1)
    few = replace(measurement, tokens=replace(measurement.tokens, windows=3))
    html = rendered(report_markdown(result(validation("check", few))))
    assert "± standard error, positions taken for independent: too small" in html
    assert "±" not in rendered(report_markdown(result(validation("check", measured()))))
