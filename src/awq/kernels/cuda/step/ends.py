"""The two ends of a decode step: tokens to residual stream (src/step_embed.cu), and that to logits (step_head.cu)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from awq.kernels.cuda.layout import SOURCES, TILE_ROWS, gpu
from awq.kernels.cuda.step.launch import Launch

MAX_ROWS = 8
_EMBED, _HEAD = SOURCES / "step_embed.cu", SOURCES / "step_head.cu"
_EMBED_THREADS, _HEAD_THREADS = 128, 512
_EMBED_PARAMS = Struct("<3Q2if4x")  # table, tokens, x; width, blocks, factor
_HEAD_PARAMS = Struct(
    "<6Q4i2f"
)  # weight, scales, bias, x, norm, logits; vocabulary, width, batch, parts; epsilon, factor


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
    part = 256 if int8 else 128  # PART_K
    parts = -(-width // part)
    device = stream.get_device()
    grid = min(gpu(device).multiprocessors, -(-vocabulary // TILE_ROWS))
    shared = batch * (parts * part + 8) * 2
    defines = _head_defines(int8, weight.dtype is torch.bfloat16)
    launch = Launch(_HEAD, "head", defines, grid, _HEAD_THREADS, shared, _HEAD_PARAMS, device)
    sizes = (vocabulary, width, batch, parts)
    return launch.bind(weight, scales, bias, stream, norm, logits, *sizes, epsilon, factor)


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
        yield _HEAD, "head", arch, _head_defines(int8=False, bf16=bf16)
    yield _HEAD, "head", arch, _head_defines(int8=True, bf16=False)


def _head_defines(int8: bool, bf16: bool) -> dict[str, int]:
    """int8 weights become float16, and the normed stream too: neither is large."""
    return {"INT8": int(int8), "AWQ_BF16": int(bf16 and not int8)}
