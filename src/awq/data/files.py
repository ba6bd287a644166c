"""Texts from a file, a folder or a hub data set: a list of documents, in the order they are stored."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from awq.errors import CalibrationError, MissingDependencyError

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
_FILE_SUFFIXES = {".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".parquet"}
# A hub data set is streamed: this many rows give more tokens than calibration takes.
_HUB_ROWS = 10_000
_HUB_TIMEOUT = 10  # seconds
_NAME_COLUMN = "name the one with text, by text_column or --text-column"
_INSTEAD = "give a file, a folder, a hub data set as owner/name or, to calibrate, prose, code or self"


def read_texts(source: str | Path, split: str = "train", text_column: str = "text") -> list[str]:
    """The documents of a file (.jsonl, .json, .parquet, else plain text), of a folder of such, or of a hub data set.

    A hub data set is `owner/name` or `owner/name:config`, never one word; `split` applies to it alone. `text_column`
    names the key or column of .jsonl, .json, .parquet and hub rows. Blank documents are left out. CalibrationError
    where there is no text to read, MissingDependencyError where an optional package is needed: one sentence each.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        texts = _read_folder(path, text_column)
    elif path.is_file():
        texts = _read_file(path, text_column)
    elif path.suffix.lower() in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(str(source)):
        raise CalibrationError(f"the text {source} does not exist: {_INSTEAD}.")
    else:
        texts = _read_hub(str(source), split, text_column)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CalibrationError(f"{source} holds no text: give one that is not empty.")
    return texts


def _read_folder(folder: Path, text_column: str) -> list[str]:
    """Every text below `folder`, sorted by path; what is hidden or binary is passed over."""
    texts: list[str] = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and (path.suffix == ".parquet" or _decode(path) is not None):
            texts += _read_file(path, text_column)
    return texts


def _read_file(path: Path, text_column: str) -> list[str]:
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, text_column)
    text = _decode(path)
    if text is None:
        raise CalibrationError(f"{path} is not readable as UTF-8 text: give a .txt, .jsonl, .json or .parquet file.")
    if path.suffix.lower() in (".json", ".jsonl"):
        return _column(_json_records(text, path), text_column, path)
    return [text]


def _decode(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def _json_records(text: str, path: Path) -> list[Any]:
    """The records of a .json file that holds one list, else of a file of one JSON value a line."""
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        return list(_parse_json(text, path, 1))
    lines = enumerate(text.split("\n"), start=1)
    return [_parse_json(line, path, number) for number, line in lines if line.strip()]


def _parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CalibrationError(f"{path} is not valid JSON at line {line}: {error}.") from None


def _read_parquet(path: Path, text_column: str) -> list[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingDependencyError(f"reading {path} needs pyarrow: run `pip install pyarrow`.") from None
    try:
        file = ParquetFile(path)
        if text_column not in file.schema_arrow.names:
            raise _missing_column(text_column, path, file.schema_arrow.names)
        rows = file.read(columns=[text_column]).to_pylist()
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{path} cannot be read as parquet: {_first_line(error)}") from None
    return _column(rows, text_column, path)


def _read_hub(name: str, split: str, text_column: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{name} is no file or folder, and reading it as a hub data set needs the package datasets: "
            "run `pip install datasets`."
        ) from None
    if not _hub_answers():
        raise _unreachable(name)
    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
        return _column(islice(rows, _HUB_ROWS), text_column, name)
    except CalibrationError:
        raise
    except ConnectionError:
        raise _unreachable(name) from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = _first_line(error).rstrip(".")
        raise CalibrationError(
            f"{name} is no file or folder, and split {split!r} of a hub data set of that name could not be read "
            f"({reason}): {_INSTEAD}."
        ) from None


def _hub_answers() -> bool:
    """Asked once, where `datasets` would retry for half a minute; offline on purpose, its cache may still serve."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_HUB_TIMEOUT).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, SSLError)  # a certificate that `datasets` may know
    except OSError:
        return False
    return True


def _unreachable(name: str) -> CalibrationError:
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    why = (
        "is not asked, since HF_HUB_OFFLINE is set: unset it" if offline else "cannot be reached: check the connection"
    )
    return CalibrationError(
        f"{name} is no file or folder, and the hub {why}, "
        "or give a file, a folder or, to calibrate, prose, code or self."
    )


def _column(records: Iterable[Any], name: str, source: str | Path) -> list[str]:
    """The text of each record: a string, or an object's value under `name`; a null is left out."""
    texts = []
    for record in records:
        if isinstance(record, dict) and name not in record:
            raise _missing_column(name, source, list(record))
        value = record[name] if isinstance(record, dict) else record
        if value is not None and not isinstance(value, str):
            raise CalibrationError(f"{source} holds a {type(value).__name__} where text is needed: {_NAME_COLUMN}.")
        texts.append(value or "")
    return texts


def _missing_column(name: str, source: str | Path, columns: list[str]) -> CalibrationError:
    known = ", ".join(map(repr, columns)) or "none"
    return CalibrationError(f"{source} has no text column {name!r}, its columns are {known}: {_NAME_COLUMN}.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
