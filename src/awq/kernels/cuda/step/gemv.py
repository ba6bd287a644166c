"""The GEMV with a norm before it and the residual stream or a gate behind it: src/gemv.cu, NORM and OUTPUT.

What is called the stream is the residual stream in float32, [rows, width], of 1 to 8 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from awq.kernels.cuda import gemv
from awq.kernels.cuda.gemv import MAX_ROWS, SOURCE, Way
from awq.kernels.cuda.layout import GROUPS, TILE_ROWS, UNIT_K, Shape, Units, gpu
from awq.kernels.cuda.step.launch import Launch

# What becomes of the gate, and its ACTIVATION.
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

# struct Params of gemv.cu with what NORM and OUTPUT add: norm, kept_norm; share, epsilon, factor; half, apart.
_PARAMS = Struct("<7Qq11i4x2Q3f2i4x")
# In a step the kernels ahead and behind want the memory too, and a ring fills while x is awaited: a block of up to so
# many units has one stage in flight, a larger one two. With the other choice a token of Llama-2-7B (1.09 ms) took 15 us
# more for the down projection (86 units), 16 for queries, keys and values (96); three stages for gate and up (176) 30.
_ONE_IN_FLIGHT = 90


def project(stream: Tensor, norm: Tensor, epsilon: float, units: Units, bias: Tensor | None, out: Tensor) -> Launch:
    """out = RMSNorm(stream) W^T + bias.

    norm: float32 [in_features], what the normed stream is multiplied by
    out: [rows, out_features] float16 or bfloat16, contiguous
    """
    return _launch(stream, units, bias, out, norm=norm, epsilon=epsilon)


def accumulate(x: Tensor, units: Units, bias: Tensor | None, stream: Tensor, factor: float) -> Callable[[int], None]:
    """stream += factor * (x W^T + bias). x: [rows, in_features] float16 or bfloat16

    Where the rows have no room in shared memory, a part of their channels after the other.
    """
    whole = _shape(units, x.dtype is torch.bfloat16)
    step = units_at_once(units, x.get_device(), len(x)) or whole.units
    parts = [
        _launch(x, units, bias, stream, factor=factor, first=first, count=step) for first in range(0, whole.units, step)
    ]

    def in_turn(stream: int) -> None:
        for part in parts:
            part(stream)

    return parts[0] if len(parts) == 1 else in_turn


def gated(
    stream: Tensor, norm: Tensor, epsilon: float, units: Units, bias: Tensor | None, out: Tensor, activation: str
) -> Launch:
    """out = act(gate) * up, with gate and up the halves of RMSNorm(stream) W^T + bias, in this order.

    out: [rows, out_features / 2], contiguous, where 16 divides out_features / 2; activation: one of ACTIVATIONS
    """
    if units.out_features % (2 * TILE_ROWS):
        raise ValueError(f"{units.out_features} rows are no two halves of whole tiles of {TILE_ROWS}")
    return _launch(stream, units, bias, out, norm=norm, epsilon=epsilon, activation=activation)


def fits(units: Units, device: int, rows: int = 1) -> bool:
    """Whether so many rows have room in the shared memory of a block."""
    return _plan(_shape(units, bf16=False), device, rows) is not None


def units_at_once(units: Units, device: int, rows: int) -> int:
    """How many units of a tile one launch of `accumulate` takes, for the fewest launches; 0: no number fits."""
    whole = _shape(units, bf16=False)
    steps = (-(-whole.units // parts) for parts in range(1, 1 + (whole.units if rows > 1 else 1)))
    return next((step for step in steps if _plan(_part(whole, 0, step), device, rows) is not None), 0)


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`."""
    for group in GROUPS:
        for bf16 in (False, True):
            for rows in (1, MAX_ROWS):
                for way in gemv.ways(group, rows, arch):
                    for mode in ((1, 0, 0), (0, 1, 0), *((1, 2, kind) for kind in ACTIVATIONS.values())):
                        yield SOURCE, "gemv", arch, _defines(group, bf16, rows, way, arch, *mode)


def _defines(
    group: int, bf16: bool, rows: int, way: Way, arch: str, norm: int, output: int, activation: int
) -> dict[str, int]:
    fused = {"NORM": norm, "OUTPUT": output, "ACTIVATION": activation}
    return gemv._defines(group, bf16, rows, way, arch) | fused


def _launch(
    x: Tensor,
    units: Units,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    factor: float | None = None,
    activation: str | None = None,
    first: int = 0,
    count: int | None = None,
) -> Launch:
    """first, count: the units of each tile that it takes, None for all from the first on."""
    bf16 = torch.bfloat16 in (x.dtype, out.dtype)
    device, rows, whole = x.get_device(), len(x), _shape(units, bf16)
    shape = _part(whole, first, count or whole.units)
    plan = _plan(shape, device, rows)
    if plan is None:
        raise ValueError(f"{rows} rows of {shape.in_features} channels do not fit into shared memory")
    arch, sms, _ = gpu(device)
    pairs = activation is not None
    tiles = shape.tiles // 2 if pairs else shape.tiles
    grid, output = min(sms, tiles), 2 if pairs else 0 if factor is None else 1
    mode = (int(norm is not None), output, ACTIVATIONS[activation] if activation is not None else 0)
    launch = Launch(
        SOURCE,
        "gemv",
        _defines(units.group, bf16, rows, plan.way, arch, *mode),
        grid,
        plan.threads,
        plan.shared,
        _PARAMS,
        device,
    )
    ahead = gemv._kept_ahead(shape, sms) if plan.stages else 0
    sizes = (rows, units.out_features, shape.in_features, *divmod(tiles, grid), shape.units, shape.kept_steps)
    kept = (None, None, x[:, first * UNIT_K :], None) if first else (units.kept, units.index, x, bias)
    numbers = (*sizes, plan.stages, plan.in_flight, plan.slots, ahead)
    return launch.bind(
        units.codes[:, first:],
        units.affine[:, first:],
        *kept,
        out,
        x.stride(0),
        *numbers,
        norm,
        norm[units.index.clamp(min=0)] if norm is not None and units.index is not None else None,
        1 / units.in_features,
        epsilon,
        factor,
        tiles,
        whole.units,
    )


def _shape(units: Units, bf16: bool) -> Shape:
    steps = 0 if units.kept is None else units.kept.shape[1]
    return Shape(units.in_features, units.out_features, units.group, steps, bf16)


def _part(whole: Shape, first: int, count: int) -> Shape:
    """`count` units of each tile; the kept channels go with the first."""
    width = min(whole.in_features - first * UNIT_K, count * UNIT_K)
    return whole._replace(in_features=width, kept_steps=0 if first else whole.kept_steps)


def _plan(shape: Shape, device: int, rows: int) -> gemv.Plan | None:
    arch, sms, available = gpu(device)
    squares = 4 * 32 * 16  # bytes: of each thread that multiplies, or of each warp for every row
    plan = gemv.plan(shape, rows, sms, available - squares, gemv.has_ring(arch), chained=True)
    most = 1 if gemv._busiest(shape, sms) * shape.units <= _ONE_IN_FLIGHT else 2
    return plan and plan._replace(shared=plan.shared + squares, in_flight=min(plan.in_flight, most))
