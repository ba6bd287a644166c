"""The same linears in many experts: each rank solves some of the experts by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from awq.algorithm.inputs.moments import Moments
from awq.algorithm.ranks import ALONE, among, here
from awq.algorithm.search.affine import Affine
from awq.algorithm.search.solution import Coded, Linear, Linears, Solution
from awq.config import QuantConfig

Measured = tuple[Moments, Moments] | None  # to fit and to judge by; None where the float model's statistics serve
Solve = Callable[[Linears, Measured], Solution]


def solve_dealt(
    sets: Sequence[Linears], moments: Sequence[Measured], config: QuantConfig, solve: Solve
) -> Iterator[Solution]:
    """`solve` of each set with its moments: one for each rank at a time in experts, any other by all ranks."""
    for places in _together(sets):
        if len(places) == 1:
            yield solve(sets[places[0]], moments[places[0]])
        else:
            yield from _dealt([sets[place] for place in places], [moments[place] for place in places], config, solve)


def _together(sets: Sequence[Linears]) -> Iterator[list[int]]:
    """The sets by their places, as many in experts as there are ranks."""
    group: list[int] = []
    for place, part in enumerate(sets):
        in_expert = next(iter(part.values())).in_expert
        if group and (not in_expert or len(group) == here().size):
            yield group
            group = []
        if in_expert:
            group.append(place)
        else:
            yield [place]
    if group:
        yield group


def _dealt(
    sets: Sequence[Linears], moments: Sequence[Measured], config: QuantConfig, solve: Solve
) -> Iterator[Solution]:
    rank, own = here().rank, None
    if rank < len(sets):
        with among(ALONE):
            own = solve(sets[rank], moments[rank])
            own.losses  # noqa: B018  it is cached
    words = here().tell(own and _word(own))
    for owner, (part, pair) in enumerate(zip(sets, moments, strict=True)):
        yield _handed_out(own if owner == rank else None, words[owner], owner, part, pair, config)


def _word(solution: Solution) -> dict[str, Any]:
    """What of a solution is no tensor."""
    return {
        "measured": solution.fit is not None,
        "losses": solution.losses,
        "coded": {
            name: [coded.rounding, coded.corrected, coded.unrounded is not None]
            for name, coded in solution.coded.items()
        },
    }


def _handed_out(
    solution: Solution | None,
    word: dict[str, Any],
    owner: int,
    part: Linears,
    moments: Measured,
    config: QuantConfig,
) -> Solution:
    """The solution on every rank; it is on its owner."""
    coded = {}
    for name, (rounding, corrected, learned) in word["coded"].items():
        own = _tensors(solution.coded[name]) if solution else _empty(part[name], config, learned)
        scales, zeros, codes, *unrounded = (here().hand_out(tensor.contiguous(), owner) for tensor in own[1:])
        target = here().hand_out(own[0].contiguous(), owner) if corrected else part[name].weight
        grid = Affine(scales, zeros, config.bits)
        coded[name] = Coded(grid, codes, target, next(iter(unrounded), None), rounding, corrected)
    losses = {name: (loss, rounding) for name, (loss, rounding) in word["losses"].items()}
    fit, held_out = moments if moments and word["measured"] else (None, None)
    return Solution.measured(part, coded, fit, held_out, losses)


def _tensors(coded: Coded) -> list[Tensor]:
    unrounded = [] if coded.unrounded is None else [coded.unrounded]
    return [coded.target, coded.grid.scales, coded.grid.zeros, coded.codes, *unrounded]


def _empty(linear: Linear, config: QuantConfig, learned: bool) -> list[Tensor]:
    """Room for `_tensors`; `learned`: with what was unrounded."""
    weight, size = linear.weight, config.group_size or -1
    grid = weight.new_empty(len(weight), 1 if size == -1 else weight.shape[1] // size)
    unrounded = [torch.empty_like(weight)] if learned else []
    return [torch.empty_like(weight), grid, grid.clone(), torch.empty_like(weight, dtype=torch.uint8), *unrounded]
