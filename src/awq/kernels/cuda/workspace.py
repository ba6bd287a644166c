"""Where the GEMM kernels hand over parts of split tiles: sums and flags in GPU memory, one place a stream.

A kernel returns its flags to 0, so the place is cleared only once. Kernels of one stream follow one another; two
streams must not share a place, and neither must a CUDA graph with anything outside of it, since it may be replayed in
any stream. What a capture asks for is part of its graph: memory of the graph's pool, cleared at every replay.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from awq.jit.driver import driver

FLAG_BYTES = 64 * 1024
_KEPT = 64  # places, the oldest dropped: their memory goes back to its stream


class _Place(NamedTuple):
    memory: Tensor
    size: int
    partial: int
    flags: int


_places: dict[tuple[int, int, int], _Place] = {}


def workspace(device: int, stream: int, size: int) -> tuple[int, int]:
    """Addresses of `size` bytes of partial sums and of their flags, for the current stream."""
    key = (device, stream, _capture(stream))
    place = _places.get(key)
    if place is None or place.size < size:
        place = _places[key] = _cleared(device, size)
        while len(_places) > _KEPT:
            _places.pop(next(iter(_places)), None)
    return place.partial, place.flags


def _cleared(device: int, size: int) -> _Place:
    memory = torch.empty(FLAG_BYTES + size, dtype=torch.uint8, device=_device(device))
    memory[:FLAG_BYTES].zero_()
    flags = memory.data_ptr()
    return _Place(memory, size, flags + FLAG_BYTES, flags)


def _device(index: int) -> torch.device:
    return torch.device("cuda", index)


def _capture(stream: int) -> int:
    """The number of the capture that the current stream is part of, 0 for none."""
    if not torch._C._cuda_isCurrentStreamCapturing():
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    cuda = driver()
    code = cuda.library.cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    cuda.check("tell which capture a stream is part of", code)
    return number.value
