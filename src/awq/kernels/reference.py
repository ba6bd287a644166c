"""The oracle: dequantize and multiply in float32, anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.config import KERNEL_VERSIONS
from awq.hardware import Device
from awq.kernels.base import LinearSpec, RowKernel, Weights, dequantize_and_multiply, packed_weights
from awq.packing import Outliers, PackedInt4

_HOW = dict.fromkeys(KERNEL_VERSIONS, "dequantizing and multiplying in float32")


class Reference(RowKernel):
    name = "reference"
    versions = _HOW

    def rejects(self, spec: LinearSpec, device: Device) -> str | None:
        return None

    def prepare(
        self,
        packed: PackedInt4,
        outliers: Outliers | None,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
    ) -> dict[str, Tensor]:
        return packed_weights(packed.to(device), outliers and outliers.to(device))

    def multiply(self, x: Tensor, weights: Weights, spec: LinearSpec, version: str) -> Tensor:
        return dequantize_and_multiply(x, weights, torch.float32).to(x.dtype)
