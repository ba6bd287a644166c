"""The formula that every kernel is held to, in float64, and random weights to hold them to it."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.kernels import Kernel, LinearSpec
from awq.kernels.base import EVERY_ROW
from awq.packing import Outliers, PackedInt4, pack

CPU = torch.device("cpu")
# The `gemv_rows` that pin a version.
ONLY = {"GEMV": EVERY_ROW, "GEMM": 0}


def random_packed(
    out_features: int, in_features: int, group_size: int, *, zero_point: bool = True, seed: int = 0
) -> PackedInt4:
    """Codes of all values, zero points of all values (or 8), scales that vary 20-fold."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else in_features // group_size
    codes = torch.randint(16, (out_features, in_features), generator=generator)
    zeros = torch.randint(16, (out_features, groups), generator=generator) if zero_point else None
    scales = 0.001 + 0.02 * torch.rand(out_features, groups, generator=generator)
    return pack(codes, torch.full((out_features, groups), 8) if zeros is None else zeros, scales)


def random_outliers(packed: PackedInt4, count: int, seed: int = 1) -> Outliers:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(packed.in_features, generator=generator)[:count].sort().values.to(torch.int32)
    residual = 0.05 * torch.randn(count, packed.out_features, generator=generator)
    return Outliers(index, residual.to(torch.float16))


def plain_weight(packed: PackedInt4) -> Tensor:
    """w[n, k] = (q[n, k] - z[n, k // group]) * scale[n, k // group]."""
    group = torch.arange(packed.in_features) // packed.group_size
    return (packed.codes().double() - packed.zeros().double()[:, group]) * packed.scales.t().double()[:, group]


def plain(x: Tensor, packed: PackedInt4, outliers: Outliers | None = None) -> Tensor:
    """y[n] = the sum over k of x[k] w[n, k], and the outliers' product."""
    y = x.double() @ plain_weight(packed).t()
    return y if outliers is None else y + x.double()[:, outliers.index.long()] @ outliers.residual.double()


def run(kernel: Kernel, x: Tensor, packed: PackedInt4, outliers: Outliers | None, version: str) -> Tensor:
    return kernel(x, kernel.prepare(packed, outliers, CPU), spec_of(packed, outliers), ONLY[version])


def spec_of(packed: PackedInt4, outliers: Outliers | None = None) -> LinearSpec:
    kept = 0 if outliers is None else len(outliers.index)
    return LinearSpec(packed.in_features, packed.out_features, packed.group_size, outliers=kept)


def row_errors(y: Tensor, x: Tensor, packed: PackedInt4, outliers: Outliers | None = None) -> Tensor:
    """The error of each row, relative to the norm that its terms have.

    The terms', since a sum that cancels is small by chance, while the rounding of its terms is not.
    """
    terms = x.double().square() @ plain_weight(packed).square().t()
    if outliers is not None:
        terms += x.double()[:, outliers.index.long()].square() @ outliers.residual.double().square()
    return (y.double() - plain(x, packed, outliers)).norm(dim=1) / terms.sum(dim=1).sqrt()
