"""The calibration text before a block, as learning reads it: chunk by chunk, wherever the chunks are."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten

from awq.algorithm.inputs.capture import Call
from awq.algorithm.inputs.precision import fast_matmul
from awq.algorithm.inputs.propagate import Propagation
from awq.algorithm.ranks import here

Weights = dict[str, Tensor]


class Text:
    """The chunks before a block, by number: this rank's with what the block is given, and where the others are.

    fit: chunks of one size, so that a CUDA graph serves them all
    """

    def __init__(self, streams: Propagation) -> None:
        self.block, self.index = streams.block, streams.index
        self.entering = {pair[0].number: pair for pair in streams.entering()}
        own = [[number, chunk.held_out, list(x.shape)] for number, (chunk, x) in self.entering.items()]
        found = sorted((*one, rank) for rank, ones in enumerate(here().tell(own)) for one in ones)
        self.owners = {number: rank for number, _, _, rank in found}
        self.held_out = [number for number, held_out, _, _ in found if held_out]
        self.fit = [number for number, held_out, shape, _ in found if not held_out and shape == found[0][2]]

    def loss(self, weights: Weights) -> float:
        """Of the block with `weights` in it, on held-out text."""
        own: dict[int, tuple[float, int]] = {}
        for number in self.held_out:
            if number in self.entering:
                chunk, x = self.entering[number]
                with fast_matmul(enabled=False):
                    mean = distance(self.block, chunk.call(self.index), x, chunk.hidden, weights)
                own[number] = float(mean), len(x)
        told = {int(number): pair for ones in here().tell(own) for number, pair in ones.items()}
        means, counts = zip(*(told[number] for number in self.held_out), strict=True)
        return float(sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts))


class Batch:
    """A chunk in tensors that stay where they are; its item is a call, its input and the wanted output."""

    def __init__(self, text: Text) -> None:
        self.index = text.index
        self.fit = {number: text.entering[number] for number in text.fit if number in text.entering}
        self.input, self.target = Tensor(), Tensor()
        self.call = Call((), {})
        for chunk, x in list(self.fit.values())[:1]:
            self.input, self.target = torch.empty_like(x), torch.empty_like(chunk.hidden)

    @property
    def uniform(self) -> bool:
        """Whether every chunk is called alike, so that one call serves all."""
        calls = (chunk.call(self.index) for chunk, _ in self.fit.values())
        flat = [tree_flatten((call.args, call.kwargs)) for call in calls]
        return all(spec == flat[0][1] and all(map(_equal, leaves, flat[0][0])) for leaves, spec in flat)

    def load(self, number: int) -> bool:
        """Whether the chunk is this rank's; it then is the item."""
        if number not in self.fit:
            return False
        chunk, x = self.fit[number]
        self.call = chunk.call(self.index)
        self.input.copy_(x)
        self.target.copy_(chunk.hidden)
        return True

    @property
    def item(self) -> tuple[Call, Tensor, Tensor]:
        return self.call, self.input, self.target


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and (one is other or one == other)


def distance(block: nn.Module, call: Call, x: Tensor, target: Tensor, weights: Weights) -> Tensor:
    """The mean squared distance of the block's output to the float model's, with `weights` in it."""
    named = {f"{name}.weight": weight for name, weight in weights.items()}
    run = partial(_with_weights, block, named)
    return (call.run(run, x) - target).square().mean()


def _with_weights(block: nn.Module, weights: Weights, *args: object, **kwargs: object) -> object:
    return functional_call(block, weights, args, kwargs)
