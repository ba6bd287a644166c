"""The plan of a decoder run by torch in float32: what tests hold the fused kernels to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from awq.engine.fused.plan import ACTIVATIONS, Attention, Layer, Plan, Rope, turn

if TYPE_CHECKING:
    from awq.engine.cache import KVCache


class ReferenceStep:
    """A `Step` on any device, for any batch: float32 but for what linears and the cache round to."""

    tier = 2
    how = "the plan of the fused step, run by torch"
    max_batch: int | None = None

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._tables: dict[int, Tensor] = {}

    @torch.no_grad()
    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        plan = self.plan
        stream = plan.embedding[tokens[:, 0]].float() * plan.embedding_factor
        for index, layer in enumerate(plan.layers):
            stream = self._layer(layer, stream, positions[:, 0], cache, index)
        return apply(plan.head, plan.norm(stream)) * plan.head_factor

    def _layer(self, layer: Layer, stream: Tensor, positions: Tensor, cache: KVCache, index: int) -> Tensor:
        qkv = project(layer.qkv, layer.norm(stream))
        y = self._attend(layer.attention, qkv, positions, cache, index)
        stream = stream + layer.output_factor * apply(layer.output, y)
        gate, up = project(layer.gate_up, layer.mlp_norm(stream)).chunk(2, -1)
        return stream + layer.down_factor * apply(layer.down, ACTIVATIONS[layer.activation](gate) * up)

    def _attend(self, heads: Attention, qkv: Tensor, positions: Tensor, cache: KVCache, index: int) -> Tensor:
        table = self._table(heads.rope, cache.capacity)
        angles = None if table is None else table[positions].unsqueeze(1)
        query, key, value = split(heads, qkv)
        query, key = (
            turned(t, norm, angles, heads.rope) for t, norm in ((query, heads.query_norm), (key, heads.key_norm))
        )
        keys, values = cache.keys(index), cache.values(index)
        slot, window = int(cache.slot), cache.windows[index]
        keys[:, :, slot], values[:, :, slot] = key.to(keys.dtype), value.to(values.dtype)
        at = torch.arange(slot + 1, device=qkv.device)
        seen = at >= cache.first.unsqueeze(1)
        if window is not None:
            seen &= at > slot - window
        y = attend(
            query.unsqueeze(2), keys[:, :, : slot + 1], values[:, :, : slot + 1], heads.scale, seen[:, None, None]
        )
        return y.flatten(1)

    def _table(self, rope: Rope | None, count: int) -> Tensor | None:
        if rope is None:
            return None
        known = self._tables.get(id(rope))
        if known is None or len(known) < count:
            known = self._tables[id(rope)] = rope.table(count)
        return known


def apply(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear of the model, in its own dtype, the result in float32."""
    dtype = getattr(getattr(linear, "weight", None), "dtype", torch.float32)
    y: Tensor = linear(x.to(dtype))
    return y.float()


def project(linears: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    return torch.cat([apply(linear, x) for linear in linears], -1)


def split(heads: Attention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, channels] -> queries [batch, heads, head_dim], keys and values [batch, key_heads, head_dim]."""
    places = (
        (heads.query_at, heads.heads),
        (heads.key_at, heads.key_heads),
        (heads.value_at, heads.key_heads),
    )
    query, key, value = (
        qkv[..., at : at + count * heads.head_dim].unflatten(-1, (count, heads.head_dim)) for at, count in places
    )
    return query, key, value


def turned(x: Tensor, norm: object, angles: Tensor | None, rope: Rope | None) -> Tensor:
    """A head's norm and RoPE: x [batch, heads, head_dim], angles [batch, 1, rotary / 2, 2]."""
    x = norm(x) if callable(norm) else x
    if angles is None or rope is None:
        return x
    return torch.stack([turn(each, table, rope.interleaved) for each, table in zip(x, angles, strict=True)])


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, seen: Tensor) -> Tensor:
    """query [batch, heads, new, d], keys and values [batch, key_heads, slots, d], seen [batch, 1, new, slots] ->
    [batch, heads, d] of one new token, [batch, new, heads, d] of several."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.float().repeat_interleave(group, 1) for t in (keys, values))
    scores = (query.float() @ keys.transpose(2, 3)) * scale
    y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return y.squeeze(2) if query.shape[2] == 1 else y.transpose(1, 2)
