"""Salient input channels that stay in fp16: which, and what is stored beside the int4 weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def outlier_count(in_features: int, ratio: float) -> int:
    return max(1, round(ratio * in_features)) if ratio > 0 else 0


def choose_channels(deltas: Sequence[Tensor], gram: Tensor, count: int) -> Tensor:
    """The `count` input channels whose rounding is expected to cost the most, ascending, int64 [count].

    The cost of channel j is G_jj * ||dW_j||^2, summed over the linears that read the same input, so that one gather
    of x serves them all. deltas: rounded minus original weight, float32 [out_features, in_features] each.
    """
    cost = sum((delta.square().sum(0) for delta in deltas), torch.zeros_like(gram[0])) * gram.diagonal()
    return cost.topk(count).indices.sort().values


def residual(delta: Tensor, channels: Tensor) -> Tensor:
    """What brings the int4 weight back to the original on `channels`, float16 [k, out_features]."""
    return -delta[:, channels].t().to(torch.float16).contiguous()
