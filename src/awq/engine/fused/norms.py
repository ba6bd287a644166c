"""RMSNorm told from what a module makes of numbers, and when two results are the same."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from awq.engine.fused.plan import Norm

_SMALL = 1e-3  # a constant input that shows the epsilon


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Of one shape, and apart by less than `tolerance` of the norm; NaN is not."""
    if found.shape != wanted.shape:
        return False
    found, wanted = found.float(), wanted.float()
    return bool((found - wanted).norm() <= tolerance * wanted.norm().clamp_min(1e-30))


def as_rms_norm(module: nn.Module, width: int, device: torch.device) -> Norm | None:
    """The RMSNorm that `module` computes, from its answers to constants and random numbers; None where it is none."""
    module = copy.deepcopy(module).float()
    with torch.no_grad():
        ones = torch.ones(1, width, device=device)
        large, small = module(ones).double(), module(ones * _SMALL).double()
        ratio = float((large.norm() / small.norm()).square()) if bool(small.any()) else math.nan
        epsilon = max(0.0, _SMALL**2 * (ratio - 1) / (1 - _SMALL**2 * ratio))
        if not math.isfinite(epsilon):
            return None
        norm = Norm((large[0] * math.sqrt(1 + epsilon)).float(), epsilon)
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(device)
        x *= torch.tensor([[1.0], [30.0], [0.01]], device=device)
        return norm if close(module(x), norm(x), 1e-5) else None
