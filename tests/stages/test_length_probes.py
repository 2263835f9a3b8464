"""Length probes: what they find on real artifacts, how they judge it, what reports say of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.errors import StageError
from phiconv.gates import judge
from phiconv.report.document import read_measurement, read_report, report_json
from phiconv.report.html import report_html
from phiconv.report.markdown import report_markdown
from phiconv.report.results import KnownLimit, LengthProbe, Measurement, Validation
from phiconv.runtimes.length_reference import PROBE_POSITIONS, REACH, load, probed_boundaries
from phiconv.stages.length_probes import METRIC, checked
from phiconv.stages.length_reference import LengthReference
from phiconv.stages.reference import Reference, TokenSetParams
from phiconv.stages.stage import Artifact, StageContext
from phiconv.stages.validate import Validate, ValidateParams
from tests.onnx.models import hugging_face_logits, lay_out, write
from tests.onnx_artifacts import write_onnx_artifact
from tests.phi_family import SWITCH, WINDOW, write_member
from tests.report.results import measured, result, validation
from tests.report.test_html import Page

SHORT = {"windows": 1, "window_length": 32}


class Bench:
    """A member's checkpoint with both references."""

    def __init__(self, folder: Path, member: str):
        self.folder = folder
        self.path = write_member(folder / "checkpoint", member)
        self.checkpoint = Checkpoint(self.path)
        self.reference = self._run(Reference(), "reference")
        self.length_reference = self._run(LengthReference(), "length-reference")

    def _run(self, stage: Any, kind: str) -> Artifact:
        out = self.folder / kind
        out.mkdir()
        stage.run(TokenSetParams(**SHORT), StageContext(out, (), self.checkpoint, threads=2))
        return Artifact(kind, kind, "0" * 64, out)

    def validate(self, artifact: Path, **params: Any) -> Validation:
        out = self.folder / f"measured-{artifact.name}"
        out.mkdir()
        given = Artifact("onnx", "onnx", "1" * 64, artifact)
        parsed = ValidateParams(**SHORT, length_probes=True, layer_errors=False, **params)
        inputs = (given, self.reference, self.length_reference)
        Validate().run(parsed, StageContext(out, inputs, self.checkpoint, threads=2))
        found = read_measurement(out)
        return Validation("check", "onnx", found, judge(found, parsed.limits()))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("windowed"), "phi-3-mini-4k")


@pytest.fixture(scope="module")
def switching(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("switching"), "phi-4-mini")


def gate(validation: Validation) -> bool:
    (found,) = (gate for gate in validation.gates if gate.metric == METRIC)
    return found.passed


def test_the_reference_is_hugging_face_s_on_both_sides(switching: Bench) -> None:
    (found,) = load(switching.length_reference.path)
    assert (found.boundary.kind, found.boundary.position) == ("LongRoPE switch", SWITCH)
    assert (found.below, len(found.tokens)) == (PROBE_POSITIONS, SWITCH + PROBE_POSITIONS)
    from phiconv.runtimes.reference import LanguageModelHead

    logits = LanguageModelHead(switching.checkpoint).logits(found.hidden)
    shorter = hugging_face_logits(switching.path, found.tokens[:SWITCH])[found.start :]
    longer = hugging_face_logits(switching.path, found.tokens)[SWITCH:]
    assert np.abs(logits - np.concatenate([shorter, longer])).max() < 1e-4


def test_an_artifact_with_the_window_departs_nowhere(windowed: Bench) -> None:
    artifact = write_onnx_artifact(windowed.path, windowed.folder / "cpu")
    found = windowed.validate(artifact, runtime="onnxruntime-genai")
    assert found.measurement.known_limits == ()
    assert [(p.reached, p.position, p.departs) for p in found.measurement.length_probes] == [
        ("prefill", WINDOW, False),
        ("decoding", WINDOW, False),
    ]
    assert max(p.logit_error_above or 1 for p in found.measurement.length_probes) < 1e-4
    assert gate(found)
    assert found.measurement.checks[-1].state == "clean"


def test_directml_s_missing_window_is_a_known_limit(windowed: Bench) -> None:
    artifact = write_onnx_artifact(windowed.path, windowed.folder / "dml", "dml", "fp16")
    found = windowed.validate(artifact, provider="dml", when_missing="fallback-cpu")
    (limit,) = found.measurement.known_limits
    assert limit.from_position == WINDOW
    assert limit.runtime == "onnxruntime-genai (DmlExecutionProvider)"
    (probe,) = found.measurement.length_probes
    assert probe.departs
    assert probe.limit == limit.statement
    assert gate(found), "what is known fails no gate"
    assert found.measurement.checks[-1].state == "warnings"


