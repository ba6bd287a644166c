"""The fused pass of many rows on a GPU: prompts, and decode steps of more rows than the GEMV takes.

Between the products of the GEMM kernels lie small ones of our own; a decode step has the attention of the step of few
rows, a prompt the library's. What lies between them in memory is torch's: a graph that captures a pass keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awq.engine.attention import prompt_attention
from awq.engine.fused.merged import Merged, Weights
from awq.engine.fused.plan import Attention, Norm, Plan, Rope
from awq.kernels.cuda.gemm import gemm
from awq.kernels.cuda.layout import gpu
from awq.kernels.cuda.step.attention import HeadNorm, Heads, attention, shares_of
from awq.kernels.cuda.step.ends import embed
from awq.kernels.cuda.step.wide import add_and_norm, gate, place

if TYPE_CHECKING:
    from awq.engine.cache import KVCache

# Tokens of a prompt that go through a layer at a time: the GEMM gains nothing from more, and what lies between its
# products takes 90 kB of each in a Llama-2-7B.
ROWS = 4096
EACH = 64  # tokens that a first prompt is filled up to a multiple of: cuDNN plans each length that is new to it

Attend = Callable[[int, Tensor], Tensor]  # of a layer: its projection [rows, channels] -> [rows, heads * head_dim]


class Ropes:
    """Tables of RoPE by how many positions they have. Graphs read those of their cache."""

    def __init__(self, plan: Plan) -> None:
        self._ropes = {id(rope): rope for layer in plan.layers if (rope := layer.attention.rope)}
        self._device = plan.embedding.device
        self._known: dict[int, dict[int, Tensor]] = {}
        self._steady: dict[int, bool] = {}

    def tables(self, positions: int) -> dict[int, Tensor]:
        """Tables for so many positions, one for the layers that share it."""
        if positions not in self._known:
            made = {key: rope.table(positions).to(self._device).contiguous() for key, rope in self._ropes.items()}
            self._known[positions] = made
        return self._known[positions]

    def steady(self, positions: int) -> bool:
        """Whether those tables hold for prompts too, of any length."""
        if positions not in self._steady:
            self._steady[positions] = all(rope.steady(positions) for rope in self._ropes.values())
        return self._steady[positions]


class WideStep:
    """A `PromptStep` of any number of rows. It keeps linears of the model, and copies of its rotary modules."""

    tier, max_batch = 2, None
    how = "fused step of many rows"
    rows = ROWS

    def __init__(self, plan: Plan, weights: Sequence[Weights]) -> None:
        self.ropes = Ropes(plan)
        self._plan, self._weights = plan, weights
        self._shares: Tensor | None = None

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """[batch, vocabulary]; see `Step`. The first call for a bucket must not be captured."""
        table = self._plan.embedding
        with torch.cuda.device(table.get_device()):
            heads, current = self._heads(cache), torch.cuda.current_stream().cuda_stream
            if self._shares is None:
                self._shares = shares_of(heads, gpu(table.get_device()).multiprocessors, table.device)

            def attend(index: int, qkv: Tensor) -> Tensor:
                y = qkv.new_empty(len(qkv), heads[index].heads * heads[index].head_dim)
                bind = attention(qkv, heads[index], y, self._shares)
                keys, values, window = cache.keys(index), cache.values(index), cache.windows[index]
                bind(keys, values, cache.slot, cache.first, positions.view(len(qkv)), window, cache.bucket)(current)
                return y

            stream = self._embedded(tokens.view(-1))
            last, factor = self._layers(stream, attend)
            x = last.new_empty(stream.shape)
            self._norm(self._plan.norm, stream, last, factor, x)
            return self._logits(x)

    def takes(self, cache: KVCache) -> bool:
        """Whether prompts may go into `cache`: not where angles depend on the length of the text."""
        return self.ropes.steady(cache.capacity)

    def prompt(
        self,
        tokens: Tensor,
        cache: KVCache,
        past: int = 0,
        padding: Sequence[int] = (),
        last: Tensor | None = None,
    ) -> Tensor:
        """The slots from `past` on filled with tokens int64 [batch, columns]; logits [batch, vocabulary] of the last.

        padding: how many slots before each row count for nothing, as cache.first has it; empty for none
        last: int64 [1], the column whose logits are wanted, for up to `rows` columns; those after it hold anything
        """
        wanted = tokens.shape[1] - 1
        if not past and not any(padding) and last is None:
            tokens = self._filled(tokens, cache)
        batch, columns = tokens.shape
        self._prepare(cache, past + columns)
        at_once = max(1, self.rows // columns)
        with torch.cuda.device(self._plan.embedding.get_device()):
            x = self._plan.embedding.new_empty(batch, self._plan.embedding.shape[1])
            for first in range(0, batch, at_once):
                some = slice(first, min(batch, first + at_once))
                for start in range(0, columns, self.rows):
                    part = tokens[some, start : start + self.rows].contiguous()
                    passed = _Prompt(cache, some, past + start, padding[some])
                    at = min(part.shape[1] - 1, wanted - start) if last is None else last
                    self._pass(part, passed, x[some], at)
            return self._logits(x)

    def _pass(self, tokens: Tensor, passed: _Prompt, x: Tensor, at: int | Tensor) -> None:
        """Tokens [rows, columns] through all layers; x becomes the normed stream of column `at`."""
        heads = self._heads(passed.cache)
        stream = self._embedded(tokens.view(-1))
        last, factor = self._layers(stream, lambda index, qkv: passed.attend(index, heads[index], qkv))
        self._norm(self._plan.norm, stream, last, factor, x, tokens.shape[1], at)

    def _filled(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Behind the prompt what the next steps overwrite, as far as the cache has room, for one pass."""
        columns = tokens.shape[1]
        more = -columns % EACH
        fits = columns > EACH and columns + more <= min(self.rows, cache.capacity)
        return torch.nn.functional.pad(tokens, (0, more)) if fits else tokens

    def _prepare(self, cache: KVCache, slots: int) -> None:
        """Buffers for keys and values, as the first forward of the model would make them."""
        for layer, part in zip(self._plan.layers, cache.parts, strict=True):
            if not part.buffers:
                like = self._plan.embedding.new_empty(1, layer.attention.key_heads, 0, layer.attention.head_dim)
                part.lazy_initialization(like, like)
        cache.grow(slots)

    def _heads(self, cache: KVCache) -> list[Heads]:
        tables = self.ropes.tables(cache.capacity)
        return [heads_of(layer.attention, tables) for layer in self._plan.layers]

    def _embedded(self, tokens: Tensor) -> Tensor:
        table = self._plan.embedding.detach()
        stream = torch.empty(len(tokens), table.shape[1], device=table.device)
        embed(table, stream, self._plan.embedding_factor)(tokens)(torch.cuda.current_stream().cuda_stream)
        return stream

    def _layers(self, stream: Tensor, attend: Attend) -> tuple[Tensor, float]:
        """What the last product gave, and by what factor it is still to join the stream."""
        y, factor = None, 0.0
        x = self._plan.embedding.new_empty(stream.shape)
        for index, (layer, weights) in enumerate(zip(self._plan.layers, self._weights, strict=True)):
            self._norm(layer.norm, stream, y, factor, x)
            y = _product(attend(index, _product(x, weights.qkv)), weights.output)
            self._norm(layer.mlp_norm, stream, y, layer.output_factor, x)
            y = _product(_gated(_product(x, weights.gate_up), layer.activation), weights.down)
            factor = layer.down_factor
        assert y is not None
        return y, factor

    def _norm(
        self,
        norm: Norm,
        stream: Tensor,
        y: Tensor | None,
        factor: float,
        x: Tensor,
        each: int = 1,
        at: int | Tensor = 0,
    ) -> None:
        add_and_norm(stream, y, factor, norm.weight, norm.epsilon, x, each, at)

    def _logits(self, x: Tensor) -> Tensor:
        """As the model's own head makes them."""
        logits: Tensor = self._plan.head(x)
        return logits if self._plan.head_factor == 1 else logits.float() * self._plan.head_factor


