"""Compiled kernels on disk: named by what they were made from, read by nobody else, made once by many processes.

    <cache folder>/kernels/<key>.cubin   32 bytes: sha256 of the rest; then the cubin
    <cache folder>/kernels/<key>.lock    while a process compiles it

A file is written under another name and renamed, so that a reader sees all of it or nothing; a damaged one is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from awq.errors import ConfigError

if sys.platform != "win32":
    import fcntl

_DIGEST = 32  # bytes of a sha256
_PATIENCE_S = 120  # for another process's compilation, before doing it here: its holder may be stopped
_POLL_S = 0.01


def key_of(*parts: object) -> str:
    """The name of what is made from `parts`: sha256 of their text, in hex."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def fetch(key: str, make: Callable[[], bytes]) -> bytes:
    """The bytes kept under `key`, made by `make` and kept where there are none yet.

    Of several processes and threads that ask for one key together, one makes it. Where the folder cannot be written,
    `make` runs each time. Raises ConfigError for a folder that others may write.
    """
    folder = cache_folder("kernels")
    if folder is None:
        return make()
    file = folder / f"{key}.cubin"
    if (content := _read(file)) is not None:
        return content
    with _locked(folder / f"{key}.lock"):
        if (content := _read(file)) is None:
            content = make()
            _write(file, content)
    return content


def cache_folder(name: str) -> Path | None:
    """The folder `name` in this user's cache, made with private permissions; None, said once, where it cannot be made.

    AWQ_CACHE names the cache; else it is `awq` in XDG_CACHE_HOME, LOCALAPPDATA (Windows) or ~/.cache.
    Raises ConfigError where another user could put files into it.
    """
    root = _root()
    try:
        return _private(root, name)
    except OSError as error:
        _warn_of(root, error.strerror or str(error))
        return None


@cache
def _private(root: Path, name: str) -> Path:
    """Made and checked once a process."""
    for folder in (root, root / name):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder)
    return root / name


def _root() -> Path:
    if named := os.environ.get("AWQ_CACHE"):
        return Path(named).expanduser()
    parent = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(parent) if parent else Path("~/.cache").expanduser()) / "awq"


def _check_private(folder: Path) -> None:
    """A compiled kernel is code: whoever can write one there runs it as this user."""
    if not hasattr(os, "getuid"):
        return
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise ConfigError(f"The cache folder {folder} belongs to another user: set AWQ_CACHE to a folder of your own.")
    if status.st_mode & 0o022:
        raise ConfigError(f"Other users may write to the cache folder {folder}: run `chmod go-w {folder}`.")


@cache
def _warn_of(folder: Path, reason: str) -> None:
    """Once for each folder and reason."""
    logging.getLogger("awq").warning(
        "The cache folder %s cannot be written (%s), so kernels are compiled at every start: set AWQ_CACHE to another.",
        folder,
        reason,
    )


def _read(file: Path) -> bytes | None:
    """The content of `file`; None where it is absent or damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    content = data[_DIGEST:]
    return content if content and hashlib.sha256(content).digest() == data[:_DIGEST] else None


def _write(file: Path, content: bytes) -> None:
    try:
        replace_file(file, hashlib.sha256(content).digest() + content)
    except OSError as error:
        _warn_of(file.parent, error.strerror or str(error))


def replace_file(file: Path, content: bytes) -> None:
    """Put `content` there whole, or leave what was there and nothing beside it. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as handle:
        temporary = Path(handle.name)
        try:
            handle.write(content)
            handle.close()  # or Windows could not rename it
            temporary.replace(file)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of one key, or go on without where there are no locks or its holder takes too long.

    The kernel of the operating system frees the lock of a process that dies.
    """
    handle = _open(file)
    if handle is None:
        yield
        return
    held = _acquire(handle)
    try:
        yield
    finally:
        if held:
            # Whoever waits on the removed file, or locks a new one, looks for the content first, and finds it.
            with contextlib.suppress(OSError):
                file.unlink()
            fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may hold a copy of the handle
        os.close(handle)


def _open(file: Path) -> int | None:
    if sys.platform == "win32":  # processes that start together may each compile; each still gets a whole file
        return None
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _acquire(handle: int) -> bool:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_POLL_S)
        except OSError:  # a file system without locks
            return False
        else:
            return True
    return False
