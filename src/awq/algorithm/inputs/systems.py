"""Linear systems of a Gram matrix, by its Cholesky factor."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.algorithm.inputs.precision import add_product

_BLOCK = 1024


def solve_factored(lower: Tensor, right: Tensor) -> Tensor:
    """(lower lower^T)^-1 right, float32 [n, k].

    On a GPU the most of it are products: cuBLAS solves triangles at a tenth of the speed of its products.
    """
    if right.device.type != "cuda":
        return torch.cholesky_solve(right, lower)
    x = right.clone(memory_format=torch.contiguous_format)
    _solve(lower, x, slice(0, len(x)), upper=False)
    _solve(lower.t(), x, slice(0, len(x)), upper=True)
    return x


def _solve(triangle: Tensor, x: Tensor, part: slice, upper: bool) -> None:
    """Put the solution in the place of the right-hand side `x`, `part` of it."""
    size = part.stop - part.start
    if size <= _BLOCK:
        x[part] = torch.linalg.solve_triangular(triangle[part, part], x[part], upper=upper)
        return
    middle = part.start + _BLOCK * (-(-size // _BLOCK) // 2)
    first, last = slice(part.start, middle), slice(middle, part.stop)
    if upper:
        first, last = last, first
    _solve(triangle, x, first, upper)
    add_product(x[last], triangle[last, first], x[first], -1)
    _solve(triangle, x, last, upper)
