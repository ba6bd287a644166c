"""Time one call many times: CUDA events over a cold L2 cache on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, tenth and ninetieth percentile, over `repeats` calls."""

    median: float
    p10: float
    p90: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        return cls(statistics.median(seconds), percentile(seconds, 10), percentile(seconds, 90), len(seconds))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the sorted `values` lie, interpolated linearly."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def measure(
    call: Callable[[], object], device: torch.device, *, seconds: float = 0.2, repeats: tuple[int, int] = (5, 200)
) -> Timing:
    """Time `call` for about `seconds`, at least and at most so often; a few calls before warm it up.

    On a CPU the caches stay as the call left them: a linear that fits is measured warm.
    """
    synchronize(device)
    start = time.perf_counter()
    for _ in range(2):
        call()
    synchronize(device)
    estimate = max((time.perf_counter() - start) / 2, 1e-6)
    count = max(repeats[0], min(repeats[1], round(seconds / estimate)))
    return Timing.of(_cuda_seconds(call, device, count) if device.type == "cuda" else _wall_seconds(call, count))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wall_seconds(call: Callable[[], object], count: int) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(count):
        call()
        marks.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(marks)]


def _cuda_seconds(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """The flush before each call empties the L2 cache, as the other layers of a model do between two calls.

    It also keeps the GPU busy while the CPU enqueues, so that the events see the kernel and not its launch.
    """
    with torch.cuda.device(device):
        flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in marks:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in marks]
