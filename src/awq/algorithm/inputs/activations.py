"""Where activations wait between uses: on the device while there is room, then on the host, then in files.

They come back as they were, so that the room there is changes nothing of the result.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, overload

import torch
from torch import Tensor

Allocate = Callable[[int], Tensor]  # so many bytes, uint8


@dataclass
class Room:
    """One place and what is free in it, in bytes."""

    free: float = inf
    lowest: float = inf

    def take(self, size: int) -> bool:
        if size > self.free:
            return False
        self.free -= size
        self.lowest = min(self.lowest, self.free)
        return True

    def give(self, size: int) -> None:
        self.free += size


def on_host(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


@dataclass
class Activations:
    """Three rooms, the first for tensors as they are; beyond the others' there is `spill`, which has no limit."""

    device: Room = field(default_factory=Room)
    host: Room = field(default_factory=lambda: Room(0))
    spill: Allocate = on_host
    spilled: int = 0  # bytes that went to files, in all
    _idle: dict[int, list[Tensor]] = field(default_factory=dict)  # host memory in use before: page-locking is slow

    def park(self, tensor: Tensor) -> Parked:
        """Keep a tensor; it is not to be changed any more."""
        size = tensor.nbytes
        if self.device.take(size):
            return Parked(tensor, self._returning(self.device, size))
        if self.host.take(size):
            idle = self._idle.get(size)
            kept = idle.pop() if idle else on_host(size)
            return self._moved(tensor, kept, self._returning(self.host, size, kept))
        self.spilled += size
        return self._moved(tensor, self.spill(size), None)

    def list(self) -> Runs:
        return Runs(self)

    def _moved(self, tensor: Tensor, kept: Tensor, free: Callable[[], None] | None) -> Parked:
        there = kept.view(tensor.dtype).view(tensor.shape)
        there.copy_(tensor, non_blocking=True)  # in order with what the device does before and after
        return Parked(there, free, tensor.device)

    def _returning(self, room: Room, size: int, kept: Tensor | None = None) -> Callable[[], None]:
        def free() -> None:
            room.give(size)
            if kept is not None:
                self._idle.setdefault(size, []).append(kept)

        return free


class Parked:
    """A tensor somewhere. Its room is free again once nothing refers to it."""

    def __init__(self, there: Tensor, free: Callable[[], None] | None, device: torch.device | None = None) -> None:
        self._there, self._device = there, device
        if free is not None:
            weakref.finalize(self, free)

    @property
    def shape(self) -> torch.Size:
        return self._there.shape

    def get(self) -> Tensor:
        """The tensor, on its device."""
        if self._device is None:
            return self._there
        if self._device == self._there.device:
            return self._there.clone()  # a mapped file is let go of before it is
        return self._there.to(self._device, non_blocking=self._there.is_pinned())


class ParkedList(Sequence[Tensor]):
    """Parked tensors, each on the device only while it is looked at."""

    def __init__(self, items: list[Parked]) -> None:
        self.items = items

    @property
    def shapes(self) -> list[torch.Size]:
        return [item.shape for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> ParkedList: ...
    def __getitem__(self, index: int | slice) -> Tensor | ParkedList:
        return ParkedList(self.items[index]) if isinstance(index, slice) else self.items[index].get()


class Runs:
    """Dictionaries of tensors, one a run of a block; all but the last are parked."""

    def __init__(self, activations: Activations) -> None:
        self._activations = activations
        self._parked: list[dict[str, Parked]] = []
        self._last: dict[str, Tensor] | None = None

    def append(self, seen: dict[str, Tensor]) -> None:
        self.settle()
        self._last = seen

    def settle(self) -> None:
        """Park the last one too."""
        if self._last is not None:
            self._parked.append({name: self._activations.park(tensor) for name, tensor in self._last.items()})
            self._last = None

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        assert index == -1 and self._last is not None
        return self._last

    def __len__(self) -> int:
        return len(self._parked) + (self._last is not None)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        self.settle()
        return map(Fetched, self._parked)


class Fetched(Mapping[str, Tensor]):
    """Parked tensors by name, each fetched as it is asked for."""

    def __init__(self, parked: dict[str, Parked]) -> None:
        self._parked = parked

    def __getitem__(self, name: str) -> Tensor:
        return self._parked[name].get()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parked)

    def __len__(self) -> int:
        return len(self._parked)


class Kept:
    """An attribute that parks the tensor it is given, in the `activations` of its object."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, owner: Any, _type: type | None = None) -> Any:
        if owner is None:
            return None
        parked: Parked | None = owner.__dict__.get(self.name)
        return None if parked is None else parked.get()

    def __set__(self, owner: Any, tensor: Tensor | None) -> None:
        owner.__dict__[self.name] = None
        owner.__dict__[self.name] = None if tensor is None else owner.activations.park(tensor)
