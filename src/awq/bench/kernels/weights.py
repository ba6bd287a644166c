"""Random quantized weights, made on the device that uses them."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.bench.kernels.shapes import Setting
from awq.packing import Outliers, PackedInt4

# Of code minus zero point: both uniform over 0..15; or symmetric, where code 0 is replaced by 8 so that the mean is 0.
_VARIANCE, _VARIANCE_SYMMETRIC = 2 * 255 / 12, 17.5
_SCALES_SQUARED = 13 / 12  # the mean square of a uniform number from 0.5 to 1.5
_ALL_EIGHTS = -0x77777778  # 0x88888888 as int32
_CHUNK = 1 << 28  # weights dequantized at a time


def random_linear(
    setting: Setting, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> tuple[PackedInt4, Outliers | None]:
    """A weight whose outputs have the variance of its inputs, so that calls can be chained without end.

    The outlier channels are spread evenly and their residuals are as large as the weights.
    generator: on `device`; by default the weight is always the same
    """
    n, k, kept = setting.shape.out_features, setting.shape.in_features, setting.outliers
    groups, deviation = k // setting.group_size, (k + kept) ** -0.5
    generator = generator or torch.Generator(device).manual_seed(0)
    variance = _VARIANCE if setting.zero_point else _VARIANCE_SYMMETRIC
    scales = torch.rand(groups, n, generator=generator, device=device) + 0.5
    scales *= deviation / (variance * _SCALES_SQUARED) ** 0.5
    qweight = _words(k, n // 8, generator)
    if setting.zero_point:
        qzeros = _words(groups, n // 8, generator)
    else:
        qzeros = torch.full((groups, n // 8), _ALL_EIGHTS, dtype=torch.int32, device=device)
        qweight = _without_zeros(qweight)
    packed = PackedInt4(qweight, qzeros, scales.to(torch.float16))
    if not kept:
        return packed, None
    index = torch.linspace(0, k - 1, kept, device=device).round().to(torch.int32)
    residual = torch.randn(kept, n, generator=generator, device=device) * deviation
    return packed, Outliers(index, residual.to(torch.float16))


def dense_weight(packed: PackedInt4, outliers: Outliers | None) -> Tensor:
    """What the weight stands for: float32 [out_features, in_features], a part at a time to spare memory."""
    dense = torch.empty(packed.out_features, packed.in_features, device=packed.scales.device)
    step = max(8, _CHUNK // packed.in_features // 8 * 8)
    for first in range(0, packed.out_features, step):
        part, words = slice(first, first + step), slice(first // 8, (first + step) // 8)
        dense[part] = PackedInt4(packed.qweight[:, words], packed.qzeros[:, words], packed.scales[:, part]).dequantize()
    return dense if outliers is None else dense.index_add_(1, outliers.index.long(), outliers.residual.t().float())


def _words(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random int32 [rows, columns], every bit of them."""
    size, device = (rows, 4 * columns), generator.device
    return torch.randint(256, size, dtype=torch.uint8, generator=generator, device=device).view(torch.int32)


def _without_zeros(words: Tensor) -> Tensor:
    """8 for every nibble that is 0."""
    lowest_bits = 0x11111111
    empty = ~(words | words >> 1 | words >> 2 | words >> 3) & lowest_bits
    return words | empty << 3
