"""The inner loops of the scale and the clip search. See src/best_shrinks.cu and src/deltas.cu."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda.layout import GROUPS, SOURCES, gpu

_SHRINKS = SOURCES / "best_shrinks.cu"
_DELTAS = SOURCES / "deltas.cu"
# struct Params of best_shrinks.cu: five pointers; rows, groups, bits, zero_point, count; the shrinks.
MOST_SHRINKS = 32
_SHRINKS_PARAMS = struct.Struct(f"<5Q5i{MOST_SHRINKS}f4x")
# struct Params of deltas.cu: weight or product, scale, steps, zeros, delta, sums; fours in all and a row, lanes a group;
# bits, zero_point, bf16.
_DELTAS_PARAMS = struct.Struct("<6Q3I3i")
_NEWER = (8, 0)  # have bfloat16


def takes(weight: Tensor, groups: int) -> bool:
    """Whether these kernels have the size of the groups of `weight`, float32 [rows, in]."""
    return weight.shape[1] % groups == 0 and weight.shape[1] // groups in GROUPS and len(weight) > 0


def best_shrinks(
    weight: Tensor, low: Tensor, high: Tensor, gram: Tensor, shrinks: Sequence[float], bits: int, zero_point: bool
) -> Tensor:
    """The shrink of each group's range whose grid costs the least, the first of equals, float32 [rows, groups].

    weight: float32 [rows, in], low, high: float32 [rows, groups], gram: float32 [in, in], symmetric; all on one GPU
    """
    weight, low, high, gram = (_aligned(part) for part in (weight, low, high, gram))
    best, (rows, groups) = torch.empty_like(low), low.shape
    pointers = (part.data_ptr() for part in (weight, low, high, gram, best))
    padded = (*shrinks, *[1.0] * (MOST_SHRINKS - len(shrinks)))
    values = (*pointers, rows, groups, bits, zero_point, len(shrinks), *padded)
    _launch(_shrinks_launcher(weight.get_device(), rows, groups, weight.shape[1] // groups), _SHRINKS_PARAMS, values)
    return best


def rounded_delta(
    weight: Tensor, scale: Tensor | None, group_size: int, bits: int, zero_point: bool, fast: bool = False
) -> Tensor:
    """round(weight * scale) / scale - weight on the grids of the full ranges, float32 [rows, in].

    weight: float32 [rows, in], scale: float32 [in] or None, on one GPU; `fast` allows bfloat16
    """
    bf16 = fast and torch.cuda.get_device_capability(weight.device) >= _NEWER
    delta = torch.empty_like(weight, dtype=torch.bfloat16 if bf16 else torch.float32)
    return _delta(weight, scale, None, None, delta, group_size, bits, zero_point)


def grid_delta(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """round(weight) - weight on the grids of `scales` and `zeros`, float32 [rows, groups]; float32 [rows, in]."""
    group_size = weight.shape[1] // scales.shape[1]
    return _delta(weight, None, scales, zeros, torch.empty_like(weight), group_size, bits, True)


def row_dots(product: Tensor, delta: Tensor) -> Tensor:
    """Each row's sum of product * delta, float32 [rows].

    product: float32 [rows, in], delta: float32 or bfloat16 [rows, in], in a multiple of 4
    """
    product, delta = _aligned(product), _aligned(delta)
    sums = product.new_empty(len(product))
    values = (product.data_ptr(), 0, 0, 0, delta.data_ptr(), sums.data_ptr(), product.numel() // 4)
    launcher = _deltas_launcher("row_dots", product.get_device(), len(product))
    bf16 = delta.dtype == torch.bfloat16
    _launch(launcher, _DELTAS_PARAMS, (*values, product.shape[1] // 4, 0, 0, 0, bf16))
    return sums


def variants(arch: str) -> list[tuple[Any, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`."""
    shrinks = [(_SHRINKS, "best_shrinks", arch, {"GROUP": group}) for group in GROUPS]
    return [*shrinks, *((_DELTAS, name, arch, {}) for name in ("rounded_delta", "row_dots"))]


def _delta(
    weight: Tensor,
    scale: Tensor | None,
    scales: Tensor | None,
    zeros: Tensor | None,
    delta: Tensor,
    group_size: int,
    bits: int,
    zero_point: bool,
) -> Tensor:
    parts = [None if part is None else _aligned(part) for part in (weight, scale, scales, zeros)]
    pointers = (0 if part is None else part.data_ptr() for part in parts)
    sizes = (weight.numel() // 4, weight.shape[1] // 4, group_size // 4)
    values = (*pointers, delta.data_ptr(), 0, *sizes, bits, zero_point, delta.dtype == torch.bfloat16)
    _launch(_deltas_launcher("rounded_delta", weight.get_device(), sizes[0]), _DELTAS_PARAMS, values)
    return delta


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor` as kernels read it: contiguous, four floats at a time."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _launch(launcher: Any, params: struct.Struct, values: Sequence[Any]) -> None:
    with launcher.lock:
        params.pack_into(launcher.params, 0, *values)
        launcher(torch.cuda.current_stream().cuda_stream)


@lru_cache(256)
def _shrinks_launcher(device: int, rows: int, groups: int, group_size: int) -> Any:
    kernel = jit.kernel(_SHRINKS, "best_shrinks", gpu(device).arch, {"GROUP": group_size})
    tiles = -(-rows // kernel.global_int("rows_a_block"))
    return kernel.launcher(tiles * groups, 256, 0, _SHRINKS_PARAMS.size)


@lru_cache(256)
def _deltas_launcher(name: str, device: int, work: int) -> Any:
    """work: fours of weights to round, or rows to sum up"""
    kernel = jit.kernel(_DELTAS, name, gpu(device).arch)
    threads = kernel.global_int("threads")
    return kernel.launcher(work if name == "row_dots" else -(-work // threads), threads, 0, _DELTAS_PARAMS.size)
