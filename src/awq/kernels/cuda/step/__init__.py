"""The kernels of a fused decode step of few rows, each as a `Launch` made once, and what many rows need beside GEMM.

The order of a step is embed, then layer by layer project, attention, accumulate, gated, accumulate, at last head, and
sample, which chooses the token and counts. Each is launched to start before the one ahead of it has ended: see
`Launch`. That of many rows is in `wide`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from awq.kernels.cuda.step import attention, ends, gemv, sample, wide
from awq.kernels.cuda.step.launch import OLDEST


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`, of attention for the usual head sizes."""
    number = int(arch.removeprefix("sm_").rstrip("af"))
    if divmod(number, 10) >= OLDEST:
        for part in (gemv, attention, ends, sample, wide):
            yield from part.variants(arch)