def test_a_graph_that_switches_wrongly_is_found(switching: Bench) -> None:
    """Nothing is known that would explain it: the gate of every validation fails."""
    import onnx_ir as ir

    graph = lay_out(switching.path, switching.folder / "scratch")
    for node in graph.model.graph:
        if node.op_type != "If":
            continue
        for constant in node.attributes["then_branch"].as_graph():
            # from the switch on every position is rotated as the first
            table = constant.attributes["value"].as_tensor().numpy().copy()
            table[SWITCH:] = table[:1]
            constant.attributes["value"] = ir.AttrTensor("value", ir.tensor(table))
    artifact = switching.folder / "wrong"
    write(graph, switching.path, artifact)
    found = switching.validate(artifact)
    (probe,) = found.measurement.length_probes
    assert probe.departs
    assert (probe.kl_below or 1) < 1e-6 < (probe.kl_above or 0)
    assert found.status == "failed" or not gate(found)


def test_decoding_across_the_switch_is_a_known_limit(switching: Bench) -> None:
    artifact = write_onnx_artifact(switching.path, switching.folder / "cpu")
    found = switching.validate(artifact, runtime="onnxruntime-genai")
    prefill, decoding = found.measurement.length_probes
    assert not prefill.departs
    assert decoding.departs
    (limit,) = found.measurement.known_limits
    assert decoding.limit == limit.statement
    assert limit.from_position == SWITCH
    assert gate(found)


def probe(**changes: Any) -> LengthProbe:
    plain = LengthProbe("sliding window", 2047, "prefill", 32, 1e-3, 2e-3, 0.1, 0.2, False)
    return replace(plain, **changes)


def test_only_another_order_of_error_departs() -> None:
    from phiconv.stages.length_probes import _judged

    limits = (KnownLimit("llama.cpp", "no window", 2047),)
    assert not _judged(probe(kl_above=0.015), 1e-3, limits).departs
    judged = _judged(probe(kl_above=0.02), 1e-3, limits)
    assert (judged.departs, judged.limit) == (True, "no window")
    # a departure before the boundary is not explained by what holds from there on
    assert _judged(probe(kl_below=0.02), 1e-3, limits).limit == ""
    assert _judged(probe(kl_above=float("nan")), 1e-3, ()).departs
    # both sides are rounding: no ratio makes that a departure
    assert not _judged(probe(kl_below=1e-13, kl_above=1e-7), 1e-13, ()).departs


def test_a_boundary_out_of_reach_is_said_to_be(windowed: Bench) -> None:
    config = replace(
        windowed.checkpoint.config,
        sliding_window=REACH + 1,
        max_position_embeddings=131072,
    )
    assert probed_boundaries(config) == ()
    (check,) = checked((), config).checks
    assert check.summary == "sliding window at 8,193: too far to be probed"
    (check,) = checked((), replace(config, sliding_window=None)).checks
    assert check.summary == "no window, no switch of factors"


def test_reports_show_limits_and_probes() -> None:
    limit = KnownLimit("llama.cpp", "it attends to <every> position", 2047)
    probes = (probe(), probe(reached="decoding", departs=True, limit=limit.statement))
    found = replace(measured(), known_limits=(limit,), length_probes=probes)
    build = result(validation("check", found))
    markdown = report_markdown(build)
    assert (
        "Known limits:\n\n- from position 2,047, llama.cpp: "
        "it attends to \\<every\\> position" in markdown
    )
    page = report_html(build)
    assert Page(page).tags.count("h3") > Page(report_html(result())).tags.count("h3")
    assert "llama.cpp, from position 2,047: it attends to &lt;every&gt; position" in page
    assert "known limit</td>" in page
    assert "as before</td>" in page
    assert read_report(report_json(build), "here").validations == build.validations


def test_limits_stand_in_the_report_of_what_was_not_run() -> None:
    from tests.report.results import not_run

    found: Measurement = replace(not_run(), known_limits=(KnownLimit("x", "y", 0),))
    build = result(validation("check", found))
    assert "- from the first position, x: y" in report_markdown(build)
    assert "x, from the first position: y" in report_html(build)


def test_a_broken_reference_is_a_stage_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="not a reference"):
        load(tmp_path)
    (tmp_path / "boundaries.json").write_text('[{"kind": "x"}]', encoding="utf-8")
    with pytest.raises(StageError, match="not a reference"):
        load(tmp_path)
