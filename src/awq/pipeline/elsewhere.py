"""A run that one of several processes writes, the first: it keeps the journal, and tells the others what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from awq.algorithm.ranks import here
from awq.checkpoint.journal import Entry
from awq.checkpoint.output import unfinished
from awq.pipeline.run import Run, Solved, Target, reports
from awq.storage.stored import Stored


class Elsewhere:
    """A run as the processes know it that do not write.

    done: its entries, told at the start; behind them the blocks that were solved since
    """

    def __init__(self, done: list[Entry]) -> None:
        self.done = done

    @property
    def linears(self) -> dict[str, Any]:
        return reports(self.done)

    def add(self, solved: Solved) -> None:
        linears = {name: result.report for name, result in solved.results.items()}
        self.done.append({"block": solved.name, "linears": linears})

    def parameters(self, _index: int, _device: torch.device) -> None:
        """The first process hands them out."""


@contextmanager
def open_run(target: Target, stored: Stored, identity: Mapping[str, Any]) -> Iterator[Run | Elsewhere]:
    """`Run.open` in the first process; in the others what it tells of it."""
    if here().rank == 0:
        with Run.open(target, stored, identity) as run:
            here().tell(run.done)
            yield run
        return
    try:
        yield Elsewhere(here().tell(None)[0])
    finally:
        _leave(unfinished(target.path))


def _leave(folder: Path) -> None:
    """Activations may have been in files here, on a machine where nothing else is; they had no names."""
    with suppress(OSError):
        folder.rmdir()
