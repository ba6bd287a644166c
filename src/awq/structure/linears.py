"""A model's linear layers however it writes them: as nn.Linear, or as GPT-2's Conv1D, which holds W transposed."""

from __future__ import annotations

from collections import Counter
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


def shared_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """By id, the parameters of modules that stand in several places, or share them: to change one changes others.

    A part that merely has two names is in one place: its modules have one parent each.
    """
    leaves = (child for parent in model.modules() for child in parent._modules.values() if child is not None)
    found = [parameter for leaf in leaves for parameter in leaf.parameters(recurse=False)]
    places = Counter(map(id, found))
    return {id(parameter): parameter for parameter in found if places[id(parameter)] > 1}


def as_linear(module: nn.Module) -> nn.Module:
    """The nn.Linear that computes what a Conv1D does; any other module is returned as it is."""
    if not isinstance(module, Conv1D):
        return module
    linear = nn.Linear(module.nx, module.nf, device="meta")
    linear.weight = nn.Parameter(module.weight.data.t().contiguous(), requires_grad=False)
    linear.bias = module.bias
    return linear
