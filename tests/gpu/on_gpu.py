"""What the tests of the CUDA kernels share: random weights on the GPU, a poisoned launch, and the reference."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from awq.kernels.cuda import gemm, gemv, op
from awq.kernels.cuda.layout import Units
from awq.kernels.reference import Reference
from awq.packing import Outliers, PackedInt4
from tests.kernels.plain import random_packed, spec_of

GPU = torch.device("cuda")
VERSIONS = ("GEMV", "GEMM")
# Of the norm. Rounding y costs 2e-4 in fp16 and 1.6e-3 in bf16, rounding the weights to it as much again.
LIMIT = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


def dtypes() -> list[torch.dtype]:
    newer = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return [torch.float16, torch.bfloat16] if newer else [torch.float16]


@lru_cache(maxsize=4)
def packed_on_gpu(shape: tuple[int, int, int], zero_point: bool) -> PackedInt4:
    return random_packed(*shape, zero_point=zero_point).to(GPU)


def launch(version: str, x: Tensor, units: Units, bias: Tensor | None = None) -> Tensor:
    """A kernel called by itself on an output of NaN, between rows that it must not touch."""
    rows, poisoned = len(x), float("nan")
    around = torch.full((rows + 2, units.out_features), poisoned, dtype=x.dtype, device=x.device)
    if version == "GEMM":
        gemm.gemm(x, units, bias, around[1:-1])
    else:
        most = op._launch_rows(x.device.index, units)
        for some, out in zip(x.split(most), around[1:-1].split(most), strict=True):
            gemv.gemv(some, units, bias, out)
    assert around[[0, -1]].isnan().all()
    return around[1:-1]


def reference(x: Tensor, packed: PackedInt4, outliers: Outliers | None, bias: Tensor | None = None) -> Tensor:
    """float32 [rows, out_features]"""
    kernel = Reference()
    weights: dict[str, Any] = kernel.prepare(packed, outliers, x.device)
    return kernel(x.float(), weights | {"bias": None if bias is None else bias.float()}, spec_of(packed, outliers), 0)


def relative(y: Tensor, true: Tensor) -> float:
    return float((y.float() - true).norm() / true.norm())
