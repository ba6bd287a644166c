"""effort="balanced" without some of its parts: without all propagation, without targets, without the residual term."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

from torch import Tensor

from awq.algorithm.inputs import moments
from awq.algorithm.inputs.moments import Moments
from awq.algorithm.inputs.propagate import Propagation

Measured = list[tuple[Moments, Moments]]


@contextmanager
def _float_inputs() -> Iterator[None]:
    """Every linear is fitted to what it reads in the float model."""
    measure = Propagation.measure

    def measure_exact(self: Propagation, sets: Sequence[Mapping[str, Tensor]]) -> Measured:
        self.done.clear()
        return measure(self, sets)

    with patch.object(Propagation, "measure", measure_exact), patch.object(Propagation, "advance", lambda self: None):
        yield


@contextmanager
def _own_targets() -> Iterator[None]:
    """A linear is fitted to what its own weight gives for the input behind quantized linears."""
    measure = Propagation.measure

    def measure_without_targets(self: Propagation, sets: Sequence[Mapping[str, Tensor]]) -> Measured:
        results = measure(self, sets)
        for fit, _ in results:
            for wanted in fit.wanted.values():
                wanted.zero_()
        return results

    with patch.object(Propagation, "measure", measure_without_targets):
        yield


STEPS: dict[str | None, Callable[[], AbstractContextManager[object]]] = {
    None: nullcontext,
    "float inputs": _float_inputs,
    "own targets": _own_targets,
    "no residual": lambda: patch.object(moments, "RESIDUAL", 0.0),
}
