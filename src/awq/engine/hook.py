"""Where the engine meets transformers: `generate` stays transformers' own, and its loop becomes the engine's.

`generate` prepares a query (defaults, processors, criteria, masks, sequences to return) and calls the model's `_sample`
for greedy and sampled ones. That method is replaced by a subclass made for the model's class; what the engine does not
cover goes on to the method it replaces.
"""

from __future__ import annotations

import weakref
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from awq.engine.engine import Engine
from awq.engine.forward import device_of
from awq.engine.query import Query, read_query
from awq.errors import ConfigError

_classes: dict[type, type] = {}
_engines: weakref.WeakKeyDictionary[Any, Engine] = weakref.WeakKeyDictionary()


class Engined:
    """Mixed into the class of a model: the loop of `generate`, and `engine`."""

    @property
    def engine(self) -> Engine:
        return engine_of(self)

    @property
    def device(self) -> torch.device:
        """Where it takes its tokens, also where its weights lie elsewhere between forwards."""
        found: torch.device = super().device  # type: ignore[misc]
        return device_of(self) if found.type == "meta" else found

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


def check_length(max_seq_len: Any) -> None:
    """ConfigError for what is neither a number of tokens nor None."""
    if max_seq_len is not None and not (isinstance(max_seq_len, Integral) and int(max_seq_len) > 0):
        raise ConfigError(f"max_seq_len={max_seq_len!r} is no number of tokens: use 1 or more, or None for no limit.")


def attach(model: Any, max_seq_len: int | None = None) -> Any:
    """Let `model.generate` run through the engine; the same model, whose class has `engine` now."""
    check_length(max_seq_len)
    kind = type(model)
    if not isinstance(model, Engined):
        if kind not in _classes:
            _classes[kind] = type(kind.__name__, (Engined, kind), {"__module__": kind.__module__})
        model.__class__ = _classes[kind]
    engine_of(model).max_seq_len = max_seq_len
    return model


def engine_of(model: Any) -> Engine:
    """The engine of a model, made when it is first asked for. Both are freed together."""
    if model not in _engines:
        _engines[model] = Engine(model)
    return _engines[model]
