"""Up to how many rows GEMV is the faster version on the GPU at hand: measured once, then remembered in a file.

<cache folder>/crossover/rows.json    {"NVIDIA H200, driver 580.65.06, kernels 3f9c, 4096x4096, ...": 7}
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from awq.errors import ConfigError
from awq.jit import cache_folder, replace_file
from awq.kernels.base import GEMV_ROWS

# GEMV reads the weight again for every 8 rows more, so it is never the faster one there.
MOST_ROWS = 8
_ROUNDS = 5  # of which the median counts: 5 ms for a linear

# Bytes: what a GPU of 8 TB/s writes in 50 us, longer than the CPU takes to enqueue a call and its events. Written to a
# part of it again and again, since a GPU that holds a model may have little memory left.
_WRITTEN, _LEAST_FLUSHED = 400_000_000, 64_000_000

Run = Callable[[str, int], object]  # a version and a number of rows


def recall(key: str) -> int | None:
    """The rows remembered under `key`, or those that AWQ_CROSSOVER sets for all; None where nothing is known.

    Raises ConfigError for an AWQ_CROSSOVER that is no number of rows.
    """
    if text := os.environ.get("AWQ_CROSSOVER"):
        if not text.isdecimal():
            raise ConfigError(f"AWQ_CROSSOVER={text!r} is no number of rows: give 0 or more, or unset it.")
        return int(text)
    return _known().get(key)


def find(key: str, run: Run, device: torch.device) -> int:
    """The rows known under `key`, else as `run` measures them now, which is remembered; GEMV_ROWS short of memory."""
    rows = recall(key)
    if rows is None:
        try:
            gemv, gemm = _measure(run, device)
        except torch.OutOfMemoryError:
            return GEMV_ROWS
        rows = _known()[key] = best_limit(gemv, gemm)
        _save(key, rows)
    return rows


def best_limit(gemv: Sequence[float], gemm: Sequence[float]) -> int:
    """Up to how many rows to use GEMV, given the time of each version for 1, 2, ... rows: what takes least in all.

    At least 1: one row is what GEMV is for, and a tie there is noise.
    """
    return min(range(1, len(gemv) + 1), key=lambda limit: sum(gemv[:limit]) + sum(gemm[limit:]))


class Flush:
    """Empties the L2 cache, and keeps the GPU busy while the CPU enqueues: events see a call, not its launch."""

    def __init__(self, device: torch.device) -> None:
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, _LEAST_FLUSHED)
        self._memory, self._times = torch.empty(size, dtype=torch.int8, device=device), -(-_WRITTEN // size)

    def __call__(self) -> None:
        for _ in range(self._times):
            self._memory.zero_()


def _measure(run: Run, device: torch.device) -> tuple[list[float], list[float]]:
    """Milliseconds of each version for 1 to MOST_ROWS rows: medians, all in turn, the weight not in the L2 cache."""
    calls = [(version, rows) for version in ("GEMV", "GEMM") for rows in range(1, MOST_ROWS + 1)]
    with torch.cuda.device(device):
        flush = Flush(device)
        for call in calls:
            run(*call)  # compiles and loads what it needs
        marks = [[_timed(run, call, flush) for call in calls] for _ in range(_ROUNDS)]
        torch.cuda.synchronize(device)
    columns = zip(*marks, strict=True)
    times = [statistics.median(start.elapsed_time(end) for start, end in column) for column in columns]
    return times[:MOST_ROWS], times[MOST_ROWS:]


def _timed(run: Run, call: tuple[str, int], flush: Flush) -> tuple[Any, Any]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush()
    start.record()
    run(*call)
    end.record()
    return start, end


@lru_cache
def _known() -> dict[str, int]:
    """What this process knows: the file as it was first read, and what was measured since."""
    folder = cache_folder("crossover")
    return _read(folder / "rows.json") if folder else {}


def _read(file: Path) -> dict[str, int]:
    """The file's entries; one that is damaged or absent has none, and what is no number of rows is left out."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: rows for key, rows in entries if type(rows) is int and 1 <= rows <= MOST_ROWS}


def _save(key: str, rows: int) -> None:
    """Add to the file as it is now: another process may have written since. It is replaced whole."""
    folder = cache_folder("crossover")
    if folder is None:  # which was said
        return
    file = folder / "rows.json"
    try:
        replace_file(file, json.dumps({**_read(file), key: rows}, indent=1).encode())
    except OSError as error:
        _warn_of(folder, str(error))


@lru_cache
def _warn_of(folder: Path, reason: str) -> None:
    logging.getLogger("awq").warning(
        "The faster kernel version is measured at every start: %s cannot be written (%s); set AWQ_CACHE to another.",
        folder,
        reason,
    )
