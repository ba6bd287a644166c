"""The files of one model folder, read lazily and without trust: JSON and safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from awq.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REPORT_FILE = "awq_report.json"
# A trillion weights in small experts have 23 MB of index, 35 MB of report and 17 MB of header; parsed, a hostile one of
# this size takes 3 GB (JSON) and 0.5 GB (header).
JSON_BYTES = 128 << 20
HEADER_BYTES = 32 << 20
LONGEST_NAME = 1024
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LFS_POINTER = b"version https://git-lfs"
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's zip, and bare ones
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Held(NamedTuple):
    """What weight files can hold: the number of tensors, and values at most, those that are tied counted twice."""

    tensors: int
    values: int


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused when it leads out of the folder, except into the blobs of a hub cache."""
    root = folder.resolve()
    real = (root / name).resolve()
    # not resolved further: blobs that are themselves a link would lead anywhere
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in (root, *blobs)):
        raise CheckpointError(f"{folder / name} leads out of its folder, to {real}: put the file itself there.")
    return root / name


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of the folder, None when there is no such file."""
    path = inside(folder, name)
    try:
        if not path.exists():
            return None
        content = json.loads(_plain_bytes(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): copy or download it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a JSON object: copy or download it again.")
    return content


def _plain_bytes(path: Path) -> bytes:
    """The content; CheckpointError for a pipe or a device, which may never end, and for more than JSON_BYTES."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a plain file: copy or download it again.")
    with path.open("rb") as file:
        data = file.read(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        raise CheckpointError(f"{path} has more than {JSON_BYTES >> 20} MiB, which no model needs: it is not read.")
    return data


class TensorFiles:
    """The tensors of a folder's safetensors files, memory-mapped and read one at a time.

    CheckpointError when a file is missing, damaged, pickled, or lies outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where = dict(sorted(_locate(folder).items()))
        for name in self._where:
            if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
                raise CheckpointError(f"{folder} has a tensor named {name[:80]!a}, which is no name: do not use it.")

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def outline(self, name: str) -> Tensor:
        """A tensor without data (meta device) of the stored dtype and shape; reads the header only."""
        stored = self._handle(name).get_slice(name)
        if (dtype := _DTYPES.get(stored.get_dtype())) is None:
            raise CheckpointError(f"{name} in {self.folder} has dtype {stored.get_dtype()}, which AWQ does not use.")
        shape = stored.get_shape()
        if 0 in shape and max(shape) > 1 << 32:  # no bytes back such a size, so that it may be any
            raise CheckpointError(f"{name} in {self.folder} claims the impossible shape {shape}: do not use it.")
        return torch.empty(shape, dtype=dtype, device="meta")

    def held(self) -> Held:
        """How many tensors there are, and values at most: a byte is two of 4 bits."""
        return Held(len(self._where), 4 * sum(path.stat().st_size for path in self.folder.glob("*.safetensors")))

    def load(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._handle(name).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} in {self.folder} cannot be read ({error}): copy the file again.") from None
        return tensor

    def _handle(self, name: str) -> Any:
        try:
            return self._where[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}: it is not one of this model.") from None


def _locate(folder: Path) -> dict[str, Any]:
    """Tensor name -> open file, by the single file, else the index, else the only safetensors file there."""
    if inside(folder, SINGLE_FILE).exists():
        return _single(folder, SINGLE_FILE)
    if index := read_json(folder, INDEX_FILE):
        return _indexed(folder, index)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return _single(folder, found[0])
    if found:
        raise CheckpointError(f"{folder} holds {len(found)} safetensors files but no {INDEX_FILE}: copy that too.")
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        raise CheckpointError(
            f"{folder} holds its weights only as pickle ({pickles[0]}), which can run code when opened and is not "
            "read: convert it to safetensors first, with the tool that wrote it."
        )
    raise CheckpointError(f"{folder} holds no safetensors file: copy or download the weights.")


def _single(folder: Path, name: str) -> dict[str, Any]:
    file = _open(inside(folder, name))
    return dict.fromkeys(file.keys(), file)


def _indexed(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map of names to files: download it again.")
    files: dict[str, Any] = {}
    for place in sorted(set(places.values())):
        if Path(place).name != place or "\\" in place or not place.isprintable():
            raise CheckpointError(f"{folder / INDEX_FILE} names {place!r}, which is not a file of this folder.")
        files[place] = _open(inside(folder, place))
    held = {place: set(file.keys()) for place, file in files.items()}
    for name, place in places.items():
        if name not in held[place]:
            raise CheckpointError(f"{folder / place} lacks {name}, which the index expects there: download it again.")
    return {name: files[place] for name, place in places.items()}


def _open(path: Path) -> Any:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or not a plain file: copy or download it.")
        with path.open("rb") as file:
            _check_start(path, file.read(len(_LFS_POINTER)))
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): copy or download it again.") from None


def _check_start(path: Path, start: bytes) -> None:
    """CheckpointError for what only has the name of a safetensors file, or a header too large to be parsed."""
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path} is only a Git LFS pointer: run `git lfs pull` there.")
    header = int.from_bytes(start[:8], "little")
    if start.startswith(_PICKLE_STARTS) and header > path.stat().st_size:
        raise CheckpointError(
            f"{path} is a pickle under another name, which can run code when opened and is not read: do not use it."
        )
    if HEADER_BYTES < header <= path.stat().st_size:
        raise CheckpointError(f"{path} has a header of {header >> 20} MiB, which no model needs: it is not read.")
