"""The GEMM kernels: any number of rows. `designs` says which kernel runs and how its tiles are shared out."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda.designs import Plan, Shape, copy_policy, plan, share_out, shared_limit
from awq.kernels.cuda.layout import SOURCES, STEP, TILE_ROWS, UNIT_BYTES, UNIT_K, Units
from awq.kernels.cuda.workspace import workspace

# struct Params of gemm_common.cuh: five tensor maps of 128 bytes; then pointers to codes, affine, x, y, bias, kept,
# index, partial sums, flags; rows, in_features, out_features, x_stride; then what a plan fixes.
_X, _CODES, _AFFINE, _OUT, _GATHERED = range(0, 640, 128)
_CHANGING, _CHANGING_AT = struct.Struct("<9Q4i"), 640
_FIXED, _FIXED_AT = struct.Struct("<9i"), _CHANGING_AT + _CHANGING.size
_PARAMS_BYTES = 768
_GATHER = struct.Struct("<3Q3i4x")
_GATHER_THREADS, _GATHER_EACH = 256, 4


class _Launch(NamedTuple):
    plan: Plan
    launcher: Any
    gather: Any


def gemm(x: Tensor, units: Units, bias: Tensor | None, out: Tensor) -> None:
    """out = x W^T + x[:, kept] R + bias on the current stream.

    x: [rows, in_features] float16 or bfloat16, 16-byte aligned, rows a multiple of 8 elements apart
    bias: [out_features] of x's dtype; out: [rows, out_features] of x's dtype, contiguous
    """
    kept, bf16, device = units.kept, x.dtype is torch.bfloat16, x.get_device()
    steps = 0 if kept is None else kept.shape[1]
    shape = Shape(units.in_features, units.out_features, units.group, steps, bf16)
    rows, stride = x.shape[0], x.stride(0)
    chosen, launcher, gather = _launch(device, shape, rows, jit.programmatic())
    stream = torch._C._cuda_getCurrentRawStream(device)
    partial, flags = workspace(device, stream, chosen) if chosen.splits else (0, 0)
    design = chosen.design
    gathered = _gather(gather, x, units, stream) if gather is not None else None
    x_at, codes_at, affine_at, out_at = x.data_ptr(), units.codes.data_ptr(), units.affine.data_ptr(), out.data_ptr()
    with launcher.lock:
        params = launcher.params
        if design.copy == 2:
            params[_X:_CODES] = _rows_map(x_at, bf16, rows, shape.in_features, stride, design.tokens // design.cluster)
            params[_CODES:_OUT] = _weight_maps(codes_at, affine_at, shape, design.slices, design.block_rows)
            if design.tensor_store:
                params[_OUT:_GATHERED] = _rows_map(
                    out_at, bf16, rows, shape.out_features, shape.out_features, design.tokens
                )
            if gathered is not None:
                columns = gathered.shape[1]
                params[_GATHERED:_CHANGING_AT] = _rows_map(
                    gathered.data_ptr(), bf16, rows, columns, columns, design.tokens // design.cluster
                )
        _CHANGING.pack_into(
            params,
            _CHANGING_AT,
            codes_at,
            affine_at,
            x_at,
            out_at,
            0 if bias is None else bias.data_ptr(),
            0 if kept is None else kept.data_ptr(),
            0 if units.index is None else units.index.data_ptr(),
            partial,
            flags,
            rows,
            shape.in_features,
            shape.out_features,
            stride,
        )
        launcher(stream)


def _gather(launcher: Any, x: Tensor, units: Units, stream: int) -> Tensor:
    """x at the kept channels, [rows, 16 * steps], as a tensor of its own."""
    assert units.index is not None
    rows, columns = x.shape[0], units.index.shape[0]
    gathered = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    with launcher.lock:
        pointers = (x.data_ptr(), units.index.data_ptr(), gathered.data_ptr())
        _GATHER.pack_into(launcher.params, 0, *pointers, rows, columns, x.stride(0))
        launcher(stream)
    return gathered


@lru_cache(4096)
def _launch(device: int, shape: Shape, rows: int, programmatic: bool) -> _Launch:
    """The launch of `rows` rows, with every parameter that does not change already in place."""
    arch, sms = _gpu(device)
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
    _FIXED.pack_into(
        launcher.params,
        _FIXED_AT,
        chosen.token_tiles,
        chosen.row_blocks,
        chosen.workers,
        chosen.steps,
        chosen.whole,
        chosen.share,
        chosen.longer,
        shape.kept_steps,
        chosen.kept_room,
    )
    gather = None
    if shape.kept_steps and not design.mma:
        elements = rows * shape.kept_steps * STEP
        blocks = min(8 * sms, -(-elements // (_GATHER_THREADS * _GATHER_EACH)))
        gather = jit.kernel(SOURCES / "gather.cu", "gather", arch).launcher(
            blocks, _GATHER_THREADS, 0, _GATHER.size, pdl
        )
    return _Launch(chosen, launcher, gather)


@lru_cache(4096)
def _rows_map(pointer: int, bf16: bool, rows: int, columns: int, stride: int, tokens: int) -> bytes:
    """Rows of activations in boxes of 64 columns, swizzled as ldmatrix and wgmma read them without bank conflicts."""
    name = "bfloat16" if bf16 else "float16"
    return jit.tensor_map(pointer, name, (columns, rows), (2 * stride,), (64, tokens), 128, 128)


@lru_cache(4096)
def _weight_maps(codes: int, affine: int, shape: Shape, slices: int, block_rows: int) -> bytes:
    """Codes and affine of a block's tiles, in 8-byte elements: a box has at most 256."""
    tiles, units = -(-shape.out_features // TILE_ROWS), -(-shape.in_features // UNIT_K)
    record, box = 40 * UNIT_K // shape.group, block_rows // TILE_ROWS
    stride = units * UNIT_BYTES
    boxes = jit.tensor_map(codes, "uint64", (stride // 8, tiles), (stride,), (64 * slices, box), 0, 256)
    records = (units * record // 8, tiles), (units * record,), (record // 8, box)
    return boxes + jit.tensor_map(affine, "uint64", *records, 0, 128)


@lru_cache
def _gpu(device: int) -> tuple[str, int]:
    arch = jit.arch_of(torch.cuda.get_device_capability(device))
    return str(arch), int(torch.cuda.get_device_properties(device).multi_processor_count)
