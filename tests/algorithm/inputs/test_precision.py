"""float32 products by parts that tensor cores read whole."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from awq.algorithm.inputs import precision
from awq.algorithm.inputs.precision import add_gram, add_product, fair_matmul, fast_matmul, mirror, product


def test_the_parts_add_up_and_the_first_is_exact_in_tf32() -> None:
    values = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    high, low = precision._parts(values)
    assert torch.equal(high + low, values)
    assert not (high.view(torch.int32) & 0x1FFF).any()
    assert (low.abs() <= 2.0**-10 * values.abs()).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 5), (17, 33, 4500)])
def test_three_products_are_as_exact_as_float32(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole float32 factors here: what is left out is the product of the two rests."""
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    monkeypatch.setattr(precision, "_has_tensor_cores", lambda _device: True)
    exact = a.double() @ b.double()
    bound = 2.0**-19 * (a.abs().double() @ b.abs().double())
    for second in (b, b.t().contiguous().t()):
        assert ((product(a, second) - exact).abs() <= bound).all()


def test_a_matrix_in_parts_has_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(7, 40), torch.randn(40, 5)
    assert torch.equal(precision.exact_operand(a), a)
    monkeypatch.setattr(precision, "_has_tensor_cores", lambda _device: True)
    parts = precision.exact_operand(a)
    assert isinstance(parts, precision.Parts)
    assert torch.equal(product(parts, b), product(a, b))
    assert torch.equal(product(parts.t(), b[:7]), product(a.t(), b[:7]))


def test_what_is_asked_to_be_fair_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_tensor_cores", lambda _device: True)
    a, b = torch.randn(8, 64), torch.randn(64, 8)
    with fair_matmul():
        assert torch.equal(product(a, b), a @ b)


@pytest.mark.parametrize("mode", [fast_matmul, fair_matmul, lambda: fast_matmul(enabled=False)])
def test_products_are_added_in_place(mode: Callable[[], AbstractContextManager[None]]) -> None:
    total, a, b = torch.randn(20, 30), torch.randn(10, 12), torch.randn(12, 7)
    wanted = total.clone()
    wanted[5:15, 3:10] -= 2 * a @ b
    with mode():
        add_product(total[5:15, 3:10], a, b, -2)
    assert (total - wanted).abs().max() < (1e-1 if mode is fast_matmul else 1e-5)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 30])
def test_grams_are_summed_in_part_and_mirrored(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_COLUMNS", 8)
    x, total = torch.randn(20, width), torch.zeros(width, width)
    for part in x.split(5):
        add_gram(total, part, 0.5)
    mirror(total)
    assert torch.allclose(total, 0.5 * x.t() @ x, atol=1e-5)
