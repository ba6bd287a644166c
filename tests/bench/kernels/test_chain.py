import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from awq.bench.kernels.chain import _LINKS, Chain, Fresh, relative_error, worst
from awq.bench.kernels.shapes import Setting, Shape
from awq.bench.kernels.weights import dense_weight, random_linear

SHAPES = [Shape(64, 64), Shape(96, 64), Shape(64, 160)]


def multiply(x: Tensor, weight: Tensor, y: Tensor) -> None:
    torch.matmul(x, weight.t(), out=y)


def chain_of(shape: Shape, rows: int, call: Callable[[Tensor, Tensor, Tensor], None], copies: int = 3) -> Chain[Tensor]:
    weight = torch.randn(shape.out_features, shape.in_features) / shape.in_features**0.5
    x = torch.randn(rows, shape.in_features)
    return Chain(call, [weight] * copies, lambda x: x @ weight.t(), shape, x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_call_reads_what_the_one_before_wrote(shape: Shape, rows: int) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(x: Tensor, weight: Tensor, y: Tensor) -> None:
        assert x.is_contiguous() and y.is_contiguous()
        multiply(x, weight, y)
        seen.append((x.clone(), y.clone()))

    chain = chain_of(shape, rows, spy)
    for i in range(5):
        chain.step(i)
    for (_, y), (x, _) in pairwise(seen):
        shared = min(x.numel(), y.numel())
        assert torch.equal(x.flatten()[:shared], y.flatten()[:shared])
    assert torch.equal(chain.output_after(5), seen[-1][1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("calls", [1, 2, 7, _LINKS + 1, _LINKS + 2])
def test_a_right_kernel_passes(shape: Shape, calls: int) -> None:
    chain = chain_of(shape, 3, multiply)
    chain.poison()
    for i in range(calls):
        chain.step(i)
    assert chain.check_after(calls) < 1e-6
    assert chain.check() < 1e-6


def test_the_first_input_returns() -> None:
    seen: list[Tensor] = []
    chain = chain_of(SHAPES[0], 1, lambda x, weight, y: seen.append(x))
    for i in range(_LINKS + 1):
        chain.step(i)
    assert seen[0] is seen[_LINKS]
    assert seen[0] is not seen[1]


def test_a_wrong_and_an_unwritten_value_show() -> None:
    def wrong(x: Tensor, weight: Tensor, y: Tensor) -> None:
        multiply(x, weight, y)
        y[0, 0] += 1

    def partial(x: Tensor, weight: Tensor, y: Tensor) -> None:
        y[:, 1:] = (x @ weight.t())[:, 1:]

    assert chain_of(SHAPES[0], 3, wrong).check() > 0.01
    assert math.isnan(chain_of(SHAPES[0], 3, partial).check())


def test_a_link_that_goes_wrong_only_in_a_series_shows() -> None:
    calls = 0

    def racy(x: Tensor, weight: Tensor, y: Tensor) -> None:
        nonlocal calls
        calls += 1
        multiply(x, weight, y)
        if calls == 7:
            y[0] = 0

    chain = chain_of(SHAPES[0], 1, racy)
    for i in range(7):
        chain.step(i)
    assert chain.check_after(7) == pytest.approx(1)


def test_a_copy_of_the_weight_that_differs_shows() -> None:
    weights = [torch.eye(64), torch.eye(64), 2 * torch.eye(64)]
    chain = Chain(multiply, weights, lambda x: x, SHAPES[0], torch.randn(1, 64))
    assert chain.check() == pytest.approx(1)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("size", [(576, 576), (3072, 576), (576, 1536)])
def test_values_stay_in_float16s_range(size: tuple[int, int], zero_point: bool) -> None:
    """Also for the smallest linears, where few scales make the largest swings."""
    packed, _ = random_linear(Setting(Shape(*size), 64, torch.float16, zero_point))
    weight, largest, smallest = dense_weight(packed, None), 0.0, math.inf

    def spy(x: Tensor, weight: Tensor, y: Tensor) -> None:
        nonlocal largest, smallest
        multiply(x, weight, y)
        largest, smallest = max(largest, y.abs().max().item()), min(smallest, y.std().item())

    chain = Chain(spy, [weight], lambda x: x @ weight.t(), Shape(*size), torch.randn(1, size[1]))
    for i in range(2 * _LINKS):
        chain.step(i)
    assert largest < 16000
    assert smallest > 1e-3


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (1.1, 0.1), (math.inf, math.nan)])
def test_functions_that_return_their_result(factor: float, expected: float) -> None:
    calls = Fresh([lambda x: x, lambda x: factor * x], lambda x: x, torch.ones(2, 8))
    assert calls.copies == 2
    assert torch.equal(calls.step(2), torch.ones(2, 8))
    assert calls.check() == pytest.approx(expected, nan_ok=True)
    assert calls.check_after(5) == pytest.approx(expected, nan_ok=True)


def test_relative_error() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 5.0]), expected) == pytest.approx(0.2)
    assert math.isnan(relative_error(torch.tensor([3.0, math.nan]), expected))
    assert math.isnan(relative_error(torch.ones(1, 2), expected))


def test_nan_is_worst() -> None:
    assert worst(0.1, 0.3) == 0.3
    assert math.isnan(worst(0.1, math.nan, 0.3))
    assert math.isnan(worst(math.nan, 0.1))
