"""Attention by torch's kernels: of one token over a cache, and of the tokens of a prompt.

The query heads of a key head are taken as rows of one product. transformers repeats the keys and values for every
query head where there is a mask, and torch's CPU kernel is slow for grouped heads (156 us against 28 for 9 over 3 heads
and 200 tokens, one core). As rows, they read each key once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "awq_one_token"
_BLOCK = 256  # tokens of a prompt that share a mask
_added: Any = WeakTensorKeyDictionary()  # masks of True and False, as what is added to scores


def one_token_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """query [batch, heads, 1, width], key and value [batch, kv_heads, slots, width] -> [batch, 1, heads, width].

    Anything else goes to transformers' own function, whose arguments these are.
    """
    batch, heads, tokens, width = query.shape
    known = more.get("position_bias") is None and not more.get("dropout")
    if tokens != 1 or not known or (attention_mask is not None and attention_mask.shape[1] != 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    if attention_mask is not None and attention_mask.dtype == torch.bool and query.is_cuda:
        attention_mask = _as_added(attention_mask, query.dtype)
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    if attention_mask is not None:
        attention_mask = attention_mask.expand(batch, key.shape[1], grouped.shape[2], -1)
    output = nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=more.get("scaling")
    )
    return output.reshape(batch, 1, heads, value.shape[3]), None


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 and -inf for True and False: torch would make it anew in every layer."""
    if mask not in _added:
        _added[mask] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    found: Tensor = _added[mask]
    return found


def prompt_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None = None, padding: Sequence[int] = ()
) -> Tensor:
    """query [batch, heads, new, width], the last of the tokens whose keys and values are [batch, kv_heads, all, width].

    Causal: [batch, heads, new, width], with 0 where a query is padding. In memory the heads of a token follow another.
    window: how many tokens one sees, itself included; padding: how many before each row are not seen; empty for none
    """
    if not any(padding):
        return _causal(query, keys, values, scale, window)
    y = query.new_zeros(query.transpose(1, 2).shape).transpose(1, 2)
    past = keys.shape[2] - query.shape[2]
    for row, first in enumerate(padding):  # each by itself: with a mask it would take longer, and memory
        begin, one = max(0, first - past), slice(row, row + 1)
        if begin < query.shape[2]:
            part = (query[one, :, begin:], keys[one, :, first:], values[one, :, first:])
            y[one, :, begin:] = _causal(*part, scale, window)
    return y


def _causal(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    new, total = query.shape[2], keys.shape[2]
    if query.is_cuda and (window is None or window >= total):
        if new == total:  # where torch has cuDNN's kernel, 2048 tokens of Llama-2-7B take 89 us on an H200, else 165
            return nn.functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=scale, enable_gqa=True
            )
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output: Tensor = flash(query, keys, values, 0.0, True, scale=scale)[0]
        return output
    parts, window = [], window or total
    for start in range(0, new, _BLOCK):
        some = query[:, :, start : start + _BLOCK]
        end = total - new + start + some.shape[2]
        seen = slice(max(0, end - some.shape[2] + 1 - window), end)
        parts.append(_windowed(some, keys[:, :, seen], values[:, :, seen], scale, window))
    return torch.cat(parts, 2)


def _windowed(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """Behind a mask; as in `one_token_attention` the heads that share keys are rows of one product."""
    batch, heads, new, width = query.shape
    at = torch.arange(keys.shape[2], device=query.device)
    apart = at[-new:, None] - at
    mask = ((apart >= 0) & (apart < window)).repeat(heads // keys.shape[1], 1)
    grouped = query.reshape(batch, keys.shape[1], -1, width)
    output = nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return output.reshape(batch, heads, new, width)


@contextmanager
def one_token(config: Any, enabled: bool = True) -> Iterator[None]:
    """Forwards of a model of this configuration attend so, where they would by torch's function."""
    if not enabled or config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


AttentionInterface.register(_NAME, one_token_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
