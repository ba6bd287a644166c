"""What a linear reads once everything before it is quantized, and how far that is from the float model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
from torch import Tensor

from awq.algorithm.inputs.precision import add_product, product
from awq.algorithm.inputs.systems import Factored
from awq.algorithm.ranks import by_rows, by_turns, here, own_rows

# Of the mean Gram diagonal. 0.05 learns the calibration text by heart; on short text 0.2 does too.
RIDGES = (0.2, 0.6, 2.0)
RESIDUAL = 0.5  # the share of the residual stream's error that a linear which writes to it makes good


@dataclass
class Moments:
    """Means over tokens. x: the input with everything before quantized; e: the float model's input less x;
    g: the error (float less quantized) of the residual stream just before a linear's output is added to it.

    gram:   x x^T, float32 [in, in]
    drift:  e x^T, float32 [in, in]
    lag:    by linear that writes to the residual stream, g x^T, float32 [out, in]
    missed: by linear, the squared distance of the target to the unquantized weight's output, float32 [out]

    A linear's target is what it gives in the float model, and RESIDUAL of g: W x + W e + RESIDUAL g.
    """

    gram: Tensor
    drift: Tensor
    lag: dict[str, Tensor] = field(default_factory=dict)
    missed: dict[str, Tensor] = field(default_factory=dict)
    tokens: float = 0

    @classmethod
    def empty(
        cls,
        in_features: int,
        device: torch.device,
        lag: Mapping[str, int] | None = None,
        missed: Mapping[str, int] | None = None,
    ) -> Self:
        """lag, missed: out_features by linear"""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        return cls(
            zeros(in_features, in_features),
            zeros(in_features, in_features),
            {name: zeros(rows, in_features) for name, rows in (lag or {}).items()},
            {name: zeros(rows) for name, rows in (missed or {}).items()},
        )

    def tensors(self) -> list[Tensor]:
        return [self.gram, self.drift, *self.lag.values(), *self.missed.values()]

    @property
    def usable(self) -> bool:
        return self.tokens > 0 and all(bool(part.isfinite().all()) for part in self.tensors())

    def add(self, x: Tensor, drift: Tensor | None, lag: Mapping[str, Tensor], count: float | None = None) -> None:
        """x, drift: [tokens, in]; None for no difference. lag: [tokens, out] by linear.

        count: what the rows count together, where some are multiplied by the root of a weight
        """
        add_product(self.gram, x.t(), x)
        self.tokens += x.shape[0] if count is None else count
        if drift is not None:
            add_product(self.drift, drift.t(), x)
        for name, g in lag.items():
            self._sum(self.lag, name, product(g.t(), x))

    def add_missed(self, weights: Mapping[str, Tensor], drift: Tensor | None, lag: Mapping[str, Tensor]) -> None:
        """What no weight could make good of these tokens is in `missed` too: it makes `loss` a distance."""
        for name, weight in weights.items():
            parts = [] if drift is None else [product(drift, weight.t())]
            parts += [RESIDUAL * lag[name]] if name in lag else []
            if parts:
                self._sum(self.missed, name, sum(parts[1:], parts[0]).square().sum(0))

    @staticmethod
    def _sum(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        sums[name] = sums[name].add_(value) if name in sums else value

    def finish(self) -> None:
        for total in self.tensors():
            here().complete(total)
            total /= self.tokens or 1

    def inputs_alone(self) -> Moments:
        """These without what only the search for a target needs."""
        return Moments(self.gram, torch.empty(0), tokens=self.tokens)

    def wanted(self, name: str, weight: Tensor) -> Tensor:
        """(target - W x) x^T for the linear `name` with `weight` W, [out, in]: the rows that this rank takes of it."""

        def wanted(part: slice) -> Tensor:
            rows = product(weight[part], self.drift)
            return rows.add_(self.lag[name][part], alpha=RESIDUAL) if name in self.lag else rows

        return own_rows(weight, wanted, torch.empty_like(weight))

    def corrected(self, weights: Mapping[str, Tensor], ridge: float) -> dict[str, Tensor]:
        """The weights that come closest to the targets by ridge regression: W + wanted (gram + ridge)^-1, by linear."""
        return next(self.corrections(weights, (ridge,)))

    def corrections(self, weights: Mapping[str, Tensor], ridges: Sequence[float]) -> Iterator[dict[str, Tensor]]:
        """`corrected` for one ridge after the other."""
        wanted = {name: self.wanted(name, weight) for name, weight in weights.items()}
        for factor in by_turns([partial(self._factor, ridge) for ridge in ridges], self.gram):
            if factor[0, 0].isnan():
                yield dict(weights)
            else:
                factored = Factored(factor.t())
                yield {name: _corrected(weight, wanted[name], factored) for name, weight in weights.items()}

    def _factor(self, ridge: float) -> Tensor:
        """The upper Cholesky factor with a ridge, contiguous; NaN where there is none."""
        damped = self.gram.clone()
        damped.diagonal().add_(ridge * self.gram.diagonal().mean() + torch.finfo(self.gram.dtype).tiny)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        factor: Tensor = lower.t().contiguous()  # as it lies in memory
        return factor.fill_(torch.nan) if failed else factor

    def row_losses(self, name: str, weight: Tensor, wanted: Tensor, trial: Tensor) -> Tensor:
        """The squared distance of `trial`'s output to the target of `weight`, float32 [out]."""

        def losses(part: slice) -> Tensor:
            delta = trial[part] - weight[part]
            return product(delta, self.gram).sub_(wanted[part], alpha=2).mul_(delta).sum(1)

        rows = by_rows(weight, losses, weight.new_empty(len(weight)))
        return rows + self.missed.get(name, 0)


def _corrected(weight: Tensor, wanted: Tensor, factored: Factored) -> Tensor:
    def corrected(part: slice) -> Tensor:
        return weight[part] + factored.solve(wanted[part].t()).t()

    return by_rows(weight, corrected, torch.empty_like(weight))
