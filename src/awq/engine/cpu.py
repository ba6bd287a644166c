"""A decode step on a CPU: the plan of a decoder run by as few torch operations as it takes.

At one token a model of 135M parameters spends half of its time between operations, not in them: linears that read one
input are one product, RoPE is a table, a norm five operations. The residual stream is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from awq.engine.fused.discover import discover
from awq.engine.fused.plan import ACTIVATIONS, Layer, Norm, Plan, Rope
from awq.linear import QuantLinear

if TYPE_CHECKING:
    from awq.engine.cache import KVCache

_BLOCK = 64  # output channels that the operator's layout keeps together: products are joined at multiples of it
Function = Callable[[Tensor], Tensor]


def cpu_step(model: Any) -> CpuStep | str:
    """The step of a quantized decoder on a CPU, or in a few words why there is none."""
    device: torch.device = model.get_input_embeddings().weight.device
    if device.type != "cpu":
        return f"it runs on CPUs, not on {device.type}"
    with torch.inference_mode(False):
        plan = discover(model)
        if isinstance(plan, str):
            return plan
        if plan.embedding.dtype != torch.bfloat16:
            return "activations are not bfloat16"
        linears = [each for layer in plan.layers for each in (*layer.qkv, layer.output, *layer.gate_up, layer.down)]
        if not all(isinstance(each, QuantLinear) and each.choice.kernel.name == "cpu" for each in linears):
            return "some linears do not run on the kernel 'cpu'"
        if any(each.choice.version == "GEMM" for each in linears if isinstance(each, QuantLinear)):
            return "version GEMM was asked for"
        return CpuStep(plan)


class CpuStep:
    """A `Step` for a few rows. Of the model it keeps tensors, its head and copies of its rotary modules."""

    tier, how, max_batch = 2, "fused step of torch operations", 8

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._head: Any = plan.head
        self._norm = _norm(plan.norm)
        self._layers = [_Layer(layer) for layer in plan.layers]
        self._turns: dict[int, _Turn] = {}

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """bfloat16 [batch, vocabulary]; see `Step`. In the plain state of the cache only."""
        plan, at = self._plan, positions[:, 0]
        stream = plan.embedding[tokens[:, 0]].float()
        if plan.embedding_factor != 1:
            stream *= plan.embedding_factor
        turns, masks = self._turned(at, cache.capacity), _masks(cache)
        for layer, part in zip(self._layers, cache.parts, strict=True):
            layer(stream, turns[layer.rope], masks.get(part.window), part)
        logits: Tensor = self._head(self._norm(stream))
        return logits if plan.head_factor == 1 else logits * plan.head_factor

    def _turned(self, at: Tensor, capacity: int) -> dict[int, tuple[Tensor, Tensor] | None]:
        """Cosines and sines of this step's positions for every kind of RoPE that there is, by its identity."""
        found: dict[int, tuple[Tensor, Tensor] | None] = {0: None}
        for layer in self._plan.layers:
            rope = layer.attention.rope
            if rope is None or id(rope) in found:
                continue
            turn = self._turns.get(id(rope))
            if turn is None or len(turn.cosine) < capacity:
                turn = self._turns[id(rope)] = _Turn(rope, layer.attention.head_dim, capacity)
            found[id(rope)] = turn.at(at)
        return found


