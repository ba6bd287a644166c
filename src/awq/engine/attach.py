"""Where the engine meets transformers: `generate` stays transformers' own, and its loop becomes the engine's.

`generate` prepares a query (defaults, processors, criteria, masks, sequences to return) and calls the model's `_sample`
for greedy and sampled ones. That method is replaced by a subclass made for the model's class; what the engine does not
cover goes on to the method it replaces.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from awq.engine.cache import KVCache, bucket_of
from awq.engine.choose import Ways, choose
from awq.engine.loop import Run
from awq.engine.memory import check_memory, out_of_memory
from awq.engine.query import Query, read_query
from awq.engine.sample import Sampler
from awq.errors import ConfigError

_FIRST_TOKENS = 2048  # new tokens that a cache has room for at first; it grows when there are more
_engines: weakref.WeakKeyDictionary[Any, Engine] = weakref.WeakKeyDictionary()


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
            with torch.inference_mode():
                cache = self._cache_for(query)
                way = self.ways.way(query.tokens.shape[0])
                assert way is not None
                run = Run(self._model(), way, cache, self._sampler_for(query), query)
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
            self._cache = None  # freed before the next one is made
            capacity = bucket_of(needed)
            check_memory(batch, capacity, self.ways.slot_bytes, device)
            self._cache = KVCache(self.ways.windows, batch, capacity, device)
        self._cache.start(batch)
        return self._cache

    def _sampler_for(self, query: Query) -> Sampler:
        rows, device = query.tokens.shape[0], self._device()
        if self._sampler is None or self._sampler.rows < rows or self._sampler.device != device:
            model: Any = self._model()
            self._sampler = Sampler(rows, model.get_output_embeddings().weight.shape[0], device)
        return self._sampler

    def _device(self) -> torch.device:
        model: Any = self._model()
        device: torch.device = model.get_input_embeddings().weight.device
        return device


class Engined:
    """Mixed into the class of a model: the loop of `generate`, and `engine`."""

    @property
    def engine(self) -> Engine:
        return engine_of(self)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **arguments: Any,
    ) -> Any:
        engine = self.engine
        with engine.turn() as mine:
            query: Query | str = "a query inside of another"
            if mine:
                query = read_query(
                    input_ids, logits_processor, stopping_criteria, generation_config, streamer, arguments
                )
            if synced_gpus:
                query = "synced_gpus"
            if not isinstance(query, str) and engine.ways.way(len(input_ids)) is None:
                query = engine.reason
            if not isinstance(query, str):
                engine.last = ""
                return engine.take(query)
            engine.last = query
        return super()._sample(  # type: ignore[misc]
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **arguments,
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *others: Any) -> Any:
        """Marks a cache that nobody but `generate` holds: the engine may take its place."""
        given = model_kwargs.get("past_key_values")
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *others)  # type: ignore[misc]
        made = model_kwargs.get("past_key_values")
        if given is None and made is not None and generation_config.cache_implementation in (None, "dynamic"):
            made.made_by_generate = True
        return result


def attach(model: Any, max_seq_len: int | None = None) -> Any:
    """Let `model.generate` run through the engine; the same model, whose class has `engine` now."""
    if not isinstance(model, Engined):
        model.__class__ = _engined(type(model))
    engine_of(model).max_seq_len = max_seq_len
    return model


def engine_of(model: Any) -> Engine:
    """The engine of a model, made when it is first asked for. Both are freed together."""
    if model not in _engines:
        _engines[model] = Engine(model)
    return _engines[model]


@lru_cache(None)
def _engined(model_class: Hashable) -> Any:
    assert isinstance(model_class, type)
    return type(model_class.__name__, (Engined, model_class), {"__module__": model_class.__module__})
