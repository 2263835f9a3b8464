from __future__ import annotations

import io

import pytest

from phiconv.cli.outcomes import coloured
from phiconv.kernels import compiling
from phiconv.progress import (
    PlainDisplay,
    QuietDisplay,
    RichDisplay,
    make_display,
)
from phiconv.report.results import StageRecord

DONE = StageRecord("int4", "quantize", "onnx-graph", "k", False, 3.21, 6.0, 312_000_000, 410_000)
CACHED = StageRecord("int4", "quantize", "onnx-graph", "k", True, size_bytes=410_000)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_say_start_progress_and_end() -> None:
    stream, clock = io.StringIO(), Clock()
    display = PlainDisplay(stream, clock)
    display.step("checkpoint", "model", lambda: 0)
    display.begin("building toy", 2)
    progress = display.step("int4", "quantize", lambda: 0)
    progress.start(2_000_000)
    progress.advance(500_000, "layers.0")
    clock.now = 6
    progress.advance(500_000, "layers.1")
    clock.now = 7
    progress.advance(500_000, "layers.2")
    progress.note("one weight is odd")
    display.done(DONE)
    display.done(CACHED)
    assert stream.getvalue().splitlines() == [
        "checkpoint: model",
        "building toy",
        "[1/2] int4: quantize",
        "[1/2] int4: 1.0 MB of 2.0 MB, layers.1",
        "[1/2] int4: one weight is odd",
        "[1/2] int4: done in 3.2 s, 410.0 KB, peak 312.0 MB",
        "[2/2] int4: cached, 410.0 KB",
    ]


def test_a_terminal_gets_a_bar_with_item_amount_and_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    display = RichDisplay(stream)
    display.begin("building toy", 1)
    progress = display.step("int4", "quantize", lambda: 312_000_000)
    progress.start(2_000_000)
    progress.advance(500_000, "model.layers.11.self_attn.a_very_long_name.weight")
    progress.note("one weight [odd]")
    display.close()  # draws once more
    display.done(DONE)
    display.close()
    shown = stream.getvalue()
    assert "\x1b[" in shown
    for text in ("toy", "one weight [odd]", "int4", "done in 3.2 s", "500.0 KB of 2.0 MB",
                 "peak 312.0 MB", "…", "a_very_long_name.weight"):  # fmt: skip
        assert text in shown


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    display = RichDisplay(stream)
    display.begin("building toy", 1)
    display.done(DONE)
    display.close()
    assert "\x1b[3" not in stream.getvalue()


def test_the_display_suits_the_stream() -> None:
    stream = io.StringIO()
    assert isinstance(make_display(stream, quiet=False), PlainDisplay)
    assert isinstance(make_display(stream, quiet=False, terminal=True), RichDisplay)
    quiet = make_display(stream, quiet=True)
    assert isinstance(quiet, QuietDisplay)
    quiet.begin("toy", 1)
    quiet.step("int4", "quantize", lambda: 0).advance(1)
    quiet.done(DONE)
    quiet.note("x")
    quiet.close()
    assert stream.getvalue() == ""


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(Screen(), quiet=False), PlainDisplay)
    assert coloured("passed", "green") == "passed"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert isinstance(make_display(Screen(), quiet=False), RichDisplay)
    assert coloured("passed", "green") == "\x1b[32mpassed\x1b[0m"
    assert coloured("passed", None) == "passed"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("passed", "green") == "passed"


def test_a_long_step_says_ever_more_seldom_how_far_it_is() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = PlainDisplay(stream, clock).step("awq", "awq", lambda: 0)
    for second in range(2 * 3600):
        clock.now = second
        progress.advance(1)
    assert 40 < len(stream.getvalue().splitlines()) < 80


def test_a_log_says_once_a_step_that_kernels_are_compiled() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream, Clock())
    compiling.begin(kept=True)  # such as while the checkpoint is hashed
    display.step("int4", "quantize", lambda: 0)
    compiling.begin(kept=True)  # for the one that is being compiled
    compiling.end()
    compiling.end()
    compiling.begin(kept=True)
    compiling.end()
    display.done(DONE)
    compiling.begin(kept=True)  # no step is shown
    compiling.end()
    display.step("gguf", "convert-gguf", lambda: 0)
    compiling.begin(kept=False)
    compiling.end()
    display.close()
    assert [line for line in stream.getvalue().splitlines() if "compiling" in line] == [
        "int4: compiling kernels, once on this machine",
        "gguf: compiling kernels; NUMBA_CACHE_DIR can name a folder to keep them in",
    ]


def on_the_screen(stream: io.StringIO) -> str:
    """What was drawn since it was last asked."""
    shown = stream.getvalue()
    stream.seek(0)
    stream.truncate()
    return shown


@pytest.mark.parametrize("columns", ["80", "160"])
def test_a_bar_says_that_kernels_are_compiled_while_they_are(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    display = RichDisplay(stream)
    display.begin("building toy", 1)
    progress = display.step("int4.onnx", "write-onnx", lambda: 312_000_000)
    progress.start(2_000_000_000)
    progress.advance(500_000_000, "model.layers.11.mlp.down_proj.weight")
    compiling.begin(kept=True)
    display.refresh()
    shown = on_the_screen(stream)
    for text in ("int4.onnx", "peak 312.0 MB", "compiling kernels, once on"):
        assert text in shown
    compiling.end()
    on_the_screen(stream)
    display.refresh()
    shown = on_the_screen(stream)
    assert "compiling" not in shown
    for text in ("int4.onnx", "500.0 MB of 2.0 GB", "peak 312.0 MB", "down_proj"):
        assert text in shown
    display.done(DONE)
    display.close()
