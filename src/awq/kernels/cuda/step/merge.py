"""Linears that read one input as one weight: their rows one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from awq.kernels.base import LinearSpec, Weights
from awq.kernels.cuda.layout import TILE_ROWS, Units, effective_group

# Buffers of `Cuda.prepare` that hold tiles of 16 rows.
TILED = ("cuda_codes", "cuda_affine", "cuda_kept")


def merge(weights: Sequence[Weights], specs: Sequence[LinearSpec]) -> tuple[Units, Tensor | None] | str:
    """The weight and bias [out_features] of all, or why they do not go together. One linear is taken as it is.

    The tiles of the first linear come first: a view of so many is what it had, so that none is kept twice.
    """
    if reason := _obstacle(weights, specs):
        return reason
    parts = [[each.get(name) for each in weights] for name in TILED]
    codes, affine, kept = (_joined(tensors) for tensors in parts)
    assert codes is not None and affine is not None
    spec, out_features = specs[0], sum(each.out_features for each in specs)
    group = effective_group(spec.group_size, spec.in_features)
    assert group is not None  # else the kernel had rejected it
    units = Units(codes, affine, kept, weights[0].get("cuda_index"), spec.in_features, out_features, group)
    return units, _bias(weights, specs)


def _obstacle(weights: Sequence[Weights], specs: Sequence[LinearSpec]) -> str | None:
    if any("cuda_codes" not in each for each in weights):
        return "a linear is not on the kernel 'cuda'"
    if len({effective_group(spec.group_size, spec.in_features) for spec in specs}) > 1:
        return "linears that read one input have groups of several sizes"
    if any(spec.out_features % TILE_ROWS for spec in specs[:-1]):
        return f"a linear beside others has a number of outputs that {TILE_ROWS} does not divide"
    first, *others = (each.get("cuda_index") for each in weights)
    if not all(_same(first, other) for other in others):
        return "linears that read one input keep several sets of outlier channels"
    return None


def _same(first: Tensor | None, other: Tensor | None) -> bool:
    return first is other or (first is not None and other is not None and torch.equal(first, other))


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    if len(there) < 2:
        return there[0] if there else None
    return torch.cat(there)


def _bias(weights: Sequence[Weights], specs: Sequence[LinearSpec]) -> Tensor | None:
    biases = [each.get("bias") for each in weights]
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    rows = zip(biases, specs, strict=True)
    return torch.cat([like.new_zeros(spec.out_features) if bias is None else bias for bias, spec in rows])
