"""Two streams through a block, the float model's and the one behind quantized linears, and what tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from awq.algorithm.held import IN_MEMORY, Weights
from awq.algorithm.inputs.activations import Activations, ParkedList, ahead
from awq.algorithm.inputs.capture import Chunk, enter_dealt, in_chunks
from awq.algorithm.inputs.moments import Moments, missing
from awq.algorithm.inputs.precision import cast_once, fast_matmul, operand
from awq.algorithm.inputs.routing import replayed_routing
from awq.algorithm.ranks import LANES, fold, here, in_turn, rounds
from awq.structure.probe import Stop
from awq.structure.siblings import Siblings
from awq.structure.stream import BLOCK

# Every seventh sequence is held out: 7 is prime to the number of sources that take turns in the calibration text.
HELD_OUT = 7
Seen = dict[str, Tensor]


def enter_both(
    model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, device: torch.device, weights: Weights = IN_MEMORY
) -> list[Chunk]:
    """`enter_dealt`, with the sequences that are held out in chunks of their own; of a single one, none is."""
    held = torch.arange(len(tokens)) % HELD_OUT == HELD_OUT - 1
    if len(tokens) > 1 and not held.any():
        held[-1] = True
    chunks = enter_dealt(model, blocks, tokens[~held], device, weights)
    first = len(in_chunks(tokens[~held]))
    for chunk in enter_dealt(model, blocks, tokens[held], device, weights, first) if held.any() else ():
        chunk.held_out = True
        chunks.append(chunk)
    return sorted(chunks, key=lambda chunk: chunk.number % LANES)


@contextmanager
def recorded(
    block: nn.Module, names: Collection[str], last: str | None = None, activations: Activations | None = None
) -> Iterator[Any]:
    """For every run of `block`, the first input of each module in `names`, [tokens, width]; `last` ends the run.

    Of a module in an expert it is all inputs, the tokens that the expert is given behind those of a sample, which are
    multiplied by the root of their weight. What was seen is kept in `activations`, if any.
    """
    runs: Any = activations.list() if activations else []
    like = Siblings(block)

    def start(_module: nn.Module, args: tuple[Any, ...]) -> None:
        runs.append({BLOCK: args[0].flatten(0, -2)} if BLOCK in names else {})

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, seen = _as_read(module, args[0].flatten(0, -2)), runs[-1]
            if (weight := like.weight(name)) != 1:
                x = x * weight**0.5
            seen[name] = torch.cat([seen[name], x]) if name in seen and like.place(name) else seen.get(name, x)
            if name == last:
                raise Stop

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(block.register_forward_pre_hook(start))
        for name in set(names) - {BLOCK}:
            hooks.enter_context(block.get_submodule(name).register_forward_pre_hook(look(name)))
        yield runs


@dataclass
class Propagation:
    """One block on its way.

    inputs:    the block's input of each chunk in the float model
    exact:     by chunk, what `recorded` saw there of the linears' inputs and of the residual stream, before any fold;
               what the block itself is given are `inputs`
    residuals: by linear that writes to the residual stream, the module that reads it just before
    routing:   by chunk, the experts of each token in the float model
    done:      the weights of the linears that are quantized, as the int4 alone has them
    """

    block: nn.Module
    index: int
    chunks: list[Chunk]
    inputs: ParkedList
    exact: Iterable[Mapping[str, Tensor]] = ()
    residuals: Mapping[str, str] = field(default_factory=dict)
    routing: list[dict[str, Any]] = field(default_factory=list)
    done: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def like(self) -> Siblings:
        return Siblings(self.block)

    def __post_init__(self) -> None:
        told = here().tell([shape[:-1].numel() for shape in self.inputs.shapes])
        self.everything = {count for counts in told for count in counts}  # the numbers of tokens in a chunk

    def measure(self, sets: Sequence[Mapping[str, Tensor]]) -> list[tuple[Moments, Moments]]:
        """For each set of linears that read one input, the moments to fit, and the held-out ones to judge by.

        A set holds, by linear, what its columns have been multiplied by in folds.
        """
        all_fit = not any(here().tell(any(chunk.held_out for chunk in self.chunks)))
        results = {held_out: [self._empty(scales) for scales in sets] for held_out in (False, True)}
        lane = [self._empty(scales) for scales in sets]
        runs = zip(self.entering(), enumerate(self.exact), self.routing, strict=True)
        with fast_matmul(), replaced_weights(self.block, self.done), cast_once(self.block):
            weights = [{name: operand(self._weight(name)) for name in scales} for scales in sets]
            for together in rounds(runs, lambda run: run[0][0].number):
                parts = in_turn(together, lambda run: run[0][0].held_out, results)
                for (held_out, totals), part in zip(results.items(), parts, strict=True):
                    for (chunk, before), recording, routing in part:
                        exact = partial(self._exact, *recording)
                        with replayed_routing(self.block, routing):
                            seen = self._run(chunk, before, sets)
                        for moments, scales, own in zip(lane, sets, weights, strict=True):
                            if (x := seen.get(next(iter(scales)))) is not None:
                                missed = self._missing(x, scales, own, exact, seen)
                                count = self.like.count(next(iter(scales)), len(x), before.shape[:-1].numel())
                                moments.add(x, missed, held_out or all_fit, count)
                    fold(totals, lane)
        for moments in (*results[False], *results[True]):
            moments.finish()
        return list(zip(results[False], results[not all_fit], strict=True))

    def advance(self) -> None:
        """Move the quantized stream on to the block's output, its last use."""
        self.exact = ()  # that there is room
        with fast_matmul(), replaced_weights(self.block, self.done), cast_once(self.block):
            for chunk, before in self.entering():
                chunk.quantized = chunk.run(self.index, self.block, before)

    def entering(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Each chunk with what the block is given behind quantized blocks."""
        for index, chunk in enumerate(self.chunks):
            following = range(index, min(index + 2, len(self.chunks)))
            yield chunk, next(ahead([self.chunks[at].behind or self.inputs.items[at] for at in following]))

    def _run(self, chunk: Chunk, before: Tensor, sets: Sequence[Mapping[str, Tensor]]) -> Seen:
        """What the sets and the residual stream hold behind what is quantized; nothing runs beyond a single set."""
        firsts = [next(iter(scales)) for scales in sets]
        points = {self.residuals[name] for scales in sets for name in scales if name in self.residuals}
        last = firsts[0] if len(firsts) == 1 and not self.like.place(firsts[0]) else None
        runs: list[Seen]
        with recorded(self.block, points.union(firsts), last) as runs, suppress(Stop):
            chunk.run(self.index, self.block, before)
        return runs[0]

    def _missing(
        self,
        x: Tensor,
        scales: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        exact: Callable[[str], Tensor | None],
        seen: Seen,
    ) -> dict[str, Tensor]:
        """`missing` of a set's linears, whose input is `x`; nothing where the streams do not compare row by row."""
        first, scale = next(iter(scales.items()))
        before = exact(first)
        if before is None or before.shape != x.shape or not self._same_tokens(first, x):
            return {}
        drift = operand(before / scale - x)

        def lag(name: str) -> Tensor | None:
            point = self.residuals.get(name)
            true = None if point is None else exact(point)
            return None if point is None or true is None else true - seen[point]

        return {name: missing(weight, drift, lag(name)) for name, weight in weights.items()}

    def _exact(self, index: int, recording: Mapping[str, Tensor], name: str) -> Tensor | None:
        return self.inputs[index].flatten(0, -2) if name == BLOCK else recording.get(name)

    def _empty(self, scales: Mapping[str, Tensor]) -> Moments:
        scale = next(iter(scales.values()))
        return Moments.empty(len(scale), scale.device, {name: len(self._weight(name)) for name in scales})

    def _weight(self, name: str) -> Tensor:
        weight = self.block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight.data

    def _same_tokens(self, name: str, x: Tensor) -> bool:
        """Whether a linear reads the same tokens in each stream: all of them, or those of the replayed routing."""
        return len(x) in self.everything or self.like.routed(name)


def _as_read(module: nn.Module, x: Tensor) -> Tensor:
    """`x` in the dtype that `module` multiplies it in."""
    halved = isinstance(module, nn.Linear) and torch.is_autocast_enabled(x.device.type)
    return x.to(torch.get_autocast_dtype(x.device.type)) if halved else x


@contextmanager
def replaced_weights(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
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
