"""`phiconv compare`: reports against reports."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from phiconv.allowances import DEFAULT, Allowance, parse_allowance
from phiconv.compare import compare, open_report
from phiconv.errors import RecipeError
from phiconv.metrics import METRICS, STANDARD_ERRORS
from phiconv.report import write_reports
from phiconv.report.document import report_json
from phiconv.report.results import Measurement, RunResult, Validation
from tests.report.results import (
    CPU,
    DML,
    measured,
    not_run,
    positions,
    result,
    validation,
    with_checks,
    with_positions,
)
from tests.terminal import Terminal


def build(*validations: Validation, stage: str = "check") -> RunResult:
    return result(*(validations or (validation(stage, measured()),)))


def with_metrics(**values: float | None) -> Measurement:
    found = measured()
    changed = {name.replace("__", "."): value for name, value in values.items()}
    return replace(found, metrics={**found.metrics, **changed})


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str, RunResult], Path]:
    def save(name: str, found: RunResult) -> Path:
        for part in ("artifact", "report"):
            (tmp_path / name / part).mkdir(parents=True)
        text = report_json(found)
        (tmp_path / name / "report" / "report.json").write_text(text, encoding="utf-8")
        return tmp_path / name

    return save


Save = Callable[[str, RunResult], Path]


def test_equal_reports_differ_in_nothing(saved: Save, phiconv: Terminal) -> None:
    one, two = saved("one", build()), saved("two", build())
    done = phiconv("compare", str(one), str(two))
    assert done.code == 0
    assert "no worse than the baseline: 3 gates passed" in done.out
    found = compare(open_report(one), open_report(two), DEFAULT, {})
    assert all(row.difference == 0 for row in found.pairs[0].rows)


def test_every_place_of_a_report_is_found(saved: Save, phiconv: Terminal, tmp_path: Path) -> None:
    one = saved("one", build())
    for place in (one / "report" / "report.json", one / "report", one, one / "artifact"):
        assert phiconv("compare", str(place), str(one)).code == 0
    done = phiconv("compare", str(tmp_path / "absent"), str(one))
    assert done.code == 2
    assert "there is no report.json at" in done.err
    (tmp_path / "x.json").write_text("{}")
    assert phiconv("compare", str(tmp_path / "x.json"), str(one)).code == 3


def test_a_regression_beyond_the_defaults_fails_with_one_line(
    saved: Save, phiconv: Terminal
) -> None:
    old = saved("old", build(validation("check", with_metrics(kl_divergence__mean=0.010))))
    new = saved("new", build(validation("check", with_metrics(kl_divergence__mean=0.0112))))
    done = phiconv("compare", str(old), str(new))
    assert done.code == 4
    lines = [line for line in done.out.splitlines() if line.startswith("failed")]
    assert lines == [
        "failed: kl_divergence.mean is worse by 0.0012 (0.01 -> 0.0112), allowed 0.001, "
        "provider CPUExecutionProvider, tokens default 8x512 (bbbbbbbbbbbb)"
    ]
    assert phiconv("compare", str(new), str(old)).code == 0, "getting better is no regression"
    allowed = ("--max-regression", "kl_divergence.mean=12%")
    assert phiconv("compare", str(old), str(new), *allowed).code == 0


@pytest.mark.parametrize(
    ("metric", "old", "new", "passes"),
    [
        ("kl_divergence.mean", 1e-12, 9e-5, True),
        ("kl_divergence.mean", 1e-12, 1.1e-4, False),
        ("top1_agreement", 0.97, 0.96, True),
        ("top1_agreement", 0.97, 0.959, False),
        ("perplexity.ratio", 1.0, 1.01, True),
        ("perplexity.ratio", 1.0, 1.011, False),
        ("perplexity.ratio", 1.0, None, False),
        ("perplexity.ratio", None, 1.0, True),
        ("perplexity.ratio", None, None, False),
    ],
)
def test_the_default_allowances(
    saved: Save, metric: str, old: float | None, new: float | None, passes: bool
) -> None:
    key = metric.replace(".", "__")
    sides = [
        open_report(saved(name, build(validation("check", with_metrics(**{key: value}), {}))))
        for name, value in (("old", old), ("new", new))
    ]
    found = compare(*sides, DEFAULT, {})
    (row,) = [row for row in found.pairs[0].rows if row.metric == metric]
    assert row.passed is passes
    assert found.exit_code == (0 if passes else 4)


def test_a_new_fault_found_by_a_check_is_a_regression(saved: Save) -> None:
    clean = replace(with_checks(measured()), metrics={**measured().metrics, "kernels.unserved": 0})
    old = open_report(saved("old", build(validation("check", clean))))
    new = open_report(saved("new", build(validation("check", with_checks(measured())))))
    (line,) = compare(old, new, DEFAULT, {}).failures
    assert line.startswith("failed: kernels.unserved is worse by 1 (0 -> 1), allowed 0")
    assert compare(new, old, DEFAULT, {}).failures == []


@pytest.fixture
def built(tmp_path: Path) -> Callable[[str, int], Path]:
    def save(name: str, seed: int) -> Path:
        measurement = with_positions(tmp_path / f"measurement-{name}", seed)
        folders = {"check": tmp_path / f"measurement-{name}"}
        write_reports(build(validation("check", measurement)), tmp_path / name / "report", folders)
        return tmp_path / name

    return save


Built = Callable[[str, int], Path]


def test_differences_are_paired_by_position(built: Built, phiconv: Terminal) -> None:
    one, two = built("one", 1), built("two", 2)
    (pair,) = compare(open_report(one), open_report(two), DEFAULT, {}).pairs
    assert pair.errors.kind == "paired"
    rows = {row.metric: row for row in pair.rows}
    row = rows["kl_divergence.mean"]
    means = [positions(seed)["kl_divergence"].mean(axis=1, dtype=np.float64) for seed in (2, 1)]
    expected = stats.ttest_rel(*means)
    assert row.difference is not None
    assert row.standard_error is not None
    assert row.difference / row.standard_error == pytest.approx(expected.statistic, rel=1e-4)
    assert row.standard_error < math.sqrt(2) * 3e-4 / 2, "the unpaired one"
    assert row.noise == pytest.approx(row.standard_error * stats.t.ppf(0.975, 7), rel=1e-3)
    done = phiconv("compare", str(one), str(two))
    assert f"{row.difference:+.4g} ± {row.standard_error:.2g}" in done.out
    assert "± standard error, paired by position, 8 windows" in done.out
    document = json.loads(phiconv("compare", str(one), str(two), "--json").out)
    (shown,) = document["pairs"]
    assert shown["errors"] == {"kind": "paired", "about": "paired by position, 8 windows"}


def test_a_report_copied_with_its_folder_is_still_paired(built: Built, tmp_path: Path) -> None:
    one, two = built("one", 1), built("two", 2)
    shutil.copytree(one / "report", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "measurement-one")
    (pair,) = compare(open_report(tmp_path / "elsewhere"), open_report(two), {}, {}).pairs
    assert pair.errors.kind == "paired"


def test_without_positions_of_either_errors_are_unpaired(
    built: Built, phiconv: Terminal, tmp_path: Path
) -> None:
    one, two = built("one", 1), built("two", 2)
    alone = tmp_path / "alone.json"
    shutil.copy(one / "report" / "report.json", alone)
    for sides in ((alone, two), (two, alone)):
        done = phiconv("compare", *map(str, sides))
        assert done.code == 0
        about = "± standard error, unpaired, as of independent measurements, 8 windows: there is no"
        assert about in done.out
        assert "± 0.00042" in done.out
    (pair,) = compare(open_report(alone), open_report(two), {}, {}).pairs
    rows = {row.metric: row for row in pair.rows}
    row = rows["kl_divergence.mean"]
    assert row.standard_error == pytest.approx(math.sqrt(2) * 3e-4)
    assert row.noise == pytest.approx(row.standard_error * stats.t.ppf(0.975, 7), rel=1e-3)


@pytest.mark.parametrize("older", ["old", "new"])
def test_errors_of_a_report_that_counted_positions_are_not_taken(
    saved: Save, phiconv: Terminal, older: str
) -> None:
    """They are several times too small: a noise would pass for a regression."""
    errors = {"kl_divergence__standard_error": 1e-4, "perplexity__ratio_standard_error": 1e-3}
    sides = []
    for name in ("old", "new"):
        now = {} if name == older else {"top1_agreement__standard_error": 4e-3}
        sides.append(saved(name, build(validation("check", with_metrics(**errors, **now)))))
    (pair,) = compare(*map(open_report, sides), DEFAULT, {}).pairs
    assert all(row.standard_error is None and row.state != "worse" for row in pair.rows)
    done = phiconv("compare", *map(str, sides))
    assert "± standard error, none known: there is no" in done.out
    assert "a report has none that counts windows" in done.out


def test_standard_errors_are_those_of_independent_measurements(saved: Save) -> None:
    values = {
        "kl_divergence__standard_error": 3e-4,
        "top1_agreement__standard_error": 4e-3,
        "perplexity__ratio_standard_error": 1e-3,
        "perplexity__candidate": 21.6,
    }
    old = open_report(saved("old", build(validation("check", with_metrics(**values)))))
    values["kl_divergence__standard_error"] = 4e-4
    new = open_report(saved("new", build(validation("check", with_metrics(**values)))))
    rows = {row.metric: row for row in compare(old, new, DEFAULT, {}).pairs[0].rows}
    assert rows["kl_divergence.mean"].standard_error == pytest.approx(5e-4)
    assert rows["perplexity.ratio"].standard_error == pytest.approx(math.sqrt(2) * 1e-3)
    assert rows["perplexity.candidate"].standard_error == pytest.approx(math.sqrt(2) * 21.5e-3)
    assert rows["top1_agreement"].standard_error == pytest.approx(math.sqrt(2) * 4e-3)
    assert not STANDARD_ERRORS & set(rows), "they are no metrics to compare"


def test_a_difference_within_the_noise_is_not_called_worse(saved: Save) -> None:
    def side(name: str, candidate: float) -> RunResult:
        found = with_metrics(
            perplexity__candidate=candidate,
            perplexity__ratio_standard_error=0.01,
            top1_agreement__standard_error=0.01,
            rms_delta_p=0.1,
        )
        return build(validation("check", found))

    old, near, far = (
        open_report(saved(name, side(name, value)))
        for name, value in (("old", 21.5), ("near", 21.6), ("far", 23.0))
    )
    for one, other, state in ((old, near, ""), (old, far, "worse"), (far, old, "better")):
        rows = {row.metric: row for row in compare(one, other, {}, {}).pairs[0].rows}
        assert rows["perplexity.candidate"].state == state
        assert rows["rms_delta_p"].noise is None, "nothing is known of it"


def test_what_is_counted_has_no_noise(saved: Save) -> None:
    old = open_report(saved("old", build(validation("check", with_metrics(kernels__unserved=1)))))
    new = open_report(saved("new", build(validation("check", with_metrics(kernels__unserved=2)))))
    for one, other, state in ((old, new, "worse"), (new, old, "better"), (old, old, "")):
        rows = {row.metric: row for row in compare(one, other, {}, {}).pairs[0].rows}
        assert (rows["kernels.unserved"].noise, rows["kernels.unserved"].state) == (0.0, state)


def test_what_a_gate_decides_is_called_passed_or_failed(saved: Save) -> None:
    old = open_report(saved("old", build()))
    new = open_report(saved("new", build(validation("check", measured(ratio=1.5)))))
    for one, other, state in ((old, new, "failed"), (new, old, "passed")):
        rows = {row.metric: row for row in compare(one, other, DEFAULT, {}).pairs[0].rows}
        assert rows["perplexity.ratio"].state == state


def test_an_error_of_one_side_alone_is_none_of_the_difference(saved: Save) -> None:
    known = with_metrics(kl_divergence__standard_error=3e-4)
    old = open_report(saved("old", build(validation("check", known))))
    new = open_report(saved("new", build()))
    for one, other in ((old, new), (new, old)):
        rows = {row.metric: row for row in compare(one, other, DEFAULT, {}).pairs[0].rows}
        assert rows["kl_divergence.mean"].standard_error is None


def test_other_tokens_or_another_reference_are_refused(saved: Save, phiconv: Terminal) -> None:
    one = saved("one", build())
    other_tokens = replace(measured().tokens, ids_digest="sha256:" + "9" * 64)
    two = saved("two", build(validation("check", replace(measured(), tokens=other_tokens))))
    done = phiconv("compare", str(one), str(two))
    assert done.code == 2
    assert "measured on different tokens: default 8x512 (bbbb" in done.err
    assert "and default 8x512 (9999" in done.err
    checkpoint = replace(build().checkpoint, source="other", digest="sha256:" + "8" * 64)
    three = saved("three", replace(build(), checkpoint=checkpoint))
    done = phiconv("compare", str(one), str(three))
    assert done.code == 2
    assert "measured against different references: tiny <phi3> & co | _x_ (dddd" in done.err
    assert "and other (8888" in done.err


def test_different_providers_are_shown(saved: Save, phiconv: Terminal) -> None:
    one = saved("one", build())
    two = saved("two", build(validation("check", measured(DML))))
    done = phiconv("compare", str(one), str(two))
    assert done.code == 0
    assert f"passed on {CPU}, target {DML} not present" in done.out


def test_validations_are_paired_by_stage(saved: Save) -> None:
    both = build(validation("cpu", measured()), validation("genai", measured(top1=0.5)))
    one = open_report(saved("one", both))
    two = open_report(saved("two", build(validation("genai", measured(top1=0.5)))))
    (pair,) = compare(one, two, DEFAULT, {}).pairs
    assert (pair.baseline.stage, pair.candidate.stage) == ("genai", "genai")
    renamed = open_report(saved("renamed", build(validation("validate", measured()))))
    with pytest.raises(RecipeError, match="no validation in common: cpu, genai and validate"):
        compare(one, renamed, DEFAULT, {})
    single = open_report(saved("single", build()))
    assert len(compare(single, renamed, DEFAULT, {}).pairs) == 1, "the only one of each"


def test_what_the_candidate_did_not_run_is_no_success(saved: Save, phiconv: Terminal) -> None:
    one = saved("one", build(validation("a", measured()), validation("b", measured())))
    two = saved("two", build(validation("a", measured()), validation("b", not_run())))
    done = phiconv("compare", str(one), str(two))
    assert done.code == 5
    assert f"not compared: b: not run, target {DML} not present" in done.out
    nothing = saved("nothing", build(validation("a", not_run())))
    assert phiconv("compare", str(nothing), str(one)).code == 2


def test_gates_of_a_file(saved: Save, phiconv: Terminal, tmp_path: Path) -> None:
    def side(top1: float) -> RunResult:
        found = with_metrics(top1_agreement=top1, top1_agreement__standard_error=6e-3)
        return build(validation("check", found))

    old, new = saved("old", side(0.97)), saved("new", side(0.5))
    gates = tmp_path / "gates.yaml"
    gates.write_text("perplexity.ratio: {max_regression: 0.1}\n")
    assert phiconv("compare", str(old), str(new), "--gates", str(gates)).code == 0
    gates.write_text("top1_agreement: {min: 0.9, max_regression: 1%}\n")
    done = phiconv("compare", str(old), str(new), "--gates", str(gates))
    assert done.code == 4
    failed = [line for line in done.out.splitlines() if line.startswith("failed")]
    assert failed[0].startswith("failed: top1_agreement is worse by 0.47 ± 0.0085 (0.97 -> 0.5)")
    assert failed[1].startswith("failed: top1_agreement measured 0.5 ± 0.006, limit min 0.9")
    gates.write_text("top1_agreement: {max_regresion: 1%}\n")
    done = phiconv("compare", str(old), str(new), "--gates", str(gates))
    assert done.code == 2
    assert "did you mean 'max_regression'?" in done.err


def test_wrong_settings_are_all_told(saved: Save, phiconv: Terminal) -> None:
    one = saved("one", build())
    settings = [
        "top1_agrement=0.1", "perplexity.reference=1", "top1_agreement=-1", "top1_agreement",
        "logit_error.max=1", "kl_divergence.mean=x%",
    ]  # fmt: skip
    options = [part for text in settings[:-2] for part in ("--max-regression", text)]
    done = phiconv("compare", str(one), str(one), *options)
    assert done.code == 2
    assert "did you mean 'top1_agreement'?" in done.err
    assert "perplexity.reference can get neither better nor worse" in done.err
    done = phiconv("compare", str(one), str(one), "--max-regression", settings[-2])
    assert done.code == 2
    assert "logit_error.max is not measured by both" in done.err
    assert phiconv("compare", str(one), str(one), "--max-regression", settings[-1]).code == 2


def test_it_prints_json(saved: Save, phiconv: Terminal) -> None:
    one = saved("one", build())
    two = saved("two", build(validation("check", measured(ratio=1.5))))
    done = phiconv("compare", str(one), str(two), "--json")
    assert done.code == 4
    document = json.loads(done.out)
    assert len(document["failures"]) == 1
    (pair,) = document["pairs"]
    assert {row["metric"] for row in pair["metrics"]} <= set(METRICS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.002", Allowance(0.002)), ("10%", Allowance(relative=0.1)), ("0", Allowance())],
)
def test_allowances_are_numbers_or_percentages(text: str, expected: Allowance) -> None:
    assert parse_allowance(text, "x") == expected
