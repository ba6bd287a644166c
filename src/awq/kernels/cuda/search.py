"""The inner loops of the search for scales and ranges. See src/best_shrinks.cu, src/deltas.cu and src/group_dots.cu."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda.layout import GROUPS, SOURCES, gpu

_Kernel = tuple[Path, str, int | None]  # source, name, group size for which it is compiled
THREADS = 256  # of a block, in every kernel here
ROWS = 128  # of a block of best_shrinks
MOST_SHRINKS = 32
MOST_PRODUCTS = 4  # of a launch of group_dots

_SHRINKS = SOURCES / "best_shrinks.cu"
_DELTAS = SOURCES / "deltas.cu"
_DOTS = SOURCES / "group_dots.cu"
# struct Params of best_shrinks.cu: five pointers; rows, groups, bits, zero_point, count; the shrinks.
_SHRINKS_PARAMS = struct.Struct(f"<5Q5i{MOST_SHRINKS}f4x")
# struct Params of deltas.cu: weight or product, scale, steps, zeros, delta, sums; fours in all and a row, and lanes a
# group; bits, zero_point, bf16.
_DELTAS_PARAMS = struct.Struct("<6Q3I3i")
# struct Params of group_dots.cu: products, steps, normal; count, rows, groups, first, bf16.
_DOTS_PARAMS = struct.Struct("<3Q5i4x")


def best_shrinks(
    weight: Tensor, low: Tensor, high: Tensor, gram: Tensor, shrinks: Sequence[float], bits: int, zero_point: bool
) -> Tensor:
    """The shrink of each group's range whose grid costs the least, the first of equals, float32 [rows, groups].

    weight: float32 [rows, in], low, high: float32 [rows, groups], gram: float32 [in, in], symmetric; all on one GPU
    """
    weight, low, high, gram = (_aligned(part) for part in (weight, low, high, gram))
    best, (rows, groups) = torch.empty_like(low), low.shape
    pointers = (part.data_ptr() for part in (weight, low, high, gram, best))
    padding = [1.0] * (MOST_SHRINKS - len(shrinks))
    values = (*pointers, rows, groups, bits, zero_point, len(shrinks), *shrinks, *padding)
    kernel = _SHRINKS, "best_shrinks", weight.shape[1] // groups
    _launch(kernel, weight.get_device(), -(-rows // ROWS) * groups, _SHRINKS_PARAMS, values)
    return best


def rounded_delta(
    weight: Tensor, scale: Tensor | None, group_size: int, bits: int, zero_point: bool, fast: bool = False
) -> Tensor:
    """round(weight * scale) / scale - weight on the grids of the full ranges, float32 [rows, in].

    weight: float32 [rows, in], scale: float32 [in] or None, on one GPU; `fast` makes it bfloat16 where the GPU has that
    """
    delta = torch.empty_like(weight, dtype=_fast_dtype(weight.get_device()) if fast else torch.float32)
    return _delta((weight, scale, None, None), delta, group_size, bits, zero_point)


def grid_delta(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """round(weight) - weight on the grids of `scales` and `zeros`, float32 [rows, groups]; float32 [rows, in]."""
    group_size = weight.shape[1] // scales.shape[1]
    return _delta((weight, None, scales, zeros), torch.empty_like(weight), group_size, bits, True)


def row_dots(product: Tensor, delta: Tensor) -> Tensor:
    """Each row's sum of product * delta, float32 [rows].

    product: float32 [rows, in], delta: float32 or bfloat16 [rows, in], in a multiple of 4
    """
    product, delta = _aligned(product), _aligned(delta)
    sums = product.new_empty(len(product))
    pointers = product.data_ptr(), 0, 0, 0, delta.data_ptr(), sums.data_ptr()
    values = (*pointers, product.numel() // 4, product.shape[1] // 4, 0, 0, 0, delta.dtype == torch.bfloat16)
    _launch((_DELTAS, "row_dots", None), product.get_device(), len(product), _DELTAS_PARAMS, values)
    return sums


def group_dots(products: Tensor, steps: Tensor, normal: Tensor, first: int) -> None:
    """Put dot products of groups into the symmetric matrices of each row: those of products[c] and group h of the steps
    to normal[:, h, first + c] and, but between the products' own groups, normal[:, first + c, h].

    products: [count, rows, groups - first, group], up to MOST_PRODUCTS; steps: [rows, groups, group]; both float32 or
    both bfloat16; normal: float32 [rows, groups, groups], contiguous; all on one GPU
    """
    if len(products) > MOST_PRODUCTS:
        raise ValueError(f"{len(products)} products, and the kernel takes {MOST_PRODUCTS} at once")
    products, steps, (rows, groups, group) = _aligned(products), _aligned(steps), steps.shape
    pointers = products.data_ptr(), steps.data_ptr(), normal.data_ptr()
    values = (*pointers, len(products), rows, groups, first, products.dtype == torch.bfloat16)
    blocks = -(-rows * (groups - first) * group // (8 * THREADS))
    _launch((_DOTS, "group_dots", group), products.get_device(), blocks, _DOTS_PARAMS, values)


def variants(arch: str) -> list[tuple[Path, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`."""
    by_group = ((_SHRINKS, "best_shrinks"), (_DOTS, "group_dots"))
    sized = [(source, name, arch, {"GROUP": group}) for source, name in by_group for group in GROUPS]
    return [*sized, (_DELTAS, "rounded_delta", arch, {}), (_DELTAS, "row_dots", arch, {})]


def _delta(parts: Sequence[Tensor | None], delta: Tensor, group_size: int, bits: int, zero_point: bool) -> Tensor:
    """parts: weight, scale, the grid's scales and zeros"""
    read = [None if part is None else _aligned(part) for part in parts]
    pointers = (0 if part is None else part.data_ptr() for part in read)
    fours = delta.numel() // 4, delta.shape[1] // 4, group_size // 4
    values = (*pointers, delta.data_ptr(), 0, *fours, bits, zero_point, delta.dtype == torch.bfloat16)
    kernel = _DELTAS, "rounded_delta", None
    _launch(kernel, delta.get_device(), -(-fours[0] // THREADS), _DELTAS_PARAMS, values)
    return delta


@lru_cache
def _fast_dtype(device: int) -> torch.dtype:
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor` as kernels read it: contiguous, four floats at a time."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _launch(kernel: _Kernel, device: int, blocks: int, params: struct.Struct, values: Sequence[Any]) -> None:
    with torch.cuda.device(device):
        launcher = _launcher(*kernel, device, blocks, params.size)
        with launcher.lock:
            params.pack_into(launcher.params, 0, *values)
            launcher(torch.cuda.current_stream(device).cuda_stream)


@lru_cache(1024)  # group_dots has one for every four groups of every shape: 56 for 28672 inputs
def _launcher(source: Path, name: str, group_size: int | None, device: int, blocks: int, size: int) -> Any:
    kernel = jit.kernel(source, name, gpu(device).arch, {"GROUP": group_size} if group_size else {})
    return kernel.launcher(blocks, THREADS, 0, size)
