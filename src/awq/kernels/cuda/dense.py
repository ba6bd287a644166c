"""Many rows without wgmma: the weight dequantized by a kernel, then multiplied by torch. See src/dequantize.cu."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda.layout import SOURCES, Units, gpu

# struct Params of dequantize.cu: five pointers; out_features, in_features, units, kept_steps.
_PARAMS = struct.Struct("<5Q4i")
_THREADS = 128


def multiply(x: Tensor, units: Units, bias: Tensor | None, out: Tensor) -> None:
    """out = x W^T + x[:, kept] R + bias on the current stream, with what `gemm` asks of its arguments."""
    y = out.view(len(x), -1)  # torch would give an `out` of more dimensions another shape
    with torch.no_grad():
        weight = dequantize(units, x.dtype).t()
        if bias is None:
            torch.mm(x, weight, out=y)
        else:
            torch.addmm(bias, x, weight, out=y)


def dequantize(units: Units, dtype: torch.dtype) -> Tensor:
    """W + R on the current stream: [out_features, in_features], float16 or bfloat16, rounded once."""
    codes, affine, kept, index, in_features, out_features, group = units
    width, device = -(-in_features // 8) * 8, codes.get_device()
    weight = torch.empty(out_features, width, dtype=dtype, device=codes.device)
    steps = 0 if kept is None else kept.shape[1]
    launcher = _launcher(device, codes.shape[0] * codes.shape[1], group, dtype is torch.bfloat16)
    kept_at, index_at = (0 if tensor is None else tensor.data_ptr() for tensor in (kept, index))
    with launcher.lock:
        pointers = (codes.data_ptr(), affine.data_ptr(), kept_at, index_at, weight.data_ptr())
        _PARAMS.pack_into(launcher.params, 0, *pointers, out_features, width, codes.shape[1], steps)
        launcher(torch._C._cuda_getCurrentRawStream(device))
    return weight[:, :in_features]


@lru_cache(1024)
def _launcher(device: int, blocks: int, group: int, bf16: bool) -> Any:
    defines = {"GROUP": group, "AWQ_BF16": int(bf16)}
    kernel = jit.kernel(SOURCES / "dequantize.cu", "dequantize", gpu(device).arch, defines)
    return kernel.launcher(blocks, _THREADS, 0, _PARAMS.size)
