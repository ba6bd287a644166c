"""Linear systems of a Gram matrix, by its Cholesky factor."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from awq.algorithm.inputs.precision import Parts, add_product, exact_operand, product

_BLOCK = 4096  # larger ones are solved by halves of the right-hand side, smaller ones inverted by halves
_SMALL = 1024  # what cuBLAS inverts


class Factored:
    """A symmetric positive definite matrix by its lower Cholesky factor, float32 [n, n].

    On a GPU a solution is all products, few of them: cuBLAS solves triangles at a tenth of their speed. What of the
    factor lies on the diagonal is inverted once, in blocks, and put in parts once: anew for each product, that took 20
    of 1050 ms of a block of Llama-2-7B on an H200.
    """

    def __init__(self, lower: Tensor) -> None:
        self.lower = lower

    def solve(self, right: Tensor) -> Tensor:
        """The inverse times `right`, float32 [n, k]."""
        return self._by_blocks(right) if right.device.type == "cuda" else torch.cholesky_solve(right, self.lower)

    def _by_blocks(self, right: Tensor) -> Tensor:
        x = right.clone(memory_format=torch.contiguous_format)
        for upper in (False, True):
            self._solve(x, 0, len(self._inverses), upper)
        return x

    def _solve(self, x: Tensor, start: int, stop: int, upper: bool) -> None:
        """Put the solution of the blocks from `start` to `stop` in the place of the right-hand side `x`."""
        if stop - start == 1:
            inverse, part = self._inverses[start], _part(start, stop)
            x[part] = product(inverse.t() if upper else inverse, x[part])
            return
        middle = (start + stop) // 2
        halves = (start, middle), (middle, stop)
        first, last = reversed(halves) if upper else halves
        self._solve(x, *first, upper)
        triangle = self.lower.t() if upper else self.lower
        add_product(x[_part(*last)], triangle[_part(*last), _part(*first)], x[_part(*first)], -1)
        self._solve(x, *last, upper)

    @cached_property
    def _inverses(self) -> list[Tensor | Parts]:
        """Of the blocks on the diagonal."""
        blocks = (self.lower[part, part] for part in map(_part, range(-(-len(self.lower) // _BLOCK))))
        return [exact_operand(inverted(block)) for block in blocks]


def _part(start: int, stop: int | None = None) -> slice:
    return slice(_BLOCK * start, _BLOCK * (start + 1 if stop is None else stop))


def inverted(lower: Tensor) -> Tensor:
    """The inverse of a lower triangle; on a GPU large ones by products."""
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    if lower.device.type == "cuda":
        _invert(lower, inverse)
    else:
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    return inverse


def _invert(lower: Tensor, inverse: Tensor) -> None:
    """Put the inverse of `lower` in the place of the identity `inverse`."""
    if len(lower) <= _SMALL:
        inverse.copy_(torch.linalg.solve_triangular(lower, inverse, upper=False))
        return
    first, last = slice(len(lower) // 2), slice(len(lower) // 2, None)
    _invert(lower[first, first], inverse[first, first])
    _invert(lower[last, last], inverse[last, last])
    below = product(lower[last, first], inverse[first, first])
    add_product(inverse[last, first], inverse[last, last], below, -1)  # onto the zeros there
