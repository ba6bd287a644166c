"""Dequantize and multiply with torch's own operators: any device that torch knows, no code of ours."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.config import KERNEL_VERSIONS
from awq.kernels.base import LinearSpec, Weights, dequantize_and_multiply
from awq.kernels.reference import Reference


class Portable(Reference):
    """The reference's weights, multiplied in the dtype of the activations."""

    name = "portable"
    versions = dict.fromkeys(KERNEL_VERSIONS, "torch's own operators, dequantizing and then multiplying")

    def multiply(self, x: Tensor, weights: Weights, spec: LinearSpec, version: str) -> Tensor:
        # CPUs multiply bf16 several times faster than fp16.
        slow = x.dtype == torch.float16 and x.device.type == "cpu"
        return dequantize_and_multiply(x, weights, torch.bfloat16 if slow else x.dtype).to(x.dtype)
