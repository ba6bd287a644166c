"""Linears that read one input, together in GPU memory: each keeps its rows as a view, so that none is twice there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from awq.kernels.cuda.layout import Units
from awq.kernels.cuda.step.merge import TILED, merge
from awq.linear import QuantLinear


@dataclass(frozen=True)
class Merged:
    """units: of all rows, the first linear's first; bias: [out_features] or None"""

    units: Units
    bias: Tensor | None


@dataclass(frozen=True)
class Weights:
    """The four weights of a layer."""

    qkv: Merged
    output: Merged
    gate_up: Merged
    down: Merged


def merge_linears(linears: Sequence[QuantLinear]) -> Merged | str:
    """One weight of several linears, or why they do not go together. Their buffers become views of it."""
    merged = merge([linear._buffers for linear in linears], [linear.spec for linear in linears])
    if isinstance(merged, str):
        return merged
    units, bias = merged
    if len(linears) > 1:
        whole = dict(zip(TILED, (units.codes, units.affine, units.kept), strict=True))
        first = 0
        for linear in linears:
            count = len(linear.get_buffer("cuda_codes"))
            for name, tensor in whole.items():
                if tensor is not None:
                    linear._buffers[name] = tensor[first : first + count]
            first += count
    return Merged(units, bias)
