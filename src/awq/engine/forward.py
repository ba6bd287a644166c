"""Tier 1: the model's own forward as a decode step."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from awq.engine.attention import one_token
from awq.engine.cache import KVCache


class ModelStep:
    """Whatever architecture it is. The model is held weakly: it must not outlive its owner's last reference.

    grouped: with `one_token` attention, where the model lets its attention be chosen
    """

    tier, max_batch = 1, None

    def __init__(self, model: Any, grouped: bool = True) -> None:
        self._model, self._grouped = weakref.ref(model), grouped
        self.how = "the model's own forward"

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        model: Any = self._model()
        stepping = cache.place.bucket is not None
        mask = None
        if cache.padded or stepping:
            mask = cache.mask[: len(tokens), : cache.bucket if stepping else cache.get_seq_length() + 1]
        inputs = {"position_ids": positions} if positions_taken(model) else {}
        with one_token(model.config.get_text_config(decoder=True), self._grouped):
            output = model(
                input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=True, **inputs
            )
        logits: Tensor = output.logits[:, -1]
        return logits


def prompt_logits(model: Any, tokens: Tensor, last: Tensor, cache: KVCache) -> Tensor:
    """tokens [batch, columns] into the empty cache -> logits [batch, vocabulary] of column `last`, int64 [1].

    The columns after it hold anything: attention is causal, and their keys and values are overwritten before they are
    seen. Padding on this side needs no mask, with which attention is slower.
    """
    count = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    more = {"position_ids": count} if positions_taken(model) else {}
    output = model(
        input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=last, return_dict=True, **more
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def device_of(model: Any) -> torch.device:
    """Where the model takes its tokens."""
    embedding = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type == "meta":  # its weight is elsewhere between forwards
        return torch.device(embedding._hf_hook.execution_device)
    return device


def positions_taken(model: Any) -> bool:
    """Whether the forward has an argument position_ids."""
    code = type(model).forward
    code = getattr(code, "__wrapped__", code)
    return "position_ids" in code.__code__.co_varnames[: code.__code__.co_argcount + code.__code__.co_kwonlyargcount]
