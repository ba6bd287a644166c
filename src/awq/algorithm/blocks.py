"""The loop over a model's blocks: capture -> scale -> clip -> round -> outliers -> pack."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from awq.algorithm.capture import Chunk, InputStats, capture, enter_dealt, enter_model, fast_matmul, lifted
from awq.algorithm.coverage import Counts, counted, every_expert, in_all
from awq.algorithm.deal import Measured, solve_dealt
from awq.algorithm.find import PROBE_TOKENS, find_blocks
from awq.algorithm.folded import Folded
from awq.algorithm.groups import ScaleGroup, Structure, find_structure
from awq.algorithm.learn import learn
from awq.algorithm.outliers import Budget, keep_plainly
from awq.algorithm.propagate import Propagation, enter_both, recorded
from awq.algorithm.ranks import here
from awq.algorithm.result import QuantizedLinear, Results, finish
from awq.algorithm.rounding import PLAIN_LOOP, ColumnLoop
from awq.algorithm.routing import recorded_routing
from awq.algorithm.scale import Consumer, search_scale
from awq.algorithm.siblings import Siblings
from awq.algorithm.solution import Linear, Linears, Solution, column_scales
from awq.algorithm.solve import plain, solve, solve_propagated
from awq.algorithm.stream import find_residuals
from awq.config import QuantConfig
from awq.linears import linear_shape, shared_parameters

__all__ = ["QuantizedLinear", "find_blocks", "quantize_blocks", "storage_dtype"]

MAX_PASSES = 8  # of a block; where more sets of linears wait for their input, one pass serves them all
PASS_BYTES = 4 << 30  # of moments in one pass; it decides how many passes experts take, and nothing of the result
STATS_BYTES = 16 << 30  # of statistics of one linear in all experts; above, they have one in common


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
    are scaled with their group and stay float. What the model uses in two places is left alone. `columns` is the inner
    loop of compensated rounding.
    """
    prefix, blocks = find_blocks(model)
    shared = shared_parameters(model)
    propagated = config.effort != "fast"
    budget = Budget(config.outlier_ratio)
    with torch.no_grad():
        probe = enter_model(model, blocks, tokens[:1, :PROBE_TOKENS], device)[0]
        chunks = (enter_both if propagated else enter_dealt)(model, blocks, tokens, device)
        for index, block in enumerate(blocks):
            name = f"{prefix}.{index}"
            origin = next(block.parameters()).device
            stored_in = storage_dtype(block)
            with lifted(block, device):
                like = Siblings(block)
                structure, stats, counts, streams = _look(block, index, chunks, probe, propagated)
                linears = {
                    linear: Linear(module, stats.pop(linear, None), config)
                    for linear, module in block.named_modules()
                    if isinstance(module, nn.Linear) and wanted(f"{name}.{linear}") and id(module.weight) not in shared
                }
                _count(linears, like, counts)
                groups = [group for group in structure.groups if config.scale and _alone(block, group, shared)]
                made = (_scale_group(block, group, linears, like, config, stored_in) for group in groups)
                folds = [folded for folded in made if folded]
                sets = _sets(structure, linears)
                if propagated and probe.calls[index]:
                    with every_expert(block, chunks):
                        solutions = _propagate(streams, _passes(sets, like), config, columns)
                        while _undone(folds, solutions, block, linears):
                            streams.done.clear()
                            solutions = _propagate(streams, _passes(sets, like), config, columns)
                    if config.effort == "max":
                        solutions = _learn(streams, solutions, groups, stored_in)
                    streams.advance()
                    results = _finished(solutions, config, budget)
                else:
                    results = _plainly(sets, config)
            yield name, {f"{name}.{linear}": result.to(origin) for linear, result in results.items()}


def _plainly(sets: list[Linears], config: QuantConfig) -> Results:
    results: Results = {}
    for solution in solve_dealt(sets, [None] * len(sets), config, lambda part, _: solve(part, config)):
        results |= finish(solution, keep_plainly(solution, config.outlier_ratio), config)
    return results


def _finished(solutions: list[Solution], config: QuantConfig, budget: Budget) -> Results:
    results: Results = {}
    for solution in solutions:
        results |= finish(solution, budget.spend(solution), config)
    return results


def _propagate(
    streams: Propagation, passes: list[list[Linears]], config: QuantConfig, columns: ColumnLoop
) -> list[Solution]:
    """Pass after pass in the order of the data, each behind the linears that are quantized."""

    def solve_one(part: Linears, measured: Measured) -> Solution:
        assert measured is not None
        return solve_propagated(part, *measured, config, columns)

    solutions: list[Solution] = []
    for together in passes:
        moments = streams.measure([column_scales(part) for part in together])
        solved = list(solve_dealt(together, moments, config, solve_one))
        for solution in solved:
            streams.done.update(solution.weights)
        solutions += solved
    return solutions


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


