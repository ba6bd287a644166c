"""float32 products on tensor cores."""

import pytest
import torch

from awq.algorithm.inputs.precision import (
    add_gram,
    add_product,
    fast_matmul,
    half_forward,
    mirror,
    operand,
    product,
)
from awq.algorithm.inputs.systems import Factored, inverted

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 5), (200, 11008, 4100), (4096, 4096, 4096)])
def test_three_products_are_as_exact_as_float32(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner, device="cuda"), torch.randn(inner, columns, device="cuda")
    exact, size = a.double() @ b.double(), (a.abs() @ b.abs()).double()
    with fast_matmul(enabled=False):
        ours, plain = product(a, b), a @ b
    with fast_matmul():
        fast = product(a, b)
    error, own, coarse = (float(((one - exact).abs() / size).max()) for one in (ours, plain, fast))
    assert error < max(4 * own, 2.0**-19)
    assert inner == 1 or error < 0.1 * coarse
    with fast_matmul(enabled=False):
        assert torch.equal(product(a, b), ours)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 5), (2048, 4096, 1000)])
def test_fast_products_are_of_bf16_in_float32(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner, device="cuda"), torch.randn(columns, inner, device="cuda").t()
    wanted = a.bfloat16().double() @ b.bfloat16().double()
    total = torch.ones(rows, columns, device="cuda")
    with fast_matmul():
        found, same = product(a, b), product(operand(a), operand(b))
        add_product(total, a, b, 2)
    assert found.dtype == torch.float32 and torch.equal(found, same)
    assert (found - wanted).norm() < 1e-5 * wanted.norm() + 1e-6
    assert (total - 2 * wanted - 1).norm() < 1e-5 * total.double().norm()


@pytest.mark.parametrize("size", [5, 1024, 1025, 4096, 5000])
def test_systems_are_solved_by_exact_products(size: int) -> None:
    x = torch.randn(2 * size, size, device="cuda") * torch.logspace(0, 2, size, device="cuda")
    gram = x.t() @ x + 100 * torch.eye(size, device="cuda")
    lower, right = torch.linalg.cholesky(gram), torch.randn(200, size, device="cuda").t()
    exact = torch.linalg.solve(lower.double() @ lower.double().t(), right.double())
    ours = Factored(lower).solve(right)
    assert (ours - exact).norm() < 1e-4 * exact.norm()  # 1.5e-5 at 5000
    assert torch.equal(Factored(lower).solve(right), ours)


def test_a_forward_is_halved_within_fast_products_only() -> None:
    linear, x = torch.nn.Linear(64, 64, device="cuda"), torch.randn(4, 64, device="cuda")
    with fast_matmul(), half_forward(x.device):
        assert linear(x).dtype == torch.bfloat16
    with fast_matmul(enabled=False), half_forward(x.device):
        assert linear(x).dtype == torch.float32


@pytest.mark.parametrize("width", [64, 2048, 11008])
def test_grams_are_products(width: int) -> None:
    x, total = torch.randn(300, width, device="cuda"), torch.zeros(width, width, device="cuda")
    with fast_matmul():
        add_gram(total, x)
        add_gram(total, x, 2)
    mirror(total)
    wanted = 3 * x.bfloat16().float().t() @ x.bfloat16().float()
    assert (total - wanted).norm() < 1e-5 * wanted.norm()
    assert torch.equal(total.triu(2048), total.tril(-2048).t())


@pytest.mark.parametrize("size", [5, 1024, 1025, 3000])
def test_triangles_are_inverted_by_products(size: int) -> None:
    lower = torch.randn(size, size, device="cuda").tril(-1) / size + torch.eye(size, device="cuda")
    assert (inverted(lower).double() @ lower.double() - torch.eye(size, device="cuda")).norm() < 1e-4
