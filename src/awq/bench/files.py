"""The files that a measurement writes, checked before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from awq.errors import ConfigError


def check_writable(path: Path) -> None:
    """ConfigError where a file cannot be written to or made; nothing is left behind."""
    with refusing(path):
        if not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: the folder {path.parent} does not exist.")
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """ConfigError for what the system does not permit."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give another file.") from None
