"""Linears that read one input, to codes on their grids."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from awq.algorithm.inputs.moments import RIDGES, Moments
from awq.algorithm.inputs.precision import fast_matmul
from awq.algorithm.search.affine import Affine
from awq.algorithm.search.clip import search_clip
from awq.algorithm.search.loops import PLAIN_LOOPS, Loops
from awq.algorithm.search.refit import refit_scales
from awq.algorithm.search.rounding import ColumnLoop, Rounded, round_compensated
from awq.algorithm.search.solution import Coded, Judge, Linear, Linears, Losses, Solution, full_range
from awq.config import QuantConfig

Judges = dict[str, Judge]


def solve(linears: Linears, config: QuantConfig, loops: Loops = PLAIN_LOOPS) -> Solution:
    """effort="fast": plain rounding on clipped ranges, by the input in the float model."""
    return Solution(linears, {name: _round_plainly(linear, config, loops) for name, linear in linears.items()})


def solve_propagated(
    linears: Linears, fit: Moments, held_out: Moments, config: QuantConfig, loops: Loops = PLAIN_LOOPS
) -> Solution:
    """Compensated rounding of the corrected weight, by the input behind quantized linears.

    Where the weight as it was, or plain rounding, do better on held-out text, that is taken.
    """
    if not (fit.usable and held_out.usable and all(linear.usable for linear in linears.values())):
        return solve(linears, config, loops)
    judges = {name: Judge(name, linear, held_out) for name, linear in linears.items()}
    coded, losses = _compensate(judges, fit, config, loops)
    return Solution.measured(linears, coded, fit, held_out, losses)


def _compensate(judges: Judges, fit: Moments, config: QuantConfig, loops: Loops) -> tuple[dict[str, Coded], Losses]:
    """The best that held-out text finds among compensated, clipped and plain rounding, by linear."""
    targets = _targets(judges, fit)
    grids = {name: _clipped(target, fit.gram, config, loops) for name, target in targets.items()}
    coded: dict[str, Coded] = {}
    losses: Losses = {}
    learned = config.effort == "max"
    compensated = _rounded(targets, grids, fit.gram, loops.columns, learned)
    for name, judge in judges.items():
        weight, target, grid = judge.linear.weight, targets[name], grids[name]
        pairs = (target, grid), (weight, full_range(weight, config))
        trials = [Coded.plainly(*pair, learned) for pair in pairs]
        if name in compensated:
            codes, unrounded = compensated[name]
            trials.insert(0, Coded(grid, codes, target, unrounded, "compensated"))
        loss, best = _least([(judge(trial.decode()), trial) for trial in trials])
        if config.refit:
            refitted = _refitted(best, fit.gram, loops)
            loss, best = _least([(judge(refitted.decode()), refitted), (loss, best)])
        coded[name] = replace(best, corrected=not torch.equal(best.target, weight))
        losses[name] = loss, judge(judge.linear.rounded)
    return coded, losses


def _least(trials: list[tuple[float, Coded]]) -> tuple[float, Coded]:
    """The trial of the lowest loss, the first of equals."""
    return min(trials, key=lambda trial: trial[0])


def _targets(judges: Judges, fit: Moments) -> dict[str, Tensor]:
    """The weights to round: corrected with the ridge that is closest on held-out text, or as they are.

    Weaker corrections are tried as long as one of the linears gains by them.
    """
    weights = {name: judge.linear.weight for name, judge in judges.items()}
    best = dict(weights)
    losses = {name: judge.unchanged for name, judge in judges.items()}
    corrections = fit.corrections(weights, RIDGES)
    for ridge in RIDGES:
        with fast_matmul(enabled=False):
            trials = next(corrections)
        trial_losses = {name: judges[name](trial) for name, trial in trials.items()}
        better = [name for name, loss in trial_losses.items() if loss < losses[name]]
        best |= {name: trials[name] for name in better}
        losses |= {name: trial_losses[name] for name in better}
        if not better and ridge != RIDGES[0]:
            break
    return best


def _rounded(
    targets: dict[str, Tensor], grids: dict[str, Affine], gram: Tensor, columns: ColumnLoop, learned: bool
) -> dict[str, Rounded]:
    """Compensated codes by linear, all solved as one; none where the Gram matrix does not allow it."""
    joined = Affine(
        torch.cat([grid.scales for grid in grids.values()]),
        torch.cat([grid.zeros for grid in grids.values()]),
        next(iter(grids.values())).bits,
    )
    weights = list(targets.values())
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    together = round_compensated(weight, gram, joined, columns, learned)
    if together is None:
        return {}
    rows = [len(target) for target in targets.values()]
    unrounded = [None] * len(rows) if together.unrounded is None else together.unrounded.split(rows)
    return dict(zip(targets, map(Rounded, together.codes.split(rows), unrounded), strict=True))


def _round_plainly(linear: Linear, config: QuantConfig, loops: Loops) -> Coded:
    if not linear.usable:
        return Coded.plainly(linear.weight, full_range(linear.weight, config))
    coded = Coded.plainly(linear.weight, _clipped(linear.weight, linear.stats.gram, config, loops))
    return _refitted(coded, linear.stats.gram, loops) if config.refit else coded


def _refitted(coded: Coded, gram: Tensor, loops: Loops) -> Coded:
    return replace(coded, grid=refit_scales(coded.target, coded.codes, coded.grid, gram, loops))


def _clipped(weight: Tensor, gram: Tensor, config: QuantConfig, loops: Loops) -> Affine:
    if not config.clip:
        return full_range(weight, config)
    return search_clip(weight, gram, config.group_size or -1, config.bits, config.zero_point, loops)
