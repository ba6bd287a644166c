"""Where the time of a run goes, and how much memory it takes: by stage, and at the peak."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch

_EVERY = 0.05  # seconds between two looks at the memory
_STATUS = Path("/proc/self/status")


class Stages:
    """Seconds by stage, of which one within another counts in its own alone, and the most memory that was taken.

    A GPU is waited for at each end of a stage.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.host = 0
        self._open: list[str] = []
        self._since = time.monotonic()
        self._ended = threading.Event()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="awq-memory", daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._note()
        self._open.append(stage)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def memory(self) -> dict[str, int]:
        """The most that was taken so far, in bytes: of the GPU, by tensors; of the host, without mapped files."""
        self.host = max(self.host, host_bytes())
        gpu = {"gpu": torch.cuda.max_memory_allocated(self.device)} if self.device.type == "cuda" else {}
        return {**gpu, "host": self.host}

    def _note(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.monotonic()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY):
            self.host = max(self.host, host_bytes())


def host_bytes() -> int:
    """What the process takes now of host memory but for mapped files, or, where that is not known, at its peak."""
    if _STATUS.exists():
        facts = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(facts["RssAnon"].split()[0]) << 10
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
