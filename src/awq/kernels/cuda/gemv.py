"""The GEMV kernel: 1 to 8 rows at the speed at which the weight is read. See src/gemv.cu for how."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda.layout import GROUPS, SOURCES, UNIT_BYTES, UNIT_K, Shape, Units, gpu

MAX_ROWS = 8
SOURCE = SOURCES / "gemv.cu"

# struct Params of gemv.cu: 7 pointers, x_stride; rows, out_features, in_features, tiles, extra, units, kept_steps,
# stages, in_flight, slots, kept_ahead. What changes from call to call comes first.
_PARAMS = struct.Struct("<7Qq11i")
_CHANGING = struct.Struct("<7Qq")
_SIZES = struct.Struct("<11i")
_SLOTS, _MAX_SLOTS, _MAX_STAGES, _MAX_CHUNKS = 4, 16, 16, 24
_KEPT_AHEAD = (8, 4, 2, 1)
_BARRIERS = 8 * (2 * (_MAX_STAGES + _MAX_SLOTS) + _MAX_CHUNKS + max(_KEPT_AHEAD))
_RESERVED = 1024  # bytes of shared memory that a block takes beside its own
# A block that reads no more than so many units shares its multiprocessor with the next kernel's, which then has all its
# weights when x arrives: 4096 x 4096 in 3.1 us instead of 3.7. Larger ones need the whole memory for their ring.
_FEW_UNITS = 40
# Several rows: shared memory that leaves 60 KB of it to L1. With a stage more 12288 x 4096 took 9.7 us instead of 8.8.
_KIND_TO_L1 = 196 * 1024 - _RESERVED


class Way(NamedTuple):
    """What a kernel is compiled for.

    warps: that multiply; a stage is a unit for each
    keep: units of every tile whose part of x a warp keeps in registers, 0 where they do not fall to all warps alike
    kept: whether there are kept channels, which one more warp multiplies
    """

    warps: int
    keep: int
    kept: bool


class Plan(NamedTuple):
    """How a GPU runs a shape.

    stages: of the ring, 0 where there is none
    in_flight: stages requested and not arrived at most
    slots: tiles whose sums wait to be added up
    shared: bytes of shared memory of a block
    """

    way: Way
    stages: int
    in_flight: int
    slots: int
    shared: int

    @property
    def threads(self) -> int:
        return 32 * (self.way.warps + (2 if self.stages else 1) + self.way.kept)


def gemv(x: Tensor, units: Units, bias: Tensor | None, out: Tensor) -> None:
    """out = x W^T + x[:, kept] R + bias on the current stream.

    x: [rows, in_features] float16 or bfloat16, at most `max_rows` rows, 16-byte aligned, rows a multiple of 8 apart and
       zero up to the next multiple of 8 channels
    bias: [out_features] of x's dtype; out: [rows, out_features] of x's dtype, contiguous
    """
    kept, index = units.kept, units.index
    steps = 0 if kept is None else kept.shape[1]
    shape = Shape(units.in_features, units.out_features, units.group, steps, x.dtype == torch.bfloat16)
    device = x.device.index
    launcher = _launcher(device, shape, x.shape[0], jit.programmatic())
    with launcher.lock:
        _CHANGING.pack_into(
            launcher.params,
            0,
            units.codes.data_ptr(),
            units.affine.data_ptr(),
            0 if kept is None else kept.data_ptr(),
            0 if index is None else index.data_ptr(),
            x.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.stride(0),
        )
        launcher(torch._C._cuda_getCurrentRawStream(device))


def max_rows(shape: Shape, device: int) -> int:
    """How many rows one launch takes: they must lie in shared memory beside the ring. 0: not even one."""
    arch, sms, available = gpu(device)
    ring = has_ring(arch)
    fits = (rows for rows in range(MAX_ROWS, 0, -1) if plan(shape, rows, sms, available, ring) is not None)
    return next(fits, 0)


def plan(shape: Shape, rows: int, sms: int, available: int, ring: bool, chained: bool = False) -> Plan | None:
    """The plan for `rows` rows on `sms` multiprocessors with `available` bytes of shared memory each; None: no room.

    chained: between other kernels of a decode step, which overlap with it
    """
    if not ring:
        slots = max(_SLOTS, _between(shape, 8))
        shared = _shared(shape, rows, 8, 0, slots, 0)
        return Plan(Way(8, 0, shape.kept_steps > 0), 0, 0, slots, shared) if shared <= available else None
    tiles, one = _busiest(shape, sms), rows == 1
    few = tiles * shape.units <= _FEW_UNITS and not (one and shape.units > 16)  # 2048 x 8192: 4.0 us instead of 5.2
    if few and (one or not chained):  # chained, 4096 x 4096 of 2 to 8 rows took 0.8 us more than in the other way
        stages, in_flight = (range(5, 3, -1), 3) if one else (range(5, 1, -1), 2)
        if chosen := _fit(shape, rows, sms, 8, stages, in_flight, available // 2 - _RESERVED):
            return chosen
    chosen = None if one else _fit(shape, rows, sms, 16, range(4, 1, -1), 2, min(available, _KIND_TO_L1))
    if one and shape.units <= 16 and tiles > 8:  # 22016 x 4096: 11.2 us instead of 11.3
        chosen = _fit(shape, rows, sms, 16, range(6, 5, -1), 3, available)
    chosen = chosen or _fit(shape, rows, sms, 16, range(5 if shape.units <= 32 else 4, 1, -1), 2, available)
    # More than half, so that one block runs on each multiprocessor.
    return chosen and chosen._replace(shared=max(chosen.shared, available // 2 + _RESERVED))


def _fit(shape: Shape, rows: int, sms: int, warps: int, stages: range, in_flight: int, most: int) -> Plan | None:
    """The first of `stages` that leaves room for x."""
    fewer = 1 if shape.units > 64 else 2  # tiles of many units are seldom finished
    least = _between(shape, warps)
    for each, slots in itertools.product(stages, (max(_SLOTS, least), max(fewer, least))):
        shared = _shared(shape, rows, warps, each, slots, _kept_ahead(shape, sms))
        if shared <= most:
            way = Way(warps, _keep(shape, rows, warps), shape.kept_steps > 0)
            return Plan(way, each, min(in_flight, each), slots, shared)
    return None


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`."""
    for group in GROUPS:
        yield SOURCES / "repack.cu", "repack", arch, {"GROUP": group}
        for bf16 in (0, 1) if arch != "sm_75" else (0,):
            for rows in (1, MAX_ROWS):
                for way in ways(group, rows, arch):
                    yield SOURCE, "gemv", arch, _defines(group, bool(bf16), rows, way, arch)