class _Layer:
    """One layer as functions of its tensors."""

    def __init__(self, layer: Layer) -> None:
        self.heads = layer.attention
        self.rope = 0 if layer.attention.rope is None else id(layer.attention.rope)
        self.swap = None if layer.attention.rope is None else _swap(layer.attention.rope, layer.attention.head_dim)
        self.norm, self.mlp_norm = _norm(layer.norm), _norm(layer.mlp_norm)
        self.query_norm, self.key_norm = _norm(layer.attention.query_norm), _norm(layer.attention.key_norm)
        self.qkv, self.output = _product(layer.qkv), _product((layer.output,))
        self.gate_up, self.down = _product(layer.gate_up), _product((layer.down,))
        self.act = ACTIVATIONS[layer.activation]
        self.output_factor, self.down_factor = layer.output_factor, layer.down_factor

    def __call__(self, stream: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor | None, part: Any) -> None:
        """stream float32 [batch, width], added to in place; part: this layer's `KVLayer`."""
        y = self._attend(self.qkv(self.norm(stream)), turn, mask, part)
        stream.add_(self.output(y), alpha=self.output_factor)
        both = self.gate_up(self.mlp_norm(stream))
        half = both.shape[1] // 2
        stream.add_(self.down(self.act(both[:, :half]).mul_(both[:, half:])), alpha=self.down_factor)

    def _attend(self, qkv: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor | None, part: Any) -> Tensor:
        heads, batch = self.heads, len(qkv)
        width, count, key_count = heads.head_dim, heads.heads, heads.key_heads
        if heads.key_at == heads.query_at + count * width and self.query_norm is None:
            both = qkv[:, heads.query_at : heads.query_at + (count + key_count) * width].view(batch, -1, width)
            both = self._turn(both, turn)
            query, key = both[:, :count], both[:, count:]
        else:
            query = qkv[:, heads.query_at : heads.query_at + count * width].view(batch, count, width)
            key = qkv[:, heads.key_at : heads.key_at + key_count * width].view(batch, key_count, width)
            query, key = (
                self._turn(each if norm is None else norm(each), turn)
                for each, norm in ((query, self.query_norm), (key, self.key_norm))
            )
        value = qkv[:, heads.value_at : heads.value_at + key_count * width].view(batch, key_count, 1, width)
        keys, values = part.update(key.unsqueeze(2), value)
        grouped = query.reshape(batch, key_count, count // key_count, width)
        y = nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=heads.scale)
        return y.reshape(batch, count * width)

    def _turn(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        if turn is None or self.swap is None:
            return x
        return torch.addcmul(x * turn[0], self.swap(x), turn[1])


class _Turn:
    """RoPE as x * cosine + swap(x) * sine: tables bfloat16 [positions, head_dim], as the model's own forward has."""

    def __init__(self, rope: Rope, head_dim: int, count: int) -> None:
        table = rope.table(count)
        cosine, sine = table[..., 0], table[..., 1]
        if rope.interleaved:
            cosine, sine = cosine.repeat_interleave(2, -1), torch.stack([-sine, sine], -1).flatten(-2)
        else:
            cosine, sine = torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)
        rest = head_dim - cosine.shape[1]
        self.cosine = nn.functional.pad(cosine, (0, rest), value=1.0).to(torch.bfloat16)
        self.sine = nn.functional.pad(sine, (0, rest)).to(torch.bfloat16)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, 1, head_dim] each."""
        return self.cosine[positions].unsqueeze(1), self.sine[positions].unsqueeze(1)


def _swap(rope: Rope, head_dim: int) -> Function:
    """Each channel's partner in its place."""
    if rope.rotary == head_dim and not rope.interleaved:
        return lambda x: x.roll(head_dim // 2, -1)
    at = torch.arange(head_dim)
    if rope.interleaved:
        at[: rope.rotary] = at[: rope.rotary] ^ 1
    else:
        at[: rope.rotary] = at[: rope.rotary].roll(rope.rotary // 2)
    return lambda x: x.index_select(-1, at)


def _norm(norm: Norm | None) -> Any:
    """[batch, ..., width] of any dtype -> bfloat16."""
    if norm is None:
        return None
    weight, epsilon, width = norm.weight, norm.epsilon, len(norm.weight)

    def normed(x: Tensor) -> Tensor:
        if x.numel() == width:  # one row: its length is a number of Python's
            length = torch.linalg.vector_norm(x, dtype=torch.float32).item()
            return (x * weight).mul_((length * length / width + epsilon) ** -0.5).to(torch.bfloat16)
        scale = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32).square_().div_(width).add_(epsilon)
        y: Tensor = (x * scale.rsqrt_()).mul_(weight).to(torch.bfloat16)
        return y

    return normed


def _product(linears: Sequence[Any]) -> Function:
    """bfloat16 [batch, in_features] -> [batch, all their out_features], by one product where their layouts allow."""
    index = linears[0]._buffers.get("cpu_index")
    alike = all(
        each.spec.group_size == linears[0].spec.group_size and _same(each._buffers.get("cpu_index"), index)
        for each in linears
    )
    if not alike or any(each.out_features % _BLOCK for each in linears[:-1]):
        return lambda x: torch.cat([each(x) for each in linears], -1)
    codes = _joined(linears)
    scales = torch.cat([each.get_buffer("cpu_scales_and_zeros") for each in linears], 1)
    residual = None if index is None else torch.cat([each.get_buffer("cpu_residual") for each in linears], 1)
    bias = _bias(linears)
    group, width = linears[0].in_features // scales.shape[0], sum(each.out_features for each in linears)

    def product(x: Tensor) -> Tensor:
        y = torch._weight_int4pack_mm_for_cpu(x, codes, group, scales)
        if y.shape[1] != width:
            y = y[:, :width]
        if residual is not None and index is not None:
            y.add_(x.index_select(1, index).float() @ residual)
        return y if bias is None else y.add_(bias)

    return product


def _joined(linears: Sequence[Any]) -> Tensor:
    """Their codes in one tensor, of which each keeps its own as a view."""
    codes = [each.get_buffer("cpu_codes") for each in linears]
    if len(codes) == 1:
        only: Tensor = codes[0]
        return only
    joined, first = torch.cat(codes), 0
    for linear, own in zip(linears, codes, strict=True):
        linear._buffers["cpu_codes"] = joined[first : first + len(own)]
        first += len(own)
    return joined


def _bias(linears: Sequence[Any]) -> Tensor | None:
    found = [each._buffers["bias"] for each in linears]
    if all(bias is None for bias in found):
        return None
    zeros = (torch.zeros(each.out_features) for each in linears)
    parts = [zero if bias is None else bias.float() for bias, zero in zip(found, zeros, strict=True)]
    return torch.cat(parts).to(torch.bfloat16)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _masks(cache: KVCache) -> dict[int | None, Tensor]:
    """Where there is padding: per width of window what this step sees, bool [batch, 1, 1, slots]."""
    if not cache.padded:
        return {}
    end = cache.parts[0].length + 1
    firsts = {window: 0 if window is None else max(0, end - window) for window in cache.windows}
    seen = cache.mask[: cache.batch, :end].bool()[:, None, None]
    return {window: seen[..., first:] for window, first in firsts.items()}
