"""The loop over a model's blocks: capture -> scale -> clip -> round -> outliers -> pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from awq.algorithm.deal import Measured, solve_dealt
from awq.algorithm.folded import is_alone, scale_group, undo_worse
from awq.algorithm.held import IN_MEMORY, Weights
from awq.algorithm.inputs.activations import Activations, ParkedList, ahead
from awq.algorithm.inputs.capture import Chunk, capture, enter_dealt, enter_model, lifted
from awq.algorithm.inputs.coverage import Counts, counted, every_expert, in_all
from awq.algorithm.inputs.precision import fast_matmul
from awq.algorithm.inputs.propagate import Propagation, enter_both, recorded, replaced_weights
from awq.algorithm.inputs.routing import recorded_routing
from awq.algorithm.inputs.stats import InputStats
from awq.algorithm.inputs.text import Text
from awq.algorithm.keep import channels_to_keep
from awq.algorithm.learn import learn
from awq.algorithm.passes import count_tokens, find_passes, input_sets
from awq.algorithm.ranks import here
from awq.algorithm.result import QuantizedLinear, Results, finish
from awq.algorithm.search.loops import PLAIN_LOOPS, Loops
from awq.algorithm.search.outliers import BlockOutput, Budget, keep_plainly
from awq.algorithm.search.solution import Linear, Linears, Losses, Solution, column_scales
from awq.algorithm.search.solve import solve, solve_propagated
from awq.config import QuantConfig
from awq.structure.blocks import PROBE_TOKENS, find_blocks
from awq.structure.groups import ScaleGroup, Structure, find_structure
from awq.structure.linears import linear_shape, shared_parameters
from awq.structure.siblings import Siblings
from awq.structure.stream import BLOCK, find_residuals

__all__ = ["QuantizedLinear", "quantize_blocks", "storage_dtype"]

STATS_BYTES = 16 << 30  # of statistics of one linear in all experts; above, they have one in common


def quantize_blocks(
    model: nn.Module,
    tokens: Tensor,
    config: QuantConfig,
    wanted: Callable[[str], bool],
    device: torch.device,
    loops: Loops = PLAIN_LOOPS,
) -> Iterator[tuple[str, Results]]:
    """Quantize block after block; yields the block's name and its results by full linear name.

    tokens: int64 [sequences, seq_len]. Norms and biases are changed in place as scales are folded; the linears keep
    their (scaled) float weights, for the caller to replace. `wanted(name)` says which linears to quantize; the others
    are scaled with their group and stay float. What the model uses in two places is left alone. `loops` are
    the inner loops of the search.
    """
    loop = BlockLoop(model, tokens, config, wanted, device, loops)
    for index in range(len(loop.blocks)):
        with loop.solved(index) as results:
            yield loop.name(index), results


class BlockLoop:
    """The blocks in turn, each of them solved, or replayed where an earlier run has solved it.

    chunks: this rank's calibration text behind the blocks that are done, in the float model and behind quantized blocks
    budget: of outlier channels; what the blocks that are done have left of it
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        config: QuantConfig,
        wanted: Callable[[str], bool],
        device: torch.device,
        loops: Loops = PLAIN_LOOPS,
        weights: Weights = IN_MEMORY,
        activations: Activations | None = None,
        stage: Callable[[str], AbstractContextManager[None]] = lambda _stage: nullcontext(),
    ) -> None:
        self.config, self.wanted, self.device, self.loops = config, wanted, device, loops
        self.weights, self.stage = weights, stage
        self.prefix, self.blocks = find_blocks(model)
        self.shared = shared_parameters(model)
        self.propagated = config.effort != "fast"
        self.budget = Budget(config.outlier_ratio)
        enter = enter_both if self.propagated else enter_dealt
        with torch.no_grad(), stage("read"), weights.enter():
            self.probe = enter_model(model, self.blocks, tokens[:1, :PROBE_TOKENS], device, weights)[0]
            self.chunks = enter(model, self.blocks, tokens, device, weights)
        self.activations = activations or Activations()
        for chunk in self.chunks:
            chunk.move(self.activations)

    def name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    @contextmanager
    def solved(self, index: int) -> Iterator[Results]:
        """The results of a block by full linear name, while it still is in float32 on the device."""
        block, name = self.blocks[index], self.name(index)
        with torch.no_grad(), ExitStack() as held:
            with self.stage("read"):
                held.enter_context(self.weights.block(index))
                origin, stored_in = next(block.parameters()).device, storage_dtype(block)
                held.enter_context(lifted(block, self.device))
            results = self._solve(block, index, stored_in)
            yield {f"{name}.{linear}": result.to(origin) for linear, result in results.items()}

    def replay(self, index: int, left: float, quantized: Callable[[], Mapping[str, Tensor] | None]) -> None:
        """Move on behind a block that is done.

        left: what it left of the budget. quantized, asked where both streams go on: its parameters as `solved` left
        them, by their name in it, those of quantized linears as the int4 alone has them; None on ranks but the first.
        """
        block, self.budget.left = self.blocks[index], left
        with torch.no_grad(), self.weights.block(index), lifted(block, self.device):
            inputs = ParkedList([chunk.parked for chunk in self.chunks])
            with every_expert(block, self.chunks), fast_matmul():
                for chunk in self.chunks:
                    chunk.hidden = chunk.run(index, block, chunk.hidden)
            if self._propagates(index):
                parameters = quantized()
                for name, value in block.named_parameters():
                    own = value.data if parameters is None else parameters[name].to(value.data)
                    value.data.copy_(here().hand_out(own.contiguous()))
                Propagation(block, index, self.chunks, inputs).advance()

    def checksum(self) -> int:
        """Of both streams on all ranks, to compare them bit by bit: the sum of their words."""
        streams = (part for chunk in self.chunks for part in (chunk.parked, chunk.behind) if part is not None)
        sums = [part.view(torch.int32).sum(dtype=torch.int64) for part in ahead(list(streams))]
        return sum(here().tell(sum(torch.stack(sums).tolist()) if sums else 0))

    def _propagates(self, index: int) -> bool:
        return self.propagated and self.probe.calls[index] is not None

    def _solve(self, block: nn.Module, index: int, stored_in: torch.dtype) -> Results:
        config, like = self.config, Siblings(block)
        with self.stage("capture"):
            structure, stats, counts, streams = _look(block, index, self.chunks, self.probe, self.propagated)
        linears = self._linears(block, index, stats)
        count_tokens(linears, like, counts)
        groups = [group for group in structure.groups if config.scale and is_alone(block, group, self.shared)]
        made = (scale_group(block, group, linears, like, config, stored_in, self.loops) for group in groups)
        folds = [folded for folded in made if folded]
        sets = input_sets(structure, linears)
        if not self._propagates(index):
            return _plainly(streams, sets, config, self.loops)
        left = self.budget.left
        with every_expert(block, self.chunks):
            while True:
                results, learning, losses = self._propagate(streams, find_passes(sets, like))
                if not undo_worse(folds, losses, block, linears):
                    break
                self.budget.left = left
                streams.done.clear()
        if learning:
            learning = _learn(streams, learning, groups, stored_in)
            output = _output_of(streams) if config.outlier_ratio else None
            for solution in learning:
                results |= finish(solution, self.budget.spend(solution, output), config)
        streams.advance()
        return results

    def _propagate(self, streams: Propagation, passes: list[list[Linears]]) -> tuple[Results, list[Solution], Losses]:
        """Pass after pass in the order of the data, each behind the linears that are quantized.

        A set is finished as it is solved, what was measured of it let go of, but where they go on to learn together.
        """
        for stats in {id(one.stats): one.stats for part in chain(*passes) for one in part.values()}.values():
            stats.move(self.activations)  # asked for again where a set falls back on them
        results, learning, losses = Results(), list[Solution](), Losses()
        for together in passes:
            for solution in _solved(streams, together, self.config, self.loops):
                losses |= solution.losses
                if self.config.effort == "max":
                    learning.append(solution)
                else:
                    results |= finish(solution, self.budget.spend(solution), self.config)
                del solution  # before the next is measured
        return results, learning, losses

    def _linears(self, block: nn.Module, index: int, stats: dict[str, InputStats]) -> Linears:
        """The linears to quantize, with what is known of their inputs."""
        return {
            name: Linear(module, stats.pop(name, None), self.config)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
            if self.wanted(f"{self.name(index)}.{name}") and id(module.weight) not in self.shared
        }


