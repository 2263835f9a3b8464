from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

from phiconv.metrics import NO_TARGET, PositionStatistics, compare_logits
from phiconv.metrics import positions as module


def logits(seed: int, positions: int = 37, vocabulary: int = 203, scale: float = 4.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((positions, vocabulary)) * scale).astype(np.float32)


def compare(reference: np.ndarray, candidate: np.ndarray) -> PositionStatistics:
    targets = np.random.default_rng(9).integers(0, reference.shape[1], len(reference))
    return compare_logits(reference, candidate, targets)


@pytest.mark.parametrize("noise", [1e-5, 0.1, 3.0, 100.0])
def test_kl_divergence_is_scipys_relative_entropy(noise: float) -> None:
    reference = logits(0)
    candidate = reference + np.float32(noise) * logits(1, scale=1)
    p = softmax(reference.astype(np.float64), axis=1)
    log_q = log_softmax(candidate.astype(np.float64), axis=1)
    expected = (p * (log_softmax(reference.astype(np.float64), axis=1) - log_q)).sum(axis=1)
    found = compare(reference, candidate).kl_divergence
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
    if noise < 10:  # beyond, softmax underflows where the logits do not
        np.testing.assert_allclose(found, rel_entr(p, np.exp(log_q)).sum(axis=1), atol=1e-12)


def test_kl_divergence_is_torchs() -> None:
    reference, candidate = logits(0), logits(1)
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(torch.from_numpy(candidate).double(), -1),
        torch.log_softmax(torch.from_numpy(reference).double(), -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    found = compare(reference, candidate).kl_divergence
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)


def test_equal_logits_have_no_divergence_and_full_agreement() -> None:
    reference = logits(0)
    found = compare(reference, reference)
    assert found.kl_divergence.max() == 0
    assert found.top1_equal.all()
    assert (found.top5_shared == 5).all()
    assert found.max_logit_error.max() == 0
    np.testing.assert_allclose(found.cosine, 1, rtol=1e-14)


def test_logits_that_are_all_zero_have_no_direction() -> None:
    reference = logits(0)
    reference[5] = 0
    found = compare(reference, logits(1)).cosine
    assert found[5] == 0
    assert np.isfinite(found).all()


def test_a_constant_added_to_all_logits_changes_no_probability() -> None:
    reference = logits(0)
    found = compare(reference, reference + np.float32(8))
    assert found.kl_divergence.max() < 1e-12
    assert found.top1_equal.all()
    np.testing.assert_allclose(found.max_logit_error, 8, atol=1e-5)


def test_agreement_of_the_greatest_ids_is_that_of_a_stable_sort() -> None:
    reference, candidate = logits(0), logits(0) + logits(1, scale=2)
    order_r = np.argsort(-reference, axis=1, kind="stable")[:, :5]
    order_c = np.argsort(-candidate, axis=1, kind="stable")[:, :5]
    found = compare(reference, candidate)
    np.testing.assert_array_equal(found.top1_equal, order_r[:, 0] == order_c[:, 0])
    shared = [len(set(r) & set(c)) for r, c in zip(order_r, order_c, strict=True)]
    np.testing.assert_array_equal(found.top5_shared, shared)
    assert 0 < found.top5_shared.mean() < 5


def test_ties_go_to_the_lower_id() -> None:
    flat = np.zeros((1, 8), dtype=np.float32)
    raised = flat.copy()
    raised[0, 7] = 1
    found = compare_logits(flat, raised, np.array([0]))
    assert not found.top1_equal[0]
    assert found.top5_shared[0] == 4  # ids 0-4 against 7, 0-3


