"""The processes that quantize together: what each takes of text and work, so that no bit depends on how many they are.

Chunks of text go round LANES lanes, each lane is summed by one process in order, and the sums are added in the order of
the lanes. Work on a matrix is cut into slabs of rows by its shape alone: a product of fewer rows may sum differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, groupby, pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

LANES = 8
SLAB = 1 << 22  # weights at least; on an H200 less does not fill the GPU

T = TypeVar("T")


class Ranks:
    """All processes, as one of them sees them. This is a world of one; with others, all of them make the same calls."""

    rank, size = 0, 1

    def tell(self, value: Any) -> list[Any]:
        """What every rank told, of what JSON knows, in order of the ranks."""
        return [value]

    def hand_out(self, tensor: Tensor, source: int = 0) -> Tensor:
        """`tensor`, contiguous, once it is what it was on rank `source`."""
        return tensor

    def gather(self, out: Tensor, rows: Mapping[int, slice]) -> None:
        """Have in `out`, contiguous, all of its rows, which lie in order of the ranks that have them."""

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add every rank's `part` to `total` in the order of the ranks; for all of it, `complete` comes last."""
        total += part

    def complete(self, total: Tensor) -> None:
        """Have all of what was added."""


ALONE = Ranks()
_here: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def here() -> Ranks:
    """The processes that share what is being done: this one alone, where nobody said `among`."""
    return _here.get()


@contextmanager
def among(ranks: Ranks) -> Iterator[Ranks]:
    token = _here.set(ranks)
    try:
        yield ranks
    finally:
        _here.reset(token)


def mine(numbers: Sequence[int]) -> list[int]:
    """Those of the numbered chunks that this rank takes, lane by lane."""
    ranks = here()
    own = (number for number in numbers if number % LANES % ranks.size == ranks.rank)
    return sorted(own, key=lambda number: (number % LANES, number))


def rounds(items: Iterable[T], number: Callable[[T], int]) -> Iterator[Iterator[T]]:
    """This rank's items lane by lane, in every round one of its lanes; `number` is that of an item's chunk."""
    ranks = here()
    lanes = [first + ranks.rank for first in range(0, LANES, ranks.size)]
    return in_turn(items, lambda item: number(item) % LANES, lanes)


def in_turn(items: Iterable[T], key: Callable[[T], int], keys: Iterable[int]) -> Iterator[Iterator[T]]:
    """The items of each key in turn, read when they are asked for; they lie in the order of the keys."""
    groups = groupby(items, key)
    found = next(groups, None)
    for expected in keys:
        if found and found[0] == expected:
            yield found[1]
            found = next(groups, None)
        else:
            yield iter(())


class Sums(Protocol):
    """Sums over `tokens` tokens."""

    tokens: float

    def tensors(self) -> list[Tensor]: ...


def fold(totals: Sequence[Sums], parts: Sequence[Sums]) -> None:
    """Add what the lanes of a round have summed to the totals, in order, and empty it."""
    ranks = here()
    counts = ranks.tell([part.tokens for part in parts])
    for index, (total, part) in enumerate(zip(totals, parts, strict=True)):
        if any(count[index] for count in counts):
            for into, value in zip(total.tensors(), part.tensors(), strict=True):
                ranks.add(into, value)
                value.zero_()
        for count in counts:
            total.tokens += count[index]
        part.tokens = 0


def slabs(weight: Tensor) -> list[slice]:
    """The rows of a matrix in 1, 2, 4 or 8 equal parts, none below SLAB weights."""
    count = 1
    while count < LANES and weight.numel() >= 2 * count * SLAB:
        count *= 2
    bounds = [len(weight) * part // count for part in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def by_rows(weight: Tensor, work: Callable[[slice], Tensor], out: Tensor) -> Tensor:
    """What `work` makes of all rows of `weight`, given some at a time; each rank takes some, `out` is to hold them."""
    parts = slabs(weight)
    return work(parts[0]) if len(parts) == 1 else share(parts, own_rows(weight, work, out))


def own_rows(weight: Tensor, work: Callable[[slice], Tensor], out: Tensor) -> Tensor:
    """`by_rows` for this rank alone: the other rows of `out` stay as they are."""
    for part in taken(slabs(weight)):
        out[part] = work(part)
    return out


def row_sums(weights: Sequence[Tensor], work: Callable[[int, slice], Tensor]) -> Tensor:
    """For each of the matrices, the sum of what `work`, given its place and some rows, makes of each row."""
    units = [(place, part) for place, weight in enumerate(weights) for part in slabs(weight)]
    sizes = [part.stop - part.start for _, part in units]
    bounds = [0, *accumulate(sizes)]
    flat = [slice(*pair) for pair in pairwise(bounds)]
    out = weights[0].new_empty(bounds[-1])
    own = {part.start for part in taken(flat)}
    for unit, part in zip(units, flat, strict=True):
        if part.start in own:
            out[part] = work(*unit)
    rows = share(flat, out).split([len(weight) for weight in weights])
    return torch.stack([some.sum() for some in rows])


def taken(parts: Sequence[slice]) -> list[slice]:
    """This rank's slabs, which lie beside each other; a single one is everybody's, faster than it is handed out."""
    ranks = here()
    return [part for number, part in enumerate(parts) if len(parts) == 1 or _owner(number, parts) == ranks.rank]


def share(parts: Sequence[slice], out: Tensor) -> Tensor:
    """`out`, contiguous, with the rows that other ranks have taken."""
    if here().size > 1 and len(parts) > 1:
        owners = groupby(enumerate(parts), lambda numbered: _owner(numbered[0], parts))
        runs = {owner: [part for _, part in run] for owner, run in owners}
        here().gather(out, {owner: slice(run[0].start, run[-1].stop) for owner, run in runs.items()})
    return out


def _owner(number: int, parts: Sequence[slice]) -> int:
    return number * here().size // len(parts)


def by_turns(works: Sequence[Callable[[], Tensor]], like: Tensor) -> Iterator[Tensor]:
    """What each of `works` makes, of the shape of `like`; as many at once, ahead of the asking, as there are ranks."""
    ranks = here()
    for first in range(0, len(works), ranks.size):
        group = works[first : first + ranks.size]
        own = [work() if number == ranks.rank else torch.empty_like(like) for number, work in enumerate(group)]
        for source in range(len(own)):
            yield ranks.hand_out(own.pop(0), source)  # not held any longer
