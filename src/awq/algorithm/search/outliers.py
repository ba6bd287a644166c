"""Salient input channels that stay in fp16: which, and what is stored beside the int4 weight.

After plain rounding they give back the original weight, about; after compensated rounding they are fitted to what is
left of the error. (Fitted anew in a stream behind blocks with kept channels they gained no more, SmolLM2, KL x 1000:
-0.2 and +0.6 on prose and code, against -0.6 and -0.7, at a quarter more time.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from awq.algorithm.inputs.precision import fair_matmul, product
from awq.algorithm.ranks import by_rows
from awq.algorithm.search.solution import Solution
from awq.config import MAX_OUTLIER_RATIO
from awq.packing import Outliers

# SmolLM2, 1 %: KL to the float model on prose, code and held-out prose 103, 106, 129 (x 1000) for the original weight,
# 101, 100, 124 for least squares (0.1), 100, 100, 124 for 0.5; without kept channels 109, 113, 138.
RIDGE = 0.5
LEAST_SQUARES_RIDGE = 1e-3  # of each kept channel's power; keeps dead channels solvable
MOST_SHARES = 2  # of the budget for one input, where others left theirs
# Of the least-squares fit, tried on a block's output. Linears that learned together make good one another's errors: the
# whole fit to each by itself, taken unseen, cost SmolLM2 1.2 % of perplexity and a sixth more KL.
FIT_SHARES = (1.0, 0.5, 0.25)


class Kept(NamedTuple):
    """A linear's kept channels, and its loss with them, relative to the output's power."""

    outliers: Outliers
    loss: float


def channel_costs(solution: Solution) -> Tensor:
    """What plain rounding of each input channel is expected to cost, float32 [in_features].

    G_jj * ||dW_j||^2 over the output's power, summed over the linears that read the input, so that one gather of x
    serves them all, and times the tokens that they are given; 0 where those say nothing.
    """
    gram = next(iter(solution.linears.values())).stats.gram
    total = torch.zeros_like(gram[0])
    if all(linear.usable for linear in solution.linears.values()):
        for name, linear in solution.linears.items():
            coded = solution.coded[name]
            delta = (coded.decode() - coded.target).mul_(linear.row_scale.unsqueeze(1))
            total += delta.square_().sum(0).mul_(linear.tokens / linear.power)
    return total * gram.diagonal()


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


def keep_plainly(solution: Solution, channels: Tensor) -> dict[str, Kept]:
    """The channels by linear, after plain rounding; none where they lower no loss."""
    if not len(channels):
        return {}
    gram = next(iter(solution.linears.values())).stats.gram
    channels = channels.to(gram.device)
    residuals = {name: residual(coded.delta, channels, gram) for name, coded in solution.coded.items()}
    return _lower(solution, channels, residuals)


def _lower(solution: Solution, channels: Tensor, residuals: Mapping[str, Tensor]) -> dict[str, Kept]:
    """The channels by linear; nothing where the losses are not lower in sum."""
    kept, saved, index = {}, 0.0, channels.to(torch.int32)
    for name, judge in solution.judges().items():
        weight, outliers = solution.coded[name].weight, Outliers(index, residuals[name])
        kept[name] = Kept(outliers, judge(outliers.add_to(weight)))
        saved += solution.losses[name][0] - kept[name].loss
    return kept if saved > 0 else {}


@dataclass
class BlockOutput:
    """What a block's output costs on held-out text, with the channels that its linears keep so far.

    loss_of: the loss with other weights in some linears, by name
    """

    loss_of: Callable[[Mapping[str, Tensor]], float]
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loss = self.loss_of({})

    def take(self, solution: Solution, channels: Tensor, residuals: Mapping[str, Tensor]) -> dict[str, Kept]:
        """The channels by linear with the share of `residuals` that is best for the block; nothing where none is."""
        best: dict[str, Outliers] = {}
        before, index = dict(self.weights), channels.to(torch.int32)
        for share in FIT_SHARES:
            kept = {name: Outliers(index, (share * residual).half()) for name, residual in residuals.items()}
            weights = before | {name: one.add_to(solution.coded[name].weight) for name, one in kept.items()}
            if (loss := self.loss_of(weights)) < self.loss:
                self.loss, self.weights, best = loss, weights, kept
        judges = solution.judges() if best else {}
        return {name: Kept(one, judges[name](self.weights[name])) for name, one in best.items()}


@dataclass
class Budget:
    """What may be stored in fp16, in weights of kept channels; what one input leaves goes to those after it."""

    ratio: float
    left: float = 0.0

    def spend(self, solution: Solution, output: BlockOutput | None = None) -> dict[str, Kept]:
        """The kept channels of an input, by linear, fitted to what compensated rounding left of the error.

        None where they do not lower the held-out loss: that of the block's output if it is given, else of the linears.
        """
        if self.ratio == 0 or solution.fit is None:
            return {}
        gram, rows = solution.fit.gram, sum(len(coded.target) for coded in solution.coded.values())
        self.left += self.ratio * len(gram) * rows
        most = min(self.left / rows, MOST_SHARES * self.ratio * len(gram), MAX_OUTLIER_RATIO * len(gram))
        if int(most) == 0:
            return {}
        missing = {name: _missing(coded.delta, gram) for name, coded in solution.coded.items()}
        channels = choose_by_gain(list(missing.values()), gram, int(most))
        fitted = {name: least_squares(part, channels, gram) for name, part in missing.items()}
        kept = output.take(solution, channels, fitted) if output else _lower(solution, channels, fitted)
        self.left -= rows * len(channels) if kept else 0
        return kept


def _missing(delta: Tensor, gram: Tensor) -> Tensor:
    with fair_matmul():
        return by_rows(delta, lambda part: -product(delta[part], gram), torch.empty_like(delta))


def choose_by_gain(missing: Sequence[Tensor], gram: Tensor, count: int) -> Tensor:
    """The `count` channels whose least-squares fit to the error gains most by itself, ascending, int64 [count].

    The gain of channel j is ||missing_j||^2 / G_jj, summed over the linears that read the same input.
    """
    gain = sum((part.square().sum(0) for part in missing), torch.zeros_like(gram[0]))
    tiny = torch.finfo(gram.dtype).tiny
    return (gain / gram.diagonal().clamp_min(tiny)).topk(count).indices.sort().values


def least_squares(missing: Tensor, channels: Tensor, gram: Tensor) -> Tensor:
    """R = missing[:, S] G[S, S]^-1, float16 [k, out_features], with missing = -dW G: after compensated rounding other
    columns are adjusted to the errors on `channels` S, and giving back the original weight would undo that.
    """
    own = gram[channels][:, channels]
    damping = LEAST_SQUARES_RIDGE * own.diagonal() + torch.finfo(own.dtype).tiny
    solution: Tensor = torch.linalg.solve_ex(own + damping.diag(), missing[:, channels].t())[0]
    return solution.nan_to_num(0.0, 0.0, 0.0).to(torch.float16).contiguous()
