"""What a change of weights costs: the squared output error that it causes over the calibration text."""

from __future__ import annotations

from torch import Tensor

from awq.algorithm.inputs.precision import product
from awq.algorithm.ranks import row_sums


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """tr(delta G delta^T): the mean squared error of the outputs, summed over them; a scalar, no forward pass.

    delta: float32 [out_features, in_features], gram: float32 [in_features, in_features]
    """
    return row_sums([delta], lambda _place, part: row_errors(delta[part], gram))[0]


def row_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """What each row adds to `output_error`, float32 [out_features]."""
    return product(delta, gram).mul_(delta).sum(1)


def row_gains(before: Tensor, after: Tensor, gram: Tensor) -> Tensor:
    """`row_errors` of `before` less those of `after`, in one product, and without the difference of two large sums:
    b G b - a G a = (b - a) G (b + a).
    """
    return product(before - after, gram).mul_(before + after).sum(1)


def group_errors(delta: Tensor, gram: Tensor, groups: int) -> Tensor:
    """The part of `output_error` that each row and group causes by itself, float32 [out_features, groups]."""
    size = delta.shape[1] // groups
    diagonal = gram.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    grouped = delta.view(-1, groups, size).transpose(0, 1)  # [groups, out, size]
    return (grouped @ diagonal).mul_(grouped).sum(-1).t()
