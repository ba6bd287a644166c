"""What a cache takes, and what would fit where it does not."""

from __future__ import annotations

import torch

from awq.engine.query import Query
from awq.errors import OutOfMemoryError


def check_memory(batch: int, slots: int, slot_bytes: int, device: torch.device) -> None:
    """OutOfMemoryError where a cache of `batch` x `slots` tokens does not fit into what is free on the GPU."""
    if device.type != "cuda":
        return
    free = free_bytes(device)
    needed = batch * slots * slot_bytes
    if needed > free:
        raise OutOfMemoryError(_sentence(batch, slots, slot_bytes, free))


def free_bytes(device: torch.device) -> int:
    """What torch may still allocate on a GPU: the driver's free memory and what torch holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def out_of_memory(query: Query, slot_bytes: int) -> OutOfMemoryError:
    """The error for a query that ran out of memory on the way."""
    device = query.tokens.device
    free = free_bytes(device) if device.type == "cuda" else 0
    return OutOfMemoryError(_sentence(query.tokens.shape[0], query.slots, slot_bytes, free))


def _sentence(batch: int, slots: int, slot_bytes: int, free: int) -> str:
    fitting = free // max(1, slot_bytes)
    return (
        f"the cache of {batch} x {slots} tokens takes {batch * slots * slot_bytes / 1e9:.2f} GB "
        f"({slot_bytes / 1e3:.0f} kB a token) and {free / 1e9:.2f} GB are free, besides what the forward needs: "
        f"about {fitting // max(1, batch)} tokens a sequence fit, or {fitting // max(1, slots)} sequences; "
        "lower max_new_tokens, the prompt or the batch."
    )
