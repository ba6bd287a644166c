"""Systems by blocks against float64."""

import pytest
import torch

from awq.algorithm.inputs import systems
from awq.algorithm.inputs.systems import Factored


@pytest.mark.parametrize("size", [1, 15, 16, 17, 50, 64])
@pytest.mark.parametrize("columns", [1, 9])
def test_blocks_solve_what_the_whole_does(size: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "_BLOCK", 16)
    monkeypatch.setattr(systems, "_SMALL", 5)
    x = torch.randn(4 * size, size, dtype=torch.float64)
    gram, right = x.t() @ x + torch.eye(size), torch.randn(columns, size).t()
    factored = Factored(torch.linalg.cholesky(gram).float().t().contiguous().t())
    wanted = torch.linalg.solve(gram, right.double())
    for found in (factored.solve(right), factored._by_blocks(right)):
        assert (found - wanted).norm() < 1e-4 * wanted.norm()
