"""How far a long task is: a bar on a terminal, a plain line every tenth of the way in a log. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress(Protocol):
    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more steps are done; `note` names the last one."""


@contextmanager
def track(description: str, total: int, enabled: bool = True) -> Iterator[Progress]:
    """Report a task of `total` steps, with the time that passed and that remains; nothing when not `enabled`."""
    if not enabled:
        yield _Silent()
    elif sys.stderr.isatty():
        with _rich_bar() as bar:
            yield _Bar(bar, bar.add_task(description, total=total, note=""))
    else:
        yield _Lines(description, total)


class _Silent:
    def advance(self, n: int = 1, note: str = "") -> None:
        pass


class _Bar:
    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, n: int = 1, note: str = "") -> None:
        self._bar.update(self._task, advance=n, note=note)


class _Lines:
    def __init__(self, description: str, total: int) -> None:
        self._description, self._total = description, total
        self._done = 0
        self._start = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        before, self._done = self._done, self._done + n
        if self._tenths(self._done) > self._tenths(before):
            print(self._line(note), file=sys.stderr, flush=True)

    def _tenths(self, done: int) -> int:
        return 10 * done // max(self._total, 1)

    def _line(self, note: str) -> str:
        elapsed = time.monotonic() - self._start
        remaining = elapsed / max(self._done, 1) * max(self._total - self._done, 0)
        label = f" {note}" if note else ""
        return f"{self._description}: {self._done}/{self._total}{label}, {elapsed:.0f} s, about {remaining:.0f} s left"


def _rich_bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=Console(stderr=True),
    )
