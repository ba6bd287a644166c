"""Quantize and dequantize groups: the arithmetic that every kernel is tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: an all-equal group must not divide by zero


@dataclass(frozen=True)
class Affine:
    """The integer grid of each group: value = (code - zero) * scale, codes 0 .. 2**bits - 1.

    scales: float32 [out_features, groups], each exactly representable in float16
    zeros:  float32 [out_features, groups], whole numbers in the range of the codes
    """

    scales: Tensor
    zeros: Tensor
    bits: int

    def encode(self, weight: Tensor) -> Tensor:
        """Codes of `weight` [out, in], plain rounding, uint8 [out, in]."""
        codes = torch.round(self._grouped(weight) / self.scales.unsqueeze(-1)) + self.zeros.unsqueeze(-1)
        return codes.clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 weight [out, in] of `codes` [out, in]."""
        return ((self._grouped(codes) - self.zeros.unsqueeze(-1)) * self.scales.unsqueeze(-1)).flatten(1)

    def round(self, weight: Tensor) -> Tensor:
        """`weight` moved to the nearest point of the grid, float32 [out, in]."""
        scales, zeros = self.scales.unsqueeze(-1), self.zeros.unsqueeze(-1)
        steps = torch.round(self._grouped(weight) / scales)
        return torch.maximum(torch.minimum(steps, 2**self.bits - 1 - zeros), -zeros).mul_(scales).flatten(1)

    def _grouped(self, values: Tensor) -> Tensor:
        """[out, in] -> float32 [out, groups, group_size]."""
        return values.reshape(*self.scales.shape, -1).float()


def fit_affine(weight: Tensor, group_size: int, bits: int, zero_point: bool, shrink: Tensor | None = None) -> Affine:
    """The grid that spans each group's range, optionally shrunk to `shrink` [out, groups] of it.

    weight [out, in] in float32, in % group_size == 0 (-1: one group a row). The range always holds 0, so that
    a zero weight stays zero. Symmetric grids are centred on 2**(bits - 1). Codes are later computed from the
    scale as float16 stores it: what is searched is what is run.
    """
    grouped = weight.reshape(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
    top = 2**bits - 1
    high = grouped.amax(-1).clamp_min(0)
    low = grouped.amin(-1).clamp_max(0)
    if shrink is not None:
        high, low = high * shrink, low * shrink
    if zero_point:
        scales = _storable((high - low) / top)
        zeros = torch.round(-low / scales).clamp_(0, top)
    else:
        half = 2 ** (bits - 1)
        scales = _storable(torch.maximum(high / (half - 1), -low / half))
        zeros = torch.full_like(scales, float(half))
    return Affine(scales, zeros, bits)


def _storable(scales: Tensor) -> Tensor:
    return scales.to(torch.float16).float().clamp_min(_SMALLEST_SCALE)
