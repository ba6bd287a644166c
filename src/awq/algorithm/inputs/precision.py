"""How exact products of float32 matrices are: fast in the forward and the search, exact in what is accepted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_COLUMNS = 2048  # of the second operand in parts at a time: a Gram matrix of 11008 inputs is 0.5 GB
_TF32 = -(1 << 13)  # the bits of a float32 that tensor cores read


@contextmanager
def fast_matmul(enabled: bool = True) -> Iterator[None]:
    """float32 products of bf16 (CPU) or tf32 (GPU) operands, accumulated in float32.

    2.3 x as fast as float32 on a CPU with avx512_bf16 and harmless in the forward and the search; what is accepted is
    compared outside of this.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if enabled else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for float32 matrices, as exact as `fast_matmul` asks.

    On a GPU float32 is three products of tensor cores, each operand its 11 leading bits and the rest: as exact as
    float32's own units (what is left out is 2**-22 of a product), which have a seventh of their speed on an H100.
    """
    if torch.get_float32_matmul_precision() != "highest" or not _has_tensor_cores(a.device):
        return a @ b
    high, low = _parts(a)
    out = a.new_empty(len(a), b.shape[1])
    with fast_matmul():
        for some, into in zip(b.split(_COLUMNS, 1), out.split(_COLUMNS, 1), strict=True):
            leading, rest = _parts(some)
            into.copy_((high @ rest).addmm_(low, leading).addmm_(high, leading))
    return out


def _parts(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of the sum `values`, the first exact in tf32."""
    high = (values.view(torch.int32) & _TF32).view(torch.float32)
    return high, values - high


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
