"""Where the GEMM kernels hand over parts of split tiles: sums and flags in GPU memory, one place a stream.

A kernel returns its flags to 0, so a place is cleared only once. Kernels of one stream follow one another; two streams
must not share a place, and neither must a CUDA graph with anything outside of it, since it may be replayed in any
stream. A captured call therefore gets a place of its own, cleared at every replay: memory of the graph's pool, which
goes back to it with the call. The order of the graph keeps its next user off it until then, and so it dies with it.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

FLAG_BYTES = 64 * 1024
_KEPT = 64  # places, the oldest dropped: their memory goes back to its stream


class Place(NamedTuple):
    """Hold it until the kernel is enqueued: its memory then goes back in the order of the stream.

    size: bytes of partial sums; partial, flags: addresses
    """

    memory: Tensor | None
    size: int
    partial: int
    flags: int


NOWHERE = Place(None, 0, 0, 0)
_places: dict[tuple[int, int], Place] = {}
_lock = threading.Lock()


def workspace(device: int, stream: int, size: int) -> Place:
    """`size` bytes of partial sums and their flags, for the current stream."""
    if torch._C._cuda_isCurrentStreamCapturing():
        return _cleared(device, size)
    place = _places.get((device, stream))
    return place if place is not None and place.size >= size else _grown(device, stream, size)


def _grown(device: int, stream: int, size: int) -> Place:
    with _lock:
        place = _places.pop((device, stream), NOWHERE)
        if place.size < size:  # else another thread was faster
            place = _apart(device, stream, size)
        _places[device, stream] = place
        while len(_places) > _KEPT:
            del _places[next(iter(_places))]
        return place


def _apart(device: int, stream: int, size: int) -> Place:
    """Allocated by a thread of its own, since torch may be filling a pool of graphs from this one.

    torch.compile(mode="reduce-overhead") does when it warms up, and takes what outlives the call for a leak.
    """

    def allocate() -> Place:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=_device(device))):
            return _cleared(device, size)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()


def _cleared(device: int, size: int) -> Place:
    memory = torch.empty(FLAG_BYTES + size, dtype=torch.uint8, device=_device(device))
    memory[:FLAG_BYTES].zero_()
    flags = memory.data_ptr()
    return Place(memory, size, flags + FLAG_BYTES, flags)


def _device(index: int) -> torch.device:
    return torch.device("cuda", index)
