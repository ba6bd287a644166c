"""Salient input channels that stay in fp16: which, and what is stored beside the int4 weight.

After plain rounding they give back the original weight, about; after compensated rounding they are fitted to what is
left of the error, behind blocks that have their own kept channels, under one budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from awq.algorithm.capture import fast_matmul
from awq.algorithm.moments import Moments
from awq.algorithm.propagate import Propagation
from awq.algorithm.solution import Solution, column_scales
from awq.config import MAX_OUTLIER_RATIO
from awq.packing import Outliers

# SmolLM2, 1 %: KL to the float model on prose, code and held-out prose 103, 106, 129 (x 1000) for the original weight,
# 101, 100, 124 for least squares (0.1), 100, 100, 124 for 0.5; without kept channels 109, 113, 138.
RIDGE = 0.5
LEAST_SQUARES_RIDGE = 0.01  # of each kept channel's power; keeps dead channels solvable
MOST_SHARES = 2  # of the budget for one input, where others left theirs


class Kept(NamedTuple):
    """A linear's kept channels, and its loss with them, relative to the output's power."""

    outliers: Outliers
    loss: float


def outlier_count(in_features: int, ratio: float) -> int:
    return max(1, round(ratio * in_features)) if ratio > 0 else 0


def choose_channels(deltas: Sequence[Tensor], gram: Tensor, count: int) -> Tensor:
    """The `count` input channels whose rounding is expected to cost the most, ascending, int64 [count].

    The cost of channel j is G_jj * ||dW_j||^2, summed over the linears that read the same input, so that one gather
    of x serves them all. deltas: rounded minus original weight, float32 [out_features, in_features] each.
    """
    cost = sum((delta.square().sum(0) for delta in deltas), torch.zeros_like(gram[0])) * gram.diagonal()
    return cost.topk(count).indices.sort().values


def residual(delta: Tensor, channels: Tensor, gram: Tensor) -> Tensor:
    """What the kept channels add to the int4 weight: R, float16 [k, out_features].

    Between giving back the original weight on `channels` (R0 = -delta) and the least-squares fit to the whole error:
    the R that minimizes tr((delta + R) G (delta + R)^T) + RIDGE * tr((R - R0) diag(G) (R - R0)^T). The refitted scales
    lean on the errors that R0 would take away.
    """
    own = gram[channels][:, channels]
    damping = RIDGE * own.diagonal().clamp_min(torch.finfo(own.dtype).tiny)
    right = -(delta @ gram[:, channels]) - delta[:, channels] * damping
    solution: Tensor = torch.linalg.solve_ex(own + damping.diag(), right.t())[0]
    return solution.to(torch.float16).contiguous()


def keep_plainly(solution: Solution, ratio: float) -> dict[str, Kept]:
    """The same share of channels for every input, after plain rounding; none where they lower no loss."""
    linears = solution.linears
    if ratio == 0 or not all(linear.usable for linear in linears.values()):
        return {}
    gram = next(iter(linears.values())).stats.gram
    deltas = {name: coded.delta for name, coded in solution.coded.items()}
    channels = choose_channels(list(deltas.values()), gram, outlier_count(len(gram), ratio))
    return _lower(solution, channels, {name: residual(delta, channels, gram) for name, delta in deltas.items()})


def _lower(
    solution: Solution, channels: Tensor, residuals: Mapping[str, Tensor], held_out: Moments | None = None
) -> dict[str, Kept]:
    """The channels by linear; nothing where one of the linears has a higher loss with them."""
    kept, index = {}, channels.to(torch.int32)
    for name, judge in replace(solution, held_out=held_out).judges().items():
        weight, outliers = solution.coded[name].weight, Outliers(index, residuals[name])
        kept[name] = Kept(outliers, judge(outliers.add_to(weight)))
        if not kept[name].loss <= judge(weight):
            return {}
    return kept


@dataclass
class Budget:
    """What may be stored in fp16, in weights of kept channels; what one input leaves goes to those after it."""

    ratio: float
    left: float = 0.0

    def spend(self, streams: Propagation, passes: Sequence[Sequence[Solution]]) -> dict[str, Kept]:
        """The kept channels of a block, by linear, in the order of the data; `streams` moves on behind them.

        They are fitted behind those that are kept already, and stay where the block's output is the closer for it on
        held-out text: the int4 of later linears is adjusted to errors that they would take away.
        """
        for solution in (solution for together in passes for solution in together):
            streams.done.update(solution.weights)
        kept: dict[str, Kept] = {}
        before = streams.output_loss()
        for together in passes:
            able = [solution for solution in together if solution.fit is not None]
            moments = streams.measure([column_scales(solution.linears) for solution in able])
            trial, left = self._offered(able, moments)
            saved = {name: streams.done[name] for name in trial}
            streams.done.update({name: one.outliers.add_to(saved[name]) for name, one in trial.items()})
            after = streams.output_loss() if trial else before
            if after < before:
                kept, before, self.left = kept | trial, after, left
            else:
                streams.done.update(saved)
        streams.advance()
        return kept

    def _offered(
        self, solutions: Sequence[Solution], moments: Sequence[tuple[Moments, Moments]]
    ) -> tuple[dict[str, Kept], float]:
        """Channels for each input as far as the budget goes, and what would be left of it."""
        kept: dict[str, Kept] = {}
        offers = [_Offer(solution, *pair) for solution, pair in zip(solutions, moments, strict=True)]
        self.left += self.ratio * sum(offer.width * offer.rows for offer in offers)
        left = self.left
        for offer in offers:
            accepted = offer.accepted(offer.best(min(self.ratio * MOST_SHARES * offer.width, left / offer.rows)))
            if accepted:
                kept |= accepted
                left -= offer.rows * len(next(iter(accepted.values())).outliers.index)
        return kept, left


class _Offer:
    """What keeping channels of one input would save.

    missing: by linear, (target - rounded W x) x^T, float32 [out, in]
    savings: of the squared held-out error, by each channel alone as it is fitted to the other text, float32 [in]
    """

    def __init__(self, solution: Solution, fit: Moments, held_out: Moments) -> None:
        self.solution, self.gram, self.held_out = solution, fit.gram, held_out
        with fast_matmul(enabled=False):
            self.missing = {name: self._missing(name, fit) for name in solution.linears}
            diagonal = fit.gram.diagonal().clamp_min(torch.finfo(fit.gram.dtype).tiny)
            self.savings = torch.zeros_like(diagonal)
            for name, linear in solution.linears.items():
                alone = self.missing[name] / diagonal
                saved = 2 * alone * self._missing(name, held_out) - alone.square() * held_out.gram.diagonal()
                self.savings += (saved * linear.row_scale.square().unsqueeze(1)).sum(0)

    @property
    def width(self) -> int:
        return len(self.gram)

    @property
    def rows(self) -> int:
        """Weights of a kept channel."""
        return sum(len(missing) for missing in self.missing.values())

    def best(self, most: float) -> Tensor:
        """The channels that save the most, none that saves nothing, ascending, int64 [k]."""
        count = min(int(most), outlier_count(self.width, MAX_OUTLIER_RATIO))
        savings, channels = self.savings.nan_to_num(0.0).topk(count)
        return channels[savings > 0].sort().values

    def _missing(self, name: str, moments: Moments) -> Tensor:
        weight = self.solution.linears[name].weight
        return moments.wanted(name, weight) - (self.solution.coded[name].weight - weight) @ moments.gram

    def accepted(self, channels: Tensor) -> dict[str, Kept]:
        if not len(channels) or not self.held_out.usable:
            return {}
        residuals = {name: least_squares(part, channels, self.gram) for name, part in self.missing.items()}
        return _lower(self.solution, channels, residuals, self.held_out)


def least_squares(missing: Tensor, channels: Tensor, gram: Tensor) -> Tensor:
    """R = missing[:, S] G[S, S]^-1, float16 [k, out_features]: after compensated rounding other columns are adjusted to
    the errors on `channels` S, and giving back the original weight would undo that.
    """
    own = gram[channels][:, channels]
    damping = LEAST_SQUARES_RIDGE * own.diagonal() + torch.finfo(own.dtype).tiny
    solution: Tensor = torch.linalg.solve_ex(own + damping.diag(), missing[:, channels].t())[0]
    return solution.nan_to_num(0.0, 0.0, 0.0).to(torch.float16).contiguous()
