"""What becomes of a solution: packed codes, outlier channels, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from awq.algorithm.search.outliers import Kept
from awq.algorithm.search.solution import Coded, Linear, Solution
from awq.config import QuantConfig
from awq.packing import Outliers, PackedInt4, pack


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


def finish(solution: Solution, kept: Mapping[str, Kept], config: QuantConfig) -> Results:
    """The results of a set with the channels that are kept of its input, if any."""
    results = {}
    for name, linear in solution.linears.items():
        coded, mine = solution.coded[name], kept.get(name)
        loss, rounding = solution.losses[name]
        outliers, loss_with = mine if mine else (None, loss)
        results[name] = _result(
            linear,
            coded,
            outliers,
            _report(linear, coded, config)
            | {
                "loss_rounding": rounding,
                "loss": loss,
                "loss_with_outliers": loss_with,
                "outliers": outliers.index.numel() if outliers else 0,
                "outlier_bytes": outliers.nbytes if outliers else 0,
                "fallback": _fallback(linear),
                **({"tokens": linear.tokens} if linear.in_expert else {}),
            },
        )
    return results


def _report(linear: Linear, coded: Coded, config: QuantConfig) -> dict[str, Any]:
    return {
        "bits": config.bits,
        "group_size": config.group_size,
        "scaled_by": linear.scaled_by,
        "target": "corrected" if coded.corrected else "float",
        "rounding": coded.rounding,
    }


def _result(linear: Linear, coded: Coded, outliers: Outliers | None, report: dict[str, Any]) -> QuantizedLinear:
    bias = dict(linear.module.named_parameters()).get("bias")
    stored_bias = None if bias is None else bias.data.to(torch.float16)
    return QuantizedLinear(pack(coded.codes, coded.grid.zeros, coded.grid.scales), outliers, stored_bias, report)


def _fallback(linear: Linear) -> str | None:
    if linear.usable:
        return None
    return "activations are not finite" if linear.stats.tokens else "no calibration token reached it"
