"""Tokens on their way to the host, which reads them while later steps run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PLACES = 4  # more than the tokens that the host has not read yet


class Arrivals:
    """A few places in the host's memory, taken in turn by the tokens of up to `rows` sequences.

    A GPU's kernel may write them there by itself: a copy between two steps takes several microseconds of the device.

    places: int64 [PLACES, rows]; pinned, and graphs hold its address
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.device, gpu = device, device.type == "cuda"
        with torch.inference_mode(False):
            self.places = torch.zeros(PLACES, rows, dtype=torch.int64, pin_memory=gpu)
        self._events = [torch.cuda.Event() if gpu else None for _ in range(PLACES)]

    def put(self, number: int, tokens: Tensor) -> None:
        """Copy token `number` of every row, of tokens [batch, 1]."""
        place = self.places[number % PLACES, : len(tokens)]
        place.copy_(tokens[:, 0], non_blocking=self.device.type == "cuda")

    def expect(self, number: int, batch: int) -> Callable[[], list[int]]:
        """What waits for token `number` of every row, and returns them. All that takes them here is enqueued."""
        event, place = self._events[number % PLACES], self.places[number % PLACES, :batch]
        if event is not None:
            event.record(torch.cuda.current_stream(self.device))

        def read() -> list[int]:
            if event is not None:
                event.synchronize()
            tokens: list[int] = place.tolist()
            return tokens

        return read
