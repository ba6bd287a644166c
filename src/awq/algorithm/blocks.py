"""The loop over a model's blocks: capture -> scale -> clip -> round -> outliers -> pack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from awq.algorithm.capture import Chunk, InputStats, capture, enter_model, fast_matmul, lifted
from awq.algorithm.groups import ScaleGroup, Structure, find_structure, fold
from awq.algorithm.learn import learn
from awq.algorithm.outliers import Budget, keep_plainly
from awq.algorithm.propagate import Propagation, enter_both, recorded
from awq.algorithm.result import QuantizedLinear, Results, finish
from awq.algorithm.rounding import PLAIN_LOOP, ColumnLoop
from awq.algorithm.scale import search_scale
from awq.algorithm.solution import Linear, Linears, Solution, column_scales
from awq.algorithm.solve import plain, solve, solve_propagated
from awq.algorithm.stream import find_residuals
from awq.config import QuantConfig
from awq.errors import UnsupportedModelError
from awq.linears import linear_shape

__all__ = ["QuantizedLinear", "find_blocks", "quantize_blocks", "storage_dtype"]

PROBE_TOKENS = 32
MAX_PASSES = 8  # of a block; where more sets of linears wait for their input (experts), one pass serves them all


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks that holds most of the model's linear weights, and its name."""

    def weights(blocks: nn.ModuleList) -> int:
        return sum(math.prod(linear_shape(module) or (0,)) for module in blocks.modules())

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = max(lists, key=lambda item: weights(item[1]), default=None)
    if found is None or not weights(found[1]):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks with linear layers, so there is nothing to quantize."
        )
    return found


def quantize_blocks(
    model: nn.Module,
    tokens: Tensor,
    config: QuantConfig,
    wanted: Callable[[str], bool],
    device: torch.device,
    columns: ColumnLoop = PLAIN_LOOP,
) -> Iterator[tuple[str, Results]]:
    """Quantize block after block; yields the block's name and its results by full linear name.

    tokens: int64 [sequences, seq_len]. Norms and biases are changed in place as scales are folded; the linears keep
    their (scaled) float weights, for the caller to replace. `wanted(name)` says which linears to quantize; the others
    are scaled with their group and stay float. `columns` is the inner loop of compensated rounding.
    """
    prefix, blocks = find_blocks(model)
    propagated = config.effort != "fast"
    budget = Budget(config.outlier_ratio)
    with torch.no_grad():
        probe = enter_model(model, blocks, tokens[:1, :PROBE_TOKENS], device)[0]
        chunks = (enter_both if propagated else enter_model)(model, blocks, tokens, device)
        for index, block in enumerate(blocks):
            name = f"{prefix}.{index}"
            origin = next(block.parameters()).device
            stored_in = storage_dtype(block)
            with lifted(block, device):
                structure, stats, streams = _look(block, index, chunks, probe, propagated)
                linears = {
                    linear: Linear(module, stats.get(linear), config)
                    for linear, module in block.named_modules()
                    if isinstance(module, nn.Linear) and wanted(f"{name}.{linear}")
                }
                if config.scale:
                    for group in structure.groups:
                        _scale_group(block, group, linears, config, stored_in)
                sets = _sets(structure, linears)
                if propagated:
                    results = _behind_quantized(streams, sets, structure, config, columns, stored_in, budget)
                else:
                    results = _plainly(sets, config)
            yield name, {f"{name}.{linear}": result.to(origin) for linear, result in results.items()}


def _plainly(sets: list[Linears], config: QuantConfig) -> Results:
    results: Results = {}
    for solution in (solve(part, config) for part in sets):
        results |= finish(solution, keep_plainly(solution, config.outlier_ratio), config)
    return results


def _behind_quantized(
    streams: Propagation,
    sets: list[Linears],
    structure: Structure,
    config: QuantConfig,
    columns: ColumnLoop,
    stored_in: torch.dtype,
    budget: Budget,
) -> Results:
    """The results of a block whose inputs come through what is quantized already."""
    solutions = _propagate(streams, sets, config, columns)
    if config.effort == "max":
        solutions = _learn(streams, solutions, structure, stored_in)
    streams.advance()
    results: Results = {}
    for solution in solutions:
        results |= finish(solution, budget.spend(solution), config)
    return results


def _propagate(streams: Propagation, sets: list[Linears], config: QuantConfig, columns: ColumnLoop) -> list[Solution]:
    """Set after set in the order of the data, each behind those that are quantized."""
    solutions = []
    passes = [[part] for part in sets] if len(sets) <= MAX_PASSES else [sets]
    for together in passes:
        moments = streams.measure([column_scales(part) for part in together])
        solved = [solve_propagated(part, *pair, config, columns) for part, pair in zip(together, moments, strict=True)]
        for solution in solved:
            streams.done.update(solution.weights)
        solutions += solved
    return solutions


def _learn(
    streams: Propagation, solutions: list[Solution], structure: Structure, stored_in: torch.dtype
) -> list[Solution]:
    """The solutions after learning, measured anew; as they were where the block's output is no closer on held-out text,
    or a linear's is behind plain rounding's.
    """
    offsets = {"norm": 0.0, "norm_plus_one": 1.0}
    norms = {group.producer: offsets[group.kind] for group in structure.groups if group.kind in offsets}
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


def _sets(structure: Structure, linears: Linears) -> list[Linears]:
    """The linears to quantize, those that read one input together, in order of execution; unreached ones alone."""
    reached = {name for names in structure.input_sets for name in names}
    unreached = ((name,) for name in linears if name not in reached)
    sets = ({name: linears[name] for name in names if name in linears} for names in (*structure.input_sets, *unreached))
    return [part for part in sets if part]


def _look(
    block: nn.Module, index: int, chunks: list[Chunk], probe: Chunk, propagated: bool
) -> tuple[Structure, dict[str, InputStats], Propagation]:
    """The block's structure, its inputs' statistics, and both streams before it; the chunks move on to its output."""
    inputs = [chunk.hidden for chunk in chunks]
    probe.hidden = inputs[0][:1, : probe.hidden.shape[1]].clone()

    def run() -> Tensor:
        return probe.calls[index].run(block, probe.hidden)

    with fast_matmul(enabled=False):
        structure = find_structure(block, run)
        residuals = find_residuals(block, run, probe.hidden) if propagated else {}
    points = {names[0] for names in structure.input_sets}.union(residuals.values()) if propagated else ()
    with fast_matmul(), recorded(block, points) as exact:
        stats = capture(block, index, chunks, structure.input_sets)
    return structure, stats, Propagation(block, index, chunks, inputs, exact, residuals)


def storage_dtype(block: nn.Module) -> torch.dtype:
    """What the block's norms are stored in: their own half precision, float16 for a float32 model."""
    dtype = next(block.parameters()).dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def _scale_group(
    block: nn.Module, group: ScaleGroup, linears: Linears, config: QuantConfig, stored_in: torch.dtype
) -> None:
    consumers = [linears[name] for name in group.consumers if name in linears]
    if not consumers or not all(consumer.usable for consumer in consumers):
        return
    weights = [consumer.weight for consumer in consumers]
    scale = search_scale(weights, consumers[0].stats, lambda w: plain(w, config), group.reduce, group.expand)
    if scale is None:
        return
    applied = fold(block, group, scale, stored_in)
    stats = consumers[0].stats.rescaled(applied)
    for consumer in consumers:
        consumer.scale_input(applied, stats, group.producer)
    if group.producer in linears:
        group.rows(linears[group.producer].row_scale).mul_(scale.view(group.parts, -1))
