"""A model's linear layers however it writes them: as nn.Linear, or as GPT-2's Conv1D, which holds W transposed."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D


class LinearShape(NamedTuple):
    in_features: int
    out_features: int


def linear_shape(module: nn.Module) -> LinearShape | None:
    """The shape of a linear layer; None for any other module."""
    if isinstance(module, nn.Linear):
        return LinearShape(module.in_features, module.out_features)
    return LinearShape(module.nx, module.nf) if isinstance(module, Conv1D) else None


def as_linear(module: nn.Module) -> nn.Module:
    """The nn.Linear that computes what a Conv1D does; any other module is returned as it is."""
    if not isinstance(module, Conv1D):
        return module
    linear = nn.Linear(module.nx, module.nf, device="meta")
    linear.weight = nn.Parameter(module.weight.data.t().contiguous(), requires_grad=False)
    linear.bias = module.bias
    return linear
