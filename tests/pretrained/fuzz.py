"""Damage model folders at random, seeded, and read them within a limit of memory.

`python -m tests.pretrained.fuzz FOLDER ...` runs in a process of its own, which ends with a traceback where something
else than one sentence comes of it.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from transformers.utils import logging

from awq.checkpoint import open_checkpoint
from awq.cli.inspect import inspect
from awq.errors import AwqError
from awq.pretrained.bounds import limited_memory
from awq.pretrained.source import find_source
from awq.storage.convert import convert_checkpoint
from awq.storage.load import load_dequantized

BYTES, SECONDS = 1 << 30, 300
SETTINGS = (None, True, -1, 0, 1, 7, 2**16, 2**31, 2**63, 10**12, 10**30, 1e308, float("nan"), "", "x", "a/b", [], {})
SIZES = (-1, 0, 1, 3, 2**20, 2**32, 2**40, 2**62, 2**63, 2**64 - 1, 10**30, 1.5, "4", None, [])
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64", "U8", "U64", "BOOL", "F8_E4M3", "F4", "C64", "X", 7)


def damage_header(path: Path, chance: random.Random) -> None:
    """One field of one tensor, or the table as a whole."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    name = chance.choice(names)
    entry = header[name]
    kind = chance.randrange(8)
    if kind == 0:
        entry["dtype"] = chance.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = [chance.choice(SIZES) for _ in range(chance.randrange(5))]
    elif kind == 2:
        entry["shape"].reverse()
    elif kind == 3:
        entry["data_offsets"] = [chance.choice(SIZES), chance.choice(SIZES)]
    elif kind == 4:
        entry["data_offsets"] = header[chance.choice(names)]["data_offsets"]
    elif kind == 5:
        header[chance.choice(("", "\n", "a" * 2000, "a.qweight", "x.scales", "y.bias", "\x1b[2J"))] = entry
    elif kind == 6:
        entry |= {"dtype": chance.choice(DTYPES), "shape": [chance.choice(SIZES), 0], "data_offsets": [0, 0]}
    else:
        header[name] = chance.choice(SETTINGS)
    table = json.dumps(header).encode()
    length = chance.choice(SIZES[3:10]) if chance.random() < 0.1 else len(table)
    path.write_bytes(struct.pack("<Q", length) + table + data[8 + size :])


def damage_json(path: Path, chance: random.Random) -> None:
    """A value at any depth, or a key that other files have."""
    content = json.loads(path.read_text())
    place, key = content, chance.choice(list(content))
    while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.7:
        place = place[key]
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    if isinstance(place, dict) and chance.random() < 0.2:
        key = chance.choice(("num_labels", "layer_types", "text_config", "auto_map", "rope_parameters", "to_dict"))
    place[key] = chance.choice(SETTINGS) if chance.random() < 0.9 else {"a": [["b"]]}
    path.write_text(json.dumps(content))


def damage_bytes(path: Path, chance: random.Random) -> None:
    """A few bytes near the start, a number of eight bytes, or the length."""
    data = bytearray(path.read_bytes())
    for _ in range(chance.randrange(1, 4)):
        data[chance.randrange(min(len(data), 1 << 14))] = chance.randrange(256)
    if chance.random() < 0.5:
        at = chance.randrange(min(len(data), chance.choice((64, 512, 1 << 14))))
        data[at : at + 8] = struct.pack("<Q", chance.choice((0, 2**16, 2**31, 2**40, 2**63, 2**64 - 1)))
    path.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.2 else data)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {".json": damage_json, ".gguf": damage_bytes}


def read(folder: Path, target: Path) -> None:
    """Everything that reads a folder."""
    if (folder / "outliers").is_dir():
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.linears:
            checkpoint.outliers(name)
        for as_json in (False, True):
            with redirect_stdout(StringIO()):
                inspect(str(folder), as_json=as_json)
        load_dequantized(folder)
        convert_checkpoint(folder, target, overwrite=True)
        return
    source = find_source(next(folder.glob("*.gguf"), folder))
    source.config()
    source.tokenizer()
    source.load()


def main(model: Path, seed: int, count: int) -> None:
    chance = random.Random(seed)
    names = [str(path.relative_to(model)) for path in sorted(model.rglob("*")) if path.is_file()]
    sentences = 0
    for round_ in range(count):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "model")
            shutil.copytree(model, folder)
            path = folder / chance.choice(names)
            damage = DAMAGES.get(path.suffix, chance.choice((damage_header, damage_bytes)))
            damage(path, chance)
            try:
                read(folder, Path(place, "converted"))
            except AwqError:
                sentences += 1
            except BaseException:
                sys.stderr.write(f"round {round_} of seed {seed}: {path.name}\n")
                raise
    sys.stdout.write(f"{sentences}\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    signal.alarm(SECONDS)  # a hang is a failure
    with limited_memory(BYTES):
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
