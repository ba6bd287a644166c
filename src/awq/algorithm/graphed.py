"""A step that is taken many times as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 3  # eager steps before one is captured


class Graphed:
    """A step in one CUDA graph; the first ones are eager, and all are where the block cannot be captured."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.count = step, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.count += 1
        if self.count == WARM_UP + 1:
            self.graph = self._captured()
        if self.graph is None:
            self._aside()
        else:
            self.graph.replay()

    def _aside(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError:  # such as experts that ask which tokens are theirs
            return None
        return graph
