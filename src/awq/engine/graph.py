"""CUDA graphs of what runs again and again: recorded when it runs for the second time, replayed from then on.

The first run is real work too: it compiles and warms what it launches, outside of any capture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch

_recording = threading.Lock()
_KEPT = 48  # graphs of one cache; each keeps some host memory, and what it returns


class Graphs:
    """The graphs over one cache's buffers, in one memory pool: they are never replayed side by side.

    A key holds what the work reads by address, so that none of it is freed before its graph.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.enabled = device, device.type == "cuda"
        self._graphs: dict[Hashable, tuple[Any, Any] | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """What `work` returns: by itself the first time, then by a graph, whose results lie at the same addresses."""
        if not self.enabled:
            return work()
        if key not in self._graphs:
            self._graphs[key] = None
            return work()
        recorded = self._graphs.pop(key) or self._record(work)
        self._graphs[key] = recorded  # the last used one comes last
        while len(self._graphs) > _KEPT:
            del self._graphs[next(iter(self._graphs))]
        graph, result = recorded
        graph.replay()
        return result

    def clear(self) -> None:
        """Forget all. Some of their results may still be about: torch records nothing more into a pool that is left."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def _record(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and launch meanwhile, but not record: that begins by waiting for the device.
        recording = torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local")
        with _recording, torch.cuda.device(self.device):
            torch.cuda.current_blas_handle()  # a thread's first use makes it, which cannot be recorded
            with recording:
                result = work()
        return graph, result
