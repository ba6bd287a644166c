"""float32 products on tensor cores."""

import pytest
import torch

from awq.algorithm.inputs.precision import fast_matmul, product

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
