"""The read ceiling: GB/s at which this GPU reads a large buffer and does nothing else."""

from __future__ import annotations

import statistics
import struct
from pathlib import Path

import torch

from awq import jit
from awq.bench.timing import Replay, replay_seconds

SOURCE = Path(__file__).parent / "src" / "read.cu"
_PIECE, _WARPS = 4096, 8  # bytes of a copy; warps of a block, each with a ring of copies
_RING = 5  # copies in flight a warp: 160 KB a block in all
_BLOCKS_OF_LOADS = 8  # a multiprocessor, where there are no bulk copies
_BYTES = 4 << 30  # far more than any L2 cache
_PARAMS = struct.Struct("<3Q")
_WARM_UP, _SAMPLES = 3, 15


def read_ceiling(device: torch.device) -> float:
    """GB/s (1e9 bytes a second), the median of several reads of random data, 4 GiB or what memory allows."""
    facts = torch.cuda.get_device_properties(device)
    size = min(_BYTES, torch.cuda.mem_get_info(device)[0] // 2) // _PIECE * _PIECE
    with torch.cuda.device(device):
        data = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
        sink = torch.zeros(1, dtype=torch.int32, device=device)
        kernel = jit.kernel(SOURCE, "read", jit.arch_of((facts.major, facts.minor)), defines(facts))
        shared = kernel.global_int("smem_bytes")
        blocks = facts.multi_processor_count * (1 if shared else _BLOCKS_OF_LOADS)
        launch = kernel.launcher(blocks, 32 * _WARPS, shared, _PARAMS.size)
        _PARAMS.pack_into(launch.params, 0, data.data_ptr(), size // _PIECE, sink.data_ptr())
        stream = torch.cuda.current_stream(device).cuda_stream
        seconds = replay_seconds(Replay(lambda: launch(stream), 1), device, _WARM_UP + _SAMPLES)
    return size / statistics.median(seconds[_WARM_UP:]) / 1e9


def defines(facts: object) -> dict[str, int]:
    """What to compile the kernel with: the ring that fits into a block's shared memory."""
    largest = int(getattr(facts, "shared_memory_per_block_optin", 0)) - 1024  # barriers, and what the driver keeps
    return {"RING": max(1, min(_RING, largest // (_WARPS * _PIECE)))}
