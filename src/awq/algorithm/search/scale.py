"""The activation-aware scale: salient channels are multiplied before rounding, divided after (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awq.algorithm.inputs.precision import fair_matmul, fast_matmul, operand, product
from awq.algorithm.inputs.stats import InputStats
from awq.algorithm.ranks import row_sums
from awq.algorithm.search.loss import row_gains

GRID = 20
Channels = Callable[[Tensor], Tensor]
Delta = Callable[[Tensor, Tensor | None, bool], Tensor]


@dataclass(frozen=True)
class Consumer:
    """A weight, float32 [out_features, in_features], that the scale would multiply, and what it reads.

    tokens: how many reach it, at least 1, by which its error counts
    role:   the same for a linear in all experts; the others have one each
    """

    weight: Tensor
    stats: InputStats
    tokens: float
    role: str


def search_scale(
    consumers: Sequence[Consumer],
    delta: Delta,
    row_dots: Callable[[Tensor, Tensor], Tensor],
    reduce: Channels,
    expand: Channels,
) -> Tensor | None:
    """The scale [producer channels] under which rounding costs the least output error; None for no scale.

    Candidates are mean|x| ** exponent, first every other exponent of a grid over (0, 1], then the neighbours of the
    best. The search runs in reduced precision; its winner is taken only if float32 finds it better than plain rounding
    in sum, and no role worse by itself. `delta` (weight, scale, fast) is what rounding changes, `row_dots` its product
    with another matrix by row (see `Loops`); `reduce` and `expand` map consumer to producer channels and back.
    """
    if not consumers:
        return None
    magnitude = reduce(_mean_abs(consumers))
    # A channel that the text leaves silent counts as any other: some other text may need it. The floor, relative to the
    # loudest, keeps a norm divided by the scale within float16.
    magnitude = torch.where(magnitude > 0, magnitude, magnitude.mean()).clamp_min(1e-6 * magnitude.max())
    if not magnitude.isfinite().all() or not magnitude.any():
        return None

    def candidate(step: int) -> Tensor:
        return _normalized(magnitude ** (step / GRID))

    def errors(consumer: Consumer, part: slice, scale: Tensor) -> Tensor:
        change = delta(consumer.weight[part], scale, True)
        return row_dots(product(change, grams[id(consumer.stats)]), change)

    def losses_at(steps: Sequence[int]) -> dict[int, float]:
        losses = _by_role(consumers, errors, [expand(candidate(step)) for step in steps]).sum(1)
        return dict(zip(steps, losses.tolist(), strict=True))

    def gain(consumer: Consumer, part: slice, scale: Tensor) -> Tensor:
        weight = consumer.weight[part]
        return row_gains(delta(weight, None, False), delta(weight, scale, False), consumer.stats.gram)

    with fast_matmul():
        grams = {key: operand(stats.gram) for key, stats in {id(one.stats): one.stats for one in consumers}.items()}
        losses = losses_at(range(2, GRID + 1, 2))
        nearest = min(losses, key=losses.__getitem__)
        losses |= losses_at([step for step in (nearest - 1, nearest + 1) if step <= GRID])
    best = candidate(min(losses, key=losses.__getitem__))
    with fair_matmul():
        gains = _by_role(consumers, gain, [expand(best)])[0]
    return best if bool((gains >= 0).all()) and bool(gains.sum() > 0) else None


def _by_role(
    consumers: Sequence[Consumer], rows: Callable[[Consumer, slice, Tensor], Tensor], scales: Sequence[Tensor]
) -> Tensor:
    """For each scale, what `rows` makes of each row of each weight, summed by role, in proportion to the tokens."""
    pairs = [(consumer, scale) for scale in scales for consumer in consumers]

    def work(place: int, part: slice) -> Tensor:
        consumer, scale = pairs[place]
        return rows(consumer, part, scale)

    most = max(consumer.tokens for consumer in consumers)
    sums = row_sums([consumer.weight for consumer, _ in pairs], work).view(len(scales), -1)
    roles: dict[str, Tensor] = {}
    for consumer, value in zip(consumers, sums.unbind(1), strict=True):
        value = value * (consumer.tokens / most)
        roles[consumer.role] = roles[consumer.role] + value if consumer.role in roles else value
    return torch.stack(list(roles.values()), 1)


def _mean_abs(consumers: Sequence[Consumer]) -> Tensor:
    """The mean of |x| over the tokens of all consumers, each input counted once."""
    inputs = {id(consumer.stats): consumer for consumer in consumers}.values()
    total = sum(consumer.tokens for consumer in inputs)
    means = [consumer.stats.mean_abs * (consumer.tokens / total) for consumer in inputs]
    return sum(means[1:], means[0])


def _normalized(scale: Tensor) -> Tensor:
    return scale / (scale.max() * scale.min()).sqrt()