def _plainly(streams: Propagation, sets: list[Linears], config: QuantConfig, loops: Loops) -> Results:
    solutions = list(solve_dealt(sets, [None] * len(sets), config, lambda part, _: solve(part, config, loops)))
    results: Results = {}
    for channels in channels_to_keep(streams, solutions, config.outlier_ratio):
        results |= finish(one := solutions.pop(0), keep_plainly(one, channels), config)  # not held any longer
    return results


def _output_of(streams: Propagation) -> BlockOutput | None:
    """What judges a block's kept channels where its linears learned together; None without held-out text."""
    text = Text(streams)

    def loss_of(weights: Mapping[str, Tensor]) -> float:
        with replaced_weights(streams.block, streams.done):
            return text.loss(dict(weights))

    return BlockOutput(loss_of) if text.held_out else None


def _solved(streams: Propagation, sets: list[Linears], config: QuantConfig, loops: Loops) -> Iterator[Solution]:
    """One pass: the sets measured together, then solved."""

    def solve_one(part: Linears, measured: Measured) -> Solution:
        assert measured is not None
        return solve_propagated(part, *measured, config, loops)

    moments = streams.measure([column_scales(part) for part in sets])
    for solution in solve_dealt(sets, moments, config, solve_one):
        streams.done.update(solution.weights)
        yield solution


