"""Linears that read one input, to codes and outlier channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from awq.algorithm.affine import Affine, fit_affine
from awq.algorithm.capture import InputStats, fast_matmul
from awq.algorithm.clip import search_clip
from awq.algorithm.loss import output_error
from awq.algorithm.moments import Moments
from awq.algorithm.outliers import choose_by_gain, choose_channels, least_squares, outlier_count, residual
from awq.algorithm.refit import refit_scales
from awq.algorithm.rounding import ColumnLoop, round_compensated
from awq.config import QuantConfig
from awq.packing import Outliers, PackedInt4, pack

Choose = Callable[[Sequence[Tensor], Tensor, int], Tensor]
Fill = Callable[[Tensor, Tensor, Tensor], Tensor]
Kept = dict[str, Outliers]


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear's result; `report` says how it came about, losses relative to the linear's own output power."""

    packed: PackedInt4
    outliers: Outliers | None
    bias: Tensor | None
    report: dict[str, Any]

    def to(self, device: torch.device) -> Self:
        return replace(
            self,
            packed=self.packed.to(device),
            outliers=self.outliers and self.outliers.to(device),
            bias=None if self.bias is None else self.bias.to(device),
        )


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
        self._rounded = plain(self.weight, config)
        self.loss_rounding = self.loss(self._rounded - self.weight)

    @property
    def weight(self) -> Tensor:
        return self.module.weight.data

    @property
    def rounded(self) -> Tensor:
        """What plain rounding of the unscaled weight comes to after the folds."""
        return self._rounded / self.row_scale.unsqueeze(1) * self.column_scale

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
Results = dict[str, QuantizedLinear]


@dataclass(frozen=True)
class Coded:
    """A weight on its grid, and the weight that it stands for."""

    grid: Affine
    codes: Tensor
    target: Tensor
    rounding: Literal["plain", "compensated"] = "plain"
    corrected: bool = False

    @cached_property
    def weight(self) -> Tensor:
        return self.grid.decode(self.codes)

    @property
    def delta(self) -> Tensor:
        return self.weight - self.target


def plain(weight: Tensor, config: QuantConfig) -> Tensor:
    """`weight` after plain rounding."""
    return _full_range(weight, config).round(weight)


def solve(linears: Linears, config: QuantConfig) -> Results:
    """effort="fast": plain rounding on clipped ranges, by the input in the float model."""
    coded = {name: _round_plainly(linear, config) for name, linear in linears.items()}
    kept: Kept = {}
    if all(linear.usable for linear in linears.values()):
        kept = _keep(coded, next(iter(linears.values())).stats.gram, config, choose_channels, residual)
    results = {}
    for name, linear in linears.items():
        losses = _losses(coded[name], kept.get(name), linear.loss_of)
        results[name] = _result(linear, coded[name], kept.get(name), config, (linear.loss_rounding, *losses))
    return results


def solve_propagated(
    linears: Linears, fit: Moments, held_out: Moments, config: QuantConfig, columns: ColumnLoop
) -> Results:
    """effort="balanced": compensated rounding of the corrected weight, by the input behind quantized linears.

    Where the weight as it was, plain rounding, or no outlier channels do better on held-out text, that is taken.
    """
    if not (fit.usable and held_out.usable and all(linear.usable for linear in linears.values())):
        return solve(linears, config)
    judges = {name: _Judge(name, linear, held_out) for name, linear in linears.items()}
    coded = _compensate(judges, fit, config, columns)
    kept = _keep(coded, fit.gram, config, choose_by_gain, least_squares)
    losses = {name: _losses(one, kept.get(name), judges[name]) for name, one in coded.items()}
    if sum(after for _, after in losses.values()) >= sum(before for before, _ in losses.values()):
        kept, losses = {}, {name: (before, before) for name, (before, _) in losses.items()}
    return {
        name: _result(linear, coded[name], kept.get(name), config, (judges[name](linear.rounded), *losses[name]))
        for name, linear in linears.items()
    }


class _Judge:
    """The loss of a weight in place of a linear's, on held-out text, relative to the output's power.

    It holds what the linears before have left: the distance to the float model, not what rounding adds to it.
    """

    def __init__(self, name: str, linear: Linear, held_out: Moments) -> None:
        self.name, self.linear, self.moments = name, linear, held_out
        with fast_matmul(enabled=False):
            self.wanted = held_out.wanted(name, linear.weight)

    def __call__(self, weight: Tensor) -> float:
        with fast_matmul(enabled=False):
            rows = self.moments.row_losses(self.name, self.linear.weight, self.wanted, weight)
        return float((rows * self.linear.row_scale.square()).sum()) / self.linear.power


