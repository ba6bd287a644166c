"""Time one call many times: L2-cold on a GPU, by events or in CUDA graphs; by the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from awq.kernels.cuda.crossover import Flush


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, tenth and ninetieth percentile, over `repeats` samples."""

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
    return Timing.of(_cuda_seconds(call, device, count) if device.type == "cuda" else wall_seconds(call, count))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls by the wall clock, without waiting for a GPU."""
    marks = [time.perf_counter()]
    for _ in range(count):
        call()
        marks.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(marks)]


@dataclass(frozen=True)
class Replay:
    """`calls` calls that `run` does at once: a CUDA graph, or a loop on a CPU."""

    run: Callable[[], object]
    calls: int


def record(step: Callable[[int], object], calls: int, device: torch.device) -> Replay:
    """`step(0)` to `step(calls - 1)` as one CUDA graph; each must have been called before, outside of it."""
    if device.type != "cuda":
        return Replay(lambda: [step(i) for i in range(calls)], calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for i in range(calls):
            step(i)
    return Replay(graph.replay, calls)


def time_in_turn(
    replays: Mapping[str, Replay], device: torch.device, *, blocks: int = 3, samples: int = 4, pause: float = 0.01
) -> dict[str, Timing]:
    """Seconds a call of each: `blocks` times all in turn, so that heat and power fall on all alike.

    A block is a pause, one replay to warm up, and `samples` timed ones; the next block starts with another replay.
    """
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    names = list(replays)
    for block in range(blocks):
        shift = block % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            time.sleep(pause)
            replay = replays[name]
            replay.run()
            timed = replay_seconds(replay, device, samples)
            seconds[name] += [each / replay.calls for each in timed]
    return {name: Timing.of(each) for name, each in seconds.items()}


def replay_seconds(replay: Replay, device: torch.device, count: int) -> list[float]:
    """Enqueued without waiting in between: the GPU never idles while the CPU launches the next."""
    if device.type != "cuda":
        return wall_seconds(replay.run, count)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    with torch.cuda.device(device):
        marks[0].record()
        for mark in marks[1:]:
            replay.run()
            mark.record()
        torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def _cuda_seconds(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """The flush before each call empties the L2 cache, as the other layers of a model do between two calls.

    It also keeps the GPU busy while the CPU enqueues, so that the events see the kernel and not its launch.
    """
    with torch.cuda.device(device):
        flush = Flush(device)
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in marks:
            flush()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in marks]
