"""Plain rounding with a share of each linear's input channels left as they are (the AWQ paper's table 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awq.algorithm.search.affine import fit_affine
from awq.config import QuantConfig

# (weight [out, in], mean |x| [in], random numbers [in]) -> the score of each channel; the highest are kept
CRITERIA: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "none": lambda weight, _magnitude, _random: torch.zeros_like(weight[0]),
    "activation": lambda _weight, magnitude, _random: magnitude,
    "weight": lambda weight, _magnitude, _random: weight.norm(dim=0),
    "random": lambda _weight, _magnitude, random: random,
}


@torch.no_grad()
def round_but_keep(model: nn.Module, names: Sequence[str], tokens: Tensor, config: QuantConfig, criterion: str) -> None:
    """Round the linears in place; `config.outlier_ratio` of their channels keep their weights."""
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    magnitudes = _mean_abs(model, linears, tokens) if criterion == "activation" else {}
    generator = torch.Generator().manual_seed(0)
    for name, linear in linears.items():
        weight = linear.weight.data
        random = torch.rand(weight.shape[1], generator=generator).to(weight.device)
        score = CRITERIA[criterion](weight, magnitudes.get(name, random), random)
        count = max(1, round(config.outlier_ratio * len(score))) if config.outlier_ratio else 0
        kept = score.topk(count).indices
        rounded = fit_affine(weight, config.group_size or -1, config.bits, config.zero_point).round(weight)
        rounded[:, kept] = weight[:, kept]
        linear.weight.data = rounded


def _mean_abs(model: nn.Module, linears: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    """The mean of |x| of every input channel, by linear."""
    sums: dict[str, Tensor] = {}

    def adder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + args[0].abs().flatten(0, -2).sum(0)

        return hook

    handles = [linear.register_forward_pre_hook(adder(name)) for name, linear in linears.items()]
    try:
        for part in tokens.to(next(model.parameters()).device).split(4):
            model(input_ids=part, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / tokens.numel() for name, total in sums.items()}
