from __future__ import annotations

import math
from dataclasses import replace

import pytest

from phiconv.gates import BUILT_IN, DEFAULT, DEFAULT_GENERATION, check_gates, judge
from phiconv.report import text
from phiconv.report.results import Check, Measurement, Provenance, TokenSetRecord, Validation

TOKENS = TokenSetRecord("default", 8, 512, "sha256:aa", "sha256:0123456789abcdef")
CPU, DML = "CPUExecutionProvider", "DmlExecutionProvider"


def measurement(target: str = CPU, provider: str | None = CPU, **metrics: float) -> Measurement:
    return Measurement(
        status="measured" if provider else "not_run",
        tokens=TOKENS,
        provenance=Provenance("onnxruntime", "1.31.1", target, provider),
        metrics={name.replace("__", "."): value for name, value in metrics.items()},
    )


def test_a_failed_gate_is_one_line_with_all_that_matters() -> None:
    found = measurement(kl_divergence__mean=0.0512345678, top1_agreement=0.95)
    gates = {"kl_divergence.mean": {"max": 0.04}, "top1_agreement": {"min": 0.9}}
    failed, passed = judge(found, gates)
    assert str(failed) == (
        "failed: kl_divergence.mean measured 0.0512346, limit max 0.04, "
        "provider CPUExecutionProvider, tokens default 8x512 (0123456789ab)"
    )
    assert not failed.passed
    assert passed.passed
    assert str(passed).startswith("passed: top1_agreement measured 0.95, limit min 0.9,")


@pytest.mark.parametrize(
    ("bound", "limit", "passes"),
    [
        ("max", 0.5, True),
        ("max", math.nextafter(0.5, 0), False),
        ("min", 0.5, True),
        ("min", math.nextafter(0.5, 1), False),
    ],
)
def test_a_limit_itself_passes_and_a_hair_beyond_fails(
    bound: str, limit: float, passes: bool
) -> None:
    (result,) = judge(measurement(top1_agreement=0.5), {"top1_agreement": {bound: limit}})
    assert result.passed is passes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails_either_bound(value: float) -> None:
    found = measurement(perplexity__ratio=value)
    for bound in ("min", "max"):
        (result,) = judge(found, {"perplexity.ratio": {bound: 1.0}})
        assert not result.passed


def test_a_missing_value_fails() -> None:
    (result,) = judge(measurement(), {"top1_agreement": {"min": 0.0}})
    assert not result.passed
    assert "measured not finite" in str(result)


def test_both_bounds_are_judged() -> None:
    gates = {"perplexity.ratio": {"min": 0.9, "max": 1.1}}
    assert [r.passed for r in judge(measurement(perplexity__ratio=1.2), gates)] == [True, False]


@pytest.mark.parametrize(
    ("target", "provider", "value", "verdict"),
    [
        (CPU, CPU, 0.99, "passed on CPUExecutionProvider"),
        (CPU, CPU, 0.5, "failed on CPUExecutionProvider"),
        (DML, CPU, 0.99, "passed on CPUExecutionProvider, target DmlExecutionProvider not present"),
        (DML, CPU, 0.5, "failed on CPUExecutionProvider, target DmlExecutionProvider not present"),
        (DML, None, 0.99, "not run, target DmlExecutionProvider not present"),
    ],
)
def test_verdicts(target: str, provider: str | None, value: float, verdict: str) -> None:
    found = measurement(target, provider, top1_agreement=value)
    gates = judge(found, {"top1_agreement": {"min": 0.9}})
    validation = Validation("check", "int4", found, gates)
    assert validation.verdict == verdict
    assert validation.status == verdict.split()[0].replace("not", "not_run")


def test_not_run_never_counts_as_passed_even_without_gates() -> None:
    assert Validation("check", "int4", measurement(DML, None)).status == "not_run"


def test_without_gates_nothing_passed() -> None:
    validation = Validation("check", "int4", measurement(top1_agreement=1.0))
    assert validation.status == "ungated"
    assert validation.verdict == "measured on CPUExecutionProvider"


CHECK = Check("kernels", "errors", "1 node", ("x" * 300, "b"), ("kernels.unserved",))


def checked(target: str, provider: str | None, unserved: float) -> Measurement:
    found = measurement(target, provider, kernels__unserved=unserved, top1_agreement=0.95)
    return replace(found, checks=(CHECK,))


@pytest.mark.parametrize("provider", [CPU, None])
def test_a_built_in_gate_holds_without_being_asked_for(provider: str | None) -> None:
    found = checked(DML, provider, 1)
    (result,) = judge(found, {})
    assert result.built_in
    assert not result.passed
    assert result.provider == DML, "the target's kernels are meant"
    assert str(result).endswith(f": {'x' * 199}… (and 1 more)")
    assert Validation("check", "int4", found, (result,)).status == "failed"


def test_built_in_gates_alone_make_nothing_pass() -> None:
    found = checked(CPU, CPU, 0)
    assert Validation("check", "int4", found, judge(found, {})).status == "ungated"
    gated = judge(found, {"top1_agreement": {"min": 0.9}})
    assert [gate.metric for gate in gated] == ["top1_agreement", "kernels.unserved"]
    assert Validation("check", "int4", found, gated).status == "passed"


