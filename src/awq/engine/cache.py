"""`KVCache`: keys and values of every layer in buffers that stay where they are, and who may see which slot of them.

It is a transformers `Cache`, in one of two states:

    plain      a forward appends any number of tokens and sees exactly what is there, as with a `DynamicCache`
    in steps   (`stepping(bucket)`) a forward adds one token at `slot`, a number on the device, and sees `bucket` slots
               behind a mask: every shape and address is the same for each token, as a CUDA graph needs it

Buffers are [rows, kv_heads, capacity, head_dim], allocated at the first token; a smaller batch uses the first rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from awq.engine.graph import Graphs

BUCKET = 256  # slots: the least capacity, and the least that a captured step looks at
# Tokens that a captured prefill takes. Longer prompts keep the device busy while Python launches.
PROMPTS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def bucket_of(slots: int) -> int:
    """The capacity for `slots`: 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, ..."""
    size = BUCKET
    while size < slots:
        size *= 2
    half_way = size // 4 * 3
    return half_way if size > 4 * BUCKET and half_way >= slots else size


def windows_of(config: PretrainedConfig) -> list[int | None] | str:
    """Per layer how many slots a token sees, itself included, None for all; or what state this cache does not hold.

    Found by asking transformers for the cache that it would use.
    """
    windows: list[int | None] = []
    for layer in DynamicCache(config=config.get_text_config(decoder=True)).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"a layer keeps a {type(layer).__name__}, not keys and values alone"
        windows.append(getattr(layer, "sliding_window", None))
    return windows


class Place:
    """What all layers of a cache share. bucket: slots that a step sees, None in the plain state."""

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.rows = self.batch = batch
        self.capacity = capacity
        self.bucket: int | None = None
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)


class KVLayer(CacheLayerMixin):
    """One layer. window: how many slots a token sees, itself included; None for all of them."""

    supports_early_init = False
    is_croppable = True

    def __init__(self, place: Place, window: int | None) -> None:  # not the mixin's: it assigns keys and values
        self.place, self.window, self.length = place, window, 0
        self.buffers: tuple[Tensor, ...] = ()  # keys and values, once there are any

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return bool(self.buffers)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return self.buffers[0][: self.place.batch, :, : self.length] if self.buffers else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self.buffers[1][: self.place.batch, :, : self.length] if self.buffers else None

    @property
    def is_sliding(self) -> bool:
        return self.window is not None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether transformers is to make a mask over all that `update` returns, filled or not."""
        return self.place.bucket is not None

    @property
    def batch_size(self) -> int:
        return self.place.batch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, capacity = self.place.rows, self.place.capacity
        with torch.inference_mode(False):  # buffers outlive the mode that a query runs in
            self.buffers = tuple(
                torch.zeros(rows, like.shape[1], capacity, like.shape[3], dtype=like.dtype, device=like.device)
                for like in (key_states, value_states)
            )

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_more: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values [batch, kv_heads, tokens, head_dim], and return what this forward may see of all."""
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
        states, batch, bucket = (key_states, value_states), len(key_states), self.place.bucket
        if bucket is not None:
            for buffer, new in zip(self.buffers, states, strict=True):
                buffer[:batch].index_copy_(2, self.place.slot, new)
            first, end = 0, bucket
        else:
            past, first, end = self.length, self._first(), self.length + key_states.shape[2]
            if end > self.buffers[0].shape[2]:
                self.resize(bucket_of(end))
            for buffer, new in zip(self.buffers, states, strict=True):
                buffer[:batch, :, past:end] = new
            self.length = end
            if not past:
                return states
        return self.buffers[0][:batch, :, first:end], self.buffers[1][:batch, :, first:end]

    def resize(self, capacity: int) -> None:
        """Move what is there into buffers of `capacity` slots."""
        old, self.place.capacity = self.buffers, capacity
        self.lazy_initialization(*old)
        for new, before in zip(self.buffers, old, strict=True):
            new[:, :, : self.length] = before[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.place.bucket is not None:
            return self.place.bucket, 0
        return self.length + query_length - self._first(), self._first()

    def get_seq_length(self) -> Any:
        """Tokens seen; in steps a number on the device."""
        return self.length if self.place.bucket is None else self.place.slot[0]

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens; a positive number is the length to keep, as it was of old."""
        self.length = max(0, min(self.length, tokens_to_remove + (self.length if tokens_to_remove <= 0 else 0)))

    def select(self, index: Tensor) -> None:
        """Keep the rows of `index`, in its order."""
        self.buffers = tuple(buffer.index_select(0, index.to(buffer.device)) for buffer in self.buffers)

    def _first(self) -> int:
        return 0 if self.window is None else max(0, self.length + 1 - self.window)


