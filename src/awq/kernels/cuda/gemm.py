"""The GEMM kernels: any number of rows. `schedule` says which design runs and how its tiles are shared out.

Everything in `gemm` runs on every call of every linear: what a weight, a shape or a tensor's address settles is cached.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda import dense
from awq.kernels.cuda.designs import copy_policy, dequantizes, shared_limit
from awq.kernels.cuda.layout import SOURCES, STEP, TILE_ROWS, UNIT_BYTES, UNIT_K, Shape, Units, gpu
from awq.kernels.cuda.schedule import Plan, plan, share_out
from awq.kernels.cuda.workspace import NOWHERE, workspace

# struct Params of gemm_common.cuh: five tensor maps of 128 bytes; then pointers to codes, affine, kept, index: what
# belongs to the weight. x, y, bias, partial sums, flags, x_stride. rows, in_features, out_features and the plan.
_X, _OUT, _GATHERED, _WEIGHT = range(0, 512, 128)
_MAPS_BYTES, _MAP = 256, 128
_POINTERS = struct.Struct("<4Q")
_CHANGING, _CHANGING_AT = struct.Struct("<5Qi"), _WEIGHT + _MAPS_BYTES + _POINTERS.size
_FIXED, _FIXED_AT = struct.Struct("<13i"), _CHANGING_AT + _CHANGING.size
_PARAMS_BYTES = 768
_GATHER = struct.Struct("<3Q3i4x")
# So much shared memory that a block has a multiprocessor to itself: as those become free one by one, all blocks could
# crowd on the first few. (Before, from 256 rows on, kept channels cost 11 us and more whatever the rows.)
_GATHER_THREADS, _GATHERED_EACH, _GATHER_SHARED = 256, 512, 116 * 1024
_BFLOAT16 = torch.bfloat16


class _Launch(NamedTuple):
    """What all calls of some rows share. The launcher is None where the weight is dequantized instead.

    box:    rows of x in a tensor copy, 0 where there are no such copies; weight_box: slices of k, tiles
    stores: rows of y in a tensor store, 0 for none; split: bytes of partial sums
    """

    launcher: Any = None
    gather: Any = None
    box: int = 0
    weight_box: tuple[int, int] = (0, 0)
    stores: int = 0
    split: int = 0
    plan: Plan | None = None


def gemm(x: Tensor, units: Units, bias: Tensor | None, out: Tensor) -> None:
    """out = x W^T + x[:, kept] R + bias on the current stream.

    x: [rows, in_features] float16 or bfloat16, 16-byte aligned, rows a multiple of 8 elements apart
    bias: [out_features] of x's dtype; out: [rows, out_features] of x's dtype, contiguous
    """
    codes, affine, kept, index, in_features, out_features, group = units
    device, bf16, rows, stride = x.get_device(), x.dtype is _BFLOAT16, x.shape[0], x.stride()[0]
    shape = (in_features, out_features, group, 0 if kept is None else kept.shape[1], bf16)
    launcher, gather, box, weight_box, stores, split, _ = _launch(device, shape, rows, jit.programmatic())
    if launcher is None:
        return dense.multiply(x, units, bias, out)
    stream = torch._C._cuda_getCurrentRawStream(device)
    gathered = None if gather is None else _gather(gather, x, index, stream)
    place = workspace(device, stream, split) if split else NOWHERE
    x_at, out_at, bias_at = x.data_ptr(), out.data_ptr(), 0 if bias is None else bias.data_ptr()
    kept_at, index_at = (0, 0) if kept is None or index is None else (kept.data_ptr(), index.data_ptr())
    with launcher.lock:
        params = launcher.params
        params[_WEIGHT:_CHANGING_AT] = _weight(
            (codes.data_ptr(), affine.data_ptr(), kept_at, index_at), shape, weight_box
        )
        if box:
            params[_X:_OUT] = _rows_map(x_at, bf16, rows, in_features, stride, box)
        if stores:
            params[_OUT:_GATHERED] = _rows_map(out_at, bf16, rows, out_features, out_features, stores)
        if gathered is not None:
            columns = gathered.shape[1]
            params[_GATHERED:_WEIGHT] = _rows_map(gathered.data_ptr(), bf16, rows, columns, columns, box)
        _CHANGING.pack_into(params, _CHANGING_AT, x_at, out_at, bias_at, place.partial, place.flags, stride)
        launcher(stream)
    return None


def _gather(launcher: Any, x: Tensor, index: Tensor | None, stream: int) -> Tensor:
    """x at the kept channels, [rows, 16 * steps], as a tensor of its own."""
    assert index is not None
    rows, columns = x.shape[0], index.shape[0]
    gathered = x.new_empty((rows, columns))
    with launcher.lock:
        pointers = (x.data_ptr(), index.data_ptr(), gathered.data_ptr())
        _GATHER.pack_into(launcher.params, 0, *pointers, rows, columns, x.stride()[0])
        launcher(stream)
    return gathered


@lru_cache(4096)
def _launch(device: int, sizes: tuple[int, int, int, int, bool], rows: int, programmatic: bool) -> _Launch:
    """The launch of `rows` rows of a weight of a `Shape`, with every parameter that does not change in place."""
    shape, (arch, sms, _) = Shape(*sizes), gpu(device)
    if dequantizes(rows, arch):
        return _Launch()
    pdl = programmatic and copy_policy(arch) == 2
    chosen = plan(rows, shape, arch, sms)
    design = chosen.design
    source = SOURCES / f"{design.kernel}.cu"
    kernel = jit.kernel(source, design.kernel, arch, design.defines(shape.group, shape.bf16))
    if design.cluster > 1:  # of a cluster's blocks all must fit the same part of the GPU
        workers = kernel.clusters(design.cluster, design.threads, chosen.shared)
        if workers < sms // design.cluster:
            chosen = share_out(design, chosen.reason, rows, shape, shared_limit(arch), max(1, workers))
    launcher = kernel.launcher(chosen.blocks, design.threads, chosen.shared, _PARAMS_BYTES, pdl)
    fixed = (chosen.token_tiles, chosen.row_blocks, chosen.workers, chosen.steps, chosen.walk)
    shares = (chosen.whole, chosen.share, chosen.longer)
    kept = (shape.kept_steps, chosen.kept_room)
    whole = (rows, shape.in_features, shape.out_features)
    _FIXED.pack_into(launcher.params, _FIXED_AT, *whole, *fixed, *shares, *kept)
    gather = None
    if shape.kept_steps and not design.mma:
        blocks = min(sms // 2, -(-rows * shape.kept_steps * STEP // _GATHERED_EACH))
        kernel = jit.kernel(SOURCES / "gather.cu", "gather", arch)
        gather = kernel.launcher(blocks, _GATHER_THREADS, _GATHER_SHARED, _GATHER.size, pdl)
    copies = design.copy == 2
    return _Launch(
        launcher,
        gather,
        box=design.tokens // design.cluster if copies else 0,
        weight_box=(design.slices, design.block_rows // TILE_ROWS) if copies else (0, 0),
        stores=design.tokens if design.tensor_store else 0,
        split=chosen.split_bytes,
        plan=chosen,
    )


@lru_cache(4096)
def _rows_map(pointer: int, bf16: bool, rows: int, columns: int, stride: int, tokens: int) -> bytes:
    """Rows of activations in boxes of 64 columns, swizzled as ldmatrix and wgmma read them without bank conflicts."""
    name = "bfloat16" if bf16 else "float16"
    return jit.tensor_map(pointer, name, (columns, rows), (2 * stride,), (64, tokens), 128, 128)


@lru_cache(4096)
def _weight(at: tuple[int, int, int, int], sizes: tuple[int, int, int, int, bool], box: tuple[int, int]) -> bytes:
    """What Params has of a weight: tensor maps of codes and affine, in 8-byte elements (a box has at most 256), and
    the pointers to all that there is."""
    slices, box_tiles = box
    maps = bytes(_MAPS_BYTES)
    if slices:
        shape = Shape(*sizes)
        tiles, units = shape.tiles, shape.units
        record, stride = 40 * UNIT_K // shape.group, units * UNIT_BYTES
        maps = jit.tensor_map(at[0], "uint64", (stride // 8, tiles), (stride,), (64 * slices, box_tiles), 0, 256)
        records = (units * record // 8, tiles), (units * record,), (record // 8, box_tiles)
        maps += jit.tensor_map(at[1], "uint64", *records, 0, 128)
    return maps + _POINTERS.pack(*at)
