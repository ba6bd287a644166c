"""The text that ships with the package, and the code that ships with Python: no download needed.

The text files were written for this package. A line `%% title` opens each passage; the titles are not part of the
text. `heldout.txt` evaluates, the others calibrate; they share no topic.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from awq.errors import CalibrationError

# English of many registers; chats, tables, configuration, logs and formulas; nineteen other languages, which cost
# English and code nothing (SmolLM2, KL x 1000 on other text: 107 and 106 with them, 109 and 107 without).
_PROSE = ("prose.txt", "formats.txt", "languages.txt")
_SEPARATOR = re.compile(r"^%% .*\n", re.MULTILINE)
_MODULE_BYTES = range(8_000, 60_001)
# Tests, tools and tables: not the code that people write.
_SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages",
    "turtledemo", "encodings", "pydoc_data", "ensurepip", "__pycache__",
}  # fmt: skip
_GENERATED = re.compile(r"\bgenerated (and|by|from|with|using|automatically)|auto-?generated|do not edit", re.I)


def builtin_text(domain: str) -> list[str]:
    """The built-in texts of a domain, in a fixed order: "prose" (own passages) or "code" (Python's own modules)."""
    if domain == "prose":
        return [passage for name in _PROSE for passage in _passages(name)]
    if domain == "code":
        return _standard_library()
    raise CalibrationError(f"there is no built-in text {domain!r}: use 'prose' or 'code'.")


def evaluation_text() -> str:
    """Built-in prose for perplexity, disjoint from the calibration prose in topic and wording."""
    return "\n\n".join(_passages("heldout.txt"))


def _passages(name: str) -> list[str]:
    text = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    return [passage.strip() for passage in _SEPARATOR.split(text) if passage.strip()]


def _standard_library() -> list[str]:
    """The mid-sized modules of the running Python, sorted by path: the same for every run of one Python."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = [text for path in sorted(_modules(root)) if (text := _written(path))]
    if not texts:
        raise CalibrationError(
            f"built-in code reads the sources of Python's standard library, and {root} holds none: "
            "give a file or folder of code instead."
        )
    return texts


def _modules(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = set(below) - _SKIPPED_FOLDERS
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _written(path: Path) -> str | None:
    """The source of a mid-sized module that a person wrote, else None."""
    if path.stat().st_size not in _MODULE_BYTES:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if _GENERATED.search(text[:2000]) else text.strip()
