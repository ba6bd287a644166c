"""What an effort asks of a device: the kernel of its column loop, and time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

from awq.algorithm.learn import cpu_minutes
from awq.algorithm.search.rounding import PLAIN_LOOP, ColumnLoop
from awq.config import QuantConfig
from awq.errors import AwqError
from awq.kernels.cuda import columns
from awq.structure.linears import linear_shape

SLOW_MINUTES = 10  # from here on, learning on a CPU is worth a warning


def column_loop(device: torch.device) -> ColumnLoop:
    """The column loop of compensated rounding: a kernel where `device` has one."""
    if columns.obstacle(device) or not _agrees(device):
        return PLAIN_LOOP
    return ColumnLoop(columns.round_columns, columns.COLUMNS)


@cache
def _agrees(device: torch.device) -> bool:
    """Whether the kernel rounds a small block as torch does: codes that are wrong would go unnoticed for hours."""
    random = torch.Generator().manual_seed(0)
    weight, scales, factor = (torch.rand(shape, generator=random) for shape in ((40, 100), (40, 100), (40, 40)))
    block = (weight - 0.5, scales / 8 + 0.05, factor.triu() / 40 + torch.eye(40), torch.full((40, 100), 8.0))
    values, steps, factor, zeros = (part.to(device) for part in block)
    try:
        codes, _ = columns.round_columns(values, factor, steps, zeros, 15)
    except AwqError as error:
        warnings.warn(f"Rounding runs in torch, column by column: {error}", stacklevel=2)
        return False
    wanted, _ = PLAIN_LOOP.round(values, factor, steps, zeros, 15)
    if bool((codes != wanted).float().mean() < 1e-2):
        return True
    warnings.warn(f"Rounding runs in torch, column by column: its kernel is wrong on {device}.", stacklevel=2)
    return False


def warn_if_slow(model: nn.Module, linears: Iterable[str], config: QuantConfig, device: torch.device) -> None:
    """Say before it starts how long learning will take on a CPU, where it is allowed."""
    weights = sum(math.prod(linear_shape(model.get_submodule(name)) or (0,)) for name in linears)
    minutes = cpu_minutes(weights)
    if config.effort == "max" and device.type != "cuda" and minutes > SLOW_MINUTES:
        warnings.warn(
            f'effort="max" learns by gradient, about {minutes:.0f} minutes without a GPU: effort="balanced" is faster.',
            stacklevel=3,
        )
