"""The fused step on a GPU: buffers between the kernels, and their launches. See `awq.kernels.cuda.step`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awq.engine.fused.merged import Weights
from awq.engine.fused.plan import Layer, Plan
from awq.engine.fused.wide import Ropes, WideStep, heads_of
from awq.engine.head import Int8Head
from awq.kernels.cuda.step.attention import Bind, attention
from awq.kernels.cuda.step.ends import embed, head
from awq.kernels.cuda.step.gemv import accumulate, gated, project

if TYPE_CHECKING:
    from awq.engine.cache import KVCache

Launched = Callable[[int], None]


class FusedStep:
    """A `Step` of up to `max_batch` rows. It keeps linears of the model, and copies of its rotary modules.

    It has one set of buffers: steps must not run side by side. Logits are overwritten by the next step.
    wider: the step of more rows over the same weights, where there is one
    """

    tier = 2
    how = "fused step"

    def __init__(
        self, plan: Plan, weights: Sequence[Weights], max_batch: int = 1, wider: WideStep | None = None
    ) -> None:
        self.max_batch: int | None = max_batch
        self.wider = wider
        self._plan, self._weights = plan, weights
        self._buffers = Buffers.of(plan, weights, max_batch)
        self._rows: dict[int, Rows] = {}
        self._ropes = wider.ropes if wider else Ropes(plan)

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """float32 [batch, vocabulary]; see `Step`. The first call for a batch and a bucket must not be captured."""
        with torch.cuda.device(self._buffers.stream.get_device()):
            rows = self.rows(len(tokens))
            if cache.capacity not in rows.binds:
                rows.bind(cache.capacity, self._ropes.tables(cache.capacity))
            rows.enqueue(tokens, positions, cache, torch.cuda.current_stream().cuda_stream)
        return rows.logits

    def rows(self, count: int) -> Rows:
        """The launches for so many rows, made when they are first asked for."""
        if count not in self._rows:
            self._rows[count] = Rows(self._plan, self._weights, self._buffers, count)
        return self._rows[count]


@dataclass(frozen=True)
class Buffers:
    """What lies between the kernels. stream float32 [rows, width], logits float32 [rows, vocabulary]; the others hold
    rows of a layer one after the other: projections, results of attention, products of gate and up."""

    stream: Tensor
    logits: Tensor
    qkv: Tensor
    y: Tensor
    product: Tensor

    @classmethod
    def of(cls, plan: Plan, weights: Sequence[Weights], rows: int) -> Buffers:
        table = plan.embedding.detach()

        def buffer(widths: Iterable[int]) -> Tensor:
            return torch.zeros(rows * max(widths), dtype=table.dtype, device=table.device)

        return cls(
            torch.zeros(rows, table.shape[1], device=table.device),
            torch.zeros(rows, len(table), device=table.device),
            buffer(each.qkv.units.out_features for each in weights),
            buffer(each.output.units.in_features for each in weights),
            buffer(each.down.units.in_features for each in weights),
        )


class Rows:
    """The launches of a step of `count` rows: of every layer the projection, and what follows its attention.

    binds: of the attention of every layer, by the capacity of a cache
    """

    def __init__(self, plan: Plan, weights: Sequence[Weights], buffers: Buffers, count: int) -> None:
        self.count, self.buffers = count, buffers
        self.stream, self.logits = buffers.stream[:count], buffers.logits[:count]
        self.embed = embed(plan.embedding.detach(), self.stream, plan.embedding_factor)
        self.layers = [self._launches(layer, each) for layer, each in zip(plan.layers, weights, strict=True)]
        self.head = self._last(plan)
        self.binds: dict[int, list[Bind]] = {}
        widths = [(each.qkv.units.out_features, each.output.units.in_features) for each in weights]
        self._attentions = list(zip((layer.attention for layer in plan.layers), widths, strict=True))

    def enqueue(self, tokens: Tensor, positions: Tensor, cache: KVCache, stream: int) -> None:
        self.embed(tokens.view(self.count))(stream)
        for index, ((before, *after), bind) in enumerate(zip(self.layers, self.binds[cache.capacity], strict=True)):
            before(stream)
            keys, values, window = cache.keys(index), cache.values(index), cache.windows[index]
            bind(keys, values, cache.slot, cache.first, positions.view(self.count), window, cache.bucket)(stream)
            for launch in after:
                launch(stream)
        self.head(stream)

    def bind(self, capacity: int, tables: dict[int, Tensor]) -> None:
        self.binds[capacity] = [
            attention(self._part(self.buffers.qkv, wide), heads_of(each, tables), self._part(self.buffers.y, width))
            for each, (wide, width) in self._attentions
        ]

    def _launches(self, layer: Layer, weights: Weights) -> tuple[Launched, Launched, Launched, Launched]:
        qkv, output, gate_up, down = weights.qkv, weights.output, weights.gate_up, weights.down
        norm, mlp, stream = layer.norm, layer.mlp_norm, self.stream
        projected = self._part(self.buffers.qkv, qkv.units.out_features)
        y = self._part(self.buffers.y, output.units.in_features)
        product = self._part(self.buffers.product, down.units.in_features)
        return (
            project(stream, norm.weight, norm.epsilon, qkv.units, qkv.bias, projected),
            accumulate(y, output.units, output.bias, stream, layer.output_factor),
            gated(stream, mlp.weight, mlp.epsilon, gate_up.units, gate_up.bias, product, layer.activation),
            accumulate(product, down.units, down.bias, stream, layer.down_factor),
        )

    def _last(self, plan: Plan) -> Launched:
        norm, last = plan.norm, {**dict(plan.head.named_parameters()), **dict(plan.head.named_buffers())}
        weight = last["codes" if isinstance(plan.head, Int8Head) else "weight"].detach()
        bias, scales = (last[name].detach().float() if name in last else None for name in ("bias", "scales"))
        return head(self.stream, norm.weight, norm.epsilon, weight, bias, self.logits, plan.head_factor, scales)

    def _part(self, buffer: Tensor, width: int) -> Tensor:
        return buffer[: self.count * width].view(self.count, width)
