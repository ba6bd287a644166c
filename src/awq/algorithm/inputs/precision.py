"""How exact products of float32 matrices are: fast in the forward and the search, exact in what is accepted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

_COLUMNS = 2048  # of the second operand in parts at a time: a Gram matrix of 11008 inputs is 0.5 GB
_TF32 = -(1 << 13)  # the bits of a float32 that tensor cores read


class Parts(NamedTuple):
    """The float32 matrix `high + low`, the first exact in tf32."""

    high: Tensor
    low: Tensor

    def t(self) -> Parts:
        return Parts(self.high.t(), self.low.t())


@contextmanager
def fast_matmul(enabled: bool = True) -> Iterator[None]:
    """float32 products of bf16 operands, accumulated in float32; those that are not `product`s of tf32 on a GPU.

    2.3 x as fast as float32 on a CPU with avx512_bf16 and harmless in the forward and the search; what is accepted is
    compared in `fair_matmul`.
    """
    with _precision("medium" if enabled else "highest"):
        yield


@contextmanager
def fair_matmul() -> Iterator[None]:
    """float32 products, on a GPU of tf32 operands: to tell weights apart whose losses differ by more than 2**-11."""
    with _precision("high"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def half_forward(device: torch.device) -> torch.autocast:
    """A forward as exact as `fast_matmul` asks: linears and attention in bf16 on a GPU, the residual stream in float32.

    A Llama-2-7B block takes 0.11 s for 65536 tokens in tf32 on an H200.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=_halves(device))


def cast_once(block: nn.Module) -> torch.autocast:
    """Within it `half_forward` casts each of `block`'s weights a single time; they are not to be replaced meanwhile."""
    return torch.autocast(next(block.parameters()).device.type, enabled=False)  # the outermost one's end forgets them


def operand(matrix: Tensor) -> Tensor:
    """`matrix` as `product` reads it, for one that is read often."""
    return matrix.bfloat16() if _halves(matrix.device) else matrix


def exact_operand(matrix: Tensor) -> Tensor | Parts:
    """`matrix` as `product` reads it where it is to be exact, for one that is read often."""
    return _parts(matrix) if _has_tensor_cores(matrix.device) else matrix


def product(a: Tensor | Parts, b: Tensor) -> Tensor:
    """a @ b in float32 for float32 or bf16 matrices, as exact as `fast_matmul` asks; `Parts` are always exact.

    On a GPU float32 is three products of tensor cores, each operand its 11 leading bits and the rest: as exact as
    float32's own units (what is left out is 2**-22 of a product), which have a seventh of their speed on an H100.
    """
    if isinstance(a, Tensor):
        if _halves(a.device):
            return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
        if torch.get_float32_matmul_precision() != "highest" or not _has_tensor_cores(a.device):
            return a @ b
        a = _parts(a)
    high, low = a
    out = high.new_empty(len(high), b.shape[1])
    with fair_matmul():
        for some, into in zip(b.split(_COLUMNS, 1), out.split(_COLUMNS, 1), strict=True):
            leading, rest = _parts(some)
            into.copy_((high @ rest).addmm_(low, leading).addmm_(high, leading))
    return out


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total += factor * a @ b, as exact as `product`."""
    if _halves(a.device):
        add = torch.ops.aten.addmm.dtype_out
        add(total, a.bfloat16(), b.bfloat16(), torch.float32, beta=1, alpha=factor, out=total)
    elif torch.get_float32_matmul_precision() == "highest" and _has_tensor_cores(a.device):
        (high, low), (leading, rest) = _parts(a), _parts(b)
        with fair_matmul():
            for one, other in ((high, rest), (low, leading), (high, leading)):
                total.addmm_(one, other, alpha=factor)
    else:
        total.addmm_(a, b, alpha=factor)


def add_gram(total: Tensor, x: Tensor, factor: float = 1.0) -> None:
    """total += factor * x^T x, as exact as `add_product`; left of the blocks on the diagonal it is left to `mirror`."""
    x = operand(x)
    for start in range(0, len(total), _COLUMNS):
        some = slice(start, start + _COLUMNS)
        add_product(total[some, start:], x[:, some].t(), x[:, start:], factor)


def mirror(total: Tensor) -> None:
    """Complete a sum of `add_gram`s."""
    for start in range(0, len(total), _COLUMNS):
        stop = start + _COLUMNS
        total[stop:, start:stop] = total[start:stop, stop:].t()


def _parts(values: Tensor) -> Parts:
    high = (values.view(torch.int32) & _TF32).view(torch.float32)
    return Parts(high, values - high)


def _halves(device: torch.device) -> bool:
    return torch.get_float32_matmul_precision() == "medium" and _has_tensor_cores(device)


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
