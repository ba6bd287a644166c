"""The kernels of a fused decode step of one token, each as a `Launch` made once.

The order of a step is embed, then layer by layer project, attention, accumulate, gated, accumulate, and at last head.
Each is launched to start before the one ahead of it has ended: see `Launch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from awq.kernels.cuda.step import attention, ends, gemv, sample
from awq.kernels.cuda.step.launch import OLDEST


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`, of attention for the usual head sizes."""
    number = int(arch.removeprefix("sm_").rstrip("af"))
    if divmod(number, 10) >= OLDEST:
        for part in (gemv, attention, ends, sample):
            yield from part.variants(arch)
