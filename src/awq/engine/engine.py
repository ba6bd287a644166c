"""`Engine`: what a model generates with, and the buffers for it, kept from one query to the next."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from awq.engine.cache import KVCache, bucket_of
from awq.engine.choose import Ways, choose
from awq.engine.forward import device_of
from awq.engine.loop import Run
from awq.engine.memory import check_memory, out_of_memory
from awq.engine.query import Query
from awq.engine.sample import Sampler
from awq.errors import ConfigError

_FIRST_TOKENS = 2048  # new tokens that a cache has room for at first; it grows when there are more


class Engine:
    """How a model generates, and the buffers for it. `str()` of it is one line.

    max_seq_len: tokens of prompt and answer at most, None: what memory allows
    """

    def __init__(self, model: Any, max_seq_len: int | None = None) -> None:
        self._model = weakref.ref(model)
        self.max_seq_len = max_seq_len
        self._ways: Ways | None = None
        self._tried_on: Any = None
        self._cache: KVCache | None = None
        self._sampler: Sampler | None = None
        self._done: torch.cuda.Event | None = None
        self._lock, self._owner = threading.Lock(), 0
        self.last = "nothing was generated yet"  # why the last query was not the engine's, "" if it was

    @property
    def ways(self) -> Ways:
        """What holds for this model; tried when it is first asked for, and again on another device or dtype."""
        model: Any = self._model()
        if self._ways is None or self._tried_on != (self._device(), model.dtype):
            self.reset()
            self._ways, self._tried_on = choose(model), (self._device(), model.dtype)
        return self._ways

    @property
    def tier(self) -> int:
        """2: fused step; 1: the model's own forward with a static cache; 0: transformers' own loop."""
        return self.ways.ways[0].step.tier if self.ways.ways else 0

    def tier_of(self, batch: int) -> int:
        """The tier of a query of so many rows."""
        way = self.ways.way(batch)
        return way.step.tier if way else 0

    def limit(self, tier: int) -> None:
        """Use no tier above `tier`: for comparisons, and where one is suspected."""
        self.reset()
        self.ways.ways = [way for way in self.ways.ways if way.step.tier <= tier]
        if self.ways.prompts is not None and self.ways.prompts.tier > tier:
            self.ways.prompts = None
        if not self.ways.ways:
            self.ways.reason = "transformers' own loop, as asked"

    @property
    def reason(self) -> str:
        why = "".join(f"; not {name}: {reason}" for name, reason in self.ways.refused.items())
        return self.ways.reason + why

    @property
    def nbytes(self) -> int:
        """Bytes of the cache that is kept for the next query."""
        return self._cache.nbytes if self._cache else 0

    def __str__(self) -> str:
        return f"tier {self.tier}: {self.reason}"

    def reset(self) -> None:
        """Free cache and graphs, and try anew when next asked: after the model was changed."""
        self._ways = self._cache = self._sampler = None

    def take(self, query: Query) -> Any:
        """The answer to a query: tokens [batch, prompt + new], or transformers' output object with the cache."""
        try:
            with torch.inference_mode(), self._in_order():
                cache = self._cache_for(query)
                way = self.ways.way(query.tokens.shape[0])
                assert way is not None
                run = Run(self._model(), way, cache, self._sampler_for(query), query, self.ways.padded_prompts)
                run.ragged_way = self.ways.way(query.tokens.shape[0], ragged=True)
                run.prompts = self.ways.prompts
                new = run.answer()
        except torch.OutOfMemoryError as error:
            self._cache = self._sampler = None
            raise out_of_memory(query, self.ways.slot_bytes) from error
        except BaseException:
            self._cache = self._sampler = None  # left in the middle of a step
            raise
        sequences = torch.cat([query.tokens, new.to(query.tokens.device)], dim=1)
        if not query.returned:
            return sequences
        self._cache = None  # the caller's from now on
        return GenerateDecoderOnlyOutput(sequences=cast(Any, sequences), past_key_values=cache)

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """One query at a time; False for one that comes from inside of another, such as from its streamer."""
        if self._owner == threading.get_ident():
            yield False
            return
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield True
            finally:
                self._owner = 0

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Queries of different streams follow one another: steps enqueued ahead may still run when one returns."""
        device = self._device()
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done = stream.record_event()

    def _cache_for(self, query: Query) -> KVCache:
        """An empty cache with room for the query, or the query's own."""
        if self.max_seq_len is not None and query.slots > self.max_seq_len:
            raise ConfigError(
                f"{query.slots - query.max_new} tokens and {query.max_new} new ones exceed max_seq_len="
                f"{self.max_seq_len}: lower max_new_tokens, or load the model with a larger max_seq_len."
            )
        batch = query.tokens.shape[0]
        needed = min(query.slots, query.slots - query.max_new + _FIRST_TOKENS)
        if query.cache is not None:
            query.cache.grow(needed)
            return query.cache
        device = self._device()
        if self._cache is None or not self._cache.fits(batch, needed, device):
            if self._done is not None:
                self._done.synchronize()
            self._cache = None  # freed before the next one is made
            capacity = bucket_of(needed)
            check_memory(batch, capacity, self.ways.slot_bytes, device)
            self._cache = KVCache(self.ways.windows, batch, capacity, device)
        self._cache.start(batch)
        return self._cache

    def _sampler_for(self, query: Query) -> Sampler:
        rows, device = query.tokens.shape[0], self._device()
        if self._sampler is None or self._sampler.rows < rows or self._sampler.device != device:
            self._sampler = Sampler(rows, self.ways.vocabulary, device)
        return self._sampler

    def _device(self) -> torch.device:
        return device_of(self._model())
