"""How a projection becomes query, key and value: their places in it, norms of heads, and RoPE."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from awq.engine.fused.norms import as_rms_norm, close
from awq.engine.fused.observe import AttentionCall, Observed, RotaryCall
from awq.engine.fused.plan import Attention, Given, Norm, Rope, halved, turn
from awq.engine.fused.reference import attend

# What attention functions are told that changes nothing here; anything else that is not None does.
_IDLE = {"dropout", "scaling", "sliding_window", "is_causal", "position_ids", "use_cache", "output_attentions"}
_KNOWN = _IDLE | {"cache_position", "position_embeddings", "past_key_values", "output_router_logits"}


def find_heads(
    seen: Observed,
    ropes: list[tuple[Rope, Tensor]],
    call: AttentionCall,
    qkv: Tensor,
    after: int,
    tolerance: float,
) -> Attention | str:
    """The attention that makes `call` of the projection qkv [tokens, channels], or why there is none.

    after: when its first linear was called; norms of heads come later
    """
    heads, _, size = call.query.shape
    key_heads = len(call.key)
    unknown = sorted(name for name, value in call.options.items() if name not in _KNOWN and value is not None)
    if unknown:
        return f"its attention takes {', '.join(unknown)}"
    if call.value.shape != call.key.shape or heads % key_heads:
        return "its values are not as its keys"
    scale, window = float(call.options.get("scaling") or size**-0.5), call.options.get("sliding_window")
    plain = attend(call.query[None], call.key[None], call.value[None], scale, _seen(call, window))
    if not close(call.output, plain[0].flatten(1), tolerance):
        return "its attention is no plain causal softmax"
    places = _places(qkv, key_heads * size, size)
    value_at = next((at for at in places if close(_part(qkv, at, call.value), call.value, tolerance)), None)
    if value_at is None:
        return "its values do not come straight from a projection"
    norms = list(_norms(seen, after, call.order, size))
    for rope in (*(each for each in ropes if each[0].rotary <= size), None):
        key = _find(qkv, call.key, rope, norms, tolerance, {value_at})
        query = key and _find(qkv, call.query, rope, norms, tolerance, {value_at, key[0]})
        if key and query:
            made = rope[0] if rope else None
            return Attention(heads, key_heads, size, query[0], key[0], value_at, scale, query[1], key[1], made)
    return "its queries and keys are not made by RoPE of a projection"


def _seen(call: AttentionCall, window: int | None) -> Tensor:
    tokens = call.query.shape[1]
    at = torch.arange(tokens, device=call.query.device)
    apart = at.unsqueeze(1) - at
    seen = apart >= 0
    if window is not None:
        seen &= apart < window
    return seen[None, None]


def _places(qkv: Tensor, width: int, size: int) -> range:
    return range(0, qkv.shape[-1] - width + 1, size)


def _part(qkv: Tensor, at: int, like: Tensor) -> Tensor:
    """Channels from `at` on as [heads, tokens, head_dim]."""
    heads, _, size = like.shape
    part: Tensor = qkv[:, at : at + heads * size].unflatten(-1, (heads, size)).transpose(0, 1)
    return part


def _norms(seen: Observed, after: int, before: int, size: int) -> Iterator[Norm]:
    """RMSNorms of one head, called between the projection and attention."""
    for call in seen.norms:
        if not (after < call.order < before and call.width == size):
            continue
        if norm := as_rms_norm(call.module, size, call.input.device):
            yield norm


def ropes_of(seen: Observed) -> list[tuple[Rope, Tensor]]:
    """Every way in which the angles of a rotary module may turn heads, with those of the tokens that were observed."""
    different: dict[tuple[object, ...], RotaryCall] = {}
    for call in seen.rotaries:
        words = (value for value in (*call.args, *call.kwargs.values()) if isinstance(value, str))
        different.setdefault((id(call.module), *words), call)
    ropes = []
    for call in different.values():
        module = copy.deepcopy(call.module)
        for interleaved, every_other in ((False, False), (True, True), (True, False)):
            rope = Rope(module, _arguments(call), call.angles[0].shape[-1], interleaved, every_other)
            ropes.append((rope, torch.stack([halved(angle.float(), every_other) for angle in call.angles], -1)))
    return ropes


def _arguments(call: RotaryCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_place, call.args)), {name: _place(value) for name, value in call.kwargs.items()}


def _place(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return Given("x" if value.is_floating_point() else "positions")


def _find(
    qkv: Tensor, wanted: Tensor, rope: tuple[Rope, Tensor] | None, norms: list[Norm], tolerance: float, taken: set[int]
) -> tuple[int, Norm | None] | None:
    """Where `wanted` [heads, tokens, head_dim] lies in the projection, and its norm."""
    heads, _, size = wanted.shape
    for at in _places(qkv, heads * size, size):
        if any(at <= other < at + heads * size for other in taken):
            continue
        part = _part(qkv, at, wanted).float()
        for norm in (None, *norms):
            x = norm(part) if norm else part
            if close(turn(x, rope[1], rope[0].interleaved) if rope else x, wanted, tolerance):
                return at, norm
    return None
