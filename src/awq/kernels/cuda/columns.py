"""The column loop of compensated rounding, a block of columns a launch. See src/column_loop.cu."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from awq import jit
from awq.capability import OWN_KERNELS, show
from awq.kernels.cuda.layout import SOURCES, gpu

COLUMNS = 64  # of a launch, at most: with them and their factor in shared memory, it runs on every GPU

# struct Params of column_loop.cu: six pointers; columns, rows, stride; the highest code.
_PARAMS = struct.Struct("<6Q3if")


def round_columns(weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [k, out] and errors float32 [k, out] of a block of k <= 64 columns, transposed.

    weight, scales, zeros: float32 [k, out] on one GPU; factor: float32 [k, k], upper triangular
    """
    weight, scales, zeros = (part.contiguous() for part in (weight, scales, zeros))
    factor = factor if factor.stride(1) == 1 else factor.contiguous()
    (columns, rows), device = weight.shape, weight.get_device()
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    with torch.cuda.device(device):
        launcher = _launcher(device, rows)
        with launcher.lock:
            pointers = (part.data_ptr() for part in (weight, factor, scales, zeros, codes, errors))
            _PARAMS.pack_into(launcher.params, 0, *pointers, columns, rows, factor.stride(0), float(highest))
            launcher(torch.cuda.current_stream(device).cuda_stream)
    return codes, errors


def obstacle(device: torch.device) -> str | None:
    """Why `round_columns` cannot run on `device`, None where it can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it runs on NVIDIA GPUs, not on {device.type}"
    if torch.cuda.get_device_capability(device) < OWN_KERNELS:
        return f"it needs compute capability {show(OWN_KERNELS)} or newer"
    return jit.missing()


def variants(arch: str) -> list[tuple[Any, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`."""
    return [(SOURCES / "column_loop.cu", "column_loop", arch, {})]


@lru_cache(256)
def _launcher(device: int, rows: int) -> Any:
    kernel = jit.kernel(SOURCES / "column_loop.cu", "column_loop", gpu(device).arch)
    threads = kernel.global_int("threads")
    return kernel.launcher(-(-rows // threads), threads, 0, _PARAMS.size)
