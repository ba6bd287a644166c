"""What an effort asks of a device: the kernel of its column loop, and time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from awq.algorithm.learn import cpu_minutes
from awq.algorithm.rounding import PLAIN_LOOP, ColumnLoop
from awq.config import QuantConfig
from awq.kernels.cuda import columns
from awq.linears import linear_shape

SLOW_MINUTES = 10  # from here on, learning on a CPU is worth a warning


def column_loop(device: torch.device) -> ColumnLoop:
    """The column loop of compensated rounding: a kernel where `device` has one."""
    if columns.obstacle(device):
        return PLAIN_LOOP
    return ColumnLoop(columns.round_columns, columns.COLUMNS)


def warn_if_slow(model: nn.Module, linears: Iterable[str], config: QuantConfig, device: torch.device) -> None:
    """Say before it starts how long learning will take on a CPU, where it is allowed."""
    weights = sum(math.prod(linear_shape(model.get_submodule(name)) or (0,)) for name in linears)
    minutes = cpu_minutes(weights)
    if config.effort == "max" and device.type != "cuda" and minutes > SLOW_MINUTES:
        warnings.warn(
            f'effort="max" learns by gradient, about {minutes:.0f} minutes without a GPU: effort="balanced" is faster.',
            stacklevel=3,
        )
