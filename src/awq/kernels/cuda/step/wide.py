"""What lies between the products of a pass over many rows: src/step_norm.cu, step_gate.cu and step_place.cu.

Unlike the kernels of a step of few rows these are asked for anew in every call, by whatever number of rows there is: a
launch is made once for each shape, and its arguments are packed when it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda.layout import SOURCES, gpu
from awq.kernels.cuda.step.attention import Heads
from awq.kernels.cuda.step.gemv import ACTIVATIONS

_NORM, _GATE, _PLACE = (SOURCES / f"step_{name}.cu" for name in ("norm", "gate", "place"))
_PIECE, _MOST_THREADS = 8, 1024  # channels that a thread has at a time; threads of a block that norms a row
_GATE_THREADS = 256
_PLACE_WARPS, _MANY = 8, 128  # from so many tokens on a warp takes four heads: 3.8 us for 128 on an H200, else 5.2
# stream, y, norm, x, last; width, each, at; factor, epsilon
_NORM_PARAMS = Struct("<5Q3i2f4x")
_GATE_PARAMS = Struct("<2Q2i")  # projected, out; width, blocks
# qkv, keys, values, rope, query_norm, key_norm, first, stride; query_at, key_at, value_at, heads, key_heads, blocks,
# columns, past, capacity, rotary, interleaved; two epsilons
_PLACE_PARAMS = Struct("<7Qq11i2f4x")


def add_and_norm(
    stream: Tensor,
    y: Tensor | None,
    factor: float,
    norm: Tensor,
    epsilon: float,
    x: Tensor,
    each: int = 1,
    at: int | Tensor = 0,
) -> None:
    """stream += factor * y and x = RMSNorm(stream) on the current stream, of the rows at, at + each, at + 2 each, ...

    stream: float32 [rows, width], 8 dividing width; y: [rows, width] float16 or bfloat16, None to add nothing
    norm: float32 [width], what the normed stream is multiplied by; x: [rows / each, width] float16 or bfloat16
    at: a number, or int64 [1] on the device
    """
    width, device = stream.shape[1], stream.get_device()
    threads, pieces = _threads(width)
    defines = (("THREADS", threads), ("PIECES", pieces), ("AWQ_BF16", int(x.dtype is torch.bfloat16)))
    last, fixed = (at, 0) if isinstance(at, Tensor) else (None, at)
    launcher = _launcher(device, _NORM, "add_and_norm", len(x), threads, defines, _NORM_PARAMS.size, jit.programmatic())
    pointers = (_address(tensor) for tensor in (stream, y, norm, x, last))
    _enqueue(launcher, device, _NORM_PARAMS, *pointers, width, each, fixed, factor, epsilon)


def gate(projected: Tensor, activation: str, out: Tensor) -> None:
    """out = act(gate) * up on the current stream, with gate and up the halves of projected, in this order.

    projected: [rows, 2 * width] float16 or bfloat16, out: [rows, width], 8 dividing width; activation: of ACTIVATIONS
    """
    (rows, width), device = out.shape, out.get_device()
    blocks = -(-width // (_PIECE * _GATE_THREADS))
    defines = (("ACTIVATION", ACTIVATIONS[activation]), ("AWQ_BF16", int(out.dtype is torch.bfloat16)))
    shape = (rows * blocks, _GATE_THREADS, defines, _GATE_PARAMS.size)
    launcher = _launcher(device, _GATE, "gate", *shape, jit.programmatic())
    _enqueue(launcher, device, _GATE_PARAMS, projected.data_ptr(), out.data_ptr(), width, blocks)


def place(qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, first: Tensor, past: int) -> None:
    """Norms and RoPE of queries, which stay in qkv, and of keys, which go to the cache with the values.

    qkv: [rows * columns, channels] of `columns` tokens a row, which go to the slots from `past` on
    keys, values: [rows, key_heads, capacity, head_dim]; first: int64 [rows]: a token's position is its slot less that
    """
    rows, device = len(keys), qkv.get_device()
    each = 4 if len(qkv) >= _MANY else 1
    blocks = -(-(heads.heads + 2 * heads.key_heads) // (each * _PLACE_WARPS))
    defines = _place_defines(heads.head_dim, each, qkv.dtype is torch.bfloat16)
    shape = (len(qkv) * blocks, 32 * _PLACE_WARPS, tuple(defines.items()), _PLACE_PARAMS.size)
    launcher = _launcher(device, _PLACE, "place", *shape, jit.programmatic())
    norms = (heads.query_norm, heads.key_norm)
    tensors = (qkv, keys, values, heads.rope, *(norm.weight if norm else None for norm in norms), first)
    sizes = (heads.query_at, heads.key_at, heads.value_at, heads.heads, heads.key_heads, blocks)
    rotary = 0 if heads.rope is None else 2 * heads.rope.shape[1]
    numbers = (len(qkv) // rows, past, keys.shape[2], rotary, int(heads.interleaved))
    epsilons = (norm.epsilon if norm else 0.0 for norm in norms)
    _enqueue(launcher, device, _PLACE_PARAMS, *map(_address, tensors), qkv.stride(0), *sizes, *numbers, *epsilons)


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """The (source, kernel, arch, defines) for the widths and head sizes of common models on `arch`."""
    for bf16 in (False, True):
        for width in (576, 4096, 5120, 8192, 16384):
            threads, pieces = _threads(width)
            yield _NORM, "add_and_norm", arch, {"THREADS": threads, "PIECES": pieces, "AWQ_BF16": int(bf16)}
        for activation in ACTIVATIONS.values():
            yield _GATE, "gate", arch, {"ACTIVATION": activation, "AWQ_BF16": int(bf16)}
        for head_dim in (64, 80, 96, 128, 256):
            for each in (1, 4):
                yield _PLACE, "place", arch, _place_defines(head_dim, each, bf16)


def _place_defines(head_dim: int, each: int, bf16: bool) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "EACH": each, "AWQ_BF16": int(bf16)}


def _threads(width: int) -> tuple[int, int]:
    """Threads of a block that norms a row, whole warps, and pieces that each of them has."""
    threads = min(_MOST_THREADS, -(-width // (32 * _PIECE)) * 32)
    return threads, -(-width // (threads * _PIECE))


@lru_cache(4096)
def _launcher(
    device: int,
    source: Path,
    name: str,
    grid: int,
    block: int,
    defines: tuple[tuple[str, int], ...],
    size: int,
    programmatic: bool,
) -> Any:
    kernel = jit.kernel(source, name, gpu(device).arch, dict(defines))
    return kernel.launcher(grid, block, 0, size, pdl=programmatic)


def _enqueue(launcher: Any, device: int, struct: Struct, *values: float) -> None:
    with launcher.lock:
        struct.pack_into(launcher.params, 0, *values)
        launcher(torch._C._cuda_getCurrentRawStream(device))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
