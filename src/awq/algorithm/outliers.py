"""Salient input channels that stay in fp16: which, and what is stored beside the int4 weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# SmolLM2, 1 %: KL to the float model on prose, code and held-out prose 103, 106, 129 (x 1000) for the original weight,
# 101, 100, 124 for least squares (0.1), 100, 100, 124 for 0.5; without kept channels 109, 113, 138.
RIDGE = 0.5
LEAST_SQUARES_RIDGE = 1e-3  # of each kept channel's power; keeps dead channels solvable


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


def choose_by_gain(deltas: Sequence[Tensor], gram: Tensor, count: int) -> Tensor:
    """The `count` channels whose least-squares fit to the error gains most by itself, ascending, int64 [count].

    The gain of channel j is ||(dW G)_j||^2 / G_jj, summed over the linears that read the same input.
    """
    gain = sum(((delta @ gram).square().sum(0) for delta in deltas), torch.zeros_like(gram[0]))
    tiny = torch.finfo(gram.dtype).tiny
    return (gain / gram.diagonal().clamp_min(tiny)).topk(count).indices.sort().values


def least_squares(delta: Tensor, channels: Tensor, gram: Tensor) -> Tensor:
    """R = -dW G[:, S] G[S, S]^-1, float16 [k, out_features]: after compensated rounding other columns are adjusted to
    the errors on `channels`, and giving back the original weight would undo that.
    """
    own = gram[channels][:, channels]
    damping = LEAST_SQUARES_RIDGE * own.diagonal() + torch.finfo(own.dtype).tiny
    solution: Tensor = torch.linalg.solve_ex(own + damping.diag(), -(delta @ gram[:, channels]).t())[0]
    return solution.nan_to_num(0.0, 0.0, 0.0).to(torch.float16).contiguous()
