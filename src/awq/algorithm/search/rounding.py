"""Compensated rounding: the error of each column is made good by the columns not yet rounded (OBS, GPTQ).

Frantar et al. 2022, arXiv 2210.17323: columns in order of decreasing Gram diagonal, the group grids fixed beforehand.
Plain rounding is `Affine.encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from awq.algorithm.inputs.precision import add_product, fair_matmul, fast_matmul
from awq.algorithm.inputs.systems import inverted
from awq.algorithm.ranks import share, slabs, taken
from awq.algorithm.search.affine import Affine

DAMPING = 0.05  # of the mean diagonal, added to the diagonal; 0.01 to 0.3 measured alike
_STRONGER = 10.0  # where the Gram matrix is not positive definite


class ColumnLoop(NamedTuple):
    """Rounds a block of columns one by one, before the rest of them is told in one product; a GPU has a kernel for it.

    round:   (weight [k, out], factor [k, k], scales [k, out], zeros [k, out], highest code) -> codes uint8 [k, out]
             and errors float32 [k, out], each divided by its factor's diagonal: everything transposed
    columns: k, at most
    """

    round: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    columns: int


def round_columns(weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """The column loop in plain torch."""
    weight, errors = weight.clone(), torch.empty_like(weight)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for i, pivot in enumerate(factor.diagonal().tolist()):
        code = torch.round(weight[i] / scales[i]).add_(zeros[i]).clamp_(0, highest)
        codes[i] = code
        errors[i] = (weight[i] - (code - zeros[i]) * scales[i]) / pivot
        weight[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors


PLAIN_LOOP = ColumnLoop(round_columns, 32)  # small enough for a CPU's cache


class Rounded(NamedTuple):
    """codes: uint8 [out, in]; unrounded: what each was rounded from, float32 [out, in], in the same unit, if wanted."""

    codes: Tensor
    unrounded: Tensor | None


def round_compensated(
    weight: Tensor, gram: Tensor, grid: Affine, columns: ColumnLoop = PLAIN_LOOP, unrounded: bool = True
) -> Rounded | None:
    """`weight` [out, in] on `grid`; None where `gram` [in, in] has no usable factor.

    The linears that read one input are solved as one: their rows do not touch each other.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    with fast_matmul(enabled=False):
        factor = _inverse_factor(gram, order)
    if factor is None:
        return None
    parts = slabs(weight)
    own = taken(parts)
    if len(own) == len(parts):
        return _round(weight, grid, order, factor, columns, _sizes(own), unrounded)
    codes, rest = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight) if unrounded else None
    if own:
        rows = slice(own[0].start, own[-1].stop)
        rounded = _round(weight[rows], grid.rows(rows), order, factor, columns, _sizes(own), unrounded)
        codes[rows] = rounded.codes
        if rest is not None and rounded.unrounded is not None:
            rest[rows] = rounded.unrounded
    return Rounded(share(parts, codes), None if rest is None else share(parts, rest))


def _sizes(parts: Sequence[slice]) -> list[int]:
    return [part.stop - part.start for part in parts]


def _round(
    weight: Tensor,
    grid: Affine,
    order: Tensor,
    factor: Tensor,
    columns: ColumnLoop,
    sizes: list[int],
    unrounded: bool,
) -> Rounded:
    """sizes: of the slabs of rows that make a product each; the column loop takes them all at once"""
    group = order // (weight.shape[1] // grid.scales.shape[1])
    work = _Columns(columns, weight.t()[order], factor, grid, group, sizes)
    with fair_matmul():
        work.round(0, len(order))
    back = order.argsort()
    codes = work.codes[back].t().contiguous()
    if not unrounded:
        return Rounded(codes, None)
    rest = work.errors.mul_(factor.diagonal().unsqueeze(1)).div_(grid.scales.t()[group]).add_(work.codes)
    return Rounded(codes, rest[back].t().contiguous())


class _Columns:
    """Columns on their way, transposed: what is left to round of each, their codes and errors."""

    def __init__(
        self,
        loop: ColumnLoop,
        rest: Tensor,
        factor: Tensor,
        grid: Affine,
        group: Tensor,
        sizes: Sequence[int],
    ) -> None:
        self.loop, self.highest, self.sizes = loop, 2**grid.bits - 1, sizes
        self.rest, self.factor, self.group = rest, factor, group
        self.scales, self.zeros = grid.scales.t().contiguous(), grid.zeros.t().contiguous()
        self.codes, self.errors = torch.empty_like(rest, dtype=torch.uint8), torch.empty_like(rest)

    def round(self, start: int, stop: int) -> None:
        """Some columns: their first half, which tells the second half in one product, then that."""
        most = self.loop.columns
        if stop - start <= most:
            part, group = slice(start, stop), self.group[start:stop]
            mine = self.rest[part], self.factor[part, part], self.scales[group], self.zeros[group]
            self.codes[part], self.errors[part] = self.loop.round(*mine, self.highest)
            return
        middle = start + most * (-(-(stop - start) // most) // 2)
        self.round(start, middle)
        rest, errors = self.rest[middle:stop], self.errors[start:middle]
        told = self.factor[start:middle, middle:stop].t()
        for slab, some in zip(rest.split(self.sizes, 1), errors.split(self.sizes, 1), strict=True):
            add_product(slab, told, some, -1)  # as long a row for any number of ranks
        self.round(middle, stop)


def _inverse_factor(gram: Tensor, order: Tensor) -> Tensor | None:
    """Upper triangular U with U^T U = (gram + damping)^-1 in this order of columns, from one Cholesky factor of the
    reversed matrix. The largest matrices of a block are few here, each 0.5 GB for 11008 inputs.
    """
    mean, back = gram.diagonal().mean(), order.flip(0)
    if not (mean > 0 and gram.isfinite().all()):
        return None
    for damping in (DAMPING, DAMPING * _STRONGER, DAMPING * _STRONGER**2):
        damped = gram.index_select(0, back).index_select(1, back)  # by a pair of indices a GPU took 2 GB on the way
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            inverse = inverted(lower)
            del lower
            return inverse.flip(0, 1)
    return None
