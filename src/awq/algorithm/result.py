"""What becomes of a solution: packed codes, outlier channels, and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from awq.algorithm.outliers import choose_by_gain, choose_channels, least_squares, outlier_count, residual
from awq.algorithm.solution import Coded, Linear, Solution
from awq.config import QuantConfig
from awq.packing import Outliers, PackedInt4, pack

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


Results = dict[str, QuantizedLinear]


def finish(solution: Solution, config: QuantConfig) -> Results:
    """The results of a set, with outlier channels where they are closer in sum, on held-out text if there is some."""
    judges = solution.judges()
    kept = _keep(solution, config)
    losses = {name: _losses(one, kept.get(name), judges[name]) for name, one in solution.coded.items()}
    if sum(after for _, after in losses.values()) >= sum(before for before, _ in losses.values()):
        kept, losses = {}, {name: (before, before) for name, (before, _) in losses.items()}
    results = {}
    for name, linear in solution.linears.items():
        rounding = linear.loss_rounding if solution.fit is None else judges[name](linear.rounded)
        report = _report(linear, solution.coded[name], kept.get(name), config, (rounding, *losses[name]))
        results[name] = _result(linear, solution.coded[name], kept.get(name), report)
    return results


def _keep(solution: Solution, config: QuantConfig) -> Kept:
    """The channels kept in fp16, the same for all the linears that read them."""
    linears = solution.linears.values()
    if config.outlier_ratio == 0 or not all(linear.usable for linear in linears):
        return {}
    deltas = {name: coded.delta for name, coded in solution.coded.items()}
    if solution.fit is None:
        gram, choose, fill = next(iter(linears)).stats.gram, choose_channels, residual
    else:
        gram, choose, fill = solution.fit.gram, choose_by_gain, least_squares
    channels = choose(list(deltas.values()), gram, outlier_count(len(gram), config.outlier_ratio))
    index = channels.to(torch.int32)
    return {name: Outliers(index, fill(delta, channels, gram)) for name, delta in deltas.items()}


def _losses(coded: Coded, outliers: Outliers | None, judge: Callable[[Tensor], float]) -> tuple[float, float]:
    """The loss of the int4 alone, and with its outlier channels."""
    alone = judge(coded.weight)
    return alone, judge(outliers.add_to(coded.weight)) if outliers else alone


def _report(
    linear: Linear, coded: Coded, outliers: Outliers | None, config: QuantConfig, losses: tuple[float, float, float]
) -> dict[str, Any]:
    return {
        "bits": config.bits,
        "group_size": config.group_size,
        "scaled_by": linear.scaled_by,
        "target": "corrected" if coded.corrected else "float",
        "rounding": coded.rounding,
        **dict(zip(("loss_rounding", "loss", "loss_with_outliers"), losses, strict=True)),
        "outliers": outliers.index.numel() if outliers else 0,
        "fallback": _fallback(linear),
    }


def _result(linear: Linear, coded: Coded, outliers: Outliers | None, report: dict[str, Any]) -> QuantizedLinear:
    bias = dict(linear.module.named_parameters()).get("bias")
    stored_bias = None if bias is None else bias.data.to(torch.float16)
    return QuantizedLinear(pack(coded.codes, coded.grid.zeros, coded.grid.scales), outliers, stored_bias, report)


def _fallback(linear: Linear) -> str | None:
    if linear.usable:
        return None
    return "activations are not finite" if linear.stats.tokens else "no calibration token reached it"