class _Prompt:
    """Where the tokens of a pass go: the rows `some` of a cache, from slot `past` on."""

    def __init__(self, cache: KVCache, some: slice, past: int, padding: Sequence[int]) -> None:
        self.cache, self._some, self._past, self._padding = cache, some, past, padding

    def attend(self, index: int, heads: Heads, qkv: Tensor) -> Tensor:
        """Keys and values of qkv [rows * columns, channels] put into the cache; [rows * columns, heads * head_dim]."""
        cache = self.cache
        keys, values = cache.keys(index)[self._some], cache.values(index)[self._some]
        place(qkv, heads, keys, values, cache.first[self._some], self._past)
        wide = heads.heads * heads.head_dim
        query = qkv[:, heads.query_at : heads.query_at + wide].view(len(keys), -1, heads.heads, heads.head_dim)
        end = self._past + query.shape[1]
        y = prompt_attention(
            query.transpose(1, 2),
            keys[:, :, :end],
            values[:, :, :end],
            heads.scale,
            cache.windows[index],
            self._padding,
        )
        return y.transpose(1, 2).reshape(len(qkv), wide)


def _product(x: Tensor, weight: Merged) -> Tensor:
    y = x.new_empty(len(x), weight.units.out_features)
    gemm(x, weight.units, weight.bias, y)
    return y


def _gated(projected: Tensor, activation: str) -> Tensor:
    out = projected.new_empty(len(projected), projected.shape[1] // 2)
    gate(projected, activation, out)
    return out


def heads_of(plan: Attention, tables: dict[int, Tensor]) -> Heads:
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
        _head_norm(plan.query_norm),
        _head_norm(plan.key_norm),
    )


def _interleaved(rope: Rope | None) -> bool:
    return rope is not None and rope.interleaved


def _head_norm(norm: Norm | None) -> HeadNorm | None:
    return HeadNorm(norm.weight.contiguous(), norm.epsilon) if norm else None