def _undone(folds: list[Folded], solutions: list[Solution], block: nn.Module, linears: Linears) -> bool:
    """Take back the folds under which held-out text finds a linear worse than rounded plainly; whether there were."""
    losses = {name: both for solution in solutions for name, both in solution.losses.items()}
    worse = [made for made in folds if made.is_worse(losses)]
    for made in worse:
        made.undo(block, linears)
        folds.remove(made)
    return bool(worse)


def _passes(sets: list[Linears], like: Siblings) -> list[list[Linears]]:
    """The sets that are measured at once: one, or the same one in as many experts as PASS_BYTES hold."""
    roles: dict[str, list[Linears]] = {}
    for part in sets:
        roles.setdefault(like.role(next(iter(part))), []).append(part)
    merged = list(roles.values()) if len(roles) <= MAX_PASSES else [sets]
    return [group for together in merged for group in _within(together, PASS_BYTES)]


def _within(sets: list[Linears], limit: int) -> Iterator[list[Linears]]:
    group: list[Linears] = []
    size = 0
    for part in sets:
        needed = 16 * next(iter(part.values())).weight.shape[1] ** 2  # two Moments of two float32 matrices
        if group and size + needed > limit:
            yield group
            group, size = [], 0
        group.append(part)
        size += needed
    yield group


def _count(linears: Linears, like: Siblings, counts: Counts) -> None:
    """Note how many tokens each expert's linears are given."""
    for name, linear in linears.items():
        if place := like.place(name):
            linear.in_expert, linear.tokens = True, counts[place[0]][place[1]]


def _sets(structure: Structure, linears: Linears) -> list[Linears]:
    """The linears to quantize, those that read one input together, in order of execution; unreached ones alone."""
    reached = {name for names in structure.input_sets for name in names}
    unreached = ((name,) for name in linears if name not in reached)
    sets = ({name: linears[name] for name in names if name in linears} for names in (*structure.input_sets, *unreached))
    return [part for part in sets if part]


def _look(
    block: nn.Module, index: int, chunks: list[Chunk], probe: Chunk, propagated: bool
) -> tuple[Structure, dict[str, InputStats], Counts, Propagation]:
    """The block's structure, its inputs' statistics, its experts' tokens, and both streams before it.

    The chunks move on to its output.
    """
    inputs = [chunk.hidden for chunk in chunks]
    probe.hidden = here().hand_out(
        inputs[0][:1, : probe.hidden.shape[1]].clone() if here().rank == 0 else torch.empty_like(probe.hidden)
    )

    def run() -> Tensor:
        return probe.run(index, block, probe.hidden)

    with fast_matmul(enabled=False):
        structure = find_structure(block, run)
        residuals = find_residuals(block, run, probe.hidden) if propagated else {}
    points = {names[0] for names in structure.input_sets}.union(residuals.values()) if propagated else ()
    like = Siblings(block)

    def share(name: str) -> str:
        columns = linear_shape(block.get_submodule(name)) or (0,)
        return like.role(name) if 4 * columns[0] ** 2 * len(like.numbers(name)) > STATS_BYTES else name

    with (
        every_expert(block, chunks),
        counted(block) as counts,
        fast_matmul(),
        recorded(block, points) as exact,
        recorded_routing(block) as routing,
    ):
        stats = capture(block, index, chunks, structure.input_sets, share)
    return structure, stats, in_all(counts), Propagation(block, index, chunks, inputs, exact, residuals, routing)


def storage_dtype(block: nn.Module) -> torch.dtype:
    """What the block's norms are stored in: their own half precision, float16 for a float32 model."""
    dtype = next(block.parameters()).dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def _alone(block: nn.Module, group: ScaleGroup, shared: Collection[int]) -> bool:
    """Whether a fold of `group` changes nothing that the model uses elsewhere too."""
    modules = map(block.get_submodule, (group.producer, *group.consumers))
    return not any(id(parameter) in shared for module in modules for parameter in module.parameters())


def _scale_group(
    block: nn.Module,
    group: ScaleGroup,
    linears: Linears,
    like: Siblings,
    config: QuantConfig,
    stored_in: torch.dtype,
) -> Folded | None:
    reached = [name for name in group.consumers if name in linears and linears[name].stats.tokens]
    if not all(linears[name].usable for name in reached):
        return None
    consumers = [
        Consumer(linear.weight, linear.stats, max(linear.tokens, 1), like.role(name))
        for name, linear in ((name, linears[name]) for name in reached)
    ]
    scale = search_scale(consumers, lambda w: plain(w, config), group.reduce, group.expand)
    return None if scale is None else Folded.into(block, group, scale, linears, stored_in)
