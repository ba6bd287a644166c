"""Several variants at once, each process with a bench of its own: a small model leaves most of a GPU idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context

from awq.config import EFFORTS
from benchmarks.ablation.measure import Bench
from benchmarks.ablation.table import Row
from benchmarks.ablation.variants import NO_TEXT, Variant

Work = Callable[[Bench, Variant], list[Row]]
_own: list[tuple[Bench, Work]] = []  # of a process that measures for another


@contextmanager
def each(jobs: int, bench: Bench, work: Work, wanted: Sequence[Variant]) -> Iterator[Iterator[list[Row]]]:
    """What `work` makes of each variant; by so many processes, if there are several, the longest first."""
    if jobs == 1:
        yield (work(bench, variant) for variant in wanted)
        return
    with get_context("spawn").Pool(jobs, _start, (bench, work)) as pool:
        yield pool.imap_unordered(_run, sorted(wanted, key=_effort, reverse=True))


def _start(bench: Bench, work: Work) -> None:
    _own[:] = [(bench, work)]


def _run(variant: Variant) -> list[Row]:
    (bench, work), *_ = _own
    return work(bench, variant)


def _effort(variant: Variant) -> int:
    config = variant.config
    return 1 + EFFORTS.index(config.effort) if config and variant.calibration != NO_TEXT and not variant.keep else 0
