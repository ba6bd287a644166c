"""What a model is made of, from one forward of it: every part is found by what it did to numbers, none by its name.

A decoder layer of the common kind calls four sets of linears: query, key and value; output; gate and up; down. Each is
accepted only if the rest of the layer, as the fused step would compute it, gives what the model had there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq.engine.fused.heads import find_heads, ropes_of
from awq.engine.fused.norms import as_rms_norm, close
from awq.engine.fused.observe import AttentionCall, LinearCall, NormCall, Observed, observe
from awq.engine.fused.plan import ACTIVATIONS, Layer, Norm, Plan, Rope
from awq.engine.head import Int8Head

# Of the norm: what half precision and float32 leave between the model's order of rounding and another.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.float32: 1e-4}


_FAILED = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)


class Other(Exception):
    """The model is of another kind; the message says where, in a few words."""


@dataclass(frozen=True)
class Set:
    """The linears that read one tensor, in order of their calls; outputs side by side [tokens, channels]."""

    calls: tuple[LinearCall, ...]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(call.module for call in self.calls)

    @property
    def input(self) -> Tensor:
        return self.calls[0].input

    @property
    def output(self) -> Tensor:
        return torch.cat([call.output for call in self.calls], -1)


def discover(model: Any) -> Plan | str:
    """The plan of `model`, or in a few words why it has none."""
    try:
        return _plan(model, observe(model))
    except Other as reason:
        return str(reason)
    except _FAILED as error:  # what a model raises whose attention is not called as it is observed
        return f"its forward could not be observed ({next(iter(str(error).splitlines()), type(error).__name__)})"


def _plan(model: Any, seen: Observed) -> Plan:
    if not seen.attentions:
        raise Other("its attention is not called through transformers' interface")
    *sets, last = _sets(seen.linears)
    if len(sets) != 4 * len(seen.attentions):
        raise Other("its layers have other linears than query, key and value, output, gate and up, down")
    embedding = model.get_input_embeddings().weight.detach()
    stream = embedding[seen.tokens]
    finder = _Finder(seen, ropes_of(seen), TOLERANCE.get(embedding.dtype, 1e-4))
    layers, embedding_factor = [], 1.0
    for index, attention in enumerate(seen.attentions):
        layer, start, stream = finder.layer(sets[4 * index : 4 * index + 4], attention, stream)
        if index == 0:
            embedding_factor = finder.factor(start, torch.zeros_like(start), embedding[seen.tokens], "the embedding")
        layers.append(layer)
    head = model.get_output_embeddings()
    if last.modules != (head,) or not isinstance(head, nn.Linear | Int8Head):
        raise Other("the last of its linears is not its head alone, float or int8")
    norm, before = finder.norm(last.input)
    finder.check(before, stream, "the input of its last norm")
    head_factor = finder.factor(seen.logits, torch.zeros_like(seen.logits), last.output, "its logits")
    return Plan(embedding, embedding_factor, tuple(layers), norm, head, head_factor)


def _sets(calls: list[LinearCall]) -> list[Set]:
    """Calls that follow one another and read the same numbers."""
    sets: list[list[LinearCall]] = []
    for call in calls:
        if sets and _same_tensor(sets[-1][-1].input, call.input):
            sets[-1].append(call)
        else:
            sets.append([call])
    return [Set(tuple(each)) for each in sets]


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()


@dataclass
class _Finder:
    seen: Observed
    ropes: list[tuple[Rope, Tensor]]
    tolerance: float

    def layer(self, sets: list[Set], attention: AttentionCall, stream: Tensor) -> tuple[Layer, Tensor, Tensor]:
        """The layer, the stream that it starts from as the model has it, and the stream behind it."""
        qkv, output, gate_up, down = sets
        if not qkv.calls[-1].order < attention.order < output.calls[0].order:
            raise Other("its attention does not lie between the projections of one layer")
        norm, start = self.norm(qkv.input)
        if stream.shape != start.shape:
            raise Other("its stream is not as wide as the embedding")
        heads = find_heads(self.seen, self.ropes, attention, qkv.output, qkv.calls[0].order, self.tolerance)
        if isinstance(heads, str):
            raise Other(heads)
        self.check(output.input, attention.output, "the input of its output projection")
        mlp_norm, middle = self.norm(gate_up.input)
        output_factor = self.factor(middle, start, self.single(output), "the stream behind attention")
        activation, gate_up = self.gate(gate_up, down.input)
        end = self.next_stream(down.calls[0].order)
        down_factor = self.factor(end, middle, self.single(down), "the stream behind the MLP")
        layer = Layer(
            norm,
            qkv.modules,
            heads,
            output.modules[0],
            output_factor,
            mlp_norm,
            gate_up.modules,
            activation,
            down.modules[0],
            down_factor,
        )
        return layer, start, end

    def single(self, linears: Set) -> Tensor:
        if len(linears.calls) > 1:
            raise Other("several linears read the result of its attention or of its gate")
        return linears.output

    def next_stream(self, order: int) -> Tensor:
        """What the next norm of the stream reads."""
        call = next((call for call in self.seen.norms if call.order > order), None)
        if call is None:
            raise Other("there is no norm before its head")
        return _rows(call.input)

    def norm(self, output: Tensor) -> tuple[Norm, Tensor]:
        """The RMSNorm that gave `output`, and what it read."""
        for call in reversed(self.seen.norms):
            if _rows(call.output).shape == output.shape and torch.equal(_rows(call.output), output):
                return self.rms_norm(call), _rows(call.input)
        raise Other("what its projections read does not come straight from a norm with one weight")

    def rms_norm(self, call: NormCall) -> Norm:
        norm = as_rms_norm(call.module, call.width, call.input.device)
        if norm is None:
            raise Other("its norms are no RMSNorm")
        self.check(_rows(call.output), norm(_rows(call.input)), "its norm")
        return norm

    def gate(self, linears: Set, product: Tensor) -> tuple[str, Set]:
        """The activation, and the linears with the gate before what it multiplies."""
        orders = [linears, Set(linears.calls[::-1])] if len(linears.calls) == 2 else [linears]
        for order in orders:
            if order.output.shape[-1] != 2 * product.shape[-1]:
                break
            gate, up = order.output.float().chunk(2, -1)
            for name, activation in ACTIVATIONS.items():
                if self.same(product, activation(gate) * up):
                    return name, order
        raise Other("its MLP is not act(gate) * up with SiLU or GELU")

    def factor(self, result: Tensor, before: Tensor, y: Tensor, what: str) -> float:
        """f, with result = before + f y."""
        result, before, y = result.float(), before.float(), y.float()
        if result.shape != y.shape:
            raise Other(f"{what} is of another shape than what it is made of")
        if self.same(result, before + y):
            return 1.0
        found = float(((result - before) * y).sum() / y.square().sum())
        if not math.isfinite(found):
            raise Other(f"{what} is not finite")
        self.check(result, before + found * y, what)
        return found

    def same(self, found: Tensor, wanted: Tensor) -> bool:
        return close(found, wanted, self.tolerance)

    def check(self, found: Tensor, wanted: Tensor, what: str) -> None:
        if not self.same(found, wanted):
            raise Other(f"{what} is not made as in other decoders")


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
