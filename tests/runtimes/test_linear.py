from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from phiconv.runtimes import linear as module
from phiconv.runtimes.linear import compute_linear_layers, linear

SHAPES = [(1, 352, 128), (96, 512, 256), (513, 4096, 1536), (128, 777, 1023)]
onednn = pytest.mark.skipif(not module._has_onednn(), reason="PyTorch has no oneDNN here")


def operands(rows: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return (
        torch.randn(rows, inputs, generator=generator),
        torch.randn(outputs, inputs, generator=generator),
    )


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_the_exact_one_up_to_rounding(shape: tuple[int, int, int]) -> None:
    values, weight = operands(*shape)
    exact = values.double() @ weight.double().T
    # the sum of K products, each of order 1, in fp32
    bound = 4e-7 * shape[2]
    assert (linear(values, weight) - exact).abs().max() < bound
    assert (torch.nn.functional.linear(values, weight) - exact).abs().max() < bound


def test_a_bias_and_leading_axes_are_taken() -> None:
    values, weight = operands(12, 40, 24)
    bias = torch.arange(40.0)
    found = linear(values.view(3, 4, 24), weight, bias)
    assert found.shape == (3, 4, 40)
    expected = torch.nn.functional.linear(values, weight, bias)
    torch.testing.assert_close(found.view(12, 40), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_no_bit(shape: tuple[int, int, int]) -> None:
    values, weight = operands(*shape)
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(linear(values, weight).numpy().tobytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    values, weight = operands(4, 32, 16)
    values[2, 3] = value
    finite = linear(values, weight).isfinite().all(dim=1)
    assert finite.tolist() == [True, True, False, True]


@onednn
def test_without_onednn_the_product_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weight = operands(64, 300, 700)
    monkeypatch.setattr(module, "_has_onednn", lambda: False)
    assert torch.equal(linear(values, weight), torch.nn.functional.linear(values, weight))


def test_another_dtype_is_left_to_pytorch() -> None:
    values, weight = (tensor.bfloat16() for tensor in operands(4, 32, 16))
    assert torch.equal(linear(values, weight), torch.nn.functional.linear(values, weight))


def test_the_linear_layers_of_a_module_compute_by_it_and_are_freed_with_it() -> None:
    first, second = torch.nn.Linear(24, 40), torch.nn.Linear(40, 8)
    block = torch.nn.Sequential(first, torch.nn.SiLU(), second)
    values = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = block(values)
        found = compute_linear_layers(block)(values)
        inner = torch.nn.functional.silu(linear(values, first.weight, first.bias))
        assert torch.equal(found, linear(inner, second.weight, second.bias))
    torch.testing.assert_close(found, expected)
    weight = weakref.ref(first.weight)
    gc.disable()
    try:
        del block, first
        assert weight() is None  # a layer must not wait for the collector
    finally:
        gc.enable()
