"""The GEMV with a norm before it and the residual stream or a gate behind it: src/gemv.cu, NORM and OUTPUT, one row.

What is called the stream is the residual stream in float32, [1, width].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from awq.kernels.cuda import gemv
from awq.kernels.cuda.gemv import SOURCE
from awq.kernels.cuda.layout import GROUPS, TILE_ROWS, Shape, Units, gpu
from awq.kernels.cuda.step.launch import Launch

# What becomes of the gate, and its ACTIVATION.
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

# struct Params of gemv.cu with what NORM and OUTPUT add: norm; share, epsilon, factor; half.
_PARAMS = Struct("<7Qq11i4xQ3fi")
_SQUARES = 64  # bytes of shared memory: the warps' sums of squares


def project(stream: Tensor, norm: Tensor, epsilon: float, units: Units, bias: Tensor | None, out: Tensor) -> Launch:
    """out = RMSNorm(stream) W^T + bias.

    norm: float32 [in_features], what the normed stream is multiplied by; out: [1, out_features] float16 or bfloat16
    """
    return _launch(stream, units, bias, out, norm=norm, epsilon=epsilon)


def accumulate(x: Tensor, units: Units, bias: Tensor | None, stream: Tensor, factor: float) -> Launch:
    """stream += factor * (x W^T + bias). x: [1, in_features] float16 or bfloat16"""
    return _launch(x, units, bias, stream, factor=factor)


def gated(
    stream: Tensor, norm: Tensor, epsilon: float, units: Units, bias: Tensor | None, out: Tensor, activation: str
) -> Launch:
    """out = act(gate) * up, with gate and up the halves of RMSNorm(stream) W^T + bias, in this order.

    out: [1, out_features / 2], where 16 divides out_features / 2; activation: one of ACTIVATIONS
    """
    if units.out_features % (2 * TILE_ROWS):
        raise ValueError(f"{units.out_features} rows are no two halves of whole tiles of {TILE_ROWS}")
    return _launch(stream, units, bias, out, norm=norm, epsilon=epsilon, activation=activation)


def fits(units: Units, device: int) -> bool:
    """Whether a row has room in the shared memory of a block."""
    return _plan(_shape(units, bf16=False), device) is not None


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`."""
    ring = gemv.has_ring(arch)
    for group in GROUPS:
        for bf16 in (False, True):
            for warps in (8, 16) if ring else (8,):
                for mode in ((1, 0, 0), (0, 1, 0), *((1, 2, kind) for kind in ACTIVATIONS.values())):
                    yield SOURCE, "gemv", arch, _defines(group, bf16, warps, arch, *mode)


def _defines(group: int, bf16: bool, warps: int, arch: str, norm: int, output: int, activation: int) -> dict[str, int]:
    fused = {"NORM": norm, "OUTPUT": output, "ACTIVATION": activation}
    return gemv._defines(group, bf16, 1, warps, arch) | fused


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
) -> Launch:
    bf16 = torch.bfloat16 in (x.dtype, out.dtype)
    device, shape = x.get_device(), _shape(units, bf16)
    plan = _plan(shape, device)
    if plan is None:
        raise ValueError(f"a row of {shape.in_features} channels does not fit into shared memory")
    arch, sms, _ = gpu(device)
    pairs = activation is not None
    tiles = shape.tiles // 2 if pairs else shape.tiles
    grid, output = min(sms, tiles), 2 if pairs else 0 if factor is None else 1
    mode = (int(norm is not None), output, ACTIVATIONS[activation] if activation is not None else 0)
    ring = gemv.has_ring(arch)
    launch = Launch(
        SOURCE,
        "gemv",
        _defines(units.group, bf16, plan.warps, arch, *mode),
        grid,
        32 * (plan.warps + (2 if ring else 1)),
        plan.shared,
        _PARAMS,
        device,
    )
    ahead = gemv._kept_ahead(shape, sms) if ring else 0
    sizes = (1, units.out_features, units.in_features, *divmod(tiles, grid), shape.units, shape.kept_steps)
    weights = (units.codes, units.affine, units.kept, units.index)
    numbers = (*sizes, plan.stages, plan.in_flight, plan.slots, ahead)
    return launch.bind(
        *weights, x, bias, out, x.stride(0), *numbers, norm, 1 / units.in_features, epsilon, factor, tiles
    )


def _shape(units: Units, bf16: bool) -> Shape:
    steps = 0 if units.kept is None else units.kept.shape[1]
    return Shape(units.in_features, units.out_features, units.group, steps, bf16)


def _plan(shape: Shape, device: int) -> gemv.Plan | None:
    arch, sms, available = gpu(device)
    plan = gemv.plan(shape, 1, sms, available - _SQUARES, gemv.has_ring(arch))
    return plan and plan._replace(shared=plan.shared + _SQUARES)
