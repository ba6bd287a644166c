"""The inner loops of the search in plain torch. Where a GPU has kernels for them, those are passed down instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from awq.algorithm.search.affine import Affine, fit_affine, span
from awq.algorithm.search.loss import group_errors
from awq.algorithm.search.rounding import PLAIN_LOOP, ColumnLoop


def best_shrinks(
    weight: Tensor, low: Tensor, high: Tensor, gram: Tensor, shrinks: Sequence[float], bits: int, zero_point: bool
) -> Tensor:
    """The shrink of each group's range whose grid costs the least, the first of equals, float32 [out, groups].

    low, high: the ranges, float32 [out, groups]
    """
    found, least = torch.ones_like(low), torch.full_like(low, float("inf"))
    for shrink in shrinks:
        grid = span(low * shrink, high * shrink, bits, zero_point)
        error = group_errors(grid.round(weight).sub_(weight), gram, low.shape[1])
        found[error < least] = shrink
        least = torch.minimum(error, least)
    return found


def rounded_delta(
    weight: Tensor, scale: Tensor | None, group_size: int, bits: int, zero_point: bool, _fast: bool = False
) -> Tensor:
    """What rounding on the groups' full ranges changes, round(weight * scale) / scale - weight, float32 [out, in].

    scale: float32 [in] or None; a kernel may answer in bfloat16 if it is to be fast
    """
    scaled = weight if scale is None else weight * scale
    rounded = fit_affine(scaled, group_size, bits, zero_point).round(scaled)
    return (rounded if scale is None else rounded.div_(scale)).sub_(weight)


def grid_delta(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """What rounding on a grid changes, round(weight) - weight, float32 [out, in]; scales, zeros as in `Affine`."""
    return Affine(scales, zeros, bits).round(weight).sub_(weight)


def row_dots(product: Tensor, delta: Tensor) -> Tensor:
    """Each row's sum of product * delta, float32 [out]; `product` may be overwritten."""
    return product.mul_(delta).sum(1)


def group_dots(products: Tensor, steps: Tensor, normal: Tensor, first: int) -> None:
    """Put dot products into the symmetric matrices `normal`, float32 [out, groups, groups], of each row: those of
    `products` [count, out, groups - first, size], of the groups from `first` on, with `steps` [out, groups, size].

    Both are float32 or both bf16; `products` may be overwritten. Between the products' own groups, [c, d] is that of
    products[d].
    """
    some, later = slice(first, first + len(products)), slice(first, None)
    dots = products.mul_(steps[:, later]).sum(-1, dtype=torch.float32)
    normal[:, some, later] = dots.transpose(0, 1)
    normal[:, later, some] = dots.permute(1, 2, 0)


class Loops(NamedTuple):
    """Where the search spends its time. Kernels have no other answers than these, up to the order of sums.

    columns: of compensated rounding; the others are described above
    """

    columns: ColumnLoop = PLAIN_LOOP
    best_shrinks: Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[float], int, bool], Tensor] = best_shrinks
    rounded_delta: Callable[[Tensor, Tensor | None, int, int, bool, bool], Tensor] = rounded_delta
    grid_delta: Callable[[Tensor, Tensor, Tensor, int], Tensor] = grid_delta
    row_dots: Callable[[Tensor, Tensor], Tensor] = row_dots
    group_dots: Callable[[Tensor, Tensor, Tensor, int], None] = group_dots


PLAIN_LOOPS = Loops()
