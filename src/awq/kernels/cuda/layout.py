"""A weight in the memory layout of every CUDA kernel here: `Units`, drawn in src/common.cuh."""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awq import jit
from awq.packing import Outliers, PackedInt4

SOURCES = Path(__file__).parent / "src"
TILE_ROWS, UNIT_K, UNIT_BYTES, STEP = 16, 256, 2048, 16
GROUPS = (32, 64, 128)  # that kernels know; multiples of 128, and whole rows, repeat their scale

_THREADS, _TILES = 256, 8  # of the repack kernel
_PARAMS = struct.Struct("<5Q5i4x")
# Bits 4i..4i+3 of a code word: k within two k16 steps, less 2c.
_NIBBLES = (0, 16, 8, 24, 1, 17, 9, 25)
_BY_K = [_NIBBLES.index(k) for k in sorted(_NIBBLES)]  # step, half k, bit


class Units(NamedTuple):
    """codes uint8 [tiles, units, 2048]; affine uint8 [tiles, units, 40 * 256 / group]; group: 32, 64 or 128.

    kept: float16 [tiles, steps, 256], and index: int32 [16 * steps] with -1 for padding; None without kept channels
    """

    codes: Tensor
    affine: Tensor
    kept: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # a tuple has a method of this name, which nobody misses
    in_features: int
    out_features: int
    group: int


