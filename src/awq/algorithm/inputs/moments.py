"""What a linear reads once everything before it is quantized, and how far that is from the float model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
from torch import Tensor

from awq.algorithm.inputs.precision import add_gram, add_product, mirror, product
from awq.algorithm.inputs.systems import Factored
from awq.algorithm.ranks import by_rows, by_turns, here

# Of the mean Gram diagonal. 0.05 learns the calibration text by heart; on short text 0.2 does too.
RIDGES = (0.2, 0.6, 2.0)
RESIDUAL = 0.5  # the share of the residual stream's error that a linear which writes to it makes good


@dataclass
class Moments:
    """Means over tokens. x: the input with everything before quantized; t: what it lacks to a linear's target.

    gram:   x x^T, float32 [in, in]
    wanted: by linear, t x^T, float32 [out, in]
    missed: by linear, t^2, float32 [out], where its loss will be asked for

    The target is what a linear gives in the float model and, of one that writes to the residual stream, RESIDUAL of the
    error g that the stream holds just before: t = W e + RESIDUAL g, with e the float model's input less x. Summed as
    they are, e x^T and g x^T took twice the memory for the linear with the most inputs.
    """

    gram: Tensor
    wanted: dict[str, Tensor] = field(default_factory=dict)
    missed: dict[str, Tensor] = field(default_factory=dict)
    tokens: float = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device, rows: Mapping[str, int]) -> Self:
        """rows: out_features by linear"""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        return cls(
            zeros(in_features, in_features),
            {name: zeros(count, in_features) for name, count in rows.items()},
            {name: zeros(count) for name, count in rows.items()},
        )

    def tensors(self) -> list[Tensor]:
        return [self.gram, *self.wanted.values(), *self.missed.values()]

    @property
    def usable(self) -> bool:
        return self.tokens > 0 and all(bool(part.isfinite().all()) for part in self.tensors())

    def add(self, x: Tensor, missing: Mapping[str, Tensor], judged: bool, count: float | None = None) -> None:
        """x: [tokens, in]; missing: `missing` of each linear; judged: losses will be asked for.

        count: what the rows count together, where some are multiplied by the root of a weight
        """
        add_gram(self.gram, x)
        self.tokens += x.shape[0] if count is None else count
        for name, t in missing.items():
            add_product(self.wanted[name], t.t(), x)
            if judged:
                self.missed[name] += t.square().sum(0)

    def finish(self) -> None:
        for total in self.tensors():
            here().complete(total)
            total /= self.tokens or 1
        mirror(self.gram)

    def inputs_alone(self) -> Moments:
        """These without what only the search for a target needs."""
        return Moments(self.gram, tokens=self.tokens)

    def corrected(self, weights: Mapping[str, Tensor], ridge: float) -> dict[str, Tensor]:
        """The weights that come closest to the targets by ridge regression: W + wanted (gram + ridge)^-1, by linear."""
        return next(self.corrections(weights, (ridge,)))

    def corrections(self, weights: Mapping[str, Tensor], ridges: Sequence[float]) -> Iterator[dict[str, Tensor]]:
        """`corrected` for one ridge after the other."""
        for factor in by_turns([partial(self._factor, ridge) for ridge in ridges], self.gram):
            if factor[0, 0].isnan():
                yield dict(weights)
            else:
                factored = Factored(factor.t())
                yield {name: _corrected(weight, self.wanted[name], factored) for name, weight in weights.items()}
                del factored
            del factor  # before the next is made

    def _factor(self, ridge: float) -> Tensor:
        """The upper Cholesky factor with a ridge, contiguous; NaN where there is none."""
        damped = self.gram.clone()
        damped.diagonal().add_(ridge * self.gram.diagonal().mean() + torch.finfo(self.gram.dtype).tiny)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        factor: Tensor = lower.t().contiguous()  # as it lies in memory
        return factor.fill_(torch.nan) if failed else factor

    def row_losses(self, name: str, weight: Tensor, trial: Tensor) -> Tensor:
        """The squared distance of `trial`'s output to the target of `weight`, float32 [out]."""

        wanted = self.wanted[name]

        def losses(part: slice) -> Tensor:
            delta = trial[part] - weight[part]
            return product(delta, self.gram).sub_(wanted[part], alpha=2).mul_(delta).sum(1)

        return by_rows(weight, losses, weight.new_empty(len(weight))) + self.missed[name]


def missing(weight: Tensor, drift: Tensor, lag: Tensor | None) -> Tensor:
    """What tokens lack to a linear's target, float32 [tokens, out].

    weight: [out, in], drift: e, [tokens, in], both as `product` reads them; lag: g, [tokens, out], if it writes there
    """
    t = product(drift, weight.t())
    return t if lag is None else t.add_(lag, alpha=RESIDUAL)


def _corrected(weight: Tensor, wanted: Tensor, factored: Factored) -> Tensor:
    def corrected(part: slice) -> Tensor:
        return weight[part] + factored.solve(wanted[part].t()).t()

    return by_rows(weight, corrected, torch.empty_like(weight))
