"""Ratios, verdicts and tables of the benchmarks, from figures that are given."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import models
from benchmarks.cases import BUILDER, CASES, OLIVE, OURS, READ_WRITE
from benchmarks.measure import Usage
from benchmarks.plots import draw_figures, draw_scaling
from benchmarks.results import (
    Measured,
    entry_of,
    figures_table,
    judge,
    save,
    scaling_entry,
    scaling_table,
    targets_table,
)
from benchmarks.sides import Peers
from benchmarks.synthetic import Shape


@pytest.fixture
def measured() -> Measured:
    return Measured(
        layers=8,
        rounds={
            OURS: [Usage(9, 15, 10**9, 10, 3), Usage(11, 17, 10**9, 10, 3)],
            BUILDER: [Usage(99, 120, 13 * 10**9, 9, 8), Usage(88, 120, 13 * 10**9, 9, 8)],
            READ_WRITE: [Usage(6, 6, 10**7, 10, 3), Usage(5, 5, 10**7, 10, 3)],
        },
        sizes={OURS: 3 * 10**9},
        divergences={OURS: 0.0137, BUILDER: None},
        not_measured={OLIVE: "olive is not installed"},
    )


def test_a_ratio_is_of_medians_and_its_spread_of_rounds(measured: Measured) -> None:
    wall, memory, floor = judge(CASES["int4-cpu"], measured)
    assert wall.ratio == pytest.approx(10 / 93.5)
    assert (wall.least, wall.most) == (pytest.approx(9 / 99), pytest.approx(11 / 88))
    assert wall.met is False
    assert memory.ratio == pytest.approx(1 / 13)
    assert memory.met is False
    assert floor.ratio == pytest.approx(10 / 5.5)
    assert floor.met is True


def test_without_the_peer_there_is_no_verdict(measured: Measured) -> None:
    del measured.rounds[BUILDER]
    wall, memory, floor = judge(CASES["int4-cpu"], measured)
    assert wall.met is None
    assert memory.ratio is None
    assert floor.met is True


def test_an_absolute_limit_needs_no_peer() -> None:
    runs = Measured(None, rounds={OURS: [Usage(5, 6, 219 * 10**6)]})
    verdicts = judge(CASES["gguf-q4_k_m"], runs)
    assert [verdict.met for verdict in verdicts] == [None, None, True]


def test_tables_show_everything(measured: Measured, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    save(file, "int4-cpu", entry_of("int4-cpu", measured, {"python": "3"}))
    save(file, "fp16-cuda", entry_of("fp16-cuda", Measured(None), {}))
    results = json.loads(file.read_text())
    assert list(results) == ["int4-cpu", "fp16-cuda"]
    assert results["int4-cpu"]["rounds"][OURS][0] == asdict(measured.rounds[OURS][0])
    figures = figures_table(results)
    work = "int4 for CPU, ONNX, 3.8 B, layers: 8"
    row = "10.0 s | 16.0 s | 1.00 GB | 0.00 GB | 0.00 GB | 3.00 GB | 0.01370 |"
    assert f"| {work} | phiconv | {row}" in figures
    assert f"| {work} | Olive | not measured: olive is not installed |" in figures
    targets = targets_table(results)
    assert f"| {work} | wall | {BUILDER} | ≤ 1/10.0 | 1/9.3 (1/11.0 to 1/8.0) | **missed** |" in (
        targets
    )
    assert f"| {work} | wall | {READ_WRITE} | ≤ 2.00× | 1.82× (1.50× to 2.20×) | met |" in targets
    assert "| fp16 for CUDA, ONNX, 3.8 B | wall | onnxruntime-genai builder" in targets
    assert "| not measured | – |" in targets
    for table in (figures, targets):
        assert len({len(re.findall(r"\|", line)) for line in table.splitlines()}) == 1


def test_plots_name_every_side(measured: Measured, tmp_path: Path) -> None:
    results = {"int4-cpu": entry_of("int4-cpu", measured, {})}
    for figure in ("wall", "peak_rss"):
        draw_figures(tmp_path / "plot.svg", results, figure, "label of the axis")
        text = (tmp_path / "plot.svg").read_text()
        assert "label of the axis" in text
        for side in measured.rounds:
            assert f"int4 for CPU, ONNX, 3.8 B, layers: 8: {side}" in text


def test_scaling_is_shown_by_the_layer(tmp_path: Path) -> None:
    usages = {8: Usage(4, 8, 6 * 10**8), 16: Usage(7, 15, 6 * 10**8)}
    entry = scaling_entry(usages, Usage(60, 90, 21 * 10**8), {})
    table = scaling_table(json.loads(json.dumps(entry)))
    assert "| 8 layers | 4.0 s | 8.0 s | 1.00 s | 0.60 GB |" in table
    assert "| 14 B | 60.0 s | 90.0 s | | 2.10 GB (≤ 2.00 GB, **missed**) |" in table
    draw_scaling(tmp_path / "plot.svg", entry)
    assert "peak memory, GB" in (tmp_path / "plot.svg").read_text()


def test_every_target_names_a_side_of_its_case() -> None:
    for case in CASES.values():
        assert next(iter(case.sides)) == OURS
        assert {target.over for target in case.targets} <= {None, *case.sides}


def test_peers_that_are_not_there_say_so() -> None:
    nothing = Peers(None, None, None, None, threads=2)
    for case in ("gguf-q4_k_m", "gguf-q8_0"):
        missing = CASES[case].sides["llama.cpp"].missing
        assert missing(nothing) == "no --llama-cpp with llama.cpp's sources"
    sources = Peers("llama.cpp", None, None, None, threads=2)
    assert CASES["gguf-q8_0"].sides["llama.cpp"].missing(sources) is None
    assert CASES["gguf-q4_k_m"].sides["llama.cpp"].missing(sources) is not None


def test_synthetic_checkpoints_are_removed_unless_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Shape(1, hidden=64, intermediate=128, heads=2, kv_heads=2, vocabulary=256)
    monkeypatch.setitem(models.SHAPES, "1.1 B", small)
    for keep in (True, False):
        with models.checkpoint("1.1 B", 3, tmp_path, keep=keep) as folder:
            assert (folder / "model-00001-of-00001.safetensors").is_file()
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            assert config["num_hidden_layers"] == 3
        assert folder.exists() == keep
    with models.checkpoint("tiny", 3, tmp_path, keep=False) as folder:
        assert folder == models.TINY
    assert models.TINY.is_dir()


def test_a_forward_pass_multiplies_with_all_but_the_embedding() -> None:
    assert models.parameters("3.8 B", None) == 3_722_379_264
    assert models.parameters("14 B", None) == 14_145_290_240


def test_the_largest_shape_is_phi_4s() -> None:
    shape = models.SHAPES["14 B"].tensors()
    assert shape["model.layers.39.self_attn.qkv_proj.weight"] == (7680, 5120)
    assert shape["model.layers.0.mlp.down_proj.weight"] == (5120, 17920)
