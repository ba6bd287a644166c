"""The fused step on a GPU: buffers between the kernels, and the launches of one token. See `awq.kernels.cuda.step`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awq.engine.fused.merged import Merged
from awq.engine.fused.plan import Attention, Layer, Norm, Plan, Rope
from awq.engine.head import Int8Head
from awq.kernels.cuda.step.attention import Bind, HeadNorm, Heads, attention
from awq.kernels.cuda.step.ends import embed, head
from awq.kernels.cuda.step.gemv import accumulate, gated, project
from awq.kernels.cuda.step.launch import Launch

if TYPE_CHECKING:
    from awq.engine.cache import KVCache


@dataclass(frozen=True)
class Weights:
    """The four weights of a layer."""

    qkv: Merged
    output: Merged
    gate_up: Merged
    down: Merged


class FusedStep:
    """A `Step` of one row. Of the model it keeps tensors, and copies of its rotary modules.

    It has one set of buffers: steps must not run side by side. Logits are overwritten by the next step.
    """

    tier = 2
    how = "fused step"
    max_batch: int | None = 1

    def __init__(self, plan: Plan, weights: Sequence[Weights]) -> None:
        table = plan.embedding.detach()
        self._stream = torch.zeros(1, table.shape[1], device=table.device)
        self._embed = embed(table, self._stream, plan.embedding_factor)
        self._logits = torch.zeros(1, len(table), device=table.device)
        self._attentions = [layer.attention for layer in plan.layers]
        self._qkv = _buffer(table, (each.qkv.units.out_features for each in weights))
        self._y = _buffer(table, (each.heads * each.head_dim for each in self._attentions))
        self._product = _buffer(table, (each.down.units.in_features for each in weights))
        self._layers = [self._launches(layer, each) for layer, each in zip(plan.layers, weights, strict=True)]
        self._head = self._last(plan)
        self._binds: dict[int, list[Bind]] = {}  # by the capacity of a cache; graphs read the tables of RoPE of theirs

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """float32 [1, vocabulary]; see `Step`. The first call for a cache of some capacity must not be captured."""
        with torch.cuda.device(self._stream.get_device()):
            if cache.capacity not in self._binds:
                self._binds[cache.capacity] = self._make_binds(cache.capacity)
            self._enqueue(tokens, positions, cache, torch.cuda.current_stream().cuda_stream)
        return self._logits

    def _enqueue(self, tokens: Tensor, positions: Tensor, cache: KVCache, stream: int) -> None:
        self._embed(tokens.view(1))(stream)
        for index, ((before, *after), bind) in enumerate(zip(self._layers, self._binds[cache.capacity], strict=True)):
            before(stream)
            keys, values, window = cache.keys(index), cache.values(index), cache.windows[index]
            bind(keys, values, cache.slot, cache.first, positions.view(1), window)(stream)
            for launch in after:
                launch(stream)
        self._head(stream)

    def _launches(self, layer: Layer, weights: Weights) -> tuple[Launch, Launch, Launch, Launch]:
        qkv, output, gate_up, down = weights.qkv, weights.output, weights.gate_up, weights.down
        norm, mlp, stream = layer.norm, layer.mlp_norm, self._stream
        y, product = self._y[:, : output.units.in_features], self._product[:, : down.units.in_features]
        return (
            project(stream, norm.weight, norm.epsilon, qkv.units, qkv.bias, self._qkv),
            accumulate(y, output.units, output.bias, stream, layer.output_factor),
            gated(stream, mlp.weight, mlp.epsilon, gate_up.units, gate_up.bias, product, layer.activation),
            accumulate(product, down.units, down.bias, stream, layer.down_factor),
        )

    def _last(self, plan: Plan) -> Launch:
        norm, last = plan.norm, {**dict(plan.head.named_parameters()), **dict(plan.head.named_buffers())}
        weight = last["codes" if isinstance(plan.head, Int8Head) else "weight"].detach()
        bias, scales = (last[name].detach().float() if name in last else None for name in ("bias", "scales"))
        return head(self._stream, norm.weight, norm.epsilon, weight, bias, self._logits, plan.head_factor, scales)

    def _make_binds(self, positions: int) -> list[Bind]:
        """Tables of RoPE for so many positions, one for the layers that share it, and the attention of every layer."""
        ropes = {id(each.rope): each.rope for each in self._attentions if each.rope}
        device = self._stream.device
        tables = {key: rope.table(positions).to(device).contiguous() for key, rope in ropes.items()}
        return [attention(self._qkv, _heads(each, tables), self._y) for each in self._attentions]


def _buffer(like: Tensor, widths: Iterable[int]) -> Tensor:
    return torch.zeros(1, max(widths), dtype=like.dtype, device=like.device)


def _heads(plan: Attention, tables: dict[int, Tensor]) -> Heads:
    return Heads(
        plan.heads,
        plan.key_heads,
        plan.head_dim,
        plan.query_at,
        plan.key_at,
        plan.value_at,
        plan.scale,
        tables.get(id(plan.rope)),
        _interleaved(plan.rope),
        _norm(plan.query_norm),
        _norm(plan.key_norm),
    )


def _interleaved(rope: Rope | None) -> bool:
    return rope is not None and rope.interleaved


def _norm(norm: Norm | None) -> HeadNorm | None:
    return HeadNorm(norm.weight.contiguous(), norm.epsilon) if norm else None
