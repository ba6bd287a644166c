"""The activation-aware scale: salient channels are multiplied before rounding, divided after (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from awq.algorithm.capture import InputStats, fast_matmul
from awq.algorithm.loss import output_error

GRID = 20
Round = Callable[[Tensor], Tensor]


def search_scale(
    weights: Sequence[Tensor], stats: InputStats, round_weight: Round, reduce: Round, expand: Round
) -> Tensor | None:
    """The scale [producer channels] under which rounding `weights` costs the least output error; None for no scale.

    Candidates are mean|x| ** exponent over a grid of exponents in (0, 1]. The search may run in reduced precision; its
    winner is taken only if float32 finds it better than plain rounding in sum, and no linear worse by itself.
    weights: float32 [out_features, in_features] each; `reduce` and `expand` map consumer to producer channels and back.
    """
    magnitude = reduce(stats.mean_abs).clamp_min(1e-8)
    if not weights or not magnitude.isfinite().all():
        return None
    candidates = [_normalized(magnitude ** (step / GRID)) for step in range(1, GRID + 1)]
    with fast_matmul():
        losses = torch.stack([errors(weights, stats.gram, round_weight, expand(s)).sum() for s in candidates])
    best = candidates[int(losses.argmin())]
    with fast_matmul(enabled=False):
        plain = errors(weights, stats.gram, round_weight, torch.ones_like(stats.mean_abs))
        scaled = errors(weights, stats.gram, round_weight, expand(best))
    return best if bool((scaled <= plain).all()) and bool(scaled.sum() < plain.sum()) else None


def errors(weights: Sequence[Tensor], gram: Tensor, round_weight: Round, scale: Tensor) -> Tensor:
    """Output error of each weight when rounded under `scale` [in_features]."""
    return torch.stack([output_error(round_weight(w * scale) / scale - w, gram) for w in weights])


def _normalized(scale: Tensor) -> Tensor:
    return scale / (scale.max() * scale.min()).sqrt()
