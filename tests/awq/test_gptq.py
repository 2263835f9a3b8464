from __future__ import annotations

import numpy as np
import pytest
import torch

from phiconv.awq.gptq import Codes, Gptq, GramFactor
from phiconv.awq.rounding import Folded, Nearest
from phiconv.checkpoint.weight_source import Grid
from phiconv.errors import StageError
from phiconv.kernels.matmulnbits import dequantize_rows, layout

DAMPING = 0.01


def inputs(size: int, seed: int = 0) -> torch.Tensor:
    """Gram matrix of correlated inputs, float32 [size, size]."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((1200, size)) @ random.standard_normal((size, size)) * 0.1
    values += random.standard_normal(values.shape)
    return torch.from_numpy((values.T @ values / len(values)).astype(np.float32))


def damped(gram: torch.Tensor) -> np.ndarray:
    values = gram.numpy().astype(np.float64)
    return values + np.diag(DAMPING * values.diagonal())


def folded(n: int, size: int, seed: int = 0) -> Folded:
    random = np.random.default_rng(seed)
    return Folded(
        random.standard_normal((n, size)).astype(np.float32),
        np.exp(random.standard_normal(size) / 2).astype(np.float32),
        np.exp(random.standard_normal(n)).astype(np.float32),
    )


def rounded(codes: Codes, weight: Folded, group_size: int) -> np.ndarray:
    """The weight that codes stand for, before its factors, float64."""
    values = codes.weights(np.arange(len(weight.stored)), group_size).astype(np.float64)
    return values / weight.columns / weight.rows[:, None]


def output_error(errors: np.ndarray, gram: np.ndarray) -> float:
    return float(np.einsum("nk,kl,nl->", errors, gram, errors))


@pytest.mark.parametrize("size", [96, 128, 300])
def test_the_factor_is_the_gram_matrix(size: int) -> None:
    gram = inputs(size)
    found = GramFactor.of(gram, DAMPING, 32, "w")
    upper = found.upper.numpy().astype(np.float64)
    pivots = upper.diagonal()
    factor = np.triu(upper, 1) * pivots + np.diag(pivots)
    reordered = damped(gram)[np.ix_(found.order, found.order)]
    assert np.allclose(factor @ factor.T, reordered, rtol=0, atol=2e-6 * float(gram.max()))


def test_groups_come_by_falling_energy_and_stay_together() -> None:
    gram = torch.diag(torch.tensor([1.0, 2, 9, 8, 3, 3, 7]))
    found = GramFactor.of(gram, DAMPING, 2, "w")
    assert found.order.tolist() == [2, 3, 4, 5, 1, 0, 6]
    assert found.groups.tolist() == [1, 2, 0, 3]


def plain_gptq(values: np.ndarray, gram: np.ndarray, codes: Codes, group_size: int) -> np.ndarray:
    """GPTQ as its paper has it, in float64, with given scales: the inverse of H, no blocks."""
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    work, found = values.copy(), np.empty(values.shape)
    for k in range(values.shape[1]):
        scale = codes.scales[:, k // group_size].astype(np.float64)
        zero = codes.zeros[:, k // group_size]
        found[:, k] = np.clip(np.round(work[:, k] / scale + zero), 0, 15)
        error = (work[:, k] - (found[:, k] - zero) * scale) / upper[k, k]
        work[:, k:] -= error[:, None] * upper[k, k:]
    return found


def test_codes_are_those_of_the_paper() -> None:
    gram, weight = inputs(256), folded(40, 256)
    grid = Grid(4, 32, False)
    factor = GramFactor.of(gram, DAMPING, 32, "w")
    codes = Gptq(grid, "none", 1).round(weight, factor)
    values = weight.stored.astype(np.float64) * weight.columns * weight.rows[:, None]
    scaled = damped(gram) / np.outer(weight.columns, weight.columns)
    order = factor.order
    expected = np.empty((40, 256))
    reordered = Codes(codes.codes, codes.scales[:, factor.groups], codes.zeros[:, factor.groups], 0)
    expected[:, order] = plain_gptq(values[:, order], scaled[np.ix_(order, order)], reordered, 32)
    # float32 rounds a value that lies between two codes the other way now and then, and the rest
    # of such a row follows
    assert np.mean(codes.codes == expected) > 0.97
    assert np.mean((codes.codes == expected).all(axis=1)) > 0.8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (4, 256), (8, 128)])
def test_less_is_lost_than_by_rounding_to_the_nearest(
    bits: int, group_size: int, symmetric: bool
) -> None:
    gram, weight = inputs(512), folded(64, 512)
    grid = Grid(bits, group_size, symmetric)
    codes = Gptq(grid, "mse", 2).round(weight, GramFactor.of(gram, DAMPING, group_size, "w"))
    lost = output_error(rounded(codes, weight, group_size) - weight.stored, damped(gram))
    nearest = output_error(Nearest(grid, "mse", 2).errors(weight), damped(gram))
    assert codes.loss == pytest.approx(lost, rel=1e-4)
    assert lost < 0.85 * nearest


def test_scales_cover_the_range_or_are_searched() -> None:
    gram, weight = inputs(256), folded(40, 256)
    factor = GramFactor.of(gram, DAMPING, 32, "w")
    grid = Grid(4, 32, symmetric=False)
    plain, searched = (Gptq(grid, search, 1).round(weight, factor) for search in ("none", "mse"))
    first = int(factor.groups[0])  # rounded before any error is fed back
    columns = slice(32 * first, 32 * (first + 1))
    values = weight.stored[:, columns] * weight.columns[columns] * weight.rows[:, None]
    covering = (np.maximum(values.max(1), 0) - np.minimum(values.min(1), 0)) / 15
    np.testing.assert_allclose(plain.scales[:, first], covering, rtol=1e-3)
    assert (searched.scales[:, first] < 0.999 * covering).mean() > 0.5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(4, 96), (8, 96), (4, 80)])
def test_packed_codes_are_what_the_operator_reads(bits: int, size: int, symmetric: bool) -> None:
    gram, weight = inputs(size), folded(5, size)
    grid = Grid(bits, 32, symmetric)
    codes = Gptq(grid, "none", 1).round(weight, GramFactor.of(gram, DAMPING, 32, "w"))
    packed = codes.packed(grid)
    shapes = layout(5, size, bits=bits, block_size=32)
    assert packed.codes.shape == shapes.packed
    assert (packed.zero_points is None) == symmetric
    values = dequantize_rows(
        packed.codes,
        packed.scales,
        packed.zero_points,
        bits=bits,
        block_size=32,
        K=size,
        symmetric=symmetric,
    )
    assert np.array_equal(values, codes.weights(np.arange(5), 32))
    assert np.array_equal(packed.scales.astype(np.float32), codes.scales)


def test_threads_and_the_other_rows_do_not_change_codes() -> None:
    gram, weight = inputs(300), folded(70, 300)
    factors = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        factors.append(GramFactor.of(gram, DAMPING, 64, "w"))
    torch.set_num_threads(before)
    assert torch.equal(factors[0].upper, factors[1].upper)
    grid = Grid(4, 64, True)
    one, two = (Gptq(grid, "mse", threads).round(weight, factors[0]) for threads in (1, 2))
    part = Folded(weight.stored[:7], weight.columns, weight.rows[:7])
    alone = Gptq(grid, "mse", 1).round(part, factors[0])
    assert np.array_equal(one.codes, two.codes)
    assert np.array_equal(one.codes[:7], alone.codes)


def test_inputs_that_are_always_zero_are_harmless() -> None:
    gram, weight = inputs(64), folded(8, 64)
    gram[10] = gram[:, 10] = 0
    codes = Gptq(Grid(4, 32, False), "mse", 1).round(weight, GramFactor.of(gram, DAMPING, 32, "w"))
    assert np.isfinite(codes.loss)
    zero = GramFactor.of(torch.zeros(64, 64), DAMPING, 32, "w")
    assert Gptq(Grid(4, 32, False), "mse", 1).round(weight, zero).loss < 1e3


def test_what_cannot_be_factored_is_named() -> None:
    gram = -1000 * torch.ones(64, 64)
    gram.fill_diagonal_(1.0)
    with pytest.raises(StageError, match=r"inputs of model\.layers\.3\.x are degenerate"):
        GramFactor.of(gram, DAMPING, 32, "model.layers.3.x")
