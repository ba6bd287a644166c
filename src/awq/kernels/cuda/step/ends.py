"""The two ends of a decode step: tokens to residual stream (src/step_embed.cu), and that to logits (step_head.cu)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda.layout import SOURCES, TILE_ROWS, gpu
from awq.kernels.cuda.step.launch import Launch

MAX_ROWS = 8
_EMBED, _HEAD = SOURCES / "step_embed.cu", SOURCES / "step_head.cu"
_EMBED_THREADS, _HEAD_WARPS = 128, 8
_MOST_STAGES = 8  # of a warp's ring in the head
_ROW_BYTES = (512, 256)  # of a stage: as many as leave room for two stages
_STATIC = 2 << 10  # bytes of shared memory that the head's kernel has beside rings and x, at most
_EMBED_PARAMS = Struct("<3Q2if4x")  # table, tokens, x; width, blocks, factor
# tensor map of the weight; scales, bias, x, norm, logits; vocabulary, width, batch, parts, stages; epsilon, factor
_HEAD_PARAMS = Struct("<128s5Q5i2f60x")


def embed(table: Tensor, stream: Tensor, factor: float) -> Callable[[Tensor], Launch]:
    """bind(tokens) makes the launch of stream = factor * table[tokens], the first of a step: see `Launch`.

    table: [vocabulary, width] float16 or bfloat16, 8 dividing width; stream: float32 [batch, width]
    tokens: int64 [batch]
    """
    batch, width = stream.shape
    blocks = -(-width // (8 * _EMBED_THREADS))
    defines = {"AWQ_BF16": int(table.dtype is torch.bfloat16)}
    device = stream.get_device()
    launch = Launch(_EMBED, "embed", defines, batch * blocks, _EMBED_THREADS, 0, _EMBED_PARAMS, device)
    return lambda tokens: launch.bind(table, tokens, stream, width, blocks, factor)


def head(
    stream: Tensor,
    norm: Tensor,
    epsilon: float,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor,
    factor: float = 1.0,
    scales: Tensor | None = None,
) -> Launch:
    """logits = factor * (RMSNorm(stream) weight^T + bias), for up to 8 rows.

    stream: float32 [batch, width]; norm: float32 [width], what the normed stream is multiplied by
    weight: [vocabulary, width] float16 or bfloat16 with 8 dividing width, or what `to_int8` gave, with its scales
    bias: float32 [vocabulary]; logits: float32 [batch, vocabulary]
    """
    (batch, width), vocabulary, int8 = stream.shape, weight.shape[0], scales is not None
    device = stream.get_device()
    _, multiprocessors, available = gpu(device)
    row_bytes, stages = _ring(batch, width, weight.element_size(), available - _STATIC)
    parts = -(-width * weight.element_size() // row_bytes)
    grid = min(multiprocessors, -(-vocabulary // TILE_ROWS))
    shared = _HEAD_WARPS * stages * TILE_ROWS * row_bytes + _x_bytes(batch, width, row_bytes // weight.element_size())
    defines = _head_defines(int8, weight.dtype is torch.bfloat16, row_bytes)
    launch = Launch(_HEAD, "head", defines, grid, 32 * _HEAD_WARPS, shared, _HEAD_PARAMS, device, weight)
    columns = width * weight.element_size() // 8
    box = (row_bytes // 8, TILE_ROWS)
    weight_map = jit.tensor_map(weight.data_ptr(), "uint64", (columns, vocabulary), (8 * columns,), box, 0, 256)
    sizes = (vocabulary, width, batch, parts, stages)
    return launch.bind(weight_map, scales, bias, stream, norm, logits, *sizes, epsilon, factor)


def _ring(batch: int, width: int, element: int, available: int) -> tuple[int, int]:
    """(row_bytes, stages) of each warp's ring in the head: 16 rows x row_bytes a stage."""
    for row_bytes in _ROW_BYTES:
        room = available - _x_bytes(batch, width, row_bytes // element)
        stages = min(_MOST_STAGES, room // (_HEAD_WARPS * TILE_ROWS * row_bytes))
        if stages > 1:
            break
    return row_bytes, max(1, stages)


def _x_bytes(batch: int, width: int, part: int) -> int:
    """The normed rows, with padding to whole parts and against bank conflicts."""
    return batch * (-(-width // part) * part + 8) * 2


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A head [vocabulary, width], 16 dividing width, as int8 and float32 scales [vocabulary], a row at a time."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in torch.arange(len(weight), device=weight.device).split(4096):  # float32 of a few rows at a time
        some = weight[rows].float()
        scales[rows] = some.abs().amax(1).clamp_min(1e-30) / 127
        codes[rows] = (some / scales[rows].unsqueeze(1)).round().to(torch.int8)
    return codes, scales


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`."""
    for bf16 in (False, True):
        yield _EMBED, "embed", arch, {"AWQ_BF16": int(bf16)}
    for row_bytes in _ROW_BYTES:
        for int8, bf16 in ((False, False), (False, True), (True, False)):
            yield _HEAD, "head", arch, _head_defines(int8, bf16, row_bytes)


def _head_defines(int8: bool, bf16: bool, row_bytes: int) -> dict[str, int]:
    """int8 weights become float16, and the normed stream too: neither is large."""
    return {"INT8": int(int8), "AWQ_BF16": int(bf16 and not int8), "ROW_BYTES": row_bytes}