class KVCache(Cache):
    """See the module. The tensors that a captured step reads and counts on are here too, at fixed addresses.

    tokens, positions: int64 [rows, 1] (positions with leading dimensions where the model has them), the next step's
    slot:              int64 [1], where that step writes
    mask:              int64 [rows, capacity], 0 where a row has padding, 1 everywhere else, the future included
    first:             int64 [rows], the first slot that is no padding; `ragged` where padding lies elsewhere too
    prompt, last:      int64 [rows, PROMPTS[-1]] and [1]: what a captured prefill reads, and where its prompt ends
    """

    def __init__(self, windows: Sequence[int | None], batch: int, capacity: int, device: torch.device) -> None:
        self.place = Place(batch, capacity, device)
        self.windows = list(windows)
        self.parts = [KVLayer(self.place, window) for window in windows]
        super().__init__(layers=list(self.parts))
        self.graphs = Graphs(device)
        self.padded = self.ragged = False
        self._inputs(device)

    def _inputs(self, device: torch.device) -> None:
        rows, capacity = self.place.rows, self.place.capacity
        with torch.inference_mode(False):
            self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            self.mask = torch.ones(rows, capacity, dtype=torch.int64, device=device)
            self.first = torch.zeros(rows, dtype=torch.int64, device=device)
            self.prompt = torch.zeros(rows, PROMPTS[-1], dtype=torch.int64, device=device)
            self.last = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def slot(self) -> Tensor:
        return self.place.slot

    @property
    def bucket(self) -> int:
        return self.place.bucket or self.place.capacity

    @property
    def capacity(self) -> int:
        return self.place.capacity

    @property
    def batch(self) -> int:
        return self.place.batch

    def keys(self, layer: int) -> Tensor:
        """[batch, kv_heads, capacity, head_dim], filled up to `slot`."""
        return self.parts[layer].buffers[0][: self.batch]

    def values(self, layer: int) -> Tensor:
        return self.parts[layer].buffers[1][: self.batch]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for layer in self.parts for buffer in layer.buffers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token of one row in all layers."""
        return self.nbytes // (self.place.rows * self.capacity)

    def fits(self, batch: int, slots: int, device: torch.device) -> bool:
        return batch <= self.place.rows and slots <= self.capacity and device == self.tokens.device

    def start(self, batch: int) -> None:
        """Empty, for a new query of `batch` rows."""
        self.place.batch = batch
        self.set_length(0)

    def grow(self, slots: int) -> None:
        """Make room for `slots` tokens; what was captured is of no use any more."""
        if slots <= self.capacity:
            return
        self.graphs.clear()
        mask, old = self.mask, self.capacity
        for layer in self.parts:
            layer.resize(bucket_of(slots))
        with torch.inference_mode(False):
            self.mask = mask.new_ones(len(mask), self.capacity)
        self.mask[:, :old] = mask

    def set_length(self, length: int) -> None:
        for layer in self.parts:
            layer.length = length

    def set_positions(self, positions: Tensor | None, batch: int) -> None:
        """positions [..., batch or 1, tokens], the last of them the next step's; None: the slots without padding."""
        if positions is None:
            return
        last = positions[..., -1:].expand(*positions.shape[:-2], batch, 1)
        if self.positions.shape[:-2] != last.shape[:-2]:
            self.graphs.clear()
            with torch.inference_mode(False):
                self.positions = last.new_zeros(*last.shape[:-2], self.place.rows, 1)
        self.positions[..., :batch, :] = last

    def next_positions(self) -> Tensor:
        return self.positions[..., : self.batch, :]

    def set_prompt(self, tokens: Tensor) -> int:
        """Lay down a prompt [batch, tokens] without padding; how many columns its captured prefill reads."""
        length = tokens.shape[1]
        self.prompt[: len(tokens), :length] = tokens
        self.last.fill_(length - 1)
        return next(size for size in PROMPTS if size >= length)

    def set_padding(self, mask: Tensor | None) -> None:
        """mask [batch, tokens] as generate takes it, or None: nothing is padding."""
        self.mask.fill_(1)
        self.first.zero_()
        self.padded = mask is not None and not bool(mask.all())
        self.ragged = False
        if mask is not None and self.padded:
            self.mask[: len(mask), : mask.shape[1]] = mask
            self.first[: len(mask)] = (mask == 0).sum(1)
            self.ragged = bool((mask.diff(dim=1) < 0).any())

    @contextmanager
    def stepping(self, bucket: int) -> Iterator[None]:
        """Forwards inside add one token at `slot` and see `bucket` slots."""
        self.place.bucket = bucket
        try:
            yield
        finally:
            self.place.bucket = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`: beam search and what else transformers does with a cache that it was given."""
        self.graphs.clear()
        for layer in self.parts:
            layer.select(indices)
        device, self.place.batch, self.place.rows = self.tokens.device, len(indices), len(indices)
        self._inputs(device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)
