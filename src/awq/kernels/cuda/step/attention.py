"""Attention of one new token a sequence over its cache: src/step_attention.cu."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from awq.kernels.cuda.layout import SOURCES, gpu
from awq.kernels.cuda.step.launch import Launch

SOURCE = SOURCES / "step_attention.cu"
HEAD_DIMS = range(8, 257, 8)
_WARPS, _HEADS = 8, 8  # of the kernel: warps of a block, query heads that it takes at most
_MOST_SPLITS = 8  # blocks of a cluster on every GPU that has clusters

# struct Params: 10 addresses; qkv_stride; query_at, key_at, value_at, batch, key_heads, group, parts,
# capacity, window, rotary, interleaved; scale and two epsilons.
_PARAMS = Struct("<10Qq11i3f")


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of each head: weight float32 [head_dim], what the normed head is multiplied by."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Heads:
    """What the attention of a layer is.

    query_at, key_at, value_at: channels of the projection at which each begins, head after head
    scale: of the scores
    rope:  float32 [positions, rotary / 2, 2], cosine and sine; None without
    interleaved: the channels that turn together are 2i and 2i + 1, not i and i + rotary / 2
    """

    heads: int
    key_heads: int
    head_dim: int
    query_at: int
    key_at: int
    value_at: int
    scale: float
    rope: Tensor | None = None
    interleaved: bool = False
    query_norm: HeadNorm | None = None
    key_norm: HeadNorm | None = None


Bind = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int | None], Launch]


def attention(qkv: Tensor, heads: Heads, out: Tensor) -> Bind:
    """bind(keys, values, slot, first, position, window) makes the launch that appends to the cache and attends to it.

    qkv: [batch, channels]; out: [batch, heads * head_dim], float16 or bfloat16 as the cache
    keys, values: [batch, key_heads, capacity, head_dim]; slot int64 [1]; first, position int64 [batch]: the new token
        goes to `slot`, its position is that of the RoPE table, and it sees the slots from `first` on
    window: how many slots are seen, the new one included; None for all
    """
    group = heads.heads // heads.key_heads
    batch, parts, device = qkv.shape[0], -(-group // _HEADS), qkv.get_device()
    blocks = batch * heads.key_heads * parts
    splits = splits_of(blocks, gpu(device).multiprocessors)
    shared = _WARPS * -(-group // parts) * _padded(heads.head_dim) * 4
    launch = Launch(
        SOURCE,
        "attention",
        _defines(heads.head_dim, splits, qkv.dtype is torch.bfloat16),
        blocks * splits,
        32 * _WARPS,
        shared,
        _PARAMS,
        device,
    )
    sizes = (heads.query_at, heads.key_at, heads.value_at, batch, heads.key_heads, group, parts)
    rotary = 0 if heads.rope is None else 2 * heads.rope.shape[1]
    norms = (heads.query_norm, heads.key_norm)
    weights = [norm.weight if norm else None for norm in norms]
    epsilons = [norm.epsilon if norm else 0.0 for norm in norms]

    def bind(keys: Tensor, values: Tensor, slot: Tensor, first: Tensor, position: Tensor, window: int | None) -> Launch:
        places = (qkv, keys, values, out, heads.rope, *weights, slot, first, position)
        last = (keys.shape[2], window or 0, rotary, int(heads.interleaved))
        return launch.bind(*places, qkv.stride(0), *sizes, *last, heads.scale * math.log2(math.e), *epsilons)

    return bind


def splits_of(blocks: int, multiprocessors: int) -> int:
    """Blocks that share a key head's tokens: a power of two, as many as run at once."""
    splits = 1
    while splits < _MOST_SPLITS and 2 * splits * blocks <= multiprocessors:
        splits *= 2
    return splits


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """The (source, kernel, arch, defines) for the head sizes of common models on `arch`."""
    for head_dim in (64, 80, 96, 128, 256):
        for splits in (1, 4, _MOST_SPLITS):
            for bf16 in (False, True):
                yield SOURCE, "attention", arch, _defines(head_dim, splits, bf16)


def _defines(head_dim: int, splits: int, bf16: bool) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "SPLITS": splits, "AWQ_BF16": int(bf16)}


def _padded(head_dim: int) -> int:
    return -(-head_dim // 32) * 32
