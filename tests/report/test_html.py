from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from phiconv.report import write_reports
from phiconv.report.distribution import kl_by_position, kl_histogram
from phiconv.report.html import index_html, report_html
from phiconv.report.plots import kl_by_position_svg, kl_distribution_svg, layer_errors_svg
from phiconv.report.results import Histogram, LayerErrorRecord, PositionError
from tests.report.results import (
    DML,
    every_status,
    kl_values,
    measured,
    not_run,
    result,
    validation,
    with_checks,
    with_layers,
    with_positions,
)

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.requests: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.requests += [] if (value or "").startswith("#") else [value or ""]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_it_is_well_formed_and_asks_nothing_of_the_network() -> None:
    text = report_html(every_status())
    page = Page(text)
    assert page.requests == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"url\((?!#)", text), "no style asks for a file either"
    assert len(page.ids) == len(set(page.ids)), "ids of different plots must not meet"
    assert page.tags.count("svg") == 6, "two plots a measurement"


def test_the_verdict_comes_first() -> None:
    words = " ".join(" ".join(Page(report_html(every_status())).words).split())
    verdict = words.index("passed on CPUExecutionProvider, target DmlExecutionProvider not present")
    assert verdict < words.index("Accuracy:")
    for text in (
        "failed: top1_agreement measured 0.5, limit min 0.9",
        "not run, target DmlExecutionProvider not present",
        "25 on CPUExecutionProvider: 4 GroupQueryAttention, 21 MatMulNBits",
        "tiny <phi3> & co | _x_",
        "int4 block 32",
        "from the cache",
        "not finite",
    ):
        assert text in words, text


def test_checks_stand_in_the_page_with_what_they_found() -> None:
    for measurement in (with_checks(measured(DML)), with_checks(not_run())):
        text = report_html(result(validation("check", measurement)))
        words = " ".join(" ".join(Page(text).words).split())
        for line in (
            "placement clean 25 nodes on CPUExecutionProvider",
            "kernels failed static DmlExecutionProvider kernel check found 1 node",
            "unsupported: GroupQueryAttention <layer 0> note: Shape",
            "tokenizer notes 381 golden texts compared warning: a|b",
            "genai_config not checked onnxruntime-genai cannot be imported",
        ):
            assert line in words, line
        assert "Nodes the target does not serve" not in words, "it stands with the checks"


def test_the_error_by_layer_stands_in_the_page() -> None:
    page = Page(report_html(result(validation("check", with_layers(measured())))))
    assert page.tags.count("svg") == 3
    assert "Residual stream after each layer" in " ".join(page.words)
    noted = replace(measured(), layers_note="Not measured by layer: ONNX has no attention")
    page = Page(report_html(result(validation("check", noted))))
    assert page.tags.count("svg") == 2
    assert "Not measured by layer: ONNX has no attention" in page.words


def test_a_build_without_validation_has_a_page_too() -> None:
    page = Page(report_html(replace(result(), tensor_kinds=(), files=())))
    assert "built, not validated" in page.words
    assert "svg" not in page.tags


def test_the_page_is_the_same_every_time() -> None:
    assert report_html(every_status()) == report_html(every_status())


def plots() -> list[str]:
    kl = kl_values()
    return [
        kl_distribution_svg(kl_histogram(kl), "check", mean=float(kl.mean())),
        kl_by_position_svg(kl_by_position(kl), "check", 512),
    ]


@pytest.mark.parametrize("svg", plots(), ids=["distribution", "position"])
def test_plots_take_the_pages_colours_and_keep_their_text(svg: str) -> None:
    assert svg.startswith("<svg viewBox=")
    assert svg.endswith("</svg>")
    assert not re.search(r"#[0-9a-fA-F]{6}\b", svg), "a fixed colour is wrong in the dark"
    assert "var(--ink)" in svg
    assert "var(--accent)" in svg
    assert "KL divergence, nats</text>" in svg
    assert "http" not in svg


@pytest.mark.parametrize(
    "kl",
    [np.zeros((2, 8)), np.full((2, 8), 1e-7), np.full((1, 1), 2.0), kl_values(1e6)],
    ids=["zeros", "constant", "one", "lost"],
)
def test_plots_of_unusual_values(kl: np.ndarray) -> None:
    kl_distribution_svg(kl_histogram(kl), "check", mean=float(kl.mean()))
    kl_by_position_svg(kl_by_position(kl), "check", kl.shape[1])


