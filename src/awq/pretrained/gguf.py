"""The header of a GGUF file, walked before the gguf package does, which believes every count in it.

magic "GGUF", version u32, tensors u64, settings u64
settings: key (u64 length, bytes), type u32, value; an array is its items' type u32, count u64, items
tensors:  name (u64 length, bytes), dimensions u32, each u64, type u32, offset u64
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from awq.checkpoint.files import Held
from awq.errors import CheckpointError
from awq.pretrained.limits import check_settings

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
# The gguf package keeps 400 bytes an item: a vocabulary of 256,000 with its merges has 1.3 million.
_MOST_ITEMS = 1 << 22
_VALUES_A_BYTE = 12  # of 1.56 bits, and tied ones counted twice


def check_gguf(path: Path) -> Held:
    """The number of tensors, and values at most; CheckpointError where the header claims more than the file holds."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).walk()
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): copy or download it again.") from None


class _Header:
    """A position in the file, and the numbers and strings from there on."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.items = path, data, 4, 0

    def walk(self) -> Held:
        if self.data[:4] != b"GGUF":
            raise ValueError("no GGUF file")
        if self.number("I") & 0xFFFF == 0:
            raise CheckpointError(f"{self.path} is a big-endian GGUF, which is not read: convert it again.")
        tensors, settings = self.number("Q"), self.number("Q")
        for _ in range(settings):
            key = self.text().decode("utf-8")
            check_settings(self.path, {key: self.value(self.number("I"))})
        for _ in range(tensors):
            self.text()
            if (dimensions := self.number("I")) > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self.skip(8 * dimensions + 4 + 8)
        return Held(tensors, _VALUES_A_BYTE * len(self.data))

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> bytes:
        size = self.number("Q")
        self.skip(size)
        return self.data[self.at - size : self.at]

    def value(self, kind: int) -> Any:
        """A number; None for text and arrays, which only have to be there."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            self.array(self.number("I"), self.number("Q"))
        else:
            raise ValueError(f"a setting of type {kind}")
        return None

    def array(self, kind: int, count: int) -> None:
        self.items += count
        if self.items > _MOST_ITEMS:
            raise ValueError(f"lists of more than {_MOST_ITEMS} items")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            for _ in range(count):
                self.text()
        else:
            raise ValueError(f"a list of type {kind}")

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError(f"it ends at {len(self.data)}, inside its header")
