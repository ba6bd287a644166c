"""Calls that rotate over copies of a weight, each reading what the one before wrote, and checks of their results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from awq.bench.kernels.shapes import Shape

Weight = TypeVar("Weight")
# x float32 [rows, in_features] -> y float32 [rows, out_features]
Reference = Callable[[Tensor], Tensor]

# After so many calls the first input comes again. A random matrix of a few hundred channels and one scale for 64 of
# them may let values grow by a sixth a call: 32 calls stay far from float16's limits.
_LINKS = 32


class Calls(Protocol):
    """What can be timed and checked: call `i` of a series, each on the next copy of the weight."""

    copies: int

    def step(self, i: int) -> object: ...

    def check(self) -> float:
        """The worst relative error of calls on the first and the last copy."""
        ...

    def check_after(self, calls: int) -> float:
        """The same once a series of `calls` calls is through."""
        ...


class Chain(Generic[Weight]):
    """`multiply(x, weight, y)` writes y: the engine's way, where each linear reads what a kernel just wrote.

    Two buffers of rows * max(N, K) elements take turns. A call writes y [rows, N] at the start of one, and the next
    reads x [rows, K] from there: for K > N the random numbers behind y too.
    """

    def __init__(
        self,
        multiply: Callable[[Tensor, Weight, Tensor], object],
        weights: Sequence[Weight],
        reference: Reference,
        shape: Shape,
        x: Tensor,
    ) -> None:
        self.copies = len(weights)
        self._multiply, self._weights, self._reference = multiply, weights, reference
        n, k = shape.out_features, shape.in_features
        buffers = torch.randn(2, x.shape[0] * max(n, k), device=x.device).to(x.dtype)
        self._first = x
        self._inputs = [buffer[: x.shape[0] * k].view(-1, k) for buffer in buffers]
        self._outputs = [buffer[: x.shape[0] * n].view(-1, n) for buffer in buffers]

    def step(self, i: int) -> None:
        self._multiply(self._input(i), self._weights[i % self.copies], self._outputs[(i + 1) % 2])

    def check(self) -> float:
        errors = []
        expected, y = self._reference(self._first.float()), self._outputs[0]
        for copy in {0, self.copies - 1}:
            y.fill_(math.nan)
            self._multiply(self._first, self._weights[copy], y)
            errors.append(relative_error(y, expected))
        return worst(*errors)

    def check_after(self, calls: int) -> float:
        """Also of the last call of the series, whose input and output are still there."""
        last = relative_error(self.output_after(calls), self._reference(self._input(calls - 1).float()))
        return worst(last, self.check())

    def output_after(self, calls: int) -> Tensor:
        """What the last of `calls` calls wrote; the next call but one overwrites it."""
        output: Tensor = self._outputs[calls % 2]
        return output

    def poison(self) -> None:
        """NaN where outputs go: a series that leaves one element unwritten ends in NaN."""
        for output in self._outputs:
            output.fill_(math.nan)

    def _input(self, i: int) -> Tensor:
        return self._first if i % _LINKS == 0 else self._inputs[i % 2]


class Fresh:
    """Functions of x that return a new y, as other projects' kernels do: every call reads the same x."""

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]], reference: Reference, x: Tensor) -> None:
        self.copies = len(functions)
        self._functions, self._reference, self._x = functions, reference, x

    def step(self, i: int) -> Tensor:
        return self._functions[i % self.copies](self._x)

    def check(self) -> float:
        expected = self._reference(self._x.float())
        errors = []
        for copy in {0, self.copies - 1}:
            del_me = torch.full(expected.shape, math.nan, dtype=self._x.dtype, device=self._x.device)
            del del_me  # the allocator hands this memory out again: what the kernel does not write is NaN
            errors.append(relative_error(self._functions[copy](self._x), expected))
        return worst(*errors)

    def check_after(self, calls: int) -> float:
        return self.check()


def relative_error(y: Tensor, expected: Tensor) -> float:
    """||y - expected|| / ||expected||; NaN where y has a value that is not finite, or another shape."""
    if y.shape != expected.shape:
        return math.nan
    found = y.float()
    error = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
    return error if math.isfinite(error) else math.nan


def worst(*errors: float) -> float:
    """The largest, and NaN before all."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)