def test_the_plot_of_layers_takes_the_pages_colours_and_keeps_its_text() -> None:
    svg = layer_errors_svg(with_layers(measured()).layers, "check")
    assert not re.search(r"#[0-9a-fA-F]{6}\b", svg), "a fixed colour is wrong in the dark"
    for text in ("var(--accent)", "var(--second)", "relative error</text>", ">emb.</text>"):
        assert text in svg, text
    for text in ("in all</text>", "own</text>", ">2</text>", ">0.02</text>"):
        assert text in svg, text


@pytest.mark.parametrize("error", [None, 0.0, 1e-7, 1e6])
def test_the_plot_of_layers_with_unusual_errors(error: float | None) -> None:
    layers = [LayerErrorRecord(-1, 0.0, 0.0), LayerErrorRecord(0, error, None)]
    assert layer_errors_svg(layers, "check").endswith("</svg>")


def test_ticks_are_plain_numbers_where_these_are_short() -> None:
    found = kl_histogram(np.array([np.geomspace(1e-6, 50, 400)]))
    svg = kl_distribution_svg(found, "check", mean=1.0)
    labels = set(re.findall(r">([\d.e-]+)</text>", svg))
    assert {"1e-6", "1e-4", "0.01", "1", "100"} <= labels


def test_plots_without_values() -> None:
    kl_distribution_svg(Histogram((0.0, 1.0), (0,)), "check", mean=None)
    kl_by_position_svg(PositionError((0,), (None,), (None,)), "check", 4)


def test_all_reports_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    write_reports(result(validation("check", measured())), folder)
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["junit.xml", "report.html", "report.json", "report.md"]
    for file in folder.iterdir():
        assert b"\r" not in file.read_bytes()


def test_the_index_links_every_report_and_plots_kl_against_size() -> None:
    small = replace(result(validation("check", measured())), recipe="small & fast")
    results = {"a/report.html": small, "b/report.html": every_status(), "c/report.html": result()}
    text = index_html(results)
    page = Page(text)
    assert page.requests == list(results)
    words = " ".join(" ".join(page.words).split())
    assert "small & fast" in words
    assert "passed on CPUExecutionProvider" in words
    assert "failed on CPUExecutionProvider" in words
    assert "built, not validated" in words
    assert page.tags.count("svg") == 1
    assert page.tags.count("tr") == 4
    assert "mean KL divergence, nats</text>" in text


def test_what_lies_at_one_point_shares_a_label() -> None:
    one = result(validation("check", measured()))
    text = index_html({f"{name}/report.html": one for name in "abc"})
    assert ">1, 2, 3</text>" in text
    ticks = set(re.findall(r">(\de-\d|0\.\d+)</text>", text))
    assert len(ticks) >= 2, "a narrow range still has ticks that differ"


def test_an_index_of_nothing_measured_has_no_plot() -> None:
    assert "svg" not in Page(index_html({"a/report.html": result()})).tags


def test_of_several_measurements_the_index_shows_the_worst() -> None:
    near, far = validation("near", measured(scale=0.1)), validation("far", measured(scale=3))
    text = index_html({"a/report.html": result(near, far)})
    worst = far.measurement.metrics["kl_divergence.mean"]
    assert worst is not None
    assert f">{worst:.4g}<" in text


def test_errors_stand_beside_what_they_are_of(tmp_path: Path) -> None:
    measurement = with_positions(tmp_path / "m", 1)
    top1 = measurement.metrics["top1_agreement"]
    assert top1 is not None
    near = validation("check", measurement, {"top1_agreement": {"min": top1 - 0.003}})
    text = report_html(result(near))
    assert text.startswith("<!doctype html>")
    words = Page(text).words
    page = " ".join(" ".join(words).split())
    assert page.count(f"{top1:.5f} ± 0.004 ") == 2, "the gate, and all metrics"
    assert not any(word.startswith("Standard error of") for word in words)
    assert "8 windows of 512 tokens. ± standard error, each of the 8 windows one draw." in page
    assert "close: top1_agreement passed min" in page
    assert page.index("close:") < page.index("Accuracy:")
