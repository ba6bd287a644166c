"""Attention of one token over a cache: the query heads of a key head are taken as rows of one product.

transformers repeats the keys and values for every query head where there is a mask, and torch's CPU kernel is slow for
grouped heads (156 us against 28 for 9 over 3 heads and 200 tokens, one core). As rows, they read each key once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "awq_one_token"
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
