"""What an unfinished run has done so far, on disk beside its output: a line a block, each with a checksum.

A line is written once what it tells of is on the disk. A torn or changed line ends the journal: what it told of, and
all after it, is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from awq.checkpoint.shards import reported
from awq.checkpoint.slots import sync
from awq.errors import AwqError

try:
    import fcntl
except ImportError:  # not on Windows, where a second run on the same output goes unnoticed
    fcntl = None  # type: ignore[assignment]

JOURNAL_FILE = "journal.jsonl"
Entry = dict[str, Any]


class Journal:
    """The first entry says what is being done (the identity), the others what of it is."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_FILE
        self.entries: list[Entry] = []
        self.damaged = False  # lines were found that are not as they were written
        self._file: Any = None

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The journal of a folder, an empty one where it has none; AwqError while another run has it."""
        folder.mkdir(parents=True, exist_ok=True)
        journal = cls(folder)
        with reported(journal.path):
            journal._file = journal.path.open("a+b")
        _lock(journal._file, folder)
        journal._file.seek(0)
        text = journal._file.read()
        journal.entries, end = _read(text)
        journal.damaged = b"\n" in text[end:]  # a last line without an end was being written
        journal._file.truncate(end)
        return journal

    @property
    def identity(self) -> Entry | None:
        return self.entries[0] if self.entries else None

    @property
    def done(self) -> list[Entry]:
        """One entry for each block that is done, in order."""
        return self.entries[1:]

    def add(self, entry: Mapping[str, Any]) -> None:
        """Note what is on the disk; it is itself when this returns."""
        self.entries.append(dict(entry))
        with reported(self.path):
            self._file.write(_line(self.entries[-1], self._checksum(len(self.entries) - 1)))
            self._file.flush()
            os.fsync(self._file.fileno())
            sync(self.path.parent)

    def forget(self, count: int | None = None) -> None:
        """Keep the identity and the first `count` blocks; nothing for None."""
        self.entries = [] if count is None else self.entries[: count + 1]
        text = b"".join(_line(entry, self._checksum(index)) for index, entry in enumerate(self.entries))
        with reported(self.path):
            self._file.truncate(len(text))
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _checksum(self, index: int) -> str:
        """Of the entry before: a line holds only behind the one that it was written behind."""
        return _digest("", self.entries[index - 1]) if index else ""


def changes(before: Any, after: Any, spoken: Mapping[str, str], name: str = "") -> list[str]:
    """What differs between two identities, by dotted name, or by what `spoken` has for it."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys((*before, *after))
        pairs = ((f"{name}.{key}".strip("."), before.get(key), after.get(key)) for key in keys)
        return [line for inner, one, other in pairs for line in changes(one, other, spoken, inner)]
    before, after = (json.loads(json.dumps(value, default=str)) for value in (before, after))
    return [] if before == after else [f"{spoken.get(name, name)} ({_short(before)}, now {_short(after)})"]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _read(data: bytes) -> tuple[list[Entry], int]:
    """The entries up to the first that is not whole, and where they end."""
    entries: list[Entry] = []
    end, before = 0, ""
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line.decode().partition(" ")[2])
        except ValueError:
            break
        if not isinstance(entry, dict) or line != _line(entry, before):
            break
        entries.append(entry)
        end, before = end + len(line), _digest("", entry)
    return entries, end


def _line(entry: Entry, before: str) -> bytes:
    return f"{_digest(before, entry)} {_text(entry)}\n".encode()


def _text(entry: Entry) -> str:
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":"), default=str)


def _digest(before: str, entry: Entry) -> str:
    return hashlib.blake2b((before + _text(entry)).encode(), digest_size=16).hexdigest()


def _lock(file: Any, folder: Path) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise AwqError(f"{folder} is being written by another run: wait for it, or end it.") from None