class Shape(NamedTuple):
    """What a launch is made for; two weights of one shape share it."""

    in_features: int
    out_features: int
    group: int
    kept_steps: int
    bf16: bool

    @property
    def tiles(self) -> int:
        return -(-self.out_features // TILE_ROWS)

    @property
    def units(self) -> int:
        return -(-self.in_features // UNIT_K)


class Gpu(NamedTuple):
    """What a launch depends on beside its shape. shared_memory: bytes that a block may have."""

    arch: str
    multiprocessors: int
    shared_memory: int


@lru_cache
def gpu(device: int) -> Gpu:
    facts: Any = torch.cuda.get_device_properties(device)
    return Gpu(
        jit.arch_of((facts.major, facts.minor)), facts.multi_processor_count, facts.shared_memory_per_block_optin
    )


def effective_group(group_size: int, in_features: int) -> int | None:
    """The group that kernels use for a checkpoint's, None where they have none."""
    if group_size in GROUPS:
        return group_size
    return 128 if group_size % 128 == 0 or group_size == in_features else None


def to_units(packed: PackedInt4, outliers: Outliers | None, device: torch.device | str) -> Units:
    """Repack on `device`: by a kernel on a GPU, by torch elsewhere. ValueError for a group that no kernel has."""
    packed = packed.to(device)
    group = effective_group(packed.group_size, packed.in_features)
    if group is None:
        raise ValueError(f"groups of {packed.group_size} have no units")
    codes, affine = (_repack if packed.qweight.is_cuda else _repack_by_torch)(packed, group)
    kept, index = _fragments(outliers.to(device), packed.out_features) if outliers is not None else (None, None)
    if codes.is_cuda:  # a kernel asks for its weights before the one ahead of it has ended
        torch.cuda.current_stream(codes.device).synchronize()
    return Units(codes, affine, kept, index, packed.in_features, packed.out_features, group)


def units_to_dense(units: Units) -> Tensor:
    """The weight of the codes, without kept channels: float32 [out_features, in_features]."""
    tiles, count, _ = units.codes.shape
    words = units.codes.view(torch.int32).view(tiles, count, 4, 8, 4, 2, 2)  # slice, r, c, step pair, half
    nibbles = torch.stack([words >> 4 * i & 15 for i in range(8)], -1)
    by_k = nibbles[..., _BY_K].view(*words.shape, 2, 2, 2)
    codes = by_k.permute(0, 6, 3, 1, 2, 5, 7, 8, 4, 9).reshape(tiles * TILE_ROWS, -1)
    groups = UNIT_K // units.group
    scales = units.affine[..., : 32 * groups].contiguous().view(torch.float16).view(tiles, count, 8, groups, 2)
    zeros = units.affine[..., 32 * groups :].reshape(tiles, count, 8, groups, 1)
    zeros = torch.cat([zeros & 15, zeros >> 4], -1)
    scales, zeros = (t.permute(0, 4, 2, 1, 3).reshape(tiles * TILE_ROWS, -1) for t in (scales.float(), zeros.float()))
    weight = (codes.view(*scales.shape, -1) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    return weight.view(tiles * TILE_ROWS, -1)[: units.out_features, : units.in_features].contiguous()


def _repack(packed: PackedInt4, group: int) -> tuple[Tensor, Tensor]:
    tiles, units = -(-packed.out_features // TILE_ROWS), -(-packed.in_features // UNIT_K)
    device = packed.qweight.device
    codes = torch.empty(tiles, units, UNIT_BYTES, dtype=torch.uint8, device=device)
    affine = torch.empty(tiles, units, 40 * UNIT_K // group, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        kernel = jit.kernel(SOURCES / "repack.cu", "repack", gpu(codes.get_device()).arch, {"GROUP": group})
        launcher = kernel.launcher(-(-tiles // _TILES) * units, _THREADS, 0, _PARAMS.size)
        inputs = (packed.qweight.contiguous(), packed.qzeros.contiguous(), packed.scales.contiguous())
        pointers = (tensor.data_ptr() for tensor in (*inputs, codes, affine))
        sizes = (packed.out_features, packed.in_features, packed.group_size, tiles, units)
        _PARAMS.pack_into(launcher.params, 0, *pointers, *sizes)
        launcher(torch.cuda.current_stream(device).cuda_stream)
    return codes, affine


def _repack_by_torch(packed: PackedInt4, group: int) -> tuple[Tensor, Tensor]:
    """What the kernel does, and its reference."""
    tiles, units = -(-packed.out_features // TILE_ROWS), -(-packed.in_features // UNIT_K)
    rows, columns, groups = tiles * TILE_ROWS, units * UNIT_K, UNIT_K // group
    codes = _padded(packed.codes(), rows, columns)
    # tile, half, r, unit, slice, pair of steps, step, half k, c, bit -> ..., with nibbles in the order of _NIBBLES
    parts = codes.view(tiles, 2, 8, units, 4, 2, 2, 2, 4, 2).permute(0, 3, 4, 2, 8, 5, 1, 9, 7, 6)
    nibbles = parts.reshape(tiles, units, UNIT_BYTES, 2)  # (bit, half k) make a byte of two steps
    words = nibbles[..., 0] | nibbles[..., 1] << 4
    repeats = packed.group_size // group if packed.group_size >= group else 1
    scales, zeros = packed.scales.t(), packed.zeros()
    if scales.shape[1] == 1:
        repeats = units * groups
    scales = _padded(scales.repeat_interleave(repeats, 1)[:, : -(-packed.in_features // group)], rows, units * groups)
    zeros = _padded(zeros.repeat_interleave(repeats, 1)[:, : -(-packed.in_features // group)], rows, units * groups)
    by_record = (t.view(tiles, 2, 8, units, groups).permute(0, 3, 2, 4, 1) for t in (scales, zeros))
    scales, zeros = (t.contiguous() for t in by_record)
    packed_zeros = zeros[..., 0] | zeros[..., 1] << 4
    record = [scales.view(torch.uint8).view(tiles, units, -1), packed_zeros.view(tiles, units, -1)]
    return words.contiguous(), torch.cat(record, -1)


def _fragments(outliers: Outliers, out_features: int) -> tuple[Tensor, Tensor]:
    """The residual as m16n8k16 operands, and the input channel of each of their k."""
    steps, tiles = -(-outliers.index.numel() // STEP), -(-out_features // TILE_ROWS)
    residual = _padded(outliers.residual.t(), tiles * TILE_ROWS, steps * STEP)
    kept = residual.view(tiles, 2, 8, steps, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    index = nn.functional.pad(outliers.index.int(), (0, steps * STEP - outliers.index.numel()), value=-1)
    return kept.reshape(tiles, steps, -1).contiguous(), index


def _padded(tensor: Tensor, rows: int, columns: int) -> Tensor:
    return nn.functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))
