"""Clipped ranges: giving up a group's extremes buys finer steps for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.algorithm.inputs.precision import fair_matmul, fast_matmul
from awq.algorithm.ranks import by_rows, row_sums
from awq.algorithm.search.affine import Affine, ranges, span
from awq.algorithm.search.loops import PLAIN_LOOPS, Loops
from awq.algorithm.search.loss import row_gains

# Down to half of the range. Steps of 1/20, as AWQ has them, leave 1 % of perplexity behind (SmolLM2, WikiText-2).
SHRINKS = tuple(1 - step / 40 for step in range(21))


def search_clip(
    weight: Tensor, gram: Tensor, group_size: int, bits: int, zero_point: bool, loops: Loops = PLAIN_LOOPS
) -> Affine:
    """The grid of `weight` [out, in] whose ranges cost the least, group by group; the full range where it is best."""
    low, high = ranges(weight, group_size)

    def best(part: slice) -> Tensor:
        return loops.best_shrinks(weight[part], low[part], high[part], gram, SHRINKS, bits, zero_point)

    with fast_matmul():
        shrink = by_rows(weight, best, torch.empty_like(low))
    full, clipped = span(low, high, bits, zero_point), span(low * shrink, high * shrink, bits, zero_point)

    def gains(_place: int, part: slice) -> Tensor:
        before, after = (loops.grid_delta(weight[part], g.scales[part], g.zeros[part], bits) for g in (full, clipped))
        return row_gains(before, after, gram)

    with fair_matmul():
        gain = row_sums([weight], gains)
    return clipped if gain > 0 else full
