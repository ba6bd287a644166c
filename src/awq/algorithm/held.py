"""Where the float model's weights are: in memory, or elsewhere but for what is being worked on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Weights(Protocol):
    """Contexts within which a part of the model has its weights."""

    def enter(self) -> AbstractContextManager[None]:
        """What lies outside of the blocks."""

    def block(self, index: int) -> AbstractContextManager[None]:
        """A block; it need not be what it was before, or be of use behind it."""


class InMemory:
    """A model that has all of its weights."""

    def enter(self) -> AbstractContextManager[None]:
        return nullcontext()

    def block(self, index: int) -> AbstractContextManager[None]:
        return nullcontext()


IN_MEMORY = InMemory()
