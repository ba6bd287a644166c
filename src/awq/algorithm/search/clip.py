"""Clipped ranges: giving up a group's extremes buys finer steps for the rest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awq.algorithm.inputs.precision import fair_matmul, fast_matmul
from awq.algorithm.ranks import by_rows, row_sums
from awq.algorithm.search.affine import Affine, ranges, span
from awq.algorithm.search.loss import group_errors, row_gains

# Down to half of the range. Steps of 1/20, as AWQ has them, leave 1 % of perplexity behind (SmolLM2, WikiText-2).
SHRINKS = tuple(1 - step / 40 for step in range(1, 21))


def search_clip(weight: Tensor, gram: Tensor, group_size: int, bits: int, zero_point: bool) -> Affine:
    """The grid of `weight` [out, in] whose ranges cost the least, group by group; the full range where it is best."""
    low, high = ranges(weight, group_size)
    grids = {shrink: span(low * shrink, high * shrink, bits, zero_point) for shrink in (1.0, *SHRINKS)}
    full = grids[1.0]
    with fast_matmul():
        shrink = by_rows(
            weight,
            lambda part: _best({shrink: grid.rows(part) for shrink, grid in grids.items()}, weight[part], gram),
            torch.empty_like(low),
        )
    clipped = span(low * shrink, high * shrink, bits, zero_point)

    def gains(_place: int, part: slice) -> Tensor:
        before, after = (grid.rows(part).round(weight[part]).sub_(weight[part]) for grid in (full, clipped))
        return row_gains(before, after, gram)

    with fair_matmul():
        gain = row_sums([weight], gains)
    return clipped if gain > 0 else full


def _best(grids: Mapping[float, Affine], weight: Tensor, gram: Tensor) -> Tensor:
    """The shrink of the grid that costs the least by row and group, the first of equals."""
    shrinks = torch.ones_like(grids[1.0].scales)
    best = torch.full_like(shrinks, float("inf"))
    for shrink, grid in grids.items():
        error = group_errors(grid.round(weight).sub_(weight), gram, shrinks.shape[1])
        shrinks[error < best] = shrink
        best = torch.minimum(error, best)
    return shrinks