def test_a_recipes_gate_replaces_a_built_in_one() -> None:
    (result,) = judge(checked(CPU, CPU, 2), {"kernels.unserved": {"max": 2}})
    assert result.passed
    assert not result.built_in


@pytest.mark.parametrize("provider", [CPU, None])
def test_a_recipes_gate_on_the_targets_kernels_is_judged_even_if_nothing_ran(
    provider: str | None,
) -> None:
    gates = {"kernels.unserved": {"max": 0}, "top1_agreement": {"min": 0.9}}
    found = measurement(DML, provider, kernels__unserved=1)
    results = judge(found, {**gates, "kl_divergence.mean": {"max": 1}})
    kernels = results[0]
    assert (kernels.metric, kernels.passed, kernels.provider) == ("kernels.unserved", False, DML)
    assert len(results) == (3 if provider else 1)
    assert all(result.provider == CPU for result in results[1:]), "where it was measured"


def test_what_was_found_without_running_is_about_the_target() -> None:
    (result,) = judge(measurement(DML, None, parity__tokenizer=1), {})
    assert result.provider == DML


def test_what_was_not_checked_has_no_built_in_gate() -> None:
    assert judge(measurement(top1_agreement=1.0), {}) == ()


def test_the_default_and_the_built_in_gates_are_gates() -> None:
    for gates in (DEFAULT, BUILT_IN):
        assert check_gates(gates, generates=False) == []
    assert check_gates(DEFAULT_GENERATION, generates=True) == []


def test_gates_that_can_be_judged_are_no_problem() -> None:
    gates = {"kl_divergence.p99": {"max": 1.0}, "top1_agreement": {"min": 0.9, "max": 1.0}}
    assert check_gates(gates, generates=False) == []
    assert check_gates({"decode_error.max": {"max": 0.1}}, generates=True) == []


@pytest.mark.parametrize(
    ("gates", "message", "remedy"),
    [
        ({"kl_divergence.men": {"max": 1}}, "unknown metric 'kl_divergence.men'",
         "did you mean 'kl_divergence.mean'?"),
        ({"zzzz": {"max": 1}}, "unknown metric 'zzzz'", "metrics: kl_divergence.mean, "),
        ({"decode_error.max": {"max": 1}}, "not measured by this runtime", "onnxruntime-genai"),
        ({"top1_agreement": {}}, "has no limit", "min or a max"),
        ({"top1_agreement": {"min": math.nan}}, "not a finite number", ""),
        ({"top1_agreement": {"min": 0.9, "max": math.inf}}, "not a finite number", ""),
        ({"top1_agreement": {"min": 1.0, "max": 0.5}}, "greater than its max", ""),
    ],
)  # fmt: skip
def test_a_gate_that_could_never_be_judged_is_found_beforehand(
    gates: dict[str, dict[str, float]], message: str, remedy: str
) -> None:
    (error,) = check_gates(gates, generates=False, where="validate: gates")
    assert error.exit_code == 2
    assert message in error.message
    assert remedy in (error.remedy or "")
    assert error.where == f"validate: gates.{next(iter(gates))}"


def test_every_wrong_gate_is_reported_at_once() -> None:
    assert len(check_gates({"a": {"max": 1}, "b": {"max": 1}}, generates=False)) == 2


def test_a_limit_just_below_the_value_is_told_apart_from_it() -> None:
    gates = {"kl_divergence.mean": {"max": math.nextafter(8.92134e-05, 0)}}
    (result,) = judge(measurement(kl_divergence__mean=8.92134e-05), gates)
    assert "measured 8.92134e-05, limit max 8.921339999999999e-05," in str(result)


ERRORS = {"top1_agreement__standard_error": 0.008, "kl_divergence__standard_error": 0.0007}


def test_a_gate_states_the_error_of_what_it_judges() -> None:
    found = measurement(kl_divergence__mean=0.0512, top1_agreement=0.95, **ERRORS)
    gates = {"kl_divergence.mean": {"max": 0.04}, "kl_divergence.p99": {"max": 1}}
    failed, other = judge(found, gates)
    assert "measured 0.0512 ± 0.0007, limit max 0.04, " in str(failed)
    assert other.standard_error is None
    older = measurement(kl_divergence__mean=0.0512, kl_divergence__standard_error=0.0002)
    (judged,) = judge(older, {"kl_divergence.mean": {"max": 0.04}})
    assert judged.standard_error is None, "it counted positions"


@pytest.mark.parametrize(
    ("limit", "close"), [(0.921, True), (0.914, True), (0.912, False), (0.93, False)]
)
def test_a_pass_by_less_than_the_standard_error_is_close(limit: float, close: bool) -> None:
    found = measurement(top1_agreement=0.921, **ERRORS)
    gates = judge(found, {"top1_agreement": {"min": limit}})
    assert gates[0].close is close
    lines = text.close_gates(Validation("check", "int4", found, gates))
    assert lines == (
        [
            f"close: top1_agreement passed min {limit} by less than its standard error "
            "(0.921 ± 0.008): more windows would tell"
        ]
        if close
        else []
    )
    without = judge(measurement(top1_agreement=0.921), {"top1_agreement": {"min": limit}})
    assert not without[0].close