def _compensate(judges: dict[str, _Judge], fit: Moments, config: QuantConfig, columns: ColumnLoop) -> dict[str, Coded]:
    """The best that held-out text finds among compensated, clipped and plain rounding, by linear."""
    targets = {name: _target(judge, fit) for name, judge in judges.items()}
    grids = {name: _clipped(target, fit.gram, config) for name, target in targets.items()}
    codes = _compensated_codes(targets, grids, fit.gram, columns)
    coded = {}
    for name, judge in judges.items():
        weight, target, grid = judge.linear.weight, targets[name], grids[name]
        full = _full_range(weight, config)
        trials = [Coded(grid, grid.encode(target), target), Coded(full, full.encode(weight), weight)]
        if name in codes:
            trials.insert(0, Coded(grid, codes[name], target, "compensated"))
        best = min(trials, key=lambda trial: judge(trial.weight))
        if config.refit:
            best = min(_refitted(best, fit.gram), best, key=lambda trial: judge(trial.weight))
        coded[name] = replace(best, corrected=not torch.equal(best.target, weight))
    return coded


def _target(judge: _Judge, fit: Moments) -> Tensor:
    """The weight to round: the corrected one where that is closer on held-out text."""
    weight = judge.linear.weight
    with fast_matmul(enabled=False):
        corrected = fit.corrected(judge.name, weight)
    return corrected if judge(corrected) < judge(weight) else weight


def _compensated_codes(
    targets: dict[str, Tensor], grids: dict[str, Affine], gram: Tensor, columns: ColumnLoop
) -> dict[str, Tensor]:
    """Compensated codes by linear, all solved as one; none where the Gram matrix does not allow it."""
    joined = Affine(
        torch.cat([grid.scales for grid in grids.values()]),
        torch.cat([grid.zeros for grid in grids.values()]),
        next(iter(grids.values())).bits,
    )
    codes = round_compensated(torch.cat(list(targets.values())), gram, joined, columns)
    if codes is None:
        return {}
    return dict(zip(targets, codes.split([len(target) for target in targets.values()]), strict=True))


def _round_plainly(linear: Linear, config: QuantConfig) -> Coded:
    grid = _clipped(linear.weight, linear.stats.gram, config) if linear.usable else _full_range(linear.weight, config)
    coded = Coded(grid, grid.encode(linear.weight), linear.weight)
    return _refitted(coded, linear.stats.gram) if config.refit and linear.usable else coded


def _refitted(coded: Coded, gram: Tensor) -> Coded:
    return replace(coded, grid=refit_scales(coded.target, coded.codes, coded.grid, gram))


def _full_range(weight: Tensor, config: QuantConfig) -> Affine:
    return fit_affine(weight, config.group_size or -1, config.bits, config.zero_point)


def _clipped(weight: Tensor, gram: Tensor, config: QuantConfig) -> Affine:
    if not config.clip:
        return _full_range(weight, config)
    return search_clip(weight, gram, config.group_size or -1, config.bits, config.zero_point)


def _keep(coded: dict[str, Coded], gram: Tensor, config: QuantConfig, choose: Choose, fill: Fill) -> Kept:
    """The channels kept in fp16, the same for all the linears that read them."""
    if config.outlier_ratio == 0:
        return {}
    deltas = {name: one.delta for name, one in coded.items()}
    channels = choose(list(deltas.values()), gram, outlier_count(len(gram), config.outlier_ratio))
    index = channels.to(torch.int32)
    return {name: Outliers(index, fill(delta, channels, gram)) for name, delta in deltas.items()}


def _losses(coded: Coded, outliers: Outliers | None, judge: Callable[[Tensor], float]) -> tuple[float, float]:
    """The loss of the int4 alone, and with its outlier channels."""
    alone = judge(coded.weight)
    return alone, judge(outliers.add_to(coded.weight)) if outliers else alone


def _result(
    linear: Linear, coded: Coded, outliers: Outliers | None, config: QuantConfig, losses: tuple[float, float, float]
) -> QuantizedLinear:
    report = {
        "bits": config.bits,
        "group_size": config.group_size,
        "scaled_by": linear.scaled_by,
        "target": "corrected" if coded.corrected else "float",
        "rounding": coded.rounding,
        **dict(zip(("loss_rounding", "loss", "loss_with_outliers"), losses, strict=True)),
        "outliers": outliers.index.numel() if outliers else 0,
        "fallback": _fallback(linear),
        **({"tokens": linear.tokens} if linear.in_expert else {}),
    }
    bias = dict(linear.module.named_parameters()).get("bias")
    stored_bias = None if bias is None else bias.data.to(torch.float16)
    return QuantizedLinear(pack(coded.codes, coded.grid.zeros, coded.grid.scales), outliers, stored_bias, report)


def _fallback(linear: Linear) -> str | None:
    if linear.usable:
        return None
    return "activations are not finite" if linear.stats.tokens else "no calibration token reached it"
