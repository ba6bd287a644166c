"""Where activations wait between uses: on the device while there is room, then on the host, then in files.

They come back as they were, so that the room there is changes nothing of the result.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import inf
from typing import Any, overload

import torch
from torch import Tensor

Allocate = Callable[[int], Tensor]  # so many bytes, uint8
LEAVING = 1 << 28  # bytes that wait for their copy: what a chunk of 7B leaves behind is 0.16 GB


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


class Copies:
    """Copies between a GPU and page-locked memory, beside what is computed, in the order in which they are asked for.

    All memory is of the stream that computes, which waits for a copy before it reuses what that read or wrote. (Told by
    `record_stream` the allocator would ask the GPU instead, and take new memory as long as the host is ahead of it.)
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def leave(self, tensor: Tensor, there: Tensor) -> None:
        """Copy `tensor`, which is not to be changed any more, to the host."""
        self._leaving.append((tensor, self._copy(there, tensor)))
        while sum(waiting.nbytes for waiting, _ in self._leaving) > LEAVING:
            _, copied = self._leaving.popleft()
            copied.wait()

    def fetch(self, there: Tensor) -> Coming:
        """Begin to copy a tensor back, after what computes by now."""
        value = torch.empty(there.shape, dtype=there.dtype, device=self.device)
        return Coming(value, self._copy(value, there))

    def _copy(self, into: Tensor, tensor: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            into.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(self.stream)
        return copied


class Coming:
    """A tensor on its way to the device; whether it is read or forgotten, what computes next waits for it."""

    def __init__(self, value: Tensor, copied: torch.cuda.Event) -> None:
        self.value = value
        weakref.finalize(self, copied.wait).atexit = False


def on_host(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _taken_on_host(size: int) -> int:
    """What torch locks for so many bytes: a power of two."""
    return 1 << (size - 1).bit_length() if torch.cuda.is_available() else size


@dataclass
class Activations:
    """Rooms, the first two for tensors as they are; beyond the others' there is `spill`, which has no limit.

    often: for what is read in every pass over a block
    """

    device: Room = field(default_factory=Room)
    host: Room = field(default_factory=lambda: Room(0))
    spill: Allocate = on_host
    often: Room = field(default_factory=lambda: Room(0))
    spilled: int = 0  # bytes that went to files, in all
    _idle: dict[int, list[Tensor]] = field(default_factory=dict)  # host memory in use before: page-locking is slow
    _copies: Copies | None = None

    def park(self, tensor: Tensor, often: bool = False) -> Parked:
        """Keep a tensor; it is not to be changed any more."""
        size = tensor.nbytes
        for room in (self.often, self.device) if often else (self.device,):
            if room.take(size):
                return Parked(tensor, self._returning(room, size))
        if self.host.take(_taken_on_host(size)):
            idle = self._idle.get(size)
            kept = idle.pop() if idle else on_host(size)
            return self._moved(tensor, kept, self._returning(self.host, _taken_on_host(size), kept))
        self.spilled += size
        return self._moved(tensor, self.spill(size), None)

    def list(self) -> Runs:
        return Runs(self)

    def _moved(self, tensor: Tensor, kept: Tensor, free: Callable[[], None] | None) -> Parked:
        there = kept.view(tensor.dtype).view(tensor.shape)
        if not (tensor.is_cuda and there.is_pinned()):
            there.copy_(tensor)
            return Parked(there, free, tensor.device)
        if self._copies is None:
            self._copies = Copies(tensor.device)
        self._copies.leave(tensor, there)
        return Parked(there, free, tensor.device, self._copies)

    def _returning(self, room: Room, size: int, kept: Tensor | None = None) -> Callable[[], None]:
        def free() -> None:
            room.give(size)
            if kept is not None:
                self._idle.setdefault(kept.nbytes, []).append(kept)

        return free


class Parked:
    """A tensor somewhere. Its room is free again once nothing refers to it."""

    def __init__(
        self,
        there: Tensor,
        free: Callable[[], None] | None,
        device: torch.device | None = None,
        copies: Copies | None = None,
    ) -> None:
        self._there, self._device, self._copies = there, device, copies
        self._coming: Coming | None = None
        if free is not None:
            weakref.finalize(self, free)

    @property
    def shape(self) -> torch.Size:
        return self._there.shape

    def begin(self) -> None:
        """It is about to be asked for."""
        if self._copies and self._coming is None:
            self._coming = self._copies.fetch(self._there)

    def get(self) -> Tensor:
        """The tensor, on its device."""
        if self._device is None:
            return self._there
        if self._device == self._there.device:
            return self._there.clone()  # a mapped file is let go of before it is
        self.begin()
        if self._coming is None:
            return self._there.to(self._device)
        value, self._coming = self._coming.value, None
        return value


def ahead(items: Sequence[Parked]) -> Iterator[Tensor]:
    """Each of them, the next one on its way."""
    for item, following in zip_longest(items, items[1:]):
        item.begin()
        if following:
            following.begin()
        yield item.get()


class ParkedList(Sequence[Tensor]):
    """Parked tensors, each on the device only while it is looked at, and while the one before is."""

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
        if isinstance(index, slice):
            return ParkedList(self.items[index])
        following = self.items[index + 1 : index + 2] if index >= 0 else []
        return next(ahead([self.items[index], *following]))


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
        return map(Fetched, self._parked, [*self._parked[1:], {}])


class Fetched(Mapping[str, Tensor]):
    """Parked tensors by name, each fetched as it is asked for, with that of the run to follow on its way."""

    def __init__(self, parked: dict[str, Parked], following: dict[str, Parked]) -> None:
        self._parked, self._following = parked, following

    def __getitem__(self, name: str) -> Tensor:
        following = [self._following[name]] if name in self._following else []
        return next(ahead([self._parked[name], *following]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parked)

    def __len__(self) -> int:
        return len(self._parked)


class Kept:
    """An attribute that parks the tensor it is given, in the `activations` of its object."""

    def __init__(self, often: bool = False) -> None:
        self.often = often

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, owner: Any, _type: type | None = None) -> Any:
        if owner is None:
            return None
        parked: Parked | None = owner.__dict__.get(self.name)
        return None if parked is None else parked.get()

    def __set__(self, owner: Any, tensor: Tensor | None) -> None:
        owner.__dict__[self.name] = None
        owner.__dict__[self.name] = None if tensor is None else owner.activations.park(tensor, self.often)
