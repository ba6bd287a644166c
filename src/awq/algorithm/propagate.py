"""Two streams through a block, the float model's and the one behind quantized linears, and what tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from awq.algorithm.capture import Chunk, Stop, enter_model, fast_matmul
from awq.algorithm.moments import Moments

# Every seventh sequence is held out: 7 is prime to the number of sources that take turns in the calibration text.
HELD_OUT = 7
TOLERANCE = 1e-3  # what float32 leaves of a linear's output in the difference of two points of the residual stream
BLOCK = ""  # the name of the block itself among its modules
Seen = dict[str, Tensor]


def enter_both(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, device: torch.device) -> list[Chunk]:
    """`enter_model`, with the sequences that are held out in chunks of their own; of a single one, none is."""
    held = torch.arange(len(tokens)) % HELD_OUT == HELD_OUT - 1
    if len(tokens) > 1 and not held.any():
        held[-1] = True
    chunks = enter_model(model, blocks, tokens[~held], device)
    for chunk in enter_model(model, blocks, tokens[held], device) if held.any() else ():
        chunk.held_out = True
        chunks.append(chunk)
    return chunks


class Propagation:
    """One block on its way: `done` holds the weights of the linears that are quantized, as the int4 alone has them."""

    def __init__(
        self, block: nn.Module, index: int, chunks: list[Chunk], inputs: list[Tensor], residuals: Mapping[str, str]
    ) -> None:
        """inputs: the block's input of each chunk in the float model. residuals: by linear, see `find_residuals`."""
        self.block, self.index = block, index
        self.chunks, self.inputs, self.residuals = chunks, inputs, residuals
        self.done: dict[str, Tensor] = {}

    def measure(self, sets: Sequence[tuple[str, ...]]) -> list[tuple[Moments, Moments]]:
        """For each set of linears that read one input: the moments to fit, and the held-out ones to judge by."""
        results = [(self._empty(names), self._empty(names)) for names in sets]
        all_fit = not any(chunk.held_out for chunk in self.chunks)
        with fast_matmul():
            for chunk, hidden in zip(self.chunks, self.inputs, strict=True):
                exact, seen = self._both(chunk, hidden, sets)
                for names, (fit, held) in zip(sets, results, strict=True):
                    self._add(held if chunk.held_out else fit, names, exact, seen, chunk.held_out or all_fit)
        for moments in (moments for pair in results for moments in pair):
            moments.finish()
        return [(fit, fit if all_fit else held) for fit, held in results]

    def advance(self) -> None:
        """Move the quantized stream on to the block's output."""
        with fast_matmul(), _weights(self.block, self.done):
            for chunk, hidden in zip(self.chunks, self.inputs, strict=True):
                before = hidden if chunk.quantized is None else chunk.quantized
                chunk.quantized = chunk.calls[self.index].run(self.block, before)

    def _empty(self, names: tuple[str, ...]) -> Moments:
        weight = self._weight(names[0])
        return Moments.empty(weight.shape[1], weight.device)

    def _weight(self, name: str) -> Tensor:
        weight = self.block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight.data

    def _both(self, chunk: Chunk, hidden: Tensor, sets: Sequence[tuple[str, ...]]) -> tuple[Seen, Seen]:
        """What the sets and the residual stream hold in the float model, and behind what is quantized."""
        names = {names[0] for names in sets}
        names |= {self.residuals[name] for one in sets for name in one if name in self.residuals}
        last = sets[0][0] if len(sets) == 1 else None
        exact = self._inputs_of(names, last, chunk, hidden)
        if chunk.quantized is None and not self.done:
            return exact, exact
        with _weights(self.block, self.done):
            return exact, self._inputs_of(names, last, chunk, hidden if chunk.quantized is None else chunk.quantized)

    def _inputs_of(self, names: set[str], last: str | None, chunk: Chunk, hidden: Tensor) -> Seen:
        """The first input of each module in `names`, [tokens, width]; nothing runs beyond the module `last`."""
        seen: Seen = {BLOCK: hidden.flatten(0, -2)} if BLOCK in names else {}

        def look(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                seen.setdefault(name, args[0].flatten(0, -2))
                if name == last:
                    raise Stop

            return hook

        with ExitStack() as hooks, suppress(Stop):
            for name in names - {BLOCK}:
                hooks.enter_context(self.block.get_submodule(name).register_forward_pre_hook(look(name)))
            chunk.calls[self.index].run(self.block, hidden)
        return seen

    def _add(self, moments: Moments, names: tuple[str, ...], exact: Seen, seen: Seen, judge: bool) -> None:
        x = seen.get(names[0])
        if x is None:
            return
        drift, lag = None, {}
        if exact is not seen and self._same_tokens(exact.get(names[0]), x):
            drift = exact[names[0]] - x
            lag = {
                name: exact[point] - seen[point] for name in names if (point := self.residuals.get(name)) is not None
            }
        moments.add(x, drift, lag)
        if judge:
            moments.add_missed({name: self._weight(name) for name in names}, drift, lag)

    def _same_tokens(self, exact: Tensor | None, x: Tensor) -> bool:
        """Whether the streams can be told apart row by row: an expert reads other tokens in each."""
        rows = {hidden.shape[:-1].numel() for hidden in self.inputs}
        return exact is not None and exact.shape == x.shape and len(x) in rows


@contextmanager
def _weights(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`block` with other weights in some of its linears."""
    modules = {name: block.get_submodule(name) for name in weights}
    originals = {name: module.weight for name, module in modules.items()}
    saved = {name: original.data for name, original in originals.items()}
    try:
        for name, weight in weights.items():
            originals[name].data = weight
        yield
    finally:
        for name, original in originals.items():
            original.data = saved[name]


def find_residuals(block: nn.Module, run: Callable[[], Tensor], hidden: Tensor) -> dict[str, str]:
    """The linears whose output is added to the residual stream as it is, and the module that reads it just before.

    run: one forward of `block` on `hidden`. Found by arithmetic: two tensors that modules read, or the block's input
    and output, differ by the linear's output.
    """
    width = hidden.shape[-1]
    points: list[tuple[str, Tensor]] = [(BLOCK, hidden.flatten(0, -2).clone())]
    outputs: list[tuple[str, int, Tensor]] = []

    def before(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].numel() == hidden.numel():
                points.append((name, args[0].reshape(-1, width).clone()))

        return hook

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.numel() == hidden.numel():
                outputs.append((name, len(points), output.reshape(-1, width).clone()))

        return hook

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if name and not any(True for _ in module.children()):
                hooks.enter_context(module.register_forward_pre_hook(before(name)))
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_hook(after(name)))
        points.append((BLOCK, run().reshape(-1, width)))
    found = ((name, _residual(points[:count], points[count:], output)) for name, count, output in outputs)
    return {name: point for name, point in found if point is not None}


def _residual(before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]], output: Tensor) -> str | None:
    """The first point before the linear from which `output` leads to one after it."""
    tolerance = TOLERANCE * output.norm()
    for name, earlier in before:
        if any(bool((later - earlier - output).norm() <= tolerance) for _, later in after):
            return name
    return None