def _learn(
    streams: Propagation, solutions: list[Solution], groups: list[ScaleGroup], stored_in: torch.dtype
) -> list[Solution]:
    """The solutions after learning, measured anew; as they were where the block's output is no closer on held-out text,
    or a linear's is behind plain rounding's.
    """
    offsets = {"norm": 0.0, "norm_plus_one": 1.0}
    norms = {group.producer: offsets[group.kind] for group in groups if group.kind in offsets}
    measured = [solution for solution in solutions if solution.held_out is not None]
    coded = {name: one for solution in measured for name, one in solution.coded.items()}
    learned = learn(streams, coded, norms, stored_in)
    if learned is None:
        return solutions
    weights = {name: streams.block.get_parameter(f"{name}.weight").data for name in learned.norms}
    before, done = {name: weight.clone() for name, weight in weights.items()}, dict(streams.done)
    for name, weight in weights.items():
        weight.copy_(learned.norms[name])
    streams.done.update({name: one.weight for name, one in learned.coded.items()})
    with every_expert(streams.block, streams.chunks):
        moments = streams.measure([column_scales(solution.linears) for solution in measured])
    again = {
        id(solution): Solution(solution.linears, {name: learned.coded[name] for name in solution.coded}, *pair)
        for solution, pair in zip(measured, moments, strict=True)
    }
    if all(solution.beats_rounding for solution in again.values()):
        return [again.get(id(solution), solution) for solution in solutions]
    for name, weight in weights.items():
        weight.copy_(before[name])
    streams.done = done
    return solutions


def _look(
    block: nn.Module, index: int, chunks: list[Chunk], probe: Chunk, propagated: bool
) -> tuple[Structure, dict[str, InputStats], Counts, Propagation]:
    """The block's structure, its inputs' statistics, its experts' tokens, and both streams before it.

    The chunks move on to its output.
    """
    inputs = ParkedList([chunk.parked for chunk in chunks])
    probe.hidden = here().hand_out(
        inputs[0][:1, : probe.hidden.shape[1]].clone() if here().rank == 0 else torch.empty_like(probe.hidden)
    )

    def run() -> Tensor:
        return probe.run(index, block, probe.hidden)

    with fast_matmul(enabled=False):
        structure = find_structure(block, run)
        residuals = find_residuals(block, run, probe.hidden) if propagated else {}
    points = {names[0] for names in structure.input_sets}.union(residuals.values()) if propagated else set()
    like = Siblings(block)

    def share(name: str) -> str:
        columns = linear_shape(block.get_submodule(name)) or (0,)
        return like.role(name) if 4 * columns[0] ** 2 * len(like.numbers(name)) > STATS_BYTES else name

    with (
        every_expert(block, chunks),
        counted(block) as counts,
        fast_matmul(),
        recorded(block, points - {BLOCK}, activations=chunks[0].activations if chunks else None) as exact,
        recorded_routing(block) as routing,
    ):
        stats = capture(block, index, chunks, structure.input_sets, share)
    return structure, stats, in_all(counts), Propagation(block, index, chunks, inputs, exact, residuals, routing)


def storage_dtype(block: nn.Module) -> torch.dtype:
    """What the block's norms are stored in: their own half precision, float16 for a float32 model."""
    dtype = next(block.parameters()).dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
