"""Attention of one new token a sequence over its cache: src/step_attention.cu."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda.layout import SOURCES, gpu
from awq.kernels.cuda.step.launch import Launch

SOURCE = SOURCES / "step_attention.cu"
HEAD_DIMS = range(8, 257, 8)
_HEADS, _CHUNK = 8, 16  # of the kernel: query heads of a block at most, tokens that a warp takes at a time
_SPLITS = (1, 2, 4, 8, 16)  # one block reads the shares of all
# Warps of a block, and units of the ring of each: 16 keys or 16 values. The first that fits: blocks that take more than
# half of an SM's shared memory spread over all SMs, also where they start as others end.
_RINGS = ((8, 4), (8, 2), (8, 1))
_CROWDED = (4, 3)  # where there are more blocks than SMs: several to an SM, so that some copy while others start or end

# struct Params: 11 addresses; qkv_stride; query_at, key_at, value_at, key_heads, group, parts, each,
# capacity, window, rotary, interleaved; scale and two epsilons.
_PARAMS = Struct("<11Qq11i3f")


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


Bind = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int | None, int], Launch]


def attention(qkv: Tensor, heads: Heads, out: Tensor, shares: Tensor | None = None) -> Bind:
    """bind(keys, values, slot, first, position, window, slots) makes the launch that appends to the cache and attends.

    qkv: [batch, channels]; out: [batch, heads * head_dim], float16 or bfloat16 as the cache
    keys, values: [batch, key_heads, capacity, head_dim]; slot int64 [1]; first, position int64 [batch]: the new token
        goes to `slot`, its position is that of the RoPE table, and it sees the slots from `first` on
    window: how many slots are seen, the new one included; None for all
    slots: `slot` is below it. Where blocks share the tokens of a head, those that find none cost too: with 16 of them
        for 256 tokens a step of Llama-3-8B took 3 % longer on an H200
    shares: what `shares_of` gave for these heads, which launches of one stream may have in common; None: its own
    """
    group, batch, device = heads.heads // heads.key_heads, qkv.shape[0], qkv.get_device()
    parts = -(-group // _HEADS)
    each, blocks = -(-group // parts), batch * heads.key_heads * parts
    arch, multiprocessors, available = gpu(device)
    (warps, units), bf16 = _ring(heads.head_dim, available), qkv.dtype is torch.bfloat16
    if blocks > multiprocessors:
        warps, units = _CROWDED
    launches: dict[int, tuple[Launch, Tensor]] = {}

    def launch(splits: int) -> tuple[Launch, Tensor]:
        """The kernel for so many blocks a key head, and where they put what they share."""
        if splits not in launches:
            now, later = (_defines(heads.head_dim, count, warps, units, bf16) for count in (splits, 2 * splits))
            if 2 * splits in _SPLITS and 2 * splits * blocks <= multiprocessors:
                jit.prefetch([(SOURCE, "attention", arch, later)])  # for when the text has grown
            room = warps * units * _unit_bytes(heads.head_dim)
            kernel = Launch(SOURCE, "attention", now, blocks * splits, 32 * warps, room, _PARAMS, device)
            own = shares_of([heads], blocks * splits if splits > 1 else 0, qkv.device) if shares is None else shares
            launches[splits] = kernel, own
        return launches[splits]

    sizes = (heads.query_at, heads.key_at, heads.value_at, heads.key_heads, group, parts, each)
    rotary = 0 if heads.rope is None else 2 * heads.rope.shape[1]
    norms = (heads.query_norm, heads.key_norm)
    weights = [norm.weight if norm else None for norm in norms]
    epsilons = [norm.epsilon if norm else 0.0 for norm in norms]

    def bind(
        keys: Tensor, values: Tensor, slot: Tensor, first: Tensor, position: Tensor, window: int | None, slots: int
    ) -> Launch:
        seen, chunks = min(slots, window or slots), warps * units // 2
        kernel, shares = launch(splits_of(blocks, multiprocessors, seen, chunks))
        places = (qkv, keys, values, out, heads.rope, *weights, slot, first, position, shares)
        last = (keys.shape[2], window or 0, rotary, int(heads.interleaved))
        return kernel.bind(*places, qkv.stride(0), *sizes, *last, heads.scale * math.log2(math.e), *epsilons)

    return bind


def shares_of(heads: Iterable[Heads], blocks: int, device: torch.device) -> Tensor:
    """What so many blocks that split the tokens of any of `heads` hand to one another: -1 where it is not there yet."""
    numbers = max(min(_HEADS, each.heads // each.key_heads) * (_padded(each.head_dim) + 4) for each in heads)
    return torch.full((blocks * numbers,), -1, dtype=torch.int32, device=device)


def splits_of(blocks: int, multiprocessors: int, slots: int, chunks: int) -> int:
    """Blocks that share a key head's tokens where those are many: enough for `chunks` each, and that run at once."""
    wanted = -(-slots // (_CHUNK * chunks))
    least = next((splits for splits in _SPLITS if splits >= wanted), _SPLITS[-1])
    return max(splits for splits in _SPLITS if splits <= max(1, min(least, multiprocessors // blocks)))


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """The (source, kernel, arch, defines) for the head sizes of common models on `arch`."""
    for head_dim in (64, 80, 96, 128, 256):
        for splits, ring in itertools.product(_SPLITS, (*_RINGS, _CROWDED)):
            for bf16 in (False, True):
                yield SOURCE, "attention", arch, _defines(head_dim, splits, *ring, bf16)


def _defines(head_dim: int, splits: int, warps: int, units: int, bf16: bool) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "SPLITS": splits, "WARPS": warps, "UNITS": units, "AWQ_BF16": int(bf16)}


def _ring(head_dim: int, available: int) -> tuple[int, int]:
    """(warps, units) of _RINGS for a block that may have so many bytes of shared memory."""

    def fits(warps: int, units: int) -> bool:
        beside = 20 * (_padded(head_dim) + 8) + warps * (4 * _padded(head_dim) + 64) + 128  # struct Shared
        return warps * units * _unit_bytes(head_dim) + beside <= available

    return next((ring for ring in _RINGS if fits(*ring)), _RINGS[-1])


def _unit_bytes(head_dim: int) -> int:
    return _CHUNK * (_padded(head_dim) + 8) * 2


def _padded(head_dim: int) -> int:
    return -(-head_dim // 32) * 32
