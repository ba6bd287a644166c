"""Linears on their way through the steps: what is known of them, their codes, what a weight in their place costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor, nn

from awq.algorithm.inputs.moments import Moments
from awq.algorithm.inputs.precision import fair_matmul, fast_matmul
from awq.algorithm.inputs.stats import InputStats
from awq.algorithm.search.affine import Affine, fit_affine
from awq.algorithm.search.loss import output_error
from awq.config import QuantConfig


class Linear:
    """A linear on its way through the steps: its float32 weight is the module's own, changed in place by folds."""

    def __init__(self, module: nn.Linear, stats: InputStats | None, config: QuantConfig) -> None:
        self.module = module
        self.stats = stats = stats or InputStats.empty(module.in_features, module.weight.device)
        self.row_scale = torch.ones(module.out_features, device=module.weight.device)
        self.column_scale = torch.ones(module.in_features, device=module.weight.device)
        self.tokens = stats.tokens  # that it is given: an expert's statistics are of more
        self.in_expert = False
        self.usable = stats.tokens > 0 and stats.finite
        self.scaled_by: str | None = None
        self.power = 1.0
        self.power = self.loss(self.weight) or 1.0
        self._grid = full_range(self.weight, config)
        self._codes = self._grid.encode(self.weight)
        self.loss_rounding = self.loss(self._grid.decode(self._codes) - self.weight)

    @property
    def weight(self) -> Tensor:
        return self.module.weight.data

    @property
    def rounded(self) -> Tensor:
        """What plain rounding of the unscaled weight comes to after the folds."""
        return self._grid.decode(self._codes) / self.row_scale.unsqueeze(1) * self.column_scale

    def loss(self, delta: Tensor) -> float:
        """Output error relative to the output's power, as the unscaled model would see it."""
        with fast_matmul():
            return float(output_error(delta * self.row_scale.unsqueeze(1), self.stats.gram)) / self.power

    def loss_of(self, weight: Tensor) -> float:
        return self.loss(weight - self.weight)

    def scale_input(self, scale: Tensor, stats: InputStats, producer: str) -> None:
        """Note that the columns were multiplied by `scale`."""
        self.stats, self.scaled_by = stats, producer
        self.column_scale = self.column_scale * scale


Linears = dict[str, Linear]
Losses = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Coded:
    """A weight on its grid.

    target:    the weight that it stands for, float32 [out, in]
    unrounded: what each code was rounded from, float32 [out, in], in the unit of the codes; None where nobody learns
    """

    grid: Affine
    codes: Tensor
    target: Tensor
    unrounded: Tensor | None
    rounding: Literal["plain", "compensated", "learned"] = "plain"
    corrected: bool = False

    @classmethod
    def plainly(cls, weight: Tensor, grid: Affine, learned: bool = False) -> Self:
        return cls(grid, grid.encode(weight), weight, grid.unrounded(weight) if learned else None)

    def decode(self) -> Tensor:
        """`weight`, not kept."""
        return self.grid.decode(self.codes)

    @cached_property
    def weight(self) -> Tensor:
        return self.decode()

    @property
    def delta(self) -> Tensor:
        return self.weight - self.target


class Judge:
    """The loss of a weight in place of a linear's, on held-out text, relative to the output's power.

    It holds what the linears before have left: the distance to the float model, not what rounding adds to it.
    """

    def __init__(self, name: str, linear: Linear, held_out: Moments) -> None:
        self.name, self.linear, self.moments = name, linear, held_out

    def __call__(self, weight: Tensor) -> float:
        with fair_matmul():
            return self._loss(self.moments.row_losses(self.name, self.linear.weight, weight))

    @property
    def unchanged(self) -> float:
        """The loss of the linear's own weight."""
        return self._loss(self.moments.missed[self.name])

    def _loss(self, rows: Tensor) -> float:
        return float((rows * self.linear.row_scale.square()).sum()) / self.linear.power


@dataclass(frozen=True)
class Solution:
    """The linears that read one input, on their grids, and the moments that they were fitted to and are judged by.

    Without moments they were rounded plainly, by the input in the float model.
    """

    linears: Linears
    coded: dict[str, Coded]
    fit: Moments | None = None
    held_out: Moments | None = None

    @classmethod
    def measured(
        cls, linears: Linears, coded: dict[str, Coded], fit: Moments | None, held_out: Moments | None, losses: Losses
    ) -> Self:
        """With `losses` as they were found on the way."""
        solution = cls(linears, coded, fit.inputs_alone() if fit and fit is not held_out else fit, held_out)
        vars(solution)["losses"] = losses
        return solution

    @property
    def weights(self) -> dict[str, Tensor]:
        """The int4 alone, by linear."""
        return {name: coded.weight for name, coded in self.coded.items()}

    @property
    def beats_rounding(self) -> bool:
        """Whether no linear has a higher loss than plain rounding would leave."""
        return all(loss <= rounding for loss, rounding in self.losses.values())

    @cached_property
    def losses(self) -> Losses:
        """By linear, what the int4 alone costs, and what plain rounding would."""
        judges, plain = self.judges(), self.held_out is None
        return {
            name: (judges[name](self.coded[name].weight), one.loss_rounding if plain else judges[name](one.rounded))
            for name, one in self.linears.items()
        }

    def judges(self) -> dict[str, Callable[[Tensor], float]]:
        if self.held_out is None:
            return {name: linear.loss_of for name, linear in self.linears.items()}
        return {name: Judge(name, linear, self.held_out) for name, linear in self.linears.items()}


def column_scales(linears: Linears) -> dict[str, Tensor]:
    """What the linears' columns have been multiplied by in folds."""
    return {name: linear.column_scale for name, linear in linears.items()}


def full_range(weight: Tensor, config: QuantConfig) -> Affine:
    """The grid of plain rounding."""
    return fit_affine(weight, config.group_size or -1, config.bits, config.zero_point)
