"""Where the GEMM kernels hand over parts of split tiles: sums and flags in GPU memory, one place a stream.

A kernel returns its flags to 0, so a place is cleared only once. Kernels of one stream follow one another; two streams
must not share a place, and neither must a CUDA graph with anything outside of it, since it may be replayed in any
stream. A captured call therefore takes its sums from the graph's pool, to which they go back with the call: the order
of the graph keeps their next user off them until then. Its flags are those of its capture, in memory that stays and
was cleared before: clearing them in the graph would part the kernel from the one ahead, which it may overlap with.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from awq import jit

FLAG_BYTES = 64 * 1024
_CAPTURES = 64  # graphs that may be replayed side by side
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
_flags: dict[int, Tensor] = {}  # by device: those of _CAPTURES captures
_captures: dict[int, int] = {}  # by capture: which of them
_lock, _reserving = threading.Lock(), threading.Lock()


def workspace(device: int, stream: int, size: int) -> Place:
    """`size` bytes of partial sums and their flags, for the current stream."""
    if torch._C._cuda_isCurrentStreamCapturing():
        return _captured(device, stream, size)
    place = _places.get((device, stream))
    return place if place is not None and place.size >= size else _grown(device, stream, size)


def reserve(device: int) -> None:
    """Flags for captured calls, which cannot be cleared there. Once a device, outside of any capture; the first call of
    a stream does it too."""
    with _reserving:
        if device not in _flags:
            _flags[device] = torch.zeros(_CAPTURES * FLAG_BYTES, dtype=torch.uint8, device=_device(device))


def _captured(device: int, stream: int, size: int) -> Place:
    if device not in _flags:
        return _cleared(device, size)
    memory = torch.empty(size, dtype=torch.uint8, device=_device(device))
    with _lock:
        number = _captures.setdefault(jit.capture_id(stream), len(_captures))
    return Place(memory, size, memory.data_ptr(), _flags[device].data_ptr() + number % _CAPTURES * FLAG_BYTES)


def _grown(device: int, stream: int, size: int) -> Place:
    with _lock:
        place = _places.pop((device, stream), NOWHERE)
        if place.size < size:  # else another thread was faster
            place = _apart(device, size)
        _places[device, stream] = place
        while len(_places) > _KEPT:
            del _places[next(iter(_places))]
        return place


def _apart(device: int, size: int) -> Place:
    """Allocated by a thread of its own, since torch may be filling a pool of graphs from this one.

    torch.compile(mode="reduce-overhead") does when it warms up, and takes what outlives the call for a leak.
    """
    stream = torch.cuda.current_stream(device)

    def allocate() -> Place:
        with torch.cuda.stream(stream):
            reserve(device)
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
