"""A copy of a model that computes the same and whose weights lie on no 4-bit grid.

A model that was published in 4 bits and dequantized lies on the grid of its own groups, which plain rounding finds
again, or nearly. Here random factors are moved from every norm and linear into what reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awq.algorithm.inputs.capture import enter_model, lifted
from awq.structure.blocks import find_blocks
from awq.structure.groups import find_structure, fold

# Factors from 2**-0.5 to 2**0.5: far off the grid, and no channel becomes salient by it.
LARGEST_EXPONENT = 0.5


@torch.no_grad()
def rescale(model: Any, tokens: Tensor, seed: int = 0) -> int:
    """Rescale a float32 model in place; returns how many groups of linears took part.

    tokens: int64 [1, n], a few, to find the structure with
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    _, blocks = find_blocks(model)
    probe = enter_model(model, blocks, tokens, device)[0]
    found = 0
    for index, block in enumerate(blocks):
        with lifted(block, device):
            found += _rescale_block(block, partial(probe.run, index, block, probe.hidden), generator)
            probe.hidden = probe.run(index, block, probe.hidden)
    return found


def _rescale_block(block: nn.Module, run: Callable[[], Tensor], generator: torch.Generator) -> int:
    groups = find_structure(block, run).groups
    for group in groups:
        weight: Any = block.get_submodule(group.producer).weight
        channels = group.rows(weight.data).shape[:2].numel()
        exponent = torch.rand(channels, generator=generator).mul(2).sub(1) * LARGEST_EXPONENT
        fold(block, group, exponent.exp2().to(weight.device))
    return len(groups)