def test_log_probabilities_errors_and_cosine() -> None:
    reference, candidate = logits(0), logits(1)
    targets = np.random.default_rng(2).integers(0, reference.shape[1], len(reference))
    targets[5] = NO_TARGET
    found = compare_logits(reference, candidate, targets)
    rows = np.arange(len(reference))
    for values, of in (
        (found.reference_log_probability, reference),
        (found.candidate_log_probability, candidate),
    ):
        expected = log_softmax(of.astype(np.float64), axis=1)[rows, targets]
        known = rows != 5
        np.testing.assert_allclose(values[known], expected[known], rtol=1e-12)
        assert np.isnan(values[5])
    difference = reference.astype(np.float64) - candidate
    np.testing.assert_array_equal(found.max_logit_error, np.abs(difference).max(axis=1))
    np.testing.assert_allclose(found.mean_squared_logit_error, (difference**2).mean(axis=1))
    cosine = torch.nn.functional.cosine_similarity(
        torch.from_numpy(reference).double(), torch.from_numpy(candidate).double()
    )
    np.testing.assert_allclose(found.cosine, cosine.numpy(), rtol=1e-10)


def test_the_cosine_of_equal_rows_is_one_so_that_a_gate_at_one_can_be_met() -> None:
    reference = logits(0)
    assert (compare(reference, reference).cosine == 1).all()


def test_the_arguments_are_not_changed() -> None:
    reference, candidate = logits(0), logits(1)
    before = reference.copy(), candidate.copy()
    compare(reference, candidate)
    np.testing.assert_array_equal(reference, before[0])
    np.testing.assert_array_equal(candidate, before[1])


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate = logits(0), logits(1)
    whole = compare(reference, candidate)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 3 * reference.shape[1])
    blocks = compare(reference, candidate)
    np.testing.assert_array_equal(whole.kl_divergence, blocks.kl_divergence)
    np.testing.assert_array_equal(whole.top5_shared, blocks.top5_shared)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_found(value: float) -> None:
    reference, candidate = logits(0), logits(1)
    candidate[11, 7] = value
    found = compare(reference, candidate)
    assert found.first_non_finite() == 11
    assert compare(reference, logits(1)).first_non_finite() is None


@pytest.mark.parametrize(
    ("candidate", "targets", "message"),
    [
        (logits(1, vocabulary=9), np.zeros(37, np.int64), r"logits of shape \(37, 203\) against"),
        (logits(1)[:1], np.zeros(37, np.int64), "against \\(1, 203\\)"),
        (logits(1), np.zeros(36, np.int64), "targets of shape"),
        (logits(1), np.full(37, 203), "outside the vocabulary"),
        (logits(1), np.full(37, -2), "outside the vocabulary"),
    ],
)
def test_what_does_not_fit_is_refused(
    candidate: np.ndarray, targets: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare_logits(logits(0), candidate, targets)


def test_a_vocabulary_too_small_for_five_ids_is_refused() -> None:
    tiny = logits(0, vocabulary=4)
    with pytest.raises(ValueError, match="vocabulary of 4"):
        compare_logits(tiny, tiny, np.zeros(len(tiny), np.int64))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e3))
def test_a_divergence_is_never_negative(seed: int, noise: float) -> None:
    reference = logits(seed, positions=4, vocabulary=17)
    candidate = reference + np.float32(noise) * logits(seed + 1, 4, 17, 1)
    assert compare(reference, candidate).kl_divergence.min() >= 0


@pytest.mark.parametrize("scale", [4, 30, 300])
@pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-2])
def test_a_small_divergence_is_exact_to_the_digits_it_is_said_to_be(
    scale: float, noise: float
) -> None:
    """Against terms that cannot cancel, p (d + exp(-d) - 1) of d = ln p - ln q, in long double."""
    reference = logits(0, vocabulary=4096, scale=scale)
    candidate = reference + np.float32(noise * scale) * logits(1, vocabulary=4096, scale=1)
    log_p, log_q = (of - logsumexp(of) for of in map(np.longdouble, (reference, candidate)))
    difference = log_p - log_q
    expected = (np.exp(log_p) * (difference + np.expm1(-difference))).sum(axis=1)
    found = compare(reference, candidate).kl_divergence
    np.testing.assert_allclose(found, expected.astype(float), rtol=1e-12, atol=2e-14)


def logsumexp(values: np.ndarray) -> np.ndarray:
    top = values.max(axis=1, keepdims=True)
    return np.asarray(np.log(np.exp(values - top).sum(axis=1, keepdims=True)) + top)
