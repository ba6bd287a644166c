"""What an effort asks of a device: the kernels of its inner loops, and time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor, nn

from awq.algorithm.learn import cpu_minutes
from awq.algorithm.search.affine import ranges
from awq.algorithm.search.loops import PLAIN_LOOPS, Loops
from awq.algorithm.search.rounding import ColumnLoop
from awq.config import QuantConfig
from awq.errors import AwqError
from awq.kernels.cuda import columns, search
from awq.kernels.cuda.layout import GROUPS
from awq.structure.linears import linear_shape

SLOW_MINUTES = 10  # from here on, learning on a CPU is worth a warning
COLUMNS = ColumnLoop(columns.round_columns, columns.COLUMNS)
KERNELS = Loops(
    COLUMNS, search.best_shrinks, search.rounded_delta, search.grid_delta, search.row_dots, search.group_dots
)


def inner_loops(device: torch.device, config: QuantConfig) -> Loops:
    """The inner loops of the search: kernels where `device` has them, and where they know the size of the groups."""
    if columns.obstacle(device):
        return PLAIN_LOOPS
    loops = KERNELS if config.group_size in GROUPS and _searches(device, config.group_size) else PLAIN_LOOPS
    compensated = config.effort != "fast" and _rounds(device)
    return loops._replace(columns=COLUMNS if compensated else PLAIN_LOOPS.columns)


@cache
def _rounds(device: torch.device) -> bool:
    """Whether the kernel rounds a small block as torch does: codes that are wrong would go unnoticed for hours."""
    weight, scales, factor = _random(device, (40, 100), (40, 100), (40, 40))
    factor = factor.triu() / 40 + torch.eye(40, device=device)
    block = (weight - 0.5, factor, scales / 8 + 0.05, torch.full_like(scales, 8.0), 15)

    def agrees() -> bool:
        codes, wanted = (loop.round(*block)[0] for loop in (COLUMNS, PLAIN_LOOPS.columns))
        return bool((codes != wanted).float().mean() < 1e-2)

    return _trusted("Rounding runs in torch, column by column", agrees, device)


@cache
def _searches(device: torch.device, group_size: int) -> bool:
    """The same of the search for scales and ranges."""
    weight, x, scale = _random(device, (100, 2 * group_size), (512, 2 * group_size), (2 * group_size,))
    weight, scale, gram = weight.square() - 0.3, scale + 0.5, x.t() @ x
    scaling = weight, scale, group_size, 4, True
    shrinking = weight, *ranges(weight, group_size), gram, (1.0, 0.9, 0.8), 4, True
    grouped = weight.view(100, 2, group_size)

    def normal(loops: Loops) -> Tensor:
        found = weight.new_zeros(100, 2, 2)
        loops.group_dots(torch.stack([grouped, grouped + 1]), grouped, found, 0)
        return found

    def agrees() -> bool:
        delta, wanted_delta = (loops.rounded_delta(*scaling, False) for loops in (KERNELS, PLAIN_LOOPS))
        shrinks, wanted = (loops.best_shrinks(*shrinking) for loops in (KERNELS, PLAIN_LOOPS))
        dots, wanted_dots = (loops.row_dots(weight.clone(), wanted_delta) for loops in (KERNELS, PLAIN_LOOPS))
        same = torch.isclose(delta, wanted_delta, atol=1e-6).float().mean(), (shrinks == wanted).float().mean()
        sums = (dots, wanted_dots), (normal(KERNELS), normal(PLAIN_LOOPS))
        return bool(min(same) > 0.98) and all(torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in sums)

    return _trusted("The search for scales and ranges runs in torch", agrees, device)


def _random(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=random).to(device) for shape in shapes]


def _trusted(otherwise: str, agrees: Callable[[], bool], device: torch.device) -> bool:
    """Whether a kernel runs and agrees with torch; a warning says what happens otherwise."""
    try:
        if agrees():
            return True
        reason = f"its kernel is wrong on {device}."
    except AwqError as error:
        reason = str(error)
    warnings.warn(f"{otherwise}: {reason}", stacklevel=4)
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
