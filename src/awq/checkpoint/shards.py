"""Written files: tensors streamed into safetensors shards, and strict JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from awq.checkpoint.files import INDEX_FILE, SINGLE_FILE, TensorFiles
from awq.errors import AwqError, CheckpointError, ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Tensors read back and compared after writing: "quick" takes qweight, qzeros and scales of the first linear.
READ_BACK = {"none": 0, "quick": 3, "full": 2**63}


class ShardWriter:
    """Writes tensors in the order given, holding at most one shard in memory.

    One shard becomes `model.safetensors`, several `model-00001-of-0000n.safetensors` with an index.
    Nothing is created before the first tensor. The bytes depend on the tensors and their order alone.
    """

    def __init__(self, folder: Path, shard_bytes: int, verify: str) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._read_back = READ_BACK[verify]
        self._shard: dict[str, Tensor] = {}
        self._filled = 0
        self._total = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy the tensor into the current shard; CheckpointError for a name given twice."""
        if name in self._names:
            raise CheckpointError(f"two tensors are named {name}: each name can be stored once.")
        if self._shard and self._filled + tensor.nbytes > self._shard_bytes:
            self._flush()
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._names.add(name)
        self._shard[name] = copy
        self._filled += copy.nbytes
        self._total += copy.nbytes
        if len(self._digests) < self._read_back:
            self._digests[name] = _digest(copy)

    def finish(self) -> None:
        """Write what is left, give the files their final names, and read back; call it once."""
        if self._shard:
            self._flush()
        count = len(self._shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        names = [SINGLE_FILE] if count == 1 else names
        for number, name in enumerate(names):
            self._draft(number).rename(self._folder / name)
        if count > 1:
            places = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(places.items()))}
            write_json(self._folder / INDEX_FILE, index)
        if count and self._read_back:
            self._compare()

    def _draft(self, number: int) -> Path:
        """A shard's name until their count is known."""
        return self._folder / f"shard-{number}.safetensors"

    def _flush(self) -> None:
        path = self._draft(len(self._shards))
        with reported(path):
            path.parent.mkdir(exist_ok=True)
            save_file(self._shard, path, metadata={"format": "pt"})
        self._shards.append(list(self._shard))
        self._shard, self._filled = {}, 0

    def _compare(self) -> None:
        files = TensorFiles(self._folder)
        if set(files.names) != self._names:
            raise CheckpointError(f"{self._folder} does not list the tensors that were written: the disk is at fault.")
        for name, digest in self._digests.items():
            if _digest(files.load(name)) != digest:
                raise CheckpointError(f"{name} in {self._folder} reads back changed: the disk or memory is at fault.")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON in the given key order; NaN and infinities become null, unknown objects text."""
    strict = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)
    with reported(path):
        path.write_text(json.dumps(strict, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_size(size: int | str) -> int:
    """Bytes in a size such as "5GB", "200MiB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", str(size).strip().upper())
    unit = _UNITS.get(match[2]) if match else None
    if not match or unit is None or float(match[1]) * unit < 1:
        raise ConfigError(f'{size!r} is no size: write it as "5GB", "500MB" or a number of bytes.')
    return int(float(match[1]) * unit)


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(tensor.reshape(-1).view(torch.uint8).numpy().data).digest()


@contextmanager
def reported(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise AwqError(f"{path} could not be written ({error}): free some space or choose another folder.") from error
