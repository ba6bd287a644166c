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

    Candidates are mean|x| ** exponent, first every other exponent of a grid over (0, 1], then the neighbours of the
    best. The search runs in reduced precision; its winner is taken only if float32 finds it better than plain rounding
    in sum, and no linear worse by itself.
    weights: float32 [out_features, in_features] each; `reduce` and `expand` map consumer to producer channels and back.
    """
    magnitude = reduce(stats.mean_abs)
    # A channel that the text leaves silent counts as any other: some other text may need it. The floor, relative to the
    # loudest, keeps a norm divided by the scale within float16.
    magnitude = torch.where(magnitude > 0, magnitude, magnitude.mean()).clamp_min(1e-6 * magnitude.max())
    if not weights or not magnitude.isfinite().all() or not magnitude.any():
        return None

    def candidate(step: int) -> Tensor:
        return _normalized(magnitude ** (step / GRID))

    def loss(step: int) -> float:
        return float(errors(weights, stats.gram, round_weight, expand(candidate(step))).sum())

    with fast_matmul():
        losses = {step: loss(step) for step in range(2, GRID + 1, 2)}
        nearest = min(losses, key=losses.__getitem__)
        losses |= {step: loss(step) for step in (nearest - 1, nearest + 1) if step <= GRID}
    best = candidate(min(losses, key=losses.__getitem__))
    with fast_matmul(enabled=False):
        plain = errors(weights, stats.gram, round_weight, torch.ones_like(stats.mean_abs))
        scaled = errors(weights, stats.gram, round_weight, expand(best))
    return best if bool((scaled <= plain).all()) and bool(scaled.sum() < plain.sum()) else None


def errors(weights: Sequence[Tensor], gram: Tensor, round_weight: Round, scale: Tensor) -> Tensor:
    """Output error of each weight when rounded under `scale` [in_features]."""
    return torch.stack([output_error(round_weight(w * scale) / scale - w, gram) for w in weights])


def _normalized(scale: Tensor) -> Tensor:
    return scale / (scale.max() * scale.min()).sqrt()
