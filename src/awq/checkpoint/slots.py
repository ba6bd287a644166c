"""Shards whose tensors are all known by shape beforehand: laid out at once, then filled in any order, in place.

A block's results go straight to where they stay, so that nothing is written twice and nothing waits in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq.checkpoint.files import INDEX_FILE, SINGLE_FILE
from awq.checkpoint.shards import reported, write_json
from awq.errors import CheckpointError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # of a shard's data


@dataclass(frozen=True)
class _Slot:
    path: Path
    start: int
    outline: Tensor


class Slots:
    """The shards of a folder, split as soon as one would exceed `shard_bytes`.

    outlines: by name, tensors of the dtype and shape to store (of the meta device, say); their order is that of the
        shards, whose bytes so depend on the tensors and `shard_bytes` alone
    """

    def __init__(self, folder: Path, outlines: Mapping[str, Tensor], shard_bytes: int) -> None:
        self.folder = folder
        shards = _split(outlines, shard_bytes)
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        names = [SINGLE_FILE] if len(shards) == 1 else names
        self._headers: dict[Path, bytes] = {}
        self._slots: dict[str, _Slot] = {}
        for name, shard in zip(names, shards, strict=True):
            path = folder / name
            self._headers[path], starts = _header(shard)
            self._slots |= {tensor: _Slot(path, starts[tensor], outline) for tensor, outline in shard.items()}
        self._sizes = {path: len(header) for path, header in self._headers.items()}
        for slot in self._slots.values():
            self._sizes[slot.path] += slot.outline.nbytes

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())

    @property
    def missing_bytes(self) -> int:
        """What is not yet allocated of them."""
        return sum(size for path, size in self._sizes.items() if not path.exists())

    def allocate(self) -> None:
        """Make the files, whose space is then taken, or find them made; AwqError where the disk has too little."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, header in self._headers.items():
            with reported(path), path.open("r+b" if path.exists() else "w+b") as file:
                if os.fstat(file.fileno()).st_size != self._sizes[path]:
                    file.truncate(self._sizes[path])
                    _reserve(file.fileno(), self._sizes[path])
                file.seek(0)
                file.write(header)

    def fill(self, name: str, tensor: Tensor) -> None:
        """Write a tensor in its place; CheckpointError where none of its name, dtype and shape is expected."""
        slot = self._slots.get(name)
        if slot is None or (slot.outline.shape, slot.outline.dtype) != (tensor.shape, tensor.dtype):
            wanted = None if slot is None else f"{slot.outline.dtype} {list(slot.outline.shape)}"
            raise CheckpointError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} where the checkpoint was laid out for {wanted}: "
                "this is a bug; quantize with --whole."
            )
        with reported(slot.path), slot.path.open("r+b", buffering=0) as file:
            _write_at(file.fileno(), slot.start, _bytes(tensor))

    def sync(self, names: Iterable[str]) -> None:
        """What was filled in for these tensors survives a loss of power."""
        for path in {self._slots[name].path for name in names}:
            sync(path)

    def load(self, name: str) -> Tensor:
        slot = self._slots[name]
        flat = torch.frombuffer(bytearray(self._read(slot)), dtype=slot.outline.dtype)
        return flat.view(slot.outline.shape)

    def digest(self, names: Iterable[str]) -> str:
        """Of the bytes of these tensors as the files hold them; "" where a file is not what was allocated."""
        found = hashlib.blake2b(digest_size=16)
        for slot in map(self._slots.__getitem__, names):
            if not slot.path.exists() or slot.path.stat().st_size != self._sizes[slot.path]:
                return ""
            found.update(self._read(slot))
        return found.hexdigest()

    def _read(self, slot: _Slot) -> bytes:
        with slot.path.open("rb") as file:
            file.seek(slot.start)
            return file.read(slot.outline.nbytes)

    def write_index(self) -> None:
        """What more than one shard needs beside it."""
        if len(self._sizes) > 1:
            places = {name: slot.path.name for name, slot in sorted(self._slots.items())}
            total = sum(slot.outline.nbytes for slot in self._slots.values())
            write_json(self.folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def digest(tensors: Iterable[Tensor]) -> str:
    """What `Slots.digest` finds where these tensors were filled in."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(_bytes(tensor))
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """Of a file's bytes; "" where there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    with reported(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _split(outlines: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, outline in outlines.items():
        if shards[-1] and filled + outline.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = outline
        filled += outline.nbytes
    return shards


def _header(shard: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where each tensor starts in it: wide dtypes first, so that all align."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, outline in sorted(shard.items(), key=lambda item: -item[1].element_size()):
        if outline.dtype not in _NAMES:
            raise CheckpointError(f"{name} has dtype {outline.dtype}, which is not stored: cast it before.")
        end = position + outline.nbytes
        entries[name] = {"dtype": _NAMES[outline.dtype], "shape": list(outline.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    starts = {name: entry["data_offsets"][0] + 8 + len(text) for name, entry in entries.items() if "dtype" in entry}
    return len(text).to_bytes(8, "little") + text, starts


def _reserve(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return plain.numpy().data


def _write_at(handle: int, position: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(handle, data, position)
        data, position = data[written:], position + written