def requests(shape: Shape, arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """What repacking a weight and its launches may ask for."""
    yield SOURCES / "repack.cu", "repack", arch, {"GROUP": shape.group}
    for rows in (1, MAX_ROWS):
        for warps in _warps(arch):
            way = Way(warps, _keep(shape, rows, warps) if has_ring(arch) else 0, shape.kept_steps > 0)
            yield SOURCE, "gemv", arch, _defines(shape.group, shape.bf16, rows, way, arch)


def ways(group: int, rows: int, arch: str) -> Iterator[Way]:
    """Every one that a plan may have."""
    for warps, keep, kept in itertools.product(_warps(arch), range(3), (False, True)):
        if keep <= (_most_kept_units(group, rows) if has_ring(arch) else 0):
            yield Way(warps, keep, kept)


def _warps(arch: str) -> tuple[int, ...]:
    return (8, 16) if has_ring(arch) else (8,)


def _defines(group: int, bf16: bool, rows: int, way: Way, arch: str) -> dict[str, int]:
    each = {"GROUP": group, "AWQ_BF16": int(bf16), "ROWS": 1 if rows == 1 else 8, "AWQ_RING": int(has_ring(arch))}
    return each | {"WARPS": way.warps, "KEEP": way.keep, "KEPT": int(way.kept)}


def _keep(shape: Shape, rows: int, warps: int) -> int:
    units, rest = divmod(shape.units, warps)
    return units if rest == 0 and units <= _most_kept_units(shape.group, rows) else 0


def _most_kept_units(group: int, rows: int) -> int:
    """Whose x has room in a warp's registers."""
    return {128: 2 if rows == 1 else 1, 64: 2 if rows == 1 else 0}.get(group, 0)


@lru_cache(4096)
def _launcher(device: int, shape: Shape, rows: int, programmatic: bool) -> Any:
    """The launch of `rows` rows, with every parameter that does not change already in place."""
    arch, sms, available = gpu(device)
    ring = has_ring(arch)
    chosen = plan(shape, rows, sms, available, ring)
    if chosen is None:
        raise ValueError(f"{rows} rows of {shape.in_features} channels do not fit into shared memory: see max_rows")
    kernel = jit.kernel(SOURCE, "gemv", arch, _defines(shape.group, shape.bf16, rows, chosen.way, arch))
    grid = min(sms, shape.tiles)
    launcher = kernel.launcher(grid, chosen.threads, chosen.shared, _PARAMS.size, pdl=ring and programmatic)
    in_features = -(-shape.in_features // 8) * 8
    sizes = (rows, shape.out_features, in_features, *divmod(shape.tiles, grid), shape.units, shape.kept_steps)
    ahead = _kept_ahead(shape, sms) if ring else 0
    _SIZES.pack_into(launcher.params, _CHANGING.size, *sizes, chosen.stages, chosen.in_flight, chosen.slots, ahead)
    return launcher


def _between(shape: Shape, warps: int) -> int:
    """Tiles from one to which a warp adds to its next, as a power of two: a slot that came round twice in that time
    would seem to it as it was."""
    tiles: int = -(-warps // shape.units)
    return 1 << (tiles - 1).bit_length()


def _busiest(shape: Shape, sms: int) -> int:
    """Tiles of the block that has most."""
    return -(-shape.tiles // min(sms, shape.tiles))


def _shared(shape: Shape, rows: int, warps: int, stages: int, slots: int, ahead: int) -> int:
    """Bytes of shared memory: `layout_of` of gemv.cu."""
    one = rows == 1
    ring = stages * warps * (UNIT_BYTES + 40 * UNIT_K // shape.group)
    sums = slots * (warps + (shape.kept_steps > 0)) * 32 * (8 if one else 16)
    x = 3 * (shape.units * UNIT_K + 64) if one else rows * (shape.units * UNIT_K * 2 + 16)
    table = shape.units * (UNIT_K // shape.group) * 8 if one else 0
    kept = (1 if one else MAX_ROWS) * (shape.kept_steps * 16 + 8) * 2
    return ring + sums + x + 16 + table + kept + 15 + ahead * shape.kept_steps * 512 + _BARRIERS


def _kept_ahead(shape: Shape, sms: int) -> int:
    """Tiles whose kept channels wait in shared memory, 16 KB at most: 512 bytes a step. With 2 of a block's 11 tiles,
    22016 x 4096 took 13.5 us; with 8, 11.5."""
    steps, tiles = shape.kept_steps, _busiest(shape, sms)
    fits = (ahead for ahead in _KEPT_AHEAD if steps and ahead * steps * 512 <= 2**14 and ahead < 2 * tiles)
    return next(fits, 0)


def has_ring(arch: str) -> bool:
    """Bulk copies, and the shared memory for a ring: sm_90 and sm_100; sm_120 has the copies but 99 KB."""
    return arch.startswith(("sm_90", "sm_10"))
