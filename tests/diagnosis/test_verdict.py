"""How measurements become faults and a verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phiconv.diagnosis.results import (
    Fault,
    Finding,
    LayerError,
    OperatorError,
    Rung,
    TensorError,
)
from phiconv.diagnosis.verdict import (
    Evidence,
    entry_rung,
    failed_gates,
    find_faults,
    verdict,
)


def rung(stage: str, kl: float | None, *, on_path: bool = True, top1: float = 1.0) -> Rung:
    note = "the logits are not finite" if kl is None else ""
    return Rung(stage, "", on_path, kl, kl, kl, top1, 1.0, note)


REFERENCE = rung("reference", 0.0)
YARDSTICK = rung("checkpoint dtype", 0.5, on_path=False)
GOOD = TensorError("mlp.down_proj", 1, "w", "int4 block 32", "t", (0, 8), 21.0, 21.1, "ok")
BAD = replace(GOOD, sqnr_db=2.1, status="wrong")
STEP = OperatorError("self_attn.attention", 1, 1e-7, 1e-3, 4.0)
WRONG_STEP = replace(STEP, relative_error=0.4)
WRONG_KEYS = replace(WRONG_STEP, component="self_attn.rotary (keys)")
CACHE = Finding("rotary cache", "error", "self_attn.rotary", (0, 1), "it is shifted")
# as many right weights as keep a single wrong one from being taken for another model
OTHERS = tuple(replace(GOOD, layer=layer) for layer in range(2, 6))


def evidence(
    *rungs: Rung,
    tensors: tuple[TensorError, ...] = (),
    operators: tuple[OperatorError, ...] = (),
    findings: tuple[Finding, ...] = (),
    layers: tuple[LayerError, ...] = (),
) -> Evidence:
    return Evidence(
        (REFERENCE, *rungs), layers, operators, (*tensors, *OTHERS), findings, "quantized weights"
    )


def judged(found: Evidence) -> tuple[str, tuple[Fault, ...]]:
    faults = find_faults(found)
    return verdict(found, faults), faults


def test_the_error_enters_where_it_rises_most() -> None:
    rungs = [REFERENCE, YARDSTICK, rung("cast", 0.001), rung("weights", 0.2), rung("graph", 0.21)]
    found = entry_rung(rungs)
    assert found is not None and found.stage == "weights"
    broken = entry_rung([*rungs, rung("provider", None)])
    assert broken is not None and broken.stage == "provider"
    assert entry_rung([REFERENCE, YARDSTICK, rung("graph", 0.0)]) is None


@pytest.mark.parametrize(
    ("measured", "failed"),
    [
        (rung("graph", 0.01), []),
        (rung("graph", 0.12), ["Mean KL divergence 0.12, limit max 0.1"]),
        (rung("graph", 0.01, top1=0.5), ["Top-1 agreement 0.5, limit min 0.85"]),
        (rung("graph", None), ["the logits are not finite"]),
        (
            replace(rung("graph", 0.01), perplexity_ratio=1.5),
            ["Perplexity ratio 1.5, limit max 1.1"],
        ),
        (
            replace(rung("graph", 0.01), perplexity_ratio=None),
            ["Perplexity ratio not finite"],
        ),
    ],
)
def test_the_default_gates(measured: Rung, failed: list[str]) -> None:
    assert failed_gates(measured) == failed


def test_a_wrong_weight() -> None:
    found = evidence(rung("quantized weights", 0.3), rung("graph", 0.3), tensors=(BAD,))
    text, faults = judged(found)
    assert text == (
        "the error enters at stage 'quantized weights', layer 1, mlp.down_proj "
        "(SQNR 2.1 dB, expected about 21 dB)"
    )
    assert faults[0].evidence == ("stored as w, int4 block 32",)


def test_a_wrong_step_that_nothing_explains() -> None:
    found = evidence(rung("quantized weights", 0.01), rung("graph", 0.4), operators=(WRONG_STEP,))
    assert judged(found)[0] == (
        "the error enters at stage 'graph', layer 1, self_attn.attention (relative error 0.4 on "
        "its own input, at most 1e-03 is rounding)"
    )


def test_a_wrong_step_belongs_to_what_runs_the_graph() -> None:
    found = evidence(rung("graph", 0.01), rung("provider", 0.4), operators=(WRONG_STEP,))
    assert judged(found)[1][0].stage == "provider"


def test_what_follows_from_a_finding_is_its_evidence() -> None:
    found = evidence(rung("graph", 0.2), operators=(WRONG_KEYS, WRONG_STEP), findings=(CACHE,))
    text, (fault,) = judged(found)
    assert text == (
        "the error enters at stage 'graph', layers 0, 1, self_attn.rotary (it is shifted)"
    )
    assert len(fault.evidence) == 2


def test_wrong_rotation_explains_wrong_attention() -> None:
    found = evidence(rung("graph", 0.2), operators=(WRONG_KEYS, WRONG_STEP))
    assert [fault.component for fault in judged(found)[1]] == ["self_attn.rotary"]


def test_a_warning_is_no_fault() -> None:
    found = evidence(rung("graph", 1e-9), findings=(replace(CACHE, severity="warning"),))
    assert judged(found) == ("no fault found: mean KL 1e-09, most of it from stage 'graph'", ())


def test_a_fault_that_hardly_shows_and_one_beside_another_cause() -> None:
    hidden = evidence(rung("graph", 1e-9), findings=(CACHE,))
    assert judged(hidden)[0] == (
        "a fault at stage 'graph', layers 0, 1, self_attn.rotary (it is shifted), though these "
        "tokens hardly show it (mean KL 1e-09)"
    )
    beside = evidence(rung("quantized weights", 0.3), rung("graph", 0.3), findings=(CACHE,))
    assert judged(beside)[0] == (
        "a fault at stage 'graph', layers 0, 1, self_attn.rotary (it is shifted), but Mean KL "
        "divergence 0.3, limit max 0.1, most of it from stage 'quantized weights'"
    )


def test_faults_where_the_error_enters_come_first() -> None:
    found = evidence(
        rung("quantized weights", 0.3), rung("graph", 0.3), tensors=(BAD,), findings=(CACHE,)
    )
    text, faults = judged(found)
    assert [fault.component for fault in faults] == ["mlp.down_proj", "self_attn.rotary"]
    assert text.endswith("; one more fault is listed")


def test_an_error_that_the_format_explains() -> None:
    found = evidence(rung("quantized weights", 0.3), rung("graph", 0.3))
    assert judged(found)[0] == (
        "no fault found, but Mean KL divergence 0.3, limit max 0.1, most of it from stage "
        "'quantized weights', which is the cost of int4 block 32 here"
    )


def test_a_block_whose_error_nothing_explains() -> None:
    layers = (LayerError(1, 0.5, 0.0, 0.5, attention=1e-6, mlp=0.9),)
    exact = replace(GOOD, sqnr_db=None)
    found = evidence(rung("graph", 0.4), tensors=(exact,), operators=(STEP,), layers=layers)
    (fault,) = judged(found)[1]
    assert (fault.component, fault.layers) == ("mlp", (1,))
    assert fault.message.endswith("its weights and types explain at most 0.01")
    # the noise of a 2-bit weight would
    noisy = replace(GOOD, sqnr_db=9.0, expected_db=9.0)
    assert judged(evidence(rung("graph", 0.4), tensors=(noisy,), layers=layers))[1] == ()
    # and with a weight that could not be read nothing can be said
    unread = replace(GOOD, sqnr_db=None, status="unreadable")
    assert judged(evidence(rung("graph", 0.4), tensors=(unread,), layers=layers))[1] == ()


def test_overflow_is_named_with_its_figures() -> None:
    detail = "8 of 64 values overflow fp16: they reach 70000, it ends at 65504"
    inf = OperatorError("mlp.down_proj", 2, None, 1e-2, 60000.0, detail)
    text, faults = judged(evidence(rung("graph", None), operators=(inf,)))
    assert text == f"the error enters at stage 'graph', layer 2, mlp.down_proj ({detail})"
    assert faults[0].layers == (2,)


def test_most_weights_wrong_is_another_model() -> None:
    wrong = tuple(replace(BAD, layer=layer) for layer in range(6, 20))
    (fault,) = judged(evidence(rung("quantized weights", 3.0), tensors=wrong))[1]
    assert fault.message.startswith("14 of 18 weights are not the checkpoint's")


@pytest.mark.parametrize(
    ("layers", "place"),
    [
        ((), "lm_head"),
        ((3,), "layer 3, lm_head"),
        ((0, 2), "layers 0, 2, lm_head"),
        (tuple(range(32)), "layers 0 to 31, lm_head"),
    ],
)
def test_places(layers: tuple[int, ...], place: str) -> None:
    assert Fault("graph", "lm_head", layers, "").place == place
