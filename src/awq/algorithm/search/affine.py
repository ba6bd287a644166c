"""Quantize and dequantize groups: the arithmetic that every kernel is tested against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: an all-equal group must not divide by zero


@dataclass(frozen=True)
class Affine:
    """The integer grid of each group: value = (code - zero) * scale, codes 0 .. 2**bits - 1.

    scales: float32 [out_features, groups], each exactly representable in float16
    zeros:  float32 [out_features, groups], whole numbers in the range of the codes
    """

    scales: Tensor
    zeros: Tensor
    bits: int

    def rows(self, part: slice) -> Affine:
        return replace(self, scales=self.scales[part], zeros=self.zeros[part])

    def encode(self, weight: Tensor) -> Tensor:
        """Codes of `weight` [out, in], plain rounding, uint8 [out, in]."""
        codes = (self._grouped(weight) / self.scales.unsqueeze(-1)).round_().add_(self.zeros.unsqueeze(-1))
        return codes.clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(1)

    def unrounded(self, weight: Tensor) -> Tensor:
        """What `encode` rounds, float32 [out, in]."""
        return (self._grouped(weight) / self.scales.unsqueeze(-1)).add_(self.zeros.unsqueeze(-1)).flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 weight [out, in] of `codes` [out, in]."""
        return (self._grouped(codes) - self.zeros.unsqueeze(-1)).mul_(self.scales.unsqueeze(-1)).flatten(1)

    def round(self, weight: Tensor) -> Tensor:
        """`weight` moved to the nearest point of the grid, float32 [out, in], in memory of its own."""
        scales, zeros = self.scales.unsqueeze(-1), self.zeros.unsqueeze(-1)
        steps = (self._grouped(weight) / scales).round_()  # in place from here on: new memory costs more than the work
        torch.minimum(steps, 2**self.bits - 1 - zeros, out=steps)
        return torch.maximum(steps, -zeros, out=steps).mul_(scales).flatten(1)

    def _grouped(self, values: Tensor) -> Tensor:
        """[out, in] -> float32 [out, groups, group_size]."""
        return values.reshape(*self.scales.shape, -1).float()


def fit_affine(weight: Tensor, group_size: int, bits: int, zero_point: bool) -> Affine:
    """The grid that spans the range of each group of `weight`, float32 [out, in]; group_size -1 is one group a row."""
    return span(*ranges(weight, group_size), bits, zero_point)


def ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The lowest and highest value of each group, [out, groups] each; they always hold 0, which so stays 0."""
    grouped = weight.reshape(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
    return grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)


def span(low: Tensor, high: Tensor, bits: int, zero_point: bool) -> Affine:
    """The grid from `low` to `high`; without zero points it is centred on 2**(bits - 1).

    Codes are later computed from the scale as float16 stores it: what is searched is what is run.
    """
    top = 2**bits - 1
    if zero_point:
        scales = _storable((high - low) / top)
        return Affine(scales, torch.round(-low / scales).clamp_(0, top), bits)
    half = 2 ** (bits - 1)
    scales = _storable(torch.maximum(high / (half - 1), -low / half))
    return Affine(scales, torch.full_like(scales, float(half)), bits)


def _storable(scales: Tensor) -> Tensor:
    return scales.to(torch.float16).float().clamp_min(SMALLEST_SCALE)
