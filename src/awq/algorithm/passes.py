"""The linears of a block in the order of the data: which read one input, and which of these are measured together."""

from __future__ import annotations

from collections.abc import Iterator

from awq.algorithm.inputs.coverage import Counts
from awq.algorithm.search.solution import Linears
from awq.structure.groups import Structure
from awq.structure.siblings import Siblings

MAX_PASSES = 8  # of a block; where more sets of linears wait for their input, one pass serves them all
PASS_BYTES = 4 << 30  # of moments in one pass; it decides how many passes experts take, and nothing of the result


def input_sets(structure: Structure, linears: Linears) -> list[Linears]:
    """The linears to quantize, those that read one input together, in order of execution; unreached ones alone."""
    reached = {name for names in structure.input_sets for name in names}
    unreached = ((name,) for name in linears if name not in reached)
    found = (*structure.input_sets, *unreached)
    parts = ({name: linears[name] for name in names if name in linears} for names in found)
    return [part for part in parts if part]


def count_tokens(linears: Linears, like: Siblings, counts: Counts) -> None:
    """Note how many tokens each expert's linears are given."""
    for name, linear in linears.items():
        if place := like.place(name):
            linear.in_expert, linear.tokens = True, counts[place[0]][place[1]]


def find_passes(sets: list[Linears], like: Siblings) -> list[list[Linears]]:
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
        width = next(iter(part.values())).weight.shape[1]
        needed = 8 * width * (width + sum(len(one.weight) for one in part.values()))  # two Moments in float32
        if group and size + needed > limit:
            yield group
            group, size = [], 0
        group.append(part)
        size += needed
    yield group
