"""Where the GEMM kernels hand over parts of split tiles: sums and flags in GPU memory, one place a stream.

A kernel returns its flags to 0, so the place is cleared only once. Kernels of one stream follow one another; two
streams must not share a place, and neither must a CUDA graph with anything outside of it, since it may be replayed in
any stream. What a capture asks for is part of its graph: memory of the graph's pool, cleared at every replay.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awq.jit.driver import driver

if TYPE_CHECKING:
    from awq.kernels.cuda.designs import Plan

_FLAG_BYTES = 64 * 1024
_KEPT = 64  # places, the least recently used dropped: their memory goes back to its stream

_places: OrderedDict[tuple[int, int, int], Tensor] = OrderedDict()


def workspace(device: int, stream: int, plan: Plan) -> tuple[int, int]:
    """Addresses of the partial sums and of the flags of a plan that splits tiles, for the current stream."""
    design = plan.design
    needed = _FLAG_BYTES + plan.blocks * design.block_rows * design.tokens * 4
    key = (device, stream, _capture(stream))
    place = _places.get(key)
    if place is None or place.numel() < needed:
        place = _places[key] = _cleared(device, needed)
        while len(_places) > _KEPT:
            _places.popitem(last=False)
    else:
        _places.move_to_end(key)
    flags = place.data_ptr()
    return flags + _FLAG_BYTES, flags


def _cleared(device: int, size: int) -> Tensor:
    place = torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))
    place[:_FLAG_BYTES].zero_()
    return place


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
